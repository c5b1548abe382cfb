import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headwise.spec import catalogue
from headwise.spec.rope import (
    RopeSpec,
    default_rope,
    factors_rope,
    linear_rope,
    llama3_rope,
    proportional_rope,
    yarn_rope,
)

# transformers raises theta to a power in fp32 (relative error up to ln(theta) * 2**-24 = 1.2e-6) and blends two results,
# each with a weight whose error is up to ln(theta) / ln(2) * 2**-24 = 2e-6 of the plain frequency
FP32 = 4e-6

DIMS = st.integers(1, 256).map(lambda pairs: 2 * pairs)
THETAS = st.sampled_from([1e4, 1.5e5, 5e5, 1e6, 1e9]) | st.floats(2, 1e9)
FACTORS = st.sampled_from([1.0, 4.0, 8.0, 16.0, 32.0]) | st.floats(1, 128)
CONTEXTS = st.sampled_from([64, 4096, 8192]) | st.integers(1, 262_144)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers warns of every factor that is not the ratio of two contexts."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    logger.disabled = True
    yield
    logger.disabled = False


def theirs(head_dim: int, theta: float, **parameters: Any) -> tuple[torch.Tensor, float]:
    """What transformers computes for a Llama with this rope."""
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=262_144,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    kind = parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def assert_same(ours: RopeSpec, expected: tuple[torch.Tensor, float]) -> None:
    frequencies, magnitude = expected
    got = torch.tensor(ours.inv_freq, dtype=torch.float64)
    plain = torch.tensor(default_rope(2 * len(got), ours.theta).inv_freq, dtype=torch.float64)
    blended = plain if ours.kind in ("llama3", "yarn") else 0 * plain
    assert got.shape == frequencies.shape
    assert ((got - frequencies.double()).abs() <= FP32 * (got + blended)).all()
    assert ours.magnitude == pytest.approx(magnitude, rel=1e-12)


# against transformers


@settings(deadline=None, max_examples=50)
@given(DIMS, THETAS)
def test_default_frequencies_are_transformers_own(head_dim: int, theta: float) -> None:
    """2 i / head_dim against i / head_dim is a model that forgets where it is."""
    assert_same(default_rope(head_dim, theta), theirs(head_dim, theta, rope_type="default"))


@settings(deadline=None, max_examples=50)
@given(DIMS, THETAS, FACTORS)
def test_linear_frequencies_are_transformers_own(head_dim: int, theta: float, factor: float) -> None:
    """Multiplied instead of divided, positions run 64 times too fast."""
    assert_same(linear_rope(head_dim, theta, factor=factor), theirs(head_dim, theta, rope_type="linear", factor=factor))


@settings(deadline=None, max_examples=100)
@given(DIMS, THETAS, FACTORS, st.floats(0.25, 4), st.floats(1.5, 8), CONTEXTS)
def test_llama3_frequencies_are_transformers_own(
    head_dim: int, theta: float, factor: float, low: float, ratio: float, context: int
) -> None:
    """Wavelengths between the two bounds are blended; the bounds are easily swapped."""
    names = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low * ratio}

    ours = llama3_rope(head_dim, theta, **names, original_context=context)

    assert_same(ours, theirs(head_dim, theta, rope_type="llama3", original_max_position_embeddings=context, **names))


@settings(deadline=None, max_examples=100)
@given(DIMS, THETAS, FACTORS, st.floats(8, 64), st.floats(0.5, 4), CONTEXTS, st.booleans(), st.none() | st.floats(0.5, 2))
def test_yarn_frequencies_and_magnitude_are_transformers_own(
    head_dim: int,
    theta: float,
    factor: float,
    fast: float,
    slow: float,
    context: int,
    truncate: bool,
    attention_factor: float | None,
) -> None:
    """The ramp runs over pairs, the correction over dims; `truncate` false (gpt-oss) leaves its ends unrounded."""
    names = {"factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": truncate, "attention_factor": attention_factor}

    ours = yarn_rope(head_dim, theta, **names, original_context=context)  # type: ignore[arg-type]

    assert_same(ours, theirs(head_dim, theta, rope_type="yarn", original_max_position_embeddings=context, **names))


@settings(deadline=None, max_examples=50)
@given(DIMS, THETAS, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1))
def test_proportional_frequencies_are_transformers_own(head_dim: int, theta: float, partial: float) -> None:
    """The exponent's denominator is the whole head, not the part of it that turns."""
    parameters = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": partial}
    ropes = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = transformers.Gemma4TextConfig(
        num_hidden_layers=1, layer_types=["full_attention"], head_dim=head_dim, rope_parameters=ropes, global_head_dim=head_dim
    )
    expected = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"), layer_type="full_attention")

    assert_same(proportional_rope(head_dim, theta, partial=partial), expected)


# in closed form


def test_gemma4_full_layers_turn_64_of_256_pairs() -> None:
    """512 dims, a quarter: wavelengths from 6.3 to 188 tokens, dims [0, 64) and [256, 320), and nothing else moves."""
    rope = proportional_rope(512, 1e6, partial=0.25)

    assert rope.inv_freq[:64] == pytest.approx([10 ** (-6 * 2 * i / 512) for i in range(64)], rel=1e-12)
    assert rope.inv_freq[64:] == (0.0,) * 192
    assert rope.rotated_dims == 128
    assert 2 * math.pi / rope.inv_freq[63] == pytest.approx(188.3, abs=0.1)
    assert rope == catalogue.spec("gemma-4-31b").layers[5].rope


def test_gpt_oss_keeps_nine_pairs_and_slows_fifteen_by_32() -> None:
    """Pairs below 64 ln(4096 / 64 pi) / (2 ln 150000) = 8.09 are kept; above 17.40 divided; 0.1 ln 32 + 1 on cos and sin."""
    rope = catalogue.spec("gpt-oss-20b").layers[0].rope
    plain = [150_000 ** (-i / 32) for i in range(32)]

    assert rope is not None and len(rope.inv_freq) == 32
    assert rope.inv_freq[:9] == pytest.approx(plain[:9], rel=1e-12)
    assert rope.inv_freq[18:] == pytest.approx([f / 32 for f in plain[18:]], rel=1e-12)
    assert all(f / 32 < got < f for got, f in zip(rope.inv_freq[9:18], plain[9:18], strict=True))
    assert rope.magnitude == pytest.approx(1.3465735902799727, rel=1e-15)


def test_llama_keeps_waves_under_2048_tokens_and_stretches_those_over_8192_by_32() -> None:
    """Llama 3.2: 8192 / 4 and 8192 / 1."""
    rope = catalogue.spec("llama-3.2-3b").layers[0].rope
    plain = [500_000 ** (-i / 64) for i in range(64)]

    assert rope is not None
    for got, f in zip(rope.inv_freq, plain, strict=True):
        wave = 2 * math.pi / f
        assert got == pytest.approx(f if wave < 2048 else f / 32, rel=1e-12) or 2048 <= wave <= 8192


def test_llama3_with_no_room_between_its_bounds_is_a_step() -> None:
    """low_freq_factor = high_freq_factor and a wave of exactly that length divided zero by zero."""
    low = 1 / (2 * math.pi)
    assert 1 / low == 2 * math.pi  # the first pair's wavelength lies on both bounds

    rope = llama3_rope(4, 100.0, factor=8.0, low_freq_factor=low, high_freq_factor=low, original_context=1)

    assert rope.inv_freq == (1 / 8, 0.1 / 8)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_with_no_room_between_its_bounds_is_a_step(truncate: bool) -> None:
    """beta_fast = beta_slow made the ramp's length zero. Untruncated, the step lies at pair 15.69 of 32."""
    same = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 8.0, "truncate": truncate}

    rope = yarn_rope(64, 1e4, factor=4.0, original_context=4600, beta_fast=8.0, beta_slow=8.0, truncate=truncate)

    assert_same(rope, theirs(64, 1e4, original_max_position_embeddings=4600, **same))
    assert 4 * rope.inv_freq[-1] == pytest.approx(default_rope(64, 1e4).inv_freq[-1])


def test_gguf_s_factors_say_the_same_as_gemma_4_s_proportional_rope() -> None:
    """rope_freqs.weight of a Gemma 4 file: 64 ones, and 192 times 1e30 for "does not turn"."""
    rope = factors_rope(512, 1e6, [1.0] * 64 + [1e30] * 192)

    assert rope.inv_freq == proportional_rope(512, 1e6, partial=0.25).inv_freq
    assert rope.rotated_dims == 128


def test_gguf_s_factors_say_the_same_as_llama3_scaling() -> None:
    """Converters bake the scaling into rope_freqs.weight, in fp32."""
    scaled = llama3_rope(128, 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    factors = [a / b for a, b in zip(default_rope(128, 5e5).inv_freq, scaled.inv_freq, strict=True)]

    assert factors[0] == 1.0 and factors[-1] == pytest.approx(32.0)
    assert factors_rope(128, 5e5, factors).inv_freq == pytest.approx(scaled.inv_freq, rel=1e-12)


@pytest.mark.parametrize("n", [0, 31, 33])
def test_a_factor_for_each_pair_or_an_error(n: int) -> None:
    """A list one short dropped the last pair in silence."""
    with pytest.raises(ValueError):
        factors_rope(64, 1e4, [1.0] * n)


def test_a_factor_of_one_changes_nothing() -> None:
    """Every scheme is the default one at the end of its scale."""
    plain = default_rope(64, 1e4)

    assert linear_rope(64, 1e4, factor=1.0).inv_freq == plain.inv_freq
    assert proportional_rope(64, 1e4, partial=1.0).inv_freq == plain.inv_freq
    assert factors_rope(64, 1e4, [1.0] * 32).inv_freq == plain.inv_freq
    for rope in (
        yarn_rope(64, 1e4, factor=1.0, original_context=4096),
        llama3_rope(64, 1e4, factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=4096),
    ):
        assert rope.inv_freq == pytest.approx(plain.inv_freq, rel=1e-12)
        assert rope.magnitude == 1.0


# properties


@settings(deadline=None, max_examples=100)
@given(DIMS, THETAS, FACTORS, CONTEXTS)
def test_scaled_frequencies_lie_between_the_plain_and_the_divided_and_fall(
    head_dim: int, theta: float, factor: float, context: int
) -> None:
    """A pair that turns backwards, or faster than unscaled, is a sign of swapped bounds."""
    plain = default_rope(head_dim, theta)
    scaled = (
        linear_rope(head_dim, theta, factor=factor),
        llama3_rope(head_dim, theta, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=context),
        yarn_rope(head_dim, theta, factor=factor, original_context=context),
    )

    assert plain.inv_freq[0] == 1.0
    for rope in scaled:
        assert len(rope.inv_freq) == head_dim // 2 and rope.rotated_dims == head_dim and rope.magnitude >= 1.0
        assert all(f / factor <= got * (1 + 1e-12) <= f * (1 + 1e-11) for got, f in zip(rope.inv_freq, plain.inv_freq, strict=True))
        assert all(a >= b for a, b in zip(rope.inv_freq, rope.inv_freq[1:], strict=False))


@given(DIMS, THETAS, st.floats(0, 1))
def test_pairs_that_do_not_turn_are_a_tail(head_dim: int, theta: float, partial: float) -> None:
    """The cache keeps the turned dims as two runs; a zero among them would be lost."""
    rope = proportional_rope(head_dim, theta, partial=partial)
    n = rope.rotated_dims // 2

    assert n == int(partial * head_dim // 2)
    assert all(f > 0 for f in rope.inv_freq[:n]) and not any(rope.inv_freq[n:])


def test_a_rope_is_a_value() -> None:
    """Specs are compared, hashed and shared between layers."""
    rope = default_rope(64, 1e4)

    assert rope == default_rope(64, 1e4) and hash(rope) == hash(default_rope(64, 1e4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rope.theta = 1.0  # type: ignore[misc]
