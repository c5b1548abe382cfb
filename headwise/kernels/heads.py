"""What happens to the projected heads before attention, in one launch: norm, RoPE, and keys and values to their slots.

Each program takes one head, of one token or, where tokens are many, of several. A query is normed, rotated and written where
attention reads it; a key is normed, rotated, quantised and stored; a value is normed (where the family norms it), quantised and
stored. Where one tensor is kept for K and V (`spec.kv`), the head that makes both is stored as [V | the rotated values of K] or as
V alone, and the query becomes what meets the former.

Shapes    T tokens; H query heads, then G keys, then G values side by side (values not with one tensor; neither where the layer
          owns no cache), A values each (a power of two); P rotated pairs (i, i + A / 2): qkv_TN, cos and sin (T, P) -> q_out
          (T, H, E), E = A, or A + R with one tensor; stored rows of E (of V alone A) and A values, blocks of 32.
Accuracy  fp32 inside, rounded once at each result. Integers of q8_0 equal those of `cache.storage` for equal fp32 input; q4_0's
          too, but where the largest and the least value of a block are the same number with two signs.
Cost      the bytes of qkv, twice.
Source    ggml-quants.c quantize_row_q8_0_ref, quantize_row_q4_0_ref; transformers 5.23 apply_rotary_pos_emb.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.stored import FLOAT, FP8, Q8_0, Stored, bits, in_turn, overlap

HEAD_DIMS = (64, 128, 256, 512)
FP8_MAX = tl.constexpr(448.0)
FEW, MANY = 64, (8, 4)  # tokens with a program each; of more, tokens and warps a program


@triton.jit
def _round(x):
    """To the nearest whole number, halves to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_fp8(x):
    """fp32 as e4m3 bits, rounded to nearest even, saturated: integer operations, so any card can."""
    size = tl.minimum(tl.abs(x), FP8_MAX)
    word = size.to(tl.int32, bitcast=True)
    normal = ((word + 0x7FFFF + ((word >> 20) & 1)) >> 20) - (120 << 3)
    small = _round(size * 512.0).to(tl.int32)  # below 2^-6: steps of 2^-9
    sign = tl.where(x.to(tl.int32, bitcast=True) < 0, 128, 0)
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def _store(data, scales, rows, ok, at, x, N: tl.constexpr, W: tl.constexpr, FORMAT: tl.constexpr):
    """(T, N) fp32 values as columns [at, at + N) of stored rows of W; `at` in whole blocks of 32."""
    T: tl.constexpr = x.shape[0]
    cols = at + tl.arange(0, N)[None, :]
    if FORMAT == FLOAT:
        tl.store(data + rows * W + cols, x.to(data.dtype.element_ty), mask=ok)
    elif FORMAT == FP8:
        tl.store(data + rows * W + cols, to_fp8(x), mask=ok)
    else:
        NB: tl.constexpr = N // 32
        x3 = tl.reshape(x, (T, NB, 32))
        if FORMAT == Q8_0:
            d = tl.max(tl.abs(x3), 2) / 127.0
            inverse = tl.where(d > 0, 1.0 / d, 0.0)
            q = _round(x3 * inverse[:, :, None]).to(tl.int8)
            tl.store(data + rows * W + cols, tl.reshape(q, (T, N)), mask=ok)
        else:
            high, low = tl.max(x3, 2), tl.min(x3, 2)
            d = tl.where(high >= -low, high, low) / -8.0
            inverse = tl.where(d != 0, 1.0 / d, 0.0)
            q = tl.minimum(tl.maximum(x3 * inverse[:, :, None] + 8.5, 0.0), 15.0).to(tl.int32)
            first, second = tl.split(tl.permute(tl.reshape(q, (T, NB, 2, 16)), (0, 1, 3, 2)))
            packed = tl.reshape((first | (second << 4)).to(tl.uint8), (T, N // 2))
            tl.store(data + rows * (W // 2) + at // 2 + tl.arange(0, N // 2)[None, :], packed, mask=ok)
        tl.store(scales + rows * (W // 32) + at // 32 + tl.arange(0, NB)[None, :], d.to(tl.float16), mask=ok)


@triton.jit
def _tail(head, ok, w, rstd, cos, sin, A: tl.constexpr, P: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr):
    """The rotated values of heads side by side, first halves then second ones, zeros up to R."""
    j = tl.arange(0, R)[None, :]
    i = j % P
    turns = j < 2 * P
    a = tl.load(head + i, mask=ok & turns, other=0).to(tl.float32)
    b = tl.load(head + A // 2 + i, mask=ok & turns, other=0).to(tl.float32)
    if NORM:
        a = a * rstd * tl.load(w + i, mask=turns, other=0).to(tl.float32)
        b = b * rstd * tl.load(w + A // 2 + i, mask=turns, other=0).to(tl.float32)
    c = tl.load(cos + i, mask=ok & turns, other=0).to(tl.float32)
    s = tl.load(sin + i, mask=ok & turns, other=0).to(tl.float32)
    return tl.where(j < P, a * c - b * s, b * c + a * s)


@triton.jit(do_not_specialize=["T"])
def _kernel(
    qkv, q_out, k_data, k_scales, v_data, v_scales, q_w, k_w, cos_ptr, sin_ptr, slots, eps, row_stride, T,
    H: tl.constexpr, G: tl.constexpr, A: tl.constexpr, P: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    NORM: tl.constexpr, V_NORM: tl.constexpr, ONE: tl.constexpr, K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr, BT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    head = tl.program_id(0)  # the heads of a token run side by side: they lie so in memory
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    ok = t < T
    B: tl.constexpr = A // 2
    x = qkv + t * row_stride + head * A
    i = tl.arange(0, B)[None, :]
    a = tl.load(x + i, mask=ok, other=0).to(tl.float32)
    b = tl.load(x + B + i, mask=ok, other=0).to(tl.float32)
    rstd = 1.0
    if NORM:
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / A + eps)[:, None]
    cos, sin = cos_ptr + t * P, sin_ptr + t * P
    if head < H:
        if NORM:
            a = a * rstd * tl.load(q_w + i).to(tl.float32)
            b = b * rstd * tl.load(q_w + B + i).to(tl.float32)
        E: tl.constexpr = A + R
        out = q_out + (t * H + head) * E
        kind: tl.constexpr = q_out.dtype.element_ty
        if ONE:
            still = i >= P
            tl.store(out + i, tl.where(still, a * tl.load(k_w + i).to(tl.float32), 0.0).to(kind), mask=ok)
            tl.store(out + B + i, tl.where(still, b * tl.load(k_w + B + i).to(tl.float32), 0.0).to(kind), mask=ok)
            if R > 0:
                tail = _tail(x, ok, q_w, rstd, cos, sin, A, P, R, NORM)
                tl.store(out + A + tl.arange(0, R)[None, :], tail.to(kind), mask=ok)
        else:
            if P > 0:
                c = tl.load(cos + i, mask=ok & (i < P), other=1.0).to(tl.float32)
                s = tl.load(sin + i, mask=ok & (i < P), other=0.0).to(tl.float32)
                a, b = a * c - b * s, b * c + a * s
            tl.store(out + i, a.to(kind), mask=ok)
            tl.store(out + B + i, b.to(kind), mask=ok)
    else:
        slot = tl.load(slots + t, mask=ok, other=0).to(tl.int64)
        kept = ok & (slot >= 0)
        g = head - H
        if g < G:
            rows = slot * G + g
            if ONE:
                _store(k_data, k_scales, rows, kept, 0, a * rstd, B, W, K_FORMAT)
                _store(k_data, k_scales, rows, kept, B, b * rstd, B, W, K_FORMAT)
                if W > A:
                    _store(k_data, k_scales, rows, kept, A, _tail(x, ok, k_w, rstd, cos, sin, A, P, R, NORM), R, W, K_FORMAT)
            else:
                if NORM:
                    a = a * rstd * tl.load(k_w + i).to(tl.float32)
                    b = b * rstd * tl.load(k_w + B + i).to(tl.float32)
                if P > 0:
                    c = tl.load(cos + i, mask=ok & (i < P), other=1.0).to(tl.float32)
                    s = tl.load(sin + i, mask=ok & (i < P), other=0.0).to(tl.float32)
                    a, b = a * c - b * s, b * c + a * s
                _store(k_data, k_scales, rows, kept, 0, a, B, A, K_FORMAT)
                _store(k_data, k_scales, rows, kept, B, b, B, A, K_FORMAT)
        else:
            rows = slot * G + g - G
            scale = rstd if V_NORM else 1.0
            _store(v_data, v_scales, rows, kept, 0, a * scale, B, A, V_FORMAT)
            _store(v_data, v_scales, rows, kept, B, b * scale, B, A, V_FORMAT)


def heads(
    qkv_TN: Tensor, q_out_THE: Tensor, k: Stored | None, v: Stored | None, slots_T: Tensor | None, *, head_dim: int, pairs: int,
    cos_TP: Tensor | None, sin_TP: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, v_norm: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Queries to `q_out_THE`, keys and values to their slots.

    Args:
        k, v: the layer's cache; v None: one tensor for both; both None: the layer owns none.
        slots_T: int32 on the device, where the keys and values of each token go, -1: nowhere; None where the layer owns no cache.
        q_norm, k_norm: weights of the norms, None where the family has none.
    Raises:
        ValueError: a head size that is no power of two from 64 to 512, or a width that does not fit its heads.
    """
    T, H, E = q_out_THE.shape
    A, G = head_dim, 0 if k is None else k.data_SGW.shape[1]
    one = k is not None and v is None
    R = E - A
    n_heads = H + G * (1 if one else 2)
    W = E if k is None else k.n_values  # with one tensor A: V alone
    if A not in HEAD_DIMS or qkv_TN.shape != (T, n_heads * A) or qkv_TN.stride(1) != 1:
        raise ValueError(
            f"heads: {A} values a head (one of {HEAD_DIMS}), qkv {tuple(qkv_TN.shape)} for {n_heads} heads of {T} tokens"
        )
    if R < 0 or (R > 0 and (R & (R - 1) or max(32, 2 * pairs) > R)):
        raise ValueError(f"heads: {E} values a query for heads of {A} (plus a power of two, 32 and {2 * pairs} at least)")
    if one and W not in (A, E):
        raise ValueError(f"heads: {W} values stored of heads of {A}: these alone, or the {R} rotated ones too")
    if 2 * pairs > A or (pairs and (cos_TP is None or sin_TP is None)):
        raise ValueError(f"heads: {pairs} rotated pairs (at most {A // 2}, with their tables)")
    if k is not None and (slots_T is None or slots_T.dtype != torch.int32 or slots_T.shape[0] != T):
        raise ValueError(f"heads: slots {None if slots_T is None else (slots_T.dtype, tuple(slots_T.shape))}, not int32 ({T},)")
    none = qkv_TN
    kd, ks = (bits(k.data_SGW), k.scales_SGB) if k else (none, None)
    vd, vs = (bits(v.data_SGW), v.scales_SGB) if v else (none, None)
    tokens, warps = (1, 1 if A <= 128 else 2) if T <= FEW else MANY
    _kernel[(n_heads, triton.cdiv(T, tokens))](
        qkv_TN, q_out_THE, kd, none if ks is None else ks, vd, none if vs is None else vs,
        none if q_norm is None else q_norm, none if k_norm is None else k_norm,
        none if cos_TP is None else cos_TP, none if sin_TP is None else sin_TP,
        none if slots_T is None else slots_T, eps, qkv_TN.stride(0), T,
        H=H, G=G, A=A, P=pairs, R=R, W=W, NORM=q_norm is not None, V_NORM=v_norm, ONE=one or (R > 0),
        K_FORMAT=k.format if k else FLOAT, V_FORMAT=v.format if v else FLOAT, BT=tokens, num_warps=warps, **overlap(qkv_TN),
    )  # fmt: skip
    return q_out_THE


@triton.jit
def _tables(positions, freq, cos_ptr, sin_ptr, P, magnitude, BLOCK: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    t = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    pos = tl.load(positions + t)
    angle = pos.to(tl.float32) * tl.load(freq + i, mask=i < P, other=0.0)
    kind: tl.constexpr = cos_ptr.dtype.element_ty
    tl.store(cos_ptr + t * P + i, (tl.cos(angle) * magnitude).to(kind), mask=i < P)
    tl.store(sin_ptr + t * P + i, (tl.sin(angle) * magnitude).to(kind), mask=i < P)


def rope_tables(positions_T: Tensor, freq_P: Tensor, cos_TP: Tensor, sin_TP: Tensor, magnitude: float) -> None:
    """cos and sin of position times frequency, times `magnitude`; positions int32 on the device."""
    T, P = cos_TP.shape
    _tables[(T,)](
        positions_T, freq_P, cos_TP, sin_TP, P, magnitude, BLOCK=triton.next_power_of_2(P), num_warps=1, **overlap(cos_TP)
    )
