"""A few sequences of a model in memory: where each stands, and the steps over one of them at a time, from stage to stage.

Everything is allocated by the stages, by the plan, before the first step; a step allocates nothing that the plan does not bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache
from headwise.engine.stage import Stage
from headwise.errors import PlanError
from headwise.planner.memory import Plan

Progress = Callable[[int, int], None]


class Runner:
    """The state of the planned sequences, a slot each, and the forward passes over the one in use.

    Args:
        stages: of the plan, in order.
    """

    def __init__(self, plan: Plan, stages: Sequence[Stage]) -> None:
        self.plan, self.stages = plan, tuple(stages)
        self.spec, self.context, self.chunk = plan.spec, plan.workload.context, plan.workload.chunk
        self.rings = self.stages[0].rings
        self.slots = [
            {i: cache for stage in self.stages for i, cache in stage.slots[slot].items()} for slot in range(plan.workload.slots)
        ]
        self.slot, self.position = 0, 0

    @property
    def caches(self) -> dict[int, LayerCache]:
        """Of the slot in use, by layer."""
        return self.slots[self.slot]

    def reset(self) -> None:
        """Forgets the sequence; its slots are written again before anything reads them."""
        self.position = 0

    def use(self, slot: int, position: int) -> None:
        """Goes on with the sequence of `slot` after its first `position` tokens; later ones are written over.

        A ring must still hold the window before `position`: see `schedule.reusable`.
        """
        self.slot, self.position = slot, position

    def step(self, ids: Sequence[int]) -> Tensor:
        """Runs `ids` at the next positions; the hidden states, (T, D), valid until the next step.

        Raises:
            PlanError: the sequence would pass the planned context; ValueError: more ids than a chunk.
        """
        n = len(ids)
        if not 0 < n <= self.chunk:
            raise ValueError(f"step of {n} tokens; chunks are 1..{self.chunk}")
        if self.position + n > self.context:
            raise PlanError(
                f"the sequence would reach {self.position + n} tokens",
                why=f"{self.context} are planned and allocated",
                do=f"--context {min(self.spec.max_context, self.position + n)}",
            )
        given: Sequence[int] | Stage = ids
        x = torch.empty(0)
        for stage in self.stages:
            x = stage.step(given, n, self.position, self.slot)
            given = stage
        self.position += n
        return x

    def logits(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Of hidden states that a step gave, (T, vocab), valid until the next ones."""
        return self.stages[-1].logits(x_TD, out)

    def prefill(self, ids: Sequence[int], *, progress: Progress | None = None, chunk: int | None = None) -> Tensor:
        """Runs a whole prompt in chunks; the hidden state of its last token, (1, D)."""
        step = chunk or self.chunk
        x = torch.empty(0)
        for start in range(0, len(ids), step):
            x = self.step(ids[start : start + step])
            if progress:
                progress(min(start + step, len(ids)), len(ids))
        return x[-1:]

    @property
    def allocated_bytes(self) -> int:
        return sum(stage.allocated_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The sum of the devices' peaks."""
        return sum(stage.peak_bytes for stage in self.stages)
