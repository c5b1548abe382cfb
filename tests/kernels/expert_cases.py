"""Routed experts against fp64. A program of its own: it must start with TRITON_INTERPRET=1, or on a GPU.

python -m kernels.expert_cases [cpu|cuda]     prints a JSON object: case -> relative error, or a count of wrong integers
"""

from __future__ import annotations

import json
import sys

import torch
from kernels.fp8_cases import matrix
from kernels.quant_cases import random_blocks, values
from torch import Tensor

from headwise.kernels import experts as X
from headwise.kernels import router as R
from headwise.kernels.fp8 import dequantised
from headwise.planner.workspace import order_values
from headwise.weights.retile import empty, retile

ROUTERS = [  # name, T, D, E, K, over all, bias, scale, normed
    ("softmax first", 1, 96, 7, 3, True, False, False, False),
    ("of the chosen", 3, 100, 32, 4, False, True, False, False),
    ("gemma", 2, 300, 128, 8, False, False, True, True),
    ("gemma, many", 65, 130, 33, 8, False, False, True, True),
    ("softmax first, many", 17, 96, 7, 3, True, True, False, False),
]
ORDERS = [(1, 7, 3, 16), (5, 128, 8, 16), (150, 7, 3, 64), (70, 33, 8, 16), (40, 3, 2, 64)]  # T, E, K, rows of a tile
PRODUCTS = [  # T, D, W, E, K, activation, bias, who is chosen
    (1, 96, 48, 7, 3, "gelu_tanh", False, "any"),
    (3, 100, 36, 5, 2, "swiglu_clamped", True, "any"),
    (20, 72, 40, 6, 2, "silu", False, "any"),
    (67, 40, 20, 5, 1, "silu", True, "one"),  # all tokens on one expert, more than a tile; none on the others
    (11, 36, 24, 130, 3, "gelu_tanh", False, "any"),  # more experts than tokens
]
IN_FP8 = [  # scales of gate and up, a row or of each 128 of one, and of down; then as PRODUCTS
    ("row", "row", 1, 96, 48, 7, 3, "gelu_tanh", False, "any"),
    ("block", "block", 2, 300, 136, 4, 2, "swiglu_clamped", True, "any"),
    ("row", "block", 9, 72, 145, 6, 2, "silu", False, "any"),
    ("block", "row", 17, 257, 20, 5, 1, "silu", True, "one"),
]
QUANTISED = [  # type of gate and up, of down, T, D, W, E, K, activation, bias, sorted
    ("q4_k", "q5_0", 1, 256, 32, 5, 2, "gelu_tanh", False, False),
    ("q6_k", "q8_0", 2, 256, 32, 4, 1, "silu", False, True),
    ("mxfp4", "mxfp4", 2, 96, 64, 5, 2, "swiglu_clamped", True, True),
    ("q5_k", "q4_0", 1, 256, 64, 3, 1, "silu", False, False),
]


def relative(got: Tensor, want: Tensor) -> float:
    if not torch.isfinite(got.float()).all():
        return float("inf")
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def chosen_room(T: int, K: int, device: str) -> R.Chosen:
    return R.Chosen(torch.full((T, K), -1, dtype=torch.int32, device=device), torch.full((T, K), float("nan"), device=device))


def router_case(case: tuple[object, ...], device: str, dtype: torch.dtype) -> dict[str, float]:
    _, T, D, E, K, over_all, biased, scaled, normed = case
    assert isinstance(T, int) and isinstance(D, int) and isinstance(E, int) and isinstance(K, int)
    x, w = torch.randn(T, D, device=device).to(dtype), torch.randn(E, D, device=device) * D**-0.5
    w[E // 2] = w[1]  # a tie of every token
    choice = R.Choice(
        bool(over_all),
        torch.randn(E, device=device).index_fill_(0, torch.tensor([1, E // 2], device=device), 3.0) if biased else None,
        torch.rand(E, device=device) + 0.5 if scaled else None,
        torch.rand(D, device=device) + 0.5 if normed else None, 1e-6, D**-0.5 * 20 if normed else 1.0,
    )  # fmt: skip
    scores, done = torch.full((T, E), float("nan"), device=device), torch.zeros(16, dtype=torch.int32, device=device)
    got = R.route(x, w, chosen_room(T, K, device), choice, scores_TE=scores, done=done)
    want = R.reference(x, w, K, choice)
    return {"ids": float((got.ids_TK != want.ids_TK).sum()), "weights": relative(got.weights_TK, want.weights_TK),
            "done": float(done.abs().sum())}  # fmt: skip


def order_case(case: tuple[int, ...], device: str) -> dict[str, float]:
    T, E, K, rows = case
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int().to(device)
    if T == 40:
        ids[:, 0], ids[:, 1] = 2, 0  # none for expert 1
    got = R.order(ids, E, rows, torch.full((order_values(T, E, K),), -9, dtype=torch.int32, device=device))
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=E)
    tiles = -(-counts // rows)
    experts = torch.repeat_interleave(torch.arange(E, device=device), tiles)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    wanted = (flat.sort(stable=True)[1], torch.cat((zero, counts.cumsum(0))), torch.cat((zero, tiles.cumsum(0))), experts)
    wrong = sum(int((a[: len(b)] != b).sum()) for a, b in zip(got[:4], wanted, strict=True))
    return {"wrong": float(wrong), "tiles": float(len(experts) > got.tiles(E))}


def chosen_of(T: int, E: int, K: int, who: str, device: str) -> R.Chosen:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    if who == "one":
        ids[:] = E - 2
    return R.Chosen(ids.to(device), torch.rand(T, K, device=device))


def gate_of(kind: str, bias: bool, E: int, W: int, device: str) -> X.Gate:
    if not bias:
        return X.Gate(kind)
    return X.Gate(kind, torch.randn(E, W, device=device), torch.randn(E, W, device=device))


def launches(rows: int, fp8: bool) -> tuple[X.Launch, X.Launch]:
    """Larger ones of e4m3, but no more than a block of scales."""
    return (
        (X.Launch(32, 128, 4, rows, 2), X.Launch(64, 64, 4, rows, 2))
        if fp8
        else (X.Launch(16, 32, 4, rows, 2), X.Launch(32, 32, 4, rows, 2))
    )


def stack_of(
    shape: tuple[int, int, int], form: object, device: str, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Experts, the scales of those in e4m3, another for every row or block, and the values."""
    E, rows, columns = shape
    if form is None:
        w = (torch.randn(shape, device=device) * columns**-0.5 * 2).to(dtype)
        return w, (), w
    data, scales = matrix(E * rows, columns, 1 if form == "row" else -(-columns // 128), device)
    scales *= columns**-0.5
    return data.view(shape), (scales.view(E, rows, -1),), dequantised(data, scales).view(shape)


def fp8_case(case: tuple[object, ...], device: str, dtype: torch.dtype) -> dict[str, float]:
    return product_case(case[2:], device, dtype, case[:2])


def product_case(
    case: tuple[object, ...], device: str, dtype: torch.dtype, forms: tuple[object, ...] = (None, None)
) -> dict[str, float]:
    T, D, W, E, K, kind, bias, who = case
    assert isinstance(T, int) and isinstance(D, int) and isinstance(W, int) and isinstance(E, int) and isinstance(K, int)
    x = torch.randn(T, D, device=device).to(dtype)
    both, of_both, values_WD = stack_of((E, 2 * W, D), forms[0], device, dtype)  # gate and up in one allocation
    down, of_down, values_DW = stack_of((E, D, W), forms[1], device, dtype)
    stacks, scales = ((v[:, :W], v[:, W:]) for v in (both, *of_both)) if of_both else ((both[:, :W], both[:, W:]), ())
    chosen, gate = chosen_of(T, E, K, str(who), device), gate_of(str(kind), bool(bias), E, W, device)
    down_bias = torch.randn(E, D, device=device) if bias else None
    want = X.reference(x, chosen, values_WD[:, :W], values_WD[:, W:], values_DW, gate, down_bias)
    out: dict[str, float] = {}

    def room(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    gated, y = room(T * K, W), room(T * K, D)
    X.pairs(x, chosen.ids_TK, stacks, gated, gate, scales=scales, launch=X.Launch(16, 64, 4))
    X.pairs(gated, chosen.ids_TK, (down,), y, scales=of_down, launch=X.Launch(32, 32, 4))
    out["pairs"] = relative(X.combine(y, chosen, room(T, D), down_bias), want)
    dense, a, b = torch.randn(T, D, device=device).to(dtype), torch.rand(D, device=device), torch.rand(D, device=device)

    def normed(v: Tensor, weight: Tensor) -> Tensor:
        return v.double() * torch.rsqrt(v.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()

    beside = X.combine(y, chosen, dense.clone(), down_bias, beside=(dense, a, b), eps=1e-6)
    out["beside"] = relative(beside, normed(dense, a) + normed(want, b))
    for rows in (16, 64):
        order = R.order(chosen.ids_TK, E, rows, torch.empty(order_values(T, E, K), dtype=torch.int32, device=device))
        first, second = launches(rows, bool(scales)) if device == "cpu" else (None, None)
        gated, y, half = room(T * K, W), room(T * K, D), E // 2
        for part, experts in ((slice(half), (0, half)), (slice(half, E), (half, E - half))):
            some, of_some = (tuple(v[part] for v in of) for of in (stacks, scales))
            X.grouped(x, order, some, gated, K, gate, scales=of_some, experts=experts, launch=first)
        X.grouped(gated, order, (down,), y, K, scales=of_down, launch=second)
        out[f"grouped {rows}"] = relative(X.combine(y, chosen, room(T, D), down_bias), want)
    return out


def quantised_case(case: tuple[object, ...], device: str, dtype: torch.dtype) -> dict[str, float]:
    from headwise.kernels.matvec import quantise

    first, second, T, D, W, E, K, kind, bias, ordered = case
    assert isinstance(first, str) and isinstance(second, str)
    assert isinstance(T, int) and isinstance(D, int) and isinstance(W, int) and isinstance(E, int) and isinstance(K, int)
    stacks, dense = [], []
    for i, (name, rows, columns) in enumerate(((first, 2 * W, D), (second, D, W))):
        blocks = random_blocks(name, E * rows, columns, seed=i)
        planes = empty(name, (E, rows, columns), device)
        retile(blocks.view(E, rows, -1).to(device), name, planes)
        stacks.append(planes)
        dense.append(values(blocks, name).view(E, rows, columns).to(device))
    scale = 1.0 / dense[0].std() * D**-0.5
    x = torch.randn(T, D, device=device).mul_(scale).to(dtype)
    chosen, gate = chosen_of(T, E, K, "any", device), gate_of(str(kind), bool(bias), E, W, device)
    order = R.order(chosen.ids_TK, E, 16, torch.empty(order_values(T, E, K), dtype=torch.int32, device=device))
    pairs = order.pairs_P if ordered else None
    config = (64, 1, 4)  # large ones: the interpreter pays for each program
    words = torch.empty(X.pair_words(T * K, max(D, W)), dtype=torch.int32, device=device)
    both = torch.full((T * K, 2 * W), float("nan"), device=device)
    y = torch.full((T * K, D), float("nan"), device=device)
    X.integer_pairs(quantise(x, words, planes=X.PLANES).words, chosen.ids_TK, stacks[0], both, order=pairs, config=config)
    X.integer_pairs(X.gate_integers(both, chosen.ids_TK, gate, words), chosen.ids_TK, stacks[1], y, order=pairs, config=config)
    want = X.reference(x, chosen, dense[0][:, :W], dense[0][:, W:], dense[1], gate)
    tall = stacks[1].tall()
    from headwise.kernels.expand import expand

    part = torch.empty(D + 8, W, device=device)
    expand(tall, D - 8, 2 * D, part)
    return {"sum": relative(X.combine(y, chosen, torch.empty(T, D, device=device)), want),
            "tall": relative(part, dense[1].flatten(0, 1)[D - 8 : 2 * D])}  # fmt: skip


def main(device: str) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if device == "cuda" else ()
    out: dict[str, dict[str, float]] = {}
    for name, cases, run in (
        ("router", ROUTERS, router_case),
        ("product", PRODUCTS, product_case),
        ("fp8", IN_FP8, fp8_case),
        ("quantised", QUANTISED, quantised_case),
    ):
        for i, case in enumerate(cases):
            for dtype in dtypes or ((torch.float32, torch.float16)[i % 2],):  # the interpreter is slow
                out[f"{name} {i} {str(dtype).removeprefix('torch.')}"] = run(case, device, dtype)
    for i, case in enumerate(ORDERS):
        out[f"order {i}"] = order_case(case, device)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1] if len(sys.argv) > 1 else "cpu")))
