"""What llama.cpp, Ollama and vLLM would allocate for a model, by version, and what each of them would predict itself.

The KV cache is exact: it is the engine's own arithmetic, and logs confirm it to the hundredth of a MiB. Compute buffers
are not: llama.cpp and Ollama measure theirs by building the graph, so only the terms that dominate are modelled, each
with its formula, and `compute_bytes` is a lower bound. One source is quoted beside each rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from headwise.errors import PlanError, UsageError
from headwise.planner.versions import Engine, EngineVersion, engine_named, engine_version
from headwise.spec.kv import KV_FORMATS, KVFormat
from headwise.spec.layers import Kind, LayerSpec, ModelSpec
from headwise.spec.tensors import weight_tensors

MIB, GIB = 2**20, 2**30
KINDS: tuple[Kind, Kind] = ("global", "sliding")

# llama.cpp 2026-10-01, common/arg.cpp:304 (the names), ggml-common.h (the block sizes)
GGML_KV: Mapping[str, KVFormat] = {
    **{name: KV_FORMATS[name] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")},
    "q4_1": KVFormat("q4_1", 32, 20),
    "iq4_nl": KVFormat("iq4_nl", 32, 18),
    "q5_0": KVFormat("q5_0", 32, 22),
    "q5_1": KVFormat("q5_1", 32, 24),
}
# Ollama before 0.30, fs/ggml/ggml.go SupportsKVCacheType; anything else is a warning and f16
OLLAMA_OLD_KV = ("f16", "q8_0", "q4_0")
# vLLM config/cache.py CacheDType, the formats without scales of their own
VLLM_KV: Mapping[str, KVFormat] = {
    **dict.fromkeys(("auto", "f16", "float16", "bf16", "bfloat16"), KV_FORMATS["bf16"]),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), KV_FORMATS["fp8"]),
}

# llama.cpp's graphs of these families know the window (llama-model.cpp sets swa_type); the others cache every token
_WINDOWED_IN_LLAMACPP = frozenset({"gemma3", "gemma4", "exaone4", "gpt_oss"})
# first release in which Ollama's own engine ran a family (fs/ggml/ggml.go OllamaEngineRequired); the rest: llamarunner
OLLAMA_ENGINE_SINCE: Mapping[str, tuple[int, int, int]] = {
    "gemma3": (0, 6, 0),
    "gpt_oss": (0, 11, 0),
    "qwen3": (0, 12, 0),
    "qwen3_moe": (0, 12, 2),
    "gemma4": (0, 20, 0),
}
_OLLAMA_SWA_MEMORY = {"gemma4": 4096, "gpt_oss": 4096}  # NewSWAMemCache(window, 4096): tokens kept for prefix reuse
_OLLAMA_MINIMUM = 457 * MIB  # per GPU, ml/device.go MinimumMemory
_VLLM_PAGE = 16  # tokens, config/cache.py DEFAULT_BLOCK_SIZE
_VLLM_BATCH, _VLLM_CONCURRENT = 2048, 2  # config/scheduler.py DEFAULT_MAX_NUM_BATCHED_TOKENS; async scheduling
_PIPELINE_COPIES = 4  # ggml-backend.cpp GGML_SCHED_MAX_COPIES, of graph inputs, with several GPUs


class RivalItem(NamedTuple):
    """One line of a rival's bill."""

    label: str
    n_bytes: int
    why: str  # the formula, and whose it is


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalKv:
    """The KV cache of all slots: bytes of each kind of layer, and how they come about."""

    global_bytes: int
    sliding_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        return self.global_bytes + self.sliding_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalPlan:
    """What one engine would allocate, in labelled bytes, beside what it would predict itself."""

    engine: Engine
    version: str
    kv: RivalKv
    compute_bytes: int  # the modelled terms only: a lower bound
    items: tuple[RivalItem, ...]  # all of it: weights, cache, compute, driver
    own_estimate_bytes: int | None  # None: the engine measures, or a number it needs is missing
    own_estimate_note: str
    notes: tuple[str, ...] = ()  # what was assumed, defaulted or is not known

    @property
    def total_bytes(self) -> int:
        return sum(item.n_bytes for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    """What a user asks of an engine, with the engine's defaults filled in."""

    version: EngineVersion
    spec: ModelSpec
    weights_bytes: int
    context: int
    k: str
    v: str
    sliding: str | None
    slots: int
    ubatch: int | None
    swa_full: bool
    unified: bool | None
    flash_attention: bool
    n_gpus: int
    gpu_memory_bytes: int | None


def rival_plan(
    engine: str,
    spec: ModelSpec,
    *,
    weights_bytes: int,
    context: int,
    kv: str = "f16",
    kv_v: str | None = None,
    kv_sliding: str | None = None,
    slots: int = 1,
    ubatch: int | None = None,
    swa_full: bool = False,
    unified: bool | None = None,
    flash_attention: bool = True,
    n_gpus: int = 1,
    gpu_memory_bytes: int | None = None,
    version: str | None = None,
) -> RivalPlan:
    """What `engine` would allocate for `spec`, all layers on its GPUs.

    Args:
        context: the engine's own setting: llama.cpp `-c` (all slots together), Ollama `num_ctx` (each slot), vLLM
            `--max-model-len` (each sequence); tokens, > 0.
        kv: type of K, and of V unless `kv_v` names another (llama.cpp only).
        kv_sliding: type in sliding layers (vLLM only, `kv_cache_dtype_skip_layers`).
        slots: sequences at once, > 0 (llama.cpp `-np`, Ollama OLLAMA_NUM_PARALLEL, vLLM running requests).
        ubatch: tokens per prefill step; None = the engine's default.
        swa_full: sliding layers cache the whole context (llama.cpp `--swa-full`, vLLM without its hybrid manager).
        unified: llama.cpp only: one cache for all slots; None = as llama-server without `-np` does.
        gpu_memory_bytes: of one GPU; Ollama's batch size and vLLM's share depend on it.
        version: None = the newest known.
    Raises:
        UsageError: a setting or KV type the engine does not have, with what it accepts.
        PlanError: the engine would refuse to start.
        ValueError: a count out of range (a caller's bug).
    """
    for name, n in (("context", context), ("slots", slots), ("n_gpus", n_gpus), ("ubatch", ubatch)):
        if n is not None and n <= 0:
            raise ValueError(f"rival_plan: {name} {n} (> 0)")
    if weights_bytes < 0:
        raise ValueError(f"rival_plan: weights_bytes {weights_bytes} (>= 0)")
    ask = _Ask(
        version=engine_version(engine, version),
        spec=spec,
        weights_bytes=weights_bytes,
        context=context,
        k=kv.lower(),
        v=(kv_v or kv).lower(),
        sliding=kv_sliding.lower() if kv_sliding else None,
        slots=slots,
        ubatch=ubatch,
        swa_full=swa_full,
        unified=unified,
        flash_attention=flash_attention,
        n_gpus=n_gpus,
        gpu_memory_bytes=gpu_memory_bytes,
    )
    plan = {"llama.cpp": _llama_cpp, "ollama": _ollama, "vllm": _vllm}[engine_named(engine)]
    return plan(ask)


def ollama_default_context(version: str | None, *, vram_bytes: int, max_context: int) -> int:
    """`num_ctx` where nobody sets one, in tokens.

    Source: Ollama server/routes.go (tiers since 0.15.5, thresholds a GiB under 24 and 48), envconfig/config.go (4096
    since 0.6.7), api/types.go (2048 before).
    """
    release = engine_version("ollama", version)
    if release.at_least(0, 15, 5):
        default = 262_144 if vram_bytes >= 47 * GIB else 32_768 if vram_bytes >= 23 * GIB else 4096
    else:
        default = 4096 if release.at_least(0, 6, 7) else 2048
    return min(default, max_context)


# --- llama.cpp ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """Cells of one stream of each sub-cache, and how many streams there are."""

    base: int
    sliding: int
    n_streams: int
    notes: tuple[str, ...]


def _llama_cpp(ask: _Ask) -> RivalPlan:
    _refuse(
        ask.sliding is not None,
        "llama.cpp has no KV type per kind of layer",
        "drop it: --cache-type-k and -v hold for all",
    )
    k, v = _ggml_kv(ask.k, ask.version.engine), _ggml_kv(ask.v, ask.version.engine)
    _check_ggml_start(ask, k, v)
    unified = True if ask.unified is None else ask.unified
    ubatch = min(ask.ubatch or 512, pad256(ask.context))
    cells = _llama_cells(ask, n_ctx=ask.context, unified=unified, ubatch=ubatch, swa_full=ask.swa_full)
    split = "as llama-server without -np; with an explicit -np it splits the cache among the slots (unified=False)"
    return _plan(
        ask,
        _ggml_cache(ask, k, v, cells),
        _ggml_compute(ask, k, v, cells, ubatch=ubatch, pipeline=True),
        notes=(split,) if ask.slots > 1 and ask.unified is None else (),
        own=None,
        own_note="llama.cpp predicts nothing by formula: --fit builds the graph without allocating, and measures "
        "(common/fit.cpp); it then keeps 1,024 MiB of each GPU free",
    )


def pad256(n: int) -> int:
    """`n` rounded up to the 256 cells that llama.cpp and Ollama allocate in."""
    return -(-n // 256) * 256


def _ggml_kv(name: str, engine: str) -> KVFormat:
    if name not in GGML_KV:
        raise UsageError(f"{engine} has no KV type {name!r}", why=f"it accepts {', '.join(GGML_KV)}", do="--kv with one of those")
    return GGML_KV[name]


def _check_ggml_start(ask: _Ask, k: KVFormat, v: KVFormat) -> None:
    """What makes llama.cpp refuse to create a context (llama-context.cpp:3845-3870, 2026-10-01)."""
    if v.quantised and not ask.flash_attention:
        raise PlanError(
            f"{ask.version} would not start with {v.name} values and flash attention off",
            why='llama.cpp: "quantized V cache requires flash_attn to be enabled"',
            do="flash attention on, or f16 for V",
        )
    for layer in ask.spec.kv_layers:
        for what, fmt in (("K", k), ("V", v)):
            if layer.head_dim % fmt.block:
                raise PlanError(
                    f"{ask.version} would not start with {fmt.name} for {what}",
                    why=f"its blocks of {fmt.block} do not divide head size {layer.head_dim} of layer {layer.index}",
                    do="f16 fits every head size",
                )


def _llama_cells(ask: _Ask, *, n_ctx: int, unified: bool, ubatch: int, swa_full: bool) -> _Cells:
    """llama-context.cpp n_ctx_seq, llama-kv-cache-iswa.cpp: the base cache, and the ring of the sliding layers."""
    n_streams = 1 if unified else ask.slots
    base = pad256(n_ctx) if unified else pad256(pad256(n_ctx) // ask.slots)
    if not base:
        raise PlanError(
            f"{ask.version} would not start with {ask.slots} slots",
            why=f"a context of {n_ctx} tokens split among them leaves none for each (n_ctx_seq == 0)",
            do=f"--context {ask.slots} at least, or fewer slots",
        )
    notes = [f"base cache: {base} cells (the context, whole 256s)" + (f" for each of {n_streams} slots" if n_streams > 1 else "")]
    window = max((layer.window for layer in ask.spec.layers if layer.window is not None), default=None)
    if window is None:
        return _Cells(base=base, sliding=0, n_streams=n_streams, notes=tuple(notes))
    if ask.spec.family not in _WINDOWED_IN_LLAMACPP:
        notes.append(f"full-size sliding caches: no window is known in llama.cpp's graph of {ask.spec.family}")
        return _Cells(base=base, sliding=base, n_streams=n_streams, notes=tuple(notes))
    sharing = ask.slots if unified else 1
    sliding = pad256(min(base, window * sharing + ubatch))
    if swa_full:
        sliding = base
        notes.append("full-size sliding caches (swa_full)")
    else:
        times = f" * {sharing} slots" if sharing > 1 else ""
        notes.append(f"sliding ring: {sliding} cells = pad256(min(base, {window}{times} + ubatch {ubatch}))")
    return _Cells(base=base, sliding=sliding, n_streams=n_streams, notes=tuple(notes))


def _ggml_cache(ask: _Ask, k: KVFormat, v: KVFormat, cells: _Cells, *, pad_v: bool = True) -> RivalKv:
    """llama-kv-cache.cpp: rows of K and V per layer that owns a cache; nothing for the layers that share one.

    Without flash attention V lies transposed, and where its width varies every layer is as wide as the widest.
    """
    widest = max(layer.n_kv_heads * layer.head_dim for layer in ask.spec.layers)
    padded = 0
    kinds = dict.fromkeys(KINDS, 0)
    for layer in ask.spec.kv_layers:
        width = layer.n_kv_heads * layer.head_dim
        v_width = width if ask.flash_attention or not pad_v else widest
        padded += v_width != width
        rows = cells.n_streams * (cells.base if layer.window is None else cells.sliding)
        kinds[layer.kind] += rows * (k.row_bytes(width) + v.row_bytes(v_width))
    notes = [*cells.notes, *_stored_twice(ask.spec)]
    if padded:
        notes.append(f"flash attention off: V of {padded} layers is padded to {widest} values per token")
    return RivalKv(global_bytes=kinds["global"], sliding_bytes=kinds["sliding"], notes=tuple(notes))


def _stored_twice(spec: ModelSpec) -> Iterable[str]:
    n_equal = sum(layer.k_eq_v for layer in spec.kv_layers)
    n_shared = len(spec.layers) - len(spec.kv_layers)
    if n_equal:
        yield f"K and V of the {n_equal} K=V layers are stored twice"
    if n_shared:
        yield f"{n_shared} layers share another layer's cache and allocate nothing"


def _ggml_compute(ask: _Ask, k: KVFormat, v: KVFormat, cells: _Cells, *, ubatch: int, pipeline: bool) -> tuple[RivalItem, ...]:
    """The terms that dominate ggml's compute buffer. Buffers of one layer are reused by the next: the largest counts.

    Source: llama.cpp llama-graph.cpp (masks), llama-context.cpp graph_reserve (n_outputs = n_tokens),
    ggml-cuda/fattn-common.cuh need_f16_K/V (2026-10-01).
    """
    layers = ask.spec.layers
    rows = {kind: cells.base if kind == "global" else cells.sliding for kind in KINDS}
    used = [kind for kind in KINDS if any(layer.kind == kind for layer in layers)]
    mask_item = 2 if ask.flash_attention else 4
    copies = _PIPELINE_COPIES if pipeline and ask.n_gpus > 1 else 1
    total_cells = sum(rows[kind] for kind in used)
    mask = total_cells * ubatch * mask_item * copies
    times = f" * {copies} pipeline copies" if copies > 1 else ""
    item = "f16" if ask.flash_attention else "f32"
    items = [
        RivalItem("attention masks", mask, f"{total_cells} cells * ubatch {ubatch} * {mask_item} ({item}){times}"),
        RivalItem("logits", ask.spec.vocab_size * ubatch * 4, f"vocabulary {ask.spec.vocab_size} * ubatch {ubatch} * 4 (f32)"),
    ]
    if not ask.flash_attention:
        layer = max(layers, key=lambda layer: layer.n_heads * rows[layer.kind])
        scores = layer.n_heads * rows[layer.kind] * ubatch * 4
        why = f"{layer.n_heads} heads * {rows[layer.kind]} cells * ubatch {ubatch} * 4, of one layer"
        items.append(RivalItem("attention scores", scores, why))
    elif k.quantised or v.quantised:
        scratch = 0
        for layer in layers:
            if layer.head_dim > 256:
                values = layer.n_kv_heads * layer.head_dim * (k.quantised + v.quantised)
                scratch = max(scratch, rows[layer.kind] * cells.n_streams * values * 2)
        if scratch:
            why = "cells * values of one layer * 2: CUDA has no kernel that reads a quantised cache above head size 256"
            items.append(RivalItem("f16 copy of quantised KV", scratch, why))
    return tuple(items)


# --- Ollama ---------------------------------------------------------------------------------------------------------


def _ollama(ask: _Ask) -> RivalPlan:
    _refuse(ask.v != ask.k, "Ollama has one KV type for K and V", "OLLAMA_KV_CACHE_TYPE sets both")
    _refuse(ask.sliding is not None, "Ollama has no KV type per kind of layer", "OLLAMA_KV_CACHE_TYPE holds for all layers")
    _refuse(
        ask.swa_full,
        "Ollama has no setting for full-size sliding caches",
        "drop it; what the release does is in the notes",
    )
    _refuse(
        ask.unified is not None,
        "Ollama has no setting for a unified cache",
        "drop it; what the release does is in the notes",
    )
    context = min(ask.context, ask.spec.max_context)
    clamped = () if context == ask.context else (f"context cut to the {context} tokens the model was trained for",)
    if ask.version.at_least(0, 30, 0):
        return _ollama_server(ask, context, clamped)
    if ask.k not in OLLAMA_OLD_KV:
        raise UsageError(
            f"{ask.version} has no KV type {ask.k!r}",
            why=f"it accepts {', '.join(OLLAMA_OLD_KV)}; for any other it warns and keeps f16",
            do="--kv with one of those",
        )
    k = GGML_KV[ask.k]
    if k.quantised and not ask.flash_attention:
        clamped += (f"{k.name} is dropped without flash attention: one warning, and f16 (llm/server.go)",)
        k = GGML_KV["f16"]
    ubatch = min(ask.ubatch or 512, context)
    since = OLLAMA_ENGINE_SINCE.get(ask.spec.family)
    if since and ask.version.at_least(*since):
        return _ollama_engine(ask, context, k, ubatch, clamped)
    return _llamarunner(ask, context, k, ubatch, clamped)


def _ollama_server(ask: _Ask, context: int, notes: tuple[str, ...]) -> RivalPlan:
    """0.30 and later: a llama-server child with `-c num_ctx*parallel -np parallel`, so each slot has its own cache."""
    k = _ggml_kv(ask.k, str(ask.version))
    _check_ggml_start(ask, k, k)
    own = _predict_server_vram(ask, context)
    ubatch = ask.ubatch
    if ubatch is None:
        ubatch = _ollama_batch(ask, context, own)
        notes += (f"batch {ubatch} chosen by Ollama for this context; it widens the sliding rings",)
    ubatch = min(ubatch, pad256(context * ask.slots))
    cells = _llama_cells(ask, n_ctx=context * ask.slots, unified=False, ubatch=ubatch, swa_full=False)
    kv = _ggml_cache(ask, k, k, cells)
    return _plan(
        ask,
        kv,
        _ggml_compute(ask, k, k, cells, ubatch=ubatch, pipeline=True),
        driver=_ollama_driver(ask),
        own=own,
        own_note="PredictServerVRAM, used for eviction and batch size: file + 2 * layers * min KV heads * "
        "(hidden / heads) * context * 2; it knows no head size, window, shared cache, KV type or compute buffer "
        "(llm/llama_server.go)",
        notes=notes,
    )


def _predict_server_vram(ask: _Ask, context: int) -> int:
    layers = ask.spec.layers
    head_dim = ask.spec.hidden // max(layer.n_heads for layer in layers)
    kv_heads = min(layer.n_kv_heads for layer in layers)
    return ask.weights_bytes + 2 * len(layers) * kv_heads * head_dim * context * ask.slots * 2


def _ollama_batch(ask: _Ask, context: int, predicted: int) -> int:
    """server/sched.go automaticGenerationBatch (0.30.0 and HEAD); free memory is taken as all of it."""
    total = context * ask.slots
    memory = (ask.gpu_memory_bytes or 0) * ask.n_gpus
    if not ask.flash_attention:
        return 256 if total > 4096 and 0 < (ask.gpu_memory_bytes or 0) <= 8 * GIB else 512
    batch = 2048 if total > 32_768 else 1024 if total > 4096 else 512
    while batch > 512 and memory and not _batch_fits(batch, predicted, memory):
        batch //= 2
    return batch


def _batch_fits(batch: int, predicted: int, memory: int) -> bool:
    headroom, surcharge = (60, 2 * GIB) if batch == 2048 else (75, 768 * MIB)
    return predicted <= memory * headroom // 100 and predicted + surcharge <= memory * 80 // 100


def _ollama_engine(ask: _Ask, context: int, k: KVFormat, ubatch: int, notes: tuple[str, ...]) -> RivalPlan:
    """Ollama's own engine, to 0.24: kvcache/causal.go Init."""
    release, spec = ask.version, ask.spec
    pad = 256 if ask.flash_attention or release.at_least(0, 13, 2) else 32
    base = -(-context * ask.slots // pad) * pad
    sliding, told = 0, [f"base cache: {base} cells"]
    window = max((layer.window for layer in spec.layers if layer.window is not None), default=None)
    if window is not None:
        memory = _OLLAMA_SWA_MEMORY.get(spec.family, window)
        if ask.slots > 1:
            memory = max(memory, window + 1)
        if memory >= context:
            sliding = base
            told.append("full-size sliding caches: the context is within what a ring would keep")
        else:
            sliding = -(-(ask.slots * memory + ubatch) // pad) * pad
            kept = f"{memory} tokens kept per slot for prefix reuse, not {window}" if memory > window + 1 else f"window {window}"
            told.append(f"sliding ring: {sliding} cells = pad{pad}({ask.slots} * {memory} + batch {ubatch}): {kept}")
    cells = _Cells(base=base, sliding=sliding, n_streams=1, notes=tuple(told))
    return _plan(
        ask,
        _ggml_cache(ask, k, k, cells, pad_v=False),
        _ggml_compute(ask, k, k, cells, ubatch=ubatch, pipeline=False),
        driver=_ollama_driver(ask),
        own=None,
        own_note="it measures: fit, allocate, commit, with 10 % steps back (llm/server.go ollamaServer.Load)"
        if release.at_least(0, 13, 0)
        else "an estimate by architecture (llm/memory.go) that is not modelled here",
        notes=notes,
    )


def _llamarunner(ask: _Ask, context: int, k: KVFormat, ubatch: int, notes: tuple[str, ...]) -> RivalPlan:
    """Ollama's bundled llama.cpp, to 0.24: it keeps the library's default `swa_full = true`, so nothing is a ring."""
    cells = _llama_cells(ask, n_ctx=context * ask.slots, unified=False, ubatch=ubatch, swa_full=True)
    own, graph = _graph_size(ask, context, k, ubatch)
    note = (
        f"weights + context * layers * KV heads * (K + V) * {_ollama_item(k.name)} bytes, no windows + {graph}; "
        "flash attention, which needs no such graph, is ignored"
    )
    if not ask.version.at_least(0, 13, 0):
        note += "; to 0.12 it also counted 457 MiB and one layer per GPU, left out here"
    return _plan(
        ask,
        _ggml_cache(ask, k, k, cells),
        _ggml_compute(ask, k, k, cells, ubatch=ubatch, pipeline=True),
        driver=_ollama_driver(ask),
        own=own,
        own_note=note + " (fs/ggml/ggml.go GraphSize, llm/server.go)",
        notes=notes,
    )


def _ollama_item(name: str) -> Fraction:
    """Bytes per value in Ollama's estimator: kvCacheBytesPerElement forgets the scales of a block."""
    return {"q8_0": Fraction(1), "q4_0": Fraction(1, 2)}.get(name, Fraction(2))


def _graph_size(ask: _Ask, context: int, k: KVFormat, batch: int) -> tuple[int, str]:
    """GraphSize at v0.18.1, with all layers on the GPUs, and in words: the whole estimate of the llamarunner era."""
    spec, layers = ask.spec, ask.spec.layers
    total = context * ask.slots
    kv = sum(int(total * 2 * layer.head_dim * layer.n_kv_heads * _ollama_item(k.name)) for layer in layers)
    heads = max(layer.n_heads for layer in layers)
    if spec.family in ("llama", "mistral"):
        graph = max(4 * batch * (1 + 4 * spec.hidden + total * (1 + heads)), 4 * batch * (spec.hidden + spec.vocab_size))
        words = f"{ask.n_gpus} GPUs * 4 * batch * (1 + 4 * hidden + context * (1 + heads))"
    else:
        gqa = heads // min(layer.n_kv_heads for layer in layers)
        graph = gqa * kv // 6
        words = f"{ask.n_gpus} GPUs * {gqa} * KV / 6 of graph"
    return ask.weights_bytes + kv + ask.n_gpus * graph, words


def _ollama_driver(ask: _Ask) -> RivalItem:
    return RivalItem(
        "driver",
        _OLLAMA_MINIMUM * ask.n_gpus,
        f"{ask.n_gpus} * 457 MiB, what Ollama sets aside for each GPU's own structures (ml/device.go MinimumMemory)",
    )


# --- vLLM -----------------------------------------------------------------------------------------------------------


def _vllm(ask: _Ask) -> RivalPlan:
    """Pages of 16 tokens. A sliding layer keeps its window and all tokens in flight, and one page for misalignment.

    Source: vLLM 0.33.0 v1/kv_cache_interface.py SlidingWindowSpec, FullAttentionSpec; models/gemma4.py (K loaded into
    both shards of QKV, KV heads per GPU at least one).
    """
    _refuse(ask.v != ask.k, "vLLM has one KV type for K and V", "--kv-cache-dtype sets both")
    _refuse(ask.unified is not None, "vLLM has no unified cache to switch", "drop it: all requests share its pages")
    _refuse(not ask.flash_attention, "vLLM has no switch for flash attention", "--attention-backend chooses a backend")
    formats = {"global": _vllm_kv(ask.k), "sliding": _vllm_kv(ask.sliding or ask.k)}
    batch = ask.ubatch or _VLLM_BATCH
    in_flight = _VLLM_CONCURRENT * batch
    kinds = dict.fromkeys(KINDS, 0)
    copied = 0
    for layer in ask.spec.kv_layers:
        heads = max(1, layer.n_kv_heads // ask.n_gpus) * ask.n_gpus
        copied += heads > layer.n_kv_heads
        pages = -(-ask.context // _VLLM_PAGE)
        if layer.window is not None and not ask.swa_full:
            pages = -(-min(layer.window - 1 + in_flight, ask.context) // _VLLM_PAGE) + 1
        kinds[layer.kind] += ask.slots * pages * _VLLM_PAGE * heads * 2 * formats[layer.kind].row_bytes(layer.head_dim)
    notes = ["pages of 16 tokens; pages of different kinds are made equal in size, and that waste is not counted"]
    if ask.spec.of_kind("sliding"):
        notes.append(
            "full-size sliding caches: its hybrid manager is off"
            if ask.swa_full
            else f"a sliding layer keeps min(window - 1 + {in_flight} in flight, max_model_len) tokens and a page more"
        )
    notes += _stored_twice(ask.spec)
    if copied:
        notes.append(f"{copied} layers have fewer KV heads than GPUs: each GPU holds a copy")
    kv = RivalKv(global_bytes=kinds["global"], sliding_bytes=kinds["sliding"], notes=tuple(notes))
    assumed = (
        [] if ask.ubatch else [f"--max-num-batched-tokens {_VLLM_BATCH}, its config's default; servers on large GPUs raise it"]
    )
    if not ask.version.at_least(0, 33, 0):
        assumed.append("these rules were read in 0.33.0; releases before differ in the tokens in flight")
    own, own_note = _vllm_claim(ask)
    return _plan(ask, kv, (), extra=_vllm_shards(ask), own=own, own_note=own_note, notes=tuple(assumed))


def _vllm_kv(name: str) -> KVFormat:
    if name not in VLLM_KV:
        raise UsageError(
            f"vLLM has no KV type {name!r} that is known here",
            why=f"it accepts {', '.join(VLLM_KV)}; its types with a scale per token and head are not modelled",
            do="--kv fp8 halves the cache",
        )
    return VLLM_KV[name]


def _vllm_shards(ask: _Ask) -> tuple[RivalItem, ...]:
    doubled = sum(layer.n_kv_heads * layer.head_dim for layer in ask.spec.kv_layers if layer.k_eq_v) * ask.spec.hidden
    if not doubled:
        return ()
    n_weights = sum(tensor.n_elements for tensor in weight_tensors(ask.spec))
    why = "K of the K=V layers is loaded into both shards of QKV; at the file's mean bytes per weight"
    return (RivalItem("K weights, again", ask.weights_bytes * doubled // n_weights, why),)


def _vllm_claim(ask: _Ask) -> tuple[int | None, str]:
    if not ask.version.at_least(0, 26, 0):
        return (
            None,
            "it claims gpu_memory_utilization of each GPU; which release raised the default to 0.92 is not established",
        )
    if ask.gpu_memory_bytes is None:
        return None, "it claims 92 % of each GPU, whatever the model needs; the GPU's memory was not given"
    claim = ask.gpu_memory_bytes * 92 // 100 * ask.n_gpus
    return claim, "not an estimate of need: it claims 92 % of each GPU (gpu_memory_utilization) and fills it with pages"


# --- all ------------------------------------------------------------------------------------------------------------


def _refuse(condition: bool, what: str, do: str) -> None:
    if condition:
        raise UsageError(what, why="the setting does not exist there", do=do)


def _plan(
    ask: _Ask,
    kv: RivalKv,
    compute: tuple[RivalItem, ...],
    *,
    own: int | None,
    own_note: str,
    driver: RivalItem | None = None,
    extra: tuple[RivalItem, ...] = (),
    notes: tuple[str, ...] = (),
) -> RivalPlan:
    items = [RivalItem("weights", ask.weights_bytes, "the file"), *extra]
    for kind, n_bytes in (("global", kv.global_bytes), ("sliding", kv.sliding_bytes)):
        if any(layer.kind == kind for layer in ask.spec.layers):
            items.append(RivalItem(f"KV, {kind} layers", n_bytes, _kv_words(ask, kind)))
    items += compute
    if driver:
        items.append(driver)
    return RivalPlan(
        engine=ask.version.engine,
        version=ask.version.text,
        kv=kv,
        compute_bytes=sum(item.n_bytes for item in compute),
        items=tuple(items),
        own_estimate_bytes=own,
        own_estimate_note=own_note,
        notes=(*ask.version.notes, *notes),
    )


def _kv_words(ask: _Ask, kind: str) -> str:
    owners: list[LayerSpec] = [layer for layer in ask.spec.kv_layers if layer.kind == kind]
    shapes = sorted({(layer.n_kv_heads, layer.head_dim) for layer in owners})
    return f"{len(owners)} layers own a cache: " + ", ".join(f"{h} KV heads * {d}" for h, d in shapes)
