"""Rotary position embedding as data: one inverse frequency per pair of dims, computed once, at the door.

Every scaling scheme ends as the same thing, a tuple of `head_dim // 2` inverse frequencies (radians per token) and one
magnitude for cos and sin. Pair i is dims (i, i + head_dim / 2): the "rotate half" layout of Hugging Face and of GGUF's
neox type. A frequency of exactly 0.0 means the pair does not rotate; only a tail of zeros is legal, so the rotated
dims are always [0, n) and [head_dim / 2, head_dim / 2 + n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How one layer turns positions into rotations; no RopeSpec at all (None) is NoPE."""

    kind: str  # default, proportional, linear, llama3, yarn, factors
    theta: float
    inv_freq: tuple[float, ...]  # head_dim // 2 values, radians per token
    magnitude: float = 1.0  # multiplies cos and sin (YaRN's attention factor)

    @property
    def rotated_dims(self) -> int:
        """Dims of the head that change with position (Gemma 4 global layers: 128 of 512)."""
        return 2 * sum(1 for f in self.inv_freq if f != 0.0)


def _base(head_dim: int, theta: float) -> list[float]:
    return [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]


def default_rope(head_dim: int, theta: float) -> RopeSpec:
    return RopeSpec(kind="default", theta=theta, inv_freq=tuple(_base(head_dim, theta)))


def proportional_rope(head_dim: int, theta: float, *, partial: float) -> RopeSpec:
    """Gemma 4's global layers: the exponent keeps the full head_dim, and only the first `partial` of pairs rotate.

    Source: transformers 5.23 modeling_rope_utils `_compute_proportional_rope_parameters`.
    """
    rotated = int(partial * head_dim // 2)
    base = _base(head_dim, theta)
    return RopeSpec(kind="proportional", theta=theta, inv_freq=tuple(base[:rotated] + [0.0] * (len(base) - rotated)))


def linear_rope(head_dim: int, theta: float, *, factor: float) -> RopeSpec:
    return RopeSpec(kind="linear", theta=theta, inv_freq=tuple(f / factor for f in _base(head_dim, theta)))


def llama3_rope(
    head_dim: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> RopeSpec:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended.

    Source: transformers 5.23 modeling_rope_utils `_compute_llama3_parameters`.
    """
    longest, shortest = original_context / low_freq_factor, original_context / high_freq_factor
    scaled = []
    for f in _base(head_dim, theta):
        wavelength = 2 * math.pi / f
        if wavelength >= longest:
            scaled.append(f / factor)
        elif wavelength < shortest:
            scaled.append(f)
        else:
            smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            scaled.append((1 - smooth) * f / factor + smooth * f)
    return RopeSpec(kind="llama3", theta=theta, inv_freq=tuple(scaled))


def yarn_rope(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    original_context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
) -> RopeSpec:
    """YaRN: a ramp between kept and interpolated frequencies, and a magnitude on cos and sin.

    Source: arXiv 2309.00071; transformers 5.23 modeling_rope_utils `_compute_yarn_parameters`.
    """

    def correction(rotations: float) -> float:
        return head_dim * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(beta_fast), correction(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    scaled = []
    for i, f in enumerate(_base(head_dim, theta)):
        kept = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
        scaled.append(f / factor * (1 - kept) + f * kept)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return RopeSpec(kind="yarn", theta=theta, inv_freq=tuple(scaled), magnitude=attention_factor)


def factors_rope(head_dim: int, theta: float, factors: Sequence[float]) -> RopeSpec:
    """GGUF's `rope_freqs` tensor: each frequency divided by its factor; 1e30 stands for "does not rotate".

    Args:
        factors: head_dim // 2 divisors, > 0 (Gemma 4: 64 ones and 192 times 1e30).
    """
    inv_freq = tuple(0.0 if d > 1e29 else f / d for f, d in zip(_base(head_dim, theta), factors, strict=True))
    return RopeSpec(kind="factors", theta=theta, inv_freq=inv_freq)
