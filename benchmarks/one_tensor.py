"""One tensor for K and V in its two layouts: V with K's rotated values, or V alone and the rotation in the kernel. One card.

    python benchmarks/one_tensor.py [--sweep] [OUT.json]

Gemma 4 31B's global layers (32 query heads over 4 of 512 values, 128 of them rotated): decode over bf16, q8_0 and q4_0 at 8K, 32K
and 128K keys, prefill at 8K. Each launch is held to the formula in fp64 before it is timed; decode as `headwise bench attention`
has it, one graph over caches in rotation. `--sweep` times launches of the portable kernel over V alone in place of the table's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import about
import torch

from headwise.bench.attention import CHECKED, ERROR, Ours, Shape, cache_bytes, formula, graph_times, in_turn, relative
from headwise.kernels.configs import TABLE, Config, Row

GLOBAL = Shape(name="Gemma 4 31B global", head_dim=512, heads=32, kv_heads=4, one=True, length=8192)
WHO = (("v+rotated", "headwise-hopper"), ("v+rotated", "headwise-triton"), ("v", "headwise-hopper"), ("v", "headwise-triton"))
KV = ("bf16", "q8_0", "q4_0")
LENGTHS = (8192, 32768, 131072)
ROUNDS = 9
SWEPT = [Config(16, keys, warps, stages) for keys in (32, 64) for warps in (4, 8) for stages in (1, 2, 3)]


def timed(shape: Shape, backend: str, device: torch.device) -> dict[str, object]:
    """Median, least and most microseconds of a launch that gave the formula's answer.

    Raises:
        RuntimeError: it did not; nothing is timed.
    """
    n_caches = max(3, -(-(2**28) // cache_bytes(shape))) if shape.decode else 1
    ours = Ours(shape, device, n_caches, backend)
    ours()
    torch.cuda.synchronize()
    n = min(CHECKED, ours.q.shape[0])
    error = relative(ours.out[-n:], formula(ours.q[-n:], *ours.held(), shape, ours.layer.scale))
    if not error < ERROR:
        raise RuntimeError(f"{backend} is wrong at {shape}: relative error {error:.1e}; nothing is timed")
    us = graph_times(ours, ROUNDS) if shape.decode else in_turn({"": ours}, ROUNDS)[""]
    n_bytes = cache_bytes(shape) if shape.decode else None
    return {"us": statistics.median(us), "low_us": min(us), "high_us": max(us), "error": error, "bytes": n_bytes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="launches of decode over V alone, at 32K")
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    device, rows = torch.device("cuda"), list[dict[str, object]]()
    decode = replace(GLOBAL, decode=True)
    if args.sweep:
        cases = [(replace(decode, length=32768, kv=kv, layout="v"), "headwise-triton", c) for kv in KV for c in SWEPT]
    else:
        shapes = [GLOBAL, *(replace(decode, length=n, kv=kv) for kv in KV for n in LENGTHS)]
        cases = [
            (replace(s, layout=layout), who, None)
            for s in shapes
            for layout, who in WHO
            if layout != "v"
            or who != "headwise-hopper"
            or (s.decode and s.kv == "bf16")  # the rest is the portable kernel's there too
        ]
    for shape, backend, config in cases:
        if config is not None:
            TABLE["hopper"]["decode", 512, True] = TABLE["ampere"]["decode", 512, True] = Row(config, config)
        row = asdict(shape) | {"backend": backend, "config": config and asdict(config)}
        try:
            row |= timed(shape, backend, device)
        except (RuntimeError, ValueError) as error:  # wrong, or more shared memory than the card has: said, and the next
            row |= {"us": None, "failed": f"{type(error).__name__}: {error}"}
        rows.append(row)
        what = f"{'decode' if shape.decode else 'prefill':<8}{shape.length:>7} {shape.kv:<5}{shape.layout:<10}{backend:<16}"
        print(
            what,
            row["failed"] if row["us"] is None else f"{row['us']:>9.1f} us  error {row['error']:.1e}",
            config or "",
            flush=True,
        )
        torch.cuda.empty_cache()
    found = about.card() | {"rows": rows}
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
