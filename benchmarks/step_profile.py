"""Where a decode step's time goes: python benchmarks/step_profile.py OUT.json gemma-4-26b-a4b:q4_k_m:1,16,64 [MORE ...] [--apart]

Random weights of the true shape; every stream has 512 tokens and decodes one more in the same recorded step, launched ahead as
`headwise run` does it. First the time of a step, then what PyTorch's profiler says of its kernels. Launches overlap, so that their
times sum to more than the step; with --apart each waits for the one before, which a step pays for with a few percent.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import about
import torch
from profiled import kernels
from torch.profiler import ProfilerActivity, profile

import headwise.kernels.stored as stored
from headwise.bench.engine import in_bf16, runner_for, step_ahead
from headwise.cache.pages import pages_for
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.runner import Runner
from headwise.spec import catalogue

PROMPT, TIMED, PROFILED, SHOWN = 512, 24, 5, 16
CONTEXT = PROMPT + 128


def measured(runner: Runner, streams: int, vocabulary: int) -> dict[str, Any]:
    pages = pages_for(CONTEXT)
    places = [Place(i, ((i * pages, pages),)) for i in range(streams)]
    for place in places:
        runner.run([Run(place, 0, torch.randint(3, vocabulary, (PROMPT,)).tolist())])
    with runner.on_stream():
        drawn = torch.randint(3, vocabulary, (streams,), device="cuda")
        steps = []
        for i in range(TIMED):
            start = time.perf_counter()
            drawn = step_ahead(runner, places, drawn, PROMPT + i)
            steps.append(time.perf_counter() - start)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for i in range(PROFILED):
                drawn = step_ahead(runner, places, drawn, PROMPT + TIMED + i)
            torch.cuda.synchronize()
    ran = [{"kernel": name[:80], "us": us / PROFILED, "launches": n / PROFILED} for name, us, n in kernels(found)]
    return {"streams": streams, "step_ms": statistics.median(steps[6:]) * 1e3, "kernels": ran}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("what", nargs="+", metavar="MODEL:WEIGHTS:STREAMS")
    parser.add_argument("--apart", action="store_true", help="no launch begins before the one ahead has ended")
    args = parser.parse_args()
    if args.apart:
        stored._overlaps = lambda device: False  # type: ignore[assignment]
    device = torch.device("cuda")
    result: dict[str, Any] = about.card() | {"apart": args.apart, "rows": []}
    for what in args.what:
        name, weights, counts = what.split(":")
        spec, streams = catalogue.spec(name), [int(n) for n in counts.split(",")]
        common = in_bf16(spec, weights, device)
        runner, *_ = runner_for(spec, context=CONTEXT, chunk=2048, slots=max(streams), device=device, **common)
        for n in streams:
            row = {"model": name, "weights": weights} | measured(runner, n, spec.vocab_size)
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1))
            total, launches = (sum(k[key] for k in row["kernels"]) for key in ("us", "launches"))
            said = f"{row['step_ms']:.2f} ms a step; {launches:.0f} launches, {total / 1e3:.2f} ms"
            print(f"{name} {weights}, {n} streams: {said}")
            for k in row["kernels"][:SHOWN]:
                print(f"  {k['us']:9.1f} us {k['launches']:6.1f} times  {k['kernel'][:70]}", flush=True)
        del runner
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
