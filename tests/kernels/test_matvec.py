"""Products with quantised matrices against fp64 over the gguf package's values, in triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.quant_cases import BLOCK, BLOCK_BYTES, random_blocks
from programs import program

TYPES = tuple(BLOCK)
LIMIT = {"f32": 2e-5, "f16": 1e-3}  # of the matrix unit
LIMIT_INTEGERS = {1: 1.2e-2, 2: 1e-4}  # by planes: an error of 2**-8 or 2**-16 of a group's largest, thrice the middling one
INTEGERS = [  # T (0: 3 to 8 by type), N, groups, planes, config: rows, each, warps, splits
    (1, 7, 24, 2, {"rows": 8, "each": 1, "warps": 1}),
    (2, 19, 16, 1, {"rows": 32, "each": 2, "warps": 1, "splits": 2}),
    (0, 13, 16, 2, {"rows": 16, "each": 1, "warps": 1, "splits": 2}),
    (1, 33, 24, 2, {"rows": 32, "each": 1, "warps": 2, "splits": 3}),
    (1, 35, 16, 2, {"rows": 64, "each": 4, "warps": 1, "splits": 2, "step": 4}),
    (2, 11, 16, 2, {"rows": 16, "each": 2, "warps": 1, "ahead": False}),
]
MATRIX = [
    (3, 17, 24, 2, {"rows": 16, "each": 1, "warps": 2, "units": 8, "matrix": True}),
    (8, 33, 40, 2, {"rows": 32, "each": 1, "warps": 2, "units": 16, "splits": 2, "matrix": True}),
    (16, 20, 16, 2, {"rows": 16, "each": 1, "warps": 1, "units": 4, "splits": 2, "matrix": True}),
    (1, 9, 8, 2, {"rows": 16, "each": 1, "warps": 1, "units": 8, "matrix": True}),
]


def cases() -> list[dict[str, Any]]:
    out = []
    for i, name in enumerate(TYPES):
        for k, (T, N, groups, planes, config) in enumerate((*INTEGERS, *MATRIX)):
            if k not in (0, 1, len(INTEGERS)) and (i + k) % 3:  # of most launches every third type
                continue
            K = groups * 32 + (32 if BLOCK[name] == 32 and k % 2 else 0)  # an odd number of blocks masks the last step
            out.append({"type": name, "T": T or 3 + i % 6, "N": N, "K": K, "dtype": ("f32", "f16")[(i + k) % 2],
                        "planes": planes, "config": config})  # fmt: skip
    return out


CASES = cases()


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return program("kernels.quant_cases", interpret=True, given=CASES)


@pytest.mark.parametrize(
    "i", range(len(CASES)), ids=lambda i: f"{CASES[i]['type']}-{CASES[i]['T']}x{CASES[i]['N']}x{CASES[i]['K']}"
)
def test_a_product_with_a_quantised_matrix_is_the_product_with_its_values(i: int, results: list[dict[str, Any]]) -> None:
    """A field read from the wrong place, a row or block past the end, a partial sum lost or added twice."""
    case = CASES[i]
    limit = LIMIT[case["dtype"]] if "matrix" in case["config"] else LIMIT_INTEGERS[case["planes"]]
    assert results[i]["error"] < limit, (case, results[i])


def test_a_split_launch_leaves_its_counters_at_zero(results: list[dict[str, Any]]) -> None:
    """The next launch would take a partial sum for the whole."""
    assert {r["done"] for r in results} == {0}


@pytest.mark.parametrize("name", TYPES)
def test_planes_hold_exactly_the_bytes_of_the_blocks(name: str) -> None:
    """Planned bytes are allocated bytes only if re-tiling keeps their number; rows that are no multiple of 8 are padded."""
    from headwise.kernels.tiled import plane_bytes
    from headwise.weights.retile import empty, retile

    K = 3 * 256
    stack = empty(name, (2, 13, K), "cpu")
    retile(random_blocks(name, 26, K).view(2, 13, -1), name, stack)

    assert sum(plane_bytes(name, K)) == K // BLOCK[name] * BLOCK_BYTES[name]
    assert stack.low.untyped_storage().nbytes() == 2 * 16 * K // BLOCK[name] * BLOCK_BYTES[name]
    assert stack.rows == 13


@pytest.mark.parametrize("name", TYPES)
def test_a_part_of_a_matrix_is_the_matrix_of_those_rows(name: str) -> None:
    """A loader fills a large matrix a few thousand rows at a time."""
    from headwise.weights.retile import empty, retile

    blocks, whole, parts = random_blocks(name, 21, 512), empty(name, (21, 512), "cpu"), empty(name, (21, 512), "cpu")
    retile(blocks, name, whole)
    for start, stop in ((0, 8), (8, 16), (16, 21)):
        retile(blocks[start:stop], name, parts.part(start, stop))

    assert torch.equal(whole.low, parts.low)
    assert torch.equal(whole.head, parts.head)
    assert (whole.high is None) == (parts.high is None)
    if whole.high is not None and parts.high is not None:
        assert torch.equal(whole.high, parts.high)


def test_an_activation_is_as_fine_as_its_planes() -> None:
    """Two planes that do not meet lose eight bits without a sound; and the sums must be those of the integers."""
    results: list[dict[str, Any]] = program(
        "kernels.quant_cases", interpret=True, given=[{"quantise": n, "dtype": dtype} for n in (1, 2) for dtype in ("f32", "bf16")]
    )

    for result, limit in zip(results, (1 / 127, 1 / 127, 1 / 32512, 1 / 32512), strict=True):
        assert result["error"] <= 0.51 * limit, result  # of the largest of its group
        assert result["sums"] < 1e-6, result


def wrong(name: str) -> tuple[dict[str, Any], str]:
    from headwise.kernels.matvec import Config, Integers
    from headwise.weights.retile import empty

    two = Config(16, 1, 4, 2, matrix=True)
    return {
        "rows": ({"x": torch.zeros(17, 256), "out_TN": torch.zeros(17, 8)}, "17 rows of activations not in 1 to 16"),
        "integers": ({"x": Integers(torch.zeros(9, 8, 20, dtype=torch.int32), 2), "out_TN": torch.zeros(9, 8)},
                     "9 rows of activations not in 1 to 8"),
        "K": ({"x": torch.zeros(1, 512)}, "(1, 512) by a matrix of (8, 256)"),
        "N": ({"out_TN": torch.zeros(1, 9)}, "(8, 256) into (1, 9)"),
        "stride": ({"x": torch.zeros(256, 2).t(), "out_TN": torch.zeros(2, 8)}, "strides (1, 2) and (8, 1)"),
        "dtype": ({"x": torch.zeros(1, 256, dtype=torch.float64)}, "torch.float64 not in"),
        "planes": ({"w": empty("q4_k", (8, 512), "cpu")._replace(K=256, low=torch.zeros(1, 2048, dtype=torch.uint8)[:, ::2])},
                   "planes of strides (2048, 2)"),
        "unit": ({"config": Config(16, 1, 4)}, "Tensor with a launch without the matrix unit"),
        "step": ({"x": Integers(torch.zeros(1, 8, 20, dtype=torch.int32), 2), "config": Config(16, 1, 4, step=3)},
                 "steps of 3 groups do not divide 8 groups in blocks of 8"),
        "scratch": ({"config": two, "scratch": torch.zeros(5)}, "2 splits need scratch of 16 fp32 values"),
        "done": ({"config": two, "scratch": torch.zeros(16)}, "2 splits need 1 int32 zeros, got None"),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["rows", "integers", "K", "N", "stride", "dtype", "planes", "unit", "step", "scratch", "done"])
def test_misuse_is_refused_before_launch_with_both_numbers(name: str) -> None:
    from headwise.kernels.matvec import Config, matvec
    from headwise.weights.retile import empty

    changes, message = wrong(name)
    a = {"x": torch.zeros(1, 256), "w": empty("q4_k", (8, 256), "cpu"), "out_TN": torch.zeros(1, 8),
         "config": Config(16, 1, 4, matrix=True)} | changes  # fmt: skip
    with pytest.raises(ValueError, match="matvec") as caught:
        matvec(**a)
    assert message in str(caught.value)


def test_quantise_refuses_what_it_cannot_group() -> None:
    from headwise.kernels.matvec import quantise

    room = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(1, 40\) activations, not in whole groups of 32"):
        quantise(torch.zeros(1, 40), room)
    with pytest.raises(ValueError, match=r"2 planes .* in 5 torch\.int32, not 20 int32"):
        quantise(torch.zeros(1, 32), room)
    with pytest.raises(ValueError, match=r"\(2, 64\) of strides \(1, 2\)"):
        quantise(torch.zeros(64, 2).t(), torch.zeros(80, dtype=torch.int32))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_matvec")


def test_no_launch_spills_or_wants_more_shared_memory_than_its_card_has(compiled: list[dict[str, Any]]) -> None:
    assert {r["type"] for r in compiled} == set(TYPES)
    assert not [r for r in compiled if r["spill_bytes"] >= 64 or r["shared_bytes"] > r["shared_limit"]]


def test_words_are_loaded_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """A change of layout would read them one by one, at a fraction of the speed, with the same result."""
    assert not [r for r in compiled if not r["wide"]]


def test_four_fields_are_multiplied_at_once(compiled: list[dict[str, Any]]) -> None:
    """The interpreter's own multiplication, a byte at a time, must not be what a card runs."""
    few = [r for r in compiled if r["T"] <= 8]
    assert few
    assert not [r for r in few if not r["dots"]]
