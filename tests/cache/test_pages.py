"""Pages belong to somebody or to nobody, whatever the order of taking, sharing and giving back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cache.pages import PagePool, extents, pages_for


def test_pages_in_a_row_are_preferred() -> None:
    """Scattered pages cost a sequence its contiguous reads."""
    pool = PagePool(10)
    first, second = pool.take(2), pool.take(3)

    assert (first, second) == ([0, 1], [2, 3, 4])
    assert pool.take(2, after=1) == [5, 6]  # 2 is taken: the longest run
    pool.release([2, 3, 4])
    assert pool.take(3, after=1) == [2, 3, 4]
    assert pool.take(4) is None
    assert pool.free == 3


def test_a_shared_page_is_free_when_its_last_owner_leaves() -> None:
    pool = PagePool(2)
    pages = pool.take(1) or []
    pool.share(pages)
    pool.release(pages)
    assert pool.free == 1
    pool.release(pages)
    assert pool.free == 2
    with pytest.raises(ValueError, match="free already"):
        pool.release(pages)
    with pytest.raises(ValueError, match="nobody has filled"):
        pool.share(pages)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5), st.integers(0, 9)), max_size=60))
def test_no_page_is_lost_or_given_twice(actions: list[tuple[str, int, int]]) -> None:
    pool, owners = PagePool(12), list[list[int]]()
    for action, n, which in actions:
        if action == "take":
            taken = pool.take(n, after=owners[-1][-1] if owners and owners[-1] else None)
            if taken is not None:
                assert len(set(taken)) == n
                assert not any(page in other for other in owners for page in taken)
                owners.append(taken)
        elif owners:
            owner = owners[which % len(owners)]
            if action == "share":
                pool.share(owner)
                owners.append(list(owner))
            else:
                owners.remove(owner)
                pool.release(owner)
        assert pool.users == [sum(page in owner for owner in owners) for page in range(12)]
        assert pool.free == pool.users.count(0)


def test_extents_are_runs_of_neighbours() -> None:
    assert extents([4, 5, 6, 2, 9, 10]) == ((4, 3), (2, 1), (9, 2))
    assert extents([]) == ()
    assert [pages_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
