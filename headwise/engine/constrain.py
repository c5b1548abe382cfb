"""Grammars as a mask over the vocabulary: llguidance, and an end that comes before the tokens run out.

A small model inside a string may never close it. When the tokens that are left are just enough for the shortest way out of
the grammar, that way is taken: the answer is cut short but whole.

A freeform text within a JSON string follows its own grammar over another table of tokens: each stands there for what it
means unescaped. So any grammar holds, recursive ones too; the quote that ends the text is a token of its own.
Source: llguidance 1.9, `LLMatcher` (its errors are states, never exceptions).
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.engine.request import Grammar
from headwise.errors import UsageError
from headwise.text.grammar import MOST_TEXTS
from headwise.text.tokenizer import Tokenizer

SLACK = 32  # tokens kept beyond the way out
GROWTH = 4  # one token, and those it adds to the way out, at most
MOST = 256  # tokens of the shortest answer; a grammar that needs more is cut by max_tokens
WALKS = 6
_ESCAPED = [*map(chr, range(0x20)), '"', "\\"]  # characters that JSON does not write as they are
_SPELT = {json.dumps(c)[2:-1]: k for k, c in enumerate(_ESCAPED)}  # what follows the backslash -> its place in _ESCAPED
_ESCAPE = re.compile(rb'\\(["\\/bfnrt]|u00[01][0-9a-fA-F])')
_ANY_TOKENS = '%llguidance {"no_forcing": true}'  # what has one spelling is not made of tokens that mean something else here
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')


class _Wrapped:
    """A table of tokens as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id, self.bos_token_id = eos, None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)


def unescaped(token: bytes) -> bytes:
    """What a token means within a JSON string; empty where it ends the string or is only a part of an escape."""
    if _PLAIN.fullmatch(token):
        return token
    if not _PLAIN.fullmatch(_ESCAPE.sub(b"", token)):
        return b""
    return _ESCAPE.sub(lambda m: json.loads(b'"%b"' % m[0]).encode(), token)


class Constrainer:
    """Makes the constraints of one model; its tables of tokens are built once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise UsageError(
                "answers cannot be held to a grammar here", why="llguidance is not installed", do="pip install 'headwise[serve]'"
            ) from error
        self._llguidance, self._tokenizer = llguidance, tokenizer
        self.eos_ids = tokenizer.eos_ids
        self.n = n = tokenizer.vocab_size
        marks = {i for text in tokenizer.guarded_texts if (i := tokenizer.id(text)) is not None}  # none of them is ever text
        special = [i for i in range(n) if tokenizer.is_special(i) or i in marks]
        self._tokens = [tokenizer.token_bytes(i) for i in range(n)]
        self._special = frozenset(special)
        by_text = {t: i for i, t in reversed(list(enumerate(self._tokens))) if t and i not in self._special}
        texts = [b"<text %d>" % i for i in range(MOST_TEXTS)]
        self.table = self._table([*self._tokens, *texts], [*special, *range(n, n + MOST_TEXTS)], sorted(self.eos_ids) or [0])
        ends = sorted(self.eos_ids) + [i for i in special if i not in self.eos_ids]

        def ids(*texts: bytes) -> list[int]:
            return [by_text[t] for t in texts if t in by_text]

        line_end = ids(b"\\", b"\\n", b"\n")
        self.closer = Closer(
            ends,
            ids(b"q", b"Z"),
            ids(b'"') + line_end,
            ids(b"}", b"]", b'"', b":", b"0", b"false", b")") + line_end,
            ids(b"\\", b"n"),
        )
        self.by_text = by_text

    def _table(self, tokens: list[bytes], special: list[int], eos: list[int]) -> Any:
        wrapped = self._llguidance.TokenizerWrapper(_Wrapped(self._tokenizer, tokens, special, eos[0]))
        return self._llguidance.LLTokenizer(wrapped, eos_token=eos)

    @functools.cached_property
    def inner_table(self) -> Any:
        """The tokens unescaped; behind them the characters that are escaped, and an end that is no token of the model."""
        inner = [b"" if i in self._special else unescaped(t) for i, t in enumerate(self._tokens)]
        end = self.n + len(_ESCAPED)
        return self._table([*inner, *(c.encode() for c in _ESCAPED), b"<end>"], [end], [end])

    def _matcher(self, lark: str, table: Any) -> Any:
        matcher = self._llguidance.LLMatcher(table, lark, log_level=0)
        if matcher.is_error():
            raise UsageError(
                "the grammar of the answer is not valid",
                why=matcher.get_error().splitlines()[0],
                do="simplify the JSON schema or the tool's parameters",
            )
        return matcher

    def place(self, lark: str, texts: Sequence[Any]) -> Place:
        return Place(self._matcher(lark, self.table), texts, self)

    def start(self, grammar: Grammar, max_tokens: int) -> Constraint:
        """Raises UsageError where the grammar is none."""
        texts = [self._matcher(f"{_ANY_TOKENS}\n{text}", self.inner_table) for text in grammar.texts]
        first = grammar.opening or (grammar.lark if grammar.trigger is None else None)
        again = None if grammar.trigger is None else self.place(grammar.lark, texts)
        return Constraint(
            self, None if first is None else self.place(first, texts), max_tokens,
            trigger=grammar.trigger, again=again, loose=first is not grammar.lark,
            thought_end=self._tokenizer.encode(grammar.thought_end or "", add_bos=False),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Closer:
    """The token that closes most: an end; inside a text its quote, or the line's end; else a bracket, or the shortest value."""

    ends: list[int]
    letters: list[int]  # allowed together only inside a text
    in_text: list[int]
    outside: list[int]
    escaped: list[int]  # allowed together only behind a backslash; the last one ends a line

    def pick(self, mask: Tensor, *, lines: bool) -> int | None:
        """A token that closes; None where none does. `lines`: a text's line first, then the text itself."""
        free = all(mask[i] for i in self.letters)
        if not free and self.escaped and all(mask[i] for i in self.escaped):
            return self.escaped[-1]
        in_text = reversed(self.in_text) if lines else self.in_text
        order = [*self.ends, *(in_text if free else ()), *self.outside]
        return next((i for i in order if mask[i]), None)


class Place:
    """Where an answer is in its grammar, and in that of a text inside it."""

    def __init__(self, outer: Any, texts: Sequence[Any], constrainer: Constrainer) -> None:
        self._outer, self._texts, self._constrainer = outer, texts, constrainer
        self._inner: Any = None
        self._escape: str | None = None  # what was written of an escape, behind its backslash

    def copy(self) -> Place:
        made = Place(self._outer.deep_copy(), self._texts, self._constrainer)
        made._inner = None if self._inner is None else self._inner.deep_copy()
        made._escape = self._escape
        return made

    @property
    def complete(self) -> bool:
        return self._inner is None and bool(self._outer.is_accepting())

    def mask(self) -> Tensor:
        """True for the tokens that may come next."""
        n, ids = self._constrainer.n, self._constrainer.by_text
        if self._inner is None:
            return _bits(self._outer)[:n]
        bits = _bits(self._inner)
        chars = [text for text, k in _SPELT.items() if bits[n + k]]
        if self._escape is not None:
            mask = torch.zeros(n, dtype=torch.bool)
            rest = [text[len(self._escape) :] for text in chars if text.startswith(self._escape)]
            mask[[i for text in rest if (i := ids.get(text[0].encode())) is not None]] = True
            return mask
        mask = bits[:n]
        if b"\\" in ids:
            mask[ids[b"\\"]] = bool(chars)
        if b'"' in ids:
            mask[ids[b'"']] = bool(self._inner.is_accepting())
        return mask

    def take(self, token: int) -> None:
        n, ids = self._constrainer.n, self._constrainer.by_text
        if self._inner is None or (token == ids.get(b'"') and self._escape is None):
            self._inner = None
            self._outer.consume_token(token)
            for i, text in enumerate(self._texts):
                if self._outer.validate_tokens([n + i]):
                    self._outer.consume_token(n + i)
                    self._inner = text.deep_copy()
        elif self._escape is None and token == ids.get(b"\\"):
            self._escape = ""
        elif self._escape is None:
            self._inner.consume_token(token)
        else:
            self._escape += self._constrainer._tokens[token].decode()
            if (k := _SPELT.get(self._escape)) is not None:
                self._inner.consume_token(n + k)
                self._escape = None


class Constraint:
    """The grammars of one answer being followed.

    Args:
        place: where it begins; None: it is free until the trigger.
        again: where each trigger leads.
        loose: a complete grammar leaves what follows free, where it else ends the answer.
        thought_end: the tokens that end a thought, where one does not.
    """

    def __init__(
        self,
        constrainer: Constrainer,
        place: Place | None,
        max_tokens: int,
        *,
        trigger: int | None,
        again: Place | None,
        loose: bool,
        thought_end: Sequence[int],
    ) -> None:
        self._thought_end = thought_end
        self._eos_ids, self._closer, self._n = constrainer.eos_ids, constrainer.closer, constrainer.n
        self._ends = torch.zeros(self._n, dtype=torch.bool)
        self._ends[sorted(self._eos_ids)] = True
        self._trigger, self._again, self._loose = trigger, again, loose
        self._left = max_tokens
        self._origin = again or (None if place is None else place.copy())
        self._another: int | None = None  # tokens of the shortest call, or answer, that may begin where one is complete
        self._begin(place)

    def _begin(self, place: Place | None) -> None:
        self._place = place
        self._way_out: list[int] | None = None
        self._look = MOST + SLACK  # with so many tokens left the way out is looked for again

    def allowed(self) -> Tensor | None:
        """True for the tokens that may come next; for one of them when the end must come. None: any."""
        if self._place is None:
            return None if self._room_for_another() else self._any()
        mask = self._place.mask()
        if self._place.complete:
            ends = mask & self._ends
            return mask if torch.equal(ends, mask) or self._room_for_another() else ends
        if self._way_out is None and self._left <= self._look:
            found = self._found(self._place)
            room = self._left - len(found) - SLACK
            self._look = self._left - max(SLACK // GROWTH, room // GROWTH) if found else self._left // 2
            if room <= 0:
                self._way_out = found
        if self._way_out and mask[self._way_out[0]]:
            mask = torch.zeros_like(mask)
            mask[self._way_out.pop(0)] = True
        return mask

    def take(self, token: int) -> None:
        self._left -= 1
        if self._place is None:
            if token == self._trigger and self._again is not None:
                self._begin(self._again.copy())
        elif token not in self._eos_ids or not self._place.complete:
            self._place.take(token)
            if self._loose and self._place.complete:
                self._begin(None)

    def _found(self, place: Place) -> list[int]:
        return _way_out(place, self._closer, min(MOST, self._left), self._thought_end)

    def _room_for_another(self) -> bool:
        """Whether the tokens last for what may begin where an answer, or nothing, has been said."""
        if self._origin is None or self._left > MOST + SLACK:
            return True
        if self._another is None:
            self._another = len(self._found(self._origin))
        return self._left > self._another + SLACK

    @property
    def free(self) -> bool:
        """Whether no grammar holds now."""
        return self._place is None

    def _any(self) -> Tensor:
        """Any token but the one that begins what there is no room for."""
        mask = torch.ones(self._n, dtype=torch.bool)
        if self._trigger is not None:
            mask[self._trigger] = False
        return mask

    @property
    def complete(self) -> bool:
        """Whether the answer may end here because its grammar says so."""
        return self._place is not None and self._place.complete


def _bits(matcher: Any) -> Tensor:
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()


def _way_out(place: Place, closer: Closer, most: int, thought_end: Sequence[int]) -> list[int]:
    """Tokens that complete the grammar from here: the shorter of two walks that lead out.

    A walk takes what closes most and, where nothing closes, any token: a fixed choice could open a list in a list for ever.
    """
    best: list[int] = []
    found = 0
    for seed in range(WALKS):
        if found == 2:
            break
        state, draw, path = place.copy(), random.Random(seed), list[int]()
        first = [] if seed % 2 else [*thought_end]
        while not state.complete and len(path) < (len(best) or most):
            mask = state.mask()
            if first and mask[first[0]]:
                token = first.pop(0)
            else:
                token = closer.pick(mask, lines=seed % 2 == 1)
            if token is None:
                ids = mask.nonzero()[:, 0].tolist()
                if not ids:
                    break
                token = draw.choice(ids)
            state.take(token)
            path.append(token)
        found += state.complete or (bool(best) and len(path) >= len(best))
        if state.complete and (not best or len(path) < len(best)):
            best = path
    return best
