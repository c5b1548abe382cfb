"""Who is next: pure functions over what waits and what runs; no clock, no torch.

Steps run one sequence at a time. Continuous batching would merge the tokens of one round into one step; nothing above
this file would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.engine.request import Request

INTERLEAVED_CHUNK = 128  # most prompt tokens between two tokens of a running answer


@dataclass(frozen=True, slots=True)
class Load:
    """A sequence that holds a slot: how many of its prompt tokens are not in the cache yet; 0 where it generates."""

    slot: int
    prompt_left: int


@dataclass(frozen=True, slots=True)
class Step:
    """The next `n` tokens of the sequence in `slot`."""

    slot: int
    n: int


def schedule(running: Sequence[Load], chunk: int) -> list[Step]:
    """One round: a token for each sequence that generates, and a chunk of the prompt that has waited longest.

    Args:
        running: oldest first.
        chunk: most tokens of one step; beside answers at most INTERLEAVED_CHUNK of it, so that they go on.
    """
    tokens = [Step(load.slot, 1) for load in running if not load.prompt_left]
    prompt = next((load for load in running if load.prompt_left), None)
    if prompt is None:
        return tokens
    most = min(chunk, INTERLEAVED_CHUNK) if tokens else chunk
    return [*tokens, Step(prompt.slot, min(most, prompt.prompt_left))]


def next_waiting(waiting: Sequence[Request], served: Mapping[str, int]) -> int:
    """The index of the request to admit: of the client served longest ago, its oldest.

    Args:
        served: client -> a number that grows with each admission; absent for a client never served.
    """
    return min(range(len(waiting)), key=lambda i: (served.get(waiting[i].client, -1), i))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def reusable(held: Sequence[int], prompt: Sequence[int], rings: Mapping[int, int]) -> int:
    """How many tokens of `prompt` a slot that holds `held` need not compute again.

    One token at least is computed: its logits are wanted. A global layer serves any common prefix. A ring has forgotten
    all but its last slots, so the window before the divergence must still lie in it; after an exact continuation it does.

    Args:
        rings: window -> slots of its ring.
    """
    n = common(held, prompt[:-1])
    return n if _whole(n, len(held), rings) else 0


def _whole(n: int, written: int, rings: Mapping[int, int]) -> bool:
    """Whether rings that `written` tokens went through still hold the window before token `n`."""
    return all(max(0, n - window + 1) >= written - slots for window, slots in rings.items())


@dataclass(frozen=True, slots=True)
class Saving:
    """What a slot saves of a prompt; `restored`: after its kept rings are put back."""

    n: int
    restored: bool = False


def saving(held: Sequence[int], kept: Sequence[int], prompt: Sequence[int], rings: Mapping[int, int]) -> Saving:
    """The better of what the rings hold and of what was kept of them.

    Args:
        held: the tokens of the global layers, and of the rings as they are.
        kept: the tokens after which a copy of the rings was made.
    """
    now = reusable(held, prompt, rings)
    before = min(common(held, prompt[:-1]), common(kept, prompt))
    return Saving(before, restored=True) if before > now and _whole(before, len(kept), rings) else Saving(now)


def best_slot(free: Mapping[int, tuple[int, Saving]], n_prompt: int) -> int:
    """The free slot to take: the one that saves most, if that is half of what it holds or of the prompt.

    Else the one that was used longest ago: a few tokens that every prompt begins with are no reason to forget another
    conversation.

    Args:
        free: slot -> the number of tokens it holds and what it saves, least recently used first.
    """
    slot = max(free, key=lambda s: free[s][1].n)
    n_held, saved = free[slot]
    return slot if 2 * saved.n >= min(n_held, n_prompt) else next(iter(free))
