"""Drafts without a second model: what followed the last tokens where they occurred before, in the prompt or in the answer.

Code is edited by repeating most of it, so the next tokens often stand in the text already. They are verified in one step
(`engine.Engine`): a token is kept only if it is the one that would have been drawn, so answers are those without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

MATCH = 3  # tokens that must be alike before a continuation is tried
SIZES = (1, 3, 7)  # drafts beside the token itself: steps of 2, 4 and 8 tokens
PATIENCE = 64  # tokens until drafts that did not pay are tried again


class Drafts:
    """The drafts of one sequence, and whether they pay: accepted tokens a step against what a longer step costs."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # where the tokens after each few tokens begin
        self._seen = 0
        self._rate = 0.75  # of drafts that were accepted lately
        self._rest = 0

    def propose(self, tokens: Sequence[int], most: int, costs: Sequence[float]) -> Sequence[int]:
        """What probably follows `tokens`; nothing where it would not pay.

        Args:
            costs: of a step with each of SIZES drafts, over the cost of one without.
        """
        for at in range(max(self._seen, MATCH), len(tokens)):
            self._last[tuple(tokens[at - MATCH : at])] = at
        self._seen = max(self._seen, len(tokens))
        if self._rest:
            self._rest -= 1
            return ()
        found = self._last.get(tuple(tokens[-MATCH:]))
        if found is None:
            return ()
        room = min(most, len(tokens) - found)
        best, gain = 0, 1.0
        for size, cost in zip(SIZES, costs, strict=False):
            if size <= room and (won := (1 + self._expected(size)) / cost) > gain:
                best, gain = size, won
        return tokens[found : found + best]

    def verified(self, proposed: int, accepted: int) -> None:
        """How many of the proposed tokens were kept."""
        self._rate += 0.3 * (accepted / proposed - self._rate)
        if self._rate < 0.2:
            self._rest, self._rate = PATIENCE, 0.5

    def _expected(self, size: int) -> float:
        """Tokens accepted of `size` drafts, each one only after those before it."""
        p = min(self._rate, 0.98)
        return p * (1 - p**size) / (1 - p)
