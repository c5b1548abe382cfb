"""Which backend runs a layer, and why not the others: a pure function over the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from headwise.attention.capability import BACKENDS, Capability, DeviceKind, Need, need_for
from headwise.errors import BackendError, UsageError
from headwise.spec.kv import KVFormat
from headwise.spec.layers import Kind, LayerSpec, ModelSpec

DTYPES = ("f32", "f16", "bf16")  # of activations


@dataclass(frozen=True, slots=True)
class Refusal:
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen row, and of every row that cannot serve, why; printing it explains it."""

    backend: Capability
    refusals: tuple[Refusal, ...]

    @property
    def fused(self) -> bool:
        return self.backend.verdict == "fused"

    def __str__(self) -> str:
        return "\n".join([self.backend.name, *(f"  not {r.backend}: {r.reason}" for r in self.refusals)])


def activation_type(asked: str | None, devices: Collection[DeviceKind]) -> str:
    """The activations' type: as asked, else f32 on a CPU, f16 where a card multiplies no bf16, bf16 elsewhere.

    Raises:
        UsageError: no such type.
    """
    if asked is not None:
        if asked not in DTYPES:
            raise UsageError(f"unknown dtype {asked!r}", why="activations are floats", do=f"one of: {', '.join(DTYPES)}")
        return asked
    if any(d.api == "cpu" for d in devices):
        return "f32"
    return "f16" if any(d.api == "cuda" and (d.capability or (0, 0)) < (8, 0) for d in devices) else "bf16"


def choose(need: Need, backends: Sequence[Capability] = BACKENDS) -> Choice:
    """The first backend that refuses nothing. The last row, the reference, takes everything: it is never fused."""
    reasons = {backend.name: backend.refusal(need) for backend in backends}
    chosen = next((backend for backend in backends if reasons[backend.name] is None), None)
    if chosen is None:
        raise ValueError(f"no backend takes {need}, not even the reference")
    return Choice(chosen, tuple(Refusal(name, reason) for name, reason in reasons.items() if reason is not None))


def choose_layers(spec: ModelSpec, *, kv: Mapping[Kind, KVFormat], dtype: str, device: DeviceKind) -> tuple[Choice, ...]:
    """One choice per layer of `spec` on `device`."""
    return tuple(choose(need_for(layer, kv=kv[layer.kind], dtype=dtype, device=device)) for layer in spec.layers)


def require_fused(spec: ModelSpec, choices: Sequence[Choice], *, allow_fallback: bool, device: DeviceKind) -> None:
    """Strict mode: raises BackendError when a layer would not run fused and nobody allowed it."""
    slow = [layer for layer, choice in zip(spec.layers, choices, strict=True) if not choice.fused]
    if not slow or allow_fallback:
        return
    choice = choices[slow[0].index]
    raise BackendError(
        f"{len(slow)} of {len(spec.layers)} layers of {spec.name} would not run fused on {device.label}",
        why=f"layer {slow[0].index} ({describe(slow[0])}): " + "; ".join(f"{r.backend}: {r.reason}" for r in choice.refusals),
        do="--allow-fallback accepts the slow reference for these layers",
    )


def describe(layer: LayerSpec) -> str:
    window = f"window {layer.window}" if layer.window else "no window"
    return f"{layer.kind}, head_dim {layer.head_dim}, {window}"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that differ in nothing a backend sees, and what was chosen for them."""

    layers: tuple[int, ...]
    example: LayerSpec
    kv: str
    choice: Choice


def group_layers(spec: ModelSpec, choices: Sequence[Choice], kv: Mapping[Kind, KVFormat]) -> tuple[LayerGroup, ...]:
    """The layers by what attention sees of them, in order of first appearance."""
    found: dict[tuple[object, ...], list[int]] = {}
    for layer, choice in zip(spec.layers, choices, strict=True):
        key = (layer.head_dim, layer.window, layer.n_heads, layer.n_kv_heads, layer.k_eq_v, choice)
        found.setdefault(key, []).append(layer.index)
    return tuple(
        LayerGroup(tuple(indexes), spec.layers[indexes[0]], kv[spec.layers[indexes[0]].kind].name, choices[indexes[0]])
        for indexes in found.values()
    )
