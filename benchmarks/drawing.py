"""Tokens of rows of logits by our kernels and by PyTorch's operators: the same ones, and how fast?

    PYTHONPATH=. python benchmarks/drawing.py OUT.json

Logits in bf16 before Gemma's cap: a few far above the others, as models say them, or all of one normal distribution, where top-p
keeps thousands. First both draw with many numbers; tokens that differ are held to fp64: the share of all that is drawn for must lie
within the token's own, up to 1e-4. Then each is timed, cap included, behind a kernel that waits until all is launched: events
around it (GPU), and the host's clock around the calls alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise.engine.request import Sampling
from headwise.engine.sample import Draw, Room, tokens
from headwise.kernels.rows import softcap
from headwise.planner.workspace import draw_words

CAP, ROUNDS, DRAWN = 30.0, 30, 16  # draws of each row that are compared
VOCABULARIES, ROWS, SHAPES = (262_144, 128_256), (1, 4, 16, 64), ("peaked", "flat")
KINDS = {
    "greedy": Sampling(),
    "free": Sampling(temperature=0.8),
    "min-p": Sampling(temperature=1.0, min_p=0.05),
    "top-k": Sampling(temperature=1.0, top_k=40),
    "top-p": Sampling(temperature=1.0, top_p=0.95),
    "gemma": Sampling(temperature=1.0, top_k=64, top_p=0.95),
}
WAIT = 8_000_000  # cycles


def logits(shape: str, W: int, V: int) -> Tensor:
    x = torch.randn(W, V, device="cuda") * (2.0 if shape == "peaked" else 3.0)
    if shape == "peaked":
        x.scatter_add_(1, torch.randint(V, (W, 50), device="cuda"), torch.rand(W, 50, device="cuda") * 12 + 8)
    return x.bfloat16()


def by_kernels(x: Tensor, draws: list[Draw], room: Room) -> Tensor:
    return tokens(x, draws, CAP, room)


def by_operators(x: Tensor, draws: list[Draw], room: Room) -> Tensor:
    return tokens(softcap(x, CAP), draws)


def within(x_V: Tensor, draw: Draw, token: int) -> bool:
    """Whether `token` is drawn, in fp64 and up to 1e-4 of all chances; x is capped."""
    s, x = draw.sampling, x_V.double()
    if not s.temperature:
        return token == int(x.argmax())
    order = x.sort(descending=True, stable=True)[1]
    w = ((x - x.max()) / s.temperature).exp()[order]
    if s.top_k:
        w[s.top_k :] = 0
    before = w.cumsum(0) - w
    w[(before >= s.top_p * w.sum()) & (s.top_p < 1)] = 0
    w[w < s.min_p] = 0
    share = torch.zeros_like(x).scatter(0, order, w / w.sum())
    end = float(share.cumsum(0)[token])
    return end - float(share[token]) - 1e-4 <= draw.u <= end + 1e-4


def checked(x: Tensor, sampling: Sampling, room: Room) -> dict[str, int]:
    W, found = x.shape[0], {"drawn": 0, "differ": 0, "wrong": 0}
    for _ in range(DRAWN):
        draws = [Draw(sampling, u) for u in torch.rand(W).tolist()]
        mine, theirs = x.clone(), x.clone()
        got, want = by_kernels(mine, draws, room), by_operators(theirs, draws, room)
        if not torch.equal(mine, theirs) or int(room.done.abs().sum()):
            found["wrong"] += W  # the cap, or a counter left standing
        rows = (got != want).nonzero()[:, 0].tolist()
        found["drawn"] += W
        found["differ"] += len(rows)
        found["wrong"] += sum(not within(mine[i], draws[i], int(got[i])) for i in rows)
    return found


def microseconds(call: Callable[..., Tensor], x: Tensor, draws: list[Draw], room: Room) -> tuple[float, float]:
    """On the GPU, and of the host until all is launched."""
    mine, (start, stop) = x.clone(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT)
    start.record()
    began = time.perf_counter()
    call(mine, draws, room)
    host = time.perf_counter() - began
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3, host * 1e6


def main(out: Path) -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for V in VOCABULARIES:
        room = Room(torch.empty(draw_words(max(ROWS), V), dtype=torch.int32, device="cuda"),
                    torch.zeros(max(ROWS), dtype=torch.int32, device="cuda"))  # fmt: skip
        for shape in SHAPES:
            for W in ROWS:
                x = logits(shape, W, V)
                for kind, sampling in KINDS.items():
                    draws = [Draw(sampling, (i + 0.5) / W) for i in range(W)]
                    row = {"V": V, "logits": shape, "rows": W, "kind": kind} | checked(x, sampling, room)
                    times: dict[str, list[tuple[float, float]]] = {"kernels": [], "operators": []}
                    for _ in range(ROUNDS):  # in turn
                        for name, call in (("kernels", by_kernels), ("operators", by_operators)):
                            times[name].append(microseconds(call, x, draws, room))
                    for name, found in times.items():
                        row[f"{name}_us"], row[f"{name}_host_us"] = (statistics.median(t) for t in zip(*found, strict=True))
                    rows.append(row)
                    mine, theirs = (f"{row[f'{n}_us']:7.1f} us (host {row[f'{n}_host_us']:.0f})" for n in times)
                    said = f"{V} {shape:6} {W:2} rows {kind:6}: kernels {mine}, operators {theirs}"
                    print(f"{said}; of {row['drawn']} {row['differ']} differ, {row['wrong']} wrong", flush=True)
    print(f"{sum(r['drawn'] for r in rows)} drawn, {sum(r['differ'] for r in rows)} differ, {sum(r['wrong'] for r in rows)} wrong")
    out.write_text(json.dumps(about.card("triton") | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
