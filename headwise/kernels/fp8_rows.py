"""Rows between e4m3 and floats: a matrix's as floats, an operand of a product; activations' as e4m3 with a scale each.

    expand      out_RK = W_RK * scale                             bytes + rows*K*itemsize: memory-bound
    quantise    scale_T = max |x_TK| / 448, q_TK = x_TK / scale   2 bytes read and one written a value

Shapes    W and scales as `kernels.fp8` takes them; x and out rows contiguous.
Accuracy  expand: the fp32 product of value and scale, rounded once. quantise: rounded to nearest even in e4m3, whose three bits of
          mantissa cost a value at most 1/16 of it, the smallest (below 2^-6 of scale) half of 2^-9.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.fp8 import as_floats, converts
from headwise.kernels.heads import FP8_MAX, to_fp8
from headwise.kernels.stored import bits, in_turn, overlap

COLUMNS, ROWS = 1024, 4  # of a program that expands


@triton.jit(do_not_specialize=["R", "S"])
def _expand(
    w_ptr, s_ptr, out_ptr, R, K, S, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, CVT: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    in_turn(PDL)
    tiles = tl.cdiv(K, BK)
    r = (tl.program_id(0) // tiles).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    ok = (r < R)[:, None] & (k < K)[None, :]
    w = as_floats(tl.load(w_ptr + r[:, None] * K + k[None, :], mask=ok, other=0), tl.float32, CVT)
    if BLOCKS:
        k16 = tl.program_id(0) % tiles * BK + tl.arange(0, BK // 16) * 16
        s = tl.load(s_ptr + r[:, None] * S + tl.minimum(k16 // 128, S - 1)[None, :], mask=(r < R)[:, None], other=0.0)
        w = tl.reshape(tl.reshape(w, (BN, BK // 16, 16)) * s[:, :, None], (BN, BK))
    else:
        w *= tl.load(s_ptr + r, mask=r < R, other=0.0)[:, None]
    tl.store(out_ptr + r[:, None] * K + k[None, :], w.to(out_ptr.dtype.element_ty), mask=ok)


def expand(w_RK: Tensor, scales_RS: Tensor, out_RK: Tensor) -> Tensor:
    """The rows as floats into `out_RK`: bf16, f16 or fp32.

    Raises:
        ValueError: shapes or strides this kernel does not take, with both.
    """
    (R, K), S = out_RK.shape, scales_RS.shape[-1]
    if w_RK.shape != (R, K) or scales_RS.shape != (R, S) or not all(x.is_contiguous() for x in (w_RK, scales_RS, out_RK)):
        raise ValueError(
            f"expand: bytes {tuple(w_RK.shape)}, scales {tuple(scales_RS.shape)} into {tuple(out_RK.shape)}: alike, contiguous"
        )
    _expand[(-(-R // ROWS) * -(-K // COLUMNS),)](
        bits(w_RK), scales_RS, out_RK, R, K, S, BN=ROWS, BK=COLUMNS, BLOCKS=S > 1, CVT=converts(out_RK.device), num_warps=4,
        **overlap(out_RK),
    )  # fmt: skip
    return out_RK


@triton.jit
def _quantise(x_ptr, q_ptr, s_ptr, x_stride, K, BK: tl.constexpr, CVT: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    most = tl.zeros((BK,), tl.float32)
    for k0 in range(0, K, BK):
        most = tl.maximum(most, tl.abs(tl.load(x_ptr + t * x_stride + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(most, 0), 1e-30) / FP8_MAX
    tl.store(s_ptr + t, scale)
    for k0 in range(0, K, BK):
        y = tl.load(x_ptr + t * x_stride + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32) / scale
        if CVT:
            q = tl.minimum(tl.maximum(y, -FP8_MAX), FP8_MAX).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            q = to_fp8(y)
        tl.store(q_ptr + t * K + k0 + k, q, mask=k0 + k < K)


def quantise(x_TK: Tensor, q_TK: Tensor, scales_T: Tensor) -> None:
    """Rows of x as e4m3 into `q_TK`, and the scale of each into `scales_T`, fp32.

    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both.
    """
    T, K = x_TK.shape
    if (
        q_TK.shape != (T, K) or q_TK.dtype != torch.float8_e4m3fn or scales_T.shape != (T,) or scales_T.dtype != torch.float32
        or x_TK.stride(1) != 1 or not q_TK.is_contiguous() or not scales_T.is_contiguous()
    ):  # fmt: skip
        raise ValueError(
            f"quantise: {x_TK.dtype} ({T}, {K}), strides {x_TK.stride()}, into {q_TK.dtype} {tuple(q_TK.shape)} and "
            f"{scales_T.dtype} {tuple(scales_T.shape)}: e4m3 alike and fp32 ({T},), contiguous"
        )
    _quantise[(T,)](
        x_TK, bits(q_TK), scales_T, x_TK.stride(0), K, BK=min(4096, triton.next_power_of_2(K)), CVT=converts(q_TK.device),
        num_warps=8, **overlap(q_TK),
    )  # fmt: skip
