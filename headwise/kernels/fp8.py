"""Products of 1 to 64 rows with a matrix in e4m3: y_TN = x_TK @ (W_NK * scale).T; of one row also with what follows.

    plain   y_N = W_NK x_K
    gated   y_N = act(W_NK x_K) * V_NK x_K         V: the N rows after those of W; one row of x
    times   y_N = act(W_NK x_K) * m_N              one row of x

One row: no matrix unit. A thread reads 16 weights at once and sums their products, so that a scale meets sums of 16; programs take
blocks of rows in turn. More rows: weights become x's type on their way from shared memory to the matrix unit; K is shared out
between programs where rows of W are few, each leaves a partial sum, and the last to finish adds them up in the order of K.

Shapes    x (T, K), bf16, f16 or fp32, rows contiguous; W bytes (N, K), contiguous; scales fp32, (N, 1) or one for each 128 of K,
          (N, ceil(K / 128)); y (T, N) in x's type.
Accuracy  e4m3 is exact in x's type; products and sums in fp32, scales applied to sums; rounded once.
Cost      the bytes of W and of the scales, once. Measured by benchmarks/fp8_matmul.py.
Source    OCP 8-bit floating point specification 1.0 (e4m3: bias 7, no infinities); the gates are those of `rows.gate`.
"""

from __future__ import annotations

from functools import cache as remember
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.gates import activated
from headwise.kernels.rows import GATES
from headwise.kernels.split import Card, card, room, splits_for, store_sum
from headwise.kernels.stored import bits, from_fp8, in_turn, overlap
from headwise.planner.residence import FP8_BLOCK as BLOCK
from headwise.planner.workspace import SKINNY_ROWS

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative error of a result
MOST_ROWS = SKINNY_ROWS
AT_ONCE = {16: 5, 32: 4, 64: 2}  # programs of so many rows of x whose registers a multiprocessor has


class RowConfig(NamedTuple):
    """A launch for one row: tiles of `rows` rows by `columns` columns, `unroll` of them at once."""

    rows: int
    columns: int
    warps: int
    unroll: int = 1


class Config(NamedTuple):
    """A launch for several: `rows` rows of W a program, `splits` programs share a row."""

    rows: int = 64
    warps: int = 4
    stages: int = 4
    splits: int = 1


WARPS = 32  # a multiprocessor, at most


def dequantised(w_NK: Tensor, scales_NS: Tensor) -> Tensor:
    """The matrix in fp64."""
    each = scales_NS.double().repeat_interleave(BLOCK if scales_NS.shape[1] > 1 else w_NK.shape[1], 1)
    return w_NK.double() * each[:, : w_NK.shape[1]]


def reference(x_TK: Tensor, w_NK: Tensor, scales_NS: Tensor) -> Tensor:
    """The product in fp64."""
    return x_TK.double() @ dequantised(w_NK, scales_NS).t()


@remember
def converts(device: torch.device) -> bool:
    """Whether the card has an instruction for e4m3, from compute capability 8.9 on; others move its bits."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def as_floats(bits, dtype: tl.constexpr, CVT: tl.constexpr):
    """e4m3 bits (uint8) as `dtype`, exactly."""
    if CVT:
        return bits.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        return from_fp8(bits, dtype)


@triton.jit
def _sixteens(w, x, CVT: tl.constexpr):
    """Sums of 16 products: (rows, columns) bytes by (columns) as (rows, columns / 16). A thread holds the 16."""
    p = as_floats(w, tl.float32, CVT) * x[None, :]
    return tl.sum(tl.reshape(p, (w.shape[0], w.shape[1] // 16, 16)), 2)


@triton.jit(do_not_specialize=["N", "S"])
def _row(
    x_ptr, w_ptr, s_ptr, m_ptr, y_ptr, N, K, S, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
    TIMES: tl.constexpr, GELU: tl.constexpr, EVEN: tl.constexpr, UNROLL: tl.constexpr, CVT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    k = tl.arange(0, BK)
    k16 = tl.arange(0, BK // 16) * 16
    other = N.to(tl.int64) * K  # from a row to the one that it is multiplied with
    for block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        n = block * BN + tl.arange(0, BN)
        row = tl.minimum(n, N - 1).to(tl.int64)
        w_row = w_ptr + (row * K)[:, None] + k[None, :]
        s_row = s_ptr + row * S
        sums = tl.zeros((BN, BK // 16), tl.float32)
        sums2 = tl.zeros((BN, BK // 16), tl.float32)
        for k0 in tl.range(0, K, BK, loop_unroll_factor=UNROLL):
            if EVEN:
                w = tl.load(w_row + k0)
                v = tl.load(w_row + other + k0) if GATED else w
                x = tl.load(x_ptr + k0 + k).to(tl.float32)
            else:
                ok = k0 + k < K
                w = tl.load(w_row + k0, mask=ok[None, :], other=0)
                v = tl.load(w_row + other + k0, mask=ok[None, :], other=0) if GATED else w
                x = tl.load(x_ptr + k0 + k, mask=ok, other=0.0).to(tl.float32)
            part = _sixteens(w, x, CVT)
            if BLOCKS:
                at = tl.minimum((k0 + k16) // 128, S - 1)[None, :]
                part *= tl.load(s_row[:, None] + at)
            sums += part
            if GATED:
                part = _sixteens(v, x, CVT)
                if BLOCKS:
                    part *= tl.load((s_row + N.to(tl.int64) * S)[:, None] + at)
                sums2 += part
        y = tl.sum(sums, 1)
        if not BLOCKS:
            y *= tl.load(s_row)
        if GATED:
            up = tl.sum(sums2, 1)
            if not BLOCKS:
                up *= tl.load(s_row + N)
            y = activated(y, GELU) * up
        elif TIMES:
            y = activated(y, GELU) * tl.load(m_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["N", "S", "T", "out_stride", "share", "splits"])
def _rows(
    x_ptr, w_ptr, s_ptr, out, part, done, N, K, S, T, x_stride, out_stride, share, splits,
    TP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    CVT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    t, k = tl.arange(0, TP), tl.arange(0, BK)
    w_row = w_ptr + (row * K)[:, None] + k[None, :]
    x_col = x_ptr + (t * x_stride)[None, :] + k[:, None]
    begin = tl.program_id(1) * share
    acc = tl.zeros((BN, TP), tl.float32)
    for step in tl.range(begin, tl.minimum(begin + share, tl.cdiv(K, BK)), num_stages=STAGES):
        k0 = step * BK
        if EVEN:
            w = tl.load(w_row + k0)
            x = tl.load(x_col + k0, mask=(t < T)[None, :], other=0.0)
        else:
            w = tl.load(w_row + k0, mask=(k0 + k < K)[None, :], other=0)
            x = tl.load(x_col + k0, mask=(t < T)[None, :] & (k0 + k < K)[:, None], other=0.0)
        f = as_floats(w, x.dtype, CVT)
        if BLOCKS:
            acc += tl.dot(f, x, input_precision="ieee") * tl.load(s_ptr + row * S + k0 // 128)[:, None]
        else:
            acc = tl.dot(f, x, acc, input_precision="ieee")
    if not BLOCKS:
        acc *= tl.load(s_ptr + row)[:, None]
    store_sum(acc, n, t, out, part, done, N, T, out_stride, splits)


def row_config(N: int, K: int, gated: bool) -> RowConfig:
    """The launch of a shape for one row, `floats.config_for` with twice the weights a load."""
    return RowConfig(16, 256, 4, 2) if gated or (N >= 8192 and K % 1024) or N > 2**15 else RowConfig(8, 1024, 4)


def padded(T: int) -> int:
    """Rows of x that a program multiplies: 16, 32 or 64."""
    return max(16, 1 << (T - 1).bit_length())


@remember
def config_for(T: int, N: int, K: int, card: Card) -> Config:
    """The launch of a shape for several rows: so many programs a row that the last wave of them is nearly full."""
    c = Config(stages=4 if T <= 32 else 3)
    each = (c.stages + 1) * BLOCK * (c.rows + 2 * padded(T))
    at_once = card.processors * max(1, min(AT_ONCE[padded(T)], card.shared // each))
    return c._replace(splits=splits_for(-(-K // BLOCK), -(-N // c.rows), at_once))


def _checked(x_TK: Tensor, w_NK: Tensor, scales_NS: Tensor, out_TN: Tensor, rows: int) -> None:
    (T, K), S = x_TK.shape, scales_NS.shape[-1]
    if w_NK.shape != (rows, K) or w_NK.element_size() != 1 or not w_NK.is_contiguous() or not 1 <= T <= MOST_ROWS:
        raise ValueError(
            f"fp8: ({T}, {K}) by {w_NK.dtype} {tuple(w_NK.shape)}, strides {w_NK.stride()}: "
            f"1 to {MOST_ROWS} rows by bytes ({rows}, {K}), contiguous"
        )
    if (
        scales_NS.shape != (rows, S)
        or S not in (1, -(-K // BLOCK))
        or scales_NS.dtype != torch.float32
        or not scales_NS.is_contiguous()
    ):
        raise ValueError(
            f"fp8: scales {scales_NS.dtype} {tuple(scales_NS.shape)}, strides {scales_NS.stride()}: "
            f"fp32, ({rows}, 1) or ({rows}, {-(-K // BLOCK)}), contiguous"
        )
    if x_TK.dtype not in TOLERANCE or out_TN.dtype != x_TK.dtype or x_TK.stride(1) != 1 or out_TN.stride(1) != 1:
        raise ValueError(
            f"fp8: {x_TK.dtype}, strides {x_TK.stride()}, into {out_TN.dtype}, strides {out_TN.stride()}: "
            f"one type of {', '.join(map(str, TOLERANCE))}, last strides 1"
        )


def one_row(
    x_1K: Tensor, w_NK: Tensor, scales_NS: Tensor, y_1N: Tensor, *, act: str | None = None, times: Tensor | None = None,
    config: RowConfig | None = None,
) -> Tensor:  # fmt: skip
    """W @ x into `y_1N`; with `act` times the product with as many rows more of W, or `times` (1, N).

    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both.
    """
    N, K, S = y_1N.shape[1], x_1K.shape[1], scales_NS.shape[-1]
    gated = act is not None and times is None
    _checked(x_1K, w_NK, scales_NS, y_1N, 2 * N if gated else N)
    if (
        x_1K.shape[0] != 1 or y_1N.shape[0] != 1 or (act is not None and act not in GATES)
        or (times is not None and (act is None or times.shape != (1, N) or times.stride(1) != 1))
    ):  # fmt: skip
        raise ValueError(f"fp8: {act}, times {None if times is None else tuple(times.shape)}, {tuple(x_1K.shape)} for (1, {N})")
    c = config or row_config(N, K, gated)
    _row[(min(-(-N // c.rows), WARPS // c.warps * card(y_1N.device).processors),)](
        x_1K, bits(w_NK), scales_NS, y_1N if times is None else times, y_1N, N, K, S, BN=c.rows, BK=c.columns, BLOCKS=S > 1,
        GATED=gated, TIMES=times is not None, GELU=act == "gelu_tanh", EVEN=K % c.columns == 0, UNROLL=c.unroll,
        CVT=converts(y_1N.device), num_warps=c.warps, **overlap(y_1N),
    )  # fmt: skip
    return y_1N


def product(
    x_TK: Tensor, w_NK: Tensor, scales_NS: Tensor, out_TN: Tensor, *, scratch: Tensor | None = None, done: Tensor | None = None,
    config: Config,
) -> Tensor:  # fmt: skip
    """x @ W.T into `out_TN`, on the matrix unit.

    Args:
        scratch: T * N * splits fp32 values where `config.splits` > 1.
        done: int32 zeros, one for each `config.rows` rows of W where `config.splits` > 1; zeros again afterwards.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both.
    """
    (T, K), (N, S), c = x_TK.shape, scales_NS.shape, config
    _checked(x_TK, w_NK, scales_NS, out_TN, out_TN.shape[1])
    programs = -(-N // c.rows)
    part, count = room("fp8", out_TN, c.splits, programs, scratch, done)
    _rows[(programs, c.splits)](
        x_TK, bits(w_NK), scales_NS, out_TN, part, count, N, K, S, T, x_TK.stride(0), out_TN.stride(0),
        triton.cdiv(triton.cdiv(K, BLOCK), c.splits), c.splits, TP=padded(T), BN=c.rows, BK=BLOCK, BLOCKS=S > 1,
        EVEN=K % BLOCK == 0, STAGES=c.stages, CVT=converts(out_TN.device), num_warps=c.warps, **overlap(out_TN),
    )  # fmt: skip
    return out_TN
