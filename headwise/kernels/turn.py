"""What makes keys of values, as data: a layer that stores V alone for K and V (`spec.kv`) has them made as they are read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Turn(NamedTuple):
    """K = RoPE(w * V), pairs (i, i + D / 2).

    Args:
        w_D: of K's norm.
        freq_P: of the pairs that rotate, fp32, radians per token; `magnitude` multiplies cos and sin.
    """

    w_D: Tensor
    freq_P: Tensor
    magnitude: float = 1.0
