"""CUDA graphs: a step recorded once and replayed, so that its hundreds of launches cost the host one.

Recorded are steps of answers and short chunks of a prompt (`Steps.key` says which). What is recorded reads positions and ids from
the device and writes to fixed buffers. What the host decides (tokens, into how many shares the keys are cut) is part of the key: a
decode step is recorded anew when the context has doubled. The first run of a key is an ordinary one, which compiles kernels; the
second is recorded, which takes the host longer than an ordinary one. A graph holds its launches' arguments, on the host and in
memory of the driver's that no plan counts: the margin of a card is there for that (`benchmarks/short_prompts.py` measures it).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from headwise.weights.blocks import BlockTensor, Weight


def records(weights: Mapping[str, Weight]) -> bool:
    """Whether a step can be recorded: no matrix is one that PyTorch expands on the way."""
    return not any(isinstance(w, BlockTensor) for w in weights.values())


def own_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Runs what follows on `stream`, after what the caller has queued, and before what it queues next."""
    return nullcontext() if stream is None else _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    caller = torch.cuda.current_stream(stream.device)
    if caller == stream:
        yield
        return
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        yield
    caller.wait_stream(stream)


class Replay:
    """Recorded steps by key.

    Args:
        most: graphs that are kept, those replayed last; None: all.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        self.device, self.most = device, most
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # replayed longest ago first
        self.pool: Any = None  # one for all, should an operator allocate on the way

    def run(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()`, or its replay; the result lies where it lay when it was recorded."""
        found = self.graphs.pop(key, None)
        if found is None:
            if key not in self.seen:
                self.seen.add(key)
                return forward()
            found = self._record(forward)
            if len(self.graphs) == self.most:
                del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = found
        found[0].replay()
        return found[1]

    def _record(self, forward: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize(self.device)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self.pool, capture_error_mode="thread_local")
        try:
            out = forward()
        finally:
            graph.capture_end()
        return graph, out
