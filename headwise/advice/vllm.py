"""The command line of vLLM that fits a model and these cards."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from headwise.advice.fit import KEPT_BYTES, Attention, Case, Fit, best_fit, case_for, judged, larger_kv
from headwise.advice.llama_cpp import device_order
from headwise.advice.setting import Advice, Block, Card, Setting
from headwise.attention.engines import explain_engine
from headwise.errors import UsageError
from headwise.planner.render import gib
from headwise.planner.rivals import RivalPlan, rival_plan
from headwise.planner.versions import engine_version
from headwise.spec import catalogue
from headwise.spec.read import Source

DEFAULT_WEIGHTS = "bf16"
BATCH = 2048  # tokens a step: config/scheduler.py DEFAULT_MAX_NUM_BATCHED_TOKENS
UTILISATION = 92  # percent: config/cache.py gpu_memory_utilization
MOST_SEQUENCES = 256  # the default of max_num_seqs on most cards; more than fit only wait
CONFIG = "vLLM 0.33.0 config/cache.py, config/scheduler.py"
TRITON_FP8 = "vllm#26431, #45829 and #49077 (open): Triton has no fp8e4nv below compute capability 8.9"


def vllm_args(
    source: Source,
    *,
    gpus: Sequence[str] = (),
    context: int | None = None,
    version: str | None = None,
    weights: str | None = None,
) -> Advice:
    """The arguments of `vllm serve`; arguments and errors as `llama_cpp.llama_flags`, `version` a release (0.33.0)."""
    case = case_for(engine_version("vllm", version), source, gpus, weights, DEFAULT_WEIGHTS, share=UTILISATION)
    apis = {t.gpu.api for t in case.targets if t.gpu}
    if case.on_cpu or not apis <= {"cuda", "rocm"}:
        raise UsageError(
            f"no settings of vLLM for {case.words}",
            why="its memory and kernels are known here for NVIDIA and AMD cards",
            do="--gpu NAME[:GiB], or headwise llama-flags, which knows this device",
        )
    fit = best_fit(case, _attention, _place, context)
    here = replace(case, targets=tuple(c.target for c in fit.cards))
    settings = tuple(_settings(case, here, fit, asked=context is not None))
    env = [f"{s.name}={s.value}" for s in settings if s.is_variable and s.value]
    words = [w for s in settings if s.value is not None and s.name.startswith("--") for w in (s.name, s.value)]
    return Advice(
        engine=case.engine,
        version=case.version.text,
        model=source.spec.name,
        weights=case.weights,
        context=fit.context,
        kv=fit.attention.kv,
        total_bytes=fit.plan.total_bytes,
        cards=fit.cards,
        settings=settings,
        blocks=(Block("the command", shlex.join([*env, "vllm", "serve", _model(source), *words])),),
        notes=tuple(_notes(case, here, fit)),
    )


def _attention(case: Case) -> list[Attention]:
    """auto, then an fp8 cache where a backend is known to read it on every card."""
    gpus = [t.gpu for t in case.targets if t.gpu]
    multimodal = case.spec.family in ("gemma3", "gemma4")

    def ask(kv: str) -> Attention:
        return judged(
            [explain_engine("vllm", case.version.text, case.spec, g, kv, multimodal=multimodal) for g in gpus], kv, "auto"
        )

    found = [ask("auto")]
    fp8 = ask("fp8")
    if fp8.fused and all(g.capability and g.capability >= (8, 9) for g in gpus):
        found.append(fp8)
    return found


def _plan(case: Case, how: Attention, context: int, slots: int = 1) -> RivalPlan:
    return rival_plan(
        "vllm",
        case.spec,
        weights_bytes=case.n_weights,
        context=context,
        kv=how.kv,
        slots=slots,
        ubatch=BATCH,
        n_gpus=len(case.targets),
        gpu_memory_bytes=min(t.total_bytes for t in case.targets),
        version=case.version.text,
    )


def _place(case: Case, how: Attention, context: int, slots: int = 1) -> Fit | None:
    """Tensor parallel over all cards of the case: equal parts, so the smallest card decides."""
    n = len(case.targets)
    if any(layer.n_heads % n for layer in case.spec.layers):
        return None
    plan = _plan(case, how, context, slots)
    each = -(-plan.total_bytes // n)
    usable = min(case.usable(t) for t in case.targets)
    if each > usable:
        return None
    whole = tuple(range(len(case.spec.layers))) if n == 1 else ()
    cards = tuple(Card(target=t, usable_bytes=usable, planned_bytes=each, layers=whole) for t in case.targets)
    return Fit(attention=how, context=context, plan=plan, cards=cards)


def sequences(case: Case, fit: Fit) -> int:
    """How many sequences of the whole context fit at once, 256 at most."""
    low, high = 1, MOST_SEQUENCES
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _place(case, fit.attention, fit.context, middle) else (low, middle - 1)
    return low


def _settings(case: Case, here: Case, fit: Fit, *, asked: bool) -> Iterator[Setting]:
    how, planner = fit.attention, "headwise plan --engine vllm"
    many = "as asked" if asked else "all the model's" if fit.context == case.spec.max_context else "the largest that fits"
    why = f"{many}: {gib(fit.cards[0].planned_bytes)} of the {gib(fit.cards[0].usable_bytes)} each card has for weights and cache"
    yield Setting(name="--max-model-len", value=str(fit.context), reason=why, source=planner)
    share = min(case.claim(t) for t in here.targets)
    why = "its default; what the weights leave is filled with pages of cache"
    if share < UTILISATION:
        why = "less than the default 0.92: other programs hold memory of this card, and vLLM refuses to start if it is not free"
    yield Setting(name="--gpu-memory-utilization", value=f"0.{share:02}", reason=why, source=f"{CONFIG}, v1/worker/gpu_worker.py")
    yield _kv(case, fit)
    n = sequences(here, fit)
    why = f"{n} sequences of the whole context fit at once; more would be preempted and computed again"
    yield Setting(name="--max-num-seqs", value=str(n), reason=why, source=planner)
    why = "tokens of one step; they widen the sliding layers' cache, so the plan counts this number"
    yield Setting(name="--max-num-batched-tokens", value=str(BATCH), reason=why, source=CONFIG)
    state = "fused" if how.fused else "not established"
    why = f"left to vLLM, which chooses for all layers ({state}: {how.why}); one that cannot run here is an error at start"
    yield Setting(name="--attention-backend", value=None, reason=why, source=how.source)
    yield from _cards(case, here)


def _kv(case: Case, fit: Fit) -> Setting:
    how, n = fit.attention, gib(fit.plan.kv.n_bytes)
    if how.kv == "auto":
        why = f"bf16, {n} a sequence: it fits unquantised" + larger_kv(case, fit, _attention, _place)
    else:
        less = gib(_plan(case, replace(how, kv="auto"), fit.context).kv.n_bytes)
        why = f"{n} a sequence where bf16 takes {less}, which does not fit; {how.why}"
    return Setting(name="--kv-cache-dtype", value=how.kv, reason=why, source=how.source if how.kv != "auto" else CONFIG)


def _cards(case: Case, here: Case) -> Iterator[Setting]:
    if len(case.targets) == 1:
        return
    source = "vLLM 0.33.0 config/parallel.py"
    first, *others = here.targets
    if others:
        why = "equal parts of every layer on each card: the smallest card decides, the heads divide"
        yield Setting(name="--tensor-parallel-size", value=str(len(here.targets)), reason=why, source=source)
        return
    yield Setting(name="--tensor-parallel-size", value="1", reason=f"it all fits {first.name}", source=source)
    index = str(case.targets.index(first))
    if case.targets[0].gpu and case.targets[0].gpu.api == "cuda":
        yield device_order()
        yield Setting(name="CUDA_VISIBLE_DEVICES", value=index, reason="the card that holds it", source=device_order().source)
    else:
        yield Setting(name="HIP_VISIBLE_DEVICES", value=index, reason="the card that holds it", source="ROCm, GPU isolation")


def _model(source: Source) -> str:
    """The name that `vllm serve` takes: a repository or a path."""
    if source.kind == "catalogue":
        return catalogue.repository(source.spec.name) or source.spec.name
    return source.name if source.kind == "hub" else str(source.path or source.name)


def _notes(case: Case, here: Case, fit: Fit) -> Iterator[str]:
    yield from fit.plan.notes
    yield f"activations are not modelled: {gib(KEPT_BYTES)} of each card is theirs; vLLM measures, and stops if it is too little"
    if case.source.gguf is not None:
        yield "vLLM's reader of GGUF files is experimental; a Hugging Face repository is its own format"
    if case.source.kind == "catalogue":
        yield f"weights were counted as {case.weights}; hf:ORG/NAME counts those of a repository"
    sizes = {t.total_bytes for t in here.targets}
    if len(sizes) > 1:
        yield f"the cards differ: of each only {gib(min(sizes))} is used"
    if fit.attention.kv == "auto" and not all(t.gpu and t.gpu.capability and t.gpu.capability >= (8, 9) for t in here.targets):
        yield f"no fp8 cache is offered on this card ({TRITON_FP8})"
