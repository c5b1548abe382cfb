"""Tokens that the kernels draw beside those of PyTorch's form. A program of its own: it must start with TRITON_INTERPRET=1.

python -m kernels.draw_cases     prints a JSON object: case -> [rows, rows that differ, counters left]
"""

from __future__ import annotations

import json
from itertools import product

import torch
from torch import Tensor

import headwise.kernels.draw as D
import headwise.planner.workspace as W
from headwise.engine.request import Sampling
from headwise.engine.sample import Draw, Room, tokens

INF, NAN = float("inf"), float("nan")


def compared(logits_WV: Tensor, draws: list[Draw], block: int, programs: int = 512, cap: float | None = None) -> list[int]:
    D.DRAW_BLOCK = W.DRAW_BLOCK = block
    D.PROGRAMS, D.BINS = programs, 2**14
    n = len(draws)
    words = torch.full((W.draw_words(n, logits_WV.shape[1]),), -7, dtype=torch.int32)
    room, mine = Room(words, torch.zeros(n, dtype=torch.int32)), logits_WV.clone()
    got = tokens(mine, draws, cap, room)
    want = tokens(mine, draws)  # capped by the kernel
    return [n, int((got != want).sum()), int(room.done.abs().sum())]


def draws_of(settings: list[Sampling], seed: int = 0) -> list[Draw]:
    u = torch.rand(len(settings), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Draw(s, x) for s, x in zip(settings, u, strict=True)]


def some(*options: tuple[float, int, float, float]) -> list[Sampling]:
    return [Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in options]


def capped() -> float:
    x = torch.randn(2, 3000).half() * 40
    x[0, :2] = torch.tensor([6e4, -6e4])
    room = Room(torch.empty(W.draw_words(2, 3000), dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    mine = x.clone()
    tokens(mine, [Draw(Sampling())] * 2, 30.0, room)
    want = 30.0 * torch.tanh(x.double() / 30.0)
    return float((mine.double() - want).norm() / want.norm())


def main() -> dict[str, object]:
    torch.manual_seed(0)
    out: dict[str, object] = {"cap": capped()}
    every = some(*product((0.0, 0.7, 1.5), (0, 5, 40), (1.0, 0.9, 0.3), (0.0, 0.2)))
    half = [s for i, s in enumerate(every) if (i + i // 2) % 2 == 0]  # every pair of two filters
    out["filters, f16"] = compared((torch.randn(27, 1000) * 3).half(), draws_of(half), 512, cap=30.0)
    few = draws_of(every[18:36], 1)  # bf16 where nothing is rounded: the interpreter cuts off instead
    out["filters, bf16"] = compared((torch.randn(18, 501) * 3).bfloat16(), few, 4096)
    out["several blocks a program"] = compared((torch.randn(12, 1300) * 3).half(), draws_of(every[18:30], 2), 128, programs=36)
    # 9 values among 777 tokens: the edge of each filter lies among equals; shares that are whole numbers of tokens
    tied = some(*product((1.0,), (0, 1, 100, 776, 5000), (1.0, 0.5), (0.0, 0.1)))
    out["ties"] = compared((torch.randn(20, 777) * 1.5).round().half(), draws_of(tied, 3), 512)
    flat = some(*product((0.5, 3.0), (0, 50, 400), (1.0, 0.5), (0.0,)))
    out["all equal"] = compared(torch.full((12, 640), -2.5).half(), [Draw(s, 1 - 2**-24) for s in flat], 256)
    # chances of 1, of 0.01 each and of 48 millionths each, which top-p's bound leaves to no count, but together they move its edge
    tail = torch.tensor([0.0] + [-4.605] * 60 + [-9.944] * 939).expand(3, -1).half().contiguous()
    shares = some((1.0, 0, 0.9, 0.0), (1.0, 900, 0.9, 0.0), (1.0, 14, 1.0, 0.0))
    out["a tail"] = compared(tail, [Draw(s, 1 - 2**-24) for s in shares], 512)
    # the best are in groups of 64 of their own, or all in one
    apart, beside = torch.zeros(2, 1000), torch.zeros(2, 1000)
    apart[:, ::64], beside[:, 700:716] = torch.linspace(4, 5, 16), torch.linspace(4, 5, 16)
    best = some((1.0, 7, 1.0, 0.0), (1.0, 16, 1.0, 0.0)) * 2
    out["groups"] = compared(
        torch.cat((apart, beside)).half(), [Draw(s, u) for s, u in zip(best, (0.0, 0.9, 0.0, 0.9), strict=True)], 256
    )
    wide = some(*product((20.0, 100.0), (0, 300, 899), (0.99,), (0.0,)))
    out["wide"] = compared((torch.randn(6, 900) * 60).half(), draws_of(wide, 4), 512)

    edges = torch.randn(14, 333).half()
    edges[0, 1::2] = edges[1, :300] = edges[2, :332] = -INF  # what a grammar leaves
    edges[3] = -INF
    edges[4:6, 7] = INF
    edges[6:8, 9] = NAN
    edges[8, ::2], edges[8, 1::2] = 0.0, -0.0
    edges[9] = 6e4
    edges[10, 300:] = 20.0
    settings = some(
        (1.0, 20, 1.0, 0.0), (1.0, 50, 0.9, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0), (0.0, 9, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1e-40, 0, 0.9, 0.0), (5e-324, 0, 1.0, 0.0),
        (1.0, 0, 1e-9, 0.0), (1.0, 0, 1.0, 1.0), (1e-9, 3, 1.0, 0.0),
    )  # fmt: skip
    for name, u in (("u = 0", 0.0), ("u = 1", 1.0 - 2**-60), ("between", 0.37)):
        out[f"edges, {name}"] = compared(edges, [Draw(s, u) for s in settings], 256)
        out[f"free, {name}"] = compared(edges[8:], [Draw(Sampling(temperature=1.0), u)] * 6, 256)
    out["greedy"] = compared(edges, [Draw(Sampling())] * 14, 256, cap=30.0)
    return out


if __name__ == "__main__":
    print(json.dumps(main()))
