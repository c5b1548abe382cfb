"""A few sequences on one device: weights, their caches and the arena, and the steps over one of them at a time.

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
from headwise.attention.reference import visible
from headwise.cache.storage import LayerCache, slot_positions
from headwise.engine.measure import Peak, storages
from headwise.engine.replay import Replay, own_stream, records
from headwise.errors import PlanError
from headwise.kernels.configs import doublings
from headwise.model.arena import TORCH, Arena
from headwise.model.decoder import Decoder
from headwise.model.heads import Step
from headwise.model.ops import PLAIN, fused
from headwise.planner.memory import Plan
from headwise.planner.workspace import ring_slots, ropes
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
    """The state of the planned sequences, a slot each, and the forward passes over the one in use.

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
        self.arena = Arena(plan.buffers, device)
        self.slots = [
            {
                layer.index: LayerCache(layer, w.kv[layer.kind], n_tokens=w.context, chunk=w.chunk, device=device)
                for layer in self.spec.kv_layers
            }
            for _ in range(w.slots)
        ]
        self.slot, self.caches = 0, self.slots[0]
        self.fused = self.device.type == "cuda" and w.fused
        ops = fused() if self.fused else PLAIN
        self.arena.room = self.arena.room._replace(fused=self.fused)
        self.decoder = Decoder(self.spec, weights, attend_functions(choices), w.chunk, ops)
        self.rings = ring_slots(self.spec, n_tokens=w.context, chunk=w.chunk)
        self.ropes = [(rope, rope.rotated_dims // 2) for rope in ropes(self.spec)]
        for name in ("done", "span"):  # of the span a step writes two numbers; the first query and slot stay 0
            zeros = self.arena.flat(name)
            if zeros is not None:
                zeros.zero_()
        self.arena.eps.fill_(self.spec.rms_eps)
        self.arena.eps_value = self.spec.rms_eps
        for i, (rope, _) in enumerate(self.ropes):
            live = [f for f in rope.inv_freq if f != 0.0]
            self.arena.take(f"rope.{i}.freq", len(live)).copy_(torch.tensor(live, dtype=torch.float64))
        self.position = 0
        self.before_bytes = before_bytes
        self.transient_bytes = 0  # most that operators allocated beside the arena, measured
        self.replay = Replay(self.device) if self.fused and records(self.spec, weights) else None
        with self.arena.lent():  # the reserve's address is free during a step: an operator's result may get it
            self._known = storages(self)

    def reset(self) -> None:
        """Forgets the sequence; its slots are written again before anything reads them."""
        self.position = 0

    def use(self, slot: int, position: int) -> None:
        """Goes on with the sequence of `slot` after its first `position` tokens; later ones are written over.

        A ring must still hold the window before `position`: see `schedule.reusable`.
        """
        self.slot, self.caches, self.position = slot, self.slots[slot], position

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
        ids_T = self.arena.take("ids", n)
        with torch.inference_mode(), self._own_stream():
            if n == 1:
                ids_T.fill_(ids[0])
            else:
                ids_T.copy_(torch.tensor(ids))
            if self.fused:
                return self._fused(ids_T, n)
            if self.device.type != "cpu":  # a GPU's allocator counts by itself
                with self.arena.lent():
                    return self._forward(ids_T, n)
            if n == 1:  # needs next to nothing beside the arena, and pays for every call
                return self._forward(ids_T, n)
            with self.arena.lent(), Peak(self._known) as peak:
                x = self._forward(ids_T, n)
        self.transient_bytes = max(self.transient_bytes, peak.peak_bytes)
        return x

    def _forward(self, ids_T: Tensor, n: int) -> Tensor:
        self._fill_tables(n)
        x = self.decoder.forward(Step(ids_T, self.position, self.arena), self.caches)
        self.position += n
        return x

    def _fused(self, ids_T: Tensor, n: int) -> Tensor:
        """A step of our kernels, which take positions from the device; one of a single token is recorded and replayed."""
        from headwise.kernels.heads import rope_tables

        span = self.arena.take("span", 4)
        stop = self.position + n
        span[1:2].fill_(n)
        span[2:3].fill_(stop)
        step = Step(ids_T, self.position, self.arena)

        def forward() -> Tensor:
            for i, (rope, pairs) in enumerate(self.ropes):
                cos, sin = (self.arena.take(f"rope.{i}.{t}", n, pairs) for t in ("cos", "sin"))
                rope_tables(span, self.arena.take(f"rope.{i}.freq", pairs), cos, sin, rope.magnitude)
            return self.decoder.forward(step, self.caches)

        with self.arena.lent():
            x = self.replay.run(("step", self.slot, doublings(stop)), forward) if self.replay and n == 1 else forward()
        self.position = stop
        return x

    def logits(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        with torch.inference_mode(), nullcontext() if self.device.type == "cpu" else self.arena.lent(), self._own_stream():
            if self.replay and out is None and x_TD.data_ptr() == self.arena.take("x", 1, self.spec.hidden).data_ptr():
                return self.replay.run(("logits",), lambda: self.decoder.logits(x_TD, self.arena))
            return self.decoder.logits(x_TD, self.arena, out)

    def _own_stream(self) -> AbstractContextManager[object]:
        return own_stream(self.stream)

    def _fill_tables(self, n: int) -> None:
        """Rope tables and ring masks of this step, shared by all layers."""
        positions = torch.arange(self.position, self.position + n, device=self.device)
        for i, (rope, pairs) in enumerate(self.ropes):
            cos, sin = (self.arena.take(f"rope.{i}.{t}", n, 1, pairs) for t in ("cos", "sin"))
            angles = positions[:, None, None] * self.arena.take(f"rope.{i}.freq", pairs)
            torch.sin(angles, out=sin)
            torch.cos(angles, out=cos)
            if rope.magnitude != 1.0:
                cos.mul_(rope.magnitude)
                sin.mul_(rope.magnitude)
        span = self.arena.flat("span")
        if span is not None:
            span.copy_(torch.tensor((0, n, self.position + n, 0), dtype=torch.int32))
        if n == 1:
            return
        for window, n_slots in self.rings.items():
            mask = self.arena.get(f"mask.{window}")
            if mask is not None:
                held = slot_positions(n_slots, self.position + n, self.device)
                mask[:n].zero_().masked_fill_(~visible(positions, held, window), float("-inf"))

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
            x = self.step(ids[start : start + step])
            if progress:
                progress(min(start + step, len(ids)), len(ids))
        return x[-1:]
