"""Products of one row with a matrix of floats, and what is done with the results at once.

    plain   y_N = W_NK x_K
    gated   y_N = act(W_NK x_K) * V_NK x_K         V: the N rows after those of W
    times   y_N = act(W_NK x_K) * m_N

A program sums over K in fp32, for blocks of rows in turn. Asking for the first weights before the launch ahead has ended, or for
more of them ahead, gains nothing on an H200: the next programs' loads fill the gap as well.

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

from headwise.kernels.gates import activated
from headwise.kernels.rows import GATES
from headwise.kernels.split import card
from headwise.kernels.stored import in_turn, overlap

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative error of a result


class Config(NamedTuple):
    """One launch: tiles of `rows` rows by `columns` columns, `unroll` of them at once."""

    rows: int
    columns: int
    warps: int
    unroll: int = 1


PROGRAMS = 8  # a multiprocessor, at most


def reference(x_K: Tensor, w_NK: Tensor) -> Tensor:
    """The product in fp64."""
    return w_NK.double() @ x_K.double()


@triton.jit(do_not_specialize=["N"])
def _kernel(
    x_ptr, w_ptr, m_ptr, y_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, TIMES: tl.constexpr,
    GELU: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    k = tl.arange(0, BK)
    other = N.to(tl.int64) * K  # from a row to the one that it is multiplied with
    for block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        n = block * BN + tl.arange(0, BN)
        row = w_ptr + (tl.minimum(n, N - 1).to(tl.int64) * K)[:, None] + k[None, :]
        sums = tl.zeros((BN, BK), tl.float32)
        sums2 = tl.zeros((BN, BK), tl.float32)
        for k0 in tl.range(0, K, BK, loop_unroll_factor=UNROLL):
            if EVEN:
                w = tl.load(row + k0)
                v = tl.load(row + other + k0) if GATED else w
                x = tl.load(x_ptr + k0 + k).to(tl.float32)[None, :]
            else:
                ok = k0 + k < K
                w = tl.load(row + k0, mask=ok[None, :], other=0.0)
                v = tl.load(row + other + k0, mask=ok[None, :], other=0.0) if GATED else w
                x = tl.load(x_ptr + k0 + k, mask=ok, other=0.0).to(tl.float32)[None, :]
            sums += w.to(tl.float32) * x
            if GATED:
                sums2 += v.to(tl.float32) * x
        y = tl.sum(sums, 1)
        if GATED:
            y = activated(y, GELU) * tl.sum(sums2, 1)
        if TIMES:
            y = activated(y, GELU) * tl.load(m_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def config_for(N: int, K: int, gated: bool) -> Config:
    """The launch of a shape: a warp a row where there are many rows, else all warps side by side in each."""
    return Config(8, 256, 4, 2) if gated or (N >= 8192 and K % 1024) or N > 2**15 else Config(4, 1024, 4)


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
    c = config or config_for(N, K, gated)
    _kernel[(min(-(-N // c.rows), PROGRAMS * card(y_N.device).processors),)](
        x_K, w_NK, y_N if times is None else times, y_N, N, K, BN=c.rows, BK=c.columns, GATED=gated, TIMES=times is not None,
        GELU=act == "gelu_tanh", EVEN=K % c.columns == 0, UNROLL=c.unroll, num_warps=c.warps, **overlap(y_N),
    )  # fmt: skip
    return y_N
