"""RMS norm over the last axis: out = x / sqrt(mean(x^2) + eps) * w.

Shapes    x (..., D), w (D) or None -> out (..., D); out may be x.
Accuracy  the statistic in fp32, whatever the activations are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.model.arena import Arena


def rms_norm(x: Tensor, w_D: Tensor | None, out: Tensor, arena: Arena) -> Tensor:
    """Few operators on purpose: at batch 1 each costs more than its arithmetic. `arena` holds the model's eps."""
    norm = arena.take("norm", *x.shape[:-1], 1)
    torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32, out=norm)
    torch.addcmul(arena.eps, norm, norm, value=1.0 / x.shape[-1], out=norm).rsqrt_()
    torch.mul(x, norm, out=out)
    return out if w_D is None else out.mul_(w_D)
