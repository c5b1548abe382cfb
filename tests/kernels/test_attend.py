"""The attention kernel against fp64, in triton's interpreter: pairs of everything it claims, on shapes that break masks.

bf16 is left to the GPU: the interpreter of triton 3.6 multiplies it wrongly (facts of triton, not of the kernel).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.cases import Case
from programs import program

BOUND = {"f32": 1e-5, "f16": 2e-3}
CHOICES: dict[str, list[object]] = {
    "D": [64, 128, 256, 512],
    "heads": [(1, 1), (2, 1), (6, 2), (5, 1), (7, 1), (16, 1), (8, 4)],
    "shape": [  # keys and queries of each sequence
        ((1,), (1,)),
        ((37,), (37,)),
        ((70, 33), (1, 1)),
        ((41, 1, 23), (20, 1, 5)),
        ((50, 17), (3, 0)),
        ((66,), (8,)),
    ],
    "tail": [0, 16, 32],
    "pairs": [0, 5, 16],  # that the kernel rotates, of V alone
    "window": [None, 1, 16, 17, 40],
    "layout": ["flat", "ring", "pages"],
    "kv": ["f32", "f16", "fp8", "q8_0", "q4_0"],
    "splits": [1, 2, 5],
    "softcap": [None, 4.0],
    "sinks": [False, True],
    "scale": [None, 1.0],
    "rows": [16, 32],
    "pack": [1, 2, 16],
}


def allowed(c: dict[str, object]) -> bool:
    """Combinations that exist: a ring has a window, one tensor is a global layer's, blocks of 32 fill its tail, drafts are few."""
    queries = c["shape"][1]  # type: ignore[index]
    return not (
        (c["layout"] == "ring" and c["window"] is None)
        or (c["tail"] and c["window"] is not None)
        or (c["tail"] == 16 and c["kv"] in ("q8_0", "q4_0"))
        or (c["pairs"] and c["tail"] != 32)
        or (c["sinks"] and c["scale"] and c["shape"][0] == (1,))  # type: ignore[index]  # one key far below the sink: f16 underflows
        or (c["splits"] != 1 and (max(queries) > 8 or c["pack"] != 16))
    )


def pairwise(seed: int = 3) -> list[dict[str, object]]:
    """Cases in which every allowed pair of choices occurs: greedy, from random candidates."""
    rng = random.Random(seed)
    names = list(CHOICES)

    def pairs(c: dict[str, object]) -> set[tuple[object, ...]]:
        return {(a, repr(c[a]), b, repr(c[b])) for a, b in itertools.combinations(names, 2)}

    def candidate() -> dict[str, object]:
        while True:
            c = {n: rng.choice(v) for n, v in CHOICES.items()}
            if allowed(c):
                return c

    reachable = set().union(*(pairs(candidate()) for _ in range(20000)))
    out: list[dict[str, object]] = []
    while reachable:
        best = max((candidate() for _ in range(60)), key=lambda c: len(pairs(c) & reachable))
        if pairs(best) & reachable:
            out.append(best)
            reachable -= pairs(best)
    return out


def case_of(c: dict[str, object], seed: int) -> Case:
    keys, queries = c["shape"]  # type: ignore[misc]
    H, G = c["heads"]  # type: ignore[misc]
    names = ("D", "tail", "pairs", "window", "layout", "kv", "splits", "softcap", "sinks", "scale", "rows", "pack")
    rest = {n: c[n] for n in names}
    dtype = "f32" if c["kv"] == "f32" else "f16"
    return Case(H=H, G=G, keys=keys, queries=queries, dtype=dtype, seed=seed, **rest)  # type: ignore[arg-type]


GEMMA = Case(D=512, H=8, G=1, keys=(130, 61), queries=(1, 3), tail=128, pairs=64, tile=32, splits=3, layout="pages")
FAR = Case(D=64, H=2, G=1, keys=(262_143,), queries=(5,), tail=64, pairs=32, window=90, kv="f32", dtype="f32")
MANY = replace(GEMMA, queries=(70, 33), splits=1, rows=32)
ALONE = [*(replace(GEMMA, kv=kv) for kv in ("f16", "fp8", "q8_0", "q4_0")), MANY, FAR]
PAIRS = [case_of(c, i) for i, c in enumerate(pairwise())]
EDGE = Case(D=64, H=4, G=2, keys=(90,), queries=(7,), kv="f32", dtype="f32", window=33)
EDGES = [
    replace(EDGE, keys=(n,), queries=(t,), layout=layout)
    for n in (7, 32, 33, 34, 90)
    for t in (1, 7)
    for layout in ("flat", "ring")
]


@pytest.fixture(scope="module")
def results() -> dict[Case, dict[str, float | bool]]:
    cases = [*PAIRS, *EDGES, *ALONE]
    return dict(zip(cases, program("kernels.cases", interpret=True, given=map(asdict, cases)), strict=True))


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: f"{c.seed}")
def test_every_pair_of_claims_gives_the_formula(case: Case, results: dict[Case, dict[str, float | bool]]) -> None:
    got = results[case]
    assert got["finite"], case
    assert got["error"] < BOUND[case.dtype], (case, got)
    assert max(case.queries) * case.H * case.D < 256 or got["correlation"] > 0.9999, (case, got)


@pytest.mark.parametrize("case", EDGES, ids=lambda c: f"{c.keys[0]}-{c.queries[0]}-{c.layout}")
def test_the_windows_edge_and_the_rings_wrap(case: Case, results: dict[Case, dict[str, float | bool]]) -> None:
    """One key too many or too few at W - 1, W, W + 1, and a ring that has wrapped."""
    assert results[case]["error"] < 1e-5, (case, results[case])


@pytest.mark.parametrize("case", ALONE, ids=lambda c: f"{c.kv}-{c.queries[0]}-{c.keys[0]}")
def test_keys_of_v_alone_are_rotated_as_queries_are(case: Case, results: dict[Case, dict[str, float | bool]]) -> None:
    """The published shape in every store, and the last positions of 2^18, where an angle's rounding is largest."""
    assert results[case]["error"] < BOUND[case.dtype], (case, results[case])


def call(attend: Callable[..., object] | None = None, **changes: object) -> None:
    """A call that is refused before it is launched: no interpreter needed."""
    from headwise.kernels import attend as portable
    from headwise.kernels.stored import Sequences, Slots, Stored

    def ints(*x: int) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32)

    a: dict[str, object] = {
        "q_NHE": torch.zeros(3, 4, 64, dtype=torch.float16),
        "k": Stored(torch.zeros(32, 2, 64, dtype=torch.float16)),
        "v": Stored(torch.zeros(32, 2, 64, dtype=torch.float16)),
        "out_NHD": torch.zeros(3, 4, 64, dtype=torch.float16),
        "seqs": Sequences(ints(0, 3), ints(9), 3, 9),
        "slots": Slots(ints(0)),
        "scale": 1.0,
    }
    (attend or portable.attend)(**(a | changes))


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


def wrong(name: str) -> tuple[dict[str, object], str]:
    from headwise.kernels.stored import Slots, Stored

    one = torch.tensor([0], dtype=torch.int32)
    return {
        "head_dim": ({"q_NHE": half(3, 4, 96),
                      "k": Stored(half(32, 2, 96)), "v": Stored(half(32, 2, 96)), "out_NHD": half(3, 4, 96)},
                     "head_dim 96 not in (64, 128, 256, 512)"),
        "tail": ({"q_NHE": half(3, 4, 88), "k": Stored(half(32, 2, 88)), "v": None}, "24 rotated values"),
        "heads": ({"q_NHE": half(3, 5, 64), "out_NHD": half(3, 5, 64)}, "5 query heads over 2 KV heads"),
        "window": ({"window": 0}, "a window of 0 keys"),
        "key size": ({"k": Stored(half(32, 2, 128))}, "keys of 128 values for queries of 64"),
        "two types": ({"v": Stored(torch.zeros(32, 2, 64, dtype=torch.int8), half(32, 2, 2))}, "torch.int8"),
        "query stride": ({"q_NHE": half(3, 64, 4).transpose(1, 2)}, "query strides"),
        "cache stride": ({"k": Stored(half(2, 32, 64).transpose(0, 1))}, "cache strides"),
        "table": ({"slots": Slots(one.long())}, "slot table of torch.int64"),
        "dtype": ({"q_NHE": torch.zeros(3, 4, 64, dtype=torch.float64)}, "queries in torch.float64, not one of torch.float32"),
        "scales": ({"k": Stored(torch.zeros(32, 2, 64, dtype=torch.int8), half(32, 2, 1)),
                    "v": Stored(torch.zeros(32, 2, 64, dtype=torch.int8), half(32, 2, 2))},
                   "scales (32, 2, 1) of blocks in torch.int8: (32, 2, 2)"),
        "short page table": ({"slots": Slots(torch.zeros(1, 2, dtype=torch.int32), page=4)},
                             "a page table (1, 2) with pages of 4 for sequences of up to 9 keys"),
        "page out of range": ({"slots": Slots(torch.tensor([[0, 8, 1]], dtype=torch.int32), page=4)},
                              "slot table of 0 to 8, the cache ends at page 7"),
        "slot out of range": ({"slots": Slots(one - 1)}, "slot table of -1 to -1, the cache ends at slot 31"),
        "ring": ({"slots": Slots(one, ring=40)}, "a ring of 40 in a cache of 32 slots"),
        "rows of the table": ({"slots": Slots(torch.zeros(2, dtype=torch.int32))},
                              "2 rows of the slot table and 2 starts for 1 sequences"),
        "sinks": ({"sinks_H": torch.zeros(3)}, "sinks (3,) for 4 heads"),
        "ring and pages": ({"slots": Slots(one, 16, 16)}, "a ring of 16 and pages of 16"),
        "scratch": ({"n_splits": 2, "scratch": torch.zeros(5)}, "2 splits need scratch of"),
    }[name]  # fmt: skip


MISUSE = (
    "head_dim", "tail", "heads", "window", "key size", "two types", "query stride", "cache stride", "table", "dtype", "scales",
    "short page table", "page out of range", "slot out of range", "ring", "rows of the table", "sinks", "ring and pages", "scratch",
)  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_before_launch_with_both_numbers(name: str) -> None:
    changes, message = wrong(name)
    with pytest.raises(ValueError, match="attend") as caught:
        call(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", [m for m in MISUSE if m not in ("scratch", "short page table", "page out of range", "ring and pages")]
)
def test_the_hopper_kernels_are_asked_the_same(name: str) -> None:
    """They went to the card unasked: a wrong stride read other heads' values."""
    from headwise.attention.own_kernels import launch

    changes, message = wrong(name)
    with pytest.raises(ValueError, match="attend") as caught:
        call(lambda **a: launch("headwise-hopper", **a), **changes)
    assert message in str(caught.value)


def test_the_hopper_kernels_take_pages_of_64_only() -> None:
    from headwise.attention.own_kernels import launch
    from headwise.kernels.stored import Slots

    with pytest.raises(ValueError, match="pages of 16 slots, its tiles are of 64"):
        call(lambda **a: launch("headwise-hopper", **a), slots=Slots(torch.zeros(1, 1, dtype=torch.int32), page=16))


def test_no_launch_has_tiles_that_the_compiler_gets_wrong() -> None:
    """q4_0 in tiles of 16 keys came out in another order on an H200, and the model's text was noise."""
    from headwise.kernels.configs import LEAST_BLOCK_KEYS, TABLE

    launches = [c for rows in TABLE.values() for row in rows.values() for c in (row.blocks, row.turned) if c]
    assert all(c.keys >= LEAST_BLOCK_KEYS for c in launches)


def test_wide_heads_are_prefilled_by_the_kernel_whose_warps_share_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that kernel does not take (a decode, other types, keys of V alone) it would read wrongly."""
    from headwise.kernels import attend
    from headwise.kernels.configs import CROSSED
    from headwise.kernels.stored import Stored

    monkeypatch.setattr(attend, "device_arch", lambda device: "ampere")
    monkeypatch.setattr(attend.triton, "__version__", "3.6.0")
    kinds = {"f16": (torch.float16, 1), "bf16": (torch.bfloat16, 1), "fp8": (torch.float8_e4m3fn, 1), "q8_0": (torch.int8, 1),
             "q4_0": (torch.uint8, 2)}  # fmt: skip

    def chosen(
        D: int, R: int = 0, kv: str = "f16", rows: int = 17, one: bool | None = None, cuda: bool = True,
        of: torch.dtype = torch.float16, off: int = 0,
    ) -> Any:  # fmt: skip
        q: Any = SimpleNamespace(is_cuda=cuda, shape=(9, 8, D + R), dtype=of, device="cuda")
        kind, packed = kinds[kv]
        scales = torch.empty(off + 64 * 2 * (D + R) // 32, dtype=torch.float16)[off:].view(64, 2, -1)
        k = Stored(torch.empty(64, 2, (D + R) // packed, dtype=kind), scales if kv[0] == "q" else None)
        return attend._crossed(q, k, None if (bool(R) if one is None else one) else k, D, rows)

    assert chosen(512, 128) == CROSSED["ampere", 512, 128, True]
    assert [chosen(D) for D in (64, 256, 512)] == [CROSSED["ampere", D, 0, True] for D in (64, 256, 512)]
    halves = torch.float16, torch.bfloat16
    stored = [chosen(512, R, kv, of=of) for kv in ("fp8", "q8_0", "q4_0") for R in (0, 128) for of in halves]
    assert stored == 3 * [CROSSED["ampere", 512, R, False] for R in (0, 0, 128, 128)]
    assert [chosen(D, kv="q8_0") for D in (64, 128)] == [CROSSED["ampere", D, 0, False] for D in (64, 128)]
    refused = [
        chosen(512, rows=16), chosen(512, kv="bf16"), chosen(512, kv="q8_0", of=torch.float32), chosen(512, one=True),
        chosen(512, 64), chosen(128), chosen(512, cuda=False), chosen(512, kv="q8_0", off=4),
    ]  # fmt: skip
    assert refused == [None] * 8
    monkeypatch.setattr(attend.triton, "__version__", "3.7.1")
    assert chosen(512) is None
    monkeypatch.setattr(attend.triton, "__version__", "3.6.0")
    monkeypatch.setattr(attend, "device_arch", lambda device: "hopper")
    assert chosen(512) is None  # `attend_hopper` takes it
    assert chosen(512, kv="q8_0") == CROSSED["hopper", 512, 0, False]
