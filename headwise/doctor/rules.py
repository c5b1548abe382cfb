"""From facts and verdicts to findings: what, why, evidence, how sure, and the cure for that engine and version."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from headwise.attention.engines import engine_choice, explain_engine
from headwise.doctor.checks import BY_ID
from headwise.doctor.facts import Fact, Load, amounts, evidence, pairs
from headwise.doctor.finding import Evidence, Finding, Severity
from headwise.doctor.proofs import BY_ID as PROOF
from headwise.doctor.verdicts import MIB, KvVerdict, LayerVerdict, caches, gpu_devices, graph_identity, is_gpu
from headwise.errors import HeadwiseError
from headwise.hardware.gpus import Gpu, known_gpu
from headwise.planner.rivals import GGML_KV, rival_plan
from headwise.spec.layers import ModelSpec

Sure = Literal["proven", "likely", "possible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a rule may look at."""

    load: Load
    version: str | None
    spec: ModelSpec | None
    gpus: tuple[Gpu, ...]
    layers: Sequence[LayerVerdict]
    kv: KvVerdict


def find(case: Case) -> list[Finding]:
    """Every finding, in the order of `RULES`."""
    return [f for rule in RULES for f in rule(case)]


def _finding(
    id: str,
    what: str,
    why: str,
    cure: str,
    *facts: Fact | None,
    sure: Sure = "proven",
    severity: Severity | None = None,
    also: Sequence[Evidence] = (),
) -> Finding:
    return Finding(
        id=id,
        severity=severity or BY_ID[id].severity,
        what=what,
        why=why,
        cure=cure,
        sure=sure,
        evidence=tuple(dict.fromkeys((*also, *evidence(*facts)))),
    )


def _layers(v: LayerVerdict) -> str:
    n = "" if v.count is None else f"{v.count} "
    return f"{n}{'' if v.kind == 'all' else v.kind + ' '}layers".replace("1 sliding layers", "1 sliding layer")


def environment(load: Load) -> dict[str, str]:
    found = load.last("ollama_env")
    return dict(pairs(found.text("env"))) if found else {}


# --- attention ---------------------------------------------------------------------------------------------------------


def _attention(case: Case) -> Iterator[Finding]:
    for verdict in ("offloaded", "materialised"):
        bad = [v for v in case.layers if v.verdict == verdict]
        if not bad:
            continue
        which = " and ".join(_layers(v) for v in bad)
        cpu = verdict == "offloaded"
        if cpu and bad[0].proof == "no-gpu":
            continue  # that finding is its own
        if cpu and all(v.proof == "layers-on-cpu" for v in bad):
            continue
        yield _finding(
            "attention-on-cpu" if cpu else "attention-materialised",
            f"the attention of {which} runs {'on the CPU' if cpu else 'without a fused kernel'}",
            _why(case, bad[0]),
            _attention_cure(case, bad[0]),
            also=[e for v in bad for e in v.evidence],
        )


def _why(case: Case, v: LayerVerdict) -> str:
    proof = PROOF[v.proof].why if v.proof else ""
    if v.proof == "cpu-graph-identity" and (identity := graph_identity(case.load, case.spec)):
        return (
            f"the CPU's compute graph is K, V, mask, queries and result of one global layer of {identity.model.name} over "
            f"{identity.tokens:,} tokens of {identity.kv}, to the last digit shown"
        )
    return proof


def _attention_cure(case: Case, v: LayerVerdict) -> str:
    load, engine = case.load, case.load.engine
    kv = case.kv.in_use or ""
    if v.proof == "cpu-graph-identity" or (engine == "ollama" and load.has("ol_request", "ol_memory") and v.verdict == "offloaded"):
        return "update Ollama to 0.20.4 or newer; until then OLLAMA_FLASH_ATTENTION=0 (and no OLLAMA_KV_CACHE_TYPE)"
    if v.proof == "graph-dump" and not gpu_devices(load):
        return "see no-gpu"
    if load.has("fa_forced_off"):
        return "an f16 V cache (OLLAMA_KV_CACHE_TYPE=f16, --cache-type-v f16): this architecture has no flash attention there"
    if load.has("ol_fa_pre_turing"):
        return "Ollama 0.30 or newer runs it on this card; 0.20.4 to 0.24 keep it off for Gemma 4 below compute capability 7.5"
    if load.has("ol_fa_no_gpu"):
        return "update the driver (7 or newer counts), and Ollama to 0.30 or newer"
    if v.proof == "off":
        return "OLLAMA_FLASH_ATTENTION=1" if engine == "ollama" else "-fa auto"
    if kv not in ("", "f16", "bf16", "f32", "q8_0"):
        return "--cache-type-k q8_0 --cache-type-v q8_0 (kernels exist for them), then look for `splits = 2`"
    mismatch = load.last("fa_mismatch")
    if mismatch is not None and case.kv.in_use not in (None, "f16", "bf16", "f32"):
        return "--cache-type-k q8_0 --cache-type-v q8_0, or a newer build"
    return "a newer build of the engine (head size 512 came with b8609 on CUDA), or -fa auto"


def _probe_skipped(case: Case) -> Iterator[Finding]:
    load = case.load
    forced, request = load.last("fa_forced_by_kv"), load.last("fa_request")
    on = request is not None and request.text("value") in ("enabled", "1")
    if (forced or on) and any(v.verdict == "unproven" for v in case.layers) and not load.has("fa_probe"):
        why = "a quantised V cache turns -fa auto into on, which checks nothing" if forced else "-fa on checks nothing"
        yield _finding(
            "probe-skipped",
            "no layer's attention was checked for its device",
            why,
            "run once with -lv 4 and look for `splits = 2`, or `headwise probe URL`",
            forced,
            request,
        )


def _splits(case: Case) -> Iterator[Finding]:
    load = case.load
    splits, offloaded = load.last("splits"), load.last("offloaded")
    if splits is None or offloaded is None or offloaded.whole("done") < offloaded.whole("of") or host_cache(load):
        return
    healthy = (len(gpu_devices(load)) or 1) + 1
    if splits.whole("pp") > healthy:
        off = (splits.whole("pp") - healthy) / 2
        exact = any(v.proof == "extra-splits" for v in case.layers)
        if any(v.verdict == "materialised" for v in case.layers) and not exact:
            return  # the attention is not fused anyway, and its nodes are elsewhere than one thinks
        yield _finding(
            "graph-splits",
            f"the graph has {splits.whole('pp')} splits where a healthy one has {healthy}",
            f"each attention node on the CPU adds two: {off:g} layers",
            "see attention-on-cpu",
            splits,
            offloaded,
            sure="proven" if exact else "likely",
            severity="problem" if exact else "warning",
        )


def _no_gpu(case: Case) -> Iterator[Finding]:
    bad = [v for v in case.layers if v.proof == "no-gpu"]
    devices = [f for f in case.load.all("gpu_device") if not is_gpu(f.text("device"))]
    no = case.load.last("no_gpu")
    alone = bool(devices) and len(devices) == len(case.load.all("gpu_device")) and not gpu_devices(case.load)
    if bad or no or alone:
        offloaded = case.load.last("offloaded")
        asked_none = offloaded is not None and offloaded.whole("done") == 0 and not no
        yield _finding(
            "no-gpu",
            "no layer is on a GPU" if asked_none else "the engine has no GPU backend",
            "all layers were left on the CPU" if asked_none else "every device it lists is the CPU",
            "-ngl 99 (Ollama: leave num_gpu out)"
            if asked_none
            else "install a build for your card (CUDA, HIP, Vulkan or Metal); in a container pass the device (--gpus all)",
            no,
            *devices[:1],
            also=[e for v in bad[:1] for e in v.evidence],
        )


def _host_cache(case: Case) -> Iterator[Finding]:
    if case.load.family == "ggml" and (found := host_cache(case.load)) and gpu_devices(case.load):
        yield _finding(
            "kv-in-host-memory",
            "the cache lies in host memory, the layers on the GPU",
            "K and V of every layer cross the bus at each step",
            "leave out --no-kv-offload (-nkvo)",
            *found[-2:],
        )


def host_cache(load: Load) -> list[Fact]:
    """The cache's buffers where all of them are in host memory."""
    used = [f for f in load.all("kv_buffer") if f.number("mib") > 0]
    return used if not any(is_gpu(f.text("device")) for f in used) else []


def _partial(case: Case) -> Iterator[Finding]:
    offloaded = case.load.last("offloaded")
    if offloaded is not None and 0 < offloaded.whole("done") < offloaded.whole("of"):
        left = offloaded.whole("of") - offloaded.whole("done")
        yield _finding(
            "layers-on-cpu",
            f"{left} of {offloaded.whole('of')} layers are not on the GPU",
            "each token waits for the CPU's memory",
            _fit_cure(case),
            offloaded,
        )
    for ps in case.load.all("ol_ps"):
        if "CPU" in ps.text("where"):
            yield _finding(
                "layers-on-cpu",
                f"{ps.text('model')} is partly on the CPU: {ps.text('where')}",
                "each token waits for it",
                _fit_cure(case),
                ps,
            )


def _fit_cure(case: Case) -> str:
    if case.load.engine == "ollama":
        return "a smaller num_ctx, or OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE=q8_0; `headwise plan` says what fits"
    return "-ngl 99 with a smaller -c, or --cache-type-k q8_0 --cache-type-v q8_0; `headwise plan` says what fits"


# --- the cache ------------------------------------------------------------------------------------------------------------


def _kv(case: Case) -> Iterator[Finding]:
    load, kv = case.load, case.kv
    old = (load.engine == "ollama" and not load.has("command")) or load.has("ol_kv_dropped")
    if kv.verdict == "refused":
        cure = "-fa auto, or --cache-type-v f16"
        if load.has("fa_forced_off"):
            cure = "--cache-type-v f16 (OLLAMA_KV_CACHE_TYPE=f16): this architecture has no flash attention there"
        elif load.engine == "ollama":
            cure = "unset OLLAMA_FLASH_ATTENTION=0, or OLLAMA_KV_CACHE_TYPE=f16"
        yield _finding(
            "kv-type-refused",
            f"the engine refused a cache of {kv.requested or 'this type'}",
            "a quantised V needs flash attention, and blocks that divide the head size",
            cure,
            also=kv.evidence,
        )
    if kv.verdict == "ignored":
        cure = (
            "OLLAMA_FLASH_ATTENTION=1 with OLLAMA_KV_CACHE_TYPE=q8_0 (or q4_0); any type from Ollama 0.30 on" if old else "update"
        )
        yield _finding(
            "kv-type-ignored",
            f"{kv.requested} was asked for, {kv.in_use} is in use",
            "the engine dropped the request with one warning",
            cure,
            also=kv.evidence,
        )
    empty = [f for f in load.all("ol_kv_dropped") if f.text("type").strip('"') == "" and '""' in f.where.text]
    if empty:
        yield _finding(
            "kv-empty-type", 'the warning about type="" is a false alarm', "no KV type was asked for", "nothing to do", empty[-1]
        )
    if converted := load.last("kv_converted"):
        yield _finding(
            "kv-converted",
            f"K {converted.text('k')} with V {converted.text('v')} is converted to f16 each step",
            "no kernel was compiled for that pair",
            "--cache-type-k q8_0 --cache-type-v q8_0",
            converted,
        )
    yield from _kv_kernel(case)
    yield from _swa(case)
    yield from _scratch(case)


def _api(load: Load) -> str | None:
    names = {
        f.text("device").rstrip("0123456789")
        for n in ("kv_buffer", "compute_buffer", "model_buffer", "gpu_device", "gpu_using")
        for f in load.all(n)
    }
    for name, api in (("CUDA", "cuda"), ("ROCm", "rocm"), ("Metal", "metal"), ("MTL", "metal"), ("Vulkan", "vulkan")):
        if name in names:
            return api
    return "cuda" if load.has("gpu_cuda") else "rocm" if load.has("gpu_rocm") else "metal" if load.has("gpu_metal") else None


def _kv_kernel(case: Case) -> Iterator[Finding]:
    api = _api(case.load)
    for cache in caches(case.load):
        wrong = None
        if api in ("cuda", "rocm") and "iq4_nl" in (cache.k, cache.v):
            wrong = "no CUDA or HIP kernel reads iq4_nl"
        elif api == "metal" and cache.k != cache.v:
            wrong = f"Metal kernels want K and V of one type, here {cache.k} and {cache.v}"
        elif api == "metal" and cache.k == "iq4_nl":
            wrong = "no Metal kernel reads iq4_nl"
        if wrong is None and case.gpus and case.spec and case.version and case.load.engine == "llama.cpp" and cache.k in GGML_KV:
            with contextlib.suppress(HeadwiseError):  # what its version's source has kernels for
                layer = next(x for x in case.spec.layers if cache.kind in ("all", x.kind))
                choice = engine_choice("llama.cpp", case.version, layer, case.gpus[0], cache.k, kv_v=cache.v, fa="on")
                wrong = choice.why if choice.verdict == "offloaded" else None
        if wrong:
            proven = any(v.verdict == "offloaded" for v in case.layers)
            yield _finding(
                "kv-type-without-kernel",
                f"K {cache.k} with V {cache.v} has no kernel on this card",
                wrong,
                "--cache-type-k q8_0 --cache-type-v q8_0",
                cache.fact,
                sure="proven" if proven else "likely",
                severity="problem" if proven else "warning",
            )
            return


def _swa(case: Case) -> Iterator[Finding]:
    load = case.load
    found = {c.kind: c for c in caches(load)}
    sliding, whole = found.get("sliding"), found.get("global")
    full = load.last("swa_full")
    if full is not None or (sliding and whole and sliding.cells == whole.cells and (whole.cells or 0) > _ring(load, 1)):
        facts = [full, sliding.fact if sliding else None]
        waste = ""
        if sliding and sliding.cells:
            need = min(sliding.cells, _ring(load, _slots(load)))
            spare = sliding.n_bytes - sliding.n_bytes * need // sliding.cells
            waste = f": {spare / 2**30:.2f} GiB of {sliding.n_bytes / 2**30:.2f} are never read" if spare else ""
        if full is not None or waste:
            yield _finding(
                "swa-full",
                f"the sliding layers hold the whole context{waste}",
                "a sliding layer reads its window only",
                "leave out --swa-full (in a front end: turn full-size SWA off)",
                *facts,
            )
    elif sliding and sliding.cells and (n := _slots(load)) > 1 and sliding.cells > _ring(load, 1):
        one = sliding.n_bytes * _ring(load, 1) // sliding.cells
        yield _finding(
            "slots-times-window",
            f"{n} slots hold {n} windows: {sliding.n_bytes / 2**30:.2f} GiB where one slot needs {one / 2**30:.2f}",
            "the sliding cache is window times slots plus a batch",
            "-np 1 for one user",
            sliding.fact,
            load.last("slots"),
        )


def _slots(load: Load) -> int:
    if f := load.last("slots"):
        return max(1, f.whole("slots"))
    for f in load.all("setting"):
        if f.text("key") == "n_seq_max":
            return max(1, f.whole("value"))
    return 1


def _setting(load: Load, key: str) -> int | None:
    found = [f for f in load.all("setting") if f.text("key") == key]
    return found[-1].whole("value") if found else None


def _ring(load: Load, slots: int) -> int:
    """Cells that sliding layers need: window times slots plus one micro-batch, in whole 256."""
    window = next((f.whole("value") for f in load.all("model") if f.text("key") == "n_swa"), 0)
    window = window or next(
        (f.whole("value") for f in load.all("metadata") if f.text("key").endswith("attention.sliding_window")), 1024
    )
    return -(-(window * slots + (_setting(load, "n_ubatch") or 512)) // 256) * 256


def _scratch(case: Case) -> Iterator[Finding]:
    if _api(case.load) not in ("cuda", "rocm") or case.spec is None:
        return
    wide = [x for x in case.spec.layers if x.head_dim > 256]
    for cache in caches(case.load):
        if wide and cache.kind in ("global", "all") and cache.cells and cache.k in GGML_KV and GGML_KV[cache.k].quantised:
            n = cache.cells * 2 * wide[0].n_kv_heads * wide[0].head_dim * 2
            yield _finding(
                "kv-f16-scratch",
                f"{n / MIB:,.0f} MiB of the compute buffer hold one layer's cache in f16",
                f"head size {wide[0].head_dim} with a {cache.k} cache is converted each step",
                "count it, or f16 there",
                cache.fact,
            )


# --- memory, context, time --------------------------------------------------------------------------------------------


def _gpus(case: Case) -> Iterator[Finding]:
    devices = sorted(gpu_devices(case.load))
    if len(devices) > 1:
        shares = [f"{d}: {_held(case.load, d) / 2**30:.1f} GiB" for d in devices]
        yield _finding(
            "several-gpus",
            f"the model lies on {len(devices)} cards ({', '.join(shares)})",
            "a split by layers adds memory, not speed",
            "one card, if `headwise plan` says that it fits",
            *[f for f in case.load.all("kv_buffer") + case.load.all("ol_memory") if is_gpu(f.text("device"))][-2:],
        )


def memory_of(load: Load) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """Devices and what they hold, labelled; of each buffer the last line, since dry runs come first."""
    held: dict[str, dict[str, float]] = {}
    for name, label in (("model_buffer", "weights"), ("kv_buffer", "KV cache"), ("compute_buffer", "compute")):
        for f in load.all(name):
            if f.number("mib") > 0:
                mine = held.setdefault(f.text("device"), {})
                whole = [x.number("mib") for x in load.all(name) if x.text("device") == f.text("device") and x.number("mib") > 0]
                mine[label] = (sum(whole[-2:]) if name == "kv_buffer" else max(whole)) * MIB
    for f in load.all("ol_memory"):
        label = {"model weights": "weights", "kv cache": "KV cache", "compute graph": "compute"}[f.text("what")]
        with contextlib.suppress(ValueError):
            held.setdefault(f.text("device"), {})[label] = amounts(f.text("size"))[0]
    for device, parts in sorted(held.items()):
        yield device, tuple((label, round(n)) for label, n in parts.items())


def _held(load: Load, device: str) -> float:
    return sum(n for name, parts in memory_of(load) if name == device for _, n in parts)


def _estimates(case: Case) -> Iterator[Finding]:
    load = case.load
    if old := load.last("ol_estimate"):
        full, weights = amounts(old.text("full"))[0], amounts(old.text("weights"))[0]
        kv, graph = amounts(old.text("kv"))[0], amounts(old.text("graph"))[0]
        need = weights + kv + min(graph, 0.05 * weights + 0.25 * 2**30)  # a graph with flash attention: mask, logits, one layer
        if full > 1.2 * need:
            yield _finding(
                "estimate-off",
                f"the estimate of {full / 2**30:.1f} GiB is {full / need:.1f} times the need",
                f"weights {weights / 2**30:.1f}, cache {kv / 2**30:.2f} GiB; its graph of {graph / 2**30:.2f} GiB is a formula "
                "that knows no flash attention",
                "`headwise plan MODEL --engine ollama` beside `headwise plan MODEL`",
                old,
                sure="likely",
            )
        if old.whole("done") == 0 and old.whole("of"):
            yield _finding(
                "layers-on-cpu",
                f"0 of {old.whole('of')} layers are on the GPU",
                f"{old.text('available')} were free",
                _fit_cure(case),
                old,
            )
    if fit := load.last("fit"):
        held = sum(_held(load, d) for d in gpu_devices(load)) / MIB
        if held and not 0.8 <= fit.number("need") / held <= 1.25:
            yield _finding(
                "estimate-off",
                f"{fit.whole('need'):,} MiB were projected, {held:,.0f} are allocated",
                "the two differ by more than a fifth",
                "--fit off and your own -c",
                fit,
                sure="likely",
            )


def _context(case: Case) -> Iterator[Finding]:
    load = case.load
    slots = load.last("slots")
    mine = slots.whole("context") if slots else _setting(load, "n_ctx_seq") or _setting(load, "n_ctx")
    asked = load.last("ol_request")
    mine = mine or (asked.whole("kv_size") if asked else None)
    trained = (
        case.spec.max_context
        if case.spec
        else next((f.whole("value") for f in load.all("model") if f.text("key") == "n_ctx_train"), None)
    )
    whole = _setting(load, "n_ctx")
    if slots and whole and slots.whole("slots") > 1 and slots.whole("context") * slots.whole("slots") == whole:
        yield _finding(
            "context-in-use",
            f"each of {slots.whole('slots')} slots has {slots.whole('context'):,} of {whole:,} tokens",
            "the context is divided by the slots",
            "-np 1, or --kv-unified",
            slots,
            severity="warning",
        )
    elif mine and trained and mine < trained:
        fact = slots or asked or next((f for f in load.all("setting") if f.text("key") == "n_ctx"), None)
        yield _finding(
            "context-in-use",
            f"{mine:,} tokens of the model's {trained:,} are in use",
            "that is what the server was given",
            "num_ctx, or OLLAMA_CONTEXT_LENGTH" if load.engine == "ollama" else "-c N",
            fact,
        )
    if cut := load.last("truncated_prompt"):
        yield _finding(
            "prompt-truncated",
            f"a prompt of {cut.whole('tokens'):,} tokens was cut to {cut.whole('limit'):,}",
            "num_ctx is smaller than the prompt; the middle was dropped",
            "a larger num_ctx (OLLAMA_CONTEXT_LENGTH)",
            cut,
        )
    if long := load.last("too_long"):
        yield _finding(
            "prompt-truncated",
            f"a prompt of {long.whole('tokens'):,} tokens was refused: {long.whole('context'):,} fit",
            "the slot's context is smaller",
            "-c N, or fewer slots (-np 1)",
            long,
        )
    shifted = load.last("context_shift") or next((f for f in load.all("released") if f.whole("truncated")), None)
    if shifted:
        yield _finding(
            "prompt-truncated", "a sequence outgrew its context and lost its beginning", "the context was full", "-c N", shifted
        )


def _slope(case: Case) -> Iterator[Finding]:
    """Time per token of a prompt's batches against their position: growing in step means attention on the CPU."""
    tasks: dict[str, list[Fact]] = {}
    for f in case.load.all("progress"):
        tasks.setdefault(f.text("task"), []).append(f)
    for points in tasks.values():
        found = slope([(0.0, 0.0), *((f.number("done"), f.number("seconds")) for f in points)])
        if (
            found
            and found[1] > SUSPECT
            and points[-1].number("done") <= 65_536
            and not any(v.proof == "no-gpu" for v in case.layers)
        ):
            yield _finding(
                "prefill-slope",
                f"the last batch of a prompt took {found[0]:.1f} times the first",
                "time per token grows in step with the position, as attention on the CPU does",
                "see attention-on-cpu",
                points[0],
                points[-1],
                sure="likely",
            )
            return


# Share of a batch's time that grows with its position. On a GPU, Gemma 4 31B's attention is half of a batch at 128K tokens.
SUSPECT = 0.8


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(last rate over first, share of the last batch's time that grew with position) of cumulated (tokens, seconds).

    None with fewer than four batches.
    """
    rates = [((a[0] + b[0]) / 2, (b[1] - a[1]) / (b[0] - a[0])) for a, b in itertools.pairwise(points) if b[0] > a[0]]
    if len(rates) < 4 or rates[0][1] <= 0:
        return None
    n = len(rates)
    mean_x, mean_y = sum(x for x, _ in rates) / n, sum(y for _, y in rates) / n
    spread = sum((x - mean_x) ** 2 for x, _ in rates)
    grow = sum((x - mean_x) * (y - mean_y) for x, y in rates) / spread
    end = mean_y + grow * (rates[-1][0] - mean_x)
    return rates[-1][1] / rates[0][1], (grow * rates[-1][0] / end if end > 0 else 0.0)


# --- vLLM, settings, the rest -----------------------------------------------------------------------------------------


def _vllm(case: Case) -> Iterator[Finding]:
    load = case.load
    if load.has("vl_heads", "vl_forced"):
        does = ""
        if case.spec and case.gpus and case.version:
            with contextlib.suppress(HeadwiseError):
                choice = explain_engine("vllm", case.version, case.spec, case.gpus[0], "auto").choices[-1]
                does = f"; by its source {case.version} takes {choice.backend} on {case.gpus[0].label}: {choice.why}"
        backend = load.last("vl_backend")
        name = backend.text("backend") if backend else "one backend"
        yield _finding(
            "vllm-one-backend",
            f"{name} serves every kind of layer",
            f"the head sizes differ, and vLLM mixes backends only where it is told to{does}",
            "nothing to do; to try a mix: --attention-config '{\"backend_per_kind\": {...}}'",
            load.last("vl_heads"),
            load.last("vl_forced"),
            backend,
        )
    if rates := load.last("vl_rates"):
        yield _finding(
            "vllm-average-rates",
            "the rates in this log are means over ten seconds",
            "idle time counts in them",
            "headwise probe URL",
            rates,
            sure="possible",
        )
    for name in ("vl_refused", "vl_refused_context"):
        if refused := load.last(name):
            cure = "leave out --attention-backend" if name == "vl_refused" else "a smaller --max-model-len, or --kv-cache-dtype fp8"
            yield _finding("vllm-refused", "vLLM refused to start", refused.text("why") or "the cache does not fit", cure, refused)


def _settings(case: Case) -> Iterator[Finding]:
    env, fact = environment(case.load), case.load.last("ollama_env")
    yield from settings(
        env, evidence(fact), "ollama", [f.text("gfx") for f in case.load.all("gpu_rocm") + case.load.all("gpu_rocminfo")]
    )


def settings(env: dict[str, str], where: Sequence[Evidence], engine: str, gfx: Sequence[str] = ()) -> Iterator[Finding]:
    """What of a server's environment slows it or does nothing."""
    for name in ("AMD_SERIALIZE_KERNEL", "AMD_SERIALIZE_COPY", "HIP_LAUNCH_BLOCKING", "CUDA_LAUNCH_BLOCKING"):
        if env.get(name, "0") not in ("", "0"):
            yield _finding(
                "setting-that-slows",
                f"{name}={env[name]} serialises every kernel",
                "it is a debugging switch",
                f"unset {name}" if engine != "ollama" else f"systemctl edit ollama, and remove {name}",
                also=where,
            )
    if over := env.get("HSA_OVERRIDE_GFX_VERSION", "").strip('"'):
        own = ", ".join(dict.fromkeys(gfx))
        yield _finding(
            "setting-without-effect",
            f"HSA_OVERRIDE_GFX_VERSION={over} does not turn attention on",
            f"ROCm loads another card's kernels{f' on {own}' if own else ''}; attention does not read it",
            "keep it only where the build has no kernels for the card's own gfx name (rocminfo shows it)",
            also=where,
        )


def _known_fault(case: Case) -> Iterator[Finding]:
    """What the rules of `explain --engine` say of this version, where the log itself proves nothing."""
    if case.spec is None or not case.gpus or not case.version or any(v.verdict != "unproven" for v in case.layers):
        return
    request = case.load.last("ol_request")
    asked = environment(case.load).get("OLLAMA_FLASH_ATTENTION", "").lower()
    on = asked in ("1", "true") or (request is not None and request.text("fa").lower() == "enabled")
    try:
        answer = explain_engine(
            case.load.engine, case.version, case.spec, case.gpus[0], case.kv.in_use or "f16", fa="on" if on else "auto"
        )
    except HeadwiseError:
        return
    bad = next((c for c in answer.choices if c.verdict in ("offloaded", "refused")), None)
    if bad is not None and (on or case.load.engine != "ollama"):
        yield _finding(
            "known-fault",
            f"{case.load.engine} {case.version} is known for {bad.backend} here",
            bad.why,
            "update the engine",
            request,
            case.load.last("version"),
            sure="likely",
        )


def _ps(case: Case) -> Iterator[Finding]:
    for ps in case.load.all("ol_ps"):
        if ps.text("where") == "100% GPU":
            yield _finding(
                "ps-is-no-proof",
                f"`100% GPU` of {ps.text('model')} proves nothing about attention",
                "all layers' weights are on the GPU; it was shown with attention on the CPU, too",
                "headwise probe URL, or the doctor on the server's log",
                ps,
            )
            return


def _quiet(case: Case) -> Iterator[Finding]:
    if any(v.verdict != "unproven" for v in case.layers) or case.kv.verdict == "refused":
        return
    engine = case.load.engine
    cure = {
        "llama.cpp": "start it once with -lv 4 (llama-server) and give that log, or `headwise probe URL`",
        "ollama": "OLLAMA_DEBUG=1 and a restart, then the new log; or `headwise probe http://127.0.0.1:11434`",
        "vllm": "the log from its start on, or `headwise probe URL`",
    }[engine]
    missing = "the probe's answer, graph splits and layers' devices" if engine != "vllm" else "the attention backend"
    yield _finding("log-too-quiet", "this log does not prove where attention runs", f"it lacks {missing}", cure)


def _plan(case: Case) -> Iterator[Finding]:
    """The planner's cache beside the engine's."""
    spec, found = case.spec, caches(case.load)
    cells = [c for c in found if c.kind in ("global", "all") and c.cells]
    if spec is None or not cells or case.load.family != "ggml":
        return
    whole = cells[-1]
    total = sum(c.n_bytes for c in found)
    slots = _slots(case.load)
    unified = case.load.last("unified")
    try:
        plan = rival_plan(
            "llama.cpp",
            spec,
            weights_bytes=0,
            context=(whole.cells or 1) * whole.streams,
            kv=whole.k,
            kv_v=whole.v,
            slots=slots,
            ubatch=_setting(case.load, "n_ubatch") or 512,
            swa_full=case.load.has("swa_full"),
            unified=None if unified is None else unified.text("value") == "true",
            flash_attention=not any(v.verdict == "materialised" for v in case.layers),
        )
        lean = rival_plan("llama.cpp", spec, weights_bytes=0, context=whole.cells or 1, kv="q8_0")
    except HeadwiseError:
        return
    same = abs(plan.kv.n_bytes - total) < MIB
    what = (
        f"the cache of {total / 2**30:.2f} GiB is what the planner says"
        if same
        else (f"the cache is {total / 2**30:.2f} GiB, the planner says {plan.kv.n_bytes / 2**30:.2f}")
    )
    less = f"; with q8_0, one slot and rings it is {lean.kv.n_bytes / 2**30:.2f} GiB" if lean.kv.n_bytes < 0.9 * total else ""
    yield _finding(
        "plan-beside",
        what + less,
        f"{whole.cells:,} cells in {len(spec.of_kind('global'))} global layers",
        f"headwise plan {spec.name} --engine llama.cpp --context {whole.cells}",
        *(c.fact for c in found),
        sure="proven" if same else "likely",
    )


def _fits(case: Case) -> Iterator[Finding]:
    """What these cards would hold by the planner, where model, weights and cards are known."""
    cards, weights = _cards(case), _weights_bytes(case.load)
    spec = case.spec
    if spec is None or not cards or not weights or case.load.family != "ggml":
        return
    room = sum(cards) - CARD_MARGIN * len(cards)

    def total(n: int) -> int:
        return rival_plan("llama.cpp", spec, weights_bytes=weights, context=n, kv="q8_0", n_gpus=len(cards)).total_bytes

    try:
        low, high = 0, spec.max_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle) <= room else (low, middle - 1)
        if not low:
            return
        compute = rival_plan("llama.cpp", spec, weights_bytes=weights, context=low, kv="q8_0", n_gpus=len(cards)).compute_bytes
    except HeadwiseError:
        return
    old = case.load.last("ol_estimate")
    graph = amounts(old.text("graph"))[0] if old else 0.0
    reserved = (
        f"; the engine reserves {graph / 2**30:.1f} GiB for a graph that needs {compute / 2**30:.1f}" if graph > 2 * compute else ""
    )
    yield _finding(
        "what-fits",
        f"{low:,} tokens of a q8_0 cache fit {' + '.join(f'{n / 2**30:.0f}' for n in cards)} GiB{reserved}",
        f"weights {weights / 2**30:.1f} GiB, sliding layers as rings, one slot, flash attention; {CARD_MARGIN // MIB} MiB a "
        f"card kept free",
        f"headwise {'ollama-env' if case.load.engine == 'ollama' else 'llama-flags'} {spec.name} --context {low}",
        old or case.load.last("model_buffer"),
        sure="likely",
    )


CARD_MARGIN = 1024 * MIB  # as llama.cpp's --fit keeps


def _cards(case: Case) -> list[int]:
    """Bytes of each card: what was free for the model where the log says, else all of it."""
    load = case.load
    if old := load.last("ol_estimate"):
        return [round(amounts(x)[0]) for x in re.findall(r"[\d.]+ [KMGT]i?B", old.text("available"))]
    seen = [f for f in load.all("gpu_device") if is_gpu(f.text("device"))]
    if seen:
        return [f.whole("total") * MIB for f in {f.text("device"): f for f in seen}.values()]
    return [g.memory_bytes for g in case.gpus]


def _weights_bytes(load: Load) -> int:
    if old := load.last("ol_estimate"):
        return round(amounts(old.text("weights"))[0])
    return sum(n for device, parts in memory_of(load) if is_gpu(device) for label, n in parts if label == "weights")


RULES = (
    _attention,
    _splits,
    _no_gpu,
    _partial,
    _host_cache,
    _kv,
    _probe_skipped,
    _estimates,
    _context,
    _slope,
    _vllm,
    _settings,
    _known_fault,
    _gpus,
    _ps,
    _plan,
    _fits,
    _quiet,
)


def gpus_of(load: Load) -> tuple[Gpu, ...]:
    """The cards that a log names, those of the table."""
    names: list[tuple[str, int | None]] = []
    for name in ("gpu_cuda", "gpu_rocm", "gpu_device", "gpu_using", "gpu_metal"):
        if rows := [f for f in load.all(name) if name != "gpu_device" or is_gpu(f.text("device"))]:
            names = [(f.text("name"), f.whole("total") * MIB or None) for f in rows]
            break
    for f in load.all("gpu_ollama"):
        seen = dict(re.findall(r'(\w+)="([^"]*)"', f.where.text))
        label = seen.get("description") or seen.get("name")
        if label and f.text("library") != "cpu":
            total = seen.get("total")
            names.append((label, round(amounts(total)[0]) if total else None))
    return tuple(g for label, total in dict.fromkeys(names) if (g := known_gpu(label, total)) is not None)


def version_of(load: Load) -> str | None:
    if load.family == "vllm":
        found = load.last("vl_engine") or load.last("vl_version")
        return found.text("version") if found else None
    if load.engine == "ollama":
        found = load.last("version")
        return found.text("version") if found else None
    build = load.last("build")
    if build is None:
        return None
    number = build.whole("number")
    return f"b{number}" if number > 1 else build.text("commit")
