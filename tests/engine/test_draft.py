"""Drafts are proposed where a text repeats itself, and only as long as they pay."""

from __future__ import annotations

from headwise.engine.draft import MATCH, PATIENCE, SIZES, Drafts

FREE = (1.0, 1.0, 1.0)


def test_a_repeated_text_is_continued() -> None:
    text = list(range(20))

    assert list(Drafts().propose([*text, 5, 6, 7], 7, FREE)) == [8, 9, 10, 11, 12, 13, 14]
    assert list(Drafts().propose([*text, 5, 6, 7], 3, FREE)) == [8, 9, 10]
    assert list(Drafts().propose([*text, 99, 6, 7], 7, FREE)) == []
    assert list(Drafts().propose([1] * MATCH, 7, FREE)) == []


def test_the_latest_repetition_counts() -> None:
    assert list(Drafts().propose([1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 9, 9, 1, 2, 3], 1, FREE)) == [5]


def test_a_step_that_costs_more_than_it_wins_is_not_taken() -> None:
    text = [*range(30), 5, 6, 7]

    assert list(Drafts().propose(text, 7, (3.0, 5.0, 9.0))) == []
    assert len(Drafts().propose(text, 7, (1.05, 3.0, 9.0))) == SIZES[0]


def test_refused_drafts_rest_and_are_tried_again() -> None:
    drafts, text = Drafts(), [*range(30), 5, 6, 7]
    tried = 0
    for _ in range(10):
        if proposed := drafts.propose(text, 7, FREE):
            drafts.verified(len(proposed), 0)
            tried += 1

    assert tried < 10
    rested = [bool(drafts.propose(text, 7, FREE)) for _ in range(PATIENCE + 1)]
    assert rested[-1] and not all(rested)
