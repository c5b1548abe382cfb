"""transformers' models compute the same with our attention as with its own eager one, or we refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch
import transformers
from programs import program
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from headwise.attention import own_kernels
from headwise.attention.capability import DeviceKind
from headwise.errors import BackendError, UsageError
from headwise.integrations import transformers as ours
from headwise.integrations.transformers import Row, Sight

IDS = torch.randint(1, 320, (2, 61), generator=torch.Generator().manual_seed(5))
BOUND = 1e-4
ours.register()


@contextmanager
def attention(name: str, kind: str) -> Iterator[transformers.PreTrainedModel]:
    """The family's model with one kind of attention; the oracle again afterwards."""
    net = tiny.model(name)
    net.set_attn_implementation(kind)
    try:
        with torch.inference_mode():
            yield net
    finally:
        net.set_attn_implementation("eager")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 61 is then several blocks of queries."""
    monkeypatch.setattr(ours, "QUERIES", 16)


def both(name: str, run: str, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of IDS with eager attention and with ours."""
    out = []
    for kind in ("eager", "headwise"):
        with attention(name, kind) as net:
            if run == "whole":
                out.append(net(IDS, attention_mask=mask, use_cache=False).logits)
                continue
            cache, parts, at = transformers.DynamicCache(config=net.config), [], 0
            for n in (23, 7, 17, *[1] * 14):
                seen = None if mask is None else mask[:, : at + n]
                parts.append(net(IDS[:, at : at + n], attention_mask=seen, past_key_values=cache).logits)
                at += n
            out.append(torch.cat(parts, 1))
    return out[0], out[1]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_logits_equal_eager_attention(name: str) -> None:
    """A window one key too long or a sink that is left out shows in a prompt of nearly five windows."""
    eager, fused = both(name, "whole")

    assert (fused - eager).abs().max() <= BOUND


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_cache_and_padding_on_the_left_change_nothing(name: str) -> None:
    """Chunks, then tokens. Sliding caches drop their first keys; 26 tokens of padding are a chunk without a real query."""
    mask = torch.ones_like(IDS)
    mask[1, :26] = 0
    eager, fused = both(name, "steps", mask)

    assert (fused - eager)[mask.bool()].abs().max() <= BOUND
    assert fused.isfinite().all()


@pytest.mark.parametrize("name", ["gemma4-31b", "gpt-oss"])
def test_padding_on_the_right_of_a_prompt_is_not_seen(name: str) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 40:] = 0
    eager, fused = both(name, "whole", mask)

    assert (fused - eager)[mask.bool()].abs().max() <= BOUND


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("gemma4-31b", "dynamic"),
        ("gemma4-e2b", "static"),
        ("gemma4-31b", "static"),
        ("exaone4", "static"),
        ("llama", "static"),
        ("gpt-oss", "static"),
    ],
)
def test_generate_gives_the_same_tokens(name: str, cache: str) -> None:
    """A static cache has more keys than positions, prepares its masks ahead and rolls its windows."""
    mask = torch.ones_like(IDS[:, :20])
    mask[1, :6] = 0
    out = []
    for kind in ("eager", "headwise"):
        with attention(name, kind) as net:
            out.append(
                net.generate(
                    IDS[:, :20], attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None,
                    cache_implementation=cache,
                )
            )  # fmt: skip

    assert torch.equal(*out)


def test_layers_that_need_the_last_query_only_get_it() -> None:
    """Gemma 4's layers without keys of their own are given the end of a mask."""
    mask = torch.ones_like(IDS)
    mask[1, :26] = 0
    out = []
    for kind in ("eager", "headwise"):
        with attention("gemma4-e2b", kind) as net:
            out.append(net(IDS, attention_mask=mask, logits_to_keep=3).logits)

    assert (out[1] - out[0]).abs().max() <= BOUND


def test_half_precision_runs() -> None:
    net = tiny.model("gemma4-31b")
    half = transformers.AutoModelForCausalLM.from_config(net.config, attn_implementation="headwise", dtype=torch.bfloat16).eval()
    half.load_state_dict(net.state_dict())
    with torch.inference_mode():
        got = half(IDS).logits.float()

    assert (got - tiny.logits("gemma4-31b", IDS[0].tolist())[None])[0].abs().mean() < 0.1


def test_our_kernels_give_the_same_in_a_model() -> None:
    """KV heads as sequences, padded queries left out, sinks by head: the launches of a GPU, in triton's interpreter."""
    results = program("integrations.interpreted", interpret=True)

    assert [r["launches"] for r in results] == [12, 8]  # layers * forward passes
    for r in results:
        assert max(r["errors"].values()) <= BOUND, r


# What a mask says


def seen(mask: list[list[int]] | None, n: int, past: int = 0, slots: int | None = None, offset: int = 0) -> Sight:
    return ours.sight(
        2, n, past + n - offset if slots is None else slots, past, offset,
        attention_mask=None if mask is None else torch.tensor(mask),
    )  # fmt: skip


def test_a_sight_says_where_keys_and_queries_are() -> None:
    assert seen(None, 4).rows == (Row(0, 4, 0, 4),) * 2
    assert seen([[1, 1, 1, 1], [0, 0, 1, 1]], 4).rows == (Row(0, 4, 0, 4), Row(2, 4, 2, 4))
    assert seen([[1, 1, 1, 0], [0, 1, 1, 0]], 4).rows == (Row(0, 3, 0, 3), Row(1, 3, 1, 3))
    assert seen([[1] * 6, [0, 1, 1, 1, 1, 1]], 2, past=4).rows == (Row(0, 6, 0, 2), Row(1, 6, 0, 2))
    assert seen([[1] * 6, [0, 0, 0, 0, 0, 1]], 2, past=4).rows == (Row(0, 6, 0, 2), Row(5, 6, 1, 2))
    assert seen([[1] * 6, [0] * 6], 2, past=4).rows == (Row(0, 6, 0, 2), Row(0, 0, 0, 0))
    assert seen([[1] * 6, [1, 1, 0, 0, 0, 0]], 2, past=4).rows == (Row(0, 6, 0, 2), Row(0, 0, 0, 0))
    assert seen([[1] * 9, [0] * 5 + [1] * 4], 2, past=7, offset=4).rows == (Row(0, 5, 0, 2), Row(1, 5, 0, 2))
    assert seen([[1] * 6, [1] * 6], 2, past=4, slots=32).rows == (Row(0, 6, 0, 2),) * 2


def test_the_end_of_a_sight_is_its_last_queries() -> None:
    whole = seen([[1, 1, 1, 1], [0, 0, 0, 1]], 4)

    assert whole[:, :, -2:, :].rows == (Row(0, 4, 0, 2), Row(3, 4, 1, 2))
    assert whole[:, :, 0:, :] == whole
    with pytest.raises(TypeError, match="last queries"):
        whole[:, :, :2, :]


def test_a_window_is_read_from_the_mask_function() -> None:
    assert ours.window_of(causal_mask_function) is None
    assert ours.window_of(sliding_window_causal_mask_function(77)) == 77


@pytest.mark.parametrize(
    "function",
    [
        bidirectional_mask_function,
        chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64)),
        or_masks(causal_mask_function, bidirectional_mask_function),
        lambda b, h, q, k: k <= q,
    ],
    ids=["both ways", "chunked", "united", "unknown"],
)
def test_another_mask_is_refused(function: object) -> None:
    """It would have been taken for causal."""
    with pytest.raises(BackendError, match="a mask of another kind"):
        ours.window_of(function)  # type: ignore[arg-type]


# What is refused


def refused(**changes: object) -> str:
    """The refusal of one call with a fault."""
    module = torch.nn.Module()
    call: dict[str, object] = {
        "query": torch.zeros(2, 4, 5, 32), "key": torch.zeros(2, 2, 5, 32), "value": torch.zeros(2, 2, 5, 32),
        "attention_mask": seen(None, 5),
    }  # fmt: skip
    ours.attention(module, **call)  # type: ignore[arg-type]
    with pytest.raises(BackendError) as caught:
        ours.attention(module, **(call | changes))  # type: ignore[arg-type]
    assert caught.value.why
    assert caught.value.do
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": None}, "no mask"),
        ({"attention_mask": torch.zeros(2, 1, 5, 5)}, "a mask of its own"),
        ({"is_causal": False}, "keys after them"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"query": torch.zeros(2, 4, 5, 32, requires_grad=True)}, "no backward pass"),
        ({"softcap": 30.0}, "softcap 30: it has none"),
        ({"sliding_window": 13}, "window 13"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"key": torch.zeros(2, 2, 6, 32), "value": torch.zeros(2, 2, 6, 32)}, "5 queries and 6 keys"),
        ({"query": torch.zeros(2, 4, 3, 32)}, "3 queries and 5 keys"),
        ({"value": torch.zeros(2, 2, 5, 16)}, "sizes differ"),
        ({"query": torch.zeros(2, 5, 5, 32)}, "sizes differ"),
        ({"query": torch.zeros(2, 4, 5, 32, dtype=torch.bfloat16)}, "torch.bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_run_is_refused(changes: dict[str, object], message: str) -> None:
    assert message in refused(**changes)


def test_a_hole_in_a_sequence_is_refused() -> None:
    """Tokens after padding on the right: a kernel that sees one run would see the padding."""
    with pytest.raises(BackendError, match="2 masked tokens between others"):
        seen([[1] * 6, [1, 1, 0, 0, 1, 1]], 2, past=4)


def test_positions_that_do_not_fit_the_keys_are_refused() -> None:
    with pytest.raises(BackendError, match="2 queries at position 40"):
        ours.sight(1, 2, 32, 40, 0)


def test_packed_sequences_are_refused() -> None:
    positions = torch.cat((torch.arange(30), torch.arange(31)))[None]
    with attention("llama", "headwise") as net, pytest.raises(BackendError, match="packed"):
        net(IDS[:1], position_ids=positions, use_cache=False)


def test_training_is_refused() -> None:
    net = tiny.model("llama")
    net.set_attn_implementation("headwise")
    try:
        with pytest.raises(BackendError, match="gradients"):
            net(IDS)
    finally:
        net.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "softcap", "backend"),
    [
        ((9, 0), "bfloat16", 256, None, "headwise-hopper"),
        ((9, 0), "float16", 64, None, "headwise-hopper"),
        ((9, 0), "bfloat16", 256, 50.0, "headwise-triton"),
        ((8, 9), "bfloat16", 512, None, "headwise-triton"),
        ((9, 0), "float32", 256, None, "torch-efficient"),
        ((9, 0), "bfloat16", 96, None, "torch-efficient"),
    ],
)
def test_a_card_gets_the_first_backend_that_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], dtype: str, head_dim: int, softcap: float | None, backend: str
) -> None:
    monkeypatch.setattr(ours, "device_kind", lambda device: DeviceKind("cuda", card, "a card"))
    chosen = ours.chosen.__wrapped__(torch.device("cpu"), getattr(torch, dtype), head_dim, 13, softcap, False)

    assert chosen.backend.name == backend


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.16.2")
    with pytest.raises(UsageError, match=r"5\.16\.2 is too old"):
        ours.register()


def test_splits_fit_the_scratch_whatever_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 rows of a prefill launch with tiles of 128 were given room for 32: the launch was refused in the middle of a prompt."""
    monkeypatch.setattr(own_kernels, "processors", lambda device: 132)
    partial = torch.empty(264 * 16 * 66)

    n = own_kernels.splits(8192, 128, 8, 64, torch.device("cpu"), partial, 2.0)

    assert 1 < n <= 264 // 8
    assert n * 8 * 128 * 66 <= partial.numel()
