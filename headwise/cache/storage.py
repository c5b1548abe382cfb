"""The tensors of one sequence's cache, layer by layer, sized by `spec.kv`.

A global layer is an array of slots, one per position. A sliding layer is a ring: position p lies in slot p % slots; the
ring is one prefill chunk longer than the window, so that a whole chunk can be written before its first query reads.
Values are float tensors, or blocks of 32 (int8 or nibbles) with one f16 scale each; blocks are read back a tile at a
time, never whole.

Legend: S slots, T tokens of this step, G KV heads, D values per head, B blocks per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.cache.pages import Extent
from headwise.kernels.turn import Turn
from headwise.spec.kv import FP8_MAX, PAGE_TOKENS, KVFormat, k_values, kv_slots, v_values
from headwise.spec.layers import LayerSpec

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class Segment(NamedTuple):
    """A run of slots that this step reads: all visible, or causal (the step's own tokens), or under a mask."""

    start: int
    stop: int
    causal: bool = False
    mask_TS: Tensor | None = None  # additive, 0 or -inf
    position: int = 0  # of the first slot, in a global layer


class Place(NamedTuple):
    """Where a sequence lies: which ring of each windowed layer is its own, and which pages of the global ones, in order.

    Args:
        extents: pages in a row, as `pages.extents` gives them; None: the sequence is alone, position p lies in slot p.
    """

    ring: int = 0
    extents: tuple[Extent, ...] | None = None


def slots_of(place: Place, ring: int | None, start: int, n: int) -> list[tuple[int, int, int]]:
    """Where positions [start, start + n) lie: (first slot, first token, count); several where a ring wraps or pages are apart.

    Args:
        ring: slots of a ring; None: a global layer.
    Raises:
        ValueError: the pages hold fewer positions.
    """
    if ring is not None:
        first, base = start % ring, place.ring * ring
        head = min(n, ring - first)
        return [(base + first, 0, head)] + ([(base, head, n - head)] if head < n else [])
    if place.extents is None:
        return [(start, 0, n)] if n else []
    runs, at = [], 0  # `at`: the position that an extent begins with
    for page, count in place.extents:
        stop = at + count * PAGE_TOKENS
        a, b = max(start, at), min(start + n, stop)
        if a < b:
            runs.append((page * PAGE_TOKENS + a - at, a - start, b - a))
        at = stop
        if at >= start + n:
            return runs
    if n:
        raise ValueError(f"positions {start}..{start + n - 1} in pages that hold {at}")
    return runs


class Table(NamedTuple):
    """int32 on the device, where the positions of several sequences lie: the first slot of each, or with `page` slots a page its
    pages, a row a sequence."""

    rows: Tensor
    page: int = 0


class OnDevice(NamedTuple):
    """What kernels read of the sequences of a launch, int32 on the device.

    Args:
        starts_B1: where the queries of each begin in the launch; lengths_B: their keys, the new ones included.
        tables: by window, None for global layers.
        fresh: keys before a sequence's queries may have been written by this step.
    """

    starts_B1: Tensor
    lengths_B: Tensor
    tables: Mapping[int | None, Table]
    fresh: bool = False


def alone(n: int, stop: int, window: int | None, device: torch.device) -> OnDevice:
    """One sequence of `stop` keys in a cache of its own, whose last `n` are the launch's queries."""
    numbers = torch.tensor([0, n, stop, 0], dtype=torch.int32, device=device)
    return OnDevice(numbers[:2], numbers[2:3], {window: Table(numbers[3:4])})


class Span(NamedTuple):
    """The positions [start, start + n) of a sequence's queries, and what is filled once for all layers of the step.

    With `device` it may stand for several sequences; then n is the most queries of one and `stop` the most keys.

    Args:
        mask_TS: for several queries of a windowed layer, which ring slots each sees (additive); backends with a mask need it.
        device: what kernels that read caches by slots need.
    """

    start: int
    n: int
    mask_TS: Tensor | None = None
    device: OnDevice | None = None
    place: Place = Place()

    @property
    def stop(self) -> int:
        return self.start + self.n


class Scratch(NamedTuple):
    """Flat buffers that a backend may write; None where the model's backends need none.

    Args:
        k, v: the keys and values of one tile as floats, where the cache stores another type.
        partial: fp32, the partial results of a decode step whose keys several programs share.
        done: int32 zeros, one a KV head: how many of them have finished.
        tile_tokens: keys converted at a time, at least the step's own tokens.
        turn: fp32, the rotation of a tile of keys where a layer stores V alone.
    """

    k: Tensor | None
    v: Tensor | None
    partial: Tensor | None
    done: Tensor | None
    tile_tokens: int
    turn: Tensor | None = None


class Values:
    """One stored tensor of one layer, (S, G, D) values in a KV format."""

    def __init__(self, n_slots: int, n_heads: int, n_values: int, fmt: KVFormat, device: torch.device) -> None:
        self.fmt, self.n_values = fmt, n_values
        self.scales_SGB: Tensor | None = None
        if fmt.quantised:
            width = n_values // 2 if fmt.name == "q4_0" else n_values
            kind = torch.uint8 if fmt.name == "q4_0" else torch.int8
            self.data_SGD = torch.zeros(n_slots, n_heads, width, dtype=kind, device=device)
            self.scales_SGB = torch.zeros(n_slots, n_heads, n_values // fmt.block, dtype=torch.float16, device=device)
        else:
            self.data_SGD = torch.zeros(n_slots, n_heads, n_values, dtype=DTYPES[fmt.name], device=device)

    @property
    def needs_scratch(self) -> bool:
        """Whether `write` goes through an fp32 scratch."""
        return self.fmt.quantised or self.fmt.name == "fp8"

    def native(self, dtype: torch.dtype) -> bool:
        """Whether attention reads these values as they lie."""
        return self.data_SGD.dtype == dtype

    def write(self, start: int, x_TGD: Tensor, scratch_TGD: Tensor | None) -> None:
        """Stores `x_TGD` in slots [start, start + T).

        A quantised or fp8 format needs an fp32 scratch of its shape: in bf16 127.4 / 127 rounds to 128, which no int8 holds.
        """
        stop = start + x_TGD.shape[0]
        dest = self.data_SGD[start:stop]
        if self.fmt.name == "fp8":
            dest.copy_(_scratch(scratch_TGD).copy_(x_TGD).clamp_(-FP8_MAX, FP8_MAX))
        elif self.scales_SGB is None:
            dest.copy_(x_TGD)
        else:
            blocks = _scratch(scratch_TGD).copy_(x_TGD).unflatten(-1, (-1, self.fmt.block))
            quantise = _quantise_q8_0 if self.fmt.name == "q8_0" else _quantise_q4_0
            quantise(blocks, dest, self.scales_SGB[start:stop])

    def read(self, start: int, stop: int, out_SGD: Tensor | None) -> Tensor:
        """Slots [start, stop) as floats: a view where they are stored so, else dequantised into `out_SGD`."""
        data = self.data_SGD[start:stop]
        if out_SGD is None:
            return data
        out = out_SGD[: stop - start]
        if self.scales_SGB is None:
            return out.copy_(data)
        scales = self.scales_SGB[start:stop, :, :, None]
        blocks = out.unflatten(-1, (-1, self.fmt.block))
        if self.fmt.name == "q8_0":
            blocks.copy_(data.unflatten(-1, (-1, self.fmt.block)))
        else:  # nibbles: value j of a block is the low half of byte j, value j + 16 the high half
            packed = data.unflatten(-1, (-1, self.fmt.block // 2))
            blocks[..., :16].copy_(packed & 15).sub_(8)
            blocks[..., 16:].copy_(packed >> 4).sub_(8)
        blocks.mul_(scales)
        return out


def _scratch(given: Tensor | None) -> Tensor:
    if given is None or given.dtype != torch.float32:
        raise ValueError(f"storing blocks or fp8 needs an fp32 scratch, got {None if given is None else given.dtype}")
    return given


def _quantise_q8_0(blocks: Tensor, dest: Tensor, scales: Tensor) -> None:
    """d = absmax / 127, q = round(x / d). Source: ggml-quants.c quantize_row_q8_0_ref. Overwrites `blocks`."""
    d = torch.linalg.vector_norm(blocks, float("inf"), dim=-1).div_(127.0)
    scales.copy_(d)
    inverse = d.reciprocal_().nan_to_num_(posinf=0.0)
    dest.unflatten(-1, (-1, 32)).copy_(blocks.mul_(inverse[..., None]).round_())


def _quantise_q4_0(blocks: Tensor, dest: Tensor, scales: Tensor) -> None:
    """d = (the value of largest size) / -8, q = x / d + 8.5 cut to 0..15. Source: ggml-quants.c quantize_row_q4_0_ref."""
    largest = blocks.abs().argmax(-1, keepdim=True)
    d = blocks.gather(-1, largest).div_(-8.0)
    scales.copy_(d[..., 0])
    inverse = d.reciprocal_().nan_to_num_(posinf=0.0, neginf=0.0)
    q = blocks.mul_(inverse).add_(8.5).clamp_(0, 15).to(torch.uint8)
    dest.unflatten(-1, (-1, 16)).copy_(q[..., :16] | (q[..., 16:] << 4))


class LayerCache:
    """What one layer has stored, of one sequence or of several.

    Args:
        rings: sequences whose windows are held at once.
        n_tokens: of the longest sequence; pool_tokens: of all together, in a global layer; default `n_tokens`.

    `turn` is for whoever has the weights to set, where the layer stores V alone.
    """

    def __init__(
        self, layer: LayerSpec, fmt: KVFormat, *, n_tokens: int, chunk: int, device: torch.device, rings: int = 1,
        pool_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.window = layer.window
        self.turn: Turn | None = None
        if layer.window is None:
            rings, n_tokens = 1, n_tokens if pool_tokens is None else pool_tokens
        self.n_slots = kv_slots(layer, n_tokens=n_tokens, chunk=chunk)  # of one ring, or of the pool
        self.k = Values(rings * self.n_slots, layer.n_kv_heads, k_values(layer), fmt, device)
        self.v = Values(rings * self.n_slots, layer.n_kv_heads, v_values(layer), fmt, device) if v_values(layer) else None

    def slots(self, place: Place, start: int, n: int) -> list[tuple[int, int, int]]:
        """Where positions [start, start + n) lie, as `slots_of` says it."""
        return slots_of(place, self.n_slots if self.window is not None else None, start, n)

    def seen(self, span: Span) -> list[tuple[int, int, int]]:
        """Where the keys lie that the queries of a span see, their own included, as `slots_of` says it."""
        first = 0 if self.window is None else max(0, span.start - self.window + 1)
        return self.slots(span.place, first, span.stop - first)

    def write(self, place: Place, start: int, k_TGD: Tensor, v_TGD: Tensor | None, scratch: Tensor | None) -> None:
        """Appends the keys and values of positions [start, start + T)."""
        T = k_TGD.shape[0]
        runs = self.slots(place, start, T)
        for values, x in ((self.k, k_TGD), (self.v, v_TGD)):
            if values is None or x is None:
                continue
            for slot, token, n in runs:
                part = x if n == T else x[token : token + n]
                values.write(slot, part, carve(scratch, part.shape) if scratch is not None and values.needs_scratch else None)

    def segments(self, span: Span) -> list[Segment]:
        """What the queries of `span` read, once their own keys are written.

        Raises:
            ValueError: the queries' own keys lie in pages apart; ask for each run of them by itself.
        """
        start, n, place = span.start, span.n, span.place
        if self.window is None:
            past = self.slots(place, 0, start if n > 1 else start + 1)
            before = [Segment(slot, slot + count, position=at) for slot, at, count in past]
            if n == 1:
                return before
            (slot, _, count), *more = self.slots(place, start, n)
            if more:
                raise ValueError(f"positions {start}..{span.stop - 1} lie in {1 + len(more)} runs of pages")
            return [*before, Segment(slot, slot + count, causal=True, position=start)]
        if n == 1:  # one query sees a run of slots, or two where the ring wraps: no mask
            return [Segment(slot, slot + count) for slot, _, count in self.seen(span)]
        base = place.ring * self.n_slots
        return [Segment(base, base + min(self.n_slots, start + n), mask_TS=span.mask_TS)]

    def turned(self, start: int, stop: int, position: int, out_SGE: Tensor, room: Tensor) -> Tensor:
        """The keys of slots [start, stop) of a layer that stores V alone, as the other layout stores them: [V | rotated values].

        Args:
            position: of slot `start`.
            room: fp32, `planner.workspace.turn_values` of as many slots.
        """
        assert self.turn is not None
        w_D, freq_P, magnitude = self.turn
        n, G, D, P = stop - start, out_SGE.shape[1], self.k.n_values, freq_P.shape[0]
        v = self.k.read(start, stop, out_SGE[..., :D])
        turns, pairs = carve(room, (n, 1, P, 2)), carve(room[2 * n * P :], (n, G, P, 2))
        at = torch.arange(position, position + n, out=room[turns.numel() + pairs.numel() :][:n])
        cos, sin = turns.unbind(-1)
        torch.mul(at[:, None, None], freq_P, out=cos)  # in fp32, as the query's angles are
        torch.sin(cos, out=sin)
        cos.cos_()
        turns.mul_(magnitude)
        for i, first in enumerate((0, D // 2)):
            pairs[..., i].copy_(v[..., first : first + P]).mul_(w_D[first : first + P])
        torch.view_as_complex(pairs).mul_(torch.view_as_complex(turns))
        tail = out_SGE[..., D:]
        tail[..., :P].copy_(pairs[..., 0])
        tail[..., P : 2 * P].copy_(pairs[..., 1])
        tail[..., 2 * P :].zero_()
        return out_SGE


def carve(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of a flat buffer, in `shape`."""
    return buffer[: prod(shape)].view(*shape)


def slot_positions(n_slots: int, end: int, device: torch.device) -> Tensor:
    """The position that each ring slot holds once positions [0, end) are written; negative where it is empty."""
    slot = torch.arange(n_slots, device=device)
    return slot + (end - 1 - slot).div(n_slots, rounding_mode="floor") * n_slots
