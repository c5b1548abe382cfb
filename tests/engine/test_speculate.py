"""Tokens tried ahead of their turn change how long an answer takes, never what it says nor how likely it is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf

import pytest
from checkpoints import load

from headwise import LLM
from headwise.engine import engine
from headwise.engine.draft import SIZES, UNKNOWN_COST, Costs, Drafts

CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 6
PROMPT = list(range(3, 40))


class Told(Costs):
    """Costs that nothing measured changes."""

    def __init__(self, cost: float) -> None:
        super().__init__()
        self.cost = cost

    def of(self, answers: int) -> list[float]:
        return [self.cost] * len(SIZES)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(context=1024, chunk=96, device="cpu", check=False)


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of every size, right and wrong ones, that no repetition suggests."""
    sizes, tokens = itertools.cycle((1, 3, 0, 7, 2)), itertools.cycle(range(3, 320, 7))

    def propose(sequences: Sequence[object], most: int, costs: Sequence[float]) -> list[list[int]]:
        size = min(most, next(sizes))
        return [list(itertools.islice(tokens, size)) for _ in sequences]

    monkeypatch.setattr(engine, "propose", propose)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_an_answer_is_that_without_drafts(llm: LLM, how: dict[str, float]) -> None:
    llm.costs = Told(1.0)
    prompt = llm.tokenize(CODE)
    plain = llm.generate(prompt, max_tokens=80, speculate=False, **how)
    drafted = llm.generate(prompt, max_tokens=80, **how)

    assert drafted.tokens == plain.tokens
    assert (drafted.text, drafted.finish) == (plain.text, plain.finish)
    assert plain.report.drafted == 0
    assert drafted.report.drafted >= drafted.report.accepted > 30
    assert drafted.report.decode_tokens == plain.report.decode_tokens


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma4-31b", "gpt-oss", "qwen3-moe"])
def test_wrong_drafts_leave_nothing_behind(name: str, wild: None) -> None:
    """A refused draft's keys that stay in a ring or a page are read by the tokens after it."""
    llm = load(name)
    plain = llm.generate(PROMPT, max_tokens=80, speculate=False)
    drafted = llm.generate(PROMPT, max_tokens=80)

    assert drafted.tokens == plain.tokens
    assert drafted.report.drafted > 50


def test_the_answer_and_the_context_end_where_they_do_without(wild: None) -> None:
    llm = load("gemma3")
    for prompt, most in ((PROMPT, 5), (PROMPT * 3, 100)):
        said = [llm.generate(prompt, max_tokens=most, speculate=speculate) for speculate in (True, False)]
        assert said[0].tokens == said[1].tokens
        assert said[0].finish == said[1].finish


def test_costly_steps_are_not_taken(llm: LLM) -> None:
    llm.costs = Told(20.0)
    report = llm.generate(llm.tokenize(CODE), max_tokens=30).report

    assert report.drafted == 0


def test_what_steps_cost_is_measured(llm: LLM) -> None:
    """Costs that stay unknown are drafts that are never weighed."""
    llm.costs = costs = Costs()
    llm.generate(llm.tokenize(CODE), max_tokens=80)

    assert any(cost not in (inf, UNKNOWN_COST) for cost in costs.of(1))


def test_a_stream_that_is_left_says_what_it_tried(llm: LLM) -> None:
    llm.costs = Told(1.0)
    stream = llm.stream(llm.tokenize(CODE), max_tokens=400)
    pieces = list(itertools.islice(stream, 40))
    stream.close()  # type: ignore[attr-defined]
    report = llm.report()

    assert len(pieces) == 40
    assert report.accepted > 0
    assert report.decode_tokens == 39


def _expected(llm: LLM, prompt: list[int], temperature: float, n: int) -> dict[tuple[int, ...], float]:
    """How likely each way to go on by n tokens is, from the logits alone."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(n):
        longer: dict[tuple[int, ...], float] = {}
        for said, chance in chances.items():
            row = (llm.logits([*prompt, *said])[-1] / temperature).topk(3)
            for token, share in zip(row.indices.tolist(), row.values.softmax(-1).tolist(), strict=True):
                longer[*said, token] = chance * share
        chances = longer
    return chances


def test_drafts_do_not_change_how_likely_an_answer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is taken because it is likely, and not because it was drawn, is said too often: chi-square of 27 answers."""
    llm, temperature, n = load("llama"), 1.0, 700
    expected = _expected(llm, PROMPT[:1], temperature, 3)
    favourites: Iterator[tuple[int, ...]] = itertools.cycle(sorted(expected, key=lambda a: -expected[a])[:4])
    monkeypatch.setattr(engine, "propose", lambda sequences, most, costs: [next(favourites)[1 : 1 + max(0, most)]])

    accepted: list[int] = []
    monkeypatch.setattr(Drafts, "verified", lambda self, proposed, kept: accepted.append(kept))
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(n):
        pieces = llm.stream(PROMPT[:1], max_tokens=3, temperature=temperature, top_k=3, seed=seed)
        drawn[tuple(piece.token for piece in pieces)] += 1

    assert sum(accepted) > n / 10
    assert set(drawn) <= set(expected)
    often = {said for said, chance in expected.items() if n * chance >= 5}
    groups = [(drawn[said], n * expected[said]) for said in often]
    rest = n - sum(e for _, e in groups)
    if rest > 1:
        groups.append((n - sum(d for d, _ in groups), rest))
    chi_square = sum((d - e) ** 2 / e for d, e in groups)
    assert chi_square < 56, (chi_square, len(groups))  # 26 degrees of freedom: once in two thousand
