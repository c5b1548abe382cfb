"""Tokens of several sequences as one step: what operators and kernels are told beside the token ids.

Kernels find everything on the device, so that a recorded step can be replayed with other numbers: of each token its position and
its slots, of each sequence its keys and where they lie. Operators take a sequence at a time, and its pages a run at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwise.attention.reference import visible
from headwise.cache.storage import OnDevice, Place, Span, Table, slot_positions, slots_of
from headwise.kernels.configs import FEW_ROWS, doublings
from headwise.model.arena import Arena
from headwise.model.heads import Part, Step, Tail
from headwise.planner.memory import Plan
from headwise.planner.workspace import RECORDED_TOKENS, launches, ring_slots, span_words
from headwise.spec.kv import DRAFT_TOKENS, PAGE_TOKENS

FILL_TOKENS = 64  # a recorded chunk has a multiple of as many: few shapes, and products of fewer rows are bound by the weights


class Run(NamedTuple):
    """The next tokens of one sequence.

    Args:
        start: the position of the first of `ids`.
        wanted: how many of the last tokens' hidden states are wanted.
        fills: the step is filled up with them to the length of a recorded one: they are stored nowhere, and not looked at.
    """

    place: Place
    start: int
    ids: Sequence[int]
    wanted: int = 1
    fills: bool = False

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def scattered(self) -> bool:
        """Whether its pages are not all in a row."""
        return self.place.extents is not None and len(self.place.extents) > 1

    def part(self, first: int, n: int) -> Run:
        """Its tokens [first, first + n) as a run of their own, all wanted."""
        ids = self.ids[first : first + n]
        return Run(self.place, self.start + first, ids, len(ids))

    @property
    def answers(self) -> bool:
        """Whether it is a token of an answer with its drafts, and no chunk of a prompt."""
        return self.n <= DRAFT_TOKENS and self.wanted == self.n and not self.fills

    def filled(self, n: int) -> list[Run]:
        """It, and as many tokens more as make `n`. They attend to what the sequence begins with: keys which any place has room for,
        so that neither the end of the context nor pages nor rings matter to them."""
        return [self, Run(self.place, 0, [self.ids[-1]] * (n - self.n), 0, fills=True)]


class Steps:
    """Makes the steps of one device.

    Args:
        fused: every layer reads its cache by slots, so that sequences go together; else one after another.
    """

    def __init__(self, plan: Plan, arena: Arena, device: torch.device, *, fused: bool) -> None:
        spec, w = plan.spec, plan.workload
        self.arena, self.device, self.fused = arena, device, fused
        self.pinned = device.type == "cuda"  # a copy from other memory waits for what the device still does
        self.rings = ring_slots(spec, n_tokens=w.context, chunk=w.chunk)
        self.kinds = tuple(dict.fromkeys(layer.window for layer in spec.kv_layers))
        self.together = max(1, FEW_ROWS // max(x.n_heads // x.n_kv_heads for x in spec.layers))
        self.tail_attends = spec.layers[-1].kv_source is not None  # the wanted tokens' own step is not empty
        # where the numbers of a whole step begin, and those of the wanted tokens alone: words, and rows of the page table
        self.whole, self.wanted = (0, 0), (span_words(spec, w.slots, w.chunk), launches(w.slots, w.chunk))
        self._pages: dict[int, object] = {}  # by row of the page table: whose pages lie there

    def fill(self, runs: Sequence[Run], given: Tensor | None = None) -> None:
        """Everything that the host knows of a step, to where the device reads it.

        Args:
            given: on the device, the ids of runs of one token, in their order, in place of what the runs say.
        """
        if self.arena.flat("ids") is not None:
            ids_T = self.arena.take("ids", sum(r.n for r in runs))
            if given is not None:
                n = given.shape[0]
                ids_T[:n].copy_(given)
                ids_T[n:].copy_(given[-1:].expand(ids_T.shape[0] - n))  # of a step that was filled up
            elif ids_T.shape[0] == 1:
                ids_T.fill_(runs[0].ids[0])
            else:
                ids = list(chain.from_iterable(r.ids for r in runs))
                ids_T.copy_(torch.tensor(ids, pin_memory=self.pinned), non_blocking=True)
        span = self.arena.flat("span")
        if span is not None:
            self._write(span, runs, *self.whole)
            if _narrows(runs):
                self._write(span, _wanted(runs), *self.wanted, rows=_rows(runs))
        if not self.fused:
            self._masks(runs)

    def step(self, runs: Sequence[Run]) -> Step:
        """The step of what `fill` has written."""
        whole = self._step(runs, *self.whole)
        if not _narrows(runs):
            return whole
        rows, (at, row), span = _rows(runs), self.wanted, self.arena.flat("span")
        if span is None:
            rows_W = torch.tensor(rows, dtype=torch.int64, pin_memory=self.pinned).to(self.device, non_blocking=True)
        else:
            rows_W = span[at : at + len(rows)]
        return replace(whole, tail=Tail(rows_W, self._step(_wanted(runs), at + len(rows), row)))

    def key(self, runs: Sequence[Run]) -> Hashable | None:
        """What a recorded step of these runs may be replayed for; None where it cannot be recorded."""
        scattered, shares = any(r.scattered for r in runs), doublings(max(r.stop for r in runs))
        if all(r.answers and r.n == runs[0].n for r in runs):
            return len(runs), runs[0].n, scattered, shares
        n, wanted = sum(r.n for r in runs), runs[0].wanted
        if len(runs) != 2 or not runs[1].fills or wanted > 1 or not FILL_TOKENS <= n <= RECORDED_TOKENS:
            return None
        return "chunk", n, wanted, scattered, shares if wanted and self.tail_attends else 1  # many queries share no keys

    def _groups(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Runs that attention takes in one go: few queries each, or many. Operators take each run of a sequence's pages alone."""
        if not self.fused:
            return [[piece] for r in runs for piece in _pieces(r)]
        return [list(group) for _, group in groupby(runs, lambda r: r.answers)]

    def _sequences(self, group: Sequence[Run]) -> list[Run]:
        """What kernels take for a sequence: of a few drafts as many as one tile of queries holds."""
        if not self.fused or not group[0].answers:
            return list(group)
        return [r.part(i, self.together) for r in group for i in range(0, r.n, self.together)]

    def _step(self, runs: Sequence[Run], at: int, row: int) -> Step:
        """Views of what `_write` wrote."""
        T, kinds = sum(r.n for r in runs), len(self.kinds)
        span, pages = self.arena.flat("span"), self.arena.get("pages")
        parts: list[Part] = []
        first = 0
        if span is None:
            every = [torch.arange(r.start, r.stop, device=self.device) for r in runs] or [torch.arange(0, device=self.device)]
            positions, by_window = every[0] if len(every) == 1 else torch.cat(every), {}
        else:
            positions, *slots = span[at : at + (1 + kinds) * T].split(T) if T else [span[:0]] * (1 + kinds)
            by_window, at = dict(zip(self.kinds, slots, strict=True)), at + (1 + kinds) * T
        for group in self._groups(runs):
            sequences, on_device = self._sequences(group), None
            B, n = len(sequences), sum(r.n for r in group)
            if span is not None:
                starts, lengths, *firsts = span[at : at + 1 + (2 + kinds) * B].split([B + 1, *[B] * (1 + kinds)])
                tables = {window: Table(t) for window, t in zip(self.kinds, firsts, strict=True)}
                if pages is not None and None in tables and any(r.scattered for r in group):
                    tables[None] = Table(pages[row : row + B], PAGE_TOKENS)
                on_device = OnDevice(starts, lengths, tables, fresh=len(group) < B)
                at, row = at + 1 + (2 + kinds) * B, row + B
            most = n if group[-1].fills else max(r.n for r in sequences)  # as many queries however many are filled up
            stop = max(most, *(r.stop for r in sequences))
            parts.append(Part(first, first + n, Span(stop - most, most, None, on_device, group[0].place)))
            first += n
        return Step(T, positions, tuple(parts), self.arena, by_window)

    def _write(self, span: Tensor, runs: Sequence[Run], at: int, row: int, rows: Sequence[int] = ()) -> None:
        """Numbers in the order in which `_step` looks for them: of tokens, then of each group of sequences; before them `rows`."""
        told: list[Iterable[int]] = [rows, *(range(r.start, r.stop) for r in runs)]
        for window in self.kinds:
            ring = None if window is None else self.rings[window]
            for r in runs:
                stored = [] if r.fills else slots_of(r.place, ring, r.start, r.n)
                told += [range(slot, slot + n) for slot, _, n in stored] or [repeat(-1, r.n)]
        words = len(rows) + (1 + len(self.kinds)) * sum(r.n for r in runs)
        for group in self._groups(runs):
            sequences = self._sequences(group)
            told += [accumulate((r.n for r in sequences), initial=0), [r.stop for r in sequences]]
            told += [[self._first(r.place, window) for r in sequences] for window in self.kinds]
            words += 1 + (2 + len(self.kinds)) * len(sequences)
            if None in self.kinds and any(r.scattered for r in group):
                self._tell_pages(row, [r.place for r in sequences])
            row += len(sequences)
        if words:
            self._upload(span[at : at + words], np.fromiter(chain.from_iterable(told), np.int32, words))

    def _upload(self, to: Tensor, numbers: np.ndarray) -> None:
        """Without waiting for the device where memory can be pinned."""
        held = torch.empty(len(numbers), dtype=torch.int32, pin_memory=self.pinned)
        held.numpy()[:] = numbers
        to.copy_(held, non_blocking=True)

    def _first(self, place: Place, window: int | None) -> int:
        """The slot of position 0 in the layers of a window."""
        if window is not None:
            return place.ring * self.rings[window]
        return place.extents[0][0] * PAGE_TOKENS if place.extents else 0

    def _tell_pages(self, row: int, places: Sequence[Place]) -> None:
        table = self.arena.get("pages")
        assert table is not None
        for i, place in enumerate(places, row):
            if self._pages.get(i) != place.extents:
                pages = _pages_of(place)
                self._upload(table[i, : len(pages)], pages)
                self._pages[i] = place.extents

    def _masks(self, runs: Sequence[Run]) -> None:
        """Which slots of a ring each query sees, for operators."""
        first = 0
        for r in (piece for whole in runs for piece in _pieces(whole)):
            for window, slots in self.rings.items():
                mask = self.arena.get(f"mask.{window}") if r.n > 1 else None
                if mask is not None:
                    held = slot_positions(slots, r.stop, self.device)
                    seen = visible(torch.arange(r.start, r.stop, device=self.device), held, window)
                    mask[first : first + r.n].zero_().masked_fill_(~seen, float("-inf"))
            first += r.n


def _narrows(runs: Sequence[Run]) -> bool:
    """Whether fewer hidden states are wanted than are computed."""
    return any(r.wanted < r.n for r in runs)


def _wanted(runs: Sequence[Run]) -> list[Run]:
    return [r.part(r.n - r.wanted, r.wanted) for r in runs if r.wanted]


def _rows(runs: Sequence[Run]) -> list[int]:
    """Which of all tokens' rows the wanted ones are."""
    ends = accumulate(r.n for r in runs)
    return [row for r, end in zip(runs, ends, strict=True) for row in range(end - r.wanted, end)]


def _pages_of(place: Place) -> np.ndarray:
    return np.concatenate([np.arange(page, page + n) for page, n in place.extents or ()])


def _pieces(run: Run) -> list[Run]:
    """A run cut where its tokens' pages are not in a row."""
    if run.n == 1 or not run.scattered:
        return [run]
    return [run.part(token, n) for _, token, n in slots_of(run.place, None, run.start, run.n)]
