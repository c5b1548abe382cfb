"""Drafts without a second model: what followed the last tokens where they occurred before, in the prompt or in the answer.

Code is edited by repeating most of it, so the next tokens often stand in the text already. They are verified in one step
(`engine.Engine`): a token is kept only if it is the one that would have been drawn, so answers are those without drafts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

MATCH = 3  # tokens that must be alike before a continuation is tried
LONG = 8  # tokens alike that are no chance
SIZES = (1, 3, 7)  # drafts beside the token itself: steps of 2, 4 and 8 tokens
PATIENCE = 64  # repetitions that are let pass before drafts that did not pay are tried again
UNKNOWN_COST = 1.3  # of a step with drafts over one without, until it is measured
FIRST_STEPS = 2  # of a kind, which compile kernels and record the step: they say nothing of the next ones
LATEST_STEPS = 8  # of a kind, of which the fastest counts: others were held up


class Costs:
    """What steps with drafts cost over those without, measured as they run."""

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int], int] = {}  # by answers of a step and tokens of each
        self._seconds: dict[tuple[int, int], deque[float]] = {}

    def took(self, answers: int, tokens: int, seconds: float) -> None:
        """A step of so many answers, of each so many tokens."""
        key = (answers, tokens)
        self._steps[key] = self._steps.get(key, 0) + 1
        if self._steps[key] > FIRST_STEPS:
            self._seconds.setdefault(key, deque(maxlen=LATEST_STEPS)).append(seconds)

    def of(self, answers: int) -> list[float]:
        """Of a step of so many answers with each of SIZES drafts an answer, over one without; infinite while that is unknown."""
        plain = self._seconds.get((answers, 1))
        if plain is None:
            return [inf] * len(SIZES)
        with_drafts = [self._seconds.get((answers, 1 + n)) for n in SIZES]
        return [min(found) / min(plain) if found else UNKNOWN_COST for found in with_drafts]


class Drafts:
    """The drafts of one sequence, and whether they pay: accepted tokens a step against what a longer step costs.

    A text that has been repeated for a while probably goes on so; three tokens may be alike by chance. So what was accepted lately
    is counted for each.
    """

    def __init__(self) -> None:
        self.proposed = self.accepted = 0
        self._last: dict[tuple[int, ...], int] = {}  # where the tokens after each few tokens begin
        self._seen = 0
        self._rate = {False: 0.5, True: 0.9}  # how likely a draft is the next token; True: after LONG tokens alike
        self._rest = {False: 0, True: 0}
        self._long = False  # of the last proposal

    def propose(self, tokens: Sequence[int], most: int, costs: Sequence[float]) -> Sequence[int]:
        """What probably follows `tokens`; nothing where it would not pay.

        Args:
            costs: of a step with each of SIZES drafts, over the cost of one without.
        """
        for at in range(max(self._seen, MATCH), len(tokens)):
            self._last[tuple(tokens[at - MATCH : at])] = at
        self._seen = max(self._seen, len(tokens))
        found = self._last.get(tuple(tokens[-MATCH:]))
        if found is None:
            return ()
        long = self._long = found >= LONG and tokens[found - LONG : found] == tokens[-LONG:]
        if self._rest[long]:
            self._rest[long] -= 1
            return ()
        best, gain, period = 0, 1.0, len(tokens) - found
        for size, cost in zip(SIZES, costs, strict=False):
            if size <= most and (won := (1 + self._expected(size)) / cost) > gain:
                best, gain = size, won
        return [tokens[found + i % period] for i in range(best)]

    def verified(self, proposed: int, accepted: int) -> None:
        """How many of the proposed tokens were kept."""
        self.proposed += proposed
        self.accepted += accepted
        rate = self._rate[self._long]
        rate += 0.3 * (accepted / min(accepted + 1, proposed) - rate)  # those behind the first wrong one were never in question
        if rate < 0.2:
            self._rest[self._long], rate = PATIENCE, 0.5
        self._rate[self._long] = rate

    def _expected(self, size: int) -> float:
        """Tokens accepted of `size` drafts, each one only after those before it."""
        p = min(self._rate[self._long], 0.98)
        return p * (1 - p**size) / (1 - p)
