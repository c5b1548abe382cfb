"""The decoder computes what transformers computes, however the prompt is cut."""

from __future__ import annotations

import pytest
import tiny
import torch
from checkpoints import load

IDS = torch.randint(1, 320, (83,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("chunk", [64, 7, 1])
def test_logits_equal_transformers(name: str, chunk: int) -> None:
    """83 tokens are six windows of 13: a ring that wraps wrongly shows here, in prefill (7) and in decode (1)."""
    error = (load(name).logits(IDS, chunk=chunk) - tiny.logits(name, IDS)).abs().max()

    assert error <= (1e-3 if name in tiny.MOE else 1e-4)


@pytest.mark.parametrize("name", ["gemma4-31b", "exaone4"])
def test_half_precision_stays_near(name: str) -> None:
    """A norm or a rope table computed in bf16 instead of fp32 passes 0.5 here."""
    error = (load(name, dtype="bf16").logits(IDS[:40]) - tiny.logits(name, IDS[:40])).abs().mean()

    assert error < 0.1


def test_one_stored_tensor_serves_as_both_k_and_v() -> None:
    """K = RoPE(w * V) is exact: the one-tensor cache gives what transformers' two tensors give."""
    llm = load("gemma4-31b")
    layer = next(x for x in llm.spec.layers if x.k_eq_v)
    cache = llm.runner.caches[layer.index]

    assert cache.v is None
    assert cache.k.n_values == 64 + 32  # V, and 16 rotated dims padded to a block
    assert (llm.logits(IDS[:50]) - tiny.logits("gemma4-31b", IDS[:50])).abs().max() < 1e-4
