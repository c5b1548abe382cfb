"""The loop: admit, schedule, run, sample, emit. One model, a few slots; the only place that knows all requests.

An error of one request ends that request. What is no error of ours is a bug and ends the process: `engine.process` starts
another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.cache.pages import pages_for
from headwise.engine.batch import Run
from headwise.engine.constrain import Constrainer, Constraint
from headwise.engine.draft import Drafts, propose
from headwise.engine.prefixes import Prefixes, keep_after
from headwise.engine.request import Event, Finish, Prefill, Reason, Request, Token
from headwise.engine.sample import Arriving, Sampler
from headwise.engine.schedule import Load, next_waiting, schedule
from headwise.errors import HeadwiseError, PlanError
from headwise.hardware.probe import cpu_memory
from headwise.planner.memory import CPU_MARGIN_BYTES
from headwise.planner.workspace import ring_slots
from headwise.spec.kv import DRAFT_TOKENS

if TYPE_CHECKING:
    from headwise.engine.llm import LLM

BESIDE = {"cpu": 128, "cuda": 512}  # most prompt tokens in a step with answers


@dataclass(slots=True, eq=False)
class _Running:
    """A request that holds a slot, or has held one and waits for another."""

    request: Request
    sampler: Sampler
    constraint: Constraint | None
    tokens: list[int]  # the prompt's and the answer's
    arrived: float
    started: float
    slot: int = -1
    cached: int = 0
    done: int = 0  # tokens in the cache
    parting: int | None = None  # tokens after which the ring is worth a copy, because another prompt parted here
    kept: bool = False
    first: float | None = None  # when its first token came
    drafts: Drafts = field(default_factory=Drafts)
    draft: Sequence[int] = ()
    ended: Reason | None = None
    end: int | None = None

    @property
    def answers(self) -> bool:
        return self.done == len(self.tokens) - 1 >= len(self.request.prompt)


@dataclass(slots=True, eq=False)
class _Flight:
    """A step that the device computes, and its tokens on their way to the host.

    Args:
        drawn_W: of every wanted row, on the device.
    """

    due: list[tuple[_Running, Run]]
    logits_WV: Tensor
    drawn_W: Tensor
    arriving: Arriving
    launched: float


@dataclass(slots=True, eq=False)
class _Waiting:
    request: Request
    arrived: float
    again: _Running | None = None  # it ran, and gave its pages to older ones


class Engine:
    """Requests over the slots of one loaded model.

    Args:
        emit: takes every event, in order.
        deterministic: every sequence in steps of its own, and only prefixes that a cold start would compute so: an answer does
            not depend on what else runs or ran. The model must have been loaded so too.
        speculate: draft tokens from what a sequence repeats, where that pays.
        keep: copies of rings for later turns.
        ahead: launch the next step of answers before the host has their tokens; default on a GPU.
    """

    def __init__(
        self, llm: LLM, emit: Callable[[Event], None], *, deterministic: bool = False, speculate: bool = True, keep: bool = True,
        ahead: bool | None = None,
    ) -> None:  # fmt: skip
        self.llm, self.runner, self.emit = llm, llm.runner, emit
        self.deterministic, self.speculate = deterministic, speculate and not deterministic
        on_gpu = self.runner.stages[0].device.type == "cuda"
        self.ahead = len(self.runner.stages) == 1 and not deterministic and (on_gpu if ahead is None else ahead)
        self._flight: _Flight | None = None
        self._landed_at = 0.0  # the last step, while there are requests: steps with drafts and without are timed alike
        self.stop = llm.end_ids
        w = llm.plan.workload
        copies = ring_slots(llm.spec, n_tokens=w.context, chunk=w.back_tokens)
        self.prefixes = Prefixes(
            self.runner.caches, self.runner.rings, copies, slots=w.slots, pages=pages_for(w.pool_tokens),
            n_kept=_copies(llm) if keep else 0, chunk=self.runner.chunk if deterministic else None,
        )  # fmt: skip
        self.keep_after = max(0, keep_after(copies) - DRAFT_TOKENS)
        self.waiting: list[_Waiting] = []
        self.running: list[_Running] = []  # oldest first
        self._served: dict[str, int] = {}
        self._admissions = 0
        self.drafted = 0  # tokens that each answer of a step has behind its next one
        self._constrainer: Constrainer | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        self.waiting.append(_Waiting(request, time.perf_counter()))

    def cancel(self, request_id: int) -> None:
        """Ends a request that waits or runs; its slot keeps what it has computed. Unknown ids have ended by themselves."""
        for w in self.waiting:
            if w.request.id == request_id:
                self.waiting.remove(w)
                self.emit(Finish(request=request_id, reason="cancelled", prompt_tokens=len(w.request.prompt)))
                return
        for r in self.running:
            if r.request.id == request_id:
                self._finish(r, "cancelled")
                return

    def round(self) -> None:
        """Admits what has a slot and pages, then a step of everything that is due."""
        with self.runner.on_stream():
            self._round()

    def _round(self) -> None:
        if (flight := self._flight) is not None:
            self._flight = self._following(flight)
            self._land(flight)
            if self._flight is not None:
                return
        while (i := self._next()) is not None:
            self._admit(self.waiting.pop(i))
        if self.speculate:
            self._draft([r for r in self.running if r.answers])
        loads = [self._load(r) for r in self.running]
        beside = BESIDE[self.runner.stages[0].device.type]
        by_slot = {r.slot: r for r in self.running}
        for steps in schedule(loads, self.runner.chunk, beside=beside, alone=self.deterministic):
            if flight := self._step([(by_slot[s.slot], s.n) for s in steps if by_slot[s.slot] in self.running]):
                if self._goes_on(flight):
                    self._flight = flight
                else:
                    self._land(flight)

    def _next(self) -> int | None:
        """Which of the waiting has a slot and pages now."""
        if not self.waiting or not self.prefixes.free:
            return None
        i = next((i for i, w in enumerate(self.waiting) if w.again), None)
        i = next_waiting([w.request for w in self.waiting], self._served) if i is None else i
        return i if self.prefixes.has_room(self._n_tokens(self.waiting[i]) + 1) else None

    def _goes_on(self, flight: _Flight) -> bool:
        """Whether the step after this one needs nothing of what the host will know: all are answers, a token each, drawn by
        logits alone, that do not end with it, and nobody waits who could be admitted."""
        return (
            self.ahead
            and len(flight.due) == len(self.running)
            and self._next() is None
            and all(
                r in self.running and r.answers and run.n == 1 and r.sampler.plain and r.constraint is None
                and r.request.top_logprobs is None and self._left(r) > 1 and r.done + 2 < self.llm.plan.workload.context
                and (r.kept or r.done + 1 - len(r.request.prompt) < self.keep_after)
                for r, run in flight.due
            )
        )  # fmt: skip

    def _following(self, flight: _Flight) -> _Flight | None:
        """The step after one whose tokens the host does not have yet, launched; None where that has to wait for them."""
        if not self._goes_on(flight):
            return None
        if self.speculate:
            self._draft([r for r, _ in flight.due])
            if self.drafted:
                for r, _ in flight.due:
                    r.draft = ()  # proposed again once the token is known
                return None
        if not all(self.prefixes.grow(r.slot, r.done + 2) for r, _ in flight.due):
            return None
        due = [(r, Run(self.prefixes.slots[r.slot].place, r.done + 1, [0])) for r, _ in flight.due]  # ids are on the device
        return self._launch(due, flight.drawn_W)

    def _n_tokens(self, w: _Waiting) -> int:
        return len(w.again.tokens if w.again else w.request.prompt)

    def _load(self, r: _Running) -> Load:
        left = len(r.tokens) - r.done
        if r.answers:
            return Load(r.slot, 1 + self.drafted, prompt=False)
        if self.deterministic:  # what was an answer's is computed a token at a time again
            left = max(1, len(r.request.prompt) - r.done)
        return Load(r.slot, left, prompt=True, until=r.parting - r.done if r.parting else None)

    def _draft(self, answers: Sequence[_Running]) -> None:
        """Tokens to try behind the next one of each answer: as many each as step, contexts and answers have room for."""
        if not answers:
            return
        context, left = self.llm.plan.workload.context, [self._left(r) for r in answers]
        room = min((self.runner.rows - len(self.running)) // len(answers), *(context - r.done - 1 for r in answers))
        room = min(room, self.runner.chunk // len(answers) - 1, max(left) - 1)
        drafts = propose([(r.drafts, r.tokens) for r in answers], room, self.llm.costs.of(len(answers)))
        self.drafted = max(map(len, drafts))
        for r, draft, n in zip(answers, drafts, left, strict=True):
            r.draft = draft[: n - 1]

    def _left(self, r: _Running) -> int:
        """Tokens that an answer may still have."""
        return r.request.sampling.max_tokens - (len(r.tokens) - len(r.request.prompt))

    def _admit(self, w: _Waiting) -> None:
        request, now = w.request, time.perf_counter()
        r = w.again
        if r is None:
            self._admissions += 1
            self._served[request.client] = self._admissions
            while len(self._served) > 1024:
                self._served.pop(min(self._served, key=lambda c: self._served[c]))
            room = self.llm.plan.workload.context - len(request.prompt)
            try:
                if not request.prompt or room < 1:
                    raise PlanError(
                        f"the prompt has {len(request.prompt)} tokens", why=f"the context is {room + len(request.prompt)}"
                    )
                constraint = self._constraint(request, min(room, request.sampling.max_tokens))
            except HeadwiseError as error:
                self.emit(Finish(request=request.id, reason="error", prompt_tokens=len(request.prompt), error=error.parts))
                return
            r = _Running(request, Sampler(request.sampling), constraint, list(request.prompt), w.arrived, now)
        r.slot, r.done, r.parting = self.prefixes.admit(r.tokens)
        if w.again is None:
            r.cached = r.done
        self.running.append(r)
        self.running.sort(key=lambda r: r.started)
        if w.again is None:
            self.emit(Prefill(request.id, r.done, len(request.prompt), r.cached))

    def _constraint(self, request: Request, most: int) -> Constraint | None:
        if request.grammar is None:
            return None
        self._constrainer = self._constrainer or Constrainer(self.llm.tokenizer)
        return self._constrainer.start(request.grammar, most)

    def _step(self, due: list[tuple[_Running, int]]) -> _Flight | None:
        """One forward pass over the next tokens of each, launched."""
        due = [(r, n) for r, n in due if self._has_pages(r, r.done + n)]
        runs: list[tuple[_Running, Run]] = []
        for r, n in due:
            if r not in self.running:  # gave its pages to older ones
                continue
            if r.answers:  # as long as the others of the step: a token that nobody tries is refused as one that was wrong
                ids = [r.tokens[-1], *r.draft, *[r.tokens[-1]] * (n - 1 - len(r.draft))]
            else:
                ids = r.tokens[r.done : r.done + n]
            wanted = n if r.answers else int(r.done + n == len(r.tokens))
            runs.append((r, Run(self.prefixes.slots[r.slot].place, r.done, ids, wanted)))
        return self._launch(runs) if runs else None

    def _launch(self, due: list[tuple[_Running, Run]], ids: Tensor | None = None) -> _Flight | None:
        """A step on its way, with `ids` of the device in place of the runs'; None where it failed, and its requests with it."""
        now = time.perf_counter()
        try:
            x = self.runner.run([run for _, run in due], ids)
            draws = [d for r, run in due for d in r.sampler.draws(run.wanted, after=int(ids is not None))]
            logits, drawn = self.runner.draw(x, draws) if draws else (x, torch.empty(0, dtype=torch.int64, device=x.device))
        except HeadwiseError as error:
            for r, _ in due:
                self._finish(r, "error", error.parts)
            return None
        return _Flight(due, logits, drawn, Arriving(drawn), now)

    def _land(self, flight: _Flight) -> None:
        """What follows from a step, once its tokens are there."""
        drawn, now = flight.arriving.wait(), time.perf_counter()
        if all(r.answers and r in self.running for r, _ in flight.due) and len({run.n for _, run in flight.due}) == 1:
            self.llm.costs.took(len(flight.due), flight.due[0][1].n, now - (self._landed_at or flight.launched))
        self._landed_at = now
        row = 0
        for r, run in flight.due:
            if r in self.running:  # it may have ended while this step was on its way
                run = run._replace(ids=[r.tokens[r.done]]) if run.n == 1 else run  # the host knows it now
                self._follow_up(r, run, flight.logits_WV[row : row + run.wanted], drawn[row : row + run.wanted])
            row += run.wanted

    def _has_pages(self, r: _Running, n_tokens: int) -> bool:
        """Makes room for a sequence; the youngest gives way, whose tokens are computed again when there is room."""
        while r in self.running and not self.prefixes.grow(r.slot, n_tokens):
            youngest = self.running.pop()
            self.prefixes.leave(youngest.slot)
            self.waiting.insert(0, _Waiting(youngest.request, youngest.arrived, youngest))
        return r in self.running

    def _follow_up(self, r: _Running, run: Run, logits_WV: Tensor, drawn: Sequence[int]) -> None:
        """What a step of one request leads to: more of the prompt, or tokens of the answer."""
        prompt = len(r.request.prompt)
        if not r.answers:
            r.done += run.n
            self.prefixes.wrote(r.slot, run.ids)
            if r.done == r.parting:
                self.prefixes.keep(r.slot, parting=True)
                r.parting = None
            if len(r.tokens) == prompt:
                self.emit(Prefill(r.request.id, r.done, prompt, r.cached))
            if run.wanted:
                self._sample(r, logits_WV[0], drawn[0])
            self._end(r)
            return
        accepted = 0
        for i in range(run.n):
            token = self._sample(r, logits_WV[i], drawn[i])
            if i == len(r.draft) or token != r.draft[i]:
                break
            accepted += 1
        computed = min(1 + accepted, run.n)
        if r.draft:
            r.drafts.verified(len(r.draft), accepted)
        r.done += computed
        self.prefixes.wrote(r.slot, run.ids[:computed], run.n - computed)
        if not r.kept and r.done - prompt >= self.keep_after:
            r.kept = True
            self.prefixes.keep(r.slot)
        self._end(r)

    def _sample(self, r: _Running, logits_V: Tensor, drawn: int) -> int | None:
        """The next token of an answer; None where the answer has ended."""
        allowed = None
        if r.constraint is not None and (mask := r.constraint.allowed()) is not None:
            allowed = torch.zeros(logits_V.numel(), dtype=torch.bool)  # a model's padding rows have no token
            allowed[: min(mask.numel(), logits_V.numel())] = mask[: logits_V.numel()]
            if not allowed.any():
                r.ended = "stop"
                return None
        token = r.sampler.token(logits_V, allowed, drawn)
        r.first = r.first or time.perf_counter()
        r.tokens.append(token)
        if token in self.stop:
            r.ended, r.end = "stop", token
            return None
        logprob, top = None, ()
        if r.request.top_logprobs is not None:
            logprobs = logits_V.float().log_softmax(-1)
            values, index = logprobs.topk(min(r.request.top_logprobs, logprobs.numel()))
            top = tuple(zip(index.tolist(), values.tolist(), strict=True))
            logprob = float(logprobs[token])
        self.emit(Token(r.request.id, token, logprob, top))
        if r.constraint is not None:
            r.constraint.take(token)
        n = len(r.tokens) - len(r.request.prompt)
        if n >= r.request.sampling.max_tokens or len(r.tokens) > self.llm.plan.workload.context:
            r.ended = "stop" if r.constraint is not None and r.constraint.complete else "length"
            return None
        return token

    def _end(self, r: _Running) -> None:
        if r.ended is not None:
            self._finish(r, r.ended)

    def _finish(self, r: _Running, reason: Reason, error: tuple[str, str, str] | None = None) -> None:
        now = time.perf_counter()
        first = r.first or now
        self.running.remove(r)
        if self._flight is not None and any(r is other for other, _ in self._flight.due):
            self.prefixes.wrote(r.slot, (), 1)  # by the step on its way, as a refused draft
        self.prefixes.leave(r.slot)
        if not self.running:
            self._landed_at = 0.0
        self.emit(
            Finish(
                request=r.request.id,
                reason=reason,
                prompt_tokens=len(r.request.prompt),
                cached_tokens=r.cached,
                tokens=len(r.tokens) - len(r.request.prompt),
                end=r.end,
                drafted=r.drafts.proposed,
                accepted=r.drafts.accepted,
                queue_s=r.started - r.arrived,
                prefill_s=first - r.started,
                decode_s=now - first,
                error=error,
            )
        )


def _copies(llm: LLM) -> int:
    """Copies of rings: as planned, or as many as the host has room for."""
    if not any(slots < llm.plan.workload.context for slots in llm.runner.rings.values()):
        return llm.plan.n_copies  # of pages alone
    return max(0, min(llm.plan.n_copies, (cpu_memory()[1] - CPU_MARGIN_BYTES) // llm.plan.copy_bytes))
