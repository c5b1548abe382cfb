"""How fast are routed experts on this card, and which launch is the fastest?

    PYTHONPATH=. python benchmarks/experts.py OUT.json [SECONDS]
    PYTHONPATH=. python benchmarks/experts.py OUT.json arranged|fp8|fp8-sweep

Gemma 4 26B-A4B's shape (128 experts of width 704, hidden size 2816, eight a token), bf16 and q4_k with q5_0: every candidate is
first compared with fp64 (few tokens) or with a product per expert in fp32 (many), then timed as a CUDA graph over several layers'
weights in rotation, so that the second-level cache is cold. Experts are chosen at random; bytes and operations are of those chosen.
What is not begun after SECONDS (110) is left out.

With "arranged": q4_k and q5_0 over arranged rows of 1 to 1,024 tokens, and expanded.

With "fp8": e4m3 under both forms of scales beside bf16, of that shape and of Qwen3-30B-A3B's, by the launches that `run` takes; of
many tokens also expanded to bf16 first. Each is held to a product per expert in fp32 over the same values before it is timed; a
wrong one ends the run. With "fp8-sweep" other launches are timed as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import about
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from headwise.bench.engine import random_blocks
from headwise.kernels import experts as X
from headwise.kernels import fp8_rows
from headwise.kernels import router as R
from headwise.kernels import skinny as S
from headwise.kernels.arrange import ArrangedPairs, arrange_pairs
from headwise.kernels.expand import expand
from headwise.kernels.matvec import quantise
from headwise.kernels.tiled import Planes
from headwise.model.experts import ALONE_ROWS, TILES
from headwise.planner.workspace import arranged_values, most_tiles, order_values
from headwise.weights.blocks import dequantise, expand_fp8, to_fp8
from headwise.weights.retile import empty, retile

E, D, W, K = 128, 2816, 704, 8
GATE = X.Gate("gelu_tanh")
LAYERS = 3  # in rotation
dtype = torch.bfloat16
ALONE = [(4, 1024, 4), (2, 1024, 4), (4, 1024, 8), (8, 1024, 8), (2, 1024, 2), (4, 512, 2), (2, 2048, 4), (8, 1024, 4)]
INTEGERS = [(32, 1, 4), (64, 2, 4), (16, 1, 4), (64, 1, 4), (16, 1, 2), (32, 2, 2), (8, 1, 1), (8, 1, 2), (16, 1, 1)]
ARRANGED = [*S.OF_EXPERTS.values(), S.Config(64, 2, registers=255)]
PAIR_TOKENS = (1, 4, 8, 16, 32, 64, 96, 128, 160, 200, 256, 384, 512, 768, 1024, 1536)
# pairs of a tile: rows, values of K, warps and stages of a launch, gated and not
GROUPED = {
    16: [((32, 128, 4, 3), (64, 128, 4, 3)), ((64, 64, 4, 4), (64, 64, 4, 5)), ((32, 64, 4, 5), (128, 64, 4, 4))],
    64: [((64, 64, 4, 3), (128, 64, 4, 3)), ((128, 64, 4, 2), (256, 64, 4, 2)), ((128, 64, 8, 3), (256, 64, 8, 3))],
    128: [((128, 64, 8, 4), (256, 64, 8, 4)), ((128, 64, 8, 3), (256, 64, 8, 3)), ((64, 64, 4, 3), (128, 64, 4, 3))],
}
TOKENS = {
    1: (16,),
    2: (16,),
    4: (16,),
    16: (16,),
    64: (16,),
    128: (16, 64),
    512: (64, 128),
    1024: (64, 128),
    2048: (128,),
    4096: (128,),
}


def launch(c: tuple[int, int, int, int], pairs: int) -> X.Launch:
    return X.Launch(c[0], c[1], c[2], pairs, c[3])


def room(*shape: int, kind: torch.dtype = dtype) -> Tensor:
    return (
        torch.full(shape, float("nan"), dtype=kind, device="cuda")
        if kind.is_floating_point
        else torch.zeros(shape, dtype=kind, device="cuda")
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def chosen_of(T: int) -> R.Chosen:
    ids = torch.rand(T, E, device="cuda").topk(K)[1].int()
    return R.Chosen(ids.contiguous(), torch.rand(T, K, device="cuda"))


def plain(x: Tensor, chosen: R.Chosen, both: Tensor, down: Tensor) -> Tensor:
    """A product per expert, in fp32."""
    out = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
    for e in range(E):
        token, slot = (chosen.ids_TK == e).nonzero(as_tuple=True)
        if token.numel():
            g, u = (x[token].float() @ both[e].float().t()).chunk(2, -1)
            y = (torch.nn.functional.gelu(g, approximate="tanh") * u) @ down[e].float().t()
            out.index_add_(0, token, y * chosen.weights_TK[token, slot, None])
    return out


def microseconds(calls: Sequence[Callable[[], object]], rounds: int = 5) -> float:
    """Of one call: a graph of all of them, replayed; the median."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


class Stack:
    """Weights of one layer, and what the kernels write."""

    def __init__(self) -> None:
        self.both = torch.randn(E, 2 * W, D, device="cuda", dtype=dtype) * D**-0.5
        self.down = torch.randn(E, D, W, device="cuda", dtype=dtype) * W**-0.5


def planes_of(name: str, rows: int, columns: int) -> tuple[Planes, Tensor]:
    planes = empty(name, (E, rows, columns), "cuda")
    dense = torch.empty(E, rows, columns, device="cuda", dtype=dtype)
    for e in range(E):
        blocks = random_blocks(name, rows, columns, torch.device("cuda"))
        retile(blocks, name, planes.matrix(e))
        dense[e] = dequantise(blocks, name, torch.float32).to(dtype)
    return planes, dense


def warm(job: tuple[str, Any, int]) -> None:
    """Compiles one launch into triton's cache: few experts, the same programs."""
    what, c, n = job
    try:
        one(what, c, n)
    except Exception as failure:
        print(what, c, n, type(failure).__name__, str(failure)[:150], flush=True)


def one(what: str, c: Any, n: int) -> None:
    few = 2
    both, down = torch.zeros(few, 2 * W, D, device="cuda", dtype=dtype), torch.zeros(few, D, W, device="cuda", dtype=dtype)
    T = 32 if what == "grouped" else 1
    x, ids = torch.zeros(T, D, device="cuda", dtype=dtype), torch.zeros(T, K, device="cuda", dtype=torch.int32)
    gated, y = room(T * K, W), room(T * K, D)
    if what == "alone":
        X.pairs(x, ids, (both[:, :W], both[:, W:]), gated, GATE, launch=X.Launch(*c))
        X.pairs(gated, ids, (down,), y, launch=X.Launch(*c))
    elif what == "grouped":
        order = R.order(ids, few, n, torch.zeros(order_values(T, few, K), dtype=torch.int32, device="cuda"))
        X.grouped(x, order, (both[:, :W], both[:, W:]), gated, K, GATE, launch=launch(c[0], n))
        X.grouped(gated, order, (down,), y, K, launch=launch(c[1], n))
    else:
        words = torch.zeros(X.pair_words(T * K, D), dtype=torch.int32, device="cuda")
        first, second = empty("q4_k", (few, 2 * W, D), "cuda"), empty("q5_0", (few, D, W), "cuda")
        both_P = room(T * K, 2 * W)
        X.integer_pairs(quantise(x, words, planes=X.PLANES).words, ids, first, both_P, config=c)
        X.integer_pairs(X.gate_integers(both_P, ids, GATE, words), ids, second, y, config=c)


SHAPES = {"26b-a4b": (D, W), "qwen3-30b-a3b": (2048, 768)}  # 128 experts, eight a token, both
FORMS = ("bf16", "row", "block")  # of experts: floats, e4m3 with a scale a row, or for each 128 of it
FP8_TOKENS = (1, 2, 4, 16, 64, 128, 512, 1024, 4096)
EXPANDED_TOKENS = 512  # and more
# of e4m3, gated and not: rows, values of K and warps of one token's launch; rows, values of K, warps and stages by pairs of a tile
FP8_ALONE = [
    ((a, 1024, w), (b, k, w)) for a, b, k, w in ((2, 4, 512, 2), (4, 4, 1024, 4), (8, 8, 1024, 4), (2, 2, 1024, 1), (8, 16, 256, 4))
]
FP8_GROUPED = {
    16: [((64, 128, 4, 3), (64, 64, 4, 6)), ((64, 64, 4, 6), (128, 128, 4, 3)), ((128, 64, 4, 4), (128, 64, 4, 5))],
    64: [((64, 128, 4, 3), (64, 128, 4, 3)), ((64, 64, 4, 4), (128, 64, 4, 4)), ((128, 64, 8, 4), (128, 64, 8, 4))],
    128: [((128, 64, 8, 3), (128, 64, 8, 4)), ((64, 64, 8, 4), (128, 128, 8, 2)), ((64, 128, 8, 2), (256, 64, 8, 3))],
}


Calls = tuple[Callable[[], object], Callable[[], object]]


class Kept(NamedTuple):
    """Experts of one layer: gate and up as one, down, and the scales of those in e4m3."""

    both: Tensor
    down: Tensor
    scales: tuple[Tensor, ...]
    of_down: tuple[Tensor, ...]

    def calls(self, x: Tensor, chosen: R.Chosen, order: R.Order | None, gated: Tensor, y: Tensor, launches: Any) -> Calls:
        """Gate and up, and down: by pairs without an order, else by tiles."""
        width, (a, b) = self.down.shape[2], launches
        halves = ((v[:, :width], v[:, width:]) for v in (self.both, *self.scales))
        stacks, scales = next(halves), next(halves, ())
        if order is None:
            return (
                partial(X.pairs, x, chosen.ids_TK, stacks, gated, GATE, scales=scales, launch=a),
                partial(X.pairs, gated, chosen.ids_TK, (self.down,), y, scales=self.of_down, launch=b),
            )
        return (
            partial(X.grouped, x, order, stacks, gated, K, GATE, scales=scales, launch=a),
            partial(X.grouped, gated, order, (self.down,), y, K, scales=self.of_down, launch=b),
        )


def kept(form: str, hidden: int, width: int, n: int) -> Kept:
    def stack(rows: int, columns: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        w = torch.randn(n, rows, columns, device="cuda", dtype=dtype) * columns**-0.5
        if form == "bf16":
            return w, ()
        parts = [to_fp8(matrix) for matrix in w]
        data, scales = (torch.stack(p) for p in zip(*parts, strict=True))
        return data, (scales if form == "row" else scales * (torch.rand(n, rows, -(-columns // 128), device="cuda") + 0.5),)

    (both, scales), (down, of_down) = stack(2 * width, hidden), stack(hidden, width)
    return Kept(both, down, scales, of_down)


def values(w: Tensor, scales: tuple[Tensor, ...]) -> Tensor:
    """In fp32."""
    return torch.stack([expand_fp8(a, s) for a, s in zip(w, scales[0], strict=True)]) if scales else w.float()


def tile_of(T: int) -> int:
    """Pairs of a tile of `model.experts`; 0: each pair by itself."""
    return 0 if T <= ALONE_ROWS else next((rows for most, rows in TILES if most >= T * K // E), 128)


def launches_of(tile: int, form: str, sweep: bool) -> list[Any]:
    """(None, None): what the kernels take by themselves."""
    other: list[Any] = [(None, None)]
    if sweep and form != "bf16":
        if not tile:
            other += [(X.Launch(*a), X.Launch(*b)) for a, b in FP8_ALONE]
        else:
            other += [(launch(a, tile), launch(b, tile)) for a, b in FP8_GROUPED[tile]]
    return other


def room_for(T: int, hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(T, hidden, device="cuda", dtype=dtype), room(T * K, width), room(T * K, hidden)


def sorted_by_expert(chosen: R.Chosen, n: int, tile: int) -> R.Order | None:
    ints = torch.zeros(order_values(chosen.ids_TK.shape[0], n, K), dtype=torch.int32, device="cuda")
    return R.order(chosen.ids_TK, n, tile, ints) if tile else None


def warm_fp8(job: tuple[str, int, int, int, Any]) -> None:
    """As `warm`."""
    form, hidden, width, T, launches = job
    try:
        w, (x, gated, y) = kept(form, hidden, width, 2), room_for(T, hidden, width)
        chosen = R.Chosen(torch.zeros(T, K, device="cuda", dtype=torch.int32), torch.zeros(T, K, device="cuda"))
        for call in w.calls(x, chosen, sorted_by_expert(chosen, 2, tile_of(T)), gated, y, launches):
            call()
    except Exception as failure:
        print(job, type(failure).__name__, str(failure)[:150], flush=True)


def save(out: str, rows: list[dict[str, Any]]) -> None:
    Path(out).write_text(json.dumps(about.card() | {"rows": rows}, indent=1))


def reporter(rows: list[dict[str, Any]]) -> Callable[..., None]:
    def report(what: str, T: int, how: str, us: float, wrong: float, **more: float) -> None:
        rows.append({"what": what, "tokens": T, "how": how, "us": us, "error": wrong} | more)
        rates = "  ".join(f"{k} {v:.2f}" for k, v in more.items())
        print(f"{what:<22} T {T:<5} {how:<44} {us:>9.1f} us  error {wrong:.1e}  {rates}", flush=True)

    return report


def fp8(out: str, sweep: bool) -> None:
    began = time.perf_counter()
    tokens = {tile_of(T): T for T in FP8_TOKENS}.values()  # one of each kind of launch
    jobs = [(f, d, w, T, c) for f in FORMS for d, w in SHAPES.values() for T in tokens for c in launches_of(tile_of(T), f, sweep)]
    with ProcessPoolExecutor(10, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm_fp8, jobs))
    print(f"compiled {len(jobs)} in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for shape, (hidden, width) in SHAPES.items():
        for form in FORMS:
            torch.manual_seed(0)
            layers = [kept(form, hidden, width, E) for _ in range(LAYERS)]
            dense = [values(layers[0].both, layers[0].scales), values(layers[0].down, layers[0].of_down)]
            for T in FP8_TOKENS:
                rows += timed(shape, form, T, layers, dense, sweep)
                save(out, rows)
    print(f"{time.perf_counter() - began:.0f} s")


def timed(shape: str, form: str, T: int, layers: list[Kept], dense: list[Tensor], sweep: bool) -> list[dict[str, Any]]:
    """Of one number of tokens: each launch, compared and then timed; a wrong one ends the run."""
    (hidden, width), tile = SHAPES[shape], tile_of(T)
    (x, gated, y), chosens = room_for(T, hidden, width), [chosen_of(T) for _ in layers]
    orders = [sorted_by_expert(c, E, tile) for c in chosens]
    want = plain(x, chosens[0], *dense)
    used = statistics.mean(int(c.ids_TK.unique().numel()) for c in chosens)
    rows: list[dict[str, Any]] = []

    def take(how: str, calls: Sequence[Calls]) -> None:
        y.fill_(float("nan"))
        for call in calls[0]:
            call()
        wrong = error(X.combine(y, chosens[0], room(T, hidden)), want)
        if not wrong < X.TOLERANCE[dtype]:
            raise RuntimeError(f"{shape}, {form}, {T} tokens, {how}: relative error {wrong:.1e}; nothing is timed")
        for i, (name, n) in enumerate((("gate and up", 2 * width * hidden), ("down", width * hidden))):
            us = microseconds([c[i] for c in calls] * (1 if T > 1000 else 6))
            n_bytes = (T * K if not tile else used) * n * (2 if form == "bf16" else 1)
            rows.append({
                "shape": shape, "form": form, "tokens": T, "tile": tile, "what": name, "how": how, "us": us, "error": wrong,
                "tb_s": n_bytes / us / 1e6, "tflops": 2 * T * K * n / us / 1e6,
            })  # fmt: skip
            print(f"{shape:<14}{form:<6} T {T:<5} tile {tile:<4}{name:<12}{how:<62}{us:>9.1f} us  error {wrong:.1e}  "
                  f"{rows[-1]['tb_s']:.2f} TB/s {rows[-1]['tflops']:.0f} TFLOP/s", flush=True)  # fmt: skip

    for launches in launches_of(tile, form, sweep):
        how = "" if launches[0] is None else " and ".join(str(tuple(c)) for c in launches)
        try:
            take(how, [w.calls(x, c, o, gated, y, launches) for w, c, o in zip(layers, chosens, orders, strict=True)])
        except OutOfResources as failure:
            print(shape, form, T, how, failure, flush=True)
    if form != "bf16" and T >= EXPANDED_TOKENS:
        both, down = (torch.empty_like(v, dtype=dtype) for v in (layers[0].both, layers[0].down))
        floats = Kept(both, down, (), ())

        def expanded(w: Tensor, scales: Tensor, into: Tensor, product: Callable[[], object]) -> None:
            fp8_rows.expand(w.flatten(0, 1), scales.flatten(0, 1), into.flatten(0, 1))
            product()

        calls = [floats.calls(x, c, o, gated, y, (None, None)) for c, o in zip(chosens, orders, strict=True)]
        take("expanded", [
            (partial(expanded, w.both, w.scales[0], both, a), partial(expanded, w.down, w.of_down[0], down, b))
            for w, (a, b) in zip(layers, calls, strict=True)
        ])  # fmt: skip
    return rows


def warm_arranged(job: tuple[S.Config, int]) -> None:
    """As `warm`."""
    c, n = job
    try:
        ids = torch.zeros(4, K, device="cuda", dtype=torch.int32)
        order, values = sorted_by_expert(R.Chosen(ids, room(4, K)), 2, n), room(2**21)
        assert order is not None
        for name, rows, columns, by_pair in (("q4_k", 2 * W, D, False), ("q5_0", D, W, True)):
            rows_of = ArrangedPairs(values, (4 * K, columns), order)
            S.skinny_experts(rows_of, empty(name, (2, rows, columns), "cuda"), room(4 * K, rows), by_pair=by_pair, config=c)
    except Exception as failure:
        print(job, type(failure).__name__, str(failure)[:150], flush=True)


def arranged(out: str) -> None:
    """Quantised experts: the products over arranged rows by tiles and launches; all four launches; and with experts expanded."""
    began = time.perf_counter()
    with ProcessPoolExecutor(10, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm_arranged, [(c, n) for n in S.OF_EXPERTS for c in ARRANGED]))
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    stacks = [(planes_of("q4_k", 2 * W, D), planes_of("q5_0", D, W)) for _ in range(LAYERS)]
    expanded = room(E * 2 * W, D), room(E * D, W)
    for T in PAIR_TOKENS:
        arranged_tokens(T, stacks, expanded, reporter(rows))
        save(out, rows)


def arranged_tokens(T: int, stacks: Sequence[Any], expanded: tuple[Tensor, Tensor], report: Callable[..., None]) -> None:
    x, chosens = torch.randn(T, D, device="cuda", dtype=dtype), [chosen_of(T) for _ in stacks]
    both, gated, y, into = room(T * K, 2 * W), room(T * K, W), room(T * K, D), room(T, D)
    used = statistics.mean(int(k.ids_TK.unique().numel()) for k in chosens)
    want = plain(x, chosens[0], stacks[0][0][1], stacks[0][1][1])

    def take(what: str, how: str, steps: list[list[Callable[[], object]]], *, apart: bool = True) -> None:
        y.fill_(float("nan"))
        for call in steps[0]:
            call()
        wrong = error(X.combine(y, chosens[0], into), want)
        if not wrong < X.TOLERANCE[dtype]:
            raise RuntimeError(f"{what}, {T} tokens, {how}: relative error {wrong:.1e}; nothing is timed")
        sizes = {"gate and up": 2 * W * D * 4.5 / 8, "down": W * D * 5.5 / 8}
        for i, (name, size) in enumerate(sizes.items()) if apart else ():
            us = microseconds([s[1 + 2 * i] for s in steps] * 4)
            report(f"{what}, {name}", T, how, us, wrong, tb_s=used * size / us / 1e6)
        us = microseconds([call for s in steps for call in s] * 4) * len(steps[0])
        report(f"{what} all", T, how, us, wrong, tb_s=used * sum(sizes.values()) / us / 1e6)

    for n in (tile for tile in S.OF_EXPERTS if tile <= max(8, 4 * T * K // E)):
        orders = [sorted_by_expert(k, E, n) for k in chosens]
        rooms = [room(most_tiles(T * K, E, n) * arranged_values(n, width)) for width in (D, W)]
        for c in ARRANGED:
            steps = []
            for s, o in zip(stacks, orders, strict=True):
                assert o is not None
                first, second = arrange_pairs(x, o, E, rooms[0]), ArrangedPairs(rooms[1], (T * K, W), o)
                steps.append([
                    partial(arrange_pairs, x, o, E, rooms[0]),
                    partial(S.skinny_experts, first, s[0][0], both, by_pair=False, config=c),
                    partial(arrange_pairs, both, o, E, rooms[1], GATE),
                    partial(S.skinny_experts, second, s[1][0], y, by_pair=True, config=c),
                ])  # fmt: skip
            try:
                take("arranged", f"{n} pairs, {c.rows} x {c.warps}, {c.registers}", steps)
            except OutOfResources as failure:
                print(T, n, c, failure, flush=True)
    if T >= 64:
        tile = tile_of(T)
        orders = [sorted_by_expert(k, E, tile) for k in chosens]
        halves, deep = expanded[0].view(E, 2 * W, D), expanded[1].view(E, D, W)
        steps = [
            [
                partial(expand, s[0][0].tall(), 0, E * 2 * W, expanded[0]),
                partial(X.grouped, x, o, (halves[:, :W], halves[:, W:]), gated, K, GATE),
                partial(expand, s[1][0].tall(), 0, E * D, expanded[1]),
                partial(X.grouped, gated, o, (deep,), y, K),
            ]
            for s, o in zip(stacks, orders, strict=True)
        ]
        take("expanded", f"{tile} pairs", steps, apart=False)


def main(out: str, seconds: float) -> None:
    began = time.perf_counter()
    jobs = [("alone", c, 0) for c in ALONE] + [("integers", c, 0) for c in INTEGERS]
    jobs += [("grouped", c, n) for n, cs in GROUPED.items() for c in cs]
    with ProcessPoolExecutor(10, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, jobs))
    print(f"compiled {len(jobs)} in {time.perf_counter() - began:.0f} s", flush=True)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    report = reporter(rows)
    layers = [Stack() for _ in range(LAYERS)]
    router, norm, scale = torch.randn(E, D, device="cuda"), torch.rand(D, device="cuda") + 0.5, torch.rand(E, device="cuda") + 0.5
    choice = R.Choice(False, None, scale, norm, 1e-6, D**-0.5)
    done = torch.zeros(R.FEW, dtype=torch.int32, device="cuda")
    for T in (1, 4, 16, 512, 4096):
        x, chosen = torch.randn(T, D, device="cuda", dtype=dtype), chosen_of(T)
        scores = room(T, E, kind=torch.float32)
        R.route(x, router, chosen, choice, scores_TE=scores, done=done)
        want = R.reference(x, router, K, choice)
        wrong = float((chosen.ids_TK != want.ids_TK).float().mean()) + error(chosen.weights_TK, want.weights_TK)
        us = microseconds([partial(R.route, x, router, chosen, choice, scores_TE=scores, done=done)] * 20)
        report("router", T, "", us, wrong)
        ints = torch.zeros(order_values(T, E, K), dtype=torch.int32, device="cuda")
        report("order", T, "", microseconds([partial(R.order, chosen.ids_TK, E, 64 if T > 100 else 16, ints)] * 20), 0.0)
        y, into = room(T * K, D).normal_(), room(T, D)
        beside = (x, norm, norm)
        report("combine", T, "beside", microseconds([partial(X.combine, y, chosen, into, beside=beside, eps=1e-6)] * 20), 0.0)

    def timed_pairs(T: int, c: tuple[int, int, int]) -> None:
        x, chosens = torch.randn(T, D, device="cuda", dtype=dtype), [chosen_of(T) for _ in layers]
        gated, y, into = room(T * K, W), room(T * K, D), room(T, D)
        first = [
            partial(X.pairs, x, k.ids_TK, (s.both[:, :W], s.both[:, W:]), gated, GATE, launch=X.Launch(*c))
            for s, k in zip(layers, chosens, strict=True)
        ]
        second = [
            partial(X.pairs, gated, k.ids_TK, (s.down,), y, launch=X.Launch(*c)) for s, k in zip(layers, chosens, strict=True)
        ]
        first[0]()
        second[0]()
        wrong = error(X.combine(y, chosens[0], into), plain(x, chosens[0], layers[0].both, layers[0].down))
        for name, calls, size in (("gate and up", first, 4 * W * D), ("down", second, 2 * W * D)):
            us = microseconds(calls * 6)
            report(f"pairs, {name}", T, str(c), us, wrong, tb_s=T * K * size / us / 1e6)

    for c in ALONE:
        timed_pairs(1, c)
    for c in ALONE[:2]:
        timed_pairs(4, c)
        timed_pairs(16, c)

    def timed_grouped(T: int, n: int, c: Any) -> None:
        x, chosens = torch.randn(T, D, device="cuda", dtype=dtype), [chosen_of(T) for _ in layers]
        orders = [R.order(k.ids_TK, E, n, torch.zeros(order_values(T, E, K), dtype=torch.int32, device="cuda")) for k in chosens]
        gated, y, into = room(T * K, W), room(T * K, D), room(T, D)
        a, b = launch(c[0], n), launch(c[1], n)
        first = [
            partial(X.grouped, x, o, (s.both[:, :W], s.both[:, W:]), gated, K, GATE, launch=a)
            for s, o in zip(layers, orders, strict=True)
        ]
        second = [partial(X.grouped, gated, o, (s.down,), y, K, launch=b) for s, o in zip(layers, orders, strict=True)]
        first[0]()
        second[0]()
        wrong = error(X.combine(y, chosens[0], into), plain(x, chosens[0], layers[0].both, layers[0].down))
        used = statistics.mean(int(k.ids_TK.unique().numel()) for k in chosens)
        for name, calls, size, how in (("gate and up", first, 4 * W * D, c[0]), ("down", second, 2 * W * D, c[1])):
            us = microseconds(calls * (1 if T > 1000 else 3))
            report(f"grouped {n}, {name}", T, str(how), us, wrong, tflops=T * K * size / us / 1e6, tb_s=used * size / us / 1e6)

    for T, tiles in TOKENS.items():
        for n in tiles:
            for c in GROUPED[n]:
                if time.perf_counter() - began > seconds:
                    break
                try:
                    timed_grouped(T, n, c)
                except Exception as failure:
                    print(T, n, c, type(failure).__name__, str(failure)[:150], flush=True)
    del layers[:]
    stacks = [(planes_of("q4_k", 2 * W, D), planes_of("q5_0", D, W)) for _ in range(LAYERS)]
    for T, configs in (
        (1, INTEGERS),
        (2, INTEGERS[:4]),
        (4, INTEGERS[:2]),
        (16, INTEGERS[:2]),
        (64, INTEGERS[1:2]),
        (192, INTEGERS[1:2]),
    ):
        x, chosens = torch.randn(T, D, device="cuda", dtype=dtype), [chosen_of(T) for _ in stacks]
        orders = [
            R.order(k.ids_TK, E, 16, torch.zeros(order_values(T, E, K), dtype=torch.int32, device="cuda")).pairs_P for k in chosens
        ]
        words = torch.zeros(max(X.pair_words(T * K, W), X.pair_words(T, D)), dtype=torch.int32, device="cuda")
        more = torch.zeros_like(words)
        both, y, into = room(T * K, 2 * W), room(T * K, D), room(T, D)
        integers = quantise(x, words, planes=X.PLANES).words
        for c in configs:
            for listed in (False, True) if T > 1 else (False,):
                first = [
                    partial(X.integer_pairs, integers, k.ids_TK, s[0][0], both, order=o if listed else None, config=c)
                    for s, k, o in zip(stacks, chosens, orders, strict=True)
                ]
                first[0]()
                gated = X.gate_integers(both, chosens[0].ids_TK, GATE, more)
                second = [
                    partial(X.integer_pairs, gated, k.ids_TK, s[1][0], y, order=o if listed else None, config=c)
                    for s, k, o in zip(stacks, chosens, orders, strict=True)
                ]
                second[0]()
                wrong = error(X.combine(y, chosens[0], into), plain(x, chosens[0], stacks[0][0][1], stacks[0][1][1]))
                for name, calls, size in (("gate and up", first, 2 * W * D * 4.5 / 8), ("down", second, W * D * 5.5 / 8)):
                    us = microseconds(calls * 6)
                    report(f"integers, {name}", T, f"{c}{' sorted' if listed else ''}", us, wrong, tb_s=T * K * size / us / 1e6)
        report("quantise", T, "", microseconds([partial(quantise, x, words, planes=X.PLANES)] * 20), 0.0)
        report("gate_integers", T, "", microseconds([partial(X.gate_integers, both, chosens[0].ids_TK, GATE, more)] * 20), 0.0)
    for n in (16, 64):
        tile = room(n * 2 * W * D)
        whole = stacks[0][0][0].tall()
        us = microseconds([partial(expand, whole, 0, n * 2 * W, tile.view(-1, D))] * 4)
        report(f"expand {n} experts", 0, "q4_k", us, 0.0, tb_s=n * 2 * W * D * (2 + 4.5 / 8) / us / 1e6)
    save(out, rows)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    if sys.argv[2:] == ["arranged"]:
        arranged(sys.argv[1])
    elif sys.argv[2:] in (["fp8"], ["fp8-sweep"]):
        fp8(sys.argv[1], sys.argv[2] == "fp8-sweep")
    else:
        main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 110.0)
