"""Bytes on disk -> tensors in memory, as `names.match` says.

Every destination is allocated once, at its final place and type, and filled tile by tile from a memory map: beside the
weights themselves the host holds one tile. Pages of the file are given back as soon as they are copied.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor

from headwise.errors import SpecError
from headwise.planner.residence import FP8_BLOCK, FP8_TYPES
from headwise.planner.workspace import DEQUANT_TILE_VALUES
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, weight_tensors
from headwise.weights.blocks import (
    BLOCK_TYPES,
    BlockTensor,
    Fp8Tensor,
    Weight,
    dequantise,
    expand_fp8,
    repack_mxfp4,
    row_bytes,
    to_fp8,
)
from headwise.weights.listing import Listing, StoredTensor, list_checkpoint
from headwise.weights.names import Part, match, row_axis

if TYPE_CHECKING:
    from headwise.kernels.tiled import Planes

RETILED_VALUES = 16 << 20  # values of a matrix that are re-tiled at a time
TILE_BYTES = 64 << 20  # of a tile that is copied or converted, in fp32; one that is dequantised does best in the caches
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

Progress = Callable[[int, int], None]


def load_weights(
    spec: ModelSpec,
    checkpoint: Path,
    *,
    resident: Mapping[str, str],
    device: torch.device | str,
    groups: Mapping[str, tuple[str, ...]] | None = None,
    planes: Collection[str] = (),
    layers: range | None = None,
    progress: Progress | None = None,
) -> dict[str, Weight]:
    """Every tensor of `weight_tensors(spec, layers)` on `device`, and one more per group.

    Args:
        resident: our name -> the type it is kept in: f32, bf16, f16, or the quantised type it is stored in; "fp8" for matrices
            that are stored as floats too, which are made here, a tile at a time.
        groups: group name -> members of one resident type, whose rows then lie one after another in one allocation;
            the result holds the whole under the group's name and the members as views of it.
        planes: names whose blocks are re-tiled for our kernels, `planner.residence.planed`; a group's members all or none.
        progress: called with (bytes filled, bytes in all) after each tile.
    Raises:
        SpecError: the checkpoint does not hold this model.
        ValueError: a resident type that a tensor cannot be kept in (the planner's bug).
    """
    listing = list_checkpoint(checkpoint)
    matched = match(spec, listing)
    device = torch.device(device)
    specs = {t.name: t for t in weight_tensors(spec, layers)}
    for name, stored in matched.types.items():
        kept = resident[name]
        as_stored = kept == stored and stored in BLOCK_TYPES | FP8_TYPES
        if not (kept in FLOATS or as_stored or (kept == "fp8" and stored in FLOATS)):
            raise ValueError(f"{name} is stored as {stored} and cannot be kept as {kept}")
    weights = allocate(specs, resident, groups or {}, device, planes)
    total = sum(_n_bytes(weights[name]) for name in specs)
    done = 0
    files = _Files(listing)
    for name, ours in specs.items():
        for part in matched.parts[name]:
            into = weights[name]
            if isinstance(into, Fp8Tensor):
                fill = _fill_fp8(into, files, part)
            else:
                fill = _retile(into, files, part) if _is_planes(into) else _fill(_region(into, part), files, part, ours)
            for n_bytes in fill:
                done += n_bytes
                if progress:
                    progress(done, total)
    return weights


def allocate(
    specs: Mapping[str, TensorSpec],
    resident: Mapping[str, str],
    groups: Mapping[str, tuple[str, ...]],
    device: torch.device,
    planes: Collection[str] = (),
) -> dict[str, Weight]:
    """Empty weights in the order of `specs`, members of a group as views of one allocation."""
    weights: dict[str, Weight] = {}
    group_of = {member: group for group, members in groups.items() for member in members}
    for name in specs:
        group = group_of.get(name)
        if group is None:
            weights[name] = _empty(specs[name].shape, resident[name], device, name in planes)
        elif group not in weights:
            members = groups[group]
            types = {resident[member] for member in members}
            if len(types) > 1:
                raise ValueError(f"the members of {group} are kept as {' and '.join(sorted(types))}")
            axis = row_axis(specs[members[0]])
            shape = list(specs[members[0]].shape)
            shape[axis] = sum(specs[member].shape[axis] for member in members)
            whole = _empty(tuple(shape), types.pop(), device, members[0] in planes)
            weights[group] = whole
            start = 0
            for member in members:
                n_rows = specs[member].shape[axis]
                weights[member] = _narrow(whole, axis, start, n_rows)
                start += n_rows
    return weights


def _empty(shape: tuple[int, ...], type_name: str, device: torch.device, planes: bool) -> Weight:
    if planes:
        from headwise.weights import retile  # triton is where planes are

        return retile.empty(type_name, shape, device)
    if type_name in FLOATS:
        return torch.empty(shape, dtype=FLOATS[type_name], device=device)
    if type_name in FP8_TYPES:
        data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        return Fp8Tensor(data, torch.empty(*shape[:-1], 1 if type_name == "fp8" else -(-shape[-1] // FP8_BLOCK), device=device))
    data = torch.empty((*shape[:-1], row_bytes(type_name, shape[-1])), dtype=torch.uint8, device=device)
    return BlockTensor(data, type_name, shape)


def _narrow(whole: Weight, axis: int, start: int, length: int) -> Weight:
    if isinstance(whole, Tensor):
        return whole.narrow(axis, start, length)
    if not isinstance(whole, BlockTensor):  # a matrix's rows, whatever they are
        return whole.part(start, start + length)
    shape = list(whole.shape)
    shape[axis] = length
    return BlockTensor(whole.data.narrow(axis, start, length), whole.type, tuple(shape))


def _is_planes(weight: Weight) -> TypeGuard[Planes]:
    return not isinstance(weight, Tensor | BlockTensor | Fp8Tensor)


def _data(weight: Tensor | BlockTensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.data


def _n_bytes(weight: Weight) -> int:
    if _is_planes(weight):
        return sum(x.numel() for x in (weight.low, weight.high, weight.head) if x is not None)
    if isinstance(weight, Fp8Tensor):
        return weight.data.nbytes + weight.scales.nbytes
    assert isinstance(weight, Tensor | BlockTensor)
    return _data(weight).numel() * _data(weight).element_size()


def _retile(into: Planes, files: _Files, part: Part) -> Iterator[int]:
    """Moves blocks to their planes, on the device, whole eights of rows at a time; yields the bytes of each tile."""
    from headwise.weights.retile import retile

    source, stored = _flat_source(files, part)
    if part.expert is not None:
        into = into.matrix(part.expert)
    lead = tuple(into.low.shape[:-2])
    together = max(1, RETILED_VALUES // (into.K * into.rows)) if lead else 1  # whole matrices of a stack
    step = max(1, RETILED_VALUES // into.K // 8) * 8
    for first in range(0, lead[0] if lead else 1, together):
        matrices = (slice(first, first + together),) if lead else ()
        some = into.matrix(*matrices) if lead else into
        for start in range(0, into.rows, step):
            stop = min(start + step, into.rows)
            tile = source.tile((*matrices, slice(start, stop)), files, into.low.device)
            retile(tile, into.type, some.part(start, stop))
            for read in stored:
                files.forget(read)
            yield tile.numel()


def _region(weight: Weight, part: Part) -> Tensor:
    """What one part fills: all of a weight, or one expert of it."""
    assert isinstance(weight, Tensor | BlockTensor)
    return _data(weight) if part.expert is None else _data(weight)[part.expert]


@dataclass(frozen=True, slots=True)
class _Source:
    """One stored tensor as views into the file, rows by rows of our tensor; `type` is as listed, or mxfp4, or fp8."""

    tensor: Tensor  # (..., rows, elements), or (..., rows, bytes) of blocks
    type: str
    scales: Tensor | None = None  # of MXFP4, where `tensor` is (..., rows, blocks, 16); of e4m3, those of each row

    def tile(self, index: tuple[slice, ...], files: _Files, device: torch.device) -> Tensor:
        """Rows of the tensor on `device`, where they are repacked; e4m3 as floats."""
        tensor = files.moved(self.tensor[index], device)
        if self.type == "fp8":
            assert self.scales is not None
            return expand_fp8(tensor, self.scales[index].to(device))
        if self.scales is not None:
            return repack_mxfp4(tensor, self.scales[index].to(device))
        if self.type == "mxfp4_raw":  # the exponent before each block, the nibbles in the checkpoint's order
            blocks = tensor.unflatten(-1, (-1, 17))
            return repack_mxfp4(blocks[..., 1:], blocks[..., 0])
        return tensor


def _source(files: _Files, part: Part) -> tuple[_Source, tuple[StoredTensor, ...]]:
    """The rows that a part names, and what they are stored in."""
    stored = files.listing.tensors[part.stored]
    if not part.scales:
        return _Source(_rows(files.view(stored), part, False), stored.type), (stored,)
    scales = files.listing.tensors[part.scales]
    if stored.type == "f8_e4m3":
        of_rows = _rows(_row_scales(files.view(scales).float(), stored.shape), part, False)
        return _Source(_rows(files.view(stored), part, False), "fp8", of_rows), (stored, scales)
    exponents = _rows(files.view(scales), part, False, has_columns=True)
    return _Source(_rows(files.view(stored), part, True), "mxfp4", exponents), (stored, scales)


def _flat_source(files: _Files, part: Part) -> tuple[_Source, tuple[StoredTensor, ...]]:
    """As `_source`, one row after another: where heads' rows are in another order, that is a copy on the host."""
    source, read = _source(files, part)
    return replace(source, tensor=source.tensor.flatten(0, -2)) if part.pairs_of else source, read


def _row_scales(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales of all values, of each row, or of blocks of 128 by 128, as those of each row: (..., N, 1 or ceil(K / 128))."""
    N = shape[-2]
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(*shape[:-1], 1)
    if scales.numel() == math.prod(shape[:-1]):
        return scales.reshape(*shape[:-1], 1)
    return scales.repeat_interleave(FP8_BLOCK, -2)[..., :N, :]


def _fill_fp8(into: Fp8Tensor, files: _Files, part: Part) -> Iterator[int]:
    """Copies rows of e4m3, or makes them of floats, on the device; yields the bytes of each tile."""
    source, read = _flat_source(files, part)
    if part.expert is not None:
        into = into[part.expert]
    *rows, K = into.shape
    n_values = DEQUANT_TILE_VALUES if source.scales is None else TILE_BYTES // 4
    for index in _tiles(tuple(rows), max(1, n_values // K)):
        if source.scales is None:
            data, scales = to_fp8(source.tile(index, files, into.device))
        else:
            data, scales = files.moved(source.tensor[index], into.device), source.scales[index]
        tile = into[index]
        tile.data.copy_(data)
        tile.scales.copy_(scales)
        for tensor in read:
            files.forget(tensor)
        yield tile.data.nbytes + tile.scales.nbytes


def _fill(dest: Tensor, files: _Files, part: Part, ours: TensorSpec) -> Iterator[int]:
    """Copies one part into its place; yields the bytes each tile filled."""
    source, read = _source(files, part)
    stored = read[0]
    if part.copy_at is not None:
        _check_copy(files, stored, part, ours)
    if part.axis == -1:
        dest = dest.unsqueeze(-1)
    if part.pairs_of:
        dest = dest.unflatten(-2, (part.pairs_of, 2, -1))
    columns = 1 if part.axis == -1 else ours.shape[-1]
    type_name = source.type.removesuffix("_raw")
    dequantised = type_name not in FLOATS and dest.dtype != torch.uint8
    n_values = min(TILE_BYTES // 4, DEQUANT_TILE_VALUES) if dequantised else TILE_BYTES // 4
    there = type_name in FLOATS or type_name in BLOCK_TYPES or type_name == "fp8"
    device = dest.device if there else torch.device("cpu")
    for index in _tiles(tuple(dest.shape[:-1]), max(1, n_values // columns)):
        into, tile = dest[index], source.tile(index, files, device)
        if type_name in FLOATS or type_name == "fp8":
            into.copy_(tile.float() + part.add if part.add else tile)
        elif dest.dtype == torch.uint8:
            into.copy_(tile)
        elif type_name in BLOCK_TYPES:
            dequantise(tile, type_name, into.dtype, out=into)
        else:
            into.copy_(_dequantise_by_gguf(tile, stored))
        for tensor in read:
            files.forget(tensor)
        yield into.numel() * into.element_size()


def _rows(tensor: Tensor, part: Part, blocks: bool, *, has_columns: bool = False) -> Tensor:
    """The rows of a stored tensor that a part names, as a view (..., rows, columns)."""
    if part.transposed:
        tensor = tensor.transpose(-1, -2)
    if part.axis == -1:
        tensor = tensor.unsqueeze(-1)
    axis = -3 if blocks else -2
    stop = part.first + (part.rows - 1) * part.step + 1
    tensor = tensor[(..., slice(part.first, stop, part.step), *(slice(None),) * (-1 - axis))]
    if part.pairs_of:  # stored (heads, half, 2): row 2i of a head is our row i, row 2i + 1 our row half + i
        tensor = tensor.unflatten(axis, (part.pairs_of, -1, 2)).transpose(axis - 1, axis)
    return tensor


def _tiles(shape: tuple[int, ...], n_rows: int) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cover `shape` (all axes but the last) in pieces of at most `n_rows` rows."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner <= n_rows:
        step = n_rows // max(1, inner)
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])),)
        return
    for i in range(shape[0]):
        for rest in _tiles(shape[1:], n_rows):
            yield (slice(i, i + 1), *rest)


def _check_copy(files: _Files, stored: StoredTensor, part: Part, ours: TensorSpec) -> None:
    """A K=V layer stored with a V of its own must repeat K there, or it is no K=V layer."""
    assert part.copy_at is not None
    tensor = files.view(stored)
    keys, values = (tensor[start : start + part.rows] for start in (part.first, part.copy_at))
    if not torch.equal(keys.reshape(-1).view(torch.uint8), values.reshape(-1).view(torch.uint8)):
        raise SpecError(
            f"{files.listing.where}: the V rows of {stored.name} differ from its K rows",
            why=f"{ours.name} of a K=V layer feeds both, so one of them would be lost",
            do="check the file against its source",
        )


def _dequantise_by_gguf(tile: Tensor, stored: StoredTensor) -> Tensor:
    """The types that nothing here multiplies (IQ, TQ, NVFP4): to fp32, by gguf's own numpy code."""
    import gguf

    kind = gguf.GGMLQuantizationType.__members__.get(stored.type.upper())
    try:
        if kind is None:
            raise NotImplementedError(stored.type)
        return torch.from_numpy(gguf.dequantize(np.ascontiguousarray(tile.numpy()), kind))
    except NotImplementedError:
        raise SpecError(
            f"{stored.path}: {stored.name} is stored as {stored.type}",
            why="nothing here, nor the gguf package, turns that type into floats",
            do="use a file quantised to Q4_K, Q6_K, Q8_0 or MXFP4",
        ) from None


class _Files:
    """Memory maps of a checkpoint's files, opened once each."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.maps: dict[Path, mmap.mmap] = {}  # each is unmapped when the last view of it goes
        self._staged: list[tuple[Tensor, torch.cuda.Event]] = []  # page-locked, and when a GPU has read it

    def view(self, stored: StoredTensor) -> Tensor:
        """The stored tensor in its own type, or as uint8 (..., bytes of a row) where it is blocks; not to be written."""
        if not stored.n_bytes:
            raise SpecError(f"{stored.path}: {stored.name} is empty", do="check the file against its source")
        if stored.path not in self.maps:
            with stored.path.open("rb") as file:  # a private copy, never written: torch warns of read-only buffers
                self.maps[stored.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = torch.float8_e4m3fn if stored.type == "f8_e4m3" else FLOATS.get(stored.type, torch.uint8)
        count = stored.n_bytes // dtype.itemsize
        flat = torch.frombuffer(self.maps[stored.path], dtype=dtype, count=count, offset=stored.offset)
        if stored.block > 1:
            return flat.view(*stored.shape[:-1], stored.shape[-1] // stored.block * stored.block_bytes)
        return flat.view(stored.shape)

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on `device`; to a GPU by one of two buffers of page-locked memory, so that the host reads the next tile while
        this one is copied and taken apart."""
        if device.type != "cuda":
            return tensor.to(device)
        held, read = self._staged.pop(0) if len(self._staged) > 1 else (torch.empty(0, dtype=torch.uint8), torch.cuda.Event())
        read.synchronize()
        if held.numel() < tensor.nbytes:
            held = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        host = held[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(host, non_blocking=True)
        read.record(torch.cuda.current_stream(device))
        self._staged.append((held, read))
        return out

    def forget(self, stored: StoredTensor) -> None:
        """Gives the tensor's pages back to the system, which may keep them cached; a next read maps them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.maps[stored.path].madvise(mmap.MADV_DONTNEED, start, stored.offset + stored.n_bytes - start)
