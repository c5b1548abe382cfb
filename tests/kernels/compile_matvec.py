"""Compiles the quantised products for cards that are not here; a JSON line each. A program of its own: it replaces the driver."""

from __future__ import annotations

import json
import sys

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.matvec as matvec
from headwise.kernels.tiled import LAYOUTS
from headwise.weights.retile import empty

N, K = 5376, 5376


def compile_one(type_name: str, T: int, capability: int) -> dict[str, object]:
    config = matvec.config_for(type_name, T, N, K, 132)
    kernel = "_matrix" if config.matrix else "_vector"
    original = getattr(matvec, kernel)
    stand_in = Compiled(original, capability)
    setattr(matvec, kernel, stand_in)
    x, out = torch.empty(T, K, dtype=torch.bfloat16), torch.empty(T, N, dtype=torch.bfloat16)
    scratch, done = torch.empty(T * N * config.splits), torch.zeros(N, dtype=torch.int32)
    matvec.matvec(x, empty(type_name, (N, K), "cpu"), out, scratch=scratch, done=done, config=config)
    setattr(matvec, kernel, original)
    r = stand_in.reports[0]
    return {
        "type": type_name, "T": T, "card": capability, "registers": r.registers, "spill_bytes": r.spill_bytes,
        "shared_bytes": r.shared_bytes, "shared_limit": SHARED[capability],
        "wide": "ld.global.v4.b32" in r.ptx or "cp.async.cg.shared.global" in r.ptx,
    }  # fmt: skip


if __name__ == "__main__":
    jobs = [
        (name, T, card)
        for i, name in enumerate(LAYOUTS)
        for T in (1, 16)
        for card in ((90, 86) if i % 2 else (90, 80, 89))  # sm80, sm86 and sm89 differ in shared memory only
    ]
    for job in jobs[int(sys.argv[1]) :: 2]:
        print(json.dumps(compile_one(*job)), flush=True)
