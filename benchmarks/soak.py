"""Rates of kernels from rest on, until the card holds its power limit: python benchmarks/soak.py OUT.json

Each is launched without a pause after a second of rest; a rate is of the launches that end between two marks. So long must
`headwise.bench.attention` keep a card busy before it times anything.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import about
import torch

from headwise.bench.attention import SHAPES, Ours, pairs

MARKS_MS = (20, 40, 80, 120, 160, 240, 320, 480, 640, 800)
MEASURED = (1, 3, 4)  # of SHAPES: causal 256, one tensor and two at 512


def trace(call: Callable[[], Any], operations: float) -> dict[int, float]:
    """TFLOP/s between the marks, by the mark that ends each interval."""
    call()
    torch.cuda.synchronize()
    time.sleep(1.0)
    start, ends = torch.cuda.Event(enable_timing=True), list[torch.cuda.Event]()
    start.record()
    began = time.perf_counter()
    while time.perf_counter() - began < MARKS_MS[-1] / 1e3:
        call()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        if len(ends) % 4 == 0:  # the host stays a few launches ahead
            ends[-4].synchronize()
    torch.cuda.synchronize()
    at = [start.elapsed_time(e) for e in ends]
    rates, done, before = dict[int, float](), 0, 0.0
    for mark in MARKS_MS:
        n = sum(t <= mark for t in at)
        if n > done:
            rates[mark] = operations * (n - done) / (at[n - 1] - before) / 1e9
            done, before = n, at[n - 1]
    return rates


def main(out: str) -> None:
    device = torch.device("cuda")
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = {"bf16 product of 8,192": trace(lambda: a @ b, 2 * 8192**3)}
    for shape in (SHAPES[i] for i in MEASURED):
        work = 4 * shape.heads * shape.head_dim * pairs(shape.length, shape.window)
        found[shape.name] = trace(Ours(shape, device, 1, prefill=False), work)
    for name, rates in found.items():
        print(f"{name:24}", " ".join(f"{mark} ms: {rate:.0f}" for mark, rate in rates.items()), flush=True)
    with open(out, "w") as file:
        json.dump(about.card() | {"tflops": found}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
