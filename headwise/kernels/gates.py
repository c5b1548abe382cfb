"""Activations, and what becomes of an expert's two halves, act(gate) * up, in fp32, inside the launches of other kernels.

Source    transformers 5.23: silu and gelu with tanh of most families; GptOssExperts (clamped, and 1 added to the other half).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

SILU, GELU, CLAMPED = (tl.constexpr(i) for i in range(3))
ACTIVATIONS: dict[str, Any] = {"silu": SILU, "gelu_tanh": GELU, "swiglu_clamped": CLAMPED}
ALPHA, LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)  # gpt-oss; transformers 5.23 GptOssConfig


class Gate(NamedTuple):
    """What becomes of the two halves: act(gate + its bias) * (up + its bias); biases (E, W) in fp32."""

    activation: str
    gate_bias_EW: Tensor | None = None
    up_bias_EW: Tensor | None = None


@triton.jit
def activated(x, GELU: tl.constexpr):
    """fp32: gelu, with tanh, or silu."""
    if GELU:  # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def gated(g, u, ACT: tl.constexpr):
    """act(g) * u in fp32; gpt-oss's cuts both and adds 1 to the other half."""
    if ACT == CLAMPED:
        g = tl.minimum(g, LIMIT)
        return g / (1.0 + tl.exp(-ALPHA * g)) * (tl.minimum(tl.maximum(u, -LIMIT), LIMIT) + 1.0)
    else:
        return activated(g, ACT == GELU) * u
