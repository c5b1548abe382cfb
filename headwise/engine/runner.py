"""A few sequences on one device: weights, their caches and the arena, and the steps over them.

Everything is allocated here, by the plan, before the first step; a step allocates nothing that the plan does not bound.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from headwise.attention.choose import Choice
from headwise.cache.storage import LayerCache, Place
from headwise.engine.batch import Run, Steps
from headwise.engine.measure import Peak, storages
from headwise.engine.replay import Replay, own_stream, records
from headwise.errors import PlanError
from headwise.model.arena import TORCH, Arena
from headwise.model.decoder import Decoder
from headwise.model.ops import PLAIN, fused
from headwise.planner.memory import Plan
from headwise.planner.workspace import logit_rows, ropes
from headwise.weights.blocks import Weight

Progress = Callable[[int, int], None]


def attend_functions(choices: Sequence[Choice]) -> list[Callable[..., None]]:
    """The adapter of each layer's chosen backend."""
    out = []
    for choice in choices:
        module = importlib.import_module(choice.backend.module)
        out.append(partial(module.attend_cache if choice.backend.name == "reference" else module.attend, choice.backend.name))
    return out


class Runner:
    """The caches of the planned sequences, and the forward passes over some of them together.

    Args:
        before_bytes: what the process had allocated on a GPU before the weights were loaded.
        stream: of a GPU, on which every step runs: a step is recorded on it, and cuBLAS has its workspace there already.
    """

    def __init__(
        self,
        plan: Plan,
        choices: Sequence[Choice],
        weights: Mapping[str, Weight],
        device: torch.device,
        *,
        before_bytes: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.stream = stream
        w = plan.workload
        self.plan, self.device, self.chunk, self.weights = plan, device, w.chunk, weights
        self.spec, self.context = plan.spec, w.context
        self.dtype = TORCH[w.dtype]
        self.rows = logit_rows(w.slots, w.chunk)
        self.arena = Arena(plan.buffers, device)
        self.caches = {
            layer.index: LayerCache(
                layer, w.kv[layer.kind], n_tokens=w.context, chunk=w.chunk, device=device, rings=w.slots, pool_tokens=w.pool_tokens
            )
            for layer in self.spec.kv_layers
        }
        self.fused = w.fused
        self.decoder = Decoder(self.spec, weights, attend_functions(choices), w.chunk, fused() if self.fused else PLAIN)
        self.steps = Steps(plan, self.arena, device, fused=self.fused)
        for name in ("done", "span"):
            zeros = self.arena.flat(name)
            if zeros is not None:
                zeros.zero_()
        self.arena.eps.fill_(self.spec.rms_eps)
        self.arena.eps_value = self.spec.rms_eps
        for i, rope in enumerate(ropes(self.spec)):
            live = [f for f in rope.inv_freq if f != 0.0]
            self.arena.take(f"rope.{i}.freq", len(live)).copy_(torch.tensor(live, dtype=torch.float64))
        self.position = 0  # of the one sequence of `step`
        self.before_bytes = before_bytes
        self.transient_bytes = 0  # most that operators allocated beside the arena, measured
        self.replay = Replay(self.device) if self.fused and records(self.spec, weights) else None
        with self.arena.lent():  # the reserve's address is free during a step: an operator's result may get it
            self._known = storages(self)

    def reset(self) -> None:
        """Forgets the one sequence of `step`; its slots are written again before anything reads them."""
        self.position = 0

    def step(self, ids: Sequence[int], *, wanted: int | None = None) -> Tensor:
        """Runs `ids` at the next positions of the one sequence; the hidden states of the last `wanted`, default all."""
        x = self.run([Run(Place(), self.position, ids, len(ids) if wanted is None else wanted)])
        self.position += len(ids)
        return x

    def run(self, runs: Sequence[Run]) -> Tensor:
        """One forward pass over tokens of one or several sequences; their caches have them afterwards.

        Returns:
            The wanted hidden states in the order of `runs`, (W, D), valid until the next step.
        Raises:
            PlanError: a sequence would pass the planned context; ValueError: more ids than a chunk.
        """
        n = sum(r.n for r in runs)
        if not 0 < n <= self.chunk or not all(r.n for r in runs):
            raise ValueError(f"a step of {n} tokens in {len(runs)} runs; chunks are 1..{self.chunk}")
        for r in runs:
            if r.stop > self.context:
                raise PlanError(
                    f"the sequence would reach {r.stop} tokens",
                    why=f"{self.context} are planned and allocated",
                    do=f"--context {min(self.spec.max_context, r.stop)}",
                )
        with torch.inference_mode(), self._own_stream():
            if self.device.type == "cpu" and n > 1:  # a GPU's allocator counts by itself; one token needs next to nothing
                with self.arena.lent(), Peak(self._known) as peak:
                    self.steps.fill(runs)
                    x = self._forward(runs)
                self.transient_bytes = max(self.transient_bytes, peak.peak_bytes)
                return x
            with nullcontext() if self.device.type == "cpu" else self.arena.lent():
                key = self.steps.key(runs) if self.replay else None
                if key is None or self.replay is None:
                    self.steps.fill(runs)
                    return self._forward(runs)
                padded = self._padded(runs)
                self.steps.fill(padded)
                x = self.replay.run(("step", self.steps.key(padded)), lambda: self._forward(padded))
                return x[:n]

    def _forward(self, runs: Sequence[Run]) -> Tensor:
        return self.decoder.forward(self.steps.step(runs), self.caches)

    def _padded(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Runs of one length as many as a recorded step has: the last again, which writes what it writes and is not looked at."""
        B = len(runs)
        bucket = 1 << (B - 1).bit_length()
        if bucket == B or any(r.n != runs[0].n for r in runs):
            return runs
        return [*runs, *[runs[-1]] * (bucket - B)] if bucket * runs[0].n <= min(self.chunk, self.rows) else runs

    def logits(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of the given hidden states, (T, vocab); without `out` valid until the next step, and of `rows` at most."""
        T = x_TD.shape[0]
        bucket = min(self.rows, 1 << (T - 1).bit_length())
        with torch.inference_mode(), nullcontext() if self.device.type == "cpu" else self.arena.lent(), self._own_stream():
            if self.replay and out is None and x_TD.data_ptr() == self.arena.take("x", T, self.spec.hidden).data_ptr():
                x = self.arena.take("x", max(T, bucket), self.spec.hidden)
                return self.replay.run(("logits", x.shape[0]), lambda: self.decoder.logits(x, self.arena))[:T]
            return self.decoder.logits(x_TD, self.arena, out)

    def _own_stream(self) -> AbstractContextManager[object]:
        return own_stream(self.stream)

    @property
    def allocated_bytes(self) -> int:
        return sum(storages(self).values())

    @property
    def peak_bytes(self) -> int:
        """The most memory that weights, caches, arena and operators' results held at once."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before_bytes
        reserve = self.arena.reserve
        return self.allocated_bytes - (0 if reserve is None else reserve.nbytes) + self.transient_bytes

    def prefill(self, ids: Sequence[int], *, progress: Progress | None = None, chunk: int | None = None) -> Tensor:
        """Runs a whole prompt in chunks; the hidden state of its last token, (1, D)."""
        step = chunk or self.chunk
        x = torch.empty(0)
        for start in range(0, len(ids), step):
            x = self.step(ids[start : start + step], wanted=int(start + step >= len(ids)))
            if progress:
                progress(min(start + step, len(ids)), len(ids))
        return x
