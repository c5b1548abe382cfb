"""What an agent waits for at each turn: prompts of 32 to 1,000 tokens, replayed from CUDA graphs and as ordinary steps.

    python benchmarks/short_prompts.py OUT.json gemma-4-12b:bf16 gemma-4-12b:q4_k_m [MORE ...] [--history TOKENS]

Random weights of the true shape. Wall time until the host has the next token, both ways in turn, medians with the fastest and the
slowest; what recording takes, once for all lengths that share a graph; and what the driver holds for all graphs so far, which no
plan counts. Logits of both ways are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise.bench.engine import bound, in_bf16, runner_for, unrecorded
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.runner import Runner
from headwise.spec import catalogue

LENGTHS, ROUNDS = (32, 64, 128, 200, 512, 1000), 15


def turn(runner: Runner, ids: Sequence[int], history: int, recorded: bool) -> tuple[float, Tensor]:
    """Milliseconds of a prompt behind `history` tokens, and its logits."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with nullcontext() if recorded else unrecorded(runner):
        logits = runner.logits(runner.run([Run(Place(), history, ids)]))[0]
        int(logits.argmax())
    return 1e3 * (time.perf_counter() - start), logits.float().clone()


def graphs(runner: Runner) -> int:
    return sum(len(stage.chunks.graphs) for stage in runner.stages if stage.chunks is not None)


def measured(runner: Runner, ids: Sequence[int], history: int, most: float, free: int) -> dict[str, Any]:
    before = graphs(runner)
    _, want = turn(runner, ids, history, False)
    firsts = [turn(runner, ids, history, True) for _ in range(3)]  # an ordinary run, the recording, a replay
    errors = [float((got - want).norm() / want.norm()) for _, got in firsts]
    if not max(errors) < most:
        raise RuntimeError(f"{len(ids)} tokens are wrong: relative errors {errors} of the logits; nothing is timed")
    torch.cuda.synchronize()
    held = free - torch.cuda.mem_get_info()[0]
    ms: dict[str, list[float]] = {"recorded": [], "ordinary": []}
    for _ in range(ROUNDS):
        for who, times in ms.items():
            times.append(turn(runner, ids, history, who == "recorded")[0])
    spread = {f"{who}_ms": [min(t), statistics.median(t), max(t)] for who, t in ms.items()}
    return {
        "tokens": len(ids), "history": history, **spread, "recording_ms": firsts[1][0] if graphs(runner) > before else None,
        "graphs": graphs(runner), "driver_bytes": held, "errors": errors,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("what", nargs="+", metavar="MODEL:WEIGHTS")
    parser.add_argument("--history", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda")
    result: dict[str, Any] = about.card() | {"rounds": ROUNDS, "rows": []}
    for what in args.what:
        name, weights = what.split(":")
        spec = catalogue.spec(name)
        context = args.history + max(LENGTHS) + 1
        runner, *_ = runner_for(spec, context=context, chunk=1024, device=device, **in_bf16(spec, weights, device))
        ids = torch.randint(3, spec.vocab_size, (context,)).tolist()
        if args.history:
            runner.prefill(ids[: args.history])
        turn(runner, ids[args.history :][:2], args.history, False)  # loads kernels
        free = torch.cuda.mem_get_info()[0]
        for n in LENGTHS:
            found = measured(runner, ids[args.history : args.history + n], args.history, bound(spec, weights), free)
            row = {"model": name, "weights": weights, **found}
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1))
            recorded, ordinary = row["recorded_ms"][1], row["ordinary_ms"][1]
            once = f"{row['graphs']} graphs, {row['driver_bytes'] / 2**20:.1f} MiB"
            print(f"{name} {weights}, {n} tokens: {recorded:.1f} ms recorded, {ordinary:.1f} ordinary; {once}", flush=True)
        del runner
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
