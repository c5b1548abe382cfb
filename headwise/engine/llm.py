"""`LLM`: a model loaded by its plan, checked, and ready to continue text. What `headwise run` and programs use."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.api import kv_by_kind, work_on
from headwise.attention.capability import DeviceKind
from headwise.attention.choose import Choice, LayerGroup, forced_backends, group_layers, require_fused
from headwise.attention.verify import Check, check_all, default_cache_file
from headwise.engine.devices import Card, card_of, device_kind, keep_limit, on_device, seats, slower
from headwise.engine.draft import Costs
from headwise.engine.engine import Engine
from headwise.engine.request import Event, Finish, Prefill, Request, Sampling, Token
from headwise.engine.runner import Runner
from headwise.engine.stage import attend_functions, build_stages
from headwise.errors import HeadwiseError, PlanError, SpecError, UsageError
from headwise.hardware.gpus import Gpu
from headwise.model.arena import TORCH
from headwise.planner.memory import Plan, Room, Workload, fewest, plan
from headwise.planner.quantise import made_at_load
from headwise.planner.render import gib
from headwise.planner.residence import groups, planed
from headwise.planner.workspace import RECORDED_TOKENS
from headwise.spec.kv import laid_out
from headwise.spec.layers import ModelSpec
from headwise.spec.read import Source, open_model
from headwise.text.tokenizer import Tokenizer, read_tokenizer
from headwise.weights.blocks import Weight
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import match, skipped_by_reason

DEFAULT_CONTEXT = 8192
Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """Of one stage."""

    device: str
    layers: tuple[int, ...]
    planned_bytes: int
    allocated_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran where, and whether the plan held; bytes are sums over the devices."""

    layers: int
    layers_fused: int
    backends: tuple[LayerGroup, ...]
    planned_bytes: int
    allocated_bytes: int
    peak_bytes: int
    devices: tuple[DeviceReport, ...]
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    drafted: int  # tokens that were tried ahead of their turn
    accepted: int  # those of them that were kept

    @property
    def prefill_tok_s(self) -> float | None:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else None

    @property
    def decode_tok_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_tokens else None

    def to_json(self) -> dict[str, object]:
        return {
            "layers": self.layers,
            "layers_fused": self.layers_fused,
            "backends": [
                {
                    "layers": list(g.layers),
                    "backend": g.choice.backend.name,
                    "prefill": g.choice.prefill.name if g.choice.prefill else None,
                    "head_dim": g.example.head_dim,
                    "window": g.example.window,
                    "kv": g.kv,
                }
                for g in self.backends
            ],
            "planned_bytes": self.planned_bytes,
            "allocated_bytes": self.allocated_bytes,
            "peak_bytes": self.peak_bytes,
            "devices": [asdict(d) | {"layers": list(d.layers)} for d in self.devices],
            "prefill_tokens": self.prefill_tokens,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token and the text that became certain with it."""

    token: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    text: str
    tokens: list[int]
    report: Report
    finish: str  # stop (an end token), length (max_tokens or the context)


@dataclass(slots=True)
class _Timing:
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    finish: str = "length"
    tokens: list[int] = field(default_factory=list)

    def finished(self, event: Finish) -> None:
        self.finish, self.drafted, self.accepted = event.reason, event.drafted, event.accepted
        if event.reason != "cancelled":
            self.prefill_s, self.decode_s = event.prefill_s, event.decode_s
        if event.end is not None:
            self.tokens.append(event.end)


class LLM:
    """A model in memory.

    Args:
        source: what `headwise.read_model` takes; None is the embedded tiny-hybrid.
        context: tokens of prompt and answer that memory is planned for; default 8,192 or the model's maximum.
        kv: KV type of all layers, or {"global": ..., "sliding": ...}; default the activations' type.
        kv_layout: of layers with one tensor for K and V: "v+rotated" (default) or "v", see `spec.kv`.
        device: "cpu", "cuda:N", or a list of cards, each with a limit if need be ("cuda:0:12GiB"), which share the layers;
            "cuda", the default where there is one, is one card where the model fits, else as few as hold it.
        weights: "fp8" makes the layers' matrices and experts of a checkpoint in floats e4m3 while it is loaded, on a GPU.
        dtype: of the activations: "f32" (default on CPU), "bf16" (default on CUDA) or "f16".
        chunk: most tokens of one prefill step; default by the cards' speed and room, see `planner.ceiling.step_sizes`.
        backend: of every layer, "X", or by kind, "sliding=X,global=Y" or a mapping; default the first row that refuses nothing.
        slots: sequences at once, of which `generate`, `stream` and `logits` use the first; None: as many as `serve` takes.
        pool: tokens that the global layers hold of all sequences together; default `context` of each.
        rooms: in place of slots, pool and chunk, the first that fits; see `planner.memory.rooms`.
        deterministic: no row takes another's prefill, since which spans it gets depends on where a sequence's pages lie.
        allow_fallback: accept layers that do not run fused.
        check: run the start-up self-check.
        load: False stops before the weights, with a plan and what `check` needs.
    Raises:
        SpecError, PlanError, BackendError, UsageError: before the first tensor is read wherever that is possible.
    """

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        context: int | None = None,
        kv: str | Mapping[str, str] | None = None,
        kv_layout: str | None = None,
        device: str | Sequence[str] | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        chunk: int | None = None,
        backend: str | Mapping[str, str] | None = None,
        slots: int | None = 1,
        pool: int | None = None,
        rooms: Sequence[Room] = (),
        deterministic: bool = False,
        allow_fallback: bool = False,
        check: bool = True,
        load: bool = True,
        ignore_keys: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        progress: Progress | None = None,
        on_warning: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.source = (
            source if isinstance(source, Source) else open_model(source, ignore_keys=ignore_keys, env=os.environ, weights=True)
        )
        if self.source.path is None:
            raise UsageError(
                f"{self.source.name} is a description without weights", why="the catalogue holds none", do="headwise run PATH"
            )
        self.spec = laid_out(self.source.spec, kv_layout)
        allowed, together = seats(device)
        asked: dict[str, Any] = {
            "context": min(DEFAULT_CONTEXT, self.spec.max_context) if context is None else context,
            "slots": slots,
            "pool": pool,
            "rooms": rooms,
            "chunk": chunk,
            "kv": kv_by_kind(kv),
            "dtype": dtype,
            "forced": forced_backends(backend),
        }

        def work_of(
            kinds: Collection[DeviceKind], gpus: Sequence[Gpu | None] = ()
        ) -> tuple[Workload, Mapping[DeviceKind, tuple[Choice, ...]]]:
            work, by_kind = work_on(self.spec, kinds, gpus=gpus, **asked)
            for kind, choices in by_kind.items():
                require_fused(self.spec, choices, allow_fallback=allow_fallback, device=kind)
            return work, by_kind

        first = allowed if together else allowed[:1]
        work, _ = work_of({device_kind(p.device) for p in first})  # refused, where it is, before the weights are looked at
        if weights and work.cpu:
            raise UsageError(
                f"--weights {weights} has no effect on the CPU",
                why=f"matrices are expanded to {work.dtype} there",
                do="leave it out",
            )
        matched = match(self.spec, list_checkpoint(self.source.path))
        stored = made_at_load(self.spec, matched.types, weights)
        self.skipped = skipped_by_reason(matched)

        def plan_on(cards: Sequence[Card]) -> Plan:
            work, _ = work_of({c.kind for c in cards}, [c.gpu for c in cards])
            return plan(self.spec, stored, work, [c.target for c in cards])

        cards: Sequence[Card] = [card_of(p, sharing=len(first)) for p in first]
        self.plan = plan_on(cards)
        if not self.plan.fits and not together and len(allowed) > 1:
            every = [*cards, *(card_of(p) for p in allowed[1:])]
            self.plan, some = fewest([c.target for c in every], lambda some: plan_on([every[i] for i in some]))
            cards = [every[i] for i in some]
        require_fit(self.plan)
        used = [c for c in cards if any(c.target is t for t in self.plan.targets)]  # a card that gets no layer is left out
        quantised = self.plan.workload.fused and bool(planed(self.spec, self.plan.resident))
        kinds = dict.fromkeys(c.kind for c in used)
        formats = self.plan.workload.kv
        wide = any(layer.head_dim >= 256 or formats[layer.kind].bytes_per_value < 2 for layer in self.spec.layers)
        dtype = self.plan.workload.dtype
        said = (words for kind in kinds for words in slower(kind, dtype, wide=wide, quantised=quantised))
        self.plan = replace(self.plan, notes=(*self.plan.notes, *said))
        self.devices = tuple(c.seat.device for c in used)
        _, by_kind = work_of({c.kind for c in cards})
        choices = [by_kind[c.kind][i] for c, stage in zip(used, self.plan.stages, strict=True) for i in stage.layers]
        longest = self.plan.workload.chunk
        if deterministic or longest <= RECORDED_TOKENS:
            why = "what it gets depends on where keys lie" if deterministic else f"steps of {longest} tokens at most (--ubatch)"
            choices = [c.alone(why) for c in choices]
        self.choices = tuple(choices)
        self.kv = dict(self.plan.workload.kv)
        self.groups = group_layers(self.spec, self.choices, self.kv)
        self.checks: list[Check] = []
        self.checks_cached = False
        if check:  # before the weights: a wrong kernel is found before a long load, and the two never hold memory at once
            self.check(cache_file=default_cache_file(os.environ), on_warning=on_warning)
        if not load:
            return
        for c in used:
            keep_limit(c.seat)
        self.runner = Runner(self.plan, build_stages(self.plan, self.choices, self.devices, partial(self._load, progress)))
        self.costs = Costs()
        self._tokenizer, self._textless = tokenizer, False
        self._timing = _Timing()

    def _load(self, progress: Progress | None, index: int, device: torch.device) -> dict[str, Weight]:
        assert self.source.path is not None
        before, total = sum(s.weights_bytes for s in self.plan.stages[:index]), self.plan.weights_bytes
        return load_weights(
            self.spec,
            self.source.path,
            resident=self.plan.resident,
            device=device,
            groups=groups(self.spec, self.plan.resident),
            planes=planed(self.spec, self.plan.resident) if self.plan.workload.fused else (),
            layers=self.plan.stages[index].layers,
            progress=None if progress is None else lambda done, _: progress("weights", before + done, total),
        )

    @property
    def device(self) -> torch.device:
        """The first; the others are of its type."""
        return self.devices[0]

    @property
    def where(self) -> str:
        """The devices' names: "cuda:0", or "cuda:0 + cuda:1"."""
        return " + ".join(map(str, self.devices))

    def check(self, *, cache_file: Path | None = None, on_warning: Callable[[str], None] = lambda _: None) -> list[Check]:
        """Runs every backend in use against the reference, on each device that uses it; see `attention.verify`."""
        functions = attend_functions(self.choices)
        self.checks, self.checks_cached = [], True
        for device in dict.fromkeys(self.devices):
            here = {i for d, stage in zip(self.devices, self.plan.stages, strict=True) if d == device for i in stage.layers}
            local = [tuple(i for i in g.layers if i in here) for g in self.groups]
            mine = [replace(g, layers=layers) for g, layers in zip(self.groups, local, strict=True) if layers]
            with on_device(device):
                checks, cached = check_all(
                    mine,
                    {g.layers[0]: functions[g.layers[0]] for g in mine},
                    chunk=self.plan.workload.chunk,
                    dtype=TORCH[self.plan.workload.dtype],
                    device=device,
                    cache_file=cache_file,
                    on_warning=on_warning,
                )
            self.checks += checks
            self.checks_cached &= cached
        return self.checks

    @property
    def tokenizer(self) -> Tokenizer:
        """Read on first use: `logits` needs none."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.source)
        return self._tokenizer

    def _tokenizer_or_none(self) -> Tokenizer | None:
        """For prompts of ids: without a tokenizer the tokens come without text."""
        if self._tokenizer is None and not self._textless:
            try:
                return self.tokenizer
            except SpecError:
                self._textless = True
        return self._tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the model's, and its tokenizer's where it has one."""
        tokenizer = self._tokenizer_or_none()
        return frozenset(self.spec.eos_ids) | (tokenizer.eos_ids if tokenizer else frozenset())

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, beginning with the model's BOS token where it wants one."""
        return self.tokenizer.encode(text)

    def logits(self, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
        """Logits at every position: (len(token_ids), vocab_size), fp32, on the CPU.

        Args:
            chunk: tokens per step, at most the planned chunk (default); 1 is token-by-token decode.
        """
        ids = self._checked(token_ids, room=0)
        step = self.plan.workload.chunk if chunk is None else chunk
        if not 1 <= step <= self.plan.workload.chunk:
            raise UsageError(
                f"chunk {step} makes no sense", why=f"1..{self.plan.workload.chunk} is planned", do="LLM(..., chunk=N)"
            )
        out = torch.empty(len(ids), self.spec.vocab_size)
        self.runner.reset()
        for start in range(0, len(ids), step):
            x = self.runner.step(ids[start : start + step])
            for row in range(x.shape[0]):  # one row at a time: the arena has room for one
                out[start + row] = self.runner.logits(x[row : row + 1])[0]
        return out

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        speculate: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Continues `prompt` token by token; ends at an end token, at `max_tokens`, or where the context ends.

        Args:
            speculate: draft tokens from what the text repeats, where that pays; tokens are those without, up to the rounding of
                a longer step.
        """
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        ids = self._checked(self.tokenize(prompt) if isinstance(prompt, str) else prompt, room=1)
        tokenizer = self.tokenizer if isinstance(prompt, str) else self._tokenizer_or_none()
        return self._generate(Request(id=0, prompt=tuple(ids), sampling=sampling), tokenizer, speculate, progress)

    def _generate(
        self, request: Request, tokenizer: Tokenizer | None, speculate: bool, progress: Progress | None
    ) -> Iterator[Piece]:
        """One request of an engine that has no other."""
        timing = self._timing = _Timing(prefill_tokens=len(request.prompt))
        decoder = tokenizer.stream(continues=True) if tokenizer else None
        said: deque[Event] = deque()
        engine = Engine(self, said.append, speculate=speculate, keep=False)
        engine.submit(request)
        start = time.perf_counter()
        try:
            while said or engine.busy:
                if not said:
                    engine.round()
                    continue
                event = said.popleft()
                now = time.perf_counter()
                match event:
                    case Prefill():
                        if progress is not None and event.done:
                            progress("prompt", event.done, event.total)
                    case Token():
                        if timing.tokens:
                            timing.decode_tokens += 1
                            timing.decode_s = now - start
                        else:
                            timing.prefill_s, start = now - start, now
                        timing.tokens.append(event.token)
                        yield Piece(event.token, decoder.push(event.token) if decoder else "")
                    case Finish():
                        timing.finished(event)
                        if event.error:
                            what, why, do = event.error
                            raise HeadwiseError(what, why=why, do=do)
        finally:
            engine.cancel(request.id)  # where the caller goes before the end
            for event in said:
                if isinstance(event, Finish):
                    timing.finished(event)
        if decoder and (rest := decoder.flush()):
            yield Piece(timing.tokens[-1], rest)

    def generate(self, prompt: str | Sequence[int], **settings: object) -> Result:
        """All of `stream` at once; takes the same settings."""
        text = "".join(piece.text for piece in self.stream(prompt, **settings))  # type: ignore[arg-type]
        return Result(text=text, tokens=list(self._timing.tokens), report=self.report(), finish=self._timing.finish)

    def report(self) -> Report:
        """Of the last generation."""
        t = self._timing
        return Report(
            layers=len(self.spec.layers),
            layers_fused=sum(c.fused for c in self.choices),
            backends=self.groups,
            planned_bytes=self.plan.total_bytes,
            allocated_bytes=self.runner.allocated_bytes,
            peak_bytes=self.runner.peak_bytes,
            devices=tuple(
                DeviceReport(
                    device=str(stage.device),
                    layers=tuple(stage.layers),
                    planned_bytes=planned.total_bytes,
                    allocated_bytes=stage.allocated_bytes,
                    peak_bytes=stage.peak_bytes,
                )
                for stage, planned in zip(self.runner.stages, self.plan.stages, strict=True)
            ),
            prefill_tokens=t.prefill_tokens,
            prefill_s=t.prefill_s,
            decode_tokens=t.decode_tokens,
            decode_s=t.decode_s,
            drafted=t.drafted,
            accepted=t.accepted,
        )

    def _checked(self, ids: Sequence[int], *, room: int) -> list[int]:
        ids = list(ids)
        if not ids:
            raise UsageError("the prompt is empty", why="there is nothing to continue", do="-p TEXT")
        if (worst := max(ids)) >= self.spec.vocab_size or min(ids) < 0:
            bad = worst if worst >= self.spec.vocab_size else min(ids)
            raise UsageError(
                f"token id {bad} does not exist", why=f"the vocabulary has {self.spec.vocab_size}", do="check the tokenizer"
            )
        if len(ids) + room > self.plan.workload.context:
            raise prompt_too_long(len(ids), self.plan.workload.context, self.spec.max_context)
        return ids


def run_context(spec: ModelSpec, n_prompt: int, max_tokens: int) -> int:
    """The context `headwise run` plans for when none is given: room for the prompt and the answer, 8,192 at least."""
    return min(spec.max_context, max(DEFAULT_CONTEXT, n_prompt + max_tokens))


def prompt_too_long(n: int, context: int, most: int) -> HeadwiseError:
    do = f"--context {min(most, n + 256)}" if n < most else "a shorter prompt"
    return PlanError(
        f"the prompt has {n} tokens", why=f"the context is {context} of at most {most}, and an answer needs room", do=do
    )


def require_fit(p: Plan) -> None:
    """Raises PlanError, before anything is loaded, when the plan does not fit its devices."""
    if p.fits:
        return
    w = p.workload
    needs = f"{gib(p.total_bytes)} (weights {gib(p.weights_bytes)}, KV {gib(p.kv_bytes)}, compute {gib(p.compute_bytes)})"
    held = "; ".join(
        (f"{s.target.name} would hold {gib(s.planned_bytes)}, " if len(p.shares) > 1 else "")
        + f"{gib(s.target.usable_bytes)} of {gib(s.target.total_bytes)} are usable, {gib(s.target.others_bytes)} are held by others"
        for s in p.shares
    )
    raise PlanError(
        f"{p.spec.name} with {w.context} tokens does not fit {' and '.join(t.name for t in p.targets)}",
        why=f"needs {needs}; {held}",
        do=f"--context {p.max_context} fits" if p.max_context else "weights alone are too much: a smaller weight type or model",
    )


def tokenizer_of(source: Source) -> Tokenizer:
    assert source.path is not None
    return read_tokenizer(source.path if source.gguf is None else source.gguf)
