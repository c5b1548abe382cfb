"""Who is next: pure functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwise.engine.request import Request, Sampling
from headwise.engine.schedule import Load, Step, next_waiting, schedule


def request(id_: int, client: str) -> Request:
    return Request(id=id_, prompt=(1,), sampling=Sampling(), client=client)


def answer(slot: int, n: int = 1) -> Load:
    return Load(slot, n, prompt=False)


def prompt(slot: int, n: int, until: int | None = None) -> Load:
    return Load(slot, n, prompt=True, until=until)


def test_answers_go_on_beside_a_long_prompt() -> None:
    """One 32K prompt must not stop everybody's tokens until it is done."""
    both = [answer(0), prompt(1, 32_000), answer(2)]

    assert schedule(both, 512, beside=128) == [[Step(0, 1), Step(2, 1), Step(1, 128)]]
    assert schedule(both, 512, beside=600) == [[Step(0, 1), Step(2, 1), Step(1, 510)]]
    assert schedule([prompt(1, 32_000)], 512, beside=128) == [[Step(1, 512)]]
    assert schedule([], 512, beside=128) == []


def test_short_prompts_share_a_step() -> None:
    assert schedule([prompt(1, 3), prompt(0, 700), prompt(2, 9)], 512, beside=128) == [[Step(1, 3), Step(0, 509)]]
    assert schedule([prompt(1, 300, until=40), prompt(0, 700)], 512, beside=128) == [[Step(1, 40), Step(0, 472)]]


def test_more_answers_than_a_step_holds_go_in_turn() -> None:
    assert schedule([answer(0, 4), answer(1, 4), answer(2)], 6, beside=3) == [[Step(0, 4)], [Step(1, 4), Step(2, 1)]]


def test_alone_nothing_depends_on_the_others() -> None:
    found = schedule([answer(0), prompt(1, 700), prompt(2, 5), answer(3)], 512, beside=128, alone=True)

    assert found == [[Step(0, 1)], [Step(3, 1)], [Step(1, 512)]]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12), st.integers(8, 64), st.integers(1, 64))
def test_no_step_is_longer_than_a_chunk_and_every_answer_goes_on(loads: list[tuple[bool, int]], chunk: int, beside: int) -> None:
    running = [prompt(i, n) if is_prompt else answer(i, min(n, 8)) for i, (is_prompt, n) in enumerate(loads)]
    steps = schedule(running, chunk, beside=beside)
    due = {step.slot: step.n for steps_ in steps for step in steps_}

    assert all(0 < sum(s.n for s in steps_) <= chunk for steps_ in steps)
    assert all(due[load.slot] == load.left for load in running if not load.prompt)
    assert sum(map(len, steps)) == len(due)


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
