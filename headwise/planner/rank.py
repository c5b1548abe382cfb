"""What fits these cards: every catalogue model, with the best weights and KV type that leave a useful context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.planner.memory import Target, Workload, max_context
from headwise.planner.quantise import weight_types
from headwise.planner.residence import resident_types, weight_bytes
from headwise.spec.kv import KV_FORMATS
from headwise.spec.layers import ModelSpec

WEIGHTS = ("bf16", "q8_0", "q4_k_m")  # best first
KV = ("bf16", "q8_0")
USEFUL_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Fit:
    model: str
    weights: str
    kv: str
    weights_bytes: int
    max_context: int


def rank(specs: Mapping[str, ModelSpec], targets: Sequence[Target]) -> list[Fit]:
    """Largest model first; for each the first (weights, KV) pair, best first, that leaves a useful context.

    A pair that fits with less is kept when no pair does better.
    """
    fits = [fit for name, spec in specs.items() if (fit := _best(name, spec, targets))]
    return sorted(fits, key=lambda f: -sum(weight_bytes(specs[f.model], weight_types(specs[f.model], "bf16")).values()))


def _best(name: str, spec: ModelSpec, targets: Sequence[Target]) -> Fit | None:
    best: Fit | None = None
    room = sum(t.usable_bytes for t in targets)
    useful = min(USEFUL_TOKENS, spec.max_context)
    for scheme in WEIGHTS:
        resident = resident_types(spec, weight_types(spec, scheme), cpu=False, dtype="bf16")
        sizes = weight_bytes(spec, resident)
        total = sum(sizes.values())
        if total > room:
            continue
        for kv in KV:
            fmt = KV_FORMATS[kv]
            w = Workload(context=useful, kv={"global": fmt, "sliding": fmt}, dtype="bf16")
            most = max_context(spec, sizes, w, resident, targets)
            if most and (best is None or most > best.max_context):
                best = Fit(name, scheme, kv, total, most)
            if most >= useful:
                return Fit(name, scheme, kv, total, most)
    return best
