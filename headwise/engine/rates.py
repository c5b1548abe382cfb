"""Tokens per second over the last minutes, counted as they come."""

from __future__ import annotations

import time
from collections.abc import Callable

KEPT_S = 300


class Rate:
    """A count, and how much of it fell into each of the last KEPT_S whole seconds.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._clock = clock
        self._seconds: dict[int, float] = {}

    def add(self, n: int, over_s: float = 0.0) -> None:
        """Counts `n`, spread evenly over the last `over_s` seconds: a chunk of a prompt is told when it is done."""
        self.total += n
        now = self._clock()
        start = now - min(max(over_s, 0.0), KEPT_S)
        for second in range(int(start), int(now) + 1):
            inside = min(now, second + 1) - max(start, second)
            share = inside / (now - start) if now > start else 1.0
            self._seconds[second] = self._seconds.get(second, 0.0) + n * share
        for second in [s for s in self._seconds if s < now - KEPT_S - 1]:
            del self._seconds[second]

    def recent(self) -> list[float]:
        """The last KEPT_S whole seconds, oldest first; the one that runs is left out."""
        now = int(self._clock())
        return [round(self._seconds.get(second, 0.0), 2) for second in range(now - KEPT_S, now)]
