"""Compiles the quantised products for cards that are not here; a JSON line each. A program of its own: it replaces the driver."""

from __future__ import annotations

import json

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.matvec as matvec
from headwise.kernels.tiled import LAYOUTS
from headwise.weights.retile import empty

N, K = 5376, 5376
FEW_ROWS = {"q4_k": [(3, 89)], "q6_k": [(8, 80)]}  # where `skinny` does not run; they take long to compile


def compile_one(type_name: str, T: int, capability: int) -> dict[str, object]:
    config = matvec.config_for(type_name, T, N, K, 132)
    stand_ins = {name: Compiled(getattr(matvec, name), capability) for name in ("_matrix", "_integers", "_quantise")}
    for name, stand_in in stand_ins.items():
        setattr(matvec, name, stand_in)
    x, out = torch.empty(T, K, dtype=torch.bfloat16), torch.empty(T, N, dtype=torch.bfloat16)
    scratch, done = torch.empty(T * N * config.splits), torch.zeros(N, dtype=torch.int32)
    given = x if config.matrix else matvec.quantise(x, torch.empty(matvec.integer_words(T, K, 2), dtype=torch.int32))
    matvec.matvec(given, empty(type_name, (N, K), "cpu"), out, scratch=scratch, done=done, config=config)
    for name, stand_in in stand_ins.items():
        setattr(matvec, name, stand_in.kernel)
    r = stand_ins["_matrix" if config.matrix else "_integers"].reports[0]
    return {
        "type": type_name, "T": T, "card": capability, "registers": r.registers, "spill_bytes": r.spill_bytes,
        "shared_bytes": r.shared_bytes, "shared_limit": SHARED[capability], "dots": r.ptx.count("dp4a.u32.s32"),
        "wide": "ld.global.v4.b32" in r.ptx or "cp.async.cg.shared.global" in r.ptx,
    }  # fmt: skip


if __name__ == "__main__":
    jobs = [
        (name, T, card)
        for i, name in enumerate(LAYOUTS)
        for T, card in ((1, (90, 86)[i % 2]), *FEW_ROWS.get(name, ()), (16, (90, 80, 86)[i % 3]))
    ]
    for job in jobs:
        print(json.dumps(compile_one(*job)), flush=True)
