"""The torch-free calls of the Python API and of the command line: read, plan, explain, rank."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headwise.attention.capability import CPU, DeviceKind
from headwise.attention.choose import Choice, activation_type, choose_layers, forced_backends
from headwise.attention.engines import EngineExplanation, explain_engine
from headwise.attention.measured import mix_figures
from headwise.errors import UsageError
from headwise.hardware.gpus import Gpu, find_gpu
from headwise.hardware.probe import cpu_memory, detect
from headwise.planner.ceiling import step_sizes
from headwise.planner.memory import CPU_MARGIN_BYTES, Plan, Room, Target, Workload, fewest
from headwise.planner.memory import plan as plan_memory
from headwise.planner.memory import rooms as rooms_of
from headwise.planner.quantise import MADE, made_at_load, weight_types
from headwise.planner.rivals import RivalPlan, rival_plan
from headwise.spec.kv import KVFormat, kv_format, laid_out
from headwise.spec.layers import Kind, LayerSpec, ModelSpec
from headwise.spec.read import Source, open_model
from headwise.weights.listing import list_checkpoint
from headwise.weights.names import stored_types

DEFAULT_PLAN_CONTEXT = 32_768
DEFAULT_WEIGHTS = "bf16"


def read_model(source: str | Path | None = None, *, ignore_keys: Sequence[str] = ()) -> ModelSpec:
    """The description of a model: a directory, a .gguf file, `ollama:NAME`, `hf:ORG/NAME` or a catalogue name.

    Raises:
        SpecError: it cannot be read, or says something that nothing here knows; the message says what to do.
    """
    return open_model(source, ignore_keys=ignore_keys, env=os.environ).spec


def kv_formats(kv: str | None, kv_global: str | None, kv_sliding: str | None, default: str) -> dict[Kind, KVFormat]:
    return {"global": kv_format(kv_global or kv or default), "sliding": kv_format(kv_sliding or kv or default)}


def kv_by_kind(kv: str | Mapping[str, str] | None) -> dict[Kind, str | None]:
    """The KV type that is asked for of each kind of layer, None where nothing is; of all layers where `kv` is one type.

    Raises:
        UsageError: it names another kind.
    """
    named: Mapping[str, str | None] = {"global": kv, "sliding": kv} if kv is None or isinstance(kv, str) else kv
    if unknown := set(named) - {"global", "sliding"}:
        raise UsageError(f"kv names {min(unknown)!r}", why="a layer is global or sliding", do='kv={"global": T, "sliding": T}')
    return {"global": named.get("global"), "sliding": named.get("sliding")}


def targets_for(gpus: Sequence[str], device: str | None) -> list[Target]:
    """The devices to plan for: those named, the CPU, or what this machine has; memory held by others is counted as theirs."""
    if device == "cpu":
        if gpus:
            raise UsageError(
                "--device cpu and --gpu name different devices", why="a plan is for one or the other", do="leave one out"
            )
        total, available = cpu_memory()
        return [
            Target(name="cpu", gpu=None, total_bytes=total, others_bytes=max(0, total - available), margin_bytes=CPU_MARGIN_BYTES)
        ]
    if gpus:
        found = [find_gpu(name) for g in gpus for name in g.split(",")]
        return [Target(name=g.label, gpu=g, total_bytes=g.memory_bytes) for g in found]
    return [
        Target(name=d.seen, gpu=d.gpu, total_bytes=d.total_bytes, others_bytes=d.used_bytes or 0) for d in detect() if d.total_bytes
    ]


def work_on(
    spec: ModelSpec,
    kinds: Collection[DeviceKind],
    *,
    context: int,
    slots: int | None,
    chunk: int | None,
    kv: Mapping[Kind, str | None],
    dtype: str | None,
    pool: int | None = None,
    rooms: Sequence[Room] = (),
    gpus: Sequence[Gpu | None] = (),
    forced: Mapping[Kind, str] | None = None,
) -> tuple[Workload, dict[DeviceKind, tuple[Choice, ...]]]:
    """What is asked of devices of these kinds together, and what each kind would run every layer on.

    Args:
        kv: default the activations' type; dtype: default what all of the devices multiply.
        slots: None: as many as `serve` takes; chunk: None: what suits `gpus`, see `planner.ceiling.step_sizes`.
        rooms: in place of slots, pool and chunk, see `Workload`.
    Raises:
        UsageError, BackendError: see `choose_layers`.
    """
    dtype = activation_type(dtype, kinds)
    formats = kv_formats(None, kv["global"], kv["sliding"], dtype)
    choices = {kind: choose_layers(spec, kv=formats, dtype=dtype, device=kind, forced=forced) for kind in kinds}
    rooms = rooms or rooms_of(context, slots, pool, step_sizes(spec, gpus) if chunk is None else (chunk,))
    work = Workload(
        context=context, rooms=tuple(rooms), by_default=slots is None, kv=formats, dtype=dtype, cpu=CPU in kinds
    )
    if choices:
        work = replace(work, reads=frozenset(c.backend.reads for of_kind in choices.values() for c in of_kind))
    return work, choices


def stored_weights(source: Source, scheme: str | None) -> dict[str, str]:
    """Our tensor name -> stored type: the file's own, made fp8 at load where that is the scheme, or what `scheme` would give."""
    if (scheme is None or scheme.lower() == MADE) and source.path is not None:
        listing = source.path if source.gguf is None else source.gguf.paths[0]
        if source.gguf is not None or any(Path(listing).glob("*.safetensors*")):
            return dict(made_at_load(source.spec, stored_types(source.spec, list_checkpoint(Path(listing))), scheme))
    return weight_types(source.spec, scheme or DEFAULT_WEIGHTS)


def plan(
    source: str | Path | Source | None,
    *,
    context: int | None = None,
    kv: str | None = None,
    kv_global: str | None = None,
    kv_sliding: str | None = None,
    kv_layout: str | None = None,
    slots: int | None = 1,
    pool: int | None = None,
    ubatch: int | None = None,
    weights: str | None = None,
    gpus: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
    ignore_keys: Sequence[str] = (),
    targets: Sequence[Target] | None = None,
) -> Plan:
    """What headwise would allocate for a model, to the byte, before anything is loaded.

    Args:
        source: as `read_model` takes.
        context: tokens of one sequence; default 32,768 or the model's maximum.
        slots: sequences at once; None: what `serve` takes by default, see `planner.memory.rooms`.
        pool: tokens that the global layers hold of all sequences, default a context of each.
        ubatch: most tokens of one prefill step; default by the cards' speed and room, see `planner.ceiling.step_sizes`.
        kv, kv_global, kv_sliding: f32, f16, bf16, fp8, q8_0 or q4_0; default the activations' type.
        kv_layout: of layers with one tensor for K and V: "v+rotated" (default) or "v", see `spec.kv`.
        weights: count a weight type other than the file's (catalogue models: default bf16), e.g. "q4_k_m".
        gpus: names from the GPU table, "rtx3090" or "rtx3090:24", to be used together; default as few of the detected cards
            as hold it.
        device: "cpu" plans for this machine's CPU.
        dtype: of the activations: f32, bf16 or f16; default f32 on the CPU, else bf16, or f16 where a card has no bf16.
        targets: the devices, with what others hold of them, in place of what is looked up for `gpus` and `device`.
    Raises:
        SpecError, UsageError, PlanError: with what, why and what to do. Not fitting is no error: see `Plan.fits`.
    """
    model = source if isinstance(source, Source) else open_model(source, ignore_keys=ignore_keys, env=os.environ)
    spec = laid_out(model.spec, kv_layout)
    stored = stored_weights(model, weights)
    targets = targets_for(gpus, device) if targets is None else list(targets)
    kinds = [CPU if device == "cpu" else None if t.gpu is None else DeviceKind.of(t.gpu) for t in targets]
    context = min(DEFAULT_PLAN_CONTEXT, spec.max_context) if context is None else context

    def plan_on(some: Sequence[int]) -> Plan:
        work, _ = work_on(
            spec,
            {kind for i in some if (kind := kinds[i])},
            context=context,
            slots=slots,
            pool=pool,
            chunk=ubatch,
            gpus=[targets[i].gpu for i in some],
            kv={"global": kv_global or kv, "sliding": kv_sliding or kv},
            dtype=dtype,
        )
        return plan_memory(spec, stored, work, [targets[i] for i in some])

    used = range(len(targets))
    p, used = (plan_on(used), used) if gpus or len(targets) < 2 else fewest(targets, plan_on)
    notes = [f"{t.name} is not needed" for i, t in enumerate(targets) if i not in used]
    if p.fits is False:
        notes += _what_fits(p, [targets[i] for i in used])
    return replace(p, notes=(*p.notes, *notes))


def _what_fits(p: Plan, targets: Sequence[Target]) -> Iterator[str]:
    """What would fit in place of a plan that does not, tried before it is said."""
    w = p.workload
    yield "parts of a model on the CPU are not planned for"
    if p.max_context:
        yield f"--context {p.max_context} fits"
    q8 = kv_format("q8_0")
    for scheme in (None, "q8_0", "q4_k_m"):
        stored = p.stored if scheme is None else weight_types(p.spec, scheme)
        for kv in (w.kv, {"global": q8, "sliding": q8}):
            if scheme is None and kv is w.kv:
                continue
            try:
                other = plan_memory(p.spec, stored, replace(w, kv=kv), targets)
            except UsageError:  # the type's blocks do not fit these heads
                continue
            if other.fits:
                words = ([f"--weights {scheme}"] if scheme else []) + (["--kv q8_0"] if kv is not w.kv else [])
                yield f"{' '.join(words)} fits with {w.context:,} tokens"
                return


def plan_json(p: Plan) -> dict[str, object]:
    w = p.workload
    return {
        "model": p.spec.name,
        "engine": "headwise",
        "context": w.context,
        "slots": w.slots,
        "pool_tokens": w.pool_tokens,
        "ubatch": w.chunk,
        "dtype": w.dtype,
        "kv": {
            "format": {"global": w.kv["global"].name, "sliding": w.kv["sliding"].name},
            "global_bytes": p.kv_global_bytes,
            "sliding_bytes": p.kv_sliding_bytes,
            "total_bytes": p.kv_bytes,
        },
        "weights_bytes": p.weights_bytes,
        "compute_bytes": p.compute_bytes,
        "total_bytes": p.total_bytes,
        "kept_bytes": p.kept_bytes,
        "fits": p.fits,
        "max_context": p.max_context,
        "gpus": [
            {
                "name": s.target.name if s.target.gpu is None else s.target.gpu.name,
                "total_bytes": s.target.total_bytes,
                "others_bytes": s.target.others_bytes,
                "margin_bytes": s.target.margin_bytes,
                "usable_bytes": s.target.usable_bytes,
                "planned_bytes": s.planned_bytes,
                "fits": s.fits,
                "layers": list(s.layers),
            }
            for s in p.shares
        ],
        "notes": list(p.notes),
    }


def serve_json(p: Plan) -> dict[str, object]:
    """What `serve` takes by default, of its plan."""
    return {
        "slots": p.workload.slots,
        "ubatch": p.workload.chunk,
        "pool_tokens": p.workload.pool_tokens,
        "kv_bytes": p.kv_bytes,
        "total_bytes": p.total_bytes,
        "kept_bytes": p.kept_bytes,
        "why": p.notes[0],
    }


@dataclass(frozen=True, slots=True)
class RivalAnswer:
    """A rival's plan against the same cards."""

    plan: RivalPlan
    spec: ModelSpec
    context: int
    slots: int
    ubatch: int | None
    kv: Mapping[str, str]
    weights_bytes: int
    targets: tuple[Target, ...]
    fits: bool | None
    max_context: int | None


def plan_rival(
    engine: str,
    source: Source,
    *,
    context: int | None = None,
    kv: str | None = None,
    kv_sliding: str | None = None,
    slots: int = 1,
    ubatch: int | None = None,
    weights: str | None = None,
    gpus: Sequence[str] = (),
    swa_full: bool = False,
) -> RivalAnswer:
    """What another engine would allocate: `engine` is llama.cpp, ollama or vllm, with @VERSION where it matters."""
    from headwise.planner.residence import weight_bytes

    name, _, version = engine.partition("@")
    targets = tuple(targets_for(gpus, None))
    stored = stored_weights(source, weights)
    n_weights = sum(weight_bytes(source.spec, stored).values())
    context = min(DEFAULT_PLAN_CONTEXT, source.spec.max_context) if context is None else context
    kv = kv or ("auto" if name == "vllm" else "f16")

    def at(n: int) -> RivalPlan:
        return rival_plan(
            name,
            source.spec,
            weights_bytes=n_weights,
            context=n,
            kv=kv,
            kv_sliding=kv_sliding if name == "vllm" else None,
            slots=slots,
            ubatch=ubatch,
            swa_full=swa_full,
            n_gpus=max(1, len(targets)),
            gpu_memory_bytes=targets[0].total_bytes if targets else None,
            version=version or None,
        )

    usable = sum(t.usable_bytes for t in targets)
    most: int | None = None
    if targets:
        low, high = 0, source.spec.max_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if at(middle).total_bytes <= usable else (low, middle - 1)
        most = low
    answer = at(context)
    fits = answer.total_bytes <= usable if targets else None
    return RivalAnswer(
        answer, source.spec, context, slots, ubatch, {"global": kv, "sliding": kv_sliding or kv}, n_weights, targets, fits, most
    )


def rival_json(r: RivalAnswer) -> dict[str, object]:
    p = r.plan
    return {
        "model": r.spec.name,
        "engine": p.engine,
        "version": p.version,
        "context": r.context,
        "slots": r.slots,
        "kv": {
            "format": dict(r.kv),
            "global_bytes": p.kv.global_bytes,
            "sliding_bytes": p.kv.sliding_bytes,
            "total_bytes": p.kv.n_bytes,
        },
        "weights_bytes": r.weights_bytes,
        "compute_bytes": p.compute_bytes,
        "total_bytes": p.total_bytes,
        "fits": r.fits,
        "max_context": r.max_context,
        "gpus": [
            {
                "name": t.name if t.gpu is None else t.gpu.name,
                "usable_bytes": t.usable_bytes,
                "planned_bytes": p.total_bytes // len(r.targets),
                "layers": list(range(len(r.spec.layers))) if len(r.targets) == 1 else [],
            }
            for t in r.targets
        ],
        "items": [{"label": i[0], "bytes": i[1], "why": i[2]} for i in p.items],
        "own_estimate_bytes": p.own_estimate_bytes,
        "own_estimate_note": p.own_estimate_note,
        "notes": [*p.kv.notes, *p.notes],
    }


def explain(
    source: Source,
    *,
    gpu: str | None,
    kv: str | None,
    kv_global: str | None = None,
    kv_sliding: str | None = None,
    backend: str | Mapping[str, str] | None = None,
) -> tuple[DeviceKind, dict[Kind, KVFormat], tuple[Choice, ...]]:
    """Which backend headwise would run each layer on: on `gpu`, else the first detected card, else the CPU.

    Args:
        backend: forced, as `headwise.LLM` takes it.
    """
    device = CPU
    if gpu and gpu.lower() != "cpu":
        device = DeviceKind.of(find_gpu(gpu))
    elif gpu is None:
        known = [d.gpu for d in detect() if d.gpu]
        device = DeviceKind.of(known[0]) if known else CPU
    dtype = activation_type(None, [device])
    formats = kv_formats(kv, kv_global, kv_sliding, dtype)
    choices = choose_layers(source.spec, kv=formats, dtype=dtype, device=device, forced=forced_backends(backend))
    return device, formats, choices


def _layer_json(layer: LayerSpec) -> dict[str, object]:
    return {key: getattr(layer, key) for key in ("index", "kind", "head_dim", "window", "kv_source", "k_eq_v")}


def explain_json(spec: ModelSpec, choices: Sequence[Choice]) -> dict[str, object]:
    return {
        "model": spec.name,
        "layers": [
            _layer_json(layer)
            | {
                "backend": choice.backend.name,
                "verdict": choice.backend.verdict,
                "prefill": choice.prefill.name if choice.prefill else None,
                "prefill_reason": choice.prefill_reason,
                "refusals": [{"backend": r.backend, "reason": r.reason} for r in choice.refusals],
            }
            for layer, choice in zip(spec.layers, choices, strict=True)
        ],
        "measured": mix_figures(spec, choices),
    }


def explain_rival(engine: str, source: Source, *, gpu: str | None, kv: str | None) -> tuple[Gpu, EngineExplanation]:
    """What another engine, `llama.cpp`, `ollama` or `vllm` with @VERSION where it matters, would do on a card."""
    card = find_gpu(gpu) if gpu else next((d.gpu for d in detect() if d.gpu), None)
    if card is None:
        raise UsageError("no card to explain for", why="none was named and none was found", do="--gpu NAME, e.g. --gpu rtx4090")
    name, _, version = engine.partition("@")
    return card, explain_engine(name, version or None, source.spec, card, kv or ("auto" if name == "vllm" else "f16"))


def explain_rival_json(spec: ModelSpec, engine: str, answer: EngineExplanation) -> dict[str, object]:
    return {
        "model": spec.name,
        "engine": engine,
        "layers": [
            _layer_json(layer) | {"backend": c.backend, "verdict": c.verdict, "why": c.why, "source": c.source, "refusals": []}
            for layer, c in zip(spec.layers, answer.choices, strict=True)
        ],
        "notes": list(answer.notes),
    }
