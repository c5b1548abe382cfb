"""Compiles products on the tensor cores for cards that are not here; a JSON line each. It replaces the driver."""

from __future__ import annotations

import json

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.arrange as A
import headwise.kernels.router as R
import headwise.kernels.skinny as S
from headwise.kernels.split import H200, Card
from headwise.kernels.tiled import LAYOUTS
from headwise.planner.workspace import arranged_values, padded
from headwise.weights.retile import empty

N = 5376
CARDS = {
    80: Card(108, 164 << 10, SHARED[80]),
    86: Card(84, 100 << 10, SHARED[86]),
    89: Card(128, 100 << 10, SHARED[89]),
    90: H200,
}


def compile_one(type_name: str, T: int, capability: int, dtype: torch.dtype) -> dict[str, object]:
    K = 5376 if LAYOUTS[type_name].block == 256 else 2112
    stand_in, kernels = Compiled(S._skinny, capability), (A._arrange, S._skinny)
    A._arrange, S._skinny = Compiled(A._arrange, capability), stand_in
    c = S.config_for(type_name, T, N, K, CARDS[capability])
    x = A.arrange(torch.empty(T, K, dtype=dtype), torch.empty(arranged_values(T, K), dtype=dtype))
    room = {"scratch": torch.empty(T * N * c.splits), "done": torch.zeros(N, dtype=torch.int32)}
    S.skinny(x, empty(type_name, (N, K), "cpu"), torch.empty(T, N, dtype=dtype), config=c, **room)
    A._arrange, S._skinny = kernels
    r = stand_in.reports[0]
    return {
        "type": type_name, "T": T, "card": capability, "registers": r.registers, "spill_bytes": r.spill_bytes,
        "shared_bytes": r.shared_bytes, "said_bytes": S.shared_bytes(type_name, padded(T), c), "shared_limit": SHARED[capability],
        "products": r.ptx.count("mma.sync.aligned.m16n8k16"), "wanted": 16 * (c.rows // (16 * c.warps)) * padded(T) // 8,
        "copies": r.ptx.count("cp.async.cg.shared.global"),
    }  # fmt: skip


def experts(type_name: str, capability: int, tile: int) -> dict[str, object]:
    c = S.config_of_experts(type_name, tile, CARDS[capability])
    K, E = 2816 if LAYOUTS[type_name].block == 256 else 704, 128
    stand_in, kernels = Compiled(S._skinny, capability), (A._arrange_pairs, S._skinny)
    A._arrange_pairs, S._skinny = Compiled(A._arrange_pairs, capability), stand_in
    order = R.Order(*(torch.zeros(n, dtype=torch.int32) for n in (32, E + 1, E + 1, 32 + E)), tile)
    x = A.arrange_pairs(torch.empty(4, K, dtype=torch.bfloat16), order, E, torch.empty(2**23, dtype=torch.bfloat16))
    S.skinny_experts(x, empty(type_name, (E, N, K), "cpu"), torch.empty(32, N, dtype=torch.bfloat16), by_pair=True, config=c)
    A._arrange_pairs, S._skinny = kernels
    r = stand_in.reports[0]
    return {
        "type": type_name, "T": "experts", "card": capability, "registers": r.registers, "spill_bytes": r.spill_bytes,
        "shared_bytes": r.shared_bytes, "said_bytes": S.shared_bytes(type_name, tile, c),
        "shared_limit": SHARED[capability], "products": r.ptx.count("mma.sync.aligned.m16n8k16"),
        "copies": r.ptx.count("cp.async.cg.shared.global"),
        "wanted": 16 * (c.rows // (16 * c.warps)) * tile // 8,
    }  # fmt: skip


if __name__ == "__main__":
    both = torch.bfloat16, torch.float16
    jobs = [
        (name, T, card, both[dtype])
        for i, name in enumerate(LAYOUTS)
        for T, card, dtype in ((1, 90, 0), ((33, 17)[i % 2], 90, i % 2), ((9, 32)[i % 2], (80, 86, 89)[i % 3], 0))
    ]
    for job in jobs:
        print(json.dumps(compile_one(*job)), flush=True)
    cases = [("q4_k", 90, 8), ("q5_0", 86, 32), ("q8_0", 90, 16), ("q6_k", 80, 32), ("q4_k", 89, 16), ("q8_0", 89, 32)]
    for case in cases:
        print(json.dumps(experts(*case)), flush=True)
