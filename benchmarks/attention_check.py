"""Is attention right on this card? Decode and prefill over every KV type and layout, ragged batches, against fp64.

    PYTHONPATH=.:tests python benchmarks/attention_check.py [--backend headwise-hopper] [--phase prefill] [--card sm86] [OUT.json]

Head sizes 128 to 512, one tensor (V with K's rotated values, or V alone) and two, groups of 2 to 16 heads; one sequence and
batches; contiguous, paged and ring caches with and without a window and sinks; partial results merged by the launch and after it.
What a cache does not hold is 99, results and scratch are NaN before. Half the cases have f16 queries, half bf16. With `--card` the
portable kernel runs as that card would run it (`consumer_cards.py`).
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import about
import torch
from consumer_cards import as_card
from kernels.cases import DTYPES, stored

from headwise.attention.own_kernels import launch, partial_scratch
from headwise.attention.reference import turned
from headwise.kernels.attend import reference
from headwise.kernels.stored import Sequences, Slots, Stored
from headwise.kernels.turn import Turn

ERROR = 6e-3
KV = ("floats", "fp8", "q8_0", "q4_0")  # floats: of the queries' type
HEADS = (  # D, tail, rotating pairs of V alone, H, G
    (512, 128, 0, 32, 4), (512, 128, 0, 16, 1), (512, 128, 64, 32, 4), (512, 128, 64, 16, 1), (512, 0, 0, 8, 2),
    (256, 0, 0, 32, 16), (256, 0, 0, 8, 1), (256, 0, 0, 6, 2), (128, 0, 0, 32, 8), (64, 0, 0, 16, 2),
)  # fmt: skip
# keys and queries of each sequence
PREFILL = (((257,), (257,)), ((3000,), (1000,)), ((1500, 40), (600, 40)), ((700, 64, 129, 1), (700, 33, 100, 1)))
STEPS = (((1,), (1,)), ((65,), (1,)), ((3000,), (1,)), ((700, 64, 129, 1), (1, 1, 1, 1)), ((513, 300), (2, 1)))
LAYOUTS = (("flat", None), ("pages", None), ("flat", 200), ("ring", 200))
PAGE = 64


class Case(NamedTuple):
    kv: str
    heads: tuple[int, int, int, int, int]
    step: tuple[tuple[int, ...], tuple[int, ...]]
    layout: str
    window: int | None
    seed: int


def relative_error(case: Case, backend: str, device: torch.device) -> float:
    """||out - reference|| / ||reference||; infinite where a result is not finite."""
    (D, tail, pairs, H, G), (keys, queries) = case.heads, case.step
    g = torch.Generator(device=device).manual_seed(case.seed)
    dtype = torch.float16 if case.seed % 2 or device.type == "cpu" else torch.bfloat16
    kv = next(name for name, kind in DTYPES.items() if kind == dtype) if case.kv == "floats" else case.kv
    E, B = D + tail, len(keys)
    ring = (case.window or 0) + max(queries) + 8 if case.layout == "ring" else 0
    room = ring or -(-max(keys) // PAGE) * PAGE
    n_slots = B * room + 2 * PAGE
    first = (torch.arange(B, device=device) * room).int()
    pages = torch.randperm(n_slots // PAGE, generator=g, device=device)[: B * room // PAGE].view(B, -1).int() if not ring else None

    def slots(b: int) -> torch.Tensor:
        p = torch.arange(keys[b], device=device)
        if case.layout == "pages" and pages is not None:
            return pages[b][p // PAGE].long() * PAGE + p % PAGE
        return first[b].long() + (p % ring if ring else p)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    caches, seen = [], []
    for width in (D,) if pairs else (E,) if tail else (D, D):
        cache = torch.full((n_slots, G, width), 99.0, device=device, dtype=dtype)
        for b, n in enumerate(keys):
            last = max(0, n - ring) if ring else 0  # a ring holds the last positions
            cache[slots(b)[last:]] = random(n - last, G, width)
        values, held = stored(cache, kv)
        caches.append(Stored(values.data_SGD, values.scales_SGB))
        seen.append([held[slots(b)] for b in range(B)])
    turn = None
    if pairs:
        freq = torch.tensor([1e6 ** (-2.0 * i / D) for i in range(pairs)], dtype=torch.float64).to(device, torch.float32)
        turn = Turn(random(D), freq)
        seen[0] = [turned(v, torch.arange(v.shape[0], device=device), turn, E) for v in seen[0]]
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device)
    seqs = Sequences(starts, torch.tensor(keys, dtype=torch.int32, device=device), max(queries), max(keys))
    q = random(sum(queries), H, E)
    if tail:  # as the decoder hands it over: the dims that rotate stand at the end
        q[..., : tail // 2] = q[..., D // 2 : (D + tail) // 2] = 0
    out = torch.full((sum(queries), H, D), float("nan"), dtype=dtype, device=device)
    sinks = torch.randn(H, generator=g, device=device) if case.seed % 3 == 0 else None
    k, v = caches[0], None if tail else caches[1]
    partial = partial_scratch(q, k, seqs)
    done = torch.zeros(B * G, dtype=torch.int32, device=device) if case.seed % 5 == 0 else None
    where = Slots(pages, page=PAGE) if case.layout == "pages" and pages is not None else Slots(first, ring=ring)
    scale = 2 * E**-0.5
    launch(
        backend, q, k, v, out, seqs, where, scale=scale, window=case.window, sinks_H=sinks, done=done,
        partial=None if partial is None else partial.fill_(float("nan")), turn=turn,
    )  # fmt: skip
    want = reference(q, seen[0], None if tail else seen[1], seqs, scale=scale, D=D, window=case.window, sinks_H=sinks)
    error = float((out.double() - want).norm() / want.norm())
    return error if error == error else float("inf")


def phase(step: object) -> str:
    return "prefill" if step in PREFILL else "decode"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="headwise-hopper")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--phase", choices=("prefill", "decode"), help="default: both")
    parser.add_argument("--card", choices=("sm86", "sm89"), help="whose code the portable kernel is; default: this card's")
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    if args.card and args.backend != "headwise-triton":
        parser.error(f"--card {args.card} is for --backend headwise-triton, not {args.backend}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored_prefill = ((KV[1 + i % 3], *c) for i, c in enumerate(product(HEADS, PREFILL, LAYOUTS)))  # the types take turns
    combinations = [
        c
        for c in chain(product(KV, HEADS, STEPS, LAYOUTS), product(KV[:1], HEADS, PREFILL, LAYOUTS), stored_prefill)
        if not (c[1][1] and c[3][1])  # one tensor is a global layer's
        and args.phase in (None, phase(c[2]))
    ]
    cases = [Case(kv, heads, step, layout, window, i) for i, (kv, heads, step, (layout, window)) in enumerate(combinations)]
    cases.sort(key=lambda c: (c.heads, c.kv, c.seed % 2))  # those of one kernel together
    rows: dict[tuple[object, ...], list[float]] = {}
    ready = {"initializer": as_card, "initargs": (args.card,)} if args.card else {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), **ready) as pool:  # most of the time kernels are compiled
        errors = pool.map(partial(relative_error, backend=args.backend, device=device), cases, chunksize=4)
        for case, error in zip(cases, errors, strict=True):
            rows.setdefault((phase(case.step), case.kv, *case.heads), []).append(error)
    found = [
        {"phase": when, "kv": kv, "head_dim": D, "tail": tail, "pairs": pairs, "heads": H, "kv_heads": G, "cases": len(e),
         "worst": max(e)}
        for (when, kv, D, tail, pairs, H, G), e in rows.items()
    ]  # fmt: skip
    for row in found:
        print(row)
    wrong = sum(e >= ERROR for each in rows.values() for e in each)
    print(f"{len(combinations)} cases, {wrong} wrong")
    if args.out:
        head = about.card() | {"backend": args.backend, "card": args.card, "wrong": wrong, "rows": found}
        Path(args.out).write_text(json.dumps(head, indent=1))


if __name__ == "__main__":
    main()
