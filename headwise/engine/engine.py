"""The loop: admit, schedule, run, sample, emit. One model, a few slots; the only place that knows all requests.

An error of one request ends that request. What is no error of ours is a bug and ends the process: `engine.process` starts
another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwise.engine.constrain import Constrainer, Constraint
from headwise.engine.kept import Kept, keep_after
from headwise.engine.llm import LLM
from headwise.engine.request import Event, Finish, Prefill, Reason, Request, Token
from headwise.engine.sample import Sampler
from headwise.engine.schedule import Load, best_slot, next_waiting, saving, schedule
from headwise.errors import HeadwiseError, PlanError
from headwise.hardware.probe import cpu_memory
from headwise.planner.memory import CPU_MARGIN_BYTES


@dataclass(slots=True)
class _Running:
    """A request that holds a slot."""

    request: Request
    slot: int
    sampler: Sampler
    constraint: Constraint | None
    cached: int
    done: int  # tokens in the cache
    started: float
    queue_s: float
    first: float | None = None  # when its first token came
    answer: list[int] = field(default_factory=list[int])


class Engine:
    """Requests over the slots of one loaded model.

    Args:
        emit: takes every event, in order.
    """

    def __init__(self, llm: LLM, emit: Callable[[Event], None]) -> None:
        self.llm, self.runner, self.emit = llm, llm.runner, emit
        self.stop = frozenset(llm.spec.eos_ids) | llm.tokenizer.eos_ids
        self.held: dict[int, list[int]] = {slot: [] for slot in range(len(llm.runner.slots))}  # least recently used first
        self.kept = _kept(llm)
        self.keep_after = keep_after(llm.runner.rings) if self.kept else 0
        self.waiting: list[tuple[Request, float]] = []
        self.running: list[_Running] = []
        self._served: dict[str, int] = {}
        self._admissions = 0
        self._constrainer: Constrainer | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        self.waiting.append((request, time.perf_counter()))

    def cancel(self, request_id: int) -> None:
        """Ends a request that waits or runs; its slot keeps what it has computed. Unknown ids have ended by themselves."""
        for i, (request, _) in enumerate(self.waiting):
            if request.id == request_id:
                del self.waiting[i]
                self.emit(Finish(request=request_id, reason="cancelled", prompt_tokens=len(request.prompt)))
                return
        for r in self.running:
            if r.request.id == request_id:
                self._finish(r, "cancelled")
                return

    def round(self) -> None:
        """Admits what has a slot, then one step for each sequence that is due."""
        free = set(self.held) - {r.slot for r in self.running}
        while free and self.waiting:
            index = next_waiting([request for request, _ in self.waiting], self._served)
            self._admit(*self.waiting.pop(index), free)
            free = set(self.held) - {r.slot for r in self.running}
        running = {r.slot: r for r in self.running}
        loads = [Load(r.slot, max(0, len(r.request.prompt) - r.done)) for r in self.running]
        for step in schedule(loads, self.runner.chunk):
            r = running[step.slot]
            try:
                self._step(r, step.n)
            except HeadwiseError as error:
                self._finish(r, "error", (error.what, error.why, error.do))

    def _admit(self, request: Request, arrived: float, free: set[int]) -> None:
        self._admissions += 1
        self._served[request.client] = self._admissions
        while len(self._served) > 1024:
            self._served.pop(min(self._served, key=lambda c: self._served[c]))
        room = self.llm.plan.workload.context - len(request.prompt)
        try:
            if not request.prompt or room < 1:
                raise PlanError(f"the prompt has {len(request.prompt)} tokens", why=f"the context is {room + len(request.prompt)}")
            constraint = None
            if request.grammar is not None:
                self._constrainer = self._constrainer or Constrainer(self.llm.tokenizer)
                if request.grammar.trigger is None:
                    constraint = self._constrainer.start(request.grammar, min(room, request.sampling.max_tokens))
        except HeadwiseError as error:
            said = (error.what, error.why, error.do)
            self.emit(Finish(request=request.id, reason="error", prompt_tokens=len(request.prompt), error=said))
            return
        savings = {
            s: (len(held), saving(held, self.kept[s].tokens if self.kept else (), request.prompt, self.runner.rings))
            for s, held in self.held.items()
            if s in free
        }
        slot = best_slot(savings, len(request.prompt))
        cached = savings[slot][1].n
        if savings[slot][1].restored:
            self.kept[slot].restore()
        self.held.pop(slot)
        self.held[slot] = list(request.prompt[:cached])
        now = time.perf_counter()
        r = _Running(request, slot, Sampler(request.sampling), constraint, cached, cached, now, now - arrived)
        self.running.append(r)
        self.emit(Prefill(request.id, cached, len(request.prompt), cached))

    def _step(self, r: _Running, n: int) -> None:
        """Runs the next `n` tokens of a prompt, or the last token of an answer, and samples where one is due."""
        prompt = r.request.prompt
        ids = list(prompt[r.done : r.done + n]) if r.done < len(prompt) else r.answer[-1:]
        self.runner.use(r.slot, r.done)
        x = self.runner.step(ids)
        r.done += len(ids)
        self.held[r.slot] += ids
        if self.kept and r.done - len(prompt) == self.keep_after:
            self.kept[r.slot].take(self.held[r.slot].copy())
        if not r.answer:
            self.emit(Prefill(r.request.id, r.done, len(prompt), r.cached))
            if r.done < len(prompt):
                return
        self._sample(r, self.runner.logits(x[-1:])[0])

    def _sample(self, r: _Running, logits_V: Tensor) -> None:
        allowed = None
        if r.constraint is not None:
            mask = r.constraint.allowed()
            allowed = torch.zeros(logits_V.numel(), dtype=torch.bool)  # a model's padding rows have no token
            allowed[: min(mask.numel(), logits_V.numel())] = mask[: logits_V.numel()]
            if not allowed.any():
                self._finish(r, "stop")
                return
        token = r.sampler.token(logits_V, allowed)
        r.first = r.first or time.perf_counter()
        r.answer.append(token)
        if token in self.stop:
            self._finish(r, "stop")
            return
        logprob, top = None, ()
        if r.request.top_logprobs is not None:
            logprobs = logits_V.float().log_softmax(-1)
            values, index = logprobs.topk(min(r.request.top_logprobs, logprobs.numel()))
            top = tuple(zip(index.tolist(), values.tolist(), strict=True))
            logprob = float(logprobs[token])
        self.emit(Token(r.request.id, token, logprob, top))
        self._follow(r, token)
        if len(r.answer) >= r.request.sampling.max_tokens or r.done >= self.llm.plan.workload.context:
            self._finish(r, "stop" if r.constraint is not None and r.constraint.complete else "length")

    def _follow(self, r: _Running, token: int) -> None:
        """Moves the grammar on, begins it at its trigger, and drops it where it is complete."""
        grammar = r.request.grammar
        if grammar is None:
            return
        if r.constraint is not None:
            r.constraint.take(token)
            if grammar.trigger is not None and r.constraint.complete:
                r.constraint = None
        elif token == grammar.trigger and self._constrainer is not None:
            left = min(self.llm.plan.workload.context - r.done, r.request.sampling.max_tokens - len(r.answer))
            r.constraint = self._constrainer.start(grammar, left)

    def _finish(self, r: _Running, reason: Reason, error: tuple[str, str, str] | None = None) -> None:
        now = time.perf_counter()
        first = r.first or now
        self.running.remove(r)
        self.emit(
            Finish(
                request=r.request.id,
                reason=reason,
                prompt_tokens=len(r.request.prompt),
                cached_tokens=r.cached,
                tokens=len(r.answer),
                queue_s=r.queue_s,
                prefill_s=first - r.started,
                decode_s=now - first,
                error=error,
            )
        )


def _kept(llm: LLM) -> list[Kept]:
    """A copy of its rings for each slot; none where no ring forgets, or where the host has no room (planned as the rings are)."""
    if not any(slots < llm.plan.workload.context for slots in llm.runner.rings.values()):
        return []
    if cpu_memory()[1] < llm.plan.kv_sliding_bytes + CPU_MARGIN_BYTES:
        return []
    return [Kept(caches) for caches in llm.runner.slots]
