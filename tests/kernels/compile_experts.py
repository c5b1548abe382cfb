"""Compiles the kernels of routed experts for cards that are not here; a JSON line each. A program of its own."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from kernels.compile_rows import SHARED
from kernels.compiling import Compiled

import headwise.kernels.experts as experts
import headwise.kernels.router as router
from headwise.kernels.configs import arch_of
from headwise.planner.workspace import order_values
from headwise.weights.retile import empty

E, D, W, K = 128, 2816, 704, 8
bf16, i32, u8 = torch.bfloat16, torch.int32, torch.uint8
FEW, MANY = experts.FEW_PROGRAMS, experts.MANY_PROGRAMS
CONFIGS = {90: (FEW, MANY), 86: (MANY, FEW)}  # types take them in turn
KERNELS = {
    experts: ("_pairs", "_integer_pairs", "_gate_integers", "_grouped", "_combine"),
    router: ("_route", "_scores", "_choose", "_count", "_order"),
}


def launch_all(capability: int) -> None:
    both, down = torch.empty(E, 2 * W, D, dtype=bf16), torch.empty(E, D, W, dtype=bf16)
    halves, gate = (both[:, :W], both[:, W:]), experts.Gate("gelu_tanh")
    choice = router.Choice(False, None, torch.empty(E), torch.empty(D), 1e-6, 0.1)
    for T in (1, 300):
        x, gated, y = torch.empty(T, D, dtype=bf16), torch.empty(T * K, W, dtype=bf16), torch.empty(T * K, D, dtype=bf16)
        chosen = router.Chosen(torch.empty(T, K, dtype=i32), torch.empty(T, K))
        router.route(x, torch.empty(E, D), chosen, choice, scores_TE=torch.empty(T, E), done=torch.empty(16, dtype=i32),
                     arch=arch_of(divmod(capability, 10)))  # fmt: skip
        experts.combine(y, chosen, x, beside=(x, torch.empty(D), torch.empty(D)), eps=1e-6)
        if T == 1:
            experts.pairs(x, chosen.ids_TK, halves, gated, gate)
            experts.pairs(gated, chosen.ids_TK, (down,), y)
            for i, (kind, columns) in enumerate((("q4_k", D), ("q6_k", D), ("q5_0", W), ("q8_0", W), ("mxfp4", 2880))):
                config = CONFIGS[capability][i % 2]
                words, out = torch.empty(T * K, columns // 32, 20, dtype=i32), torch.empty(T * K, 2 * W, dtype=bf16)
                experts.integer_pairs(words, chosen.ids_TK, empty(kind, (2, 2 * W, columns), "cpu"), out, config=config)
            experts.gate_integers(torch.empty(K, 2 * W, dtype=bf16), chosen.ids_TK, gate, torch.empty(10**5, dtype=i32))
            continue
        for rows in experts.GROUPED:
            order = router.order(chosen.ids_TK, E, rows, torch.empty(order_values(T, E, K), dtype=i32))
            first, second = (experts.grouped_launch(rows, g, arch_of(divmod(capability, 10)), 2) for g in (True, False))
            experts.grouped(x, order, halves, gated, K, gate, launch=first)
            experts.grouped(gated, order, (down,), y, K, launch=second)


def launch_fp8(capability: int) -> None:
    """Products with e4m3 under a scale a row, and under one for each 128 of it."""
    both, down, gate = torch.empty(E, 2 * W, D, dtype=u8), torch.empty(E, D, W, dtype=u8), experts.Gate("gelu_tanh")
    x, gated, y = torch.empty(300, D, dtype=bf16), torch.empty(300 * K, W, dtype=bf16), torch.empty(300 * K, D, dtype=bf16)
    ids = torch.empty(300, K, dtype=i32)
    for blocks in (False, True):
        s, of_down = (torch.empty(*w.shape[:2], -(-w.shape[2] // 128) if blocks else 1) for w in (both, down))
        halves, scales = (both[:, :W], both[:, W:]), (s[:, :W], s[:, W:])
        experts.pairs(x[:1], ids[:1], halves, gated[:K], gate, scales=scales)
        experts.pairs(gated[:K], ids[:1], (down,), y[:K], scales=(of_down,))
        for rows in experts.GROUPED_FP8:
            order = router.order(ids, E, rows, torch.empty(order_values(300, E, K), dtype=i32))
            first, second = (experts.grouped_launch(rows, g, arch_of(divmod(capability, 10)), 2, fp8=True) for g in (True, False))
            experts.grouped(x, order, halves, gated, K, gate, scales=scales, launch=first)
            experts.grouped(gated, order, (down,), y, K, scales=(of_down,), launch=second)


def main(capability: int, launch: Callable[[int], None]) -> None:
    pdl = {"PDL": True, "launch_pdl": True} if capability == 90 else {"PDL": False}
    experts.overlap = router.overlap = lambda x: pdl
    experts.converts = lambda device: capability >= 89
    stand_ins = [(module, name, Compiled(getattr(module, name), capability)) for module, names in KERNELS.items() for name in names]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    launch(capability)
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in.kernel)
        for r in stand_in.reports:
            print(json.dumps({
                "kernel": name, "card": capability, "fp8": launch is launch_fp8, "registers": r.registers,
                "spill_bytes": r.spill_bytes, "shared_bytes": r.shared_bytes, "shared_limit": SHARED[capability],
                "matrix_unit": "mma.sync" in r.ptx or "wgmma.mma_async" in r.ptx, "instruction": "cvt.rn.f16x2.e4m3x2" in r.ptx,
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    # upwards: triton converts e4m3 in all of a process as it did for the first card
    for card, launch in ((80, launch_fp8), (86, launch_all), (89, launch_fp8), (90, launch_fp8), (90, launch_all)):
        main(card, launch)
