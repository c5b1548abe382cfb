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


@pytest.mark.parametrize(
    ("name", "kv", "bound"),
    [("gemma4-31b", "f32", 1e-4), ("gemma4-26b-a4b", "f32", 1e-3), ("gemma4-31b", "f16", 2e-2), ("gemma4-31b", "q8_0", 0.2)],
)
def test_v_alone_gives_what_v_and_the_rotated_values_give(name: str, kv: str, bound: float) -> None:
    """Keys are made of V as it is stored: one position, or one pair, turned wrongly shows in every logit."""
    llm = load(name, kv=kv, kv_layout="v")
    layer = next(x for x in llm.spec.layers if x.k_eq_v)
    cache = llm.runner.caches[layer.index]

    assert (cache.v, cache.k.n_values) == (None, 64)
    for chunk in (64, 7, 1):
        got = llm.logits(IDS, chunk=chunk)
        assert (got - load(name, kv=kv).logits(IDS, chunk=chunk)).abs().max() < bound
        assert kv != "f32" or (got - tiny.logits(name, IDS)).abs().max() < bound
    assert llm.report().peak_bytes <= llm.plan.total_bytes


def test_the_reference_reads_v_alone_too() -> None:
    llm = load("gemma4-31b", kv_layout="v", backend="reference", allow_fallback=True)

    assert (llm.logits(IDS, chunk=7) - tiny.logits("gemma4-31b", IDS)).abs().max() < 1e-4
