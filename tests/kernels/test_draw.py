"""Tokens drawn by kernels and by PyTorch's operators, in triton's interpreter; and compiled for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import program

from headwise.kernels.draw import draw
from headwise.planner.workspace import draw_words, logit_rows


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return program("kernels.draw_cases", interpret=True)[0]


def test_kernels_draw_what_operators_draw(results: dict[str, Any]) -> None:
    """A program's first token under the sum of the one before, a filter's edge among equals, a row's numbers for another."""
    cases = {name: found for name, found in results.items() if name != "cap"}
    assert len(cases) == 15
    assert {name: found[1] for name, found in cases.items() if found[1]} == {}
    assert sum(found[0] for found in cases.values()) == 176


def test_counters_are_left_at_zero(results: dict[str, Any]) -> None:
    """The next launch would wait for programs that never come, and no row would end."""
    assert not any(found[2] for name, found in results.items() if name != "cap")


def test_logits_are_capped_where_they_lie(results: dict[str, Any]) -> None:
    assert results["cap"] < 1e-3


def test_misuse_is_refused_before_a_launch() -> None:
    numbers, words, done = torch.zeros(2, 5), torch.zeros(draw_words(2, 100), dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    room = {"ranked": True, "cap": None, "words": words, "done": done}
    with pytest.raises(ValueError, match=r"torch\.float32 \(bf16 or f16\)"):
        draw(torch.zeros(2, 100), numbers, **room)
    with pytest.raises(ValueError, match=r"strides \(1, 2\) \(contiguous\)"):
        draw(torch.zeros(100, 2).half().t(), numbers, **room)
    with pytest.raises(ValueError, match=r"numbers \(2, 4\)"):
        draw(torch.zeros(2, 100).half(), numbers[:, :4], **room)
    with pytest.raises(ValueError, match="without a temperature"):
        draw(torch.zeros(2, 100).half(), None, **room)
    with pytest.raises(ValueError, match=rf"3 rows of 100 need {draw_words(3, 100)} and 3 int32, got {draw_words(2, 100)}"):
        draw(torch.zeros(3, 100).half(), torch.zeros(3, 5), **room)


def test_room_to_draw_is_small_beside_the_logits() -> None:
    """Of Gemma's 262,144 logits in bf16: 0.55 of their bytes, in the phase that has nothing but them."""
    rows = logit_rows(4, 512)
    assert 4 * draw_words(rows, 262_144) < 0.56 * 2 * rows * 262_144


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_draw")


def test_every_kernel_fits_its_cards(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 15 and {r["card"] for r in compiled} == {80, 86, 89, 90, "gfx1100"}
    assert not [r for r in compiled if r["shared_bytes"] > r["shared_limit"] or r["spill_bytes"] >= 64]


def test_rows_of_whole_words_are_read_wide(compiled: list[dict[str, Any]]) -> None:
    """Two bytes a thread and load: the pass over a row takes several times as long."""
    assert all(r["wide"] for r in compiled if r["V"] % 16 == 0 and r["card"] != "gfx1100")
