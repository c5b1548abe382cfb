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
    """The chosen row, and of every row that cannot serve, why; printing it explains it.

    `prefill` is a second row, which takes the spans of many queries (`attention.prefill` says which) because it is ahead there.
    """

    backend: Capability
    refusals: tuple[Refusal, ...]
    prefill: Capability | None = None
    prefill_reason: str | None = None

    @property
    def fused(self) -> bool:
        return self.backend.verdict == "fused"

    @property
    def names(self) -> str:
        """Of the rows that run the layer."""
        return self.backend.name + (f", prefill by {self.prefill.name}" if self.prefill else "")

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said below the chosen row's name."""
        ahead = (f"prefill by {self.prefill.name}: {self.prefill_reason}",) if self.prefill else ()
        return (*ahead, *(f"not {r.backend}: {r.reason}" for r in self.refusals))

    def alone(self, reason: str) -> Choice:
        """Without a second row, which `reason` refuses."""
        if self.prefill is None:
            return self
        return Choice(self.backend, (*self.refusals, Refusal(self.prefill.name, reason)))

    def __str__(self) -> str:
        return "\n  ".join([self.backend.name, *self.lines])


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


def choose(need: Need, backends: Sequence[Capability] = BACKENDS, *, forced: str | None = None) -> Choice:
    """The first backend that refuses nothing, or the one named; some rows run only when named.

    The last row, the reference, takes everything: it is never fused. A row that is named runs the layer by itself.

    Raises:
        BackendError: the forced backend refuses `need`; the words are its row's.
    """
    reasons = {backend.name: backend.refusal(need) for backend in backends}
    taking = [backend for backend in backends if reasons[backend.name] is None]
    if forced is not None and reasons[forced] is not None:
        fused = [backend.name for backend in taking if backend.verdict == "fused" and not backend.by_name]
        do = f"--backend {fused[0]}" if fused else "no fused backend does: --backend reference --allow-fallback"
        raise BackendError(f"{forced} does not take this layer", why=f"{forced}: {reasons[forced]}", do=do)
    chosen = next((b for b in taking if (b.name == forced if forced else not b.by_name)), None)
    if chosen is None:
        raise ValueError(f"no backend takes {need}, not even the reference")
    prefill, why = next(((b, why) for b in taking if (why := b.prefills(chosen, need))), (None, None))
    for i, other in enumerate(taking):
        if other is prefill:
            reasons[other.name] = f"not chosen: {forced} is forced" if forced else None
        elif other.by_name and other is not chosen:
            reasons[other.name] = f"only when named: {other.by_name}"
        elif i < taking.index(chosen):
            reasons[other.name] = f"not chosen: {forced} is forced"
    refusals = tuple(Refusal(name, reason) for name, reason in reasons.items() if reason is not None)
    return Choice(chosen, refusals) if forced else Choice(chosen, refusals, prefill, why)


def forced_backends(asked: str | Mapping[str, str] | None) -> dict[Kind, str]:
    """The backend of each layer kind that `--backend` names: "X" for both, or "sliding=X,global=Y", or a mapping.

    Raises:
        UsageError: an unknown kind or backend, or a kind named twice.
    """
    if asked is None:
        return {}
    pairs = list(asked.items()) if isinstance(asked, Mapping) else _pairs(asked)
    out: dict[Kind, str] = {}
    for kind, name in pairs:
        if kind not in ("sliding", "global"):
            raise UsageError(
                f"--backend names {kind!r}", why="a layer is global or sliding", do="--backend X, or --backend sliding=X,global=Y"
            )
        if kind in out:
            raise UsageError(
                f"--backend names {kind} twice", why=f"{out[kind]} and {name}", do=f"one of them: --backend {kind}={name}"
            )
        if name not in {b.name for b in BACKENDS}:
            raise UsageError(
                f"unknown backend {name!r}", why="the table has no such row", do=f"one of: {', '.join(b.name for b in BACKENDS)}"
            )
        out[kind] = name
    return out


def _pairs(asked: str) -> list[tuple[str, str]]:
    if "=" not in asked:
        return [("sliding", asked), ("global", asked)]
    return [(kind, name) for kind, _, name in (part.partition("=") for part in asked.split(","))]


def choose_layers(
    spec: ModelSpec, *, kv: Mapping[Kind, KVFormat], dtype: str, device: DeviceKind, forced: Mapping[Kind, str] | None = None
) -> tuple[Choice, ...]:
    """One choice per layer of `spec` on `device`.

    Args:
        forced: the backend of a layer kind, see `forced_backends`.
    Raises:
        BackendError: a forced backend refuses a layer; UsageError: only kinds are forced that the model has no layer of.
    """
    forced = forced or {}
    if forced and not any(layer.kind in forced for layer in spec.layers):
        kinds = sorted({layer.kind for layer in spec.layers})
        raise UsageError(
            f"{spec.name} has no {' or '.join(forced)} layers",
            why=f"its {len(spec.layers)} layers are {' and '.join(kinds)}",
            do="leave --backend out",
        )
    out = []
    for layer in spec.layers:
        need = need_for(layer, kv=kv[layer.kind], dtype=dtype, device=device)
        try:
            out.append(choose(need, forced=forced.get(layer.kind)))
        except BackendError as error:
            raise BackendError(
                f"{forced[layer.kind]} cannot run layer {layer.index} of {spec.name} on {device.label}",
                why=f"{describe(layer)}: {error.why}",
                do=error.do.replace("--backend ", f"--backend {layer.kind}="),
            ) from error
    return tuple(out)


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
