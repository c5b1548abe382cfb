"""A stage: a run of layers on one device, with everything of theirs: weights, caches, arena, and what is recorded of a step.

A model on one device is one stage. Of several, each hands its hidden states to the next one's arena; between GPUs that is a
copy in the order of both streams, which the host does not wait for.
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
from headwise.engine.devices import before_loading
from headwise.engine.measure import Peak, storages
from headwise.engine.replay import Replay, own_stream, records
from headwise.kernels.configs import doublings
from headwise.model.arena import Arena
from headwise.model.decoder import Decoder
from headwise.model.heads import Step
from headwise.model.ops import PLAIN, fused
from headwise.planner.memory import Plan
from headwise.planner.workspace import ring_slots, ropes
from headwise.weights.blocks import Weight


def attend_functions(choices: Sequence[Choice]) -> list[Callable[..., None]]:
    """The adapter of each layer's chosen backend."""
    out = []
    for choice in choices:
        module = importlib.import_module(choice.backend.module)
        out.append(partial(module.attend_cache if choice.backend.name == "reference" else module.attend, choice.backend.name))
    return out


def build_stages(
    plan: Plan,
    choices: Sequence[Choice],
    devices: Sequence[torch.device],
    load: Callable[[int, torch.device], Mapping[str, Weight]],
) -> list[Stage]:
    """The plan's stages, each on its device.

    Args:
        load: the weights of a stage, on its device.
    """
    stages: list[Stage] = []
    for i, device in enumerate(devices):
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with own_stream(stream):
            before = before_loading(device)
            stages.append(Stage(plan, i, choices, load(i, device), device, before_bytes=before, stream=stream))
    return stages


class Stage:
    """What one device holds of a model, and its part of a forward pass.

    Args:
        index: which of the plan's stages.
        choices: of every layer of the model.
        weights: `spec.tensors.weight_tensors` of its layers.
        before_bytes: what the process had allocated on a GPU before the weights were loaded.
        stream: of a GPU, on which every step runs: a step is recorded on it, and cuBLAS has its workspace there already.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        choices: Sequence[Choice],
        weights: Mapping[str, Weight],
        device: torch.device,
        *,
        before_bytes: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        w, own = plan.workload, plan.stages[index]
        self.spec, self.layers, self.weights, self.device, self.stream = plan.spec, own.layers, weights, device, stream
        self.arena = Arena(own.buffers, device)
        self.slots = [
            {
                layer.index: LayerCache(layer, w.kv[layer.kind], n_tokens=w.context, chunk=w.chunk, device=device)
                for layer in self.spec.kv_layers
                if layer.index in self.layers
            }
            for _ in range(w.slots)
        ]
        self.fused = device.type == "cuda" and w.fused
        attends = attend_functions(choices[self.layers.start : self.layers.stop])
        self.decoder = Decoder(self.spec, self.layers, weights, attends, w.chunk, fused() if self.fused else PLAIN)
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
        self.before_bytes = before_bytes
        self.transient_bytes = 0  # most that operators allocated beside the arena, measured
        self.replay = Replay(device) if self.fused and records(self.spec, weights) else None
        with self.arena.lent():  # the reserve's address is free during a step: an operator's result may get it
            self._known = storages(self)

    def step(self, given: Sequence[int] | Stage, n: int, start: int, slot: int) -> Tensor:
        """Runs n tokens at positions [start, start + n) of a slot's sequence: ids, or what the stage before has left of them.

        Returns:
            The hidden states, (n, D), valid until the next step.
        """
        with torch.inference_mode(), self._own_stream():
            if isinstance(given, Stage):
                given._send(self.arena, n)
            elif n == 1:
                self.arena.take("ids", n).fill_(given[0])
            else:
                self.arena.take("ids", n).copy_(torch.tensor(given))
            step = Step(n, start, self.arena)
            if self.fused:
                return self._fused(step, slot)
            if self.device.type != "cpu":  # a GPU's allocator counts by itself
                with self.arena.lent():
                    return self._forward(step, slot)
            if n == 1:  # needs next to nothing beside the arena, and pays for every call
                return self._forward(step, slot)
            with self.arena.lent(), Peak(self._known) as peak:
                x = self._forward(step, slot)
        self.transient_bytes = max(self.transient_bytes, peak.peak_bytes)
        return x

    def _send(self, arena: Arena, n: int) -> None:
        """Copies what the next stage needs to its arena. PyTorch orders a copy between GPUs by the current streams of both."""
        with self._own_stream():
            for name, tensor in self.decoder.outgoing(n, self.arena).items():
                arena.take(name, *tensor.shape).copy_(tensor)

    def _forward(self, step: Step, slot: int) -> Tensor:
        self._fill_tables(step.start, step.n)
        return self.decoder.forward(step, self.slots[slot])

    def _fused(self, step: Step, slot: int) -> Tensor:
        """A step of our kernels, which take positions from the device; one of a single token is recorded and replayed."""
        from headwise.kernels.heads import rope_tables

        span = self.arena.take("span", 4)
        stop = step.start + step.n
        span[1:2].fill_(step.n)
        span[2:3].fill_(stop)

        def forward() -> Tensor:
            for i, (rope, pairs) in enumerate(self.ropes):
                cos, sin = (self.arena.take(f"rope.{i}.{t}", step.n, pairs) for t in ("cos", "sin"))
                rope_tables(span, self.arena.take(f"rope.{i}.freq", pairs), cos, sin, rope.magnitude)
            return self.decoder.forward(step, self.slots[slot])

        with self.arena.lent():
            return self.replay.run(("step", slot, doublings(stop)), forward) if self.replay and step.n == 1 else forward()

    def logits(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Of hidden states of the last stage, (T, vocab)."""
        with torch.inference_mode(), nullcontext() if self.device.type == "cpu" else self.arena.lent(), self._own_stream():
            if self.replay and out is None and x_TD.data_ptr() == self.arena.take("x", 1, self.spec.hidden).data_ptr():
                return self.replay.run(("logits",), lambda: self.decoder.logits(x_TD, self.arena))
            return self.decoder.logits(x_TD, self.arena, out)

    def _own_stream(self) -> AbstractContextManager[object]:
        return own_stream(self.stream)

    def _fill_tables(self, start: int, n: int) -> None:
        """Rope tables and ring masks of this step, shared by all layers."""
        positions = torch.arange(start, start + n, device=self.device)
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
            span.copy_(torch.tensor((0, n, start + n, 0), dtype=torch.int32))
        if n == 1:
            return
        for window, n_slots in self.rings.items():
            mask = self.arena.get(f"mask.{window}")
            if mask is not None:
                held = slot_positions(n_slots, start + n, self.device)
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
