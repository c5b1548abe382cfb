"""The rings of a slot as they were near the start of an answer, copied to host memory.

An agent's next turn repeats the prompt, but not always the answer: thoughts are left out, arguments are spelt anew. Once a
long answer has pushed the prompt's end out of the rings, only this copy saves the prompt from being computed again. Global
layers forget nothing and need none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache

BEFORE_TOKENS = 64  # of the prompt's end that the next turn may spell otherwise, such as the words that open an answer


def keep_after(rings: Mapping[int, int]) -> int:
    """Tokens of an answer after which to copy: the latest moment at which the window before the prompt's end is whole.

    Args:
        rings: window -> slots of its ring.
    """
    return max(0, min(slots - window for window, slots in rings.items()) + 1 - BEFORE_TOKENS)


class Kept:
    """One slot's copy; `tokens` is the sequence whose rings it holds, empty before the first."""

    def __init__(self, caches: Mapping[int, LayerCache]) -> None:
        self.tokens: list[int] = []
        self._live = [t for c in caches.values() if c.window is not None for t in _tensors(c)]
        pinned = any(t.is_cuda for t in self._live)
        self.copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in self._live]

    def take(self, tokens: list[int]) -> None:
        for copy, live in zip(self.copies, self._live, strict=True):
            copy.copy_(live)
        self.tokens = tokens

    def restore(self) -> None:
        for copy, live in zip(self.copies, self._live, strict=True):
            live.copy_(copy)


def _tensors(cache: LayerCache) -> list[Tensor]:
    values = [v for v in (cache.k, cache.v) if v is not None]
    return [t for v in values for t in (v.data_SGD, v.scales_SGB) if t is not None]
