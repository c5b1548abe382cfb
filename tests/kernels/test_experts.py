"""The kernels of routed experts against fp64 in triton's interpreter, and compiled for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.expert_cases import IN_FP8, ORDERS, PRODUCTS, QUANTISED, ROUTERS
from programs import program

from headwise.kernels.experts import GROUPED_FP8

LIMIT = {"float32": 2e-5, "float16": 2e-3}
LIMIT_INTEGERS = 3e-4  # of 16 bits, twice


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    return program("kernels.expert_cases", interpret=True)[0]


def of(results: dict[str, dict[str, float]], name: str) -> tuple[dict[str, float], str]:
    key = next(k for k in results if k.rsplit(" ", 1)[0] == name)
    return results[key], key.rsplit(" ", 1)[1]


@pytest.mark.parametrize("i", range(len(ROUTERS)), ids=lambda i: ROUTERS[i][0])
def test_a_router_chooses_the_best_and_weighs_them(i: int, results: dict[str, dict[str, float]]) -> None:
    """A tie that gives one expert twice, a softmax over the wrong ones, a counter left above zero."""
    found, _ = of(results, f"router {i}")

    assert found["ids"] == 0
    assert found["weights"] < 1e-5
    assert found["done"] == 0


@pytest.mark.parametrize("i", range(len(ORDERS)), ids=lambda i: str(ORDERS[i]))
def test_pairs_are_sorted_by_expert_in_tiles_of_one_expert(i: int, results: dict[str, dict[str, float]]) -> None:
    """An expert without tokens that takes a tile; a pair lost between two blocks."""
    assert results[f"order {i}"] == {"wrong": 0.0, "tiles": 0.0}


@pytest.mark.parametrize("i", range(len(PRODUCTS)), ids=lambda i: str(PRODUCTS[i][:5]))
def test_chosen_experts_are_multiplied_and_summed(i: int, results: dict[str, dict[str, float]]) -> None:
    """Rows past an expert's last, a bias twice, a tile of the wrong expert, the second half of a stack at the first one's place."""
    found, dtype = of(results, f"product {i}")

    assert set(found) == {"pairs", "beside", "grouped 16", "grouped 64"}
    assert max(found.values()) < LIMIT[dtype], found


@pytest.mark.parametrize("i", range(len(IN_FP8)), ids=lambda i: str(IN_FP8[i][:7]))
def test_experts_in_e4m3_multiply_as_their_values_do(i: int, results: dict[str, dict[str, float]]) -> None:
    """A scale of the gate's row at up's, of another expert, or of the block before; half of a stack under the other's scales."""
    found, dtype = of(results, f"fp8 {i}")

    assert set(found) == {"pairs", "beside", "grouped 16", "grouped 64"}
    assert max(found.values()) < LIMIT[dtype], found


@pytest.mark.parametrize("i", range(len(QUANTISED)), ids=lambda i: str(QUANTISED[i][:2]))
def test_quantised_experts_multiply_as_their_values_do(i: int, results: dict[str, dict[str, float]]) -> None:
    """An expert's planes at a wrong offset: each type has other ones."""
    found, _ = of(results, f"quantised {i}")

    assert found["sum"] < LIMIT_INTEGERS
    assert found["tall"] == 0


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_experts")


def test_every_launch_fits_its_card(compiled: list[dict[str, Any]]) -> None:
    assert {r["card"] for r in compiled} == {80, 86, 89, 90}
    for r in compiled:
        assert r["shared_bytes"] <= r["shared_limit"], r
        assert r["spill_bytes"] < 64, r


def test_e4m3_is_converted_by_the_card_where_it_can_and_meets_the_matrix_unit(compiled: list[dict[str, Any]]) -> None:
    """Two forms of scales, gate and up, and down: of one token, and of each tile's size."""
    fp8 = [r for r in compiled if r["fp8"] and r["kernel"] in ("_pairs", "_grouped")]
    assert len(fp8) == 3 * 4 * (1 + len(GROUPED_FP8))
    for r in fp8:
        assert r["matrix_unit"] == (r["kernel"] == "_grouped"), r
        assert r["instruction"] == (r["card"] >= 89), r


def test_misuse_is_refused_before_launch_with_both_numbers() -> None:
    from headwise.kernels import experts, router
    from headwise.weights.retile import empty

    def chosen(T: int, K: int) -> router.Chosen:
        return router.Chosen(torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K))

    choice, done = router.Choice(False), torch.zeros(16, dtype=torch.int32)
    with pytest.raises(ValueError, match="9 of 8 experts"):
        router.route(torch.zeros(1, 32), torch.zeros(8, 32), chosen(1, 9), choice, scores_TE=torch.zeros(1, 8), done=done)
    with pytest.raises(ValueError, match=r"2 tokens into scores \(1, 8\)"):
        router.route(torch.zeros(2, 32), torch.zeros(8, 32), chosen(2, 2), choice, scores_TE=torch.zeros(1, 8), done=done)
    with pytest.raises(ValueError, match="need 38 int32 values, got 5"):
        router.order(torch.zeros(2, 2, dtype=torch.int32), 8, 16, torch.zeros(5, dtype=torch.int32))
    stack, ids = torch.zeros(4, 8, 32), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(2, 16\) by experts of \(8, 32\)"):
        experts.pairs(torch.zeros(2, 16), ids, (stack,), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="the rows of each one together"):
        experts.pairs(torch.zeros(2, 8), ids, (stack.transpose(1, 2),), torch.zeros(4, 32))
    e4m3, scales = torch.zeros(4, 8, 32, dtype=torch.uint8), torch.zeros(4, 8, 1)
    for given, of in ((e4m3, ()), (stack, (scales,))):
        with pytest.raises(ValueError, match="the rows of each one together"):
            experts.pairs(torch.zeros(2, 32), ids, (given,), torch.zeros(4, 8), scales=of)
    for wrong in (scales.double(), scales[:2], scales.expand(4, 8, 2), torch.zeros(4, 16, 1)[:, :8]):
        with pytest.raises(ValueError, match=r"scales torch.float\d\d \(\d, 8, \d\) of strides"):
            experts.pairs(torch.zeros(2, 32), ids, (e4m3,), torch.zeros(4, 8), scales=(wrong,))
    order = router.Order(torch.zeros(4, dtype=torch.int32), *[torch.zeros(5, dtype=torch.int32)] * 3, tile_rows=16)
    wide, of = torch.zeros(4, 8, 256, dtype=torch.uint8), torch.zeros(4, 8, 2)
    with pytest.raises(ValueError, match="16 pairs a tile, 96 of K, with an order of 16, 2 scales a row"):
        launch = experts.Launch(64, 96, 4, 16)
        experts.grouped(torch.zeros(2, 256), order, (wide,), torch.zeros(4, 8), 2, scales=(of,), launch=launch)
    with pytest.raises(ValueError, match="not a stack"):
        experts.integer_pairs(torch.zeros(2, 8, 20, dtype=torch.int32), ids, empty("q4_k", (8, 256), "cpu"), torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"combine: \(3, 8\) of 2 experts a token into \(1, 8\)"):
        experts.combine(torch.zeros(3, 8), chosen(1, 2), torch.zeros(1, 8))
