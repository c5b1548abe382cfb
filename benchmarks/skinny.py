"""Products of 1 to 64 rows with quantised matrices on the tensor cores: right, and how fast?

    PYTHONPATH=. python benchmarks/skinny.py OUT.json [SECONDS]

First every type against fp64 over the dequantised values: rows of every tile, bf16 and f16, K that ends within a step, rows that
end within eight, one program a row and several. Then times over the matrices of Gemma 4 31B in Q4_K_M, weights not in the cache,
beside the product as integers (1 to 8 rows) or by `matvec._matrix` (to 16), and beside expanding the matrix for cuBLAS (more).
What is not begun after SECONDS (90) is left out.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import about
import quant_matmul as Q
import torch

from headwise.kernels import arrange as A
from headwise.kernels import matvec as M
from headwise.kernels import skinny as S
from headwise.kernels.expand import expand
from headwise.kernels.split import card
from headwise.kernels.tiled import LAYOUTS, Planes
from headwise.planner.workspace import arranged_values

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
SHAPES = (
    ("q4_k", 43008, 5376),  # gate and up
    ("q4_k", 5376, 21504),  # down
    ("q6_k", 5376, 21504),
    ("q4_k", 16384, 5376),  # queries, keys and values
    ("q4_k", 5376, 8192),  # o
    ("q6_k", 262144, 5376),  # the head
    ("q8_0", 5376, 21504),
    ("q5_0", 2816, 2112),  # down of the 26B-A4B
)
ROWS = (1, 2, 4, 8, 16, 32, 64)


def check(type_name: str) -> list[dict[str, Any]]:
    """Errors of one type, relative."""
    torch.manual_seed(0)
    found = []
    for N, K in ((5376, 2048), (205, 1280 if LAYOUTS[type_name].block == 256 else 2112), (1000, 256)):
        blocks = Q.random_blocks(type_name, (N, K))
        w = Q.planes_of(blocks, type_name, (N, K))
        for T, kind in [(T, torch.bfloat16) for T in (1, 3, 8, 13, 16, 27, 64)] + [(T, torch.float16) for T in (3, 13)]:
            x = torch.randn(T, K, device="cuda", dtype=kind)
            want = Q.expected(x, blocks, type_name)
            arranged = A.arrange(x, torch.empty(arranged_values(T, K), device="cuda", dtype=kind))
            for splits in (1, 3):
                y = torch.full((T, N), float("nan"), device="cuda", dtype=kind)
                done, scratch = torch.zeros(N, dtype=torch.int32, device="cuda"), torch.empty(T * N * splits, device="cuda")
                config = S.config_for(type_name, T, N, K, card(y.device))._replace(splits=splits)
                S.skinny(arranged, w, y, scratch=scratch, done=done, config=config)
                error = float((y - want).norm() / want.norm())
                found.append({"type": type_name, "N": N, "K": K, "T": T, "dtype": str(kind)[6:], "splits": splits,
                              "error": error, "right": error < LIMIT[kind] and not int(done.sum())})  # fmt: skip
    return found


def microseconds(calls: list[Any]) -> float:
    return statistics.median(Q.graph_us(calls, 5))


def times(type_name: str, N: int, K: int, T: int, copies: list[Planes], n_bytes: int, ceiling: float) -> dict[str, Any]:
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(T, N, device="cuda", dtype=torch.bfloat16)
    room = torch.empty(arranged_values(T, K), device="cuda", dtype=torch.bfloat16)
    done, scratch = torch.zeros(N, dtype=torch.int32, device="cuda"), torch.empty(max(T * N, 2**21) * 8, device="cuda")
    config, arranged = S.config_for(type_name, T, N, K, card(x.device)), A.arrange(x, room)
    us = microseconds([partial(S.skinny, arranged, w, y, scratch=scratch, done=done, config=config) for w in copies])
    row = {"type": type_name, "N": N, "K": K, "T": T, "us": us, "of_card": n_bytes / us / 1e6 / ceiling,
           "arrange_us": microseconds([partial(A.arrange, x, room)] * 20), "config": config._asdict()}  # fmt: skip
    if T <= M.MAX_ROWS:
        other = M.config_for(type_name, T, N, K, card(x.device).processors)
        given = x if other.matrix else M.quantise(x, torch.empty(M.integer_words(T, K, 2), dtype=torch.int32, device="cuda"))
        row["matvec_us"] = microseconds([partial(M.matvec, given, w, y, scratch=scratch, done=done, config=other) for w in copies])
    elif N * K < 2**28:
        dense = torch.empty(N, K, device="cuda", dtype=torch.bfloat16)

        def expanded(w: Planes) -> None:
            expand(w, 0, N, dense)
            torch.mm(x, dense.t(), out=y)

        row["expanded_us"] = microseconds([partial(expanded, w) for w in copies])
    return row


def main(out: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with ProcessPoolExecutor(len(LAYOUTS), mp_context=get_context("spawn")) as pool:
        checks = [c for found in pool.map(check, LAYOUTS) for c in found]
    worst = {n: max(c["error"] for c in checks if c["type"] == n and c["dtype"] == "bfloat16") for n in LAYOUTS}
    print(f"{len(checks)} checked, {sum(not c['right'] for c in checks)} wrong; worst in bf16: {worst}", flush=True)
    ceiling, rows = Q.read_tb_s(), []
    for type_name, N, K in SHAPES:
        blocks = Q.random_blocks(type_name, (N, K))
        n_bytes = blocks.numel()
        copies = Q.in_rotation(Q.planes_of(blocks, type_name, (N, K)), n_bytes)
        del blocks
        for T in ROWS:
            if time.monotonic() < deadline:
                rows.append(times(type_name, N, K, T, copies, n_bytes, ceiling))
                r = rows[-1]
                print(f"{type_name} {N}x{K} T={T}: {r['us']:.1f} us, {100 * r['of_card']:.0f} %, arrange {r['arrange_us']:.1f}; "
                      f"matvec {r.get('matvec_us', 0):.1f}, expanded {r.get('expanded_us', 0):.1f}", flush=True)  # fmt: skip
    result = about.card("triton") | {"read_tb_s": ceiling, "checks": checks, "rows": rows}
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 90)
