"""Every row of the table, compiled for its cards without one: a row that spills or does not fit must not be offered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from programs import program

from headwise.kernels.configs import CROSSED, TABLE


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return program("kernels.compile_rows")


def test_every_row_fits_its_cards_shared_memory(rows: list[dict[str, Any]]) -> None:
    """A launch that asks for more fails on the user's card, at the first long prompt."""
    assert {r.get("card", 90) for r in rows} == {80, 86, 89, 90, "gfx1100"}
    found = Counter((r["phase"], r["head_dim"], r["one"], r["turned"], r["kv"] == "bf16") for r in rows if "phase" in r)
    one, every = sum(one for table in TABLE.values() for _, _, one in table), sum(map(len, TABLE.values()))
    assert found.total() == 2 * (every + one)  # of floats and of a quantised type; one tensor with and without the turn
    every_row = {row for table in TABLE.values() for row in table}
    assert set(found) == {(*row, turned, floats) for row in every_row for turned in {False, row[2]} for floats in (False, True)}
    assert not [r for r in rows if r["shared_bytes"] > r["shared_limit"]]


def test_no_row_spills(rows: list[dict[str, Any]]) -> None:
    """Spilled registers go through device memory: slower than the slower tile that does not."""
    assert not [r for r in rows if r["spill_bytes"] >= 64]


def test_the_hopper_kernels_use_the_asynchronous_matrix_unit(rows: list[dict[str, Any]]) -> None:
    gluon = [r for r in rows if "kernel" in r]
    assert len(gluon) == 7 + 24 + 10 + 15  # prefill over floats, and over bytes; decode over both
    assert all(r["wgmma"] for r in gluon)


def test_warps_that_share_a_tile_do_nothing_twice(rows: list[dict[str, Any]]) -> None:
    """Eight warps of plain Triton on 32 rows of 512 values do everything four times: half the speed of PyTorch's operator."""
    crossed = [r for r in rows if "crossed" in r]
    assert {tuple(r["crossed"]) for r in crossed} == set(CROSSED)
    assert {(r["card"], r["kv"]) for r in crossed} >= {(c, kv) for c in (80, 86, 89, 90) for kv in ("q8_0", "q4_0", "fp8")}
    assert all(r["products"] == r["needed"] for r in crossed)


def test_every_row_of_an_amd_card_uses_its_matrix_unit(rows: list[dict[str, Any]]) -> None:
    """Compiled only: no AMD card was at hand, so this is all that is known of them."""
    amd = [r for r in rows if r.get("card") == "gfx1100"]
    assert len(amd) == 8
    assert all(r["wmma"] for r in amd)
