"""A grammar as a mask over the vocabulary: llguidance, and an end that comes before the tokens run out.

A small model inside a string may never close it. When the tokens that are left are just enough for the shortest way out of
the grammar, that way is taken: the answer is cut short but whole.
Source: llguidance 1.9, `LLMatcher` (its errors are states, never exceptions).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.engine.request import Grammar
from headwise.errors import UsageError
from headwise.text.tokenizer import Tokenizer

SLACK = 32  # tokens kept for what nests deeper than the start of the grammar
MOST = 512  # tokens of the shortest answer; a grammar that needs more is cut by max_tokens
WALKS = 6


class _Wrapped:
    """Our tokenizer as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        n = tokenizer.vocab_size
        self.eos_token_id = min(tokenizer.eos_ids) if tokenizer.eos_ids else 0
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = [i for i in range(n) if tokenizer.is_special(i)]
        self.tokens = [tokenizer.token_bytes(i) for i in range(n)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)


class Constrainer:
    """Makes the constraints of one model; its table of tokens is built once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UsageError(
                "answers cannot be held to a grammar here", why="llguidance is not installed", do="pip install 'headwise[serve]'"
            ) from error
        self._llguidance = llguidance
        self.eos_ids = tokenizer.eos_ids
        self.table = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Wrapped(tokenizer)), eos_token=sorted(tokenizer.eos_ids) or None
        )
        n = tokenizer.vocab_size
        by_text = {tokenizer.token_bytes(i): i for i in reversed(range(n)) if not tokenizer.is_special(i)}
        ends = sorted(tokenizer.eos_ids) + [i for i in range(n) if tokenizer.is_special(i) and i not in tokenizer.eos_ids]

        def ids(*texts: bytes) -> list[int]:
            return [by_text[t] for t in texts if t in by_text]

        self.closer = Closer(ends, ids(b"q", b"Z"), ids(b'"'), ids(b"}", b"]", b'"', b":", b"0", b"false"))

    def start(self, grammar: Grammar, max_tokens: int) -> Constraint:
        """Raises UsageError where the grammar is none."""
        matcher = self._llguidance.LLMatcher(self.table, grammar.lark, log_level=0)
        if matcher.is_error():
            raise UsageError(
                "the grammar of the answer is not valid",
                why=matcher.get_error().splitlines()[0],
                do="simplify the JSON schema or the tool's parameters",
            )
        return Constraint(matcher, self.eos_ids, self.closer, max_tokens)


@dataclass(frozen=True, slots=True)
class Closer:
    """The token that closes most: an end; inside a JSON text its quote; else a bracket, or the shortest value."""

    ends: list[int]
    letters: list[int]  # allowed together only inside a text
    in_text: list[int]
    outside: list[int]

    def pick(self, mask: Tensor) -> int | None:
        free = all(mask[i] for i in self.letters)
        order = [*self.ends, *(self.in_text if free else ()), *self.outside]
        return next((i for i in order if mask[i]), None)


class Constraint:
    """One grammar being followed."""

    def __init__(self, matcher: object, eos_ids: frozenset[int], closer: Closer, max_tokens: int) -> None:
        self._matcher, self._eos_ids, self._closer = matcher, eos_ids, closer
        self._left = max_tokens
        self._reserve = len(_way_out(matcher, closer, min(MOST, max_tokens))) + SLACK
        self._way_out: list[int] | None = None

    def allowed(self) -> Tensor:
        """True for the tokens that may come next; for one of them when the end must come."""
        mask = _mask(self._matcher)
        if self._left > self._reserve or self.complete:
            return mask
        if self._way_out is None:
            self._way_out = _way_out(self._matcher, self._closer, MOST)
        if self._way_out and mask[self._way_out[0]]:
            mask = torch.zeros_like(mask)
            mask[self._way_out.pop(0)] = True
        return mask

    def take(self, token: int) -> None:
        self._left -= 1
        if token not in self._eos_ids or not self.complete:
            self._matcher.consume_token(token)  # type: ignore[attr-defined]

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())  # type: ignore[attr-defined]


def _mask(matcher: object) -> Tensor:
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)  # type: ignore[attr-defined]
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()


def _way_out(matcher: object, closer: Closer, most: int) -> list[int]:
    """Tokens that complete the grammar from here: the shortest of a few walks.

    A walk takes what closes most and, where nothing closes, any token: a fixed choice could open a list in a list for ever.
    """
    best: list[int] = []
    for seed in range(WALKS):
        state, draw, path = matcher.deep_copy(), random.Random(seed), list[int]()  # type: ignore[attr-defined]
        while not state.is_accepting() and len(path) < (len(best) or most):
            mask = _mask(state)
            token = closer.pick(mask)
            if token is None:
                ids = mask.nonzero()[:, 0].tolist()
                if not ids:
                    break
                token = draw.choice(ids)
            state.consume_token(token)
            path.append(token)
        if state.is_accepting() and (not best or len(path) < len(best)):
            best = path
    return best
