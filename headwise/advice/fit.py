"""What fits: the largest context of an engine on these cards, with the KV type and flash attention that it can run there.

Every candidate is asked of `attention.engines` (is there a kernel, on every card, in this version?) and of
`planner.rivals` (how many bytes?), so nothing is advised that the planner would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from headwise.advice.setting import Card
from headwise.api import DEFAULT_PLAN_CONTEXT, stored_weights, targets_for
from headwise.attention.engines import EngineExplanation, Fa, explain_engine
from headwise.errors import PlanError, UsageError
from headwise.hardware.gpus import GPUS, Gpu
from headwise.planner.memory import Target, Workload, check_workload, spread
from headwise.planner.quantise import weight_types
from headwise.planner.render import gib
from headwise.planner.residence import weight_bytes
from headwise.planner.rivals import GGML_KV, KINDS, RivalPlan, rival_plan
from headwise.planner.versions import EngineVersion
from headwise.spec.kv import KV_FORMATS
from headwise.spec.layers import ModelSpec
from headwise.spec.read import Source
from headwise.spec.tensors import layer_of

MIB = 2**20
KEPT_BYTES = 1024 * MIB  # of each GPU, for driver and what no formula counts: what llama.cpp's own --fit keeps free
LEAST_CONTEXT = 4096  # tokens; llama.cpp's --fit-ctx, and Ollama's smallest default: less is called "does not fit"
PLANNER = "headwise plan --engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Whose settings for which model on which devices."""

    version: EngineVersion
    source: Source
    weights: str  # the type counted: a scheme, or "as stored"
    sizes: Mapping[str, int]  # bytes of each tensor
    targets: tuple[Target, ...]
    share: int = 100  # percent of a card that the engine claims

    def claim(self, target: Target) -> int:
        """Percent of `target` that can be claimed: what others hold, and a little, is left out."""
        free = (target.total_bytes - target.others_bytes) * 100 // target.total_bytes - 2
        return max(0, min(self.share, free)) if target.others_bytes else self.share

    def usable(self, target: Target) -> int:
        """Bytes of `target` for weights, cache and compute."""
        return max(0, min(target.usable_bytes, target.total_bytes * self.claim(target) // 100 - target.margin_bytes))

    @property
    def engine(self) -> str:
        return self.version.engine

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec

    @property
    def n_weights(self) -> int:
        return sum(self.sizes.values())

    @property
    def on_cpu(self) -> bool:
        return self.targets[0].gpu is None

    @property
    def words(self) -> str:
        return " + ".join(t.name for t in self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One way to run attention: the switch, the KV type, and what the engine makes of it on every card."""

    fa: Fa
    kv: str
    fused: bool | None  # None: not established
    why: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was found: the context and where everything lies."""

    attention: Attention
    context: int
    plan: RivalPlan
    cards: tuple[Card, ...]

    @property
    def planned_bytes(self) -> int:
        return sum(c.planned_bytes for c in self.cards)


Ways = Callable[[Case], list[Attention]]  # what can run on a case's devices, best first
Place = Callable[[Case, Attention, int], "Fit | None"]  # a context on all of a case's devices, if it fits there


def case_for(
    version: EngineVersion, source: Source, gpus: Sequence[str], weights: str | None, scheme: str, *, share: int = 100
) -> Case:
    """The case; without --gpu the detected cards, else the CPU; a catalogue model's weights are counted as `scheme`.

    Raises:
        UsageError: a card that is not known, or a weight type.
    """
    cpu = [g.lower() for g in gpus] == ["cpu"]
    targets = targets_for([] if cpu else gpus, "cpu" if cpu else None)
    if not cpu and (unknown := ", ".join(t.name for t in targets if t.gpu is None)):
        raise UsageError(f"{unknown} is not in the table of cards", why="its kernels cannot be looked up", do="--gpu NAME[:GiB]")
    targets = targets or targets_for([], "cpu")
    if weights is None and source.kind == "catalogue":
        weights = "mxfp4" if source.spec.family == "gpt_oss" else scheme
    stored = stored_weights(source, weights)
    return Case(
        version=version,
        source=source,
        weights=weights or "as stored",
        sizes=weight_bytes(source.spec, stored),
        targets=tuple(replace(t, margin_bytes=max(t.margin_bytes, KEPT_BYTES)) if t.gpu else t for t in targets),
        share=share,
    )


def check_context(spec: ModelSpec, context: int | None) -> None:
    """Refuses a context that no engine can serve, as `headwise plan` does."""
    if context is not None:
        kv = KV_FORMATS["f16"]
        check_workload(spec, Workload(context=context, kv=dict.fromkeys(KINDS, kv), dtype="f16"))


def ggml_attention(case: Case) -> list[Attention]:
    """What llama.cpp or Ollama can run here, best first: f16 as safely as it goes, then quantised caches with a kernel.

    A quantised cache is offered only where every layer is known to run fused on every card: without flash attention
    these engines refuse it or drop it, and without a kernel they move the layers to the CPU with nothing said.
    """
    if case.on_cpu:
        return _on_cpu(case)
    found: list[Attention] = []
    for fa in ("auto", "on"):
        if (how := _asked(case, "f16", fa)).fused:
            found.append(how)
            break
    else:
        auto = _asked(case, "f16", "auto")
        forced = _asked(case, "f16", "on")
        found.append(auto if auto.fused is None else replace(_asked(case, "f16", "off"), why=forced.why, source=forced.source))
    for kv in ("q8_0", "q4_0"):
        if (how := _asked(case, kv, "on")).fused:
            found.append(how)
    return found


def _on_cpu(case: Case) -> list[Attention]:
    source = "llama.cpp 0c1e57098 (2026-10-01) ggml-cpu/ops.cpp ggml_compute_forward_flash_attn_ext"
    why = "on the CPU every head size and KV type has a kernel"
    found = [Attention(fa="auto", kv="f16", fused=True, why=why, source=source)]
    whole = all(layer.head_dim % GGML_KV["q8_0"].block == 0 for layer in case.spec.layers)
    if whole and (case.engine == "llama.cpp" or case.version.at_least(0, 30, 0)):
        found += [Attention(fa="on", kv=kv, fused=True, why=why, source=source) for kv in ("q8_0", "q4_0")]
    return found


def _asked(case: Case, kv: str, fa: Fa) -> Attention:
    """What the engine does with this on all cards together: the worst of them."""
    answers = [explain_engine(case.engine, case.version.text, case.spec, gpu, kv, fa=fa) for gpu in _gpus(case)]
    return judged(answers, kv, fa)


def judged(answers: Sequence[EngineExplanation], kv: str, fa: Fa) -> Attention:
    """One verdict of several cards' answers: a layer that is not fused on one of them decides, then one not known."""
    choices = [choice for answer in answers for choice in answer.choices]
    bad = next((c for c in choices if c.verdict not in ("fused", "unknown")), None)
    unknown = next((c for c in choices if c.verdict == "unknown"), None)
    shown = bad or unknown or choices[-1]
    return Attention(fa=fa, kv=kv, fused=False if bad else None if unknown else True, why=shown.why, source=shown.source)


def _gpus(case: Case) -> list[Gpu]:
    return list({t.gpu.name: t.gpu for t in case.targets if t.gpu}.values())


def best_fit(case: Case, ways: Ways, place: Place, context: int | None) -> Fit:
    """The first way that holds the context asked for (without one: 32,768 tokens, or the model's all).

    Without a context it is the largest that this way holds; where no way holds 32,768, the one that holds most.

    Raises:
        PlanError: nothing fits, with what would; UsageError: a context that makes no sense.
    """
    check_context(case.spec, context)
    enough = min(DEFAULT_PLAN_CONTEXT, case.spec.max_context) if context is None else context
    found: list[Fit] = []
    for how in ways(case):
        fit = _largest(case, how, place, context or case.spec.max_context)
        if fit and fit.context >= enough:
            return fit
        found += [fit] if fit else []
    best = max(found, key=lambda fit: fit.context, default=None)
    if context is None and best and best.context >= min(LEAST_CONTEXT, case.spec.max_context):
        return best
    raise _does_not_fit(case, ways, place, enough if context else min(LEAST_CONTEXT, case.spec.max_context), best)


def larger_kv(case: Case, fit: Fit, ways: Ways, place: Place) -> str:
    """What the next smaller KV type would hold, in words; nothing where all of the model's context fits already."""
    if fit.context == case.spec.max_context:
        return ""
    kvs = [how for how in ways(case) if how.kv in ("q8_0", "fp8") and how.kv != fit.attention.kv]
    more = next((f for how in kvs if (f := _largest(case, how, place, case.spec.max_context))), None)
    return f"; {more.attention.kv} would hold {more.context:,} tokens" if more and more.context > fit.context else ""


def _largest(case: Case, how: Attention, place: Place, goal: int) -> Fit | None:
    """The largest context up to `goal`: on one card if it holds the goal, else wherever most fits."""
    best: Fit | None = None
    for targets in _pools(case.targets):
        here = replace(case, targets=targets)
        fit = place(here, how, goal) or _search(here, how, place, goal)
        if fit and (best is None or fit.context > best.context):
            best = fit
        if best and best.context == goal:
            break
    return best


def _pools(targets: tuple[Target, ...]) -> Iterator[tuple[Target, ...]]:
    """The largest card alone, then all: a boundary between cards costs time at every token."""
    if len(targets) > 1:
        yield (max(targets, key=lambda t: t.usable_bytes),)
    yield targets


def _search(case: Case, how: Attention, place: Place, goal: int) -> Fit | None:
    """By halves, in the 256 tokens that llama.cpp allocates in; what is returned was placed."""
    low, high, best = 0, (goal - 1) // 256, None
    while low < high:
        middle = (low + high + 1) // 2
        if fit := place(case, how, middle * 256):
            low, best = middle, fit
        else:
            high = middle - 1
    return best


def _does_not_fit(case: Case, ways: Ways, place: Place, n_tokens: int, best: Fit | None) -> PlanError:
    usable = sum(case.usable(t) for t in case.targets)
    why = f"the weights ({case.weights}) are {gib(case.n_weights)}, and {gib(usable)} can be used"
    if best:
        why += f"; {best.context:,} tokens of {best.attention.kv} are the most"
    cures = []
    if best and best.context >= LEAST_CONTEXT:
        cures.append(f"--context {best.context}")
    cures += _other_weights(case, ways, place, n_tokens)
    cures += _other_card(case, ways, place, n_tokens)
    if not case.on_cpu:
        named = " ".join(f"--gpu {t.gpu.family}:{t.total_bytes / 2**30:g}" for t in case.targets if t.gpu)
        cures.append(f"another model (`headwise plan {named}` lists those that fit)")
    do = "; or ".join(cures) or "a smaller model or weight type"
    return PlanError(f"{case.spec.name} with {n_tokens:,} tokens does not fit {case.words} in {case.version}", why=why, do=do)


def _fits(case: Case, ways: Ways, place: Place, n_tokens: int) -> bool:
    return any(place(case, how, n_tokens) for how in ways(case))


def _other_weights(case: Case, ways: Ways, place: Place, n_tokens: int) -> Iterator[str]:
    """The largest smaller weight type that would fit, tried; vLLM's quantised checkpoints have types of their own."""
    for scheme in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0") if case.engine != "vllm" else ():
        sizes = weight_bytes(case.spec, weight_types(case.spec, scheme))
        if sum(sizes.values()) < case.n_weights and _fits(replace(case, sizes=sizes), ways, place, n_tokens):
            yield f"weights in {scheme} (--weights {scheme})"
            return


def _other_card(case: Case, ways: Ways, place: Place, n_tokens: int) -> Iterator[str]:
    """The smallest card of the same kind that would hold it alone, tried."""
    first = case.targets[0].gpu
    if first is None:
        return
    for gpu in sorted(GPUS, key=lambda g: (g.memory_bytes, -g.bandwidth_gb_s)):
        if (
            gpu.api == first.api
            and gpu.memory_bytes > max(first.memory_bytes, case.n_weights)
            and (gpu.capability or ()) >= (first.capability or ())
        ):
            target = Target(name=gpu.label, gpu=gpu, total_bytes=gpu.memory_bytes, margin_bytes=KEPT_BYTES)
            if _fits(replace(case, targets=(target,)), ways, place, n_tokens):
                yield f"one card of {gib(gpu.memory_bytes)} (--gpu {gpu.name})"
                return


# --- llama.cpp and Ollama: where whole layers lie ---


def ggml_plan(
    case: Case, how: Attention, context: int, *, slots: int = 1, ubatch: int | None = None, swa_full: bool = False
) -> RivalPlan:
    """The planner's answer for these settings; flash attention counts as off where it is not known to be fused."""
    return rival_plan(
        case.engine,
        case.spec,
        weights_bytes=case.n_weights,
        context=context,
        kv=how.kv,
        slots=slots,
        ubatch=ubatch,
        swa_full=swa_full,
        flash_attention=bool(how.fused),
        n_gpus=len(case.targets),
        gpu_memory_bytes=min(t.total_bytes for t in case.targets),
        version=case.version.text,
    )


def ggml_place(case: Case, how: Attention, context: int, *, ubatch: int | None = None, spare_bytes: int = 0) -> Fit | None:
    """`context` tokens on all devices of the case, or None: whole layers, each device filled to the same fraction.

    Every device is charged with its own masks; the last with the logits too. So the devices together hold no less than
    the plan counts.

    Args:
        spare_bytes: that must stay free on every device beside.
    """
    plan = ggml_plan(case, how, context, ubatch=ubatch)
    n = len(case.targets)
    if n == 1:
        placed, planned = [list(range(len(case.spec.layers)))], [plan.total_bytes]
    else:
        layers, first, last = _ggml_layers(case, how, plan)
        logits = sum(item.n_bytes for item in plan.items if item.label == "logits")
        driver = sum(item.n_bytes for item in plan.items if item.label == "driver") // n
        fixed = [plan.compute_bytes - logits + driver] * n
        fixed[0] += first
        fixed[-1] += last + logits
        if case.engine == "ollama":  # its llama-server gets no split, and divides by free memory
            placed = by_free_memory(len(case.spec.layers), [t.total_bytes - t.others_bytes for t in case.targets])
        else:
            placed = spread(case.spec, layers, fixed, case.targets)
        planned = [fixed[i] + sum(layers[j] for j in placed[i]) for i in range(n)]
    cards = tuple(
        Card(target=t, usable_bytes=case.usable(t), planned_bytes=p, layers=tuple(at))
        for t, p, at in zip(case.targets, planned, placed, strict=True)
    )
    if any(c.planned_bytes + spare_bytes > c.usable_bytes for c in cards):
        return None
    return Fit(attention=how, context=context, plan=plan, cards=cards)


def _ggml_layers(case: Case, how: Attention, plan: RivalPlan) -> tuple[list[int], int, int]:
    """Bytes of each layer with its cache, and what the first and the last device hold beside.

    The planner's bytes of each kind of cache are divided by the layers' widths: a layer's rows are as wide as its heads.
    """
    spec = case.spec
    n_bytes = [0] * len(spec.layers)
    first = last = 0
    for name, n in case.sizes.items():
        if name.startswith("layers."):
            n_bytes[layer_of(name)] += n
        elif name in ("norm", "head") or (name == "embed" and spec.tied):
            last += n
        else:
            first += n
    widest = max(layer.n_kv_heads * layer.head_dim for layer in spec.layers)
    for kind, total in (("global", plan.kv.global_bytes), ("sliding", plan.kv.sliding_bytes)):
        widths = {
            layer.index: layer.n_kv_heads * layer.head_dim + (layer.n_kv_heads * layer.head_dim if how.fused else widest)
            for layer in spec.kv_layers
            if layer.kind == kind
        }
        whole = sum(widths.values())
        for i, width in widths.items():
            n_bytes[i] += -(-total * width // whole)
    return n_bytes, first, last


def by_free_memory(n_layers: int, free: Sequence[int]) -> list[list[int]]:
    """The layers of each device as llama.cpp divides them where no one says how; the output layer counts as one.

    Source: llama.cpp 0c1e57098 (2026-10-01) src/llama-model.cpp load_tensors, "default split, by free memory".
    """
    placed: list[list[int]] = [[] for _ in free]
    for layer in range(n_layers):
        upto = 0
        for device, n in enumerate(free):
            upto += n
            if upto * (n_layers + 1) > layer * sum(free):
                placed[device].append(layer)
                break
    return placed
