"""Products of one row with a matrix of floats, and what is done with the results at once.

    plain   y_N = W_NK x_K
    gated   y_N = act(W_NK x_K) * V_NK x_K         V: the N rows after those of W
    times   y_N = act(W_NK x_K) * m_N

A program takes a few rows and walks along K: it asks for the next tiles before it multiplies with these. Where launches overlap,
its first tiles are asked for before the launch ahead has ended, so memory is read on through the small launches between products.

Shapes    x_K, m_N and y_N contiguous; W (N, K), gated (2 N, K), contiguous.
Accuracy  products and sums in fp32, rounded once.
Cost      the bytes of W, once.
Source    the gates are those of `rows.gate`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.matvec import processors
from headwise.kernels.rows import GATES, activated
from headwise.kernels.stored import overlap, start_next, wait_turn

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative error of a result


class Config(NamedTuple):
    """One launch: `rows` rows (gated: half of them of W) by `columns` columns a tile, `tiles` asked for at a time.

    All programs run at once, `programs` a multiprocessor, with as many rows each: with more of them than run at once, the last
    ones would have the memory to themselves, and too few to read it at its rate.
    """

    rows: int
    columns: int
    warps: int
    tiles: int
    programs: int = 4


def reference(x_K: Tensor, w_NK: Tensor) -> Tensor:
    """The product in fp64."""
    return w_NK.double() @ x_K.double()


@triton.jit
def _tiles(row, k0, K, BK: tl.constexpr, TILES: tl.constexpr, EVEN: tl.constexpr):
    """TILES tiles from column k0 on of the rows that start at `row`, (BN, 1)."""
    k = tl.arange(0, BK)[None, :]
    out = ()
    for i in tl.static_range(TILES):
        if EVEN:
            out += (tl.load(row + (k0 + i * BK) + k),)
        else:
            out += (tl.load(row + (k0 + i * BK) + k, mask=k0 + i * BK + k < K, other=0.0),)
    return out


@triton.jit
def _kernel(
    x_ptr, w_ptr, m_ptr, y_ptr, N, K, blocks, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, GATED: tl.constexpr,
    TIMES: tl.constexpr, GELU: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    i = tl.arange(0, BN)
    k = tl.arange(0, BK)
    begin = tl.program_id(0) * blocks
    end = tl.minimum(begin + blocks, tl.cdiv(N, BN))
    other = N.to(tl.int64) * K  # from a row of W to the one that it is multiplied with
    row = w_ptr + (tl.minimum(begin * BN + i, N - 1).to(tl.int64) * K)[:, None]
    w = _tiles(row, 0, K, BK, TILES, EVEN)
    v = _tiles(row + other, 0, K, BK, TILES, EVEN) if GATED else ()
    wait_turn(PDL)
    for block in range(begin, end):
        n = block * BN + i
        sums = tl.zeros((BN, BK), tl.float32)
        sums2 = tl.zeros((BN, BK), tl.float32)
        for k0 in range(0, K, BK * TILES):
            later = k0 + BK * TILES
            if later >= K:
                later = 0
                row = w_ptr + (tl.minimum(n + BN, N - 1).to(tl.int64) * K)[:, None]
            w1, v1 = w, v
            if (later > 0) | (block + 1 < end):
                w1 = _tiles(row, later, K, BK, TILES, EVEN)
                v1 = _tiles(row + other, later, K, BK, TILES, EVEN) if GATED else ()
            for j in tl.static_range(TILES):
                at = k0 + j * BK + k
                x = tl.load(x_ptr + at) if EVEN else tl.load(x_ptr + at, mask=at < K, other=0.0)
                x = x.to(tl.float32)[None, :]
                sums += w[j].to(tl.float32) * x
                if GATED:
                    sums2 += v[j].to(tl.float32) * x
            w, v = w1, v1
        y = tl.sum(sums, 1)
        if GATED:
            y = activated(y, GELU) * tl.sum(sums2, 1)
        if TIMES:
            y = activated(y, GELU) * tl.load(m_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def config_for(N: int, K: int) -> Config:
    """The launch of a shape."""
    return Config(4, 1024, 4, 1) if N * K < 2**26 else Config(4, 1024, 4, 2)


def product(
    x_K: Tensor, w_NK: Tensor, y_N: Tensor, *, act: str | None = None, times: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """W @ x into `y_N`; with `act` times the product with as many rows more of `w_NK`, or `times`.

    Raises:
        ValueError: shapes, strides or types this kernel does not take.
    """
    N, K = y_N.shape[0], x_K.shape[0]
    gated = act is not None and times is None
    rows = 2 * N if gated else N
    if w_NK.shape != (rows, K) or not w_NK.is_contiguous() or x_K.dtype != w_NK.dtype or x_K.dtype not in TOLERANCE:
        raise ValueError(
            f"product: {x_K.dtype} ({K},) by {w_NK.dtype} {tuple(w_NK.shape)}, strides {w_NK.stride()}: "
            f"one type, ({rows}, {K}), contiguous"
        )
    if (act is not None and act not in GATES) or (times is not None and (act is None or times.shape != (N,))):
        raise ValueError(f"product: {act}, times {None if times is None else tuple(times.shape)} for ({N},)")
    if any(t.stride(0) != 1 for t in (x_K, y_N) + (() if times is None else (times,))):
        raise ValueError(f"product: strides {x_K.stride()} and {y_N.stride()}, all must be 1")
    c = config or config_for(N, K)
    rows = c.rows // 2 if gated else c.rows
    blocks = -(-N // rows)
    each = -(-blocks // (c.programs * processors(y_N.device)))
    _kernel[(-(-blocks // each),)](
        x_K, w_NK, y_N if times is None else times, y_N, N, K, each, BN=rows, BK=c.columns, TILES=c.tiles, GATED=gated,
        TIMES=times is not None, GELU=act == "gelu_tanh", EVEN=K % (c.columns * c.tiles) == 0, num_warps=c.warps, **overlap(y_N),
    )  # fmt: skip
    return y_N
