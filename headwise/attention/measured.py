"""What an arrangement of backends over the two kinds of layers cost a whole model: why the default is one family everywhere.

Figures of `benchmarks/mixed_backends.py`, whose newest result a test holds them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwise.attention.choose import Choice
from headwise.spec.kv import turned_pairs
from headwise.spec.layers import ModelSpec

WHERE = "tiny-hybrid in bf16 on one H200, 2026-11-21"
POSITIONS = 5_200  # at which greedy tokens were compared


@dataclass(frozen=True, slots=True)
class Arrangement:
    sliding: str
    full: str  # backend of the global layers
    prefill_tok_s: int
    decode_tok_s: int
    flipped: int  # greedy tokens unlike the first row's, of POSITIONS


ARRANGEMENTS = (
    Arrangement("headwise-hopper", "headwise-hopper", 79_444, 2_861, 0),
    Arrangement("headwise-triton", "headwise-triton", 86_151, 2_525, 34),
    Arrangement("headwise-hopper", "headwise-triton", 80_077, 2_803, 46),
    Arrangement("headwise-triton", "headwise-hopper", 84_077, 2_581, 40),
    Arrangement("torch-efficient", "headwise-hopper", 50_543, 136, 39),
    Arrangement("torch-efficient", "torch-efficient", 50_843, 139, 43),
)


def mix_figures(spec: ModelSpec, choices: Sequence[Choice]) -> str | None:
    """What the arrangement of `choices` measured, beside the other ones of the same two backends.

    None where nothing was measured (V alone, prefill by another row), and for a model of one kind of layer: it has nothing to mix.
    """
    if any(choice.prefill for choice in choices):
        return None
    names = {layer.kind: choice.backend.name for layer, choice in zip(spec.layers, choices, strict=True)}
    if len(names) < 2 or any(map(turned_pairs, spec.layers)):
        return None
    here = next((a for a in ARRANGEMENTS if (a.sliding, a.full) == (names["sliding"], names["global"])), None)
    if here is None:
        return None
    best = ARRANGEMENTS[0]
    if here is best:
        mixes = [a for a in ARRANGEMENTS if a.sliding != a.full]
        others = ", ".join(f"{a.decode_tok_s:,} with sliding={a.sliding},global={a.full}" for a in mixes)
        return f"decodes {best.decode_tok_s:,} tok/s; {others} ({WHERE})"
    return (
        f"decodes {here.decode_tok_s:,} tok/s where {best.sliding} everywhere has {best.decode_tok_s:,}, prefills "
        f"{here.prefill_tok_s:,} where that has {best.prefill_tok_s:,}; {here.flipped} of {POSITIONS:,} greedy tokens differ "
        f"({WHERE})"
    )
