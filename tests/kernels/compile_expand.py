"""Compiles the expansion of rows for cards that are not here; a JSON line each. A program of its own: it replaces the driver."""

from __future__ import annotations

import json

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.expand as expand
from headwise.kernels.tiled import LAYOUTS
from headwise.weights.retile import empty

N, K = 1000, 5376


def compile_one(type_name: str, listed: bool, dtype: torch.dtype, capability: int) -> dict[str, object]:
    kernel = expand._expand
    stand_in = expand._expand = Compiled(kernel, capability)
    w, out = empty(type_name, (N, K), "cpu"), torch.empty(9, K, dtype=dtype)
    if listed:
        expand.gather(w, torch.zeros(9, dtype=torch.int64), out)
    else:
        expand.expand(w, 3, 12, out)
    expand._expand = kernel
    r = stand_in.reports[0]
    return {
        "type": type_name, "listed": listed, "dtype": str(dtype), "card": capability, "registers": r.registers,
        "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes, "shared_limit": SHARED[capability],
        "wide_loads": "ld.global.v4.b32" in r.ptx, "wide_stores": "st.global.v4.b32" in r.ptx,
    }  # fmt: skip


if __name__ == "__main__":
    cards, dtypes = (90, 80, 86, 89), (torch.bfloat16, torch.float16, torch.float32)
    for i, name in enumerate(LAYOUTS):
        print(json.dumps(compile_one(name, False, torch.bfloat16, cards[i % 4])), flush=True)
        print(json.dumps(compile_one(name, True, dtypes[i % 3], cards[(i + 1) % 4])), flush=True)
