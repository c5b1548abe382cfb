"""Compiles kernels that draw tokens for cards that are not here; a JSON line each. A program of its own: it replaces the driver."""

from __future__ import annotations

import json

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.draw as D
from headwise.planner.workspace import draw_words

KERNELS = ("_peaks", "_count", "_pick")


def every(capability: int | str, dtype: torch.dtype, V: int, W: int) -> list[dict[str, object]]:
    kernels = {name: getattr(D, name) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(D, name, Compiled(kernel, capability))
    room = {"words": torch.empty(draw_words(W, V), dtype=torch.int32), "done": torch.empty(W, dtype=torch.int32)}
    D.draw(torch.empty(W, V, dtype=dtype), torch.empty(W, 5), ranked=True, cap=30.0, **room)
    found = []
    for name, kernel in kernels.items():
        (r,) = getattr(D, name).reports
        setattr(D, name, kernel)
        found.append({
            "kernel": name, "card": capability, "V": V, "dtype": str(dtype)[6:], "registers": r.registers,
            "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes, "shared_limit": SHARED[capability],
            "wide": "ld.global.v4.b32" in r.ptx,
        })  # fmt: skip
    return found


if __name__ == "__main__":
    jobs = (
        (90, torch.bfloat16, 262_144, 1),
        (89, torch.float16, 262_208, 16),
        (86, torch.bfloat16, 50_257, 3),
        (80, torch.float16, 128_256, 64),
    )
    for job in (*jobs, ("gfx1100", torch.float16, 262_144, 4)):
        for found in every(*job):
            print(json.dumps(found), flush=True)
