"""Rows of a quantised matrix as floats: a range of them, as an operand of a product, or the rows of a list, as embeddings.

Two threads share a group of 32 values: each reads the group's words, 16 bytes, and writes bytes 0 and 1, or 2 and 3, of all four
words: 8 neighbouring values of either half, so that 32 bytes of a row are written together at the least.

Shapes    W_NK in planes (`tiled.Planes`); out (rows, K) in bf16, f16 or fp32, contiguous.
Accuracy  fp32 as `weights.blocks.dequantise` has it, bit for bit: its products of scale and integer have at most 24 bits, so that
          a fused multiply-add rounds nothing else. Other types are that, rounded once.
Cost      bytes of the blocks + rows*K*itemsize: memory-bound; 86 to 88 % of an H200's read bandwidth for a matrix of 116M values
          (benchmarks/quant_matmul.py). A product by tiles wants whole 128 rows each: with 780, cuBLAS takes 4 times what it takes
          with 768 (T = 4096, N = 5376, K = 21504, bf16).
Source    ggml-quants.c dequantize_row_*.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from headwise.kernels.tiled import (
    EIGHT,
    LAYOUTS,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_0,
    Planes,
    four,
    four_words,
    load_high,
    load_low,
    load_scale,
    offset,
    pointers,
    scales,
)

TOLERANCE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0}  # beside the one rounding
TILES = {True: (64, 4), False: (8, 2)}  # groups of a program, warps: one row of a list; eight rows. Fastest on an H200
RUNTIME = ["start", "stop", "N", "groups", "tiles"]  # numbers whose divisors change no program


def reference(dense_NK: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows `ids` of the dequantised fp32 values."""
    return dense_NK[ids].to(dtype)


@triton.jit(do_not_specialize=RUNTIME)
def _expand(
    ids, low, high, head, halves, out, start, stop, N, groups, tiles,
    KIND: tl.constexpr, LISTED: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = 1 if LISTED else 8
    PARTS: tl.constexpr = 2 * ROWS * G
    p = tl.arange(0, PARTS)  # of 32 threads: 2 pairs, 8 groups, 2 rows
    pair, g = p % 2, tl.program_id(0) % tiles * G + p // 2 % 8 + p // (16 * ROWS) * 8
    here = (tl.program_id(0) // tiles).to(tl.int64)
    if LISTED:
        row = tl.load(ids + here)
        known = (row >= 0) & (row < N)
        eight, r = tl.where(known, row, 0) // 8, (p * 0 + row % 8).to(tl.int32)
        to = here * groups * 32 + g * 32
        ok = g < groups
    else:
        eight, r = start // 8 + here, p // 16 % 8
        first = eight * 8 - start  # the row of `out` where this eight begins: below 0 where `start` is within it
        to = (first * groups * 32) + (r * groups + g) * 32
        ok = (g < groups) & (first + r >= 0) & (first + r < stop - start)
    g = tl.minimum(g, groups - 1)
    block, within = g // BLOCK, g % BLOCK
    eight *= groups
    low += eight * (64 if KIND == Q8_0 else 32)
    high += eight * (16 if KIND == Q6_K else 8)
    head += eight // BLOCK * (32 if KIND == Q4_K or KIND == Q5_K else (36 if KIND == Q6_K else 8))
    halves += eight // BLOCK * (72 if KIND == Q6_K else 8)
    w = load_low(low, g, r, 0, KIND)
    h0, h1 = load_high(high, g, r, KIND)
    d, dmin, word, c = load_scale(head, halves, block, r, within, KIND)
    scale0, scale1, minimum = scales(word, c, within, KIND)
    minimum *= dmin
    for half in tl.static_range(2):
        x = four_words(load_low(low, g, r, 1, KIND) if KIND == Q8_0 and half else w)
        s = d * (scale1 if half else scale0)
        y = ()
        for b in tl.static_range(2):
            for i in tl.static_range(4):
                q = four(x[i], h1 if half else h0, i, half, KIND, ASM)
                v = (((q >> 16 * pair) >> 8 * b) & 255).to(tl.float32) - offset(KIND)
                v *= s
                if KIND == Q4_K or KIND == Q5_K:
                    v -= minimum
                if LISTED:
                    v = tl.where(known, v, float("nan"))
                y += (v.to(out.dtype.element_ty),)
        even = tl.join(tl.join(y[0], y[4]), tl.join(y[2], y[6]))  # [b, i // 2], then i % 2
        odd = tl.join(tl.join(y[1], y[5]), tl.join(y[3], y[7]))
        v = tl.reshape(tl.join(even, odd), (PARTS, 8))
        tl.store(out + (to + half * 16 + pair * 8)[:, None] + tl.arange(0, 8)[None, :], v, mask=ok[:, None])


def _planes(what: str, planes: Planes, out: Tensor, T: int) -> None:
    K = planes.K
    if planes.low.dim() != 2 or any(p is not None and not p.is_contiguous() for p in (planes.low, planes.high, planes.head)):
        raise ValueError(
            f"{what}: planes of {tuple(planes.low.shape)}, strides {planes.low.stride()}, not one matrix of {planes.rows} rows, "
            f"contiguous; of a stack take one with `matrix`"
        )
    if tuple(out.shape) != (T, K) or not out.is_contiguous():
        raise ValueError(f"{what}: {T} rows of {K} into {tuple(out.shape)} of strides {out.stride()}, not ({T}, {K}), contiguous")
    if out.dtype not in TOLERANCE or out.device != planes.low.device:
        raise ValueError(f"{what}: {out.dtype} on {out.device}, not one of {', '.join(map(str, TOLERANCE))} on {planes.low.device}")


def _launch(ids: Tensor | None, planes: Planes, start: int, stop: int, out: Tensor) -> Tensor:
    t, groups, listed = LAYOUTS[planes.type], planes.K // 32, ids is not None
    G, warps = TILES[listed]
    n = stop - start if listed else -(-stop // EIGHT) - start // EIGHT
    tiles = -(-groups // G)
    if stop > start:
        _expand[(n * tiles,)](
            out if ids is None else ids, *pointers(planes), out, start, stop, planes.rows, groups, tiles, KIND=t.kind,
            LISTED=listed, G=G, BLOCK=t.block // 32, ASM=not knobs.runtime.interpret, num_warps=warps,
        )  # fmt: skip
    return out


def expand(planes: Planes, start: int, stop: int, out: Tensor) -> Tensor:
    """Rows `start` to `stop` of the matrix as floats into `out` (stop - start, K): bf16, f16 or fp32, contiguous.

    A `start` within an eight reads that eight again, nothing more.

    Raises:
        ValueError: a range outside the matrix, a stack, or an `out` this kernel does not write, with both numbers.
    """
    if not 0 <= start <= stop <= planes.rows:
        raise ValueError(f"expand: rows {start} to {stop} of a matrix of {planes.rows}")
    _planes("expand", planes, out, stop - start)
    return _launch(None, planes, start, stop, out)


def gather(planes: Planes, ids: Tensor, out: Tensor) -> Tensor:
    """Rows `ids` (int64, on the planes' device) as floats into `out` (T, K): bf16, f16 or fp32, contiguous.

    The host does not look at the ids: one that is no row of the matrix gives a row of NaN.

    Raises:
        ValueError: ids that are not a list of int64, a stack, or an `out` this kernel does not write, with both numbers.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64 or not ids.is_contiguous() or ids.device != planes.low.device:
        raise ValueError(
            f"gather: ids {ids.dtype} {tuple(ids.shape)} of strides {ids.stride()} on {ids.device}, "
            f"not torch.int64 (T,), contiguous, on {planes.low.device}"
        )
    _planes("gather", planes, out, ids.shape[0])
    return _launch(ids, planes, 0, ids.shape[0], out)
