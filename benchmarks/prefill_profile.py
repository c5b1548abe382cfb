"""Where a prompt's time goes: python benchmarks/prefill_profile.py OUT.json gemma-4-31b:bf16:4096 [MORE ...] [--dummies]

Random weights of the true shape, or with --dummies those that vLLM's dummies have (`benchmarks/engine.py`), the prompt in one step.
First the time until the host has the next token, then what PyTorch's profiler says of its kernels: the sum of each, and how long
the card was busy between the first and the last. Watts and MHz are medians while the prompt is read again and again.
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
import pynvml
import torch
from engine import dummies
from profiled import kernels
from torch.profiler import ProfilerActivity, profile

from headwise.bench.engine import in_bf16, runner_for
from headwise.engine.runner import Runner
from headwise.spec import catalogue

TIMED, WATCHED, SHOWN = 9, 12, 16


def measured(runner: Runner, tokens: int, vocabulary: int) -> dict[str, Any]:
    ids = torch.randint(3, vocabulary, (tokens,)).tolist()

    def once() -> float:
        runner.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        int(runner.logits(runner.prefill(ids))[0].argmax())
        return 1e3 * (time.perf_counter() - start)

    for _ in range(3):  # compiles, and records where that is done
        once()
    took = [once() for _ in range(TIMED)]
    card, states = pynvml.nvmlDeviceGetHandleByIndex(0), list[tuple[float, int]]()
    for _ in range(WATCHED):
        once()
        clock = pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM)
        states.append((pynvml.nvmlDeviceGetPowerUsage(card) / 1e3, clock))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        once()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in found.events() if str(e.device_type).endswith("CUDA"))
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    watts, mhz = (statistics.median(x) for x in zip(*states, strict=True))
    return {
        "tokens": tokens, "ms": statistics.median(took), "least_ms": min(took), "busy_ms": busy / 1e3,
        "span_ms": (end - spans[0][0]) / 1e3, "watts": watts, "mhz": mhz,
        "kernels": [{"kernel": name[:110], "ms": us / 1e3, "launches": n} for name, us, n in kernels(found)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("what", nargs="+", metavar="MODEL:WEIGHTS:TOKENS")
    parser.add_argument("--dummies", action="store_true", help="weights as vLLM's --load-format dummy draws them")
    args = parser.parse_args()
    pynvml.nvmlInit()
    device = torch.device("cuda")
    result: dict[str, Any] = about.card() | {"rows": []}
    for what in args.what:
        name, weights, length = what.split(":")
        spec, tokens = catalogue.spec(name), int(length)
        runner, *_ = runner_for(spec, context=tokens + 8, chunk=tokens, device=device, **in_bf16(spec, weights, device))
        for stage in runner.stages if args.dummies else ():
            dummies(stage.weights)
        row = {"model": name, "weights": f"{weights}{' dummy' if args.dummies else ''}"} | measured(runner, tokens, spec.vocab_size)
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1))
        rate = f"{row['ms']:.1f} ms; busy {row['busy_ms']:.1f} of {row['span_ms']:.1f}; {row['watts']:.0f} W, {row['mhz']:.0f} MHz"
        print(f"{name} {row['weights']}, {tokens:,} tokens: {rate}", flush=True)
        for k in row["kernels"][:SHOWN]:
            print(f"  {k['ms']:8.2f} ms {k['launches']:5d} times  {k['kernel'][:80]}", flush=True)
        del runner
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
