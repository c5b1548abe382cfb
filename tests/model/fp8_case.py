"""A checkpoint in FP8 as a GPU holds it, through whole steps in our kernels.

A program of its own: it must start with TRITON_INTERPRET=1.

    python -m model.fp8_case FOLDER [make]     prints a JSON object: step -> relative error of its logits, and bytes

With `make` the checkpoint's floats become e4m3 at load. Errors are those against PyTorch's operators in fp32: over the same
values, or over the floats that the e4m3 is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from headwise import LLM
from headwise.attention.capability import DeviceKind
from headwise.attention.choose import choose_layers
from headwise.engine.measure import allocated_bytes
from headwise.engine.runner import Runner
from headwise.engine.stage import Stage
from headwise.model.arena import Room
from headwise.model.linear import linear
from headwise.planner.memory import Plan, Workload, plan
from headwise.planner.quantise import made_at_load
from headwise.planner.residence import groups
from headwise.spec.kv import kv_format
from headwise.spec.layers import Kind
from headwise.spec.read import open_model
from headwise.weights.blocks import Fp8Tensor, Weight, expand_fp8
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import stored_types

CHUNK, TOKENS = 70, 74  # more rows than the kernels for few take, and then fewer


def runner_of(path: Path, make: bool) -> tuple[Runner, Plan, dict[str, Weight]]:
    source = open_model(path, env={})
    kv: dict[Kind, Any] = {"global": kv_format("f16"), "sliding": kv_format("f16")}
    choices = choose_layers(source.spec, kv=kv, dtype="f16", device=DeviceKind("cuda", (8, 0), "a card"))
    reads = frozenset(c.backend.reads for c in choices)
    w = Workload(context=128, slots=1, chunk=CHUNK, kv=kv, dtype="f16", reads=reads)
    stored = stored_types(source.spec, list_checkpoint(path))
    p = plan(source.spec, made_at_load(source.spec, stored, "fp8" if make else None), w)
    weights = load_weights(source.spec, path, resident=p.resident, device="cpu", groups=groups(source.spec, p.resident))
    return Runner(p, [Stage(p, 0, choices, weights, torch.device("cpu"))]), p, weights


def scaled(w: Fp8Tensor) -> float:
    """The product of more rows than the kernel takes, in e4m3, against floats: what rounding activations costs, and not more."""
    T, (N, K) = 70, w.shape
    x = torch.randn(T, K).to(torch.bfloat16)
    room = Room(torch.empty(T * (K + 4) // 2, dtype=torch.bfloat16), fused=True, scaled_rows=True)
    y = linear(x, w, torch.empty(T, N, dtype=torch.bfloat16), room)
    want = x.double() @ expand_fp8(w.data, w.scales).double().t()
    return float((y.double() - want).norm() / want.norm())


def main(path: Path, make: bool) -> dict[str, float]:
    torch.manual_seed(0)
    runner, p, weights = runner_of(path, make)
    ids = torch.randint(3, 300, (TOKENS + 2,)).tolist()
    want = LLM(path, context=128, chunk=CHUNK, device="cpu", check=False).logits(ids)

    def error(x: torch.Tensor, at: int) -> float:
        got = runner.logits(x)[0].float()
        return float((got - want[at]).norm() / want[at].norm())

    kept = {name: w for name, w in weights.items() if isinstance(w, Fp8Tensor)}
    out = {"matrices": float(len(kept)), "planned": float(p.total_bytes), "allocated": float(allocated_bytes(runner.stages))}
    out["weights planned"], out["weights allocated"] = float(p.weights_bytes), float(allocated_bytes(weights))
    out["prompt"] = error(runner.prefill(ids[:TOKENS]), TOKENS - 1)
    for i in range(TOKENS, TOKENS + 2):
        out[f"token {i}"] = error(runner.step([ids[i]]), i)
    matrices = (w for w in kept.values() if len(w.shape) == 2 and w.scales.shape[1] == 1)
    out["in e4m3"] = scaled(next(w for w in matrices if not any(n % 16 for n in w.shape)))
    return out


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:] == ["make"])))
