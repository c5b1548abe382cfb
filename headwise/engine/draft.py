"""Drafts without a second model: what followed the last tokens where they occurred before, in the prompt or in the answer.

Code is edited by repeating most of it, so the next tokens often stand in the text already. They are verified in one step
(`engine.Engine`): a token is kept only if it is the one that would have been drawn, so answers are those without drafts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Literal

MATCH = 3  # tokens that must be alike before a continuation is tried
LONG = 8  # tokens alike that are no chance
SIZES = (1, 3, 7)  # drafts beside the token itself: steps of 2, 4 and 8 tokens
PATIENCE = 64  # repetitions that are let pass before drafts that did not pay are tried again
UNKNOWN_COST = 1.3  # of a step with drafts over one without, until it is measured
FIRST_STEPS = 2  # of a kind, which compile kernels and record the step: they say nothing of the next ones
LATEST_STEPS = 8  # of a kind, of which the fastest counts: others were held up


Kind = Literal["alike", "long", "edited"]


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

    A text that has been repeated for a while probably goes on so; three tokens may be alike by chance; behind an edited word the
    text that was followed probably goes on. What was accepted lately is counted for each by itself.
    """

    def __init__(self) -> None:
        self.proposed = self.accepted = 0
        self._last: dict[tuple[int, ...], int] = {}  # where the tokens after each few tokens begin
        self._seen = 0
        self._period = 1  # how far back the last proposal came from
        self._behind = 0  # how far back the text lies that is followed, 0: none
        self._kind: Kind = "alike"
        self._found: int | None = None  # where that begins which probably follows
        self._rate: dict[Kind, float] = {"alike": 0.5, "long": 0.9, "edited": 0.5}  # how likely a draft is the next token
        self._rest: dict[Kind, int] = {"alike": 0, "long": 0, "edited": 0}

    def seek(self, tokens: Sequence[int]) -> None:
        """Looks for what probably follows `tokens`; nothing while drafts of this kind rest."""
        for at in range(max(self._seen, MATCH), len(tokens)):
            self._last[tuple(tokens[at - MATCH : at])] = at
        self._seen = max(self._seen, len(tokens))
        self._found = self._find(tokens)
        if self._found is None:
            return
        if self._rest[self._kind]:
            self._rest[self._kind] -= 1
            self._found = None
            return
        self._period = len(tokens) - self._found

    def expected(self, size: int) -> float:
        """Tokens accepted of `size` drafts, each one only after those before it; 0 where nothing was found."""
        if self._found is None:
            return 0.0
        p = min(self._rate[self._kind], 0.98)
        return p * (1 - p**size) / (1 - p)

    def take(self, tokens: Sequence[int], size: int) -> Sequence[int]:
        """The first `size` tokens of what `seek` found."""
        return [] if self._found is None else [tokens[self._found + i % self._period] for i in range(size)]

    def _find(self, tokens: Sequence[int]) -> int | None:
        """Where the text is that goes on as `tokens` probably do: the one that is followed, else the latest that ends alike."""
        n = len(tokens)
        followed = n - self._behind
        if self._behind and tokens[followed - MATCH : followed] == tokens[n - MATCH :]:
            found = followed
        else:
            found = self._last.get(tuple(tokens[n - MATCH :]))
        if found is None:
            self._kind = "edited"
            return followed if self._behind else None
        self._kind = "long" if found >= LONG and tokens[found - LONG : found] == tokens[n - LONG :] else "alike"
        return found

    def verified(self, proposed: int, accepted: int) -> None:
        """How many of the tokens that were proposed last were kept."""
        self.proposed += proposed
        self.accepted += accepted
        rate = self._rate[self._kind]
        rate += 0.3 * (accepted / min(accepted + 1, proposed) - rate)  # those behind the first wrong one were never in question
        if rate < 0.2:
            self._rest[self._kind], rate = PATIENCE, 0.5
        self._rate[self._kind] = rate
        if accepted:
            self._behind = self._period
        elif self._kind == "edited":
            self._behind = 0


def propose(sequences: Sequence[tuple[Drafts, Sequence[int]]], most: int, costs: Sequence[float]) -> list[Sequence[int]]:
    """What probably follows each sequence of a step: of all the same number of drafts, or none, and none where it would not pay.

    One number, since a step is recorded and its cost known by how many sequences it has and of how many tokens each.

    Args:
        most: drafts that each sequence has room for.
        costs: of a step with each of SIZES drafts a sequence, over the cost of one without.
    """
    for drafts, tokens in sequences:
        drafts.seek(tokens)
    best, gain = 0, 1.0
    for size, cost in zip(SIZES, costs, strict=False):
        won = (len(sequences) + sum(drafts.expected(size) for drafts, _ in sequences)) / (len(sequences) * cost)
        if size <= most and won > gain:
            best, gain = size, won
    return [drafts.take(tokens, best) for drafts, tokens in sequences]
