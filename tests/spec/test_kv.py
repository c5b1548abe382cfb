from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import UsageError
from headwise.spec import catalogue
from headwise.spec.kv import (
    DRAFT_TOKENS,
    KV_FORMATS,
    PAGE_TOKENS,
    KVFormat,
    check_format,
    k_values,
    kv_bytes,
    kv_format,
    kv_read_bytes,
    kv_slots,
    laid_out,
    q_values,
    turned_pairs,
    v_values,
)
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.spec.rope import proportional_rope

MIB = 2**20
F16, Q8, Q4 = KV_FORMATS["f16"], KV_FORMATS["q8_0"], KV_FORMATS["q4_0"]
PLAIN = catalogue.spec("qwen3-8b").layers[0]  # 8 KV heads of 128, every key
ONE = catalogue.spec("gemma-4-31b").layers[5]  # 4 KV heads of 512, one projection for K and V
RING = catalogue.spec("gemma-4-31b").layers[0]  # 16 KV heads of 256, a window of 1024
SHARED = catalogue.spec("gemma-4-e2b").layers[34]  # reads layer 14's cache

# Computed from published shapes, without this code: with exactly the window held in sliding layers and K and V apart,
# MiB at 8K, 32K, 128K and 256K tokens in f16, and at 32K in q8_0.
TABLE: dict[str, tuple[float, float, float, float, float]] = {
    "gemma-4-e2b": (54.0, 198.0, 774.0, 1542.0, 105.1875),
    "gemma-4-e4b": (148.0, 532.0, 2068.0, 4116.0, 282.625),
    "gemma-4-12b": (448.0, 832.0, 2368.0, 4416.0, 442.0),
    "gemma-4-26b-a4b": (360.0, 840.0, 2760.0, 5320.0, 446.25),
    "gemma-4-31b": (1440.0, 3360.0, 11040.0, 21280.0, 1785.0),
    "gemma-3-270m": (31.5, 103.5, 391.5, 775.5, 103.5 * 17 / 32),
    "gemma-3-1b": (43, 139, 523, 1035, 139 * 17 / 32),
    "gemma-3-4b": (276, 756, 2676, 5236, 756 * 17 / 32),
    "gemma-3-12b": (832, 2368, 8512, 16704, 2368 * 17 / 32),
    "gemma-3-27b": (1056, 2976, 10656, 20896, 2976 * 17 / 32),
    "qwen3-0.6b": (896, 3584, 14336, 28672, 1904),
    "qwen3-1.7b": (896, 3584, 14336, 28672, 1904),
    "qwen3-4b": (1152, 4608, 18432, 36864, 2448),
    "qwen3-8b": (1152, 4608, 18432, 36864, 2448),
    "qwen3-14b": (1280, 5120, 20480, 40960, 2720),
    "qwen3-32b": (2048, 8192, 32768, 65536, 4352),
    "qwen3-30b-a3b": (768, 3072, 12288, 24576, 1632),
    "llama-3.2-3b": (896, 3584, 14336, 28672, 1904),
    "exaone-4.0-32b": (1280, 2816, 8960, 17152, 1496),
    "exaone-4.0-1.2b": (480, 1920, 7680, 15360, 1020),
    "mistral-small-3.2-24b": (1280, 5120, 20480, 40960, 2720),
    "gpt-oss-20b": (195, 771, 3075, 6147, 771 * 17 / 32),
}
# What one tensor for K and V saves in full layers: 1024 - (512 + 128) of 1024 values a KV head.
SAVED = Fraction(384, 1024)
# K and V of all full layers at 256K tokens in f16, MiB: the table's number less the windows'.
K_EQ_V_FULL = {"gemma-4-12b": 4416 - 320, "gemma-4-26b-a4b": 5320 - 200, "gemma-4-31b": 21280 - 800}


def held(spec: ModelSpec, n_tokens: int, fmt: KVFormat, *, chunk: int = 512) -> int:
    return sum(kv_bytes(layer, n_tokens=n_tokens, chunk=chunk, fmt=fmt) for layer in spec.layers)


def slack(spec: ModelSpec, fmt: KVFormat, *, chunk: int = 512) -> Fraction:
    """What a ring holds beyond its window: one prefill chunk and room for 8 draft tokens."""
    values = sum(2 * x.n_kv_heads * x.head_dim for x in spec.of_kind("sliding") if x.kv_source is None)
    return values * (chunk + 8) * fmt.bytes_per_value


@pytest.mark.parametrize("name", TABLE)
def test_the_whole_cache_is_the_published_number_of_bytes(name: str) -> None:
    """Every layer charged for the whole context is 110 GiB for gemma-4-31b at 128K, which holds 11."""
    spec = catalogue.spec(name)

    for k, expected in zip((8, 32, 128, 256), TABLE[name], strict=False):
        saved = SAVED * K_EQ_V_FULL.get(name, 0) * k / 256 * MIB
        assert held(spec, k * 1024, F16) == expected * MIB - saved + slack(spec, F16)
    saved = SAVED * K_EQ_V_FULL.get(name, 0) / 8 * Fraction(17, 32) * MIB
    assert held(spec, 32 * 1024, Q8) == Fraction(TABLE[name][4]) * MIB - saved + slack(spec, Q8)


def test_every_catalogue_model_is_in_the_table() -> None:
    """A model without a row is one whose cache nobody checked."""
    assert set(TABLE) == set(catalogue.names())


@pytest.mark.parametrize(
    ("name", "per_32_values"),
    [("f32", 128), ("f16", 64), ("bf16", 64), ("fp8", 32), ("q8_0", 32 + 2), ("q4_0", 16 + 2)],
)
def test_a_format_takes_its_values_and_its_scale(name: str, per_32_values: int) -> None:
    """A Q8_0 block has 32 bytes and an f16 scale: counting 1 byte a value is 6 % short."""
    fmt = kv_format(name)

    assert fmt.row_bytes(32) == per_32_values and fmt.row_bytes(0) == 0
    assert fmt.bytes_per_value == Fraction(per_32_values, 32)
    assert fmt.quantised is name.startswith("q")


def test_formats_are_named_in_either_case_and_an_unknown_one_lists_them() -> None:
    """`--kv q8` was a KeyError."""
    assert kv_format("Q8_0") is Q8 and kv_format("BF16").block_bytes == 2
    with pytest.raises(UsageError, match="unknown KV type 'q8'") as caught:
        kv_format("q8")
    assert "q8_0" in caught.value.do


@pytest.mark.parametrize("n", [1, 31, 33, 80])
def test_a_part_of_a_block_has_no_size(n: int) -> None:
    """Rounded down, the last values of a head lie in the next head's bytes."""
    with pytest.raises(ValueError, match=f"{n} values are not whole blocks of 32"):
        Q4.row_bytes(n)


def test_k_and_v_are_two_tensors_of_a_head_each() -> None:
    """8 heads of 128, twice, 2 bytes: 4 KiB a token; a page is 64 tokens."""
    assert (k_values(PLAIN), v_values(PLAIN)) == (128, 128)
    assert kv_bytes(PLAIN, n_tokens=1, chunk=512, fmt=F16) == 64 * 4096
    assert kv_bytes(PLAIN, n_tokens=100, chunk=512, fmt=F16) == 128 * 4096


def test_one_tensor_for_k_and_v_holds_v_and_the_turned_part_of_k() -> None:
    """512 + 128 values instead of 1024: 37.5 % less on every full layer of gemma-4-31b."""
    assert (k_values(ONE), v_values(ONE)) == (640, 0)
    assert kv_bytes(ONE, n_tokens=64, chunk=1, fmt=F16) == 64 * 4 * 640 * 2
    assert kv_bytes(ONE, n_tokens=64, chunk=1, fmt=Q8) == 64 * 4 * (640 // 32) * 34


def test_v_alone_is_half_of_two_tensors() -> None:
    """And q8_0 of V alone, 544 bytes a head, is less than q4_0 of K and V: 576."""
    alone = laid_out(catalogue.spec("gemma-4-31b"), "v").layers[5]

    assert (k_values(alone), v_values(alone), turned_pairs(alone)) == (512, 0, 64)
    assert q_values(alone) == q_values(ONE) == 640  # the query is the same
    assert kv_bytes(alone, n_tokens=64, chunk=1, fmt=F16) * 2 == 64 * 4 * 2 * 512 * 2
    assert kv_bytes(alone, n_tokens=64, chunk=1, fmt=Q8) == 64 * 4 * 544 < 64 * 4 * 2 * Q4.row_bytes(512)
    assert turned_pairs(replace(alone, rope=None)) == turned_pairs(ONE) == 0


def test_a_layout_that_no_layer_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown KV layout 'k'"):
        laid_out(catalogue.spec("gemma-4-31b"), "k")
    with pytest.raises(UsageError, match="--kv-layout v says nothing of qwen3-8b"):
        laid_out(catalogue.spec("qwen3-8b"), "v")
    sliding = laid_out(catalogue.spec("gemma-4-31b"), "v").layers[0]
    assert sliding == RING


@pytest.mark.parametrize(("partial", "tail"), [(0.0, 0), (1 / 256, 32), (0.0625, 32), (0.0703125, 64), (0.25, 128), (1.0, 512)])
def test_the_turned_part_is_padded_to_whole_blocks(partial: float, tail: int) -> None:
    """2, 32 and 36 turned dims of 512: blocks of 32 for every format, so that a format never decides the layout."""
    assert k_values(replace(ONE, rope=proportional_rope(512, 1e6, partial=partial))) == 512 + tail


def test_a_layer_that_does_not_turn_at_all_needs_no_turned_part() -> None:
    """K = w * V then, and w is folded into the query."""
    assert k_values(replace(ONE, rope=None)) == 512


@pytest.mark.parametrize(("n", "slots"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128), (100, 128), (131_072, 131_072)])
def test_a_global_layer_holds_whole_pages(n: int, slots: int) -> None:
    """What is planned is what is allocated, and pages are allocated whole."""
    assert kv_slots(PLAIN, n_tokens=n, chunk=512) == slots


@pytest.mark.parametrize(
    ("n", "chunk", "slots"),
    [
        (0, 512, 0), (1, 512, 64), (1000, 512, 1024), (1544, 512, 1544), (1536, 512, 1536), (1537, 512, 1544),
        (131_072, 512, 1024 + 512 + 8), (131_072, 1, 1024 + 1 + 8), (257, 100_000, 320),
    ],
)  # fmt: skip
def test_a_ring_stops_growing_at_its_window_a_chunk_and_a_draft(n: int, chunk: int, slots: int) -> None:
    """The window alone is overwritten by the chunk whose first query still needs it."""
    assert (PAGE_TOKENS, DRAFT_TOKENS) == (64, 8)  # the numbers above
    assert kv_slots(RING, n_tokens=n, chunk=chunk) == slots


def test_a_layer_that_reads_another_s_cache_holds_nothing_and_reads_all() -> None:
    """E2B: 20 of 35 layers; charged for both, its cache is 2.3 times what is held. Each decode step still reads it."""
    assert SHARED.kv_source == 14
    assert kv_slots(SHARED, n_tokens=5000, chunk=512) == 0
    assert kv_bytes(SHARED, n_tokens=5000, chunk=512, fmt=F16) == 0
    assert kv_read_bytes(SHARED, position=4999, fmt=F16) == 5000 * 2 * 512 * 2


@pytest.mark.parametrize(("position", "keys"), [(0, 1), (1022, 1023), (1023, 1024), (1024, 1024), (10**6, 1024)])
def test_a_decode_step_reads_the_keys_it_sees(position: int, keys: int) -> None:
    """At position p there are p + 1 keys, and a window of W shows at most W: off by one moves the predicted speed."""
    assert kv_read_bytes(RING, position=position, fmt=F16) == keys * 16 * 2 * 256 * 2
    assert kv_read_bytes(ONE, position=position, fmt=F16) == (position + 1) * 4 * 640 * 2


def test_a_head_that_blocks_do_not_divide_is_refused_with_both_numbers() -> None:
    """Phi's heads of 80 in Q8_0: 2.5 blocks."""
    layer = replace(PLAIN, index=7, head_dim=80)

    with pytest.raises(UsageError, match="KV type q8_0 does not fit layer 7") as caught:
        check_format(layer, Q8)

    assert "blocks of 32" in caught.value.why and "80 values" in caught.value.why
    check_format(layer, kv_format("f16"))  # the advice
    with pytest.raises(UsageError, match="q4_0 does not fit layer 7"):
        check_format(replace(layer, k_eq_v=True, rope=None), Q4)  # no second tensor, and the first does not fit
    with pytest.raises(ValueError, match="80 values"):
        kv_bytes(layer, n_tokens=1, chunk=1, fmt=Q8)


@pytest.mark.parametrize("fmt", KV_FORMATS.values(), ids=list(KV_FORMATS))
def test_every_format_fits_every_layer_of_the_catalogue(fmt: KVFormat) -> None:
    """Heads of 64, 128, 256, 512 and the 640 of one tensor are whole blocks of all."""
    for spec in catalogue.specs().values():
        for layer in spec.layers:
            check_format(layer, fmt)


ABSURD = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 63, 64, 65, 2**31, 2**63, 2**64])
LAYERS = st.sampled_from([PLAIN, ONE, RING, SHARED])
FORMATS = st.sampled_from(list(KV_FORMATS.values()))


@given(LAYERS, ABSURD, ABSURD, FORMATS)
def test_any_whole_number_has_an_exact_size_or_is_refused(layer: LayerSpec, n: int, chunk: int, fmt: KVFormat) -> None:
    """A negative count came back as negative bytes, which always fit."""
    if n < 0 or chunk <= 0:
        with pytest.raises(ValueError, match="kv_slots"):
            kv_bytes(layer, n_tokens=n, chunk=chunk, fmt=fmt)
        return
    slots, size = kv_slots(layer, n_tokens=n, chunk=chunk), kv_bytes(layer, n_tokens=n, chunk=chunk, fmt=fmt)
    assert type(size) is int and 0 <= size == slots * size // max(slots, 1)
    if layer.kv_source is None:
        assert slots >= min(n, chunk + (layer.window or n))  # room for all that a chunk's last query sees
        assert slots < n + PAGE_TOKENS


@given(LAYERS, st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 2**20), st.integers(1, 2**20), FORMATS)
def test_more_tokens_or_a_longer_chunk_never_take_less(
    layer: LayerSpec, a: int, b: int, chunk_a: int, chunk_b: int, fmt: KVFormat
) -> None:
    """The longest context that fits is found by halving, which needs this."""
    small = kv_bytes(layer, n_tokens=min(a, b), chunk=min(chunk_a, chunk_b), fmt=fmt)

    assert small <= kv_bytes(layer, n_tokens=max(a, b), chunk=max(chunk_a, chunk_b), fmt=fmt)


@given(st.integers(-(2**70), -1), FORMATS)
def test_a_position_before_the_first_is_refused(position: int, fmt: KVFormat) -> None:
    """-2 read minus one key, and the predicted speed was above the bandwidth."""
    with pytest.raises(ValueError, match="position"):
        kv_read_bytes(PLAIN, position=position, fmt=fmt)
