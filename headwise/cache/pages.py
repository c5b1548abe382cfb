"""Which pages of the global layers belong to whom: plain numbers, no tensors.

A page is PAGE_TOKENS slots in every global layer at once. A page may be shared: sequences that begin alike read the same pages,
and only whole pages are shared, so nobody writes what another reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from headwise.spec.kv import PAGE_TOKENS

Extent = tuple[int, int]  # first page, pages in a row


def extents(pages: Sequence[int]) -> tuple[Extent, ...]:
    """The same pages as runs of neighbours."""
    runs: list[Extent] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return tuple(runs)


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens`."""
    return -(-n_tokens // PAGE_TOKENS)


class PagePool:
    """Pages 0 to n - 1, each free or held by one or more owners."""

    def __init__(self, n: int) -> None:
        self.users = [0] * n
        self.free = n

    def take(self, n: int, after: int | None = None) -> list[int] | None:
        """`n` free pages for one owner, or None where fewer are free; nothing is taken then.

        Pages in a row read faster than scattered ones: it goes on behind page `after` while those are free, and then at the start
        of the longest run of free pages.
        """
        if n > self.free:
            return None
        taken: list[int] = []
        at = len(self.users) if after is None else after + 1
        while len(taken) < n:
            if at >= len(self.users) or self.users[at]:
                at = self._longest_run(n - len(taken))
            self.users[at] = 1
            taken.append(at)
            at += 1
        self.free -= n
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more owner of each."""
        for page in pages:
            if not self.users[page]:
                raise ValueError(f"page {page} is free: nobody has filled it")
            self.users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less of each; a page without owners is free."""
        for page in pages:
            if not self.users[page]:
                raise ValueError(f"page {page} is free already")
            self.users[page] -= 1
            self.free += not self.users[page]

    def _longest_run(self, enough: int) -> int:
        """The first page of the longest run of free pages, or of the first run of `enough`."""
        best = start = length = 0
        longest = 0
        for page, users in enumerate(self.users):
            if users:
                length = 0
                continue
            start = page if not length else start
            length += 1
            if length > longest:
                best, longest = start, length
                if longest >= enough:
                    break
        return best
