"""Who is next, and what need not be computed again: pure functions, checked against plain simulations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwise.engine.request import Request, Sampling
from headwise.engine.schedule import INTERLEAVED_CHUNK, Load, Saving, Step, best_slot, next_waiting, reusable, saving, schedule


def request(id_: int, client: str) -> Request:
    return Request(id=id_, prompt=(1,), sampling=Sampling(), client=client)


def test_answers_go_on_beside_a_long_prompt() -> None:
    """One 32K prompt must not stop everybody's tokens until it is done."""
    assert schedule([Load(0, 0), Load(1, 32_000), Load(2, 0)], 512) == [Step(0, 1), Step(2, 1), Step(1, INTERLEAVED_CHUNK)]
    assert schedule([Load(1, 32_000)], 512) == [Step(1, 512)]
    assert schedule([Load(1, 3), Load(0, 99)], 512) == [Step(1, 3)]
    assert schedule([], 512) == []


def test_clients_take_turns() -> None:
    """A client that sends a hundred requests at once makes another wait for one of them, not for all."""
    waiting = [request(i, "many") for i in range(5)] + [request(9, "one")]
    served: dict[str, int] = {}
    order = []
    for turn in range(6):
        chosen = waiting.pop(next_waiting(waiting, served))
        served[chosen.client] = turn
        order.append(chosen.id)

    assert order == [0, 9, 1, 2, 3, 4]


RINGS = {13: 13 + 5 + 8, 4: 4 + 5 + 8}  # window -> slots, for a chunk of 5


@given(held=st.lists(st.integers(0, 1), max_size=80), cut=st.integers(0, 80), more=st.lists(st.integers(0, 1), max_size=40))
def test_what_is_reused_is_still_in_every_ring(held: list[int], cut: int, more: list[int]) -> None:
    """A reused token whose window the ring has overwritten gives another model's answer, quietly."""
    prompt = held[:cut] + more
    n = reusable(held, prompt, RINGS)

    assert prompt[:n] == held[:n]
    assert n == 0 or n < len(prompt)
    for window, slots in RINGS.items():
        ring = {p % slots: p for p in range(len(held))}  # the position each slot holds
        if n:
            assert all(ring[p % slots] == p for p in range(max(0, n - window + 1), n))


def test_an_exact_continuation_is_always_reused() -> None:
    held = list(range(1000))

    assert reusable(held, [*held, 7, 8], RINGS) == 1000
    assert reusable(held, held, RINGS) == 999  # the last token's logits are wanted
    assert reusable(held, held[:900], {}) == 899  # no rings: any prefix
    assert reusable(held, held[:900], RINGS) == 0
    assert reusable(held, [5], RINGS) == 0


def test_kept_rings_save_what_the_rings_have_forgotten() -> None:
    """The copy is of one sequence, the global layers may be of another: both must agree with the prompt."""
    prompt, answer = list(range(300)), list(range(900, 960))
    held, kept = prompt + answer, prompt + answer[:3]
    turn = [*prompt, 5, 6, 7]

    assert saving(held, (), turn, RINGS) == Saving(0)
    assert saving(held, kept, turn, RINGS) == Saving(300, restored=True)
    assert saving(held, kept, [*held, 1], RINGS) == Saving(360)
    other = [*prompt[:100], *range(700, 760)]  # the slot has been another conversation since: the copy is of no use
    assert saving(other, kept, turn, RINGS) == Saving(0)
    assert saving([*prompt[:298], 7], kept, turn, RINGS) == Saving(298)


@given(
    start=st.lists(st.integers(0, 1), max_size=40), held=st.lists(st.integers(0, 1), max_size=40), cut=st.integers(0, 80),
    more=st.lists(st.integers(0, 1), max_size=30), kept=st.lists(st.integers(0, 1), max_size=40),
)  # fmt: skip
def test_what_is_saved_is_in_the_caches(start: list[int], held: list[int], cut: int, more: list[int], kept: list[int]) -> None:
    held, kept = start + held, start + kept
    prompt = held[:cut] + more
    found = saving(held, kept, prompt, RINGS)
    written = kept if found.restored else held

    assert found.n == 0 or found.n < len(prompt)
    assert held[: found.n] == prompt[: found.n] == written[: found.n]
    for window, slots in RINGS.items():
        ring = {p % slots: p for p in range(len(written))}
        if found.n:
            assert all(ring[p % slots] == p for p in range(max(0, found.n - window + 1), found.n))


def test_a_slot_is_kept_for_its_conversation() -> None:
    """Every prompt begins with the same two tokens: that is no reason to overwrite a long conversation."""
    long, empty = list(range(500)), list[int]()

    def best(free: dict[int, list[int]], prompt: list[int]) -> int:
        return best_slot({s: (len(held), saving(held, (), prompt, {})) for s, held in free.items()}, len(prompt))

    assert best({0: long, 1: empty}, [*long, 1]) == 0
    assert best({1: empty, 0: long}, [0, 1, 2, 900, 901, 902, 903, 904]) == 1
    assert best({0: long}, [0, 1, 900, 901, 902, 903]) == 0
