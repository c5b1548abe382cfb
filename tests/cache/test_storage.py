"""Rings, segments and formats against brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attention import reference, torch_fused
from headwise.cache.storage import LayerCache, Place, Scratch, Span, Values, slot_positions
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS, kv_bytes

CPU = torch.device("cpu")
GLOBAL = replace(catalogue.spec("qwen3-0.6b").layers[0], n_heads=4, n_kv_heads=2, head_dim=32)


@given(st.integers(1, 40), st.integers(0, 200))
def test_slot_positions_say_what_a_ring_holds(n_slots: int, end: int) -> None:
    held = [-1] * n_slots
    for p in range(end):
        held[p % n_slots] = p

    assert [max(-1, p) for p in slot_positions(n_slots, end, CPU).tolist()] == held


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.sampled_from(["f32", "q8_0"]),
    st.integers(0, 99),
)
def test_any_cut_of_a_sequence_attends_like_the_formula(window: int, chunk: int, steps: list[int], kv: str, seed: int) -> None:
    """Windows, chunks and steps of any size: the ring, its masks, its wrap and its tiles against one big matrix."""
    layer = replace(GLOBAL, window=window)
    g = torch.Generator().manual_seed(seed)
    steps = [min(n, chunk) for n in steps]
    total = sum(steps)
    k, v = torch.randn(total, 2, 32, generator=g), torch.randn(total, 2, 32, generator=g)
    cache = LayerCache(layer, KV_FORMATS[kv], n_tokens=total, chunk=chunk, device=CPU)
    flat = LayerCache(replace(layer, window=None), KV_FORMATS[kv], n_tokens=total, chunk=chunk, device=CPU)
    scratch = Scratch(torch.empty(chunk * 64), torch.empty(chunk * 64), None, None, chunk)
    at = 0
    for n in steps:
        part = slice(at, at + n)
        for c in (cache, flat):
            c.write(Place(), at, k[part], v[part], torch.empty(chunk * 64))
        q, positions = torch.randn(n, 4, 32, generator=g), torch.arange(at, at + n)
        seen = reference.visible(positions, slot_positions(cache.n_slots, at + n, CPU), window)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, : min(cache.n_slots, at + n)]
        out = torch.full((n, 4, 32), float("nan"))
        torch_fused.attend("torch-flash-cpu", q, cache, Span(at, n, mask), scale=0.3, scratch=scratch, out_THD=out)
        at += n
        floats = [x.read(0, at, torch.empty(at, 2, 32) if kv != "f32" else None).double() for x in (flat.k, flat.v) if x]
        want, _ = reference.attend(q.double(), *floats, reference.visible(positions, torch.arange(at), window), scale=0.3)
        assert (out - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kv", "most"), [("f32", 0.0), ("f16", 6e-4), ("bf16", 4e-3), ("fp8", 0.04), ("q8_0", 0.008), ("q4_0", 0.12)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_within_what_their_type_can_hold(kv: str, most: float, dtype: torch.dtype) -> None:
    """In bf16 the largest of a block rounded to 128, which int8 turned into -128."""
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    values = Values(50, 3, 64, KV_FORMATS[kv], CPU)
    values.write(0, x, torch.empty(50, 3, 64))
    back = values.read(0, 50, None if values.native(dtype) else torch.empty(50, 3, 64, dtype=dtype))

    assert (back.float() - x.float()).norm() <= (most + (4e-3 if dtype == torch.bfloat16 else 0)) * x.float().norm()


@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_blocks_are_ggmls_blocks(kv: str) -> None:
    """The same bytes as gguf-py makes of the same values."""
    import gguf
    import numpy as np

    x = torch.randn(7, 1, 64, generator=torch.Generator().manual_seed(2))
    values = Values(7, 1, 64, KV_FORMATS[kv], CPU)
    values.write(0, x.clone(), torch.empty(7, 1, 64))
    kind = gguf.GGMLQuantizationType.Q8_0 if kv == "q8_0" else gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.quantize(x[:, 0].numpy(), kind).reshape(7, 2, -1)

    assert values.scales_SGB is not None
    np.testing.assert_array_equal(theirs[..., :2].copy().view(np.float16)[..., 0], values.scales_SGB[:, 0].numpy())
    np.testing.assert_array_equal(theirs[..., 2:].reshape(7, -1), values.data_SGD[:, 0].numpy().view(np.uint8))


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("model", ["gemma-4-31b", "gemma-4-e2b", "exaone-4.0-32b", "gpt-oss-20b"])
def test_every_layer_allocates_what_spec_kv_says(kv: str, model: str) -> None:
    for layer in catalogue.spec(model).kv_layers[:8]:
        cache = LayerCache(layer, KV_FORMATS[kv], n_tokens=300, chunk=96, device=torch.device("meta"))
        tensors = [t for x in (cache.k, cache.v) if x for t in (x.data_SGD, x.scales_SGB) if t is not None]

        assert sum(t.nbytes for t in tensors) == kv_bytes(layer, n_tokens=300, chunk=96, fmt=KV_FORMATS[kv])


def test_storing_blocks_without_an_fp32_scratch_is_a_bug_that_shows() -> None:
    with pytest.raises(ValueError, match="fp32 scratch"):
        Values(4, 1, 32, KV_FORMATS["q8_0"], CPU).write(0, torch.ones(4, 1, 32), torch.empty(4, 1, 32, dtype=torch.bfloat16))
