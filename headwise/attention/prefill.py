"""Two rows for one layer: spans of many queries go to the one that is ahead there, everything else stays with the layer's own.

The other row is a library's: it takes one sequence whose keys lie in a row, and their number and place from the host. So several
sequences, pages apart, a ring that wraps within the keys in sight, and chunks so short that they may be recorded (and replayed with
other numbers) are for our kernels, which read caches by slots. Both rows write into the result they are given and allocate nothing,
so a plan is the same with either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from headwise.cache.storage import LayerCache, Span
from headwise.planner.workspace import RECORDED_TOKENS


class Prefilled(NamedTuple):
    """The function of a layer that `own` runs and `ahead` prefills."""

    own: Callable[..., None]
    ahead: Callable[..., None]

    def __call__(self, q_THD: Tensor, cache: LayerCache, span: Span, **rest: Any) -> None:
        (self.ahead if many(cache, span) else self.own)(q_THD, cache, span, **rest)


def many(cache: LayerCache, span: Span) -> bool:
    """Whether a span is for the row that is ahead; by shapes and layout alone, never by what the device is told."""
    on = span.device
    if on is None or span.n <= RECORDED_TOKENS or on.lengths_B.shape[0] > 1:
        return False
    return not on.tables[None].page if cache.window is None else len(cache.seen(span)) == 1
