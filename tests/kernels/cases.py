"""One attention case: a cache in every layout and KV type, written by `cache.storage`, read by the kernel, held to its reference.

Run as a program it prints one JSON line a case read from standard input: on a GPU, or by triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.attention.reference import turned
from headwise.cache.storage import Values
from headwise.spec.kv import KV_FORMATS

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """`keys` and `queries` of each sequence; `tail` rotated values beside one tensor for K and V (0: two tensors), of which V alone
    is stored where `pairs` are to be rotated by the kernel."""

    D: int
    H: int
    G: int
    keys: tuple[int, ...]
    queries: tuple[int, ...]
    tail: int = 0
    pairs: int = 0
    window: int | None = None
    layout: str = "flat"  # flat, ring, pages
    kv: str = "f16"
    dtype: str = "f16"
    splits: int = 1
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    rows: int = 16
    tile: int = 16
    pack: int = 16
    seed: int = 0


def stored(x: Tensor, kv: str) -> tuple[Values, Tensor]:
    """`x` (slots, heads, values) in a KV format, and what it holds."""
    values = Values(*x.shape, KV_FORMATS[kv], x.device)
    values.write(0, x, torch.empty_like(x, dtype=torch.float32))
    return values, values.read(0, x.shape[0], None if values.native(x.dtype) else torch.empty_like(x)).clone()


def run(case: Case, device: str = "cpu") -> dict[str, float | bool]:
    """Relative error, correlation and finiteness of the kernel's result, whose buffer held NaN before."""
    from headwise.kernels.attend import attend, partial_floats, reference
    from headwise.kernels.configs import Config
    from headwise.kernels.stored import Sequences, Slots, Stored
    from headwise.kernels.turn import Turn

    g = torch.Generator().manual_seed(case.seed)
    dtype, D, E, B = DTYPES[case.dtype], case.D, case.D + case.tail, len(case.keys)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    page = 16 if case.layout == "pages" else 0
    ring = (case.window or 0) + max(case.queries) + 8 if case.layout == "ring" else 0
    room = ring or -(-max(case.keys) // 16) * 16
    n_slots = B * room + 32  # more than are used: garbage beyond
    if page:
        table = torch.randperm(n_slots // page, generator=g)[: B * room // page].view(B, -1).to(torch.int32)
    else:
        table = (torch.arange(B) * room).to(torch.int32)

    def slots(b: int) -> Tensor:
        p = torch.arange(case.keys[b])
        if page:
            return table[b][p // page].long() * page + p % page
        return table[b].long() + (p % ring if ring else p)

    caches, seen = [], []
    for width in (D,) if case.pairs else (E,) if case.tail else (D, D):
        cache = torch.full((n_slots, case.G, width), 99.0).to(device, dtype)  # what must not be read is large
        for b in range(B):
            where, rows = slots(b), random(case.keys[b], case.G, width)
            for p in range(0, case.keys[b], ring or case.keys[b]):  # later positions of a ring overwrite earlier ones
                cache[where[p:][: ring or None]] = rows[p:][: ring or None]
        values, held = stored(cache, case.kv)
        caches.append(Stored(values.data_SGD, values.scales_SGB))
        seen.append([held[slots(b).to(device)] for b in range(B)])
    turn = None
    if case.pairs:  # of the model's form: the first of D / 2 frequencies, from 1 down
        freq = torch.tensor([1e6 ** (-2.0 * i / D) for i in range(case.pairs)], dtype=torch.float64)
        turn = Turn(random(D), freq.to(device, torch.float32), 1.25)
        seen[0] = [turned(v, torch.arange(v.shape[0], device=device), turn, E) for v in seen[0]]
    starts = torch.tensor([0, *torch.tensor(case.queries).cumsum(0).tolist()], dtype=torch.int32)
    seqs = Sequences(
        starts.to(device), torch.tensor(case.keys, dtype=torch.int32, device=device), max(case.queries), max(case.keys)
    )
    q = random(int(starts[-1]), case.H, E)
    out = torch.full((int(starts[-1]), case.H, D), float("nan"), dtype=dtype, device=device)
    scale = case.scale or E**-0.5
    sinks = torch.randn(case.H, generator=g).to(device) if case.sinks else None
    n = partial_floats(B, case.H, case.G, max(case.queries), D, case.splits, case.rows)
    scratch = torch.full((n,), float("nan"), device=device) if n else None
    config = Config(case.rows, case.tile, 4, 2, case.pack)
    attend(
        q, caches[0], None if case.tail else caches[1], out, seqs, Slots(table.to(device), ring, page), scale=scale,
        window=case.window, softcap=case.softcap, sinks_H=sinks, n_splits=case.splits, scratch=scratch, config=config,
        turn=turn,
    )  # fmt: skip
    expected = reference(
        q, seen[0], None if case.tail else seen[1], seqs, scale=scale, D=D, window=case.window, softcap=case.softcap, sinks_H=sinks
    )
    a, b = out.double().flatten(), expected.flatten()
    return {
        "error": float((a - b).norm() / b.norm()),
        "correlation": float(torch.corrcoef(torch.stack((a, b)))[0, 1]),
        "finite": bool(torch.isfinite(a).all()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(Case(**json.loads(line)), "cuda" if torch.cuda.is_available() else "cpu")), flush=True)
