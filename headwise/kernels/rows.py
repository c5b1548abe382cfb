"""Norms, residuals, gates and the cap of logits: one launch each, of the first two a program per row.

Shapes    T rows of D values, D to 32,768; rows contiguous.
Accuracy  fp32 inside, rounded where a result is stored; a residual is rounded once, as PyTorch's `add_` would.
Cost      the bytes of what is read and written.
Source    transformers 5.23: RMSNorm of each family (Gemma's weights are stored with their 1 added), gelu_pytorch_tanh, silu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.arrange import STEP, Arranged, arranged_at, arranged_in
from headwise.kernels.gates import activated
from headwise.kernels.matvec import Integers, integers_in, to_integers
from headwise.kernels.stored import in_turn, overlap, start_next, wait_turn
from headwise.planner.workspace import padded

WIDEST = 32_768
GATES = ("gelu_tanh", "silu")
FEW = 64  # rows


@triton.jit
def _norm(x_ptr, w_ptr, out_ptr, D, eps, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    i = tl.arange(0, BLOCK)
    ok = i < D
    if WEIGHT:
        weight = tl.load(w_ptr + i, mask=ok, other=0).to(tl.float32)
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64) * D
    x = tl.load(x_ptr + row + i, mask=ok, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / D + eps)
    if WEIGHT:
        y = y * weight
    tl.store(out_ptr + row + i, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _branch(
    y_ptr, post_ptr, x_ptr, scale_ptr, next_ptr, h_ptr, D, eps, POST: tl.constexpr, SCALE: tl.constexpr, NEXT: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    i = tl.arange(0, BLOCK)
    ok = i < D
    if POST:
        post = tl.load(post_ptr + i, mask=ok, other=0).to(tl.float32)
    if SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    if NEXT:
        weight = tl.load(next_ptr + i, mask=ok, other=0).to(tl.float32)
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64) * D
    y = tl.load(y_ptr + row + i, mask=ok, other=0).to(tl.float32)
    x = tl.load(x_ptr + row + i, mask=ok, other=0).to(tl.float32)
    if POST:
        y = y * tl.rsqrt(tl.sum(y * y) / D + eps) * post
    x = x + y
    if SCALE:
        x = x * scale
    kind: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(x_ptr + row + i, x.to(kind), mask=ok)
    if NEXT:
        x = x.to(kind).to(tl.float32)
        h = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
        tl.store(h_ptr + row + i, h.to(kind), mask=ok)


@triton.jit(do_not_specialize=["T"])
def _gate(
    g_ptr, u_ptr, out_ptr, stride, T, W, GELU: tl.constexpr, PLANES: tl.constexpr, TP: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    at = tl.program_id(0).to(tl.int64) * stride
    group = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[:, None]
    i = group * 32 + tl.arange(0, 32)[None, :]
    ok = (i < W) & (tl.program_id(0) < T)
    g = tl.load(g_ptr + at + i, mask=ok, other=0).to(tl.float32)
    u = tl.load(u_ptr + at + i, mask=ok, other=0).to(tl.float32)
    y = activated(g, GELU) * u
    if PLANES > 0:
        to_integers(y, out_ptr + (tl.program_id(0) * (W // 32) + group) * (8 * PLANES + 4), group < W // 32, PLANES)
    elif TP > 0:
        to = out_ptr + arranged_at(group, tl.arange(0, 32)[None, :], tl.program_id(0), TP)
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=group < tl.cdiv(W, 32 * STEP) * STEP)
    else:
        tl.store(out_ptr + at + i, y.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def capped(x, cap):
    return cap * (1.0 - 2.0 / (tl.exp(x * (2.0 / cap)) + 1.0))  # tanh(z) = 1 - 2 / (e^2z + 1)


@triton.jit(do_not_specialize=["n"])
def _softcap(x_ptr, n, cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0).to(tl.float32)
    y = capped(x, cap)
    tl.store(x_ptr + i, y.to(x_ptr.dtype.element_ty), mask=i < n)


def norm(x_TD: Tensor, w_D: Tensor | None, out_TD: Tensor, eps: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps) * w."""
    D = _checked("norm", x_TD, out_TD)
    rows = x_TD.numel() // D
    options = _shape(D, rows) | overlap(x_TD)
    _norm[(rows,)](x_TD, x_TD if w_D is None else w_D, out_TD, D, eps, WEIGHT=w_D is not None, **options)
    return out_TD


def branch(
    y_TD: Tensor, post_D: Tensor | None, x_TD: Tensor, next_D: Tensor | None, h_TD: Tensor, eps: float, scale: Tensor | None = None
) -> Tensor:
    """x := (x + norm(y) * post) * scale, and h := norm(x) * next, which is returned; x where `next_D` is None."""
    D = _checked("branch", y_TD, x_TD)
    if next_D is not None:
        _checked("branch", x_TD, h_TD)
    _branch[(y_TD.shape[0],)](
        y_TD, y_TD if post_D is None else post_D, x_TD, y_TD if scale is None else scale, y_TD if next_D is None else next_D,
        h_TD, D, eps, POST=post_D is not None, SCALE=scale is not None, NEXT=next_D is not None, **_shape(D, y_TD.shape[0]),
        **overlap(x_TD),
    )  # fmt: skip
    return x_TD if next_D is None else h_TD


def gate(gate_TW: Tensor, up_TW: Tensor, kind: str, room: Tensor | None = None) -> Tensor | Integers | Arranged:
    """gate := act(gate) * up, in place; act is "gelu_tanh" or "silu". Both are halves of one buffer, or two alike.

    Args:
        room: the result is written there instead, for the product that follows: int32, as integers (`matvec.quantise`), or of the
            type of `gate_TW`, arranged (`kernels.arrange`).
    """
    T, W = gate_TW.shape
    if kind not in GATES or up_TW.shape != (T, W) or gate_TW.stride() != up_TW.stride() or gate_TW.stride(1) != 1:
        raise ValueError(
            f"gate: {kind}, {tuple(gate_TW.shape)} and {tuple(up_TW.shape)}, strides {gate_TW.stride()}, {up_TW.stride()}"
        )
    out, to, planes, TP = gate_TW, gate_TW, 0, 0
    if room is not None and room.dtype == torch.int32:
        out = integers_in(room, T, W)
        to, planes = out.words, out.planes
    elif room is not None:
        if room.dtype != gate_TW.dtype:
            raise ValueError(f"gate: {gate_TW.dtype} into {room.dtype}, not alike")
        out = arranged_in(room, T, W)
        to, TP = out.values, padded(T)
    _gate[(max(T, TP), triton.cdiv(W, 1024))](
        gate_TW, up_TW, to, gate_TW.stride(0), T, W, GELU=kind == "gelu_tanh", PLANES=planes, TP=TP, STEP=STEP, BLOCK=1024,
        num_warps=4, **overlap(gate_TW),
    )  # fmt: skip
    return out


def softcap(x_TV: Tensor, cap: float) -> Tensor:
    """x := cap * tanh(x / cap), rounded once."""
    if not x_TV.is_contiguous() or cap <= 0:
        raise ValueError(f"softcap: strides {x_TV.stride()} (contiguous), a cap of {cap} (above 0)")
    _softcap[(triton.cdiv(x_TV.numel(), 2048),)](x_TV, x_TV.numel(), float(cap), BLOCK=2048, num_warps=4, **overlap(x_TV))
    return x_TV


def _checked(name: str, a: Tensor, b: Tensor) -> int:
    D = a.shape[-1]
    if D > WIDEST or a.shape != b.shape or not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(f"{name}: {tuple(a.shape)} and {tuple(b.shape)} (alike, contiguous, rows of at most {WIDEST})")
    return D


def _shape(D: int, rows: int) -> dict[str, int]:
    """Of a few rows each is spread over more threads; many fill the card, and wide ones lose by it a quarter on an H200."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": max(1, min(16 if rows <= FEW else 8, block // 512))}


def reference(x_TD: Tensor, w_D: Tensor | None, eps: float) -> Tensor:
    x = x_TD.double()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if w_D is None else y * w_D.double()
