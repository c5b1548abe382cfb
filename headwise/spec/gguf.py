"""A GGUF file's header, read by memory map: the metadata and where each tensor lies. No weights, no numpy.

Layout, little-endian: "GGUF", version u32, tensor count u64, key count u64; per key a name, a type u32 and a value; per
tensor a name, its dims (innermost first), a type u32 and an offset u64; padding; data. A string is a u64 length and its
bytes. Arrays stay in the file until they are read: a tokenizer's are most of the header.

Every length is checked against the file before it is believed, so a damaged file costs a SpecError and never memory.
Source: the GGUF specification (ggml docs/gguf.md); llama.cpp ggml/src/gguf.cpp for what is refused.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headwise.errors import SpecError
from headwise.spec.ggml import GGML_TYPES, GgmlType, n_bytes

_MAX_STRING_BYTES = 16 << 20  # the largest known chat template has 20 KB
_MAX_ARRAY = 1 << 24  # the largest known array has 514,906 merges
_MAX_ENTRIES = 1 << 20  # keys, or tensors
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ELEMENTS = 1 << 62
_MAX_SMALL_BYTES = 1 << 20

_F32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TYPE_NAMES = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 9: "array", 10: "u64",
    11: "i64", 12: "f64",
}  # fmt: skip
_UNPACK = {code: struct.Struct("<" + letter) for code, letter in _SCALARS.items()}
_U32, _U64 = _UNPACK[4].unpack_from, _UNPACK[10].unpack_from
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

AGAIN = "download it again, and compare its size with the source's"


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata, still in the file: `len()` is free, `read()` decodes it."""

    path: Path
    offset: int  # of the first element, from the start of the file
    length: int
    type_code: int

    @property
    def element(self) -> str:
        """u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, bool or string."""
        return _TYPE_NAMES[self.type_code]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.read())

    def read(self) -> list[Any]:
        """The elements; bytes of a string that are no UTF-8 come as surrogates, so that none is lost.

        Raises:
            SpecError: the file is gone, or is not the one that was opened.
        """
        if not self.length:
            return []
        with _mapped(self.path) as data:
            try:
                if self.type_code == _STRING:
                    return self._strings(data)
                values = struct.unpack_from(f"<{self.length}{_SCALARS[self.type_code]}", data, self.offset)
            except (struct.error, OverflowError):
                raise SpecError(
                    f"{self.path} changed while it was open",
                    why=f"an array of {self.length} {self.element} is no longer where it was",
                    do="wait until nothing writes to it, then try again",
                ) from None
        return [v != 0 for v in values] if self.type_code == _BOOL else list(values)

    def _strings(self, data: mmap.mmap) -> list[str]:
        out: list[str] = []
        start, unpack, add = self.offset, _U64, out.append
        for _ in range(self.length):
            (n,) = unpack(data, start)
            start += 8
            add(data[start : start + n].decode("utf-8", "surrogateescape"))
            start += n
        if start > len(data):  # a slice beyond the end is only short
            raise OverflowError
        return out


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: `n_bytes` bytes from `offset` of the file `path`."""

    name: str
    shape: tuple[int, ...]  # outermost first, as torch has it
    type: GgmlType
    path: Path
    offset: int
    n_bytes: int

    def read_f32(self) -> list[float]:
        """The values of a small f32 tensor, such as rope_freqs; raises SpecError for another type or a large one."""
        if self.type.name != "f32" or self.n_bytes > _MAX_SMALL_BYTES:
            raise _damaged(self.path, f"tensor {_shown(self.name)} is {self.n_bytes} bytes of {self.type.name}, not a few of f32")
        return GgufArray(self.path, self.offset, self.n_bytes // 4, _F32).read()


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One model's header, of all parts of a split file together."""

    paths: tuple[Path, ...]
    version: int
    metadata: Mapping[str, Any]  # int, float, bool, str or GgufArray; of the first part
    tensors: Mapping[str, GgufTensor]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(t.n_bytes for t in self.tensors.values())


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file; any part of a split file stands for all of them.

    Raises:
        SpecError: it cannot be read, is something else, is cut short, or contradicts itself.
    """
    first = _read_part(Path(path))
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return first
    parts = [first if p == first.paths[0] else _read_part(p) for p in _part_paths(first, count)]
    return _joined(parts)


def _part_paths(part: GgufFile, count: int) -> list[Path]:
    """The files of all parts, by the name of one: `model-00002-of-00003.gguf`."""
    path = part.paths[0]
    named = _SPLIT_NAME.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise SpecError(
            f"{path} is one part of {count}, and its name does not say which",
            why="the others are found by the pattern name-00001-of-00003.gguf",
            do="give the parts their names back, or join them: llama-gguf-split --merge <first part> whole.gguf",
        )
    paths = [path.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SpecError(
            f"{path} is one part of {count}, and {len(missing)} of them are not beside it",
            why=f"missing in {path.parent}: {shown}",
            do="download the missing parts into the same directory",
        )
    return paths


def _joined(parts: list[GgufFile]) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    for i, part in enumerate(parts):
        where = part.paths[0]
        number, count = part.metadata.get("split.no"), part.metadata.get("split.count")
        if (number, count) != (i, len(parts)):
            raise SpecError(
                f"{where} is not part {i + 1} of {len(parts)}",
                why=f"it says split.no {number} and split.count {count}; the first part is split.no 0",
                do="download the parts again; do not rename them",
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise _damaged(where, f"tensor {name!r} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise _damaged(parts[0].paths[0], f"its parts hold {len(tensors)} tensors; split.tensors.count says {expected}")
    return GgufFile(
        paths=tuple(p.paths[0] for p in parts),
        version=parts[0].version,
        metadata=parts[0].metadata,
        tensors=MappingProxyType(tensors),
    )


def _read_part(path: Path) -> GgufFile:
    with _mapped(path) as data:
        return _Header(data, path).read()


def _mapped(path: Path) -> mmap.mmap:
    """The whole file, read-only; the descriptor is closed again before this returns."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise SpecError(f"{path} is a directory", why="a GGUF model is a file", do="give the .gguf file in it")
            if not stat.S_ISREG(status.st_mode):
                raise SpecError(f"{path} is not a regular file", why="it must be mapped", do="copy it to a disk first")
            if not status.st_size:
                raise SpecError(f"{path} is empty", why="its download has not begun, or failed", do=AGAIN)
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist", why="no file has this name", do=f"ls {path.parent}") from None
    except PermissionError:
        raise SpecError(f"{path} may not be read", why="permission denied", do=f"ls -l {path}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path!s} cannot be read", why=str(error), do="check the path and the disk") from None


def _damaged(path: Path, why: str) -> SpecError:
    return SpecError(f"{path} is damaged", why=why, do=AGAIN)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:61] + "...")


class _Header:
    """A cursor over one file's header. Every read is bounded by the file's end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 0
        self.doing = "its first words"

    def read(self) -> GgufFile:
        try:
            return self._read()
        except (struct.error, OverflowError):  # unpack_from beyond the end, or at an offset past 2^63
            raise self.cut_short() from None

    def cut_short(self) -> SpecError:
        return _damaged(self.path, f"it ends at byte {self.size}, inside {self.doing}")

    def u32(self) -> int:
        (value,) = _U32(self.data, self.at)
        self.at += 4
        return value

    def u64(self) -> int:
        (value,) = _U64(self.data, self.at)
        self.at += 8
        return value

    def string(self, errors: str = "strict") -> str:
        n = self.u64()
        if n > self.size - self.at:
            raise _damaged(self.path, f"{self.doing} has a string of {n} bytes, and {self.size - self.at} are left in the file")
        if n > _MAX_STRING_BYTES:
            raise _damaged(self.path, f"{self.doing} has a string of {n} bytes (at most {_MAX_STRING_BYTES})")
        raw = self.data[self.at : self.at + n]
        self.at += n
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise _damaged(self.path, f"{self.doing} has a name that is no UTF-8: {raw[:40]!r}") from None

    def count(self, what: str, least_bytes: int) -> int:
        n = self.u64()
        if n > min(_MAX_ENTRIES, (self.size - self.at) // least_bytes):
            raise _damaged(
                self.path,
                f"it announces {n} {what}, and {self.size - self.at} bytes are left in the file"
                if n <= _MAX_ENTRIES
                else f"it announces {n} {what} (at most {_MAX_ENTRIES})",
            )
        return n

    def _read(self) -> GgufFile:
        if self.data[:4] != b"GGUF":
            raise SpecError(f"{self.path} is not a GGUF file", why=_looks_like(self.data), do=_instead(self.data))
        self.at = 4
        version = self.u32()
        if version not in (2, 3):
            raise self.wrong_version(version)
        n_tensors = self.count("tensors", 24)
        n_keys = self.count("keys", 13)
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            self.doing = f"metadata key {i + 1} of {n_keys}"
            key = self.string()
            self.doing = f"metadata key {_shown(key)}"
            if key in metadata:
                raise _damaged(self.path, f"{self.doing} is there twice")
            metadata[key] = self.value(self.u32())
        rows = [self.tensor_row(i, n_tensors) for i in range(n_tensors)]
        tensors = self.place(rows, self.alignment(metadata))
        return GgufFile(
            paths=(self.path,),
            version=version,
            metadata=MappingProxyType(metadata),
            tensors=MappingProxyType(tensors),
        )

    def wrong_version(self, version: int) -> SpecError:
        if version and not version & 0xFFFF:
            return SpecError(
                f"{self.path} is a big-endian GGUF file",
                why=f"its version reads {version:#010x}; weights are used as they lie, in little-endian order",
                do=f"gguf-convert-endian {self.path} little   (pip install gguf)",
            )
        return SpecError(
            f"{self.path} is GGUF version {version}",
            why="versions 2 and 3 are read; version 1 was replaced in 2023",
            do="convert the model again with a current llama.cpp, or download a newer file",
        )

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string(errors="replace")
        if code == _ARRAY:
            return self.array()
        if code not in _UNPACK:
            raise _damaged(self.path, f"{self.doing} has value type {code}, which GGUF does not define")
        scalar = _UNPACK[code]
        (value,) = scalar.unpack_from(self.data, self.at)
        self.at += scalar.size
        return value != 0 if code == _BOOL else value

    def array(self) -> GgufArray:
        code, n = self.u32(), self.u64()
        if code == _ARRAY:
            raise _damaged(self.path, f"{self.doing} is an array of arrays, which no model uses")
        if code != _STRING and code not in _UNPACK:
            raise _damaged(self.path, f"{self.doing} has element type {code}, which GGUF does not define")
        width = 8 if code == _STRING else _UNPACK[code].size
        if n > _MAX_ARRAY or n * width > self.size - self.at:
            raise _damaged(
                self.path,
                f"{self.doing} announces {n} {_TYPE_NAMES[code]} values (at most {_MAX_ARRAY}),"
                f" and {self.size - self.at} bytes are left in the file",
            )
        found = GgufArray(self.path, self.at, n, code)
        self.at = self.past_strings(n) if code == _STRING else self.at + n * width
        return found

    def past_strings(self, n: int) -> int:
        """The hot loop of opening a file: 777,168 strings in a Gemma 4 header."""
        data, at, unpack = self.data, self.at, _U64
        for _ in range(n):
            at += unpack(data, at)[0] + 8
        if at > self.size:
            raise self.cut_short()
        return at

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
            raise _damaged(self.path, f"general.alignment is {value!r}; it must be a power of two up to {1 << 20}")
        return value

    def tensor_row(self, i: int, n: int) -> tuple[str, tuple[int, ...], GgmlType, int, int]:
        """Name, shape, type, offset from the start of the data, bytes."""
        self.doing = f"tensor {i + 1} of {n}"
        name = self.string()
        self.doing = f"tensor {_shown(name)}"
        n_dims = self.u32()
        if n_dims > _MAX_DIMS:
            raise _damaged(self.path, f"{self.doing} has {n_dims} dims (at most {_MAX_DIMS})")
        dims = struct.unpack_from(f"<{n_dims}Q", self.data, self.at)
        self.at += 8 * n_dims
        code, offset = self.u32(), self.u64()
        n_elements = math.prod(dims)
        if not 0 < n_elements <= _MAX_ELEMENTS:
            raise _damaged(self.path, f"{self.doing} has dims {list(dims)}: {n_elements} values")
        if code not in GGML_TYPES:
            raise SpecError(
                f"{self.path}: {self.doing} has type {code}, which is not known here",
                why="ggml dropped it (5, 31-33, 36-38), or it is newer than this version, or the file is damaged",
                do="use a current file of this model",
            )
        kind = GGML_TYPES[code]
        row = dims[0] if dims else 1
        if row % kind.block:
            raise _damaged(self.path, f"{self.doing} has rows of {row} values; {kind.name} packs them by {kind.block}")
        return name, dims[::-1], kind, offset, n_bytes(kind, n_elements)

    def place(self, rows: list[tuple[str, tuple[int, ...], GgmlType, int, int]], alignment: int) -> dict[str, GgufTensor]:
        """Offsets in the file; every tensor aligned, inside the file, and clear of the others."""
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset, size in rows:
            if name in tensors:
                raise _damaged(self.path, f"tensor {_shown(name)} is there twice")
            if offset % alignment:
                raise _damaged(self.path, f"tensor {_shown(name)} starts at {offset}, which {alignment} does not divide")
            tensors[name] = GgufTensor(name, shape, kind, self.path, start + offset, size)
        end = start
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise _damaged(self.path, f"tensor {_shown(tensor.name)} overlaps the one before it")
            end = tensor.offset + tensor.n_bytes
        if end > self.size and tensors:
            raise SpecError(
                f"{self.path} is cut short: {end - self.size} bytes are missing",
                why=f"its tensors end at byte {end}, the file at byte {self.size}",
                do="finish the download, or download it again",
            )
        return tensors


def _looks_like(data: mmap.mmap) -> str:
    start = data[:256]
    text = start.lstrip().lower()
    if b"GGUF".startswith(start):
        return f"it ends after {len(data)} bytes"
    for magic, what in (
        (b"version https://git-lfs", "it is a Git LFS pointer: the model itself was not downloaded"),
        (b"<!doctype html", "it is an HTML page, such as a login or error page of the site"),
        (b"<html", "it is an HTML page, such as a login or error page of the site"),
        (b"pk\x03\x04", "it is a zip archive, such as a PyTorch checkpoint"),
        (b"{", "it is JSON text, such as a config or an error message of the site"),
        (b"\x1f\x8b", "it is gzip-compressed"),
        (b"\x28\xb5\x2f\xfd", "it is zstd-compressed"),
        (b"lmgg", "it is GGML, the format before GGUF"),
        (b"fmgg", "it is GGMF, a format before GGUF"),
        (b"tjgg", "it is GGJT, a format before GGUF"),
    ):
        if text.startswith(magic):
            return what
    if len(start) > 9 and _U64(start, 0)[0] < 1 << 32 and start[8:9] == b"{":
        return "it is a safetensors file"
    if not any(start):
        return "it begins with zeros: an unfinished download, with the space reserved"
    return f"it begins with {start[:8]!r}, not with b'GGUF'"


def _instead(data: mmap.mmap) -> str:
    why = _looks_like(data)
    if "LFS" in why:
        return "git lfs pull"
    if "safetensors" in why:
        return "give the directory that holds it and config.json"
    if "zip" in why or "before GGUF" in why:
        return "use a GGUF file of this model, or convert it with llama.cpp's convert_hf_to_gguf.py"
    if "compressed" in why:
        return "unpack it first"
    return AGAIN
