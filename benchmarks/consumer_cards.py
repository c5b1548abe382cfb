"""The portable kernel as consumer cards run it, on one H200, beside PyTorch's memory-efficient operator there.

    python benchmarks/consumer_cards.py [--card sm89] [OUT.json]

Tiles are those of cards with 99 KB of shared memory (sm86, sm89, sm120), and code is generated for that card: `mma.sync` and
`cp.async`, no wgmma, no TMA, fp8 made by integers below sm89. Triton assembles it for the card that is here. Each launch is held to
the formula in fp64 before it is timed, and what was compiled to those limits; `attention_check.py --card sm86` runs every
combination. The operator takes a tensor each for K and V, in bf16 whatever our cache is in, every query head its own keys, and a
window as a mask; making these is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import headwise.bench.attention as bench
import headwise.kernels.attend as portable
import headwise.kernels.attend_mma as crossed
from headwise.bench.attention import BYTES, CHECKED, ERROR, SHAPES, Ours, Shape, cache_bytes, formula, in_turn, recorded, relative

SHARED = 99 * 1024
LENGTH = 8192
NARROW = tuple(
    Shape(name=f"gpt-oss {kind}", head_dim=64, heads=64, kv_heads=8, length=LENGTH, window=window)
    for kind, window in (("sliding", 128), ("full", None))
)


def as_card(card: str) -> None:
    """Everything that this process launches from now on is a consumer card's."""
    os.environ["TRITON_OVERRIDE_ARCH"] = card
    portable.device_arch = lambda device: "ampere"


def shapes() -> list[Shape]:
    """Each layer of the table, and gpt-oss's without their sinks, at one length: prefill and decode over each store."""
    layers = {s.name: replace(s, length=LENGTH) for s in SHAPES if not s.decode and s.kv == "bf16"}
    found = [replace(s, decode=decode) for s in (*layers.values(), *NARROW) for decode in (False, True)]
    return [*found, *(replace(s, kv=kv) for s in found for kv in BYTES)]


def compiled() -> int:
    """Kernels compiled so far; most of their shared memory in bytes.

    Raises:
        RuntimeError: one is not a consumer card's.
    """
    most = 0
    launched: tuple[Any, ...] = (portable._attend, crossed._attend)
    for kernels, *_ in chain.from_iterable(kernel.device_caches.values() for kernel in launched):
        for k in kernels.values():
            if k.metadata.shared > SHARED or "wgmma" in k.asm["ptx"] or "mma.sync" not in k.asm["ptx"]:
                raise RuntimeError(f"{k.metadata.shared:,} bytes of shared memory, or other products than mma.sync")
            most = max(most, k.metadata.shared)
    return most


def efficient(ours: Ours) -> Callable[[int], Tensor]:
    shape, q = ours.shape, ours.q[..., : ours.shape.head_dim].transpose(0, 1)[None]
    seen = shape.window if shape.decode and shape.window else shape.length
    group = shape.heads // shape.kv_heads
    held = [
        [x[-seen:, :, : shape.head_dim].transpose(0, 1)[None].repeat_interleave(group, 1) for x in ours.held(i)]
        for i in range(len(ours.caches))
    ]
    mask = None
    if shape.window and not shape.decode:
        at = torch.arange(shape.length, device=q.device)
        out = (at[None] > at[:, None]) | (at[None] <= at[:, None] - shape.window)
        mask = torch.zeros(out.shape, device=q.device, dtype=q.dtype).masked_fill_(out, float("-inf"))

    def run(i: int) -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            k, v = held[i]
            causal = mask is None and not shape.decode
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=ours.layer.scale)
        return out[0].transpose(0, 1)

    return run


def measure(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Medians in microseconds, once both gave the formula's answer.

    Raises:
        RuntimeError: ours did not.
    """
    n_caches = max(3, -(-(2**27) // cache_bytes(shape))) if shape.decode else 1
    ours = Ours(shape, device, n_caches, "headwise-triton")
    n = min(CHECKED, ours.q.shape[0])
    q, (k, v) = ours.q[-n:], ours.held()
    error = relative(ours()[-n:], formula(q, k, v, shape, ours.layer.scale))
    if not error < ERROR:
        raise RuntimeError(f"wrong at {shape}: relative error {error:.1e}")
    theirs = efficient(ours)
    want = formula(q[..., : shape.head_dim], k[..., : shape.head_dim], v, shape, ours.layer.scale)
    if not relative(theirs(0)[-n:], want) < ERROR:
        raise RuntimeError(f"PyTorch's operator is wrong at {shape}")
    calls: dict[str, Callable[[], Any]] = {"us": partial(ours, 0), "efficient_us": partial(theirs, 0)}
    many = dict.fromkeys(calls, 1)
    if shape.decode:
        for name, call in (("us", ours), ("efficient_us", theirs)):
            calls[name], many[name] = recorded(call, n_caches)
    return {"error": error} | {name: statistics.median(us) / many[name] for name, us in in_turn(calls, 5).items()}


def main(card: str, out: Path | None) -> None:
    as_card(card)
    bench.SOAK_MS = 40.0  # ratios of several, not rates of the card
    result: dict[str, Any] = about.card() | {"card": card, "rows": []}
    for shape in shapes():
        row = asdict(shape) | measure(shape, torch.device("cuda"))
        result["rows"].append(row)
        what = f"{'decode' if shape.decode else 'prefill':<8}{shape.name:<22}{shape.head_dim:>4} {shape.kv:<5}"
        theirs = f"memory-efficient over bf16 {row['efficient_us']:>9.1f} us"
        print(f"{what}{row['us']:>9.1f} us, {theirs}, error {row['error']:.1e}", flush=True)
        result["shared_bytes"] = compiled()
        if out:
            out.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--card", choices=("sm86", "sm89"), default="sm86")
    parser.add_argument("out", nargs="?", type=Path)
    args = parser.parse_args()
    main(args.card, args.out)
