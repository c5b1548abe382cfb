"""From the facts of a load to what is proven, layer kind by layer kind, and about the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from headwise.doctor.facts import Evidence, Fact, Load, amounts, evidence, pairs
from headwise.doctor.proofs import Verdict
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS
from headwise.spec.layers import ModelSpec

LayerKind = Literal["sliding", "global", "all"]
KvState = Literal["honoured", "ignored", "refused", "unproven"]
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVerdict:
    """Layers of one kind with one verdict; `count` is None where the log does not say how many."""

    kind: LayerKind
    count: int | None
    verdict: Verdict
    proof: str | None = None  # the row of proofs.py
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvVerdict:
    requested: str | None
    in_use: str | None
    verdict: KvState
    global_bytes: int | None = None
    sliding_bytes: int | None = None
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache of a llama.cpp context: that of the global layers, of the sliding ones, or of all."""

    kind: LayerKind
    layers: int | None
    cells: int | None
    streams: int
    n_bytes: int
    k: str
    v: str
    fact: Fact


def is_gpu(device: str) -> bool:
    return not device.upper().startswith("CPU") and "Host" not in device and device != "none"


def gpu_devices(load: Load) -> set[str]:
    """Devices that hold something of the model."""
    named = {f.text("device") for name in ("kv_buffer", "compute_buffer", "model_buffer") for f in _used(load, name)}
    named |= {f.text("device") for f in load.all("ol_memory")}
    return {d for d in named if is_gpu(d)}


def _used(load: Load, name: str) -> list[Fact]:
    """Buffers that are more than the dry run's 0.00 MiB."""
    return [f for f in load.all(name) if f.number("mib") > 0]


def caches(load: Load) -> list[Cache]:
    """The caches of the context, the latest of each kind; a dry run's, of 0.00 MiB, are left out."""
    kinds = load.all("kv_kind")
    sizes = _used(load, "kv_size")
    found: dict[LayerKind, Cache] = {}
    for f in sizes:
        line = f.where.line or 0
        before = [k for k in kinds if (k.where.line or 0) < line]
        kind: LayerKind = "all"
        if before:
            kind = "global" if before[-1].text("kind") == "non-SWA" else "sliding"
        elif load.has("kv_filtered"):  # two caches, of which this excerpt shows one
            cells = [s.whole("cells") for s in sizes]
            kind = "global" if f.whole("cells") == max(cells) else "sliding"
        n = round(f.number("mib") * MIB)
        found[kind] = Cache(
            kind, f.whole("layers") or None, f.whole("cells") or None, f.whole("streams", 1), n, f.text("k"), f.text("v"), f
        )
    return list(found.values())


def n_layers(load: Load, spec: ModelSpec | None) -> int | None:
    if spec is not None:
        return len(spec.layers)
    for f in load.all("model"):
        if f.text("key") == "n_layer":
            return f.whole("value") or None
    if offloaded := load.last("offloaded"):
        return max(0, offloaded.whole("of") - 1) or None  # one of them is the output
    return None


def kinds(load: Load, spec: ModelSpec | None) -> list[tuple[LayerKind, int | None]]:
    """The kinds of layers this model has, as far as is known."""
    if spec is not None:
        count = {kind: sum(x.kind == kind for x in spec.layers) for kind in ("sliding", "global")}
        return [("sliding", count["sliding"]), ("global", count["global"])] if all(count.values()) else [("all", len(spec.layers))]
    found = {c.kind: c.layers for c in caches(load)}
    if {"sliding", "global"} & found.keys() or load.has("vl_heads"):
        return [("sliding", found.get("sliding")), ("global", found.get("global"))]
    swa = [f for f in load.all("layer_device") if "swa" in f.value]
    if any(f.whole("swa") for f in swa):
        layers = {f.whole("layer"): f.whole("swa") for f in swa}
        return [("sliding", sum(layers.values())), ("global", len(layers) - sum(layers.values()))]
    return [("all", n_layers(load, None) or found.get("all"))]


def judge(load: Load, spec: ModelSpec | None) -> list[LayerVerdict]:
    """The verdict of every kind of layer; what is not proven is unproven, whatever a flag says."""
    groups = kinds(load, spec)

    def all_(verdict: Verdict, proof: str | None, *facts: Fact | None) -> list[LayerVerdict]:
        return [LayerVerdict(kind=k, count=n, verdict=verdict, proof=proof, evidence=evidence(*facts)) for k, n in groups]

    if load.family == "vllm":
        return _vllm(load, all_)
    if dumped := list(_graph_dump(load, spec)):
        return dumped
    if off := load.last("fa_forced_off"):
        return all_("materialised", "off", off)
    if load.has("kv_refused") and not load.has("splits", "compute_buffer"):
        return all_("unproven", None, load.last("kv_refused"))
    if load.has("fa_mismatch") or any(f.text("value") == "disabled" for f in load.all("fa_probe")):
        lost = [f for f in load.all("fa_probe") if f.text("value") == "disabled"]
        return all_("materialised", "probe-disabled", *load.all("fa_mismatch")[-1:], *lost[-1:])
    request, asked = load.last("fa_request"), load.last("ol_request")
    off = load.last("ol_fa_no_gpu") or load.last("ol_fa_no_model") or load.last("ol_fa_pre_turing")
    if off is None and request is not None and request.text("value") in ("disabled", "0"):
        off = request
    if off is None and asked is not None and asked.text("fa").lower() in ("disabled", "false", "0"):
        off = asked
    if off is not None:
        return all_("materialised", "off", off)
    if cpu := _on_cpu(load):
        return all_("offloaded", *cpu)
    if identity := graph_identity(load, spec):
        return [
            LayerVerdict(
                kind=k,
                count=n,
                verdict="unproven" if k == "sliding" else "offloaded",
                proof=None if k == "sliding" else "cpu-graph-identity",
                evidence=() if k == "sliding" else evidence(identity.graph, identity.cache),
            )
            for k, n in (groups if len(groups) > 1 else _groups_of(identity.model))
        ]
    return list(_on_gpu(load, spec, groups))


def _groups_of(spec: ModelSpec) -> list[tuple[LayerKind, int | None]]:
    return [("sliding", sum(x.kind == "sliding" for x in spec.layers)), ("global", sum(x.kind == "global" for x in spec.layers))]


def _vllm(load: Load, all_: Callable[..., list[LayerVerdict]]) -> list[LayerVerdict]:
    backend = load.last("vl_backend")
    platform = load.last("vl_platform")
    if platform is not None and platform.text("platform") == "cpu":
        return all_("offloaded", "vllm-cpu", platform)
    if backend is None:
        version = load.last("vl_fa_version")
        return all_("fused", "vllm-backend", version) if version else all_("unproven", None)
    name = backend.text("backend") or backend.text("words").upper().replace(" ", "_")
    if "CPU" in name or "SDPA" in name:
        return all_("offloaded", "vllm-cpu", backend)
    if name in VLLM_FUSED:
        return all_("fused", "vllm-backend", backend, load.last("vl_fa_version"))
    return all_("unproven", None, backend)


VLLM_FUSED = frozenset(
    "TRITON_ATTN TRITON_ATTN_VLLM_V1 FLASH_ATTN FLASH_ATTN_VLLM_V1 FLASH_ATTENTION TRITON TRITON_FLASH_ATTN TRITON_FLASHINFER "
    "FLASHINFER FLASHINFER_VLLM_V1 FLEX_ATTENTION XFORMERS ROCM_ATTN ROCM_AITER_FA ROCM_AITER_UNIFIED_ATTN FLASHMLA CUTLASS_MLA "
    "TRITON_MLA FLASH_ATTN_MLA FLASHINFER_MLA".split()
)  # vLLM 0.33.0 v1/attention/backends/registry.py; each runs on the GPU without a score matrix


def _graph_dump(load: Load, spec: ModelSpec | None) -> Iterator[LayerVerdict]:
    """From GGML_SCHED_DEBUG=2: the device of every layer's node."""
    nodes = load.all("fa_node") + load.all("softmax_node")
    if not nodes:
        return
    sliding = {f.whole("layer"): bool(f.whole("swa")) for f in load.all("layer_device") if "swa" in f.value}
    if spec is not None:
        sliding = {x.index: x.kind == "sliding" for x in spec.layers}
    found: dict[tuple[LayerKind, Verdict], dict[int, Fact]] = {}
    layers = {f.whole("layer") for f in nodes}
    for layer in sorted(layers):
        mine = [f for f in nodes if f.whole("layer") == layer]
        verdict: Verdict = "fused"
        worst = mine[-1]
        for f in mine:
            if f.name == "softmax_node":
                verdict, worst = "materialised", f
            elif not is_gpu(f.text("device")) and verdict != "materialised":
                verdict, worst = "offloaded", f
        kind: LayerKind = "all" if not any(sliding.values()) else "sliding" if sliding.get(layer) else "global"
        found.setdefault((kind, verdict), {})[layer] = worst
    for (kind, verdict), members in found.items():
        yield LayerVerdict(
            kind=kind, count=len(members), verdict=verdict, proof="graph-dump", evidence=evidence(*list(members.values())[:3])
        )


def _on_cpu(load: Load) -> tuple[str, Fact] | None:
    """(proof, fact) where every layer's attention is on the CPU."""
    offloaded = load.last("offloaded")
    if offloaded is not None and offloaded.whole("done") == 0:
        return "no-gpu", offloaded
    cache, gpus = _used(load, "kv_buffer"), gpu_devices(load)
    devices = load.all("gpu_device")
    if devices and not any(is_gpu(f.text("device")) for f in devices) and not gpus:
        return "no-gpu", devices[-1]  # llama.cpp says "offloaded 11/11" of a build with a backend and no device, too
    if gpus or (offloaded is not None and offloaded.whole("done")):
        return None
    if cache and not any(is_gpu(f.text("device")) for f in cache) and load.has("compute_buffer", "no_gpu", "model_buffer"):
        return "no-gpu", load.last("no_gpu") or cache[-1]
    if load.has("no_gpu"):
        return "no-gpu", load.all("no_gpu")[-1]
    libraries = {f.text("library").lower() for f in load.all("gpu_ollama")}
    if libraries and libraries <= {"cpu"}:
        return "no-gpu", load.all("gpu_ollama")[-1]
    return None


def _on_gpu(load: Load, spec: ModelSpec | None, groups: list[tuple[LayerKind, int | None]]) -> Iterator[LayerVerdict]:
    """Flash attention may be on, and layers may be on a GPU: what proves it."""
    offloaded, probe, request = load.last("offloaded"), load.last("fa_probe"), load.last("fa_request")
    splits = load.last("splits")
    on = request is not None and request.text("value") in ("enabled", "1")
    whole = offloaded is not None and offloaded.whole("done") >= offloaded.whole("of")
    part = offloaded is not None and 0 < offloaded.whole("done") < offloaded.whole("of")
    cache = _used(load, "kv_buffer")
    on_gpu = whole or part or (bool(cache) and all(is_gpu(f.text("device")) for f in cache))
    host = bool(cache) and not any(is_gpu(f.text("device")) for f in cache)  # --no-kv-offload: its copies cut the graph, too
    proof, proven, shown = None, False, evidence(probe or request, offloaded or (cache[-1] if cache else None))
    wrong: dict[LayerKind, str] = {}
    if probe is not None and on_gpu:
        proof, proven = "probe-enabled", True
    elif (on or load.has("fa_forced_by_kv")) and whole and splits is not None:
        extra = splits.whole("pp") - (len(gpu_devices(load)) or 1) - 1
        shown = evidence(request, offloaded, splits)
        if extra <= 0:
            proof, proven = "healthy-splits", True
        elif not host:
            total = n_layers(load, spec)
            for kind, count in groups:
                if extra % 2 == 0 and (extra // 2 == total or (kind == "global" and extra // 2 == count)):
                    wrong[kind] = "extra-splits"
    behind = _layers_on_cpu(load, spec, groups) if part else {}
    if part and "all" in behind and len(groups) > 1:  # how many is known, of which kind is not
        groups = [("all", n_layers(load, spec))]
    if part and not behind:
        proven = False
    for kind, count in groups:
        if kind in wrong:
            yield LayerVerdict(kind=kind, count=count, verdict="offloaded", proof=wrong[kind], evidence=shown)
            continue
        left = behind.get(kind, 0)
        if left:
            yield LayerVerdict(kind=kind, count=left, verdict="offloaded", proof="layers-on-cpu", evidence=evidence(offloaded))
            count = None if count is None else count - left
        if count is None or count > 0:
            yield LayerVerdict(kind=kind, count=count, verdict="fused" if proven else "unproven", proof=proof, evidence=shown)


def _layers_on_cpu(load: Load, spec: ModelSpec | None, groups: list[tuple[LayerKind, int | None]]) -> dict[LayerKind, int]:
    """How many layers of each kind stayed on the CPU: the first of them (llama-model.cpp: i_gpu_start)."""
    offloaded = load.last("offloaded")
    total = n_layers(load, spec)
    if offloaded is None or not total:
        return {}
    first = total + 1 - offloaded.whole("done")
    if first <= 0:
        return {}
    if spec is not None and len(groups) > 1:
        return {kind: sum(x.kind == kind for x in spec.layers[:first]) for kind, _ in groups}
    swa = {f.whole("layer"): f.whole("swa") for f in load.all("layer_device") if "swa" in f.value}
    if len(groups) > 1 and len(swa) >= total:
        return {kind: sum(bool(swa.get(i)) == (kind == "sliding") for i in range(first)) for kind, _ in groups}
    if len(groups) > 1:
        shared = {c.kind: _share_on_cpu(load, c) for c in caches(load)}
        if all(shared.get(kind) is not None for kind, _ in groups):
            return {kind: shared[kind] or 0 for kind, _ in groups}
    return {"all": min(first, total)}


def _share_on_cpu(load: Load, cache: Cache) -> int | None:
    """Layers of a cache whose part of it lies in host memory, from the buffers that were made for it."""
    size = cache.fact.where.line or 0
    begin = max((f.where.line or 0 for f in load.all("kv_kind") if (f.where.line or 0) < size), default=0)
    mine = [f for f in load.all("kv_buffer") if begin < (f.where.line or 0) < size]
    total = sum(f.number("mib") for f in mine)
    if not cache.layers or not begin or not total:
        return None
    return round(cache.layers * sum(f.number("mib") for f in mine if not is_gpu(f.text("device"))) / total)


# --- the identity of the CPU's compute graph -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Identity:
    """One global layer's attention on the CPU, recognised by the bytes of its copies."""

    model: ModelSpec
    kv: str
    tokens: int
    graph: Fact
    cache: Fact | None


def graph_identity(load: Load, spec: ModelSpec | None) -> Identity | None:
    """The model, KV type and cache length for which `compute graph device=CPU` is one global layer's attention, if any.

    CPU graph = 2 n_kv H_kv 512 bytes (K and V) + 2 n_kv n_batch (f16 mask) + 2 H_q 512 n_batch 4 (queries and result, f32).
    Without the model's name every Gemma 4 is tried; the size of the cache, where it is logged, must agree too.
    """
    graphs = [f for f in load.all("ol_memory") if f.text("what") == "compute graph" and f.text("device").upper().startswith("CPU")]
    if not graphs:
        return None
    graph = graphs[-1]
    try:
        n, slack = amounts(graph.text("size"))
    except ValueError:
        return None
    request, batch_fact = load.last("ol_request"), load.last("ol_batch")
    batch = batch_fact.whole("batch", 512) if batch_fact else 512
    cache = [f for f in load.all("ol_memory") if f.text("what") == "kv cache"]
    specs = [spec] if spec is not None else [s for s in catalogue.specs().values() if s.family == "gemma4"]
    for model in specs:
        layers = [x for x in model.layers if x.kind == "global" and x.head_dim == 512]
        if not layers:
            continue
        layer = layers[0]
        for kv in ("f16", "q8_0", "q4_0"):
            row = KV_FORMATS[kv].row_bytes(layer.head_dim)
            per_token = 2 * layer.n_kv_heads * row + 2 * batch
            fixed = 2 * layer.n_heads * layer.head_dim * batch * 4
            tokens = round((n - fixed) / per_token / 256) * 256
            if request is not None and request.whole("kv_size") and tokens != request.whole("kv_size"):
                continue
            if tokens <= 0 or abs(tokens * per_token + fixed - n) > slack:
                continue
            if cache and not _agrees(model, kv, tokens, batch, cache):
                continue
            return Identity(model, kv, tokens, graph, cache[-1] if cache else None)
    return None


def _agrees(model: ModelSpec, kv: str, tokens: int, batch: int, cache: Sequence[Fact]) -> bool:
    """Whether the logged cache, all devices together, is what Ollama's engine allocates (NewSWAMemCache(window, 4096))."""
    want = 0
    for layer in model.kv_layers:
        cells = tokens if layer.window is None else min(tokens, -(-(4096 + batch) // 256) * 256)
        want += cells * 2 * layer.n_kv_heads * KV_FORMATS[kv].row_bytes(layer.head_dim)
    have = [amounts(f.text("size")) for f in cache]
    return abs(sum(n for n, _ in have) - want) <= sum(slack for _, slack in have)


# --- the cache ------------------------------------------------------------------------------------------------------------


def flags(command: str) -> dict[str, str]:
    """`--name value` of a command line; a flag without a value is "1"."""
    words = command.split()
    out: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-") and not _number(word):
            name, eq, value = word.lstrip("-").partition("=")
            out[name] = value if eq else following if following and (following[0] != "-" or _number(following)) else "1"
    return out


def _number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()


def requested_kv(load: Load) -> tuple[str | None, Fact | None]:
    """The KV type that somebody asked for, and where that stands."""
    if command := load.last("command"):
        given = flags(command.text("command"))
        kv = (
            given.get("cache-type-v")
            or given.get("ctv")
            or given.get("cache-type-k")
            or given.get("ctk")
            or given.get("kv-cache-type")
        )
        if kv:
            return kv.lower(), command
    if (asked := load.last("ol_request")) and asked.text("kv"):
        return asked.text("kv").lower(), asked
    for dropped in load.all("ol_kv_dropped"):
        if kind := dropped.text("type").strip('"'):
            return kind.lower(), dropped
    if environment := load.last("ollama_env"):
        kv = dict(pairs(environment.text("env"))).get("OLLAMA_KV_CACHE_TYPE", "")
        if kv:
            return kv.lower(), environment
    if load.family == "vllm":
        for f in (*load.all("vl_kv_request"), *load.all("vl_engine")):
            kv = f.text("type") or f.text("kv")
            if kv and kv not in ("auto", "None"):
                return kv.lower(), f
    return None, None


def judge_kv(load: Load, spec: ModelSpec | None) -> KvVerdict:
    requested, asked = requested_kv(load)
    found = caches(load)
    if refused := load.last("kv_refused"):
        kv = requested or refused.text("type") or (found[0].v if found else None)
        return KvVerdict(requested=kv, in_use=None, verdict="refused", evidence=evidence(refused))
    dropped = [f for f in load.all("ol_kv_dropped") if f.text("type").strip('"')]
    if dropped:
        return KvVerdict(requested=requested, in_use="f16", verdict="ignored", evidence=evidence(dropped[-1]))
    if found:
        types = {c.k for c in found} | {c.v for c in found}
        in_use = types.pop() if len(types) == 1 else "/".join(dict.fromkeys(t for c in found for t in (c.k, c.v)))
        size = {c.kind: c.n_bytes for c in found}
        whole = "all" in size
        return KvVerdict(
            requested=requested,
            in_use=in_use,
            verdict="honoured" if requested in (None, in_use) else "ignored",
            global_bytes=size.get("all", size.get("global")),
            sliding_bytes=0 if whole else size.get("sliding"),
            evidence=evidence(asked, *(c.fact for c in found)),
        )
    if load.family == "vllm":
        fp8 = load.last("vl_kv_fp8")
        engine = load.last("vl_engine")
        if fp8 is not None:
            return KvVerdict(
                requested=requested or "fp8", in_use=fp8.text("type"), verdict="honoured", evidence=evidence(asked, fp8)
            )
        if requested is None and engine is not None and engine.text("kv") == "auto":
            return KvVerdict(requested=None, in_use="auto", verdict="honoured", evidence=evidence(engine))
    if identity := graph_identity(load, spec):
        total = sum(amounts(f.text("size"))[0] for f in load.all("ol_memory") if f.text("what") == "kv cache")
        part = identity.tokens * sum(
            2 * x.n_kv_heads * KV_FORMATS[identity.kv].row_bytes(x.head_dim) for x in identity.model.kv_layers if x.window is None
        )
        state: KvState = "honoured" if requested in (None, identity.kv) else "ignored"
        return KvVerdict(
            requested=requested,
            in_use=identity.kv,
            verdict=state,
            global_bytes=part,
            sliding_bytes=max(0, round(total) - part) if total else None,
            evidence=evidence(asked, identity.graph, identity.cache),
        )
    return KvVerdict(requested=requested, in_use=None, verdict="unproven", evidence=evidence(asked))
