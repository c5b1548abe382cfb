"""What stands between the products of a decoder: norms, residuals, gates, and the heads on their way to attention.

Two ways to say the same: `PLAIN`, PyTorch's operators in place or with `out=`; `fused()`, our kernels, one launch each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.model.arena import Arena
from headwise.model.heads import fused_heads, plain_heads
from headwise.model.linear import Activations
from headwise.model.norm import rms_norm
from headwise.spec.layers import Activation

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # gpt-oss; transformers 5.23 GptOssConfig


class Ops(NamedTuple):
    """The operations, with the signatures of their plain forms below."""

    norm: Callable[..., Tensor]
    branch: Callable[..., Tensor]
    heads: Callable[..., Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor, float], None]
    gate: Callable[[Activation, Tensor, Tensor, Tensor | None], Activations]
    softcap: Callable[[Tensor, float], Tensor]


def plain_branch(
    y: Tensor, post_norm: Tensor | None, x: Tensor, next_norm: Tensor | None, h: Tensor, arena: Arena, scale: Tensor | None = None
) -> Tensor:
    """x := (x + norm(y)) * scale; then norm(x) in h, or x itself where no norm follows. `y` is overwritten."""
    if post_norm is not None:
        rms_norm(y, post_norm, y, arena)
    x.add_(y)
    if scale is not None:
        x.mul_(scale)
    return x if next_norm is None else rms_norm(x, next_norm, h, arena)


def plain_gate(kind: Activation, gate: Tensor, up: Tensor, room: Tensor | None = None) -> Activations:
    """gate := act(gate) * up, in place; the clamped form is gpt-oss's gate * sigmoid(alpha * gate) * (up + 1).

    Args:
        room: where the result may become what is multiplied next: integers, or rows arranged.
    """
    if kind == "swiglu_clamped":
        gate.clamp_(max=SWIGLU_LIMIT)
        up.clamp_(-SWIGLU_LIMIT, SWIGLU_LIMIT).add_(1.0)
        up.mul_(gate)
        return gate.mul_(SWIGLU_ALPHA).sigmoid_().mul_(up)
    if kind == "gelu_tanh":
        torch.ops.aten.gelu_(gate, approximate="tanh")
    else:
        torch.ops.aten.silu_(gate)
    return gate.mul_(up)


def plain_rope(positions_T: Tensor, freq_P: Tensor, cos_TP: Tensor, sin_TP: Tensor, magnitude: float) -> None:
    """cos and sin of position times frequency, times `magnitude`."""
    angles = positions_T[:, None] * freq_P
    torch.sin(angles, out=sin_TP)
    torch.cos(angles, out=cos_TP)
    if magnitude != 1.0:
        cos_TP.mul_(magnitude)
        sin_TP.mul_(magnitude)


def plain_softcap(x: Tensor, cap: float) -> Tensor:
    """x := cap * tanh(x / cap)."""
    return x.div_(cap).tanh_().mul_(cap)


PLAIN = Ops(rms_norm, plain_branch, plain_heads, plain_rope, plain_gate, plain_softcap)


def fused() -> Ops:
    """Our kernels; imported here, since triton is not everywhere."""
    from headwise.kernels import rows
    from headwise.kernels.heads import rope_tables

    def norm(x: Tensor, w_D: Tensor | None, out: Tensor, arena: Arena) -> Tensor:
        return rows.norm(x, w_D, out, arena.eps_value)

    def branch(
        y: Tensor,
        post_norm: Tensor | None,
        x: Tensor,
        next_norm: Tensor | None,
        h: Tensor,
        arena: Arena,
        scale: Tensor | None = None,
    ) -> Tensor:
        return rows.branch(y, post_norm, x, next_norm, h, arena.eps_value, scale)

    def gate(kind: Activation, gate: Tensor, up: Tensor, room: Tensor | None = None) -> Activations:
        if kind == "swiglu_clamped" or gate.stride() != up.stride():
            return plain_gate(kind, gate, up)
        return rows.gate(gate, up, kind, room)

    return Ops(norm, branch, fused_heads, rope_tables, gate, rows.softcap)
