"""What the attention of other engines does, layer by layer, on a given card: rules as data, each with its source.

A rule says no more than was read in source or proven by a log; everything else is "unknown", with the reason. Words:
`fused` stores no score matrix, `materialised` does, `offloaded` runs the layer on the CPU with nothing said, `refused`
means that the engine stops (or the kernel aborts) instead of running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headwise.errors import UsageError
from headwise.hardware.gpus import Gpu
from headwise.planner.rivals import GGML_KV, OLLAMA_ENGINE_SINCE, OLLAMA_OLD_KV, VLLM_KV
from headwise.planner.versions import EngineVersion, engine_version
from headwise.spec.layers import Kind, LayerSpec, ModelSpec

Verdict = Literal["fused", "materialised", "offloaded", "refused", "unknown"]
Fa = Literal["on", "off", "auto"]

_FATTN = "llama.cpp 0c1e57098 (2026-10-01) ggml/src/ggml-cuda/fattn.cu:541-755"
_CONTEXT = "llama.cpp 0c1e57098 (2026-10-01) src/llama-context.cpp:506-558, 3840-3870"
_METAL = "llama.cpp 0c1e57098 (2026-10-01) ggml-metal-device.m:1727"
_VULKAN = "llama.cpp 0c1e57098 (2026-10-01) ggml-vulkan.cpp:15451"
_VLLM = "vLLM 0.33.0 model_executor/models/config.py:301-369, v1/attention/backends/fa_utils.py, platforms/cuda.py:160-181"
_VLLM_19 = "vLLM 0.19.0 model_executor/models/config.py:104"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What one engine does with one layer."""

    backend: str  # "ggml-cuda mma", "ggml CPU flash (silent)", "TRITON_ATTN", "FLASH_ATTN (FA4)"; "none" when refused
    verdict: Verdict
    why: str
    source: str
    notes: tuple[str, ...] = ()  # what holds beside the verdict: a KV type dropped, a version assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineExplanation:
    """What one engine does with a whole model: one choice per layer, in order, and what decided for all of them."""

    version: EngineVersion
    choices: tuple[EngineChoice, ...]
    notes: tuple[str, ...] = ()

    @property
    def proven_fused(self) -> bool:
        return all(choice.verdict == "fused" for choice in self.choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardTruth:
    """A card that people are told has no flash attention, and does."""

    cards: str
    claim: str
    truth: str
    source: str


CARDS_WITH_FLASH_ATTENTION: Sequence[CardTruth] = (
    CardTruth(
        cards="NVIDIA Pascal (GTX 10, P40, P100)",
        claim="no flash attention before Ampere",
        truth="ggml's tile and vec kernels run here; Ollama lets compute capability 6 and newer pass, but 7.2",
        source=f"{_FATTN}; Ollama fb3076099 ml/device.go FlashAttentionSupported",
    ),
    CardTruth(
        cards="NVIDIA Volta (V100)",
        claim="no flash attention before Ampere",
        truth="ggml's vec, tile and mma kernels run here; above head size 256 they need a multiple of 4 query heads "
        "per KV head, and Ollama 0.20.4 to 0.24 turned it off for Gemma 4",
        source=f"{_FATTN}; Ollama v0.20.4 llm/server.go:213-222; ollama#15641",
    ),
    CardTruth(
        cards="NVIDIA Turing (RTX 20, T4)",
        claim="no flash attention before Ampere",
        truth="ggml's mma kernels run from compute capability 7.5, at head size 512 too; vLLM runs its Triton kernel",
        source=f"{_FATTN}; {_VLLM}",
    ),
    CardTruth(
        cards="AMD RDNA2 (RX 6000)",
        claim="no flash attention on AMD before MI200",
        truth="ggml's tile and vec kernels are built for HIP as well; Ollama lets any ROCm card pass",
        source=f"{_FATTN}; Ollama fb3076099 ml/device.go FlashAttentionSupported",
    ),
    CardTruth(
        cards="AMD RDNA3 (RX 7000)",
        claim="needs HSA_OVERRIDE and AMD_SERIALIZE_KERNEL=3",
        truth="ggml's tile and vec kernels, and mma through WMMA for larger batches; its source reads no such variable",
        source=f"{_FATTN}; Ollama fb3076099 ml/device.go FlashAttentionSupported",
    ),
    CardTruth(
        cards="Apple silicon (Metal)",
        claim="no flash attention on Metal",
        truth="ggml-metal has kernels for head sizes 32 to 576, 512 among them; K and V must have the same type",
        source=_METAL,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One layer, one card, one setting: what a rule may look at."""

    version: EngineVersion
    layer: LayerSpec
    gpu: Gpu
    k: str
    v: str
    family: str
    mixed_heads: bool  # the model has more than one head size
    multimodal: bool
    driver_major: int | None
    head_512: bool | None  # whether this ggml has kernels for head size 512; None = not established
    all_kv_pairs: bool | None  # whether its CUDA kernels take any K with any V
    even_group: bool = False  # its 512 kernel wants an even number of query heads per KV head, not any from 2

    @property
    def cc(self) -> tuple[int, int]:
        return self.gpu.capability or (0, 0)

    @property
    def quantised_v(self) -> bool:
        return GGML_KV[self.v].quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A row: the first whose condition holds decides. `why` may name {head_dim}, {group}, {k}, {v} and {card}."""

    when: Callable[[_Case], bool]
    backend: str
    verdict: Verdict
    why: str
    source: str


def engine_choice(
    engine: str,
    version: str | None,
    layer: LayerSpec,
    gpu: Gpu,
    kv: str,
    *,
    kv_v: str | None = None,
    fa: Fa = "auto",
    family: str = "",
    mixed_heads: bool | None = None,
    multimodal: bool = False,
    driver_major: int | None = None,
    backend_per_kind: Mapping[Kind, str] | None = None,
) -> EngineChoice:
    """What `engine` does with `layer` on `gpu`, were it the only layer; `explain_engine` applies the whole-model rules.

    Args:
        kv: type of K, and of V unless `kv_v` names another (llama.cpp only).
        fa: llama.cpp's `-fa`; Ollama: OLLAMA_FLASH_ATTENTION 1, 0 or not set. vLLM has no such switch: "auto".
        family: `ModelSpec.family`; Ollama's defaults depend on it.
        mixed_heads: the model has several head sizes; None = judge by this layer (Gemma 4's global 512).
        multimodal: vLLM loads the model as its image-and-text class.
        driver_major: of the CUDA driver, where it is known; Ollama tests it.
        backend_per_kind: vLLM's `--attention-config` of that name, by our kinds.
    Raises:
        UsageError: an engine, KV type or setting that does not exist there, with what does.
    """
    found = engine_version(engine, version)
    case = _Case(
        version=found,
        layer=layer,
        gpu=gpu,
        k=kv.lower(),
        v=(kv_v or kv).lower(),
        family=family,
        mixed_heads=layer.head_dim > 256 if mixed_heads is None else mixed_heads,
        multimodal=multimodal,
        driver_major=driver_major,
        head_512=None,
        all_kv_pairs=None,
    )
    if found.engine != "vllm" and backend_per_kind:
        raise UsageError(f"{found.engine} has no backend per kind of layer", why="vLLM has", do="drop the setting")
    if found.engine != "llama.cpp" and case.k != case.v:
        raise UsageError(f"{found.engine} has one KV type for K and V", why=f"K {case.k}, V {case.v}", do="give one type")
    if found.engine == "llama.cpp":
        choice = _llama_cpp(case, fa)
    elif found.engine == "ollama":
        choice = _ollama(case, fa)
    else:
        choice = _vllm(case, fa, backend_per_kind or {})
    return replace(choice, notes=(*found.notes, *choice.notes))


def explain_engine(
    engine: str,
    version: str | None,
    spec: ModelSpec,
    gpu: Gpu,
    kv: str,
    *,
    kv_v: str | None = None,
    fa: Fa = "auto",
    multimodal: bool = False,
    driver_major: int | None = None,
    backend_per_kind: Mapping[Kind, str] | None = None,
) -> EngineExplanation:
    """What `engine` does with every layer of `spec`: as `engine_choice`, then what one layer decides for all.

    llama.cpp's `auto` (and Ollama's, from 0.30 and in its llamarunner) turns flash attention off for every layer as
    soon as one layer's node lands on another device; one refused layer stops the whole model.
    """
    found = engine_version(engine, version)
    seen: dict[tuple[int, int, int, Kind], EngineChoice] = {}
    choices: list[EngineChoice] = []
    for layer in spec.layers:
        shape = (layer.head_dim, layer.n_heads, layer.n_kv_heads, layer.kind)
        if shape not in seen:
            seen[shape] = engine_choice(
                engine,
                version,
                layer,
                gpu,
                kv,
                kv_v=kv_v,
                fa=fa,
                family=spec.family,
                mixed_heads=len({layer.head_dim for layer in spec.layers}) > 1,
                multimodal=multimodal,
                driver_major=driver_major,
                backend_per_kind=backend_per_kind,
            )
        choices.append(seen[shape])
    notes = list(found.notes)
    refused = next((i for i, choice in enumerate(choices) if choice.verdict == "refused"), None)
    if refused is not None:
        notes.append(f"layer {refused} stops the whole model")
        choices = [choices[refused]] * len(choices)
    elif _probes(found, fa, spec.family, kv_v or kv):
        # a layer without a kernel decides for all; so does one that is not known, if none is known to lack it
        verdicts = [choice.verdict for choice in choices]
        decides: Verdict = "materialised" if "materialised" in verdicts else "unknown"
        if decides in verdicts and len(set(verdicts)) > 1:
            i = verdicts.index(decides)
            notes.append(f"all or nothing: layer {i} decides for all {len(choices)} layers")
            choices = [replace(choices[i], why=f"layer {i} decides for all: {choices[i].why}")] * len(choices)
    return EngineExplanation(version=found, choices=tuple(choices), notes=tuple(notes))


def _first(rules: Sequence[_Rule], case: _Case) -> EngineChoice:
    rule = next(rule for rule in rules if rule.when(case))
    words = {
        "head_dim": case.layer.head_dim,
        "group": case.layer.group,
        "k": case.k,
        "v": case.v,
        "card": case.gpu.label,
    }
    return EngineChoice(
        backend=rule.backend, verdict=rule.verdict, why=rule.why.format(**words), source=rule.source.format(**words)
    )


# --- ggml: which kernel would take this layer's flash attention node ------------------------------------------------

_CPU = "ggml CPU flash (silent)"
_SAME_PAIRS = ("f16", "bf16", "q4_0", "q8_0")  # default builds before #28079, K and V alike
_CUDA_HEADS = (40, 64, 72, 80, 96, 112, 128, 256, 512)
_METAL_HEADS = (32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 512, 576)


def _volta(case: _Case) -> bool:
    return case.gpu.api == "cuda" and (7, 0) <= case.cc < (7, 5)


_GGML_CUDA: Sequence[_Rule] = (
    _Rule(
        when=lambda c: c.gpu.api == "cuda" and c.gpu.capability is None,
        backend="unknown",
        verdict="unknown",
        why="the compute capability of {card} is not known, and the kernel depends on it",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: c.layer.head_dim not in _CUDA_HEADS,
        backend=_CPU,
        verdict="offloaded",
        why="no CUDA or HIP kernel has head size {head_dim}",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: "iq4_nl" in (c.k, c.v),
        backend=_CPU,
        verdict="offloaded",
        why="iq4_nl is accepted by the flag, and no CUDA or HIP kernel reads it",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: c.all_kv_pairs is False and not (c.k == c.v and c.k in _SAME_PAIRS),
        backend=_CPU,
        verdict="offloaded",
        why="K {k} with V {v}: before #28079 default builds had f16, bf16, q4_0 and q8_0 only, with K and V alike",
        source="llama.cpp #28079 (merged September 2026); measured there: #27150, #28456, #27109, #24485",
    ),
    _Rule(
        when=lambda c: c.all_kv_pairs is None and not (c.k == c.v and c.k in _SAME_PAIRS),
        backend="unknown",
        verdict="unknown",
        why="K {k} with V {v} needs #28079 (September 2026); whether this build has it is not established",
        source="llama.cpp #28079",
    ),
    _Rule(
        when=lambda c: c.layer.head_dim > 256 and c.head_512 is False,
        backend=_CPU,
        verdict="offloaded",
        why="no kernel of head size {head_dim} in this ggml: the scheduler puts the layer on the CPU, and ships K, V "
        "and mask there each batch",
        source="llama.cpp PR #20998 (b8609); ollama#15350, #15237, #15634",
    ),
    _Rule(
        when=lambda c: c.layer.head_dim > 256 and c.head_512 is None,
        backend="unknown",
        verdict="unknown",
        why="kernels of head size {head_dim} came with b8609; whether this build is older is not established",
        source="llama.cpp PR #20998",
    ),
    _Rule(
        when=lambda c: c.layer.head_dim > 256 and (c.layer.group < 2 or (c.even_group and c.layer.group % 2 == 1)),
        backend=_CPU,
        verdict="offloaded",
        why="head size {head_dim} needs grouped queries, and this layer has {group} query heads per KV head",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: _volta(c) and c.layer.head_dim > 256 and c.layer.group % 4 != 0,
        backend="none",
        verdict="refused",
        why="on Volta the kernel aborts above head size 256 unless 4 divides the query heads per KV head, {group} here",
        source="llama.cpp 0c1e57098 (2026-10-01) ggml-cuda/fattn.cu switch_ncols2",
    ),
    _Rule(
        when=lambda c: c.gpu.api == "rocm",
        backend="ggml-hip tile, vec",
        verdict="fused",
        why="HIP builds run the tile and vec kernels on any AMD card, and mma where it has MFMA or WMMA",
        source=_FATTN,
    ),
    _Rule(
        when=_volta,
        backend="ggml-cuda vec, tile, mma",
        verdict="fused",
        why="Volta runs vec, tile or mma by batch size, at head size {head_dim}",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: c.cc < (7, 0),
        backend="ggml-cuda tile, vec",
        verdict="fused",
        why="Pascal and older run tile and vec at head size {head_dim}",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: c.layer.head_dim > 256,
        backend="ggml-cuda mma",
        verdict="fused",
        why="tensor cores from compute capability 7.5, at head size {head_dim}",
        source=_FATTN,
    ),
    _Rule(
        when=lambda c: True,
        backend="ggml-cuda mma, vec",
        verdict="fused",
        why="tensor cores from compute capability 7.5; vec for one or two queries at head size {head_dim}",
        source=_FATTN,
    ),
)

_GGML_METAL: Sequence[_Rule] = (
    _Rule(
        when=lambda c: not 32 <= c.layer.head_dim <= 576,
        backend=_CPU,
        verdict="offloaded",
        why="Metal kernels have head sizes 32 to 576, not {head_dim}",
        source=_METAL,
    ),
    _Rule(
        when=lambda c: c.layer.head_dim not in _METAL_HEADS,
        backend="unknown",
        verdict="unknown",
        why="whether Metal has a kernel of head size {head_dim} was not read",
        source=_METAL,
    ),
    _Rule(
        when=lambda c: c.k != c.v,
        backend=_CPU,
        verdict="offloaded",
        why="K {k} with V {v}: Metal kernels want K and V of one type",
        source=_METAL,
    ),
    _Rule(
        when=lambda c: c.k == "iq4_nl",
        backend=_CPU,
        verdict="offloaded",
        why="iq4_nl is accepted by the flag, and no Metal kernel reads it",
        source=_METAL,
    ),
    _Rule(
        when=lambda c: c.layer.head_dim == 512 and c.head_512 is False,
        backend=_CPU,
        verdict="offloaded",
        why="Metal kernels of this ggml go to 256 and 576, not to 512: the scheduler puts the layer on the CPU",
        source="Ollama v0.20.2 ggml-metal-device.m:1074-1086; ollama#15350",
    ),
    _Rule(
        when=lambda c: c.layer.head_dim == 512 and c.head_512 is None,
        backend="unknown",
        verdict="unknown",
        why="which build brought head size 512 to Metal is not established",
        source=_METAL,
    ),
    _Rule(
        when=lambda c: True,
        backend="ggml-metal",
        verdict="fused",
        why="head size {head_dim}, where the GPU has simdgroup matrix multiply",
        source=_METAL,
    ),
)

_GGML_VULKAN: Sequence[_Rule] = (
    _Rule(
        when=lambda c: c.layer.head_dim % 8 == 0,
        backend="ggml-vulkan",
        verdict="fused",
        why="any head size that 8 divides, with all nine KV types",
        source=_VULKAN,
    ),
    _Rule(
        when=lambda c: True,
        backend=_CPU,
        verdict="offloaded",
        why="head size {head_dim} is no multiple of 8",
        source=_VULKAN,
    ),
)


def _ggml_kernel(case: _Case) -> EngineChoice:
    rules = {"cuda": _GGML_CUDA, "rocm": _GGML_CUDA, "metal": _GGML_METAL, "vulkan": _GGML_VULKAN}.get(case.gpu.api)
    if rules is None:
        return _unknown(f"ggml's {case.gpu.api} backend was not read", "nothing read")
    choice = _first(rules, case)
    quantised = GGML_KV[case.k].quantised or case.quantised_v
    if choice.verdict == "fused" and case.gpu.api in ("cuda", "rocm") and case.layer.head_dim > 256 and quantised:
        choice = replace(choice, notes=("every step first converts the whole quantised cache of this layer to f16",))
    return choice


def _unknown(why: str, source: str) -> EngineChoice:
    return EngineChoice(backend="unknown", verdict="unknown", why=why, source=source)


def _materialised(why: str, source: str) -> EngineChoice:
    return EngineChoice(backend="ggml matmul and softmax", verdict="materialised", why=why, source=source)


def _refused(why: str, source: str) -> EngineChoice:
    return EngineChoice(backend="none", verdict="refused", why=why, source=source)


# --- llama.cpp ------------------------------------------------------------------------------------------------------

_PROBE = "auto's probe"


def _llama_cpp(case: _Case, fa: Fa) -> EngineChoice:
    version = case.version
    for name in (case.k, case.v):
        if name not in GGML_KV:
            raise UsageError(
                f"{version.engine} has no KV type {name!r}",
                why=f"it accepts {', '.join(GGML_KV)}",
                do="give one of those",
            )
    metal = case.gpu.api == "metal"
    case = replace(
        case,
        head_512=version.has("head_512_metal" if metal else "head_512_cuda"),
        all_kv_pairs=version.has("all_kv_pairs"),
    )
    blocks = max(GGML_KV[case.k].block, GGML_KV[case.v].block)
    if case.layer.head_dim % blocks:
        return _refused(f"blocks of {blocks} values do not divide head size {case.layer.head_dim}", _CONTEXT)
    if fa == "off":
        if case.quantised_v:
            return _refused(f'V is {case.v}: "quantized V cache requires flash_attn to be enabled"', _CONTEXT)
        return _materialised("flash attention is off", _CONTEXT)
    kernel = _ggml_kernel(case)
    if fa == "on" or kernel.verdict != "offloaded":
        return _with_auto_note(kernel, case, fa)
    if not case.quantised_v:
        why = f"{_PROBE} finds this layer's node on the CPU, and turns flash attention off for every layer ({kernel.why})"
        return _materialised(why, _CONTEXT)
    if version.has("quantised_v_forces_fa"):
        return _with_auto_note(kernel, case, fa)
    return _unknown(
        f"{kernel.why}; with V {case.v} this build's auto either becomes on, and the CPU runs the layer, or refuses to "
        "start: which builds have #25871 is not established",
        "llama.cpp #25871, #26553",
    )


def _with_auto_note(choice: EngineChoice, case: _Case, fa: Fa) -> EngineChoice:
    if fa == "on":
        note = "on skips the device probe: a layer without a kernel would run on the CPU with nothing said"
    elif case.quantised_v and case.version.has("quantised_v_forces_fa"):
        note = f"auto becomes on for V {case.v}, and skips the device probe (llama.cpp #26553)"
    else:
        return choice
    return replace(choice, notes=(*choice.notes, note))


# --- Ollama ---------------------------------------------------------------------------------------------------------

# llama.cpp builds that Ollama pins (LLAMA_CPP_VERSION), from each release on
_OLLAMA_PINS: Sequence[tuple[tuple[int, int, int], str]] = (
    ((0, 30, 0), "b9452"),
    ((0, 30, 11), "b9781"),
    ((0, 31, 0), "b9840"),
    ((0, 32, 0), "b9888"),
    ((0, 32, 15), "b10488"),
)
# first release whose FlashAttention() listed a family (fs/ggml/ggml.go): on without being asked
_OLLAMA_FA_SINCE: Mapping[str, tuple[int, int, int]] = {
    "gpt_oss": (0, 11, 8),
    "qwen3": (0, 12, 4),
    "qwen3_moe": (0, 12, 4),
    "gemma3": (0, 12, 6),
    "gemma4": (0, 20, 4),
}
_OLLAMA_SERVER = "Ollama fb3076099 llm/llama_server.go:597 LlamaServerFlashAttention, ml/device.go:571-600"
_OLLAMA_OLD = "Ollama v0.20.4 llm/server.go:195-262, ml/device.go:480"
_OLLAMA_GGML = "Ollama v0.13.0 to v0.24.0 ggml-cuda/fattn.cu, ggml-metal-device.m; ollama#15350, #15378"
_OLLAMA_057 = "Ollama v0.5.7 llm/server.go:209-231, discover/types.go:173, llama/ggml-cuda/ggml-cuda.cu:3051"


def _ollama(case: _Case, fa: Fa) -> EngineChoice:
    return _ollama_server(case, fa) if case.version.at_least(0, 30, 0) else _ollama_old(case, fa)


def _ollama_server(case: _Case, fa: Fa) -> EngineChoice:
    """0.30 and later: a llama-server child decides; the environment is passed on, and tested only when it is silent."""
    pin = [build for since, build in _OLLAMA_PINS if case.version.at_least(*since)][-1]
    note = f"llama-server {pin} decides; Ollama passes --flash-attn {fa} and the KV type unchecked"
    gate = _gate(case) if fa == "auto" else None
    if gate:
        note = f"Ollama passes --flash-attn off to llama-server {pin}: {gate}"
    choice = _llama_cpp(replace(case, version=engine_version("llama.cpp", pin)), "off" if gate else fa)
    return replace(choice, source=f"{choice.source}; {_OLLAMA_SERVER}", notes=(*choice.notes, note))


def _gate(case: _Case) -> str | None:
    """Why Ollama would not use flash attention on this card, or None (ml/device.go, discover/types.go)."""
    version, gpu = case.version, case.gpu
    if gpu.api in ("metal", "rocm") or (gpu.api == "vulkan" and version.at_least(0, 13, 0)):
        return None
    if gpu.api != "cuda":
        return f"its test knows CUDA, ROCm, Metal and Vulkan, not {gpu.api}"
    if case.driver_major is not None and case.driver_major < 7:
        return f"CUDA driver {case.driver_major} is older than 7"
    if gpu.capability == (7, 2) and version.at_least(0, 12, 4):
        return "compute capability 7.2 is excluded"
    if gpu.capability and gpu.capability < (6, 0) and version.at_least(0, 30, 0):
        return f"compute capability {'.'.join(map(str, gpu.capability))} is older than 6"
    return None


def _ollama_old(case: _Case, fa: Fa) -> EngineChoice:
    """To 0.24: a request (environment or default list), the card's test, Gemma 4's own test, then ggml's kernels."""
    version, family = case.version, case.family
    if case.k not in OLLAMA_OLD_KV:
        raise UsageError(
            f"{version} has no KV type {case.k!r}",
            why=f"it accepts {', '.join(OLLAMA_OLD_KV)}; for any other it warns and keeps f16",
            do="give one of those",
        )
    source = _OLLAMA_OLD if version.at_least(0, 13, 0) else _OLLAMA_057
    runs_own_engine = family in OLLAMA_ENGINE_SINCE and version.at_least(*OLLAMA_ENGINE_SINCE[family])
    off = _why_off(case, fa, runs_own_engine)
    if off or (fa == "auto" and not _on_by_default(version, family)):
        # without forced flash attention a quantised type is dropped, with one warning
        dropped = () if case.k == "f16" else (f"{case.k} is dropped, with one warning: the cache is f16",)
        case = replace(case, k="f16", v="f16")
        choice = _materialised(off, source) if off else _auto_probe(case)
        return replace(choice, notes=(*choice.notes, *dropped))
    choice = _old_kernel(case)
    note = '"enabling flash attention" in its log is this request, not evidence of what ran'
    return replace(choice, notes=(*choice.notes, note))


def _on_by_default(version: EngineVersion, family: str) -> bool:
    return family in _OLLAMA_FA_SINCE and version.at_least(*_OLLAMA_FA_SINCE[family])


def _why_off(case: _Case, fa: Fa, runs_own_engine: bool) -> str | None:
    """Why an Ollama before 0.30 does not ask for flash attention, or None; None too where llama.cpp's auto decides."""
    version = case.version
    if fa == "off":
        return "OLLAMA_FLASH_ATTENTION=0"
    if fa == "auto" and not _on_by_default(version, case.family):
        if not runs_own_engine and version.at_least(0, 13, 4):
            return None  # llamarunner passes auto
        family = case.family or "this family"
        return f"OLLAMA_FLASH_ATTENTION is not set, and {family} is not on this release's default list"
    gate = _gate(case)
    if gate:
        return f"flash attention is asked for, and not used: {gate}"
    if case.family == "gemma4" and version.at_least(0, 20, 4) and case.gpu.api == "cuda" and case.cc < (7, 5):
        return "Gemma 4 on a card older than Turing: switched off even when asked for, with a debug line only"
    return None


def _old_kernel(case: _Case) -> EngineChoice:
    """The kernels of the ggml that Ollama carried itself; read at v0.5.7 and from v0.13.0 to v0.24.0."""
    version, layer = case.version, case.layer
    if version.at_least(0, 13, 0):
        if case.gpu.api == "vulkan":
            return _unknown("the Vulkan kernels of the ggml in Ollama 0.13 to 0.24 were not read", _OLLAMA_GGML)
        own = replace(case, head_512=version.at_least(0, 20, 4), all_kv_pairs=False, even_group=True)
        return replace(_ggml_kernel(own), source=_OLLAMA_GGML)
    if version.at_least(0, 6, 0):
        return _unknown("the kernels of the ggml in Ollama 0.6 to 0.12 were not read", _OLLAMA_057)
    if case.gpu.api != "cuda":
        return _unknown(f"the {case.gpu.api} kernels of the ggml in Ollama 0.5 were not read", _OLLAMA_057)
    volta_or_newer = case.cc >= (7, 0)
    if layer.head_dim == 128 or (case.k == "f16" and (layer.head_dim in (64, 256) or volta_or_newer)):
        return EngineChoice(
            backend="ggml-cuda (vec, tile, wmma)",
            verdict="fused",
            why=f"head size {layer.head_dim} with {case.k} is supported",
            source=_OLLAMA_057,
        )
    why = f"head size {layer.head_dim} with {case.k} has no kernel: the layer runs on the CPU"
    return EngineChoice(backend=_CPU, verdict="offloaded", why=why, source=_OLLAMA_057)


def _auto_probe(case: _Case) -> EngineChoice:
    """llamarunner's auto: the bundled llama.cpp's probe, so a layer without a kernel turns it off for all."""
    kernel = _old_kernel(case)
    if kernel.verdict != "offloaded":
        return kernel
    return _materialised(f"{_PROBE} finds this layer's node on the CPU ({kernel.why})", _OLLAMA_OLD)


def _probes(version: EngineVersion, fa: Fa, family: str, v: str) -> bool:
    """Whether llama.cpp's all-or-nothing probe runs; a quantised V skips it where auto becomes on."""
    if fa != "auto" or version.engine == "vllm":
        return False
    if version.engine == "llama.cpp":
        return not (GGML_KV[v.lower()].quantised and version.has("quantised_v_forces_fa"))
    since = OLLAMA_ENGINE_SINCE.get(family)
    runs_own_engine = since is not None and version.at_least(*since) and not version.at_least(0, 30, 0)
    return not runs_own_engine


# --- vLLM -----------------------------------------------------------------------------------------------------------


def _fp8(case: _Case) -> bool:
    return case.k.startswith("fp8")


def _known_triton(case: _Case) -> bool:
    """Ampere, Ada, Turing and consumer Blackwell: Triton in the oldest and the newest release that were read."""
    return case.cc == (7, 5) or case.cc[0] == 12 or case.cc[0] == 8


_VLLM_MIXED: Sequence[_Rule] = (
    _Rule(
        when=lambda c: c.gpu.api != "cuda" or c.gpu.capability is None,
        backend="unknown",
        verdict="unknown",
        why="vLLM's choice was read for NVIDIA cards; {card} is not one whose compute capability is known",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: c.cc < (7, 5) or (8, 9) < c.cc < (9, 0) or c.cc[0] not in (7, 8, 9, 10, 12),
        backend="unknown",
        verdict="unknown",
        why="vLLM's choice for the compute capability of {card} was not read",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: not c.version.at_least(0, 19, 1),
        backend="TRITON_ATTN",
        verdict="fused",
        why="two head sizes in one model: Triton is forced for every layer; its kernel is flash-style, no score matrix",
        source=_VLLM_19,
    ),
    _Rule(
        when=_known_triton,
        backend="TRITON_ATTN",
        verdict="fused",
        why="FA4 wants compute capability 9, 10 or 11: Triton is forced for every layer, those of head size 256 too; "
        "its kernel is flash-style, with no score matrix",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: not c.version.at_least(0, 33, 0),
        backend="unknown",
        verdict="unknown",
        why="Triton for every layer in 0.19.0, FA4 in 0.33.0 (#42175): which release changed it is not established",
        source=f"{_VLLM_19}; {_VLLM}",
    ),
    _Rule(
        when=lambda c: c.cc[0] == 10,
        backend="unknown",
        verdict="unknown",
        why="FA4 does no head size 512 on this card (TMEM), and what takes its place was not traced to the end",
        source=f"{_VLLM}; vllm#48093",
    ),
    _Rule(
        when=lambda c: _fp8(c) and c.multimodal,
        backend="TRITON_ATTN",
        verdict="fused",
        why="an fp8 cache with image-and-text masks is refused inside FLASH_ATTN: Triton",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: _fp8(c) and c.layer.head_dim > 256,
        backend="FLASH_ATTN (FA4)",
        verdict="fused",
        why="fp8 cache: FA4 for head size {head_dim}, with pages of 64 tokens",
        source=f"{_VLLM}; vllm#48666",
    ),
    _Rule(
        when=_fp8,
        backend="FLASH_ATTN (FA3)",
        verdict="fused",
        why="fp8 cache: FA3 for head size {head_dim}",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: c.multimodal,
        backend="TRITON_FLASH_ATTN",
        verdict="fused",
        why="image-and-text class: batches with image masks run Triton, all others FA4",
        source=_VLLM,
    ),
    _Rule(
        when=lambda c: True,
        backend="FLASH_ATTN (FA4)",
        verdict="fused",
        why="FA4 for every layer, head size {head_dim} too, so that FA3 and FA4 are not mixed",
        source=f"{_VLLM}; vllm#42175",
    ),
)


def _vllm(case: _Case, fa: Fa, backend_per_kind: Mapping[Kind, str]) -> EngineChoice:
    if fa != "auto":
        raise UsageError("vLLM has no switch for flash attention", why="it chooses a backend", do="--attention-backend names one")
    if case.k not in VLLM_KV:
        raise UsageError(
            f"vLLM has no KV type {case.k!r} that is known here",
            why=f"it accepts {', '.join(VLLM_KV)}; its types with a scale per token and head are not modelled",
            do="give one of those",
        )
    wanted = backend_per_kind.get(case.layer.kind)
    if wanted is not None:
        return _vllm_asked(case, wanted.upper())
    if not case.mixed_heads:
        return _unknown("what vLLM chooses was read for models with two head sizes only", _VLLM)
    return _first(_VLLM_MIXED, case)


def _vllm_asked(case: _Case, backend: str) -> EngineChoice:
    """`backend_per_kind` (#48012): a backend that cannot is an error, never a fallback."""
    source = f"vllm#48012; {_VLLM}"
    if not case.version.at_least(0, 33, 0):
        return _unknown("which release brought backend_per_kind is not established; 0.33.0 has it", source)
    nvidia = case.gpu.api == "cuda" and case.gpu.capability is not None
    if nvidia and backend == "TRITON_ATTN" and case.cc >= (7, 5):
        return EngineChoice(backend=backend, verdict="fused", why="asked for by kind of layer", source=source)
    if nvidia and backend == "FLASH_ATTN":
        if case.cc < (8, 0) or (case.layer.head_dim > 256 and case.cc[0] not in (9, 10, 11)):
            why = f"FLASH_ATTN asked for, which {case.gpu.label} cannot run at head size {case.layer.head_dim}: an error"
            return _refused(why, source)
        if not _fp8(case) and case.cc[0] in (8, 9):
            return EngineChoice(backend=backend, verdict="fused", why="asked for by kind of layer", source=source)
    return _unknown(f"what {backend} does here was not read", source)
