"""How fast is a product with weights in e4m3 on this card?

    PYTHONPATH=. python benchmarks/fp8_matmul.py OUT.json [sweep]

For shapes of Gemma 4 31B and 1 to 4,096 rows of activations in bf16: what `model.linear` runs, with a scale a row and with one for
each 128 values; beside it PyTorch's product with bf16 weights, and e4m3 expanded first. Every candidate is held to the fp64 product
of the same values before it is timed: within `kernels.fp8.TOLERANCE`, or, where activations become e4m3 too, within what that
rounding costs. Times are CUDA graphs over copies of the weights in rotation, so that the second-level cache is cold; candidates
in turn, medians. With "sweep" other launches of the kernel for one row and of that for few are timed as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise.engine.devices import scaled_rows
from headwise.kernels import fp8, fp8_rows
from headwise.model.arena import Room
from headwise.model.linear import acted, linear
from headwise.planner.workspace import QUANT_DONE, QUANT_PARTIAL, scaled_bytes
from headwise.weights.blocks import Fp8Tensor, to_fp8

SHAPES = {"gate and up": (43008, 5376), "down": (5376, 21504), "qkv": (16384, 5376), "o": (5376, 8192)}  # N, K of Gemma 4 31B
TOKENS = (1, 4, 16, 64, 512, 4096)
CHECKED_ROWS = 512  # of the weight, in fp64
E4M3_ERROR = 4e-2  # relative, of a product with activations in e4m3: 2.5 % root mean square, and the room of a random case
COLD_BYTES = 256 << 20  # of copies in rotation; an H200's second-level cache holds 60 MB
ROUNDS = 7
BF16 = torch.bfloat16
ROWS = [
    fp8.RowConfig(*c)
    for c in ((8, 1024, 4), (4, 1024, 4), (8, 512, 4), (16, 256, 4, 2), (8, 256, 4, 2), (4, 2048, 8), (16, 512, 8), (8, 512, 4, 2),
              (4, 512, 1), (2, 512, 1, 2), (2, 1024, 1), (4, 256, 1, 2), (8, 512, 2), (4, 1024, 2))
]  # fmt: skip
FEW = [fp8.Config(rows, 4, stages, splits) for rows in (64, 128) for stages in (3, 4) for splits in (1, 2, 4, 6)]


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls as one graph, run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3


def matrix(N: int, K: int, blocks: bool) -> Fp8Tensor:
    parts = [to_fp8(torch.randn(min(4096, N - n), K, device="cuda") * K**-0.5) for n in range(0, N, 4096)]
    data, scales = (torch.cat(x) for x in zip(*parts, strict=True))
    if blocks:
        scales = scales * (torch.rand(N, -(-K // 128), device="cuda") + 0.5)
    return Fp8Tensor(data, scales)


def error(got_TN: Tensor, x_TK: Tensor, w: Fp8Tensor, gated: bool = False) -> float:
    """Relative, of some of the columns."""
    half, n = w.shape[0] // 2, min(CHECKED_ROWS, got_TN.shape[1])
    want = fp8.reference(x_TK, w.data[:n], w.scales[:n])
    if gated:
        up = fp8.reference(x_TK, w.data[half : half + n], w.scales[half : half + n])
        want = torch.nn.functional.gelu(want, approximate="tanh") * up
    return float((got_TN[:, :n].double() - want).norm() / want.norm())


def ceiling() -> float:
    """Bytes a second of a sum over two gibibytes."""
    x = torch.zeros(1 << 29, device="cuda")
    graph = captured([lambda: x.sum()])
    return x.nbytes / (min(replay_us(graph) for _ in range(5)) * 1e-6)


def measure(name: str, T: int, sweep: bool) -> list[dict[str, Any]]:
    N, K = SHAPES[name]
    x, out = torch.randn(T, K, device="cuda", dtype=BF16), torch.empty(T, N, device="cuda", dtype=BF16)
    tile = torch.empty(max(N * K, scaled_bytes(T, K) // 2 + 1), device="cuda", dtype=BF16)
    done = torch.zeros(QUANT_DONE, device="cuda", dtype=torch.int32)
    room = Room(tile, None, torch.empty(QUANT_PARTIAL, device="cuda"), done, True, 0, scaled_rows(out.device, "bf16"))
    copies = max(2, -(-COLD_BYTES // (N * K))) if T < 512 else 2
    runs: dict[str, tuple[list[Callable[[], object]], float, float]] = {}  # calls, error, bound
    for label, blocks in (("a scale a row", False), ("a scale for 128", True)):
        w = matrix(N, K, blocks)
        some = [w, *(Fp8Tensor(w.data.clone(), w.scales.clone()) for _ in range(copies - 1))]
        rounded = T > fp8.MOST_ROWS and not blocks and room.scaled_rows

        def add(who: str, calls: list[Callable[[], object]], bound: float, w: Fp8Tensor = w, gated: bool = False) -> None:
            out.fill_(float("nan"))
            calls[0]()
            found = error(out[:, : N // 2] if gated else out, x, w, gated)
            if not found < bound:
                raise RuntimeError(f"{name}, {T} rows, {who}: relative error {found:.1e} above {bound:.0e}; nothing is timed")
            runs[who] = (calls, found, bound)

        near = fp8.TOLERANCE[BF16]
        add(label, [partial(linear, x, v, out, room) for v in some], E4M3_ERROR if rounded else near)
        if T == 1 and name == "gate and up":
            gate = out[:, : N // 2]
            add(f"{label}, gated", [partial(acted, x, v, "gelu_tanh", gate, room) for v in some], 2 * near, gated=True)
        if T > fp8.MOST_ROWS and not blocks:
            apart = room._replace(scaled_rows=False)
            add(f"{label}, expanded", [partial(linear, x, v, out, apart) for v in some], near)
            q, scales = torch.empty(T, K, device="cuda", dtype=torch.float8_e4m3fn), torch.empty(T, device="cuda")
            runs["rows to e4m3"] = ([partial(fp8_rows.quantise, x, q, scales)] * copies, 0.0, 1.0)
        if T == 1 and sweep:
            for c in ROWS:
                add(f"{label}, {tuple(c)}", [partial(fp8.one_row, x, v.data, v.scales, out, config=c) for v in some], near)
        elif T <= fp8.MOST_ROWS and sweep and not blocks:
            for c in FEW:
                if c.splits == 1 or T * N * c.splits <= QUANT_PARTIAL:
                    more = {"scratch": room.partial, "done": room.done, "config": c}
                    add(f"{label}, {tuple(c)}", [partial(fp8.product, x, v.data, v.scales, out, **more) for v in some], near)
        if not blocks:
            wide = [fp8_rows.expand(v.data, v.scales, torch.empty(N, K, device="cuda", dtype=BF16)) for v in some]
            add("bf16 cuBLAS", [partial(torch.mm, x, v.t(), out=out) for v in wide], near + 2**-8)
    graphs = {who: captured(calls) for who, (calls, _, _) in runs.items()}
    us: dict[str, list[float]] = {who: [] for who in graphs}
    for _ in range(ROUNDS):
        for who, graph in graphs.items():
            us[who].append(replay_us(graph) / copies)
    if done.any():
        raise RuntimeError(f"{name}, {T} rows: a counter was left standing")
    rows = []
    for who, times in us.items():
        t = statistics.median(times)
        n_bytes = N * K * (2 if who == "bf16 cuBLAS" else 1)
        rows.append({
            "shape": name, "N": N, "K": K, "T": T, "who": who, "us": t, "quantiles": statistics.quantiles(times, n=4),
            "tb_s": n_bytes / t * 1e-6, "tflop_s": 2 * T * N * K / t * 1e-6, "error": runs[who][1],
        })  # fmt: skip
        print(f"{name:<12}{T:>5} rows  {who:<34}{t:>9.1f} us  {rows[-1]['tb_s']:>5.2f} TB/s {rows[-1]['tflop_s']:>7.1f} TFLOP/s "
              f" error {runs[who][1]:.1e}", flush=True)  # fmt: skip
    return rows


def main(to: str, sweep: bool) -> None:
    torch.manual_seed(0)
    begin = time.monotonic()
    found: dict[str, Any] = about.card("triton") | {"read_tb_s": ceiling() * 1e-12, "rows": []}
    print(f"{found['gpu']}: reads {found['read_tb_s']:.2f} TB/s", flush=True)
    for name in SHAPES:
        for T in TOKENS:
            found["rows"] += measure(name, T, sweep)
            found["seconds"] = time.monotonic() - begin
            Path(to).write_text(json.dumps(found, indent=1))
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}))


if __name__ == "__main__":
    main(sys.argv[1], "sweep" in sys.argv[2:])
