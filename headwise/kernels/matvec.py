"""Products of a few rows with a quantised matrix that stays as it is: y_TN = x_TK @ W_NK.T, 1 to 16 rows.

Up to two rows are multiplied by the cores (`_vector`): a thread holds 16 bytes of several rows of W and meets them with the same
activations. More go to the matrix unit (`_matrix`), 8 or 16 rows a tile. Where N is small the keys of the sum, K, are shared out
between several programs; each leaves a partial sum and the last to finish adds them up, in the order of K.

Shapes    x_TK in bf16, f16 or fp32, rows `x_stride` apart; W in planes (`tiled.Planes`); out_TN, rows `out_stride` apart.
Accuracy  `_vector` fp32 throughout. `_matrix` rounds the weights to x's type, as an expanded tile would be, and sums in fp32.
Cost      the bytes of W once. Measured by benchmarks/quant_matmul.py.
Source    the layouts of ggml-quants.c; numbers from the bits of a float as in FasterTransformer's and Marlin's dequantisers.
"""

from __future__ import annotations

from functools import cache as remember
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.tiled import (
    LAYOUTS,
    MXFP4,
    Q4_K,
    Q5_K,
    Planes,
    bias,
    load_head,
    load_high,
    magic,
    number,
    pointers,
    scales,
)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative error of a result
MAX_ROWS = 16
VECTOR_ROWS = 2
RUNTIME = ["N", "K", "out_stride", "share", "even", "odd"]  # numbers whose divisors change no program


class Config(NamedTuple):
    """One launch: `rows` rows of W by `units` units of 16 bytes a step; `splits` programs share a row."""

    rows: int
    units: int
    warps: int
    splits: int = 1
    ahead: bool = True  # `_vector`: the next step's bytes are asked for before this one's are multiplied
    unroll: int = 1
    stages: int = 3  # `_matrix`
    matrix: bool = False


def reference(x_TK: Tensor, dense_NK: Tensor) -> Tensor:
    """The product in fp64, of the dequantised values."""
    return x_TK.double() @ dense_NK.double().T


@triton.jit
def _fetch(low, high, head, wide, row, unit, end, K, KIND: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr):
    """Words, high fields and heads of the units `unit` of the rows `row`, as loaded; (units, rows, words).

    Units come first: where nothing is contiguous the compiler lays neighbouring threads along the first axis.
    """
    at = row[None, :, None] * (K // UNIT * 4) + unit[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    ok = (unit < end)[:, None]
    if MASKED:
        w = tl.load(low + at, mask=ok[:, :, None], other=0)
    else:
        w = tl.load(low + at)
    h = load_high(high, at, ok[:, :, None], KIND, MASKED)
    d, a, b = load_head(head, wide, row[None, :], unit[:, None], ok, K, KIND, MASKED)
    return w, h, d, a, b


@triton.jit
def _activations(x, at, ok, KIND: tl.constexpr, MASKED: tl.constexpr):
    """Activations in fp32; for mxfp4, whose numbers are tiny, enlarged."""
    if MASKED:
        y = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    else:
        y = tl.load(x + at).to(tl.float32)
    if KIND == MXFP4:
        y = y * 9223372036854775808.0  # 2**63; the other 2**64 is in the scale
    return y


@triton.jit
def _finish(y, t, n, ok, out, part, N, out_stride, T: tl.constexpr, splits):
    """A whole sum to its place, or a partial one to its room."""
    if splits == 1:
        tl.store(out + t * out_stride + n, y.to(out.dtype.element_ty), mask=ok)
    else:
        tl.store(part + (tl.program_id(1) * T + t) * N + n, y, mask=ok)


@triton.jit
def _last(done, splits):
    """Whether all other programs of these rows have left their partial sums."""
    tl.debug_barrier()
    return tl.atomic_add(done + tl.program_id(0), 1, sem="acq_rel") == splits - 1


@triton.jit(do_not_specialize=RUNTIME)
def _vector(
    x_ptr, low, high, head, wide, out, part, done, N, K, x_stride, out_stride, share, even, odd, splits,
    KIND: tl.constexpr, UNIT: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
    MASKED: tl.constexpr, AHEAD: tl.constexpr, HALVES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K // UNIT)
    i = tl.arange(0, 4)
    acc0 = tl.zeros((U, BN, 4), tl.float32)
    acc1 = tl.zeros((U, BN, 4), tl.float32)
    first = begin if MASKED else tl.minimum(begin, K // UNIT - U)  # the last programs of a row may have no share
    w, h, d, a, b = _fetch(low, high, head, wide, row, first + tl.arange(0, U), end, K, KIND, UNIT, MASKED)
    for u0 in tl.range(begin, end, U, loop_unroll_factor=UNROLL):
        unit = u0 + tl.arange(0, U)
        if AHEAD:  # the last step fetches its own again
            ahead = tl.minimum(u0 + U, end - (1 if MASKED else U)) + tl.arange(0, U)
            w1, h1, d1, a1, b1 = _fetch(low, high, head, wide, row, ahead, end, K, KIND, UNIT, MASKED)
        s0, s1, m = scales(d, a, b, unit[:, None], KIND)
        if KIND == MXFP4:
            s0 = s0 * 18446744073709551616.0  # 2**64
        at = unit[:, None] * UNIT + i[None, :]
        ok = (unit < end)[:, None] & (i >= 0)[None, :]
        for half in tl.static_range(HALVES):
            p0 = tl.zeros((U, BN, 4), tl.float32)
            p1 = tl.zeros((U, BN, 4), tl.float32)
            e0 = tl.zeros((U, 4), tl.float32)  # sums of the activations that even fields meet
            o0 = tl.zeros((U, 4), tl.float32)
            e1 = tl.zeros((U, 4), tl.float32)
            o1 = tl.zeros((U, 4), tl.float32)
            for j in tl.static_range(half * (UNIT // 4 // HALVES), (half + 1) * (UNIT // 4 // HALVES)):
                v = number(w, h, j, even, odd, KIND)
                x = _activations(x_ptr, at + 4 * j, ok, KIND, MASKED)
                p0 += v * x[:, None, :]
                if j % 2 == 0:
                    e0 += x
                else:
                    o0 += x
                if T == 2:
                    x = _activations(x_ptr + x_stride, at + 4 * j, ok, KIND, MASKED)
                    p1 += v * x[:, None, :]
                    if j % 2 == 0:
                        e1 += x
                    else:
                        o1 += x
            s = s0 if half == 0 else s1
            if KIND == MXFP4:
                acc0 += s[:, :, None] * p0
                acc1 += s[:, :, None] * p1
            else:
                acc0 += s[:, :, None] * (p0 - (e0 * bias(0, KIND) + o0 * bias(1, KIND))[:, None, :])
                if T == 2:
                    acc1 += s[:, :, None] * (p1 - (e1 * bias(0, KIND) + o1 * bias(1, KIND))[:, None, :])
            if KIND == Q4_K or KIND == Q5_K:
                acc0 -= m[:, :, None] * (e0 + o0)[:, None, :]
                if T == 2:
                    acc1 -= m[:, :, None] * (e1 + o1)[:, None, :]
        if AHEAD:
            w, h, d, a, b = w1, h1, d1, a1, b1
        elif u0 + U < end:
            w, h, d, a, b = _fetch(low, high, head, wide, row, unit + U, end, K, KIND, UNIT, MASKED)
    _finish(tl.sum(tl.sum(acc0, 2), 0), 0, n, n < N, out, part, N, out_stride, T, splits)
    if T == 2:
        _finish(tl.sum(tl.sum(acc1, 2), 0), 1, n, n < N, out, part, N, out_stride, T, splits)
    if splits > 1:
        if _last(done, splits):
            for t in tl.static_range(T):
                y = tl.zeros((BN,), tl.float32)
                for s in range(splits):
                    y += tl.load(part + (s * T + t) * N + n, mask=n < N, other=0.0, cache_modifier=".cg")
                tl.store(out + t * out_stride + n, y.to(out.dtype.element_ty), mask=n < N)
            tl.store(done + tl.program_id(0), 0)


@triton.jit(do_not_specialize=[*RUNTIME, "T"])
def _matrix(
    x_ptr, low, high, head, wide, out, part, done, N, K, x_stride, out_stride, share, even, odd, splits, T,
    KIND: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BN: tl.constexpr, U: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K // UNIT)
    t = tl.arange(0, TP)
    acc = tl.zeros((BN, TP), tl.float32)
    for u0 in tl.range(begin, end, U, num_stages=STAGES):
        unit = u0 + tl.arange(0, U)
        w, h, d, a, b = _fetch(low, high, head, wide, row, unit, end, K, KIND, UNIT, MASKED)
        s0, s1, m = scales(d, a, b, unit[:, None], KIND)
        k = u0 * 4 + tl.arange(0, 4 * U)
        xk = x_ptr + t[None, :] * x_stride + (k // 4 * UNIT + k % 4)[:, None]
        for j in tl.static_range(UNIT // 4):
            s = s1 if j >= UNIT // 8 else s0
            v = number(w, h, j, even, odd, KIND)
            if KIND == MXFP4:
                f = v * 170141183460469231731687303715884105728.0 * s[:, :, None]  # 2**127
            else:
                f = v * s[:, :, None] - (s * bias(j, KIND) + m)[:, :, None]
            if MASKED:
                x = tl.load(xk + 4 * j, mask=(t < T)[None, :] & (k // 4 < end)[:, None], other=0.0)
            else:
                x = tl.load(xk + 4 * j, mask=(t < T)[None, :], other=0.0)
            f = tl.reshape(tl.permute(f.to(dtype), (1, 0, 2)), (BN, 4 * U))
            acc = tl.dot(f, x, acc, input_precision="ieee")
    ok = (n < N)[:, None] & (t < T)[None, :]
    where = t[None, :] * out_stride + n[:, None]
    if splits == 1:
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=ok)
    else:
        mine = t[None, :] * N + n[:, None]
        tl.store(part + tl.program_id(1) * T * N + mine, acc, mask=ok)
        if _last(done, splits):
            y = tl.zeros((BN, TP), tl.float32)
            for s in range(splits):
                y += tl.load(part + s * T * N + mine, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(out + where, y.to(out.dtype.element_ty), mask=ok)
            tl.store(done + tl.program_id(0), 0)


def partial_floats(T: int, N: int, splits: int) -> int:
    """fp32 values of scratch that a launch over `splits` programs a row needs."""
    return T * N * splits if splits > 1 else 0


def config_for(type_name: str, T: int, N: int, K: int, processors: int) -> Config:
    """The launch of a shape: about four programs a multiprocessor, more programs a row where rows are few."""
    units = K // LAYOUTS[type_name].unit
    matrix = T > VECTOR_ROWS
    rows, step, warps = (32, 8, 2) if matrix else (16, 8, 4)
    programs = -(-N // rows)
    splits = 1
    while programs * splits < 4 * processors and splits < 8 and units // (2 * splits) >= 4 * step:
        splits *= 2
    return Config(rows, step, warps, splits, matrix=matrix)


@remember
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def matvec(
    x_TK: Tensor, w: Planes, out_TN: Tensor, *, scratch: Tensor | None = None, done: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x @ W.T into `out_TN`.

    Args:
        scratch: `partial_floats` fp32 values where `config.splits` > 1.
        done: int32 zeros, one for each `config.rows` rows of W where `config.splits` > 1; zeros again afterwards.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    T, K = x_TK.shape
    N, t = w.rows, LAYOUTS[w.type]
    if not 1 <= T <= MAX_ROWS:
        raise ValueError(f"matvec: {T} rows of activations not in 1 to {MAX_ROWS}")
    if w.K != K or tuple(out_TN.shape) != (T, N):
        raise ValueError(f"matvec: ({T}, {K}) by a matrix of ({N}, {w.K}) into {tuple(out_TN.shape)}")
    if x_TK.stride(1) != 1 or out_TN.stride(1) != 1:
        raise ValueError(f"matvec: strides {x_TK.stride()} and {out_TN.stride()}, the last of both must be 1")
    if x_TK.dtype not in TOLERANCE:
        raise ValueError(f"matvec: activations of {x_TK.dtype} not in {', '.join(map(str, TOLERANCE))}")
    if not all(p.is_contiguous() for p in (w.low, w.head)):
        raise ValueError(f"matvec: planes of strides {w.low.stride()} and {w.head.stride()} for {N} rows, not contiguous")
    c = config or config_for(w.type, T, N, K, _processors(x_TK.device))
    if T > VECTOR_ROWS and not c.matrix:
        raise ValueError(f"matvec: {T} rows of activations, at most {VECTOR_ROWS} without the matrix unit")
    units, programs = K // t.unit, -(-N // c.rows)
    part = count = x_TK
    if c.splits > 1:
        n = partial_floats(T, N, c.splits)
        if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < n:
            raise ValueError(f"matvec: {c.splits} splits need scratch of {n} fp32 values, got {scratch}")
        if done is None or done.dtype != torch.int32 or done.numel() < programs:
            raise ValueError(f"matvec: {c.splits} splits need {programs} int32 zeros, got {done}")
        part, count = scratch, done
    share = -(-units // (c.splits * c.units)) * c.units
    low, high, head, wide = pointers(w)
    ints = (N, K, x_TK.stride(0), out_TN.stride(0), share, *magic(w.type), c.splits)
    if c.matrix:
        _matrix[(programs, c.splits)](
            x_TK, low, high, head, wide, out_TN, part, count, *ints, T,
            KIND=t.kind, UNIT=t.unit, TP=8 if T <= 8 else 16, BN=c.rows, U=c.units, MASKED=units % c.units != 0,
            STAGES=c.stages, num_warps=c.warps,
        )  # fmt: skip
    else:
        _vector[(programs, c.splits)](
            x_TK, low, high, head, wide, out_TN, part, count, *ints,
            KIND=t.kind, UNIT=t.unit, T=T, BN=c.rows, U=c.units, MASKED=units % c.units != 0, AHEAD=c.ahead,
            HALVES=2 if w.type == "q6_k" else 1, UNROLL=c.unroll, num_warps=c.warps,
        )  # fmt: skip
    return out_TN
