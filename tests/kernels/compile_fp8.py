"""Compiles products with e4m3 for cards that are not here; a JSON line each. A program of its own: it replaces the driver."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.fp8 as fp8
import headwise.kernels.fp8_rows as fp8_rows
from headwise.kernels.split import H200

N, K = 5376, 5376
BF16 = torch.bfloat16


def compile_one(module: object, name: str, label: str, capability: int, launch: Callable[[], object]) -> dict[str, object]:
    kernel = getattr(module, name)
    stand_in = Compiled(kernel, capability)
    setattr(module, name, stand_in)
    fp8.converts = fp8_rows.converts = lambda device: capability >= 89
    launch()
    setattr(module, name, kernel)
    r = stand_in.reports[0]
    return {
        "kernel": label, "card": capability, "registers": r.registers, "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes,
        "shared_limit": SHARED[capability], "wide_loads": "ld.global.v4.b32" in r.ptx, "copies_ahead": "cp.async" in r.ptx,
        "matrix_unit": "mma.sync" in r.ptx or "wgmma.mma_async" in r.ptx, "instruction": "cvt.rn.f16x2.e4m3x2" in r.ptx,
    }  # fmt: skip


def every(capability: int) -> list[dict[str, object]]:
    out = []
    scratch, done = torch.empty(10**7), torch.zeros(1024, dtype=torch.int32)
    for S in (1, K // 128):
        w, s = torch.empty(2 * N, K, dtype=torch.uint8), torch.empty(2 * N, S)
        for act in (None, "gelu_tanh"):
            x, y = torch.empty(1, K, dtype=BF16), torch.empty(1, N, dtype=BF16)
            rows = N if act is None else 2 * N
            launch = partial(fp8.one_row, x, w[:rows], s[:rows], y, act=act)
            out.append(compile_one(fp8, "_row", f"row, {act}, {S}", capability, launch))
        for T in (2, 32, 64):
            x, y = torch.empty(T, K, dtype=BF16), torch.empty(T, N, dtype=BF16)
            launch = partial(fp8.product, x, w[:N], s[:N], y, scratch=scratch, done=done, config=fp8.config_for(T, N, K, H200))
            out.append(compile_one(fp8, "_rows", f"rows, {T}, {S}", capability, launch))
        y = torch.empty(N, K, dtype=BF16)
        out.append(compile_one(fp8_rows, "_expand", f"expand, {S}", capability, partial(fp8_rows.expand, w[:N], s[:N], y)))
    x, q = torch.empty(4, K, dtype=BF16), torch.empty(4, K, dtype=torch.float8_e4m3fn)
    out.append(compile_one(fp8_rows, "_quantise", "quantise", capability, partial(fp8_rows.quantise, x, q, torch.empty(4))))
    return out


if __name__ == "__main__":
    for capability in (80, 86, 89, 90):
        for found in every(capability):
            print(json.dumps(found), flush=True)
