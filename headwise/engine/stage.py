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

from headwise.attention.capability import Capability
from headwise.attention.choose import Choice
from headwise.attention.prefill import Prefilled
from headwise.cache.storage import LayerCache
from headwise.engine.batch import Run, Steps
from headwise.engine.devices import before_loading, scaled_rows, skinny_rows
from headwise.engine.measure import Peak, storages
from headwise.engine.replay import Replay, own_stream, records
from headwise.engine.sample import Draw, Room, tokens
from headwise.kernels.turn import Turn
from headwise.model.arena import Arena
from headwise.model.decoder import Decoder
from headwise.model.ops import PLAIN, fused
from headwise.planner.memory import Plan
from headwise.planner.workspace import ropes
from headwise.spec.kv import turned_pairs
from headwise.weights.blocks import Weight

CHUNK_GRAPHS = 48  # of prompts: 16 lengths, with the last token's hidden state or without, and some with pages apart


def attend_functions(choices: Sequence[Choice]) -> list[Callable[..., None]]:
    """The adapter of each layer's chosen backend, or of both where another row takes its prefill."""
    return [adapter(c.backend) if c.prefill is None else Prefilled(adapter(c.backend), adapter(c.prefill)) for c in choices]


def adapter(row: Capability) -> Callable[..., None]:
    module = importlib.import_module(row.module)
    return partial(module.attend_cache if row.name == "reference" else module.attend, row.name)


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
            weights = load(i, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what weights were taken apart in
            stages.append(Stage(plan, i, choices, weights, device, before_bytes=before, stream=stream))
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
        if w.fused:
            self.arena.room = self.arena.room._replace(
                fused=True, skinny_rows=skinny_rows(device, w.dtype), scaled_rows=scaled_rows(device, w.dtype)
            )
        self.caches = {
            layer.index: LayerCache(
                layer, w.kv[layer.kind], n_tokens=w.context, chunk=w.chunk, device=device, rings=w.slots, pool_tokens=w.pool_tokens
            )
            for layer in self.spec.kv_layers
            if layer.index in self.layers
        }
        attends = attend_functions(choices[self.layers.start : self.layers.stop])
        self.decoder = Decoder(self.spec, self.layers, weights, attends, w.chunk, fused() if w.fused else PLAIN)
        self.steps = Steps(plan, self.arena, device, fused=w.fused)
        self.arena.eps.fill_(self.spec.rms_eps)
        self.arena.eps_value = self.spec.rms_eps
        freq = {}
        for i, rope in enumerate(ropes(self.spec)):
            live = [f for f in rope.inv_freq if f != 0.0]
            freq[rope] = self.arena.take(f"rope.{i}.freq", len(live)).copy_(torch.tensor(live, dtype=torch.float64))
        for i, cache in self.caches.items():
            if turned_pairs(layer := self.spec.layers[i]):
                norm = weights[f"layers.{i}.k_norm"]
                assert layer.rope is not None and isinstance(norm, Tensor)
                cache.turn = Turn(norm, freq[layer.rope], layer.rope.magnitude)
        words, done = self.arena.flat("draw"), self.arena.flat("done")
        self.draws_in = None if words is None or done is None else Room(words, done)  # else PyTorch draws
        self.before_bytes = before_bytes
        self.transient_bytes = 0  # most that operators allocated beside the arena, measured
        recorded = device.type == "cuda" and w.fused and records(weights)
        self.replay = Replay(device) if recorded else None
        self.chunks = Replay(device, most=CHUNK_GRAPHS) if recorded else None  # their own, so that they push no answers' out
        with self.arena.lent():  # the reserve's address is free during a step: an operator's result may get it
            self._known = storages(self)

    def step(self, runs: Sequence[Run], before: Stage | None, ids: Tensor | None = None) -> Tensor:
        """One forward pass over its layers; `before` is the stage whose hidden states these tokens have, None of the first.

        Args:
            ids: of the tokens, on the device, in place of the runs' own.
        Returns:
            The hidden states, (T, D), of the last stage those that are wanted, (W, D); valid until the next step.
        """
        n = sum(r.n for r in runs)
        with torch.inference_mode(), self.own_stream():
            if before is not None:
                before._send(self.arena, n)
            # a GPU's allocator counts by itself; tokens of answers need next to nothing, and pay for every call
            if self.device.type == "cpu" and not all(r.answers for r in runs):
                with self.arena.lent(), Peak(self._known) as peak:
                    self.steps.fill(runs, ids)
                    x = self._forward(runs)
                self.transient_bytes = max(self.transient_bytes, peak.peak_bytes)
                return x
            with self._lent():
                self.steps.fill(runs, ids)
                return self._forward(runs)

    def recorded(self, runs: Sequence[Run]) -> bool:
        """Whether a step of these runs is recorded, or will be."""
        return self._replay(runs) is not None and self.steps.key(runs) is not None

    def _replay(self, runs: Sequence[Run]) -> Replay | None:
        return self.replay if runs[0].answers else self.chunks

    def _forward(self, runs: Sequence[Run]) -> Tensor:
        def forward() -> Tensor:
            return self.decoder.forward(self.steps.step(runs), self.caches)

        replay = self._replay(runs)
        key = None if replay is None else self.steps.key(runs)
        return forward() if replay is None or key is None else replay.run(("step", key), forward)

    def _send(self, arena: Arena, n: int) -> None:
        """Copies what the next stage needs to its arena. PyTorch orders a copy between GPUs by the current streams of both."""
        with self.own_stream():
            for name, tensor in self.decoder.outgoing(n, self.arena).items():
                arena.take(name, *tensor.shape).copy_(tensor)

    def logits(self, x_TD: Tensor, most: int, out: Tensor | None = None, *, capped: bool = True) -> Tensor:
        """Of hidden states of the last stage, (T, vocab); `most` is the rows that there is room for without `out`."""
        T = x_TD.shape[0]
        with torch.inference_mode(), self._lent(), self.own_stream():
            if self.replay and out is None and x_TD.data_ptr() == self.arena.take("x", T, self.spec.hidden).data_ptr():
                x = self.arena.take("x", max(T, min(most, 1 << (T - 1).bit_length())), self.spec.hidden)
                key = ("logits", x.shape[0], capped)
                return self.replay.run(key, lambda: self.decoder.logits(x, self.arena, capped=capped))[:T]
            return self.decoder.logits(x_TD, self.arena, out, capped=capped)

    def draw(self, x_TD: Tensor, most: int, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """The logits of hidden states of the last stage, and a token of each row, (T,)."""
        logits = self.logits(x_TD, most, capped=False)
        with torch.inference_mode(), self.own_stream():
            return logits, tokens(logits, draws, self.spec.final_softcap, self.draws_in)

    def _lent(self) -> AbstractContextManager[object]:
        return nullcontext() if self.device.type == "cpu" else self.arena.lent()

    def own_stream(self) -> AbstractContextManager[object]:
        """What is inside goes to the stage's stream, after what the caller has queued."""
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
