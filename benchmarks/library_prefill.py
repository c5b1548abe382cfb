"""Prefill by an installed library (flash-attn-4) in the engine, beside headwise's own kernels alone: the same numbers, how fast.

    python benchmarks/library_prefill.py [--model gemma-3-12b] [OUT.json]

Random weights in the true shape, bf16, a prompt of 16,384 tokens in steps of 4,096, five times in turn. Exits with 2 where no
library takes a layer's prefill.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import about
import torch

import headwise.bench.engine as engine
from headwise.engine.runner import Runner
from headwise.engine.stage import build_stages
from headwise.spec import catalogue

TOKENS, CHUNK, ROUNDS = 16384, 4096, 5


def main(model: str, out: Path | None) -> None:
    device, spec = torch.device("cuda", 0), catalogue.spec(model)
    default, choices, plan = engine.runner_for(
        spec, context=TOKENS + 512, chunk=CHUNK, device=device, **engine.in_bf16(spec, "bf16", device)
    )
    by_kind = {layer.kind: choice.names for choice, layer in zip(choices, spec.layers, strict=True)}
    print(by_kind, flush=True)
    if not any(choice.prefill for choice in choices):
        print("no library takes a layer's prefill here", file=sys.stderr)
        sys.exit(2)
    own = tuple(choice.alone("compared") for choice in choices)
    alone = Runner(plan, build_stages(plan, own, [device], lambda s, d: engine.random_weights(spec, plan, d, stage=s)[0]))
    ids = torch.randint(3, spec.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    took: dict[str, list[float]] = {"default": [], "alone": []}
    hidden: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for name, runner in (("default", default), ("alone", alone)):
            runner.reset()
            torch.cuda.synchronize()
            start = time.perf_counter()
            x = runner.prefill(ids)
            runner.logits(x)[0].argmax().item()
            took[name].append(time.perf_counter() - start)
            hidden[name] = x.float().cpu()
    apart = float((hidden["default"] - hidden["alone"]).norm() / hidden["alone"].norm())
    result: dict[str, Any] = about.card() | {
        "model": model, "tokens": TOKENS, "chunk": CHUNK, "backends": by_kind, "seconds": took, "relative_difference": apart,
        "tok_s": {name: TOKENS / min(seconds[1:]) for name, seconds in took.items()},
    }  # fmt: skip
    print(json.dumps({k: result[k] for k in ("tok_s", "relative_difference")}))
    if out:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma-3-12b")
    parser.add_argument("out", nargs="?", type=Path)
    args = parser.parse_args()
    main(args.model, args.out)
