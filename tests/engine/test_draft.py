"""Drafts are proposed where a text repeats itself, and only as long as they pay."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from headwise.engine.draft import FIRST_STEPS, LONG, MATCH, PATIENCE, SIZES, UNKNOWN_COST, Costs, Drafts, propose

FREE = (1.0, 1.0, 1.0)


def proposed(drafts: Drafts, tokens: Sequence[int], most: int, costs: Sequence[float]) -> Sequence[int]:
    return propose([(drafts, tokens)], most, costs)[0]


def test_the_sequences_of_a_step_have_as_many_drafts_each_or_none() -> None:
    """Each its own number, and a card records a step for every combination of them."""
    repeats, new = [*range(20), 5, 6, 7], [50, 60, 70, 80]

    assert [list(d) for d in propose([(Drafts(), repeats), (Drafts(), new)], 7, (1.1, 1.2, 9.0))] == [[8, 9, 10], []]
    assert propose([(Drafts(), repeats), *[(Drafts(), new)] * 7], 7, (1.3, 1.4, 1.5)) == [[]] * 8  # one of eight does not pay


def test_a_repeated_text_is_continued() -> None:
    text = list(range(20))

    assert list(proposed(Drafts(), [*text, 5, 6, 7], 7, FREE)) == [8, 9, 10, 11, 12, 13, 14]
    assert list(proposed(Drafts(), [*text, 5, 6, 7], 3, FREE)) == [8, 9, 10]
    assert list(proposed(Drafts(), [*text, 99, 6, 7], 7, FREE)) == []
    assert list(proposed(Drafts(), [1] * MATCH, 7, FREE)) == []


def test_a_short_cycle_goes_round() -> None:
    assert list(proposed(Drafts(), [9, 1, 2, 1, 2, 1], 7, FREE)) == [2, 1, 2, 1, 2, 1, 2]


def test_the_latest_repetition_counts() -> None:
    assert list(proposed(Drafts(), [1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 9, 9, 1, 2, 3], 1, FREE)) == [5]


def test_a_step_that_costs_more_than_it_wins_is_not_taken() -> None:
    text = [*range(30), 5, 6, 7]

    assert list(proposed(Drafts(), text, 7, (3.0, 5.0, 9.0))) == []
    assert len(proposed(Drafts(), text, 7, (1.05, 3.0, 9.0))) == SIZES[0]


def test_refused_drafts_rest_and_are_tried_again() -> None:
    drafts, text = Drafts(), [*range(30), 5, 6, 7]
    tried = 0
    for _ in range(10):
        if tried_now := proposed(drafts, text, 7, FREE):
            drafts.verified(len(tried_now), 0)
            tried += 1

    assert tried < 10
    rested = [bool(proposed(drafts, text, 7, FREE)) for _ in range(PATIENCE + 1)]
    assert rested[-1] and not all(rested)


def test_costs_are_those_of_the_steps_that_nothing_held_up() -> None:
    """The first step of a length compiled its kernels, took a thousand times as long, and was the last one ever tried."""
    costs = Costs()
    for tokens, seconds, unknown in ((1, 0.010, inf), (8, 0.015, UNKNOWN_COST)):
        for held_up in (9.0, 3.0)[:FIRST_STEPS]:
            costs.took(1, tokens, held_up)
        assert costs.of(1) == [unknown] * 3
        for took in (seconds, 2 * seconds, seconds, 7.0):
            costs.took(1, tokens, took)
    assert costs.of(1) == [UNKNOWN_COST, UNKNOWN_COST, 1.5]
    assert costs.of(2) == [inf] * 3

    for _ in range(20):  # the context has grown
        costs.took(1, 1, 0.015)
    assert costs.of(1)[2] == 1.0


def test_what_was_alike_by_chance_does_not_count_against_a_long_repetition() -> None:
    """Prose that shares three tokens here and there had put a stop to drafts in the code that followed."""
    drafts, chance, text = Drafts(), [*range(30), 5, 6, 7], list(range(30))
    for _ in range(10):
        if tried_now := proposed(drafts, chance, 7, FREE):
            drafts.verified(len(tried_now), 0)

    assert list(proposed(drafts, chance, 7, FREE)) == []
    assert len(proposed(drafts, [*text, *text[: LONG + 2]], 7, FREE)) == SIZES[-1]


def test_drafts_behind_a_wrong_one_are_not_held_against_it() -> None:
    """Three right of seven is a draft that is right three times in four: a step of four is still worth it."""
    drafts, text = Drafts(), [*range(40), *range(20)]
    for _ in range(30):
        proposed(drafts, text, 7, FREE)
        drafts.verified(7, 3)

    assert len(proposed(drafts, text, 7, (1.2, 1.5, 2.9))) == SIZES[1]


def test_a_copy_goes_on_behind_an_edited_word() -> None:
    """Three tokens had to be alike again before the copy was followed: in renamed code that is every other word."""
    drafts, source = Drafts(), list(range(100, 160))
    text = [*source, *source[:10]]
    first = list(proposed(drafts, text, 7, FREE))
    drafts.verified(7, 3)
    text += [*first[:3], 999]  # said in place of the fourth

    assert list(proposed(drafts, text, 7, FREE)) == source[14:21]
    drafts.verified(7, 0)
    assert list(proposed(drafts, [*text, 998], 7, FREE)) == []  # it was no copy any more


def test_the_text_that_is_followed_goes_before_a_later_one() -> None:
    drafts, source = Drafts(), list(range(100, 130))
    text = [*source, 1, 110, 111, 112, 7, 8, 9, *source[:9]]
    proposed(drafts, text, 7, FREE)
    drafts.verified(3, 3)
    text += source[9:13]

    assert list(proposed(drafts, text, 7, FREE)) == source[13:20]
