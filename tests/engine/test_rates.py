"""Tokens per second: what falls into which second."""

from __future__ import annotations

from headwise.engine.rates import KEPT_S, Rate


def test_a_chunk_is_spread_over_the_time_that_it_took() -> None:
    """A chunk of 512 tokens after 4 s is 128 a second, not 512 in one and nothing in three."""
    now = [1000.0]
    rate = Rate(lambda: now[0])
    now[0] = 1004.0
    rate.add(512, over_s=4.0)
    now[0] = 1004.5
    rate.add(10)
    now[0] = 1006.0

    assert rate.recent()[-7:] == [0, 128, 128, 128, 128, 10, 0]
    assert (rate.total, len(rate.recent())) == (522, KEPT_S)


def test_a_half_second_counts_half() -> None:
    now = [1000.5]
    rate = Rate(lambda: now[0])
    now[0] = 1002.0
    rate.add(30, over_s=1.5)

    assert rate.recent()[-3:] == [0, 10, 20]


def test_what_is_old_is_forgotten() -> None:
    """A server that runs for months must not keep every second."""
    now = [0.0]
    rate = Rate(lambda: now[0])
    for _ in range(2000):
        now[0] += 1.0
        rate.add(1, over_s=1e9)

    assert len(rate._seconds) <= KEPT_S + 2
    assert rate.total == 2000
