"""Tokens per second over the last minutes, and how long requests took, counted as they come."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from headwise.engine.request import Finish

KEPT_S = 300
# Upper edges in seconds, vLLM's own: a quantile over both engines needs the same. Source: vllm/v1/metrics/loggers.py at 005a810b.
FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


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


class Histogram:
    """How many values lay at or below each edge, in Prometheus's sense."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.counts, self.sum = tuple(edges), [0] * (len(edges) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


def _request() -> Histogram:
    return Histogram(REQUEST_S)


@dataclass(slots=True)
class Times:
    """Seconds of requests that were answered, and between the tokens of one."""

    first_token: Histogram = field(default_factory=partial(Histogram, FIRST_S))
    between_tokens: Histogram = field(default_factory=partial(Histogram, TOKEN_S))
    whole: Histogram = field(default_factory=_request)
    queue: Histogram = field(default_factory=_request)
    prefill: Histogram = field(default_factory=_request)
    decode: Histogram = field(default_factory=_request)

    def finished(self, finish: Finish) -> None:
        """Counts an answered request; one that failed or was cancelled says nothing of speed."""
        if finish.reason in ("stop", "length"):
            self.first_token.observe(finish.queue_s + finish.prefill_s)
            self.whole.observe(finish.queue_s + finish.prefill_s + finish.decode_s)
            self.queue.observe(finish.queue_s)
            self.prefill.observe(finish.prefill_s)
            self.decode.observe(finish.decode_s)
