"""Chunks of a prompt that are filled up and recorded, against the same chunks as they are. A program of its own: it must start with
TRITON_INTERPRET=1.

    python -m model.filled_case FOLDER FAMILY STAGES     prints a JSON object: step -> relative error; and what was seen

There is no card: what stands in for a graph runs again what the key was first seen with, so that whatever the host decides and the
key does not say is that of another chunk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from model.batch_case import runner_of, save
from torch import Tensor

import headwise.kernels.heads as heads_kernel
from headwise.cache.pages import extents
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.prefixes import _tensors
from headwise.engine.runner import Runner
from headwise.model.heads import fused_heads
from headwise.model.ops import PLAIN

CONTEXT, CHUNK = 120, 80  # a window of 13: rings of 101 slots
APART, LAST = Place(0, extents([2, 0])), Place(1, extents([6, 7]))  # the latter to the end of the pool
STEPS = (  # (sequence, tokens, wanted)
    (0, 20, 0),  # 64 with the filling, seen first
    (0, 32, 1),  # seen first
    (0, 60, 1),  # past the end of the ring
    (1, 2, 1),  # pages in a row, seen first
    (0, 8, 0),  # the last of the context
    (1, 64, 0),  # nothing to fill up, seen first
    (1, 54, 1),  # the last of the pool
)


class Recorded:
    """In place of `engine.replay.Replay`."""

    def __init__(self) -> None:
        self.first: dict[Hashable, Callable[[], Tensor]] = {}
        self.runs = 0

    def run(self, key: Hashable, forward: Callable[[], Tensor]) -> Tensor:
        self.runs += 1
        return self.first.setdefault(key, forward)()

    def counts(self) -> dict[str, int]:
        return {"chunks": self.runs, "keys": len(self.first)}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def main(folder: Path, family: str, stages: int) -> dict[str, float]:
    heads_kernel.FEW = 0  # of 64: the interpreter pays for each program
    path = save(family, folder, global_head_dim=256)  # 32 queries a program
    runners: list[Runner] = [runner_of(path, "kernels", context=CONTEXT, chunk=CHUNK, stages=n) for n in (stages, 1)]
    for stage in (stage for r in runners for stage in r.stages):  # and rows that do not meet need none
        stage.decoder.ops = PLAIN._replace(heads=fused_heads)
        stage.arena.room = stage.arena.room._replace(fused=False)
    filled = runners[0]
    found = [Recorded() for _ in filled.stages]
    for stage, recorded in zip(filled.stages, found, strict=True):
        stage.replay, stage.chunks = Recorded(), recorded  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 300, (CONTEXT,), generator=draw).tolist() for _ in range(2)]
    done, out = [0, 0], dict[str, float]()
    for s, n, wanted in STEPS:
        ids = texts[s][done[s] : done[s] + n]
        x, y = (r.run([Run((APART, LAST)[s], done[s], ids, wanted)]) for r in runners)
        assert x.shape == y.shape == (wanted, y.shape[1])
        done[s] += n
        if wanted:
            out[f"{n} tokens to {done[s]} of {s}"] = difference(*(r.logits(h) for r, h in zip(runners, (x, y), strict=True)))
    caches = [[t.float() for i in sorted(r.caches) for t in _tensors(r.caches[i])] for r in runners]
    out["caches, whole"] = max(difference(a, b) for a, b in zip(*caches, strict=True))
    return out | {"stages": len(found)} | {f"{name} {i}": n for i, r in enumerate(found) for name, n in r.counts().items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
