"""How fast is a product with quantised weights on this card, and which launch is the fastest?

    PYTHONPATH=. python benchmarks/quant_matmul.py OUT.json [SECONDS | expand]

For each type and shape, and 1 to 16 rows of activations, as integers of two planes or one and for the matrix unit: every
candidate launch is compared with the fp64 product of the dequantised values, then timed as a CUDA graph over copies of the
weights in rotation, so that the second-level cache is cold; what makes the integers is timed beside it, not within.
Beside them PyTorch's product with bf16 weights of the same shape. The ceiling is reading two gibibytes, measured in the same run.
Programs are compiled by several processes first; what is not done after SECONDS (170) is left out, and listed as such.
Before that, or alone with "expand": rows as floats, bit for bit those of the blocks, and the product of many rows by way of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise.kernels.expand import expand, gather
from headwise.kernels.matvec import (
    INTEGER_ROWS,
    INTEGER_TOLERANCE,
    TOLERANCE,
    Config,
    Integers,
    config_for,
    integer_words,
    matvec,
    quantise,
    reference,
    step_groups,
)
from headwise.kernels.split import partial_floats
from headwise.kernels.tiled import LAYOUTS, Planes
from headwise.weights.blocks import dequantise, row_bytes
from headwise.weights.retile import empty, retile

COLD_BYTES = 256 << 20  # of copies in rotation; an H200's second-level cache holds 60 MB
DOWN, UP, OUT, QKV, HEAD = (5376, 21504), (43008, 5376), (5376, 8192), (16384, 5376), (262144, 5376)  # N, K of Gemma 4 31B
SMALL = (2816, 2112)  # K of the shared expert of 26B-A4B
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "q4_k": (DOWN, UP, QKV, OUT),
    "q6_k": (DOWN, HEAD),
    "q8_0": (DOWN, SMALL),
    "q5_k": (DOWN,),
    "q5_0": (DOWN,),
    "q4_0": (DOWN, SMALL),
    "mxfp4": ((5760, 2880),),
}
TOKENS = (1, 2, 4, 8, 16)
HALF_AT = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "mxfp4": ()}  # f16 fields of a block; the others': 0
dtype = torch.bfloat16


def candidates(type_name: str, T: int, shape: tuple[int, int]) -> Iterator[tuple[int, Config]]:
    """Launches, and planes of integers before them; 0 for the matrix unit. Those that leave a program without work are left out."""
    N, K = shape
    thorough = type_name == "q4_k" and shape in (DOWN, UP)
    tiles = [(64, 2, 4), (32, 2, 4), (32, 1, 4), (64, 1, 2)]  # rows, each, warps
    if thorough and T == 1:
        tiles += [
            (8, 1, 1),
            (8, 1, 4),
            (16, 1, 4),
            (16, 2, 4),
            (32, 1, 8),
            (128, 1, 4),
            (128, 2, 4),
            (64, 2, 2),
            (128, 4, 4),
            (32, 4, 2),
        ]
    elif T > 1:
        tiles = tiles[: 2 + thorough] + [(128, 4, 4)] * thorough
    if T <= INTEGER_ROWS:
        steps = K // 32 // step_groups(type_name, K, T)
        for rows, each, warps in tiles:
            turns, programs = -(-steps // (32 * warps * each // rows)), -(-N // rows)
            for n in dict.fromkeys(-(-turns // turn) for turn in (1, 2, 3, 4, 6, 7, 8, 11, 16, 21, 32, 64)):
                if 132 <= programs * n <= 10000 and n <= 32:
                    for planes in (2, 1) if T == 1 or thorough else (2,):
                        yield planes, Config(rows, each, warps, n)
    if T > 2:
        launches = [(64, 8, 4, 1), (32, 8, 1, 1), (64, 8, 4, 3), (32, 8, 2, 3)]
        for rows, step, warps, stages in launches if T > INTEGER_ROWS else launches[:2]:
            for splits in (1, 2, 4, 8):
                if 132 <= -(-N // rows) * splits <= 4096 and K // 32 // splits >= 4 * step:
                    yield 0, Config(rows, 1, warps, splits, units=step, stages=stages, matrix=True)


def default(type_name: str, T: int, shape: tuple[int, int]) -> tuple[int, Config]:
    config = config_for(type_name, T, *shape, 132)
    return 0 if config.matrix else 2, config


def random_blocks(type_name: str, shape: tuple[int, int]) -> Tensor:
    """Random bytes under sensible scales."""
    N, K = shape
    block_bytes = row_bytes(type_name, LAYOUTS[type_name].block)
    blocks = torch.randint(0, 256, (N, K // LAYOUTS[type_name].block, block_bytes), dtype=torch.uint8, device="cuda")
    for at in HALF_AT.get(type_name, (0,)):
        d = torch.rand(*blocks.shape[:2], 1, device="cuda") * 1e-3 + 1e-4
        blocks[..., at : at + 2] = d.half().view(torch.uint8)
    if type_name == "mxfp4":
        blocks[..., 0] = torch.randint(115, 125, blocks.shape[:2], device="cuda")
    return blocks.view(N, -1)


def planes_of(blocks: Tensor, type_name: str, shape: tuple[int, int]) -> Planes:
    """A file's blocks re-tiled, some rows at a time: what is expanded on the way is several times the blocks."""
    w = empty(type_name, shape, "cuda")
    for start in range(0, shape[0], 4096):
        stop = min(start + 4096, shape[0])
        retile(blocks[start:stop], type_name, w.part(start, stop))
    return w


def in_rotation(w: Planes, n_bytes: int) -> list[Planes]:
    """Copies of a matrix, so many that each is out of the cache when its turn comes again."""
    copies = max(1, COLD_BYTES // n_bytes)
    return [w, *(w._replace(low=w.low.clone(), high=None if w.high is None else w.high.clone(), head=w.head.clone())
                 for _ in range(copies))]  # fmt: skip


def compile_all(jobs: list[tuple[str, int, int, Config, int]]) -> None:
    """Compiles launches into triton's cache on disk: small matrices of the same programs."""
    for type_name, T, planes, config, K in jobs:
        w = empty(type_name, (64, K), "cuda")
        x, out = torch.zeros(T, K, device="cuda", dtype=dtype), torch.empty(T, 64, device="cuda", dtype=dtype)
        scratch, done = torch.empty(T * 64 * 32, device="cuda"), torch.zeros(64, dtype=torch.int32, device="cuda")
        try:
            matvec(given(x, planes), w, out, scratch=scratch, done=done, config=config)
        except Exception as error:  # the table says so when its turn comes
            print(type_name, T, config, type(error).__name__, str(error)[:200], flush=True)


def given(x: Tensor, planes: int) -> Tensor | Integers:
    if not planes:
        return x
    return quantise(x, torch.empty(integer_words(x.shape[0], x.shape[1], planes), dtype=torch.int32, device="cuda"), planes=planes)


def graph_us(calls: list[Callable[[], object]], rounds: int = 9) -> list[float]:
    """Microseconds a call, sorted: all calls as one graph, replayed."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    repeats = max(1, 8 // len(calls))
    graph.replay()
    out = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            graph.replay()
        stop.record()
        stop.synchronize()
        out.append(1e3 * start.elapsed_time(stop) / repeats / len(calls))
    return sorted(out)


def read_tb_s() -> float:
    big = torch.empty(2**28, dtype=torch.int64, device="cuda").random_()
    return 2**31 / statistics.median(graph_us([lambda: big.sum()] * 2)) / 1e6


def expected(x: Tensor, blocks: Tensor, type_name: str) -> Tensor:
    """The product in fp64, a few thousand rows of the matrix at a time."""
    return torch.cat([reference(x, dequantise(part, type_name, torch.float32)) for part in blocks.split(4096)], dim=1)


def measure(type_name: str, shape: tuple[int, int], ceiling: float, deadline: float) -> Iterator[dict[str, Any]]:
    N, K = shape
    blocks = random_blocks(type_name, shape)
    copies = in_rotation(planes_of(blocks, type_name, shape), blocks.numel())
    dense = torch.randn(N, K, device="cuda", dtype=dtype) if N * K < 2**28 else None
    denses = [dense.clone() for _ in range(max(1, COLD_BYTES // dense.nbytes))] if dense is not None else []
    scratch, done = torch.empty(partial_floats(16, N, 32), device="cuda"), torch.zeros(N, dtype=torch.int32, device="cuda")
    for T in TOKENS:
        x = torch.randn(T, K, device="cuda", dtype=dtype)
        out = torch.empty(T, N, device="cuda", dtype=dtype)
        rows, left_out, torch_us, want = [], 0, None, expected(x, blocks, type_name)
        if denses:
            torch_us = statistics.median(graph_us([partial(torch.mm, x, d.t(), out=out) for d in denses]))
        chosen = default(type_name, T, shape)
        inputs: dict[int, Tensor | Integers] = {planes: given(x, planes) for planes in (0, 1, 2)}
        quantise_us = {}
        for planes in (1, 2):
            room = torch.empty(integer_words(T, K, planes), dtype=torch.int32, device="cuda")
            quantise_us[planes] = statistics.median(graph_us([partial(quantise, x, room, planes=planes)] * 20))
        for planes, config in dict.fromkeys([chosen, *candidates(type_name, T, shape)]):
            if time.monotonic() > deadline:
                left_out += 1
                continue
            try:
                out.fill_(float("nan"))
                done.zero_()
                matvec(inputs[planes], copies[0], out, scratch=scratch, done=done, config=config)
                error = float((out - want).norm() / want.norm())
                limit = TOLERANCE[dtype] + INTEGER_TOLERANCE.get(planes, 0.0)
                if not error < limit or int(done.abs().sum()):
                    rows.append({"planes": planes, "config": config._asdict(), "error": error, "wrong": True})
                    continue
                calls: list[Callable[[], object]] = [
                    partial(matvec, inputs[planes], w, out, scratch=scratch, done=done, config=config) for w in copies
                ]
                us = graph_us(calls)
            except Exception as failed:
                rows.append(
                    {"planes": planes, "config": config._asdict(), "failed": f"{type(failed).__name__}: {str(failed)[:200]}"}
                )
                continue
            mid = statistics.median(us)
            rows.append({
                "planes": planes, "config": config._asdict(), "error": error, "us": mid, "low_us": us[0], "high_us": us[-1],
                "tb_s": blocks.numel() / mid / 1e6, "fraction": blocks.numel() / mid / 1e6 / ceiling,
                "chosen": (planes, config) == chosen,
            })  # fmt: skip
        timed = sorted((r for r in rows if "us" in r), key=lambda r: r["us"])
        bad = [r for r in rows if "us" not in r]
        title = f"{type_name} {N}x{K} T={T}"
        print(f"{title}: torch bf16 {torch_us or 0:.1f} us; {len(rows)} launches, {len(bad)} refused, {left_out} left out")
        print(f"  quantise: 1 plane {quantise_us[1]:.1f} us, 2 planes {quantise_us[2]:.1f} us")
        best = [r for planes in (2, 1, 0) for r in [r for r in timed if r["planes"] == planes][:3]]
        for r in [*best, *(r for r in timed if r["chosen"] and r not in best)]:
            c = Config(**r["config"])
            how = f"units {c.units} stages {c.stages}" if c.matrix else f"each {c.each}"
            print(f"  {r['us']:7.1f} us {r['tb_s']:.2f} TB/s {100 * r['fraction']:3.0f} %  error {r['error']:.1e}  "
                  f"{('matrix', '1 plane', '2 planes')[r['planes']]} rows {c.rows} {how} warps {c.warps} splits {c.splits}"
                  + (" (chosen)" if r["chosen"] else ""))  # fmt: skip
        for r in bad[:2]:
            print("  ", r)
        sys.stdout.flush()
        yield {"type": type_name, "N": N, "K": K, "T": T, "torch_us": torch_us, "quantise_us": quantise_us,
               "left_out": left_out, "launches": timed + bad}  # fmt: skip


def expansions(type_name: str, ceiling: float) -> dict[str, Any]:
    """Rows of a matrix as bf16: bytes read and written, as a fraction of the ceiling; and products of many rows, a tile at a time:
    one of 16M values, the same rounded down to 128 rows, 32M, 64M, all.

    A tile is the same buffer each time, as in use: what is written of 2M values may stay in the second-level cache.
    """
    N, K = DOWN
    blocks = random_blocks(type_name, DOWN)
    w, want = planes_of(blocks, type_name, DOWN), torch.empty(N, K, device="cuda")
    for start in range(0, N, 512):
        dequantise(blocks[start : start + 512], type_name, torch.float32, out=want[start : start + 512])
    copies = in_rotation(w, blocks.numel())
    ids = torch.randperm(N, device="cuda")
    for kind in (torch.float32, torch.float16, dtype):
        all_rows = torch.empty(N, K, device="cuda", dtype=kind)
        for start, stop in ((0, N), (3, 1002), (N - 5, N)):
            if not torch.equal(expand(w, start, stop, all_rows[: stop - start]), want[start:stop].to(kind)):
                raise SystemExit(f"{type_name}: rows {start} to {stop} as {kind} are wrong")
        if not torch.equal(gather(w, ids, all_rows), want[ids].to(kind)):
            raise SystemExit(f"{type_name}: listed rows as {kind} are wrong")
    dense, out = want.to(dtype), {"type": type_name}
    del want

    def note(name: str, values: int, calls: list[Callable[[], object]]) -> None:
        us = statistics.median(graph_us(calls))
        moved = values * 2 + values * blocks.numel() // (N * K)
        out[name] = {"us": us, "tb_s": moved / us / 1e6, "fraction": moved / us / 1e6 / ceiling}

    few = 2**21 // K
    note("matrix", N * K, [partial(expand, c, 0, N, all_rows) for c in copies])
    note("2M", few * K, [partial(expand, c, i, i + few, all_rows[:few]) for c in copies for i in range(1, N - few, 7 * few)])
    for T in (1, 512):
        note(f"listed {T}", T * K, [partial(gather, c, ids[i * T : i * T + T], all_rows[:T]) for c in copies for i in range(8)])
    for T in (512, 4096):
        x, y = torch.randn(T, K, device="cuda", dtype=dtype), torch.empty(T, N, device="cuda", dtype=dtype)
        us = {"torch": statistics.median(graph_us([partial(torch.mm, x, dense.t(), out=y)] * 2))}
        for rows in (2**24 // K, *(2**bits // K // 128 * 128 for bits in (24, 25, 26)), N):
            calls: list[Callable[[], object]] = []
            for start in range(0, N, rows):
                stop = min(start + rows, N)
                part = all_rows[: stop - start]
                calls += [partial(expand, w, start, stop, part), partial(torch.mm, x, part.t(), out=y[:, start:stop])]
            us[f"tiles of {rows} rows"] = statistics.median(graph_us(calls)) * len(calls)
        out[f"product {T}"] = us
    print(type_name, ", ".join(f"{k} {v['us']:.1f} us {v['tb_s']:.2f} TB/s {100 * v['fraction']:.0f} %"
                               for k, v in out.items() if "fraction" in v))  # fmt: skip
    for T in (512, 4096):
        print(f"  T={T}:", ", ".join(f"{k} {v:.0f} us" for k, v in out[f"product {T}"].items()), flush=True)
    return out


def main() -> None:
    begin = time.monotonic()
    alone = sys.argv[2:] == ["expand"]
    deadline = begin + (float(sys.argv[2]) if len(sys.argv) > 2 and not alone else 170)
    jobs = {}
    for type_name, shapes in () if alone else SHAPES.items():
        for shape in shapes:
            for T in TOKENS:
                for planes, c in [default(type_name, T, shape), *candidates(type_name, T, shape)]:
                    K = 21504 if shape[1] % 256 == 0 else shape[1]
                    key = (type_name, max(T, 8) if c.matrix else T, planes, c._replace(splits=min(c.splits, 2)), K)
                    jobs[key] = None
    listed, n = list(jobs), max(1, min(14, (os.cpu_count() or 2) - 1))
    if listed:
        with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_all, [listed[i::n] for i in range(n)]))
        print(f"{len(listed)} programs compiled in {time.monotonic() - begin:.0f} s by {n} processes", flush=True)
    ceiling = read_tb_s()
    print(f"read ceiling {ceiling:.2f} TB/s", flush=True)
    results = []
    torch.manual_seed(0)
    expanded = [expansions(type_name, ceiling) for type_name in LAYOUTS]
    for type_name, shapes in () if alone else SHAPES.items():
        for shape in shapes:
            results += measure(type_name, shape, ceiling, deadline)
            torch.cuda.empty_cache()
    out = about.card("triton") | {
        "python": platform.python_version(), "read_tb_s": ceiling, "seconds": time.monotonic() - begin, "expanded": expanded,
        "results": results,
    }  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(out, indent=1))
    best = []
    for r in results:
        if r["launches"] and "us" in r["launches"][0]:
            first = r["launches"][0]
            best.append([r["type"], r["N"], r["K"], r["T"], first["planes"], round(first["us"], 1), round(first["fraction"], 2),
                         first["config"]])  # fmt: skip
    print(json.dumps({k: v for k, v in out.items() if k not in ("expanded", "results")} | {"best": best}))


if __name__ == "__main__":
    main()
