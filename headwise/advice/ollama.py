"""The environment of Ollama's server that fits a model and these cards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from headwise.advice.fit import KEPT_BYTES, Attention, Case, Fit, best_fit, case_for, ggml_attention, ggml_place, ggml_plan
from headwise.advice.llama_cpp import DEFAULT_WEIGHTS, device_order, kv_reason
from headwise.advice.setting import Advice, Block, Setting
from headwise.planner.render import gib
from headwise.planner.rivals import ollama_default_context
from headwise.planner.versions import engine_version
from headwise.spec.read import Source

SERVER = "Ollama fb3076099 llm/llama_server.go LlamaServerFlashAttention"
OLD = "Ollama v0.20.4 llm/server.go:195-262"
ENV = "Ollama fb3076099 envconfig/config.go"
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "rocm": "ROCR_VISIBLE_DEVICES"}


def ollama_env(
    source: Source,
    *,
    gpus: Sequence[str] = (),
    context: int | None = None,
    version: str | None = None,
    weights: str | None = None,
) -> Advice:
    """The variables of `ollama serve`; arguments and errors as `llama_cpp.llama_flags`, `version` a release (0.20.4)."""
    case = case_for(engine_version("ollama", version), source, gpus, weights, DEFAULT_WEIGHTS)
    fit = best_fit(case, ggml_attention, ggml_place, context)
    here = replace(case, targets=tuple(c.target for c in fit.cards))
    settings = tuple(_settings(case, here, fit, asked=context is not None))
    return Advice(
        engine=case.engine,
        version=case.version.text,
        model=source.name,
        weights=case.weights,
        context=fit.context,
        kv=fit.attention.kv,
        total_bytes=fit.plan.total_bytes,
        cards=fit.cards,
        settings=settings,
        blocks=tuple(_blocks(case, settings, fit)),
        notes=tuple(_notes(case, fit)),
    )


def _settings(case: Case, here: Case, fit: Fit, *, asked: bool) -> Iterator[Setting]:
    spec, planner = case.spec, "headwise plan --engine ollama"
    default = ollama_default_context(
        case.version.text, vram_bytes=0 if case.on_cpu else sum(t.total_bytes for t in case.targets), max_context=spec.max_context
    )
    held = " + ".join(f"{gib(c.planned_bytes)} of {gib(c.usable_bytes)}" for c in fit.cards)
    many = "as asked" if asked else "all the model's" if fit.context == spec.max_context else "the largest that fits"
    why = f"{many}: {held} usable; unset it is {default:,}, and longer prompts lose their beginning"
    yield Setting(name=_context_name(case), value=str(fit.context), reason=why, source=f"{planner}; {ENV}")
    yield _flash(case, fit.attention)
    yield _kv(case, here, fit)
    more = ggml_plan(here, fit.attention, fit.context, slots=2).total_bytes - fit.plan.total_bytes
    why = f"each slot has a cache of its own: a second would take {gib(more)}"
    yield Setting(name="OLLAMA_NUM_PARALLEL", value="1", reason=why, source=f"{planner}; {ENV}")
    why = "a second model would take memory that this plan counts on"
    yield Setting(name="OLLAMA_MAX_LOADED_MODELS", value="1", reason=why, source=ENV)
    yield from _cards(case, here)


def _context_name(case: Case) -> str:
    """The variable came with 0.5.13; before, only a model's own num_ctx can say it."""
    return "OLLAMA_CONTEXT_LENGTH" if case.version.at_least(0, 5, 13) else "num_ctx"


def _flash(case: Case, how: Attention) -> Setting:
    new = case.version.at_least(0, 30, 0)
    if how.fa == "off":
        value, why = "0", f"not every layer has a kernel; forced on: {how.why}"
    elif how.fa == "on":
        value, why = "1", f"fused on every card: {how.why}"
        if how.kv != "f16":
            why += "; a quantised cache needs it"
    elif new:
        value, why = None, "unset means auto, whose probe turns it off where a layer would leave the card; 1 skips the probe"
        why += f" ({'fused' if how.fused else 'not established'} here: {how.why})"
    else:
        value, why = None, f"this release decides for itself: {how.why}"
    return Setting(name="OLLAMA_FLASH_ATTENTION", value=value, reason=why, source=SERVER if new else f"{OLD}; {how.source}")


def _kv(case: Case, here: Case, fit: Fit) -> Setting:
    how = fit.attention
    if how.kv != "f16":
        value, why = how.kv, kv_reason(case, here, fit) + "; it holds for every model of this server"
    elif how.fa == "off" or not how.fused:
        value, why = None, f"f16, {gib(fit.plan.kv.n_bytes)}: without flash attention a quantised cache is "
        why += "refused" if case.version.at_least(0, 30, 0) else "dropped with one warning"
    else:
        value, why = None, f"f16, {kv_reason(case, here, fit)}"
    return Setting(name="OLLAMA_KV_CACHE_TYPE", value=value, reason=why, source=f"headwise plan --engine ollama; {SERVER}")


def _cards(case: Case, here: Case) -> Iterator[Setting]:
    if len(case.targets) == 1 or case.targets[0].gpu is None:
        return
    api = case.targets[0].gpu.api
    first, *others = here.targets
    if others:
        why = "it needs all cards; Ollama's own estimate may take one to be enough. Layers are divided by free memory"
        yield Setting(name="OLLAMA_SCHED_SPREAD", value="1", reason=why, source=f"{ENV}; llm/llama_server.go PredictServerVRAM")
        return
    if name := VISIBLE.get(api):
        if api == "cuda":
            yield device_order()
        why = f"it all fits {first.name}: no boundary between cards"
        yield Setting(name=name, value=str(case.targets.index(first)), reason=why, source="Ollama docs/gpu.md")
    yield Setting(name="OLLAMA_SCHED_SPREAD", value=None, reason="one card holds it; 1 would divide it", source=ENV)


def _blocks(case: Case, settings: Sequence[Setting], fit: Fit) -> Iterator[Block]:
    given = {s.name: s.value for s in settings if s.value is not None and s.is_variable}
    unset = [s.name for s in settings if s.value is None]
    lines = [f"export {name}={value}" for name, value in given.items()] + [f"unset {name}" for name in unset]
    yield Block("for `ollama serve` in this shell", "\n".join(lines))
    dropin = ["[Service]", *(f'Environment="{name}={value}"' for name, value in given.items())]
    dropin += [f"UnsetEnvironment={' '.join(unset)}"] if unset else []
    yield Block("for the service: `systemctl edit ollama`, then `systemctl restart ollama`", "\n".join(dropin))
    if needs_modelfile(case, fit):
        name = case.source.name if case.source.kind == "ollama" else "MODEL"
        yield Block(
            f"a Modelfile: `ollama create {name.split(':')[0]}-{fit.context} -f Modelfile`",
            f"FROM {name}\nPARAMETER num_ctx {fit.context}",
        )


def needs_modelfile(case: Case, fit: Fit) -> bool:
    """A model's own num_ctx wins over the variable; before 0.5.13 there is no variable."""
    own = case.source.params.get("num_ctx")
    return _context_name(case) == "num_ctx" or (own is not None and own != fit.context)


def _notes(case: Case, fit: Fit) -> Iterator[str]:
    yield from case.version.notes
    yield "the service has its own environment: export in a terminal does not reach it"
    own = case.source.params.get("num_ctx")
    if own is not None and own != fit.context:
        yield f"this model's own num_ctx {own} wins over OLLAMA_CONTEXT_LENGTH: make a model from the Modelfile above"
    if not case.on_cpu:
        yield f"compute buffers are a lower bound, so {gib(KEPT_BYTES)} of each card stays free"
    if case.source.kind == "catalogue":
        yield f"weights were counted as {case.weights}; --weights counts another type, ollama:NAME the installed file"
    yield from (n for n in fit.plan.notes if n not in case.version.notes)
