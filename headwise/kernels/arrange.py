"""Activations in the order in which `kernels.skinny` reads them: an operand of `mma.sync`, 16 bytes a thread.

Of four groups of 32 of a row, word i's values (`tiled`: element 16 * half + 4 * byte + i of a group) lie together: four groups of
four pairs, bytes (0, 2) and (1, 3) of each half. Rows are padded to 8, 16, 32 or 64, groups to whole steps; what is padded is 0.

    values[group // 4][i][row][group % 4][half][byte % 2][byte // 2]

Cost      the bytes of the activations, read and written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.gates import ACTIVATIONS, Gate, gated
from headwise.kernels.router import Order
from headwise.kernels.stored import in_turn, overlap
from headwise.planner.workspace import PAIR_TILES, SKINNY_ROWS, SKINNY_STEP, arranged_values, padded

STEP = SKINNY_STEP // 32  # groups that `skinny` takes at a time
TYPES = (torch.bfloat16, torch.float16)


class Arranged(NamedTuple):
    """Activations as `arrange` leaves them."""

    values: Tensor
    shape: tuple[int, int]  # (T, K) of the activations


def arranged_in(room: Tensor, T: int, K: int) -> Arranged:
    """The room for T rows of K in `room`.

    Raises:
        ValueError: no whole groups of 32, too many rows, or too little room.
    """
    n = arranged_values(T, K)
    if K % 32 or not 1 <= T <= SKINNY_ROWS:
        raise ValueError(f"arrange: ({T}, {K}) activations, not 1 to {SKINNY_ROWS} rows of whole groups of 32")
    if room.dtype not in TYPES or room.numel() < n:
        raise ValueError(f"arrange: {room.numel()} {room.dtype}, not {n} of bf16 or f16")
    return Arranged(room.flatten()[:n], (T, K))


@triton.jit
def arranged_at(group, e, t, TP: tl.constexpr):
    """Where element e of a group of row t lies."""
    i, b, half = e % 4, e // 4 % 4, e // 16
    return (group // 4 * 4 + i) * (TP * 32) + t * 32 + group % 4 * 8 + half * 4 + b % 2 * 2 + b // 2


@triton.jit(do_not_specialize=["T"])
def _arrange(x_ptr, out, x_stride, T, K, TP: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    t = tl.program_id(1)
    group = tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]
    e = tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + t.to(tl.int64) * x_stride + group * 32 + e, mask=(group * 32 < K) & (t < T), other=0.0)
    tl.store(out + arranged_at(group, e, t, TP), x, mask=group < tl.cdiv(K, 32 * STEP) * STEP)


def arrange(x_TK: Tensor, room: Tensor) -> Arranged:
    """Rows of x, arranged in `room`: `arranged_values` of its type.

    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    T, K = x_TK.shape
    out = arranged_in(room, T, K)
    if x_TK.stride(1) != 1 or x_TK.dtype != room.dtype:
        raise ValueError(f"arrange: {x_TK.dtype} of strides {x_TK.stride()} into {room.dtype}, not alike, last stride 1")
    TP = padded(T)
    _arrange[(triton.cdiv(out.values.numel() // TP, 1024), TP)](
        x_TK, out.values, x_TK.stride(0), T, K, TP=TP, STEP=STEP, num_warps=4, **overlap(x_TK)
    )
    return out


class ArrangedPairs(NamedTuple):
    """Rows of pairs, arranged a tile of one expert after the other."""

    values: Tensor
    shape: tuple[int, int]  # pairs, K
    order: Order


@triton.jit(do_not_specialize=["n_experts", "per_row"])
def _arrange_pairs(
    x, bias_a, bias_b, pairs, starts, first, experts, out, n_experts, per_row, K, x_stride,
    ACT: tl.constexpr, BIAS: tl.constexpr, TP: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    tile = tl.program_id(1)
    if tile < tl.load(first + n_experts):
        expert = tl.load(experts + tile)
        t, k = tl.arange(0, TP)[:, None], (tl.program_id(0) * (32 * STEP) + tl.arange(0, 32 * STEP))[None, :]
        at = tl.load(starts + expert) + (tile - tl.load(first + expert)) * TP + t
        ok = at < tl.load(starts + expert + 1)
        row = at if ACT >= 0 else tl.load(pairs + at, mask=ok, other=0) // per_row
        p = x + row.to(tl.int64) * x_stride + k
        v = tl.load(p, mask=ok & (k < K), other=0.0)
        if ACT >= 0:
            a, u = v.to(tl.float32), tl.load(p + K, mask=ok & (k < K), other=0.0).to(tl.float32)
            if BIAS:
                a += tl.load(bias_a + expert * K + k, mask=k < K, other=0.0)
                u += tl.load(bias_b + expert * K + k, mask=k < K, other=0.0)
            v = tl.where(ok & (k < K), gated(a, u, ACT), 0.0).to(out.dtype.element_ty)
        # row, fours of groups, group, half, byte // 2, byte % 2, word; they leave in the order of `arranged_at`
        v = tl.permute(tl.reshape(v, (TP, STEP // 4, 4, 2, 2, 2, 4)), (1, 6, 0, 2, 3, 5, 4))
        begin = (tile * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (32 * STEP * TP)
        tl.store(out + begin + tl.arange(0, 32 * STEP * TP), tl.reshape(v, (32 * STEP * TP,)))


def arrange_pairs(x: Tensor, order: Order, n_experts: int, room: Tensor, gate: Gate | None = None) -> ArrangedPairs:
    """The rows of each pair's token, of `x` (T, K); or with `gate` act(x[:, :K]) * x[:, K:] of rows in the order of `order`.

    Raises:
        ValueError: no whole groups of 32, tiles of other than 8, 16 or 32 pairs, or too little room.
    """
    P, K = order.pairs_P.shape[0], x.shape[1] // (1 if gate is None else 2)
    rows = order.tile_rows
    tiles, values = order.tiles(n_experts), arranged_values(rows, K)
    if K % 32 or rows not in PAIR_TILES or P % x.shape[0] or (gate is not None and x.shape[0] != P):
        raise ValueError(f"arrange_pairs: {tuple(x.shape)} for {P} pairs in tiles of {rows}, not of {[*PAIR_TILES]}, K whole 32s")
    if room.dtype != x.dtype or room.dtype not in TYPES or room.numel() < tiles * values or x.stride(1) != 1:
        raise ValueError(f"arrange_pairs: {room.numel()} {room.dtype}, not {tiles} tiles of {values} of {x.dtype}, {x.stride()}")
    out = room.flatten()[: tiles * values]
    some = gate is not None and gate.gate_bias_EW is not None
    biases = (gate.gate_bias_EW, gate.up_bias_EW) if gate is not None and some else (x, x)
    _arrange_pairs[(values // (32 * STEP * rows), tiles)](
        x, *biases, *order[:4], out, n_experts, P // x.shape[0], K, x.stride(0),
        ACT=-1 if gate is None else ACTIVATIONS[gate.activation].value, BIAS=some, TP=rows, STEP=STEP, num_warps=4,
        **overlap(x),
    )  # fmt: skip
    return ArrangedPairs(out, (P, K), order)


def reference(x_TK: Tensor, rows: int | None = None) -> Tensor:
    """The same, flat, by PyTorch; of a tile of `rows`."""
    (T, K), rows = x_TK.shape, rows or padded(x_TK.shape[0])
    x = x_TK.new_zeros(rows, -(-K // (32 * STEP)) * 32 * STEP)
    x[:T, :K] = x_TK
    x = x.view(rows, -1, 4, 2, 2, 2, 4)  # row, four groups, group, half, byte // 2, byte % 2, word
    return x.permute(1, 6, 0, 2, 3, 5, 4).flatten()
