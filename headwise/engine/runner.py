"""A few sequences of a model in memory, and the steps over them, from stage to stage.

Everything is allocated by the stages, by the plan, before the first step; a step allocates nothing that the plan does not bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from headwise.cache.storage import Place
from headwise.engine.batch import FILL_TOKENS, Run
from headwise.engine.sample import Draw
from headwise.engine.stage import Stage
from headwise.errors import PlanError
from headwise.planner.memory import Plan
from headwise.planner.workspace import logit_rows, ring_slots

Progress = Callable[[int, int], None]


class Runner:
    """Forward passes over some of the planned sequences together.

    Args:
        stages: of the plan, in order.
    """

    def __init__(self, plan: Plan, stages: Sequence[Stage]) -> None:
        w = plan.workload
        self.plan, self.stages, self.spec = plan, tuple(stages), plan.spec
        self.context, self.chunk, self.rows = w.context, w.chunk, logit_rows(w.slots, w.chunk)
        self.rings = ring_slots(plan.spec, n_tokens=w.context, chunk=w.chunk)
        self.caches = {i: cache for stage in self.stages for i, cache in stage.caches.items()}
        self.position = 0  # of the one sequence of `step`

    def reset(self) -> None:
        """Forgets the one sequence of `step`; its slots are written again before anything reads them."""
        self.position = 0

    def step(self, ids: Sequence[int], *, wanted: int | None = None) -> Tensor:
        """Runs `ids` at the next positions of the one sequence; the hidden states of the last `wanted`, default all."""
        x = self.run([Run(Place(), self.position, ids, len(ids) if wanted is None else wanted)])
        self.position += len(ids)
        return x

    def run(self, runs: Sequence[Run], ids: Tensor | None = None) -> Tensor:
        """One forward pass over tokens of one or several sequences; their caches have them afterwards.

        Args:
            ids: of runs of one token each, on the first device, in place of the runs' own, which the host does not know yet.
        Returns:
            The wanted hidden states in the order of `runs`, (W, D), valid until the next step.
        Raises:
            PlanError: a sequence would pass the planned context; ValueError: more ids than a chunk.
        """
        n = sum(r.n for r in runs)
        if not 0 < n <= self.chunk or not all(r.n for r in runs):
            raise ValueError(f"a step of {n} tokens in {len(runs)} runs; chunks are 1..{self.chunk}")
        if ids is not None and (n != len(runs) or ids.shape != (n,)):
            raise ValueError(f"ids {tuple(ids.shape)} of the device for {len(runs)} runs of {n} tokens: one for each run")
        for r in runs:
            if r.stop > self.context:
                raise PlanError(
                    f"the sequence would reach {r.stop} tokens",
                    why=f"{self.context} are planned and allocated",
                    do=f"--context {min(self.spec.max_context, r.stop)}",
                )
        padded = self._padded(runs)
        before, x = None, torch.empty(0)
        for stage in self.stages:
            x = stage.step(padded, before, ids)
            before = stage
        return x if padded is runs else x[:n]

    def _padded(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Runs of one length as many as a recorded step has: the last again, which writes what it writes and is not looked at. Of a
        chunk alone as many tokens."""
        B, n = len(runs), runs[0].n
        if B == 1 and not runs[0].answers:
            padded = runs[0].filled(min(self.chunk, -(-n // FILL_TOKENS) * FILL_TOKENS))
        else:
            more = (1 << (B - 1).bit_length()) - B
            if not more or (B + more) * n > min(self.chunk, self.rows) or any(r.n != n for r in runs):
                return runs
            padded = [*runs, *[runs[-1]] * more]
        return padded if all(stage.recorded(padded) for stage in self.stages) else runs

    def logits(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Of hidden states that a step gave, (T, vocab); without `out` valid until the next ones, and of `rows` at most."""
        return self.stages[-1].logits(x_TD, self.rows, out)

    def draw(self, x_TD: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """As `logits`, and a token of each row, (T,), on the device."""
        return self.stages[-1].draw(x_TD, self.rows, draws)

    def on_stream(self) -> AbstractContextManager[object]:
        """Steps, and what is read of them, on the stream of the one stage: else each step and each reading waits for the caller's
        stream and lets that wait for it. The streams of several stages are on devices of their own, and theirs to change to."""
        return self.stages[0].own_stream() if len(self.stages) == 1 else nullcontext()

    def prefill(self, ids: Sequence[int], *, progress: Progress | None = None, chunk: int | None = None) -> Tensor:
        """Runs a whole prompt in chunks; the hidden state of its last token, (1, D)."""
        step = chunk or self.chunk
        x = torch.empty(0)
        for start in range(0, len(ids), step):
            x = self.step(ids[start : start + step], wanted=int(start + step >= len(ids)))
            if progress:
                progress(min(start + step, len(ids)), len(ids))
        return x

    @property
    def allocated_bytes(self) -> int:
        return sum(stage.allocated_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The sum of the devices' peaks."""
        return sum(stage.peak_bytes for stage in self.stages)
