"""Sampling at the edges of its arguments."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from headwise.engine.request import Sampling
from headwise.engine.sample import Draw, Sampler, tokens


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-9])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Logits divided by 1e-300 are infinite, their chances no numbers, and the engine's process died of it."""
    logits = torch.tensor([3.0, 80.0, -5.0, 79.0])

    assert [Sampler(Sampling(temperature=temperature, seed=1)).token(logits) for _ in range(5)] == [1] * 5


def test_a_temperature_divides_the_logits() -> None:
    """Of two tokens whose logits differ by log 3 at temperature 0.5, the better comes nine times in ten."""
    logits = torch.tensor([0.0, 1.0986123])
    sampler = Sampler(Sampling(temperature=0.5, seed=3))
    drawn = sum(sampler.token(logits) for _ in range(4000))

    assert abs(drawn / 4000 - 0.9) < 0.02


def test_chances_are_those_of_the_filters() -> None:
    """Top-k 3 of five leaves 4:2:1; top-p 0.8 then leaves 4:2, which pass it together; min-p 0.6 leaves the first alone."""
    logits = torch.tensor([0.0, 2.0, -1.0, 4.0, 1.0]).exp2().log().expand(4, -1)  # chances 1:4:0.5:16:2, over 23.5
    numbers = [(i + 0.5) / 2000 for i in range(2000)]

    def counted(sampling: Sampling) -> list[int]:
        drawn = [int(t) for i in range(0, 2000, 4) for t in tokens(logits, [Draw(sampling, u) for u in numbers[i : i + 4]])]
        return [drawn.count(token) for token in range(5)]

    shares = counted(Sampling(temperature=1.0))
    assert [round(n / 2000 * 23.5, 1) for n in shares] == [1.0, 4.0, 0.5, 16.0, 2.0]
    shares = counted(Sampling(temperature=1.0, top_k=3))
    assert [round(n / 2000 * 22, 1) for n in shares] == [0.0, 4.0, 0.0, 16.0, 2.0]
    shares = counted(Sampling(temperature=1.0, top_p=0.8))
    assert [round(n / 2000 * 20, 1) for n in shares] == [0.0, 4.0, 0.0, 16.0, 0.0]
    assert counted(Sampling(temperature=1.0, min_p=0.3)) == [0, 0, 0, 2000, 0]


@pytest.mark.parametrize("top_k", [0, 6, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.85])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_shares_are_those_of_transformers_filters(top_k: int, top_p: float, min_p: float) -> None:
    """A chance under min-p that counts for top-p all the same, the token that passes top-p left out: 2,000 numbers, one a slice."""
    torch.manual_seed(0)
    logits = torch.randn(1, 23) * 2
    filters = [TemperatureLogitsWarper(1.4)]
    filters += [TopKLogitsWarper(top_k)] if top_k else []
    filters += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    filters += [MinPLogitsWarper(min_p)] if min_p else []
    want = logits.clone()
    for f in filters:
        want = f(torch.empty(1, 0), want)
    sampling = Sampling(temperature=1.4, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = tokens(logits.expand(2000, -1), [Draw(sampling, (i + 0.5) / 2000) for i in range(2000)])

    assert (drawn.bincount(minlength=23) / 2000 - want.softmax(-1)[0]).abs().max() < 1.1 / 2000
    assert bool((drawn.diff() >= 0).all())  # in the order of the vocabulary


def test_of_equal_logits_the_first_are_kept() -> None:
    """What `topk` gives of equal logits differs by device, and a seed said other things there."""
    logits = torch.tensor([0.0, -0.0]).repeat(1, 300)
    logits[0, 599] = 1.0
    draws = [Draw(Sampling(temperature=1.0, top_k=40), (i + 0.5) / 200) for i in range(200)]

    assert set(tokens(logits.expand(200, -1), draws).tolist()) == {*range(39), 599}


def test_a_row_is_drawn_as_it_would_be_alone() -> None:
    """Rows of one step with settings of their own: one row's filter or temperature taken for another's."""
    torch.manual_seed(0)
    logits = torch.randn(11, 501) * 3
    settings = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in [
        (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (2.0, 0, 0.9, 0.0), (1.0, 40, 0.5, 0.1), (1.5, 0, 1.0, 0.2),
        (0.0, 3, 0.1, 0.0), (1e-40, 0, 1.0, 0.0), (1.0, 10_000, 1.0, 0.0), (0.3, 1, 1.0, 0.0), (1.0, 0, 0.999, 0.0),
    ]]  # fmt: skip
    draws = [Draw(s, u) for s, u in zip(settings, torch.rand(11).tolist(), strict=True)]
    together = tokens(logits, draws).tolist()

    assert together[7] == int(logits[7].argmax()) and together[9] == int(logits[9].argmax())
    assert together == [int(tokens(logits[i : i + 1], draws[i : i + 1])) for i in range(11)]
    assert tokens(logits[:2], [Draw(settings[1], 1.0 - 2**-60)] * 2).max() < 501  # a number that fp32 rounds to 1


def test_numbers_are_those_of_the_tokens_that_were_taken() -> None:
    """A refused draft takes no number away: the seed's next token is the same with and without drafts."""
    logits, sampling = torch.randn(40, 64), Sampling(temperature=1.0, seed=5)
    one, drafting = Sampler(sampling), Sampler(sampling)
    alone = [one.token(logits[i]) for i in range(40)]

    said: list[int] = []
    while len(said) < 36:
        drawn = tokens(logits[len(said) : len(said) + 4], drafting.draws(4)).tolist()
        for i in range(1 + len(said) % 3):  # as many as were accepted
            said.append(drafting.token(logits[len(said)], None, drawn[i]))
    assert said == alone[: len(said)]
    assert [d.u for d in one.draws(3, after=2)] == [d.u for d in one.draws(5)][2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_of_each_row_is_that_of_its_largest_logit(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1001).to(dtype)
    logits[[0, 1, 2, 3, 4], [1000, 0, 7, 512, 999]] = 9.0

    draws = [Draw(Sampling())] * 5
    assert tokens(logits, draws).tolist() == [1000, 0, 7, 512, 999]
    assert tokens(logits[:0], []).tolist() == []
