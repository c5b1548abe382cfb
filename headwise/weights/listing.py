"""What tensors a checkpoint holds and where their bytes lie: headers only, no tensor is read.

Safetensors: 8 bytes little-endian header length, then JSON, then the tensors. A sharded checkpoint has an index that maps
each tensor to its file. Source: huggingface/safetensors, README "Format" and safetensors/src/tensor.rs (limits).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headwise.errors import SpecError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader, tensor.rs MAX_HEADER_SIZE
INDEX = "model.safetensors.index.json"

# safetensors dtype -> (our type name, bytes per element)
_SAFETENSORS_TYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("f64", 8), "F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2),
    "F8_E4M3": ("f8_e4m3", 1), "F8_E5M2": ("f8_e5m2", 1), "F8_E8M0": ("f8_e8m0", 1),
    "I64": ("i64", 8), "I32": ("i32", 4), "I16": ("i16", 2), "I8": ("i8", 1),
    "U64": ("u64", 8), "U32": ("u32", 4), "U16": ("u16", 2), "U8": ("u8", 1), "BOOL": ("bool", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk; a row is `shape[-1]` elements, stored as blocks of `block` elements in `block_bytes` bytes."""

    name: str
    shape: tuple[int, ...]
    type: str  # "f32", "bf16", "q4_k", ...
    block: int
    block_bytes: int
    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The tensors of one checkpoint by their stored name."""

    where: Path  # a directory of safetensors, or a GGUF file
    style: Literal["hf", "gguf"]
    architecture: str  # GGUF `general.architecture`, which decides how q and k are stored; "" for Hugging Face
    tensors: Mapping[str, StoredTensor]


def list_checkpoint(path: Path) -> Listing:
    """The tensors of a Hugging Face directory, a .safetensors file or a GGUF file.

    Raises:
        SpecError: a file is missing, cut off or contradicts itself.
    """
    if path.is_dir():
        return Listing(path, "hf", "", _list_folder(path))
    if path.suffix == ".safetensors":
        return Listing(path, "hf", "", read_safetensors_header(path))
    return _list_gguf(path)


def _list_gguf(path: Path) -> Listing:
    from headwise.spec.gguf import read_gguf

    file = read_gguf(path)
    tensors = {
        t.name: StoredTensor(t.name, t.shape, t.type.name, t.type.block, t.type.block_bytes, t.path, t.offset, t.n_bytes)
        for t in file.tensors.values()
    }
    return Listing(path, "gguf", str(file.metadata["general.architecture"]), tensors)


def _list_folder(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    if index.exists():
        return _list_shards(folder, index)
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_safetensors_header(found[0])
    if found:
        raise SpecError(
            f"{folder} holds {len(found)} .safetensors files and no {INDEX}",
            why="the index says which file holds which tensor",
            do=f"download {INDEX} too",
        )
    raise SpecError(
        f"{folder} holds no weights",
        why="there is no .safetensors file; pickled weights (.bin, .pth) are not read",
        do="download the .safetensors files, or give a .gguf file",
    )


def _list_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SpecError(f"{index} cannot be read", why=repr(error), do="download it again") from error
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise SpecError(f"{index} points at {file!r}", why="shards lie beside their index", do="get the file from its source")
        if not (folder / file).exists():
            lost = sum(1 for other in files.values() if other == file)
            raise SpecError(
                f"{folder} lacks the shard {file}",
                why=f"{INDEX} places {lost} of {len(files)} tensors in it",
                do="finish the download",
            )
        headers[file] = read_safetensors_header(folder / file)
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    for name, file in files.items():
        if name not in headers[file]:
            raise SpecError(
                f"{folder / file} lacks the tensor {name}",
                why=f"{INDEX} places it there",
                do="download both files again",
            )
        tensors[name] = headers[file][name]
    return tensors


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one .safetensors file, checked against the file's size and against each other."""

    def broken(why: str) -> SpecError:
        return SpecError(f"{path} is not a whole safetensors file", why=why, do="download it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise broken(f"it has {size} bytes; the header length alone takes 8")
            (header_bytes,) = struct.unpack("<Q", start)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise broken(f"its header claims {header_bytes} bytes; the file has {size}")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise SpecError(f"{path} cannot be read", why=str(error), do="check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise broken("its header is no JSON object")
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensor = _entry(path, name, entry, data_start=8 + header_bytes)
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"tensor {name}: {error!r}") from error
        if tensor.offset + tensor.n_bytes > size:
            raise broken(f"tensor {name} ends at byte {tensor.offset + tensor.n_bytes}; the file has {size}")
        tensors[name] = tensor
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.n_bytes)):
        if tensor.offset < end:
            raise broken(f"tensors {last} and {tensor.name} overlap")
        end, last = tensor.offset + tensor.n_bytes, tensor.name
    return tensors


def _entry(path: Path, name: str, entry: Any, *, data_start: int) -> StoredTensor:
    """One header entry; raises what a malformed one raises, the caller names the tensor."""
    type_name, item_bytes = _SAFETENSORS_TYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a negative or fractional number")
    if end - begin != math.prod(shape) * item_bytes:
        raise ValueError(f"{end - begin} bytes for shape {list(shape)} of {entry['dtype']}")
    return StoredTensor(name, shape, type_name, 1, item_bytes, path, data_start + begin, end - begin)
