"""Sampling at the edges of its arguments."""

from __future__ import annotations

import pytest
import torch

from headwise.engine.request import Sampling
from headwise.engine.sample import Sampler, best_of


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_of_each_row_is_that_of_its_largest_logit(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 1001).to(dtype)
    logits[[0, 1, 2, 3, 4], [1000, 0, 7, 512, 999]] = 9.0

    assert best_of(logits) == [1000, 0, 7, 512, 999]
    assert best_of(logits[:0]) == []
