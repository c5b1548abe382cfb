"""Who is next: pure functions over what waits and what runs; no clock, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.engine.request import Request


@dataclass(frozen=True, slots=True)
class Load:
    """A sequence that holds a slot.

    Args:
        left: tokens that are not in the cache yet; of an answer that goes on the last one, and drafts behind it.
        prompt: whether they are a prompt's; tokens of an answer are never put off.
        until: a prompt's next step ends after so many tokens at the latest.
    """

    slot: int
    left: int
    prompt: bool
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The next `n` tokens of the sequence in `slot`."""

    slot: int
    n: int


def schedule(running: Sequence[Load], chunk: int, *, beside: int, alone: bool = False) -> list[list[Step]]:
    """One round, in steps: a token for each answer, and tokens of the prompts that have waited longest.

    Args:
        running: oldest first.
        chunk: most tokens of one step.
        beside: most prompt tokens in a step with answers, so that they go on.
        alone: a step for each sequence, and prompts cut at multiples of `chunk`, so that nothing depends on the others.
    """
    answers = [Step(load.slot, load.left) for load in running if not load.prompt]
    prompts = [load for load in running if load.prompt]
    if alone:
        first = [Step(p.slot, min(p.left, chunk)) for p in prompts[:1]]
        return [[step] for step in (*answers, *first)]
    steps: list[list[Step]] = [[]]
    for step in answers:
        if sum(s.n for s in steps[-1]) + step.n > chunk:
            steps.append([])
        steps[-1].append(step)
    room = chunk - sum(s.n for s in steps[-1])
    room = min(room, beside) if answers else room
    for load in prompts:
        n = min(load.left, room, load.until or load.left)
        if n <= 0:
            break
        steps[-1].append(Step(load.slot, n))
        room -= n
    return [step for step in steps if step]


def next_waiting(waiting: Sequence[Request], served: Mapping[str, int]) -> int:
    """The index of the request to admit: of the client served longest ago, its oldest.

    Args:
        served: client -> a number that grows with each admission; absent for a client never served.
    """
    return min(range(len(waiting)), key=lambda i: (served.get(waiting[i].client, -1), i))
