"""The command line of llama-server that fits a model and these cards."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from headwise.advice.fit import KEPT_BYTES, Case, Fit, best_fit, case_for, ggml_attention, ggml_place, ggml_plan, larger_kv
from headwise.advice.setting import Advice, Block, Setting
from headwise.planner.render import gib
from headwise.planner.versions import engine_version
from headwise.spec.read import Source

MIB = 2**20
DEFAULT_WEIGHTS = "q4_k_m"
ARG = "llama.cpp 0c1e57098 (2026-10-01) common/arg.cpp"
LOAD = "llama.cpp 0c1e57098 (2026-10-01) src/llama-model.cpp load_tensors"
# (tokens, bytes that must be free beside): Ollama server/sched.go automaticGenerationBatch
LARGER_BATCHES = ((2048, 2048 * MIB), (1024, 768 * MIB))


def llama_flags(
    source: Source,
    *,
    gpus: Sequence[str] = (),
    context: int | None = None,
    version: str | None = None,
    weights: str | None = None,
) -> Advice:
    """The flags of llama-server, each computed for this model, these cards and this build.

    Args:
        gpus: as `headwise plan` takes; ["cpu"] is the CPU; none: what is here.
        context: tokens; None = the largest that fits.
        version: a build (b10600) or a day (2026-10-01); None = the newest that was read.
    Raises:
        PlanError: nothing fits, with what would; UsageError: an argument that makes no sense.
    """
    case = case_for(engine_version("llama.cpp", version), source, gpus, weights, DEFAULT_WEIGHTS)
    fit = best_fit(case, ggml_attention, ggml_place, context)
    here = replace(case, targets=tuple(c.target for c in fit.cards))
    ubatch = _ubatch(here, fit)
    if ubatch != 512:
        fit = ggml_place(here, fit.attention, fit.context, ubatch=ubatch) or fit
    settings = list(_settings(case, here, fit, ubatch, asked=context is not None))
    return Advice(
        engine=case.engine,
        version=case.version.text,
        model=source.spec.name,
        weights=case.weights,
        context=fit.context,
        kv=fit.attention.kv,
        total_bytes=fit.plan.total_bytes,
        cards=fit.cards,
        settings=tuple(settings),
        blocks=(Block("the command", _command(here, settings)),),
        notes=tuple(_notes(case, fit)),
    )


def _ubatch(case: Case, fit: Fit) -> int:
    """The largest micro-batch with which the same context still fits, with room for what a larger one adds."""
    if not case.on_cpu and fit.attention.fused:
        for n, spare in LARGER_BATCHES:
            if n <= fit.context and ggml_place(case, fit.attention, fit.context, ubatch=n, spare_bytes=spare):
                return n
    return 512


def _settings(case: Case, here: Case, fit: Fit, ubatch: int, *, asked: bool) -> Iterator[Setting]:
    spec = case.spec
    planner = "headwise plan --engine llama.cpp"
    yield Setting(
        name="-m",
        value=source_path(case.source),
        reason=f"the model, counted {case.weights}: {gib(case.n_weights)}",
        source=planner,
    )
    if not case.on_cpu:
        why = f"all {len(spec.layers)} layers and the output: they fit, so nothing is left on the CPU"
        yield Setting(name="-ngl", value="999", reason=why, source=planner)
    many = [f"all {spec.max_context:,} tokens of the model"] if fit.context == spec.max_context else []
    many += ["as asked"] if asked else [] if many else ["the largest that fits"]
    held = " + ".join(f"{gib(c.planned_bytes)} of {gib(c.usable_bytes)}" for c in fit.cards)
    yield Setting(name="-c", value=str(fit.context), reason=f"{', '.join(many)}: {held} usable", source=planner)
    yield from _slots(here, fit, ubatch)
    yield _flash(fit)
    yield from _kv(case, here, fit)
    yield _ubatch_setting(here, fit, ubatch)
    yield from _sliding(here, fit, ubatch)
    yield from _cards(case, here, fit)


def _slots(here: Case, fit: Fit, ubatch: int) -> Iterator[Setting]:
    more = ggml_plan(here, fit.attention, fit.context, slots=4, ubatch=ubatch).total_bytes - fit.plan.total_bytes
    cost = f"the default of 4 would hold {gib(more)} more in the sliding rings, and " if more else "the default of 4 would "
    why = f"one conversation at a time; {cost}share this context"
    yield Setting(name="-np", value="1", reason=why, source=f"{ARG}, src/llama-kv-cache-iswa.cpp")


def _flash(fit: Fit) -> Setting:
    how = fit.attention
    if how.fa == "off":
        why = f"no kernel for every layer ({how.why}); off is on the GPU, and counted with its score matrix"
    elif how.fused is None:
        why = f"not established here ({how.why}); auto asks the device, and turns it off where a layer would leave it"
    elif how.fa == "auto":
        why = f"fused: {how.why}; auto asks the device too, before it starts"
    elif how.kv != "f16":
        why = f"a quantised V cache needs it, and auto would only become on; fused here: {how.why}"
    else:
        why = f"fused: {how.why}"
    return Setting(name="-fa", value=how.fa, reason=why, source=how.source)


def _kv(case: Case, here: Case, fit: Fit) -> Iterator[Setting]:
    why = kv_reason(case, here, fit)
    for flag in ("-ctk", "-ctv"):
        yield Setting(name=flag, value=fit.attention.kv, reason=why, source="headwise plan --engine llama.cpp")
        why = "as K: one type for both has a kernel in every build and on Metal"


def kv_reason(case: Case, here: Case, fit: Fit) -> str:
    """Why this KV type: its bytes, and what the other would hold."""
    how, n = fit.attention, gib(fit.plan.kv.n_bytes)
    if how.kv == "f16":
        return f"{n}: the cache fits unquantised" + larger_kv(case, fit, ggml_attention, ggml_place)
    unquantised = ggml_attention(here)[0]
    less = gib(ggml_plan(here, unquantised, fit.context).kv.n_bytes)
    wide = max(layer.head_dim for layer in case.spec.layers)
    slow = f"; on CUDA each step converts the layers of head size {wide} to f16 first" if wide > 256 else ""
    return f"{n} where f16 takes {less}, which does not fit{slow}"


def _ubatch_setting(here: Case, fit: Fit, ubatch: int) -> Setting:
    if ubatch == 512:
        why = (
            "the default; a larger one widens masks, logits and sliding rings more than is free"
            if not here.on_cpu
            else "the default"
        )
    else:
        small = ggml_plan(here, fit.attention, fit.context, ubatch=512).total_bytes
        why = (
            f"prompts are read {ubatch} tokens at a time, for {gib(fit.plan.total_bytes - small)} more than 512, and it still fits"
        )
    return Setting(name="-ub", value=str(ubatch), reason=why, source="headwise plan --engine llama.cpp; Ollama server/sched.go")


def _sliding(here: Case, fit: Fit, ubatch: int) -> Iterator[Setting]:
    if here.spec.of_kind("sliding"):
        more = ggml_plan(here, fit.attention, fit.context, ubatch=ubatch, swa_full=True).kv.n_bytes - fit.plan.kv.n_bytes
        if more > 0:
            why = f"it would hold {gib(more)} more: a sliding layer reads its window only"
            yield Setting(name="--swa-full", value=None, reason=why, source=f"{ARG}, src/llama-kv-cache-iswa.cpp:76")


def _cards(case: Case, here: Case, fit: Fit) -> Iterator[Setting]:
    if len(case.targets) == 1:
        return
    if case.targets[0].gpu and case.targets[0].gpu.api == "cuda":
        yield device_order()
    if len(here.targets) == 1:
        index = case.targets.index(here.targets[0])
        why = f"it all fits {here.targets[0].name}; a boundary between cards costs time at every token"
        yield Setting(name="-sm", value="none", reason=why, source=ARG)
        yield Setting(name="-mg", value=str(index), reason="the card that holds it", source=ARG)
        return
    yield Setting(name="-sm", value="layer", reason="whole layers in order, each with its own cache", source=ARG)
    why = "layers of each card, the output counted with the last: each is filled to the same fraction of what it can use"
    yield Setting(name="-ts", value=",".join(map(str, tensor_split(fit))), reason=why, source=LOAD)
    yield Setting(name="-mg", value=None, reason="it is read with -sm none and row only", source=ARG)


def device_order() -> Setting:
    why = "numbers the cards as nvidia-smi does: give --gpu in that order; CUDA's own begins with the fastest"
    source = "CUDA C++ Programming Guide, environment variables"
    return Setting(name="CUDA_DEVICE_ORDER", value="PCI_BUS_ID", reason=why, source=source)


def tensor_split(fit: Fit) -> list[int]:
    """The fractions that put each layer where the plan has it: layers a card, the output as one more on the last."""
    counts = [len(c.layers) for c in fit.cards]
    counts[-1] += 1
    return counts


def source_path(source: Source) -> str:
    """The file to load, or a name to replace."""
    return str(source.path) if source.gguf is not None and source.path else f"{source.spec.name}.gguf"


def _command(here: Case, settings: Sequence[Setting]) -> str:
    env = [f"{s.name}={s.value}" for s in settings if s.is_variable and s.value]
    words = [w for s in settings if s.value is not None and not s.is_variable for w in (s.name, s.value)]
    return shlex.join([*env, "llama-server", *words])


def _notes(case: Case, fit: Fit) -> Iterator[str]:
    yield from case.version.notes
    if case.on_cpu:
        yield "planned for this machine's CPU and memory"
    else:
        yield f"compute buffers are a lower bound, so {gib(KEPT_BYTES)} of each card stays free, as --fit keeps it"
    if len(case.targets) > 1 and not case.on_cpu:
        yield "the cards are numbered as in --gpu: compare with `llama-server --list-devices`"
    if case.source.gguf is None:
        yield f"{source_path(case.source)} stands for your file; give the file itself where its weights are not {case.weights}"
    build, day = case.version.build, case.version.day
    if (build is not None and build < 8609) or (day is not None and day < "2025-08-31"):
        yield "before #15434 (30 August 2025) -fa took no value: write -fa for on, and leave it out for off"
