"""Rows of quantised matrices as floats against the gguf package's values, bit for bit, in triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.quant_cases import BLOCK
from programs import program

TYPES = tuple(BLOCK)
DTYPES = ("f32", "bf16", "f16")
ROWS: list[dict[str, Any]] = [  # of blocks of 256; blocks of 32 add one
    {"N": 21, "K": 768, "range": [3, 21]},
    {"N": 13, "K": 256, "range": [9, 12], "stack": 3},
    {"N": 16, "K": 512, "range": [0, 16]},
    {"N": 19, "K": 2304, "ids": [18, 7, 7]},
    {"N": 9, "K": 256, "ids": [8, 1], "stack": 2},
    {"N": 9, "K": 512, "ids": [9, -1, 0]},
]


def cases() -> list[dict[str, Any]]:
    out = []
    for i, name in enumerate(TYPES):
        for k, case in enumerate(ROWS):
            K = case["K"] + (32 if BLOCK[name] == 32 and k % 2 else 0)
            out.append({"stack": 0} | case | {"rows": name, "K": K, "dtype": DTYPES[(i + k) % 3]})
    return out


CASES = cases()


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return program("kernels.quant_cases", interpret=True, given=CASES)


@pytest.mark.parametrize(
    "i", range(len(CASES)), ids=lambda i: f"{CASES[i]['rows']}-{CASES[i]['dtype']}-{'ids' if 'ids' in CASES[i] else 'range'}-{i}"
)
def test_rows_are_the_file_s_values_rounded_once(i: int, results: list[dict[str, Any]]) -> None:
    """A row of the next eight, a field of the next group, a row written beside `out`, a value rounded twice."""
    case, r = CASES[i], results[i]
    N, ids = case["N"], case.get("ids") or range(*case["range"])

    assert r["differ"] == 0, (case, r)
    assert r["values"] == sum(0 <= row < N for row in ids) * case["K"]
    assert r["nan"] == sum(not 0 <= row < N for row in ids) * case["K"]  # an id that is no row must not read another's memory
    assert r["beside"] == 0


def test_nothing_is_asked_for_and_nothing_launched() -> None:
    """A grid of no programs is an error of the driver."""
    from headwise.kernels.expand import expand, gather
    from headwise.weights.retile import empty

    w = empty("q4_k", (8, 256), "cpu")
    expand(w, 3, 3, torch.empty(0, 256))
    gather(w, torch.empty(0, dtype=torch.int64), torch.empty(0, 256))


def wrong(name: str) -> tuple[str, dict[str, Any], str]:
    from headwise.weights.retile import empty

    stack, one = empty("q4_k", (2, 9, 256), "cpu"), torch.zeros(1, dtype=torch.int64)
    return {
        "stop": ("expand", {"start": 1, "stop": 10, "out": torch.zeros(9, 256)}, "rows 1 to 10 of a matrix of 9"),
        "start": ("expand", {"start": -1}, "rows -1 to 1 of a matrix of 9"),
        "order": ("expand", {"start": 2}, "rows 2 to 1 of a matrix of 9"),
        "rows": ("expand", {"out": torch.zeros(2, 256)}, "1 rows of 256 into (2, 256)"),
        "K": ("gather", {"ids": one, "out": torch.zeros(1, 128)}, "1 rows of 256 into (1, 128)"),
        "stride": ("gather", {"ids": one, "out": torch.zeros(1, 512)[:, ::2]}, "strides (512, 2), not (1, 256), contiguous"),
        "dtype": ("expand", {"out": torch.zeros(1, 256, dtype=torch.float64)}, "torch.float64 on cpu, not one of torch.float32"),
        "ids": ("gather", {"ids": one.int()}, "ids torch.int32 (1,)"),
        "shape": ("gather", {"ids": one[None]}, "ids torch.int64 (1, 1)"),
        "stack": ("expand", {"planes": stack}, "planes of (2, 2, 1024)"),
        "device": ("gather", {"ids": one.to("meta")}, "on meta, not torch.int64 (T,), contiguous, on cpu"),
    }[name]


@pytest.mark.parametrize("name", ["stop", "start", "order", "rows", "K", "stride", "dtype", "ids", "shape", "stack", "device"])
def test_misuse_is_refused_before_launch_with_both_numbers(name: str) -> None:
    from headwise.kernels import expand as module
    from headwise.weights.retile import empty

    op, changes, message = wrong(name)
    given: dict[str, Any] = {"planes": empty("q4_k", (9, 256), "cpu"), "out": torch.zeros(1, 256)}
    given |= ({"start": 0, "stop": 1} if op == "expand" else {}) | changes
    with pytest.raises(ValueError, match=op) as caught:
        getattr(module, op)(**given)
    assert message in str(caught.value)


def test_a_matrix_is_no_stack() -> None:
    """Of a matrix, index 0 would be its first eight rows."""
    from headwise.weights.retile import empty

    with pytest.raises(IndexError, match="9 by 256"):
        empty("q4_k", (9, 256), "cpu").matrix(0)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_expand")


def test_no_launch_spills_or_wants_more_shared_memory_than_its_card_has(compiled: list[dict[str, Any]]) -> None:
    assert {r["type"] for r in compiled} == set(TYPES)
    assert {r["card"] for r in compiled} == {80, 86, 89, 90}
    assert not [r for r in compiled if r["spill_bytes"] or r["shared_bytes"] > r["shared_limit"]]


def test_words_are_read_and_values_written_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """A change of layout would move them one by one, at a fraction of the speed, with the same result."""
    assert not [r for r in compiled if not (r["wide_loads"] and r["wide_stores"])]


def test_values_stay_with_the_thread_that_unpacks_them(compiled: list[dict[str, Any]]) -> None:
    """A change of layout between the words and the store would send every value through shared memory."""
    assert not [r for r in compiled if r["shared_bytes"] and r["dtype"] != "torch.float32"]
