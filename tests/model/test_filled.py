"""Chunks that are filled up to the length of a recorded step, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load
from programs import program
from torch import Tensor

from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.replay import Replay


@pytest.mark.parametrize(("family", "stages"), [("gemma4-31b", 2), ("gemma4-e2b", 1)])
def test_filling_is_neither_seen_nor_stored_and_what_is_recorded_holds_nothing_of_its_first_chunk(
    family: str, stages: int, tmp_path: Path
) -> None:
    """Queries as many as the first chunk had, its last row for this one's, keys beyond the end of a ring, the pages or the pool."""
    found = program("model.filled_case", tmp_path, family, stages, interpret=True)[0]

    assert found.pop("stages") == stages
    for i in range(stages):
        assert (found.pop(f"chunks {i}"), found.pop(f"keys {i}")) == (7, 4)
    assert len(found) == 5
    for case, error in found.items():
        assert error < 1e-3, (case, found)


def test_a_chunk_is_filled_up_to_the_next_length_that_the_plan_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: multiples of 64, and the whole chunk; steps of several sequences stay as they are."""
    llm = load("llama", context=128, chunk=100, slots=2)
    monkeypatch.setattr(type(llm.runner.stages[0]), "recorded", lambda *_: True)

    def length(*tokens: int) -> list[int]:
        return [r.n for r in llm.runner._padded([Run(Place(), 0, [3] * n, 0) for n in tokens])]

    assert [length(n) for n in (1, 63, 64, 65, 100)] == [[1, 63], [63, 1], [64, 0], [65, 35], [100, 0]]
    assert length(9, 8) == [9, 8]


def test_a_key_says_what_the_host_decides() -> None:
    """A step replayed for another number of tokens, or with its last row left out; and one recorded anew for nothing."""
    shared, own = (load(name, context=512, chunk=200).runner.stages[0].steps for name in ("gemma4-e2b", "gemma4-31b"))

    def run(start: int, n: int, wanted: int, place: Place | None = None) -> Run:
        return Run(place or Place(), start, [3] * n, wanted)

    keys = [own.key(run(0, *n).filled(length)) for n in ((9, 0), (9, 1)) for length in (64, 128, 200)]
    keys += [own.key(run(0, 9, 0, Place(0, ((3, 1), (0, 1)))).filled(64))]
    assert None not in keys
    assert len(set(keys)) == 7
    assert own.key(run(300, 64, 1).filled(64)) == own.key(run(0, 2, 1).filled(64))
    assert shared.key(run(300, 64, 0).filled(64)) == shared.key(run(0, 2, 0).filled(64))
    assert shared.key(run(300, 64, 1).filled(64)) != shared.key(run(0, 2, 1).filled(64))  # its last layers share more keys out
    assert [own.key(run(0, n, 1).filled(length)) for n, length in ((9, 48), (9, 1088))] == [None, None]
    assert own.key(run(0, 9, 2).filled(64)) is None
    assert own.key([run(0, 9, 1)]) is None
    assert own.key([run(0, 1, 1), run(0, 63, 1)]) is None


class _Graph:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def replay(self) -> None:
        self.log.append(self.name)


def test_graphs_that_were_replayed_longest_ago_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a first run is an ordinary one, the second is recorded; of two that are kept, a third takes the older one's room."""
    log: list[str] = []
    name = ""

    def recorded(self: Replay, forward: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        log.append(f"+{name}")
        return _Graph(log, name), forward()

    monkeypatch.setattr(Replay, "_record", recorded)
    replay = Replay(torch.device("cpu"), most=2)

    for name in "aabbaccba":
        replay.run(name, lambda: torch.empty(0))

    assert log == ["+a", "a", "+b", "b", "a", "+c", "c", "+b", "b", "+a", "a"]
    assert list(replay.graphs) == ["b", "a"]
