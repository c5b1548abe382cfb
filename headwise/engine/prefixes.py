"""What the caches hold after each request, so that the next one computes only what is new.

Global layers: pages, which sequences that begin alike share. Sliding layers: a slot's ring holds the last window only, so a copy of
it is kept in host memory at the moments to which a later prompt may return: near the start of an answer (the next turn repeats the
prompt, but thoughts are left out and arguments spelt anew), and where an earlier prompt parted from this one (what an agent's
conversations begin with).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm

import torch
from torch import Tensor

from headwise.cache.pages import PagePool, extents, pages_for
from headwise.cache.storage import LayerCache, Place, slots_of
from headwise.spec.kv import PAGE_TOKENS

ALONE = Place()
BEFORE_TOKENS = 64  # of a prompt's end that the next turn may spell otherwise, such as the words that open an answer


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def whole(n: int, written: int, rings: Mapping[int, int]) -> bool:
    """Whether rings that `written` tokens went through still hold the window before token `n`.

    Args:
        rings: window -> slots of its ring.
    """
    return all(max(0, n - window + 1) >= written - slots for window, slots in rings.items())


def keep_after(rings: Mapping[int, int]) -> int:
    """Tokens of an answer after which to copy: the latest moment at which the window before the prompt's end is whole."""
    return max(0, min((slots - window for window, slots in rings.items()), default=0) + 1 - BEFORE_TOKENS)


@dataclass(slots=True, eq=False)
class Held:
    """What a slot's ring and pages hold.

    Args:
        written: positions that went through the ring, with refused drafts and what a shorter prompt left.
        exact: tokens that were computed in whole chunks from the first on.
        copied: positions that had gone through the ring of which a copy was put back here; it holds less than a ring.
    """

    tokens: list[int] = field(default_factory=list[int])
    pages: list[int] = field(default_factory=list[int])
    written: int = 0
    exact: int = 0
    copied: int = 0
    busy: bool = False
    place: Place = ALONE


@dataclass(slots=True, eq=False)
class Kept:
    """A copy of the last positions of a ring after `tokens`, in their order, and a share of the whole pages that they fill.

    Args:
        parting: where prompts parted; else near the start of an answer.
    """

    copies: list[Tensor]
    parting: bool = False
    tokens: list[int] = field(default_factory=list[int])
    pages: list[int] = field(default_factory=list[int])
    written: int = 0
    exact: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """From where a prompt's first `n` tokens can be had: the ring of `slot` or a kept copy, the pages of `slot` or of the copy."""

    n: int
    slot: int | None = None
    kept: Kept | None = None


def _taken(rows: int, like: Tensor, pinned: bool) -> Tensor:
    """Host memory that is there at once: an operating system gives what is planned when it is first written, hours later."""
    return torch.empty((rows, *like.shape[1:]), dtype=like.dtype, pin_memory=pinned).zero_()


class Prefixes:
    """The slots of the rings and the pages of the pool.

    Args:
        rings: window -> slots of a ring.
        copies: window -> positions that a copy of a ring has.
        n_kept: copies of rings.
        chunk: with it only what was computed in whole chunks from the start counts, so that every answer is that of a cold start.
    """

    def __init__(
        self, caches: Mapping[int, LayerCache], rings: Mapping[int, int], copies: Mapping[int, int], *, slots: int, pages: int,
        n_kept: int, chunk: int | None = None,
    ) -> None:  # fmt: skip
        self.rings, self.copies, self.chunk = rings, copies, chunk
        self.pool = PagePool(pages)
        self.slots = {slot: Held() for slot in range(slots)}  # least recently used first
        windowed = [(c.window, t) for c in caches.values() if c.window is not None for t in _tensors(c)]
        tensors = [t for _, t in windowed]
        self._pages = [t.view(pages, -1, *t.shape[1:]) for c in caches.values() if c.window is None for t in _tensors(c)]
        self._rings = [[t.view(slots, -1, *t.shape[1:])[slot] for t in tensors] for slot in range(slots)]
        pinned = any(t.is_cuda for t in tensors)
        # least recently used first
        self.kept = [Kept([_taken(copies[window], t, pinned) for window, t in windowed]) for _ in range(n_kept)]

    @property
    def free(self) -> list[int]:
        return [slot for slot, held in self.slots.items() if not held.busy]

    def counts(self) -> dict[str, int]:
        """Pages and slots now. `pages_lost` are those whose owners are not the slots and copies that hold them: none, or a bug."""
        owners = Counter(page for x in (*self.slots.values(), *self.kept) for page in x.pages)
        return {
            "pages": len(self.pool.users),
            "pages_free": self.pool.free,
            "pages_lost": sum(users != owners[page] for page, users in enumerate(self.pool.users)),
            "slots": len(self.slots),
            "slots_used": sum(held.busy for held in self.slots.values()),
        }

    def admit(self, prompt: Sequence[int]) -> tuple[int, int, int | None]:
        """A free slot for `prompt`, and how many of its tokens need not be computed; one at least is: its logits are wanted.

        Returns:
            The slot, the tokens, and after how many tokens a copy of the ring would have saved more (None: none).
        """
        longest = max((common(x.tokens, prompt[:-1]) for x in (*self.slots.values(), *self.kept)), default=0)
        own = {slot: self._own(slot, prompt) for slot in self.free}
        best = max(own, key=lambda s: own[s].n)
        # A few tokens that every prompt begins with are no reason to forget another conversation.
        if 2 * own[best].n < min(len(self.slots[best].tokens), len(prompt)):
            best = next(iter(own))
        shared = self._shared(prompt, best)
        source = shared if shared is not None and shared.n > own[best].n else own[best]
        self._begin(best, source, prompt)
        wanted = longest - longest % lcm(PAGE_TOKENS, self.chunk or 1)
        return best, source.n, wanted if self.kept and wanted > source.n else None

    def has_room(self, n_tokens: int) -> bool:
        """Whether pages for so many tokens are left by the sequences in use."""
        used = {page for held in self.slots.values() if held.busy for page in held.pages}
        return pages_for(n_tokens) <= len(self.pool.users) - len(used)

    def grow(self, slot: int, n_tokens: int) -> bool:
        """Makes room for `n_tokens` of a slot's sequence; what nobody uses now is forgotten where pages run short."""
        held = self.slots[slot]
        more = pages_for(n_tokens) - len(held.pages)
        if more <= 0:
            return True
        while (taken := self.pool.take(more, held.pages[-1] if held.pages else None)) is None:
            if not self._forget():
                return False
        held.pages += taken
        held.place = Place(slot, extents(held.pages))
        return True

    def wrote(self, slot: int, tokens: Sequence[int], drafts: int = 0) -> None:
        """`tokens` follow in the caches of `slot`; `drafts` behind them were written and refused."""
        held = self.slots[slot]
        if self.chunk and len(tokens) == self.chunk and held.exact == len(held.tokens):
            held.exact += self.chunk
        held.tokens += tokens
        held.written = max(held.written, len(held.tokens) + drafts)

    def keep(self, slot: int, *, parting: bool = False) -> None:
        """Copies the ring of a slot, over a copy of an earlier turn of the same conversation or the one used longest ago."""
        if not self.kept:
            return
        held = self.slots[slot]
        earlier = (i for i, k in enumerate(self.kept) if not k.parting and k.tokens and k.tokens == held.tokens[: len(k.tokens)])
        kept = self.kept.pop(0 if parting else next(earlier, 0))
        self.pool.release(kept.pages)
        kept.parting = parting
        kept.tokens, kept.written, kept.exact = list(held.tokens), held.written, held.exact
        kept.pages = held.pages[: len(held.tokens) // PAGE_TOKENS]
        self.pool.share(kept.pages)
        for copy, live in self._both(kept, slot):
            copy.copy_(live)
        self.kept.append(kept)

    def _both(self, kept: Kept, slot: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the positions of a copy lie in it, and in the ring of `slot`."""
        for copy, ring in zip(kept.copies, self._rings[slot], strict=True):
            n = min(kept.written, copy.shape[0])
            for at, first, count in slots_of(ALONE, ring.shape[0], kept.written - n, n):
                yield copy[first : first + count], ring[at : at + count]

    def leave(self, slot: int) -> None:
        """The slot's request has ended; what it holds stays until it is needed."""
        held = self.slots.pop(slot)
        held.busy = False
        self.slots[slot] = held

    def _own(self, slot: int, prompt: Sequence[int]) -> Source:
        """What a free slot saves of a prompt with its own pages: as its ring is, or with a kept one put back."""
        held = self.slots[slot]
        n = min(common(held.tokens, prompt[:-1]), held.exact if self.chunk else len(prompt))
        found = [Source(n, slot)] + [Source(min(n, common(kept.tokens, prompt)), slot, kept) for kept in self.kept]
        return max((self._cut(s, s.kept or held, self._shares(held, s.n)) for s in found), key=lambda s: s.n)

    def _shares(self, held: Held, n: int) -> bool:
        """Whether token `n` would be written to a page that others read."""
        return n % PAGE_TOKENS != 0 and self.pool.users[held.pages[n // PAGE_TOKENS]] > 1

    def _shared(self, prompt: Sequence[int], into: int) -> Source | None:
        """The best that another slot or a copy has of a prompt."""
        found: list[tuple[Held | Kept, Source]] = []
        found += [(held, Source(len(held.tokens), slot)) for slot, held in self.slots.items() if slot != into]
        found += [(kept, Source(len(kept.pages) * PAGE_TOKENS, None, kept)) for kept in self.kept]
        cut = [
            self._cut(Source(min(s.n, common(x.tokens, prompt[:-1]), x.exact if self.chunk else s.n), s.slot, s.kept), x, True)
            for x, s in found
        ]
        return max(cut, key=lambda source: source.n, default=None)

    def _cut(self, source: Source, ring: Held | Kept, page: bool) -> Source:
        """As much of it as `ring` still holds the window of, in whole chunks where answers must be exact.

        Args:
            page: what begins in the middle of a page needs a copy of that page.
        """
        n = source.n - source.n % lcm(PAGE_TOKENS if page and not self.pool.free else 1, self.chunk or 1)
        if isinstance(ring, Kept):
            held = whole(n, ring.written, self.copies)
        else:
            held = whole(n, ring.written, self.rings) and whole(n, ring.copied, self.copies)
        return Source(n if held else 0, source.slot, source.kept)

    def _begin(self, slot: int, source: Source, prompt: Sequence[int]) -> None:
        """Makes `slot` hold the first tokens of `prompt`, and puts it last."""
        held, n = self.slots.pop(slot), source.n
        other = held if source.slot == slot else source.kept if source.slot is None else self.slots[source.slot]
        assert other is not None
        pages = other.pages[: pages_for(n)]
        self.pool.share(pages)
        self.pool.release(held.pages)
        if n % PAGE_TOKENS and self.pool.users[pages[-1]] > 1:
            taken = self.pool.take(1, pages[-2] if len(pages) > 1 else None)
            assert taken is not None  # `_cut` asks for no copy where no page is free
            (mine,) = taken
            for tensor in self._pages:
                tensor[mine].copy_(tensor[pages[-1]])
            self.pool.release(pages[-1:])
            pages[-1] = mine
        written, copied = n, 0
        if n and source.kept is not None:
            for copy, live in self._both(source.kept, slot):
                live.copy_(copy)
            written = copied = source.kept.written
            self.kept.remove(source.kept)
            self.kept.append(source.kept)
        elif n and isinstance(other, Held):
            if other is not held:
                for there, live in zip(self._rings[source.slot or 0], self._rings[slot], strict=True):
                    live.copy_(there)
            written, copied = other.written, other.copied
        exact, place = n if self.chunk else 0, Place(slot, extents(pages))
        self.slots[slot] = Held(list(prompt[:n]), pages, written, exact, copied, True, place)

    def _forget(self) -> bool:
        """Frees the pages of a copy or a slot that nobody uses now, the one used longest ago; False where there is none."""
        for kept in self.kept:
            if kept.pages:
                self.pool.release(kept.pages)
                kept.tokens, kept.pages = [], []
                return True
        for slot, held in self.slots.items():
            if held.pages and not held.busy:
                self.pool.release(held.pages)
                self.slots[slot] = Held()
                return True
        return False


def _tensors(cache: LayerCache) -> list[Tensor]:
    values = [v for v in (cache.k, cache.v) if v is not None]
    return [t for v in values for t in (v.data_SGD, v.scales_SGB) if t is not None]
