import json
import math
from pathlib import Path
from typing import Any

import pytest

from headwise.errors import SpecError
from headwise.spec.hf import read_hf, spec_from_config
from headwise.spec.layers import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
GEMMA4_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
MOE = {"num_experts": 7, "moe_intermediate_size": 24}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4": SIZES
    | {
        "model_type": "gemma4_text", "global_head_dim": 32, "num_attention_heads": 4, "sliding_window": 13,
        "layer_types": [SLIDING, FULL] * 2, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90, "enable_moe_block": True,
        "top_k_experts": 3, "rope_parameters": GEMMA4_ROPES, "final_logit_softcapping": 30.0,
    }
    | MOE,
    "gemma3": SIZES
    | {
        "model_type": "gemma3_text", "sliding_window": 13, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attn_logit_softcapping": 50.0,
    },
    "exaone4": SIZES
    | {
        "model_type": "exaone4", "hidden_act": "silu", "sliding_window": 13, "sliding_window_pattern": "LLLG",
        "rope_theta": 1_000_000.0, "rope_scaling": LLAMA3,
    },
    "qwen3": SIZES
    | {
        "model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": True, "sliding_window": 13,
        "max_window_layers": 3, "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
    },
    "qwen3_moe": SIZES
    | {
        "model_type": "qwen3_moe", "hidden_act": "silu", "num_experts_per_tok": 2, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "rope_theta": 1_000_000.0,
    }
    | MOE,
    "llama": SIZES | {"model_type": "llama", "hidden_act": "silu", "rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "mistral": SIZES | {"model_type": "mistral", "hidden_act": "silu", "rope_theta": 1e9, "sliding_window": None},
    "gpt_oss": SIZES
    | {
        "model_type": "gpt_oss", "hidden_act": "silu", "sliding_window": 13, "num_local_experts": 5,
        "num_experts_per_tok": 2, "rope_theta": 150_000, "rope_scaling": YARN, "swiglu_limit": 7.0,
    },
}  # fmt: skip


def read(config: dict[str, Any], **more: Any) -> ModelSpec:
    return spec_from_config(config, name="m", **more)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# every family


def test_every_family_reads_its_config_and_keeps_its_shape(family: str) -> None:
    """A family in the table that its own reader refuses."""
    spec = read(CONFIGS[family])

    assert spec.family == family
    assert (len(spec.layers), spec.hidden, spec.vocab_size, spec.max_context, spec.rms_eps) == (4, 48, 100, 512, 1e-5)
    assert [layer.index for layer in spec.layers] == [0, 1, 2, 3]
    assert all(layer.rope is None or len(layer.rope.inv_freq) == layer.head_dim // 2 for layer in spec.layers)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings",
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrong", [-1, 0, "8", 2**40, [8], {"a": 8}, True], ids=str)
def test_a_bad_size_is_refused_by_its_name(family: str, key: str, wrong: object) -> None:
    """A negative or huge size went on until something else broke, far from the file."""
    with pytest.raises(SpecError) as caught:
        read(CONFIGS[family] | {key: wrong})

    assert key in caught.value.what
    assert caught.value.do


@pytest.mark.parametrize("wrong", [-1e-6, 0, "1e-6", True, [1e-6]], ids=str)
def test_a_bad_epsilon_is_refused_by_its_name(family: str, wrong: object) -> None:
    """A negative epsilon takes the root of a negative number, now and then."""
    with pytest.raises(SpecError, match="rms_norm_eps"):
        read(CONFIGS[family] | {"rms_norm_eps": wrong})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_size_is_an_error_that_names_it(family: str, key: str) -> None:
    """Class defaults would have filled a damaged config with the sizes of another model."""
    with pytest.raises(SpecError, match=f"{key} is missing"):
        read(without(CONFIGS[family], key))


def test_a_huge_head_is_refused_before_its_rope_is_built(family: str) -> None:
    """head_dim 2**31 - 1 asked for 2**30 frequencies and the machine ran out of memory."""
    for key in ("head_dim", "global_head_dim") if family == "gemma4" else ("head_dim",):
        with pytest.raises(SpecError, match=key):
            read(CONFIGS[family] | {key: 2**31 - 2})
    with pytest.raises(SpecError, match="head_dim"):
        read(CONFIGS[family] | {"head_dim": None, "hidden_size": 2**31 - 2, "num_attention_heads": 1, "num_key_value_heads": 1})


def test_an_unknown_key_is_an_error_until_it_is_ignored(family: str) -> None:
    """mlx-lm drops what it does not know; a new key that changes the maths would have run as another model."""
    config = CONFIGS[family] | {"residual_multiplier": 0.5}

    with pytest.raises(SpecError) as caught:
        read(config)

    assert "residual_multiplier" in caught.value.what and "0.5" in caught.value.what
    assert "--ignore-key residual_multiplier" in caught.value.do
    assert read(config, ignore_keys=("residual_multiplier",)) == read(CONFIGS[family])


def test_an_unknown_key_beside_the_rope_is_an_error_until_it_is_ignored() -> None:
    """The key lies one level down, where --ignore-key did not reach."""
    config = CONFIGS["llama"] | {"rope_scaling": LLAMA3 | {"attn_temperature": 0.1}}

    with pytest.raises(SpecError, match="rope_scaling: key 'attn_temperature'"):
        read(config)

    assert read(config, ignore_keys=("attn_temperature",)) == read(CONFIGS["llama"])


def test_bookkeeping_keys_change_nothing(family: str) -> None:
    """A config straight from save_pretrained was refused for `torch_dtype`."""
    extra = {
        "torch_dtype": "bfloat16", "transformers_version": "5.0.0", "architectures": ["X"], "use_cache": True,
        "initializer_range": 0.02, "pad_token_id": 0, "attention_dropout": 0.0, "cache_implementation": "hybrid",
        "some_null": None,
    }  # fmt: skip

    assert read(CONFIGS[family] | extra) == read(CONFIGS[family])


def test_text_values_inside_text_config_read_as_at_the_top(family: str) -> None:
    """The multimodal form of the same model must be the same model."""
    inside = {"model_type": "a_wrapper", "text_config": CONFIGS[family], "vision_config": {"hidden_size": 3}, "image_token_id": 5}

    assert read(inside) == read(CONFIGS[family])


def test_an_unknown_key_beside_text_config_is_an_error() -> None:
    """A wrapper can change the text model too."""
    with pytest.raises(SpecError, match="logit_scale"):
        read({"text_config": CONFIGS["llama"], "logit_scale": 0.5})


def test_end_tokens_of_the_wrapper_count_too() -> None:
    """gemma-3-4b ends a turn with 106, which only the outer config names; replies never stopped."""
    spec = read({"text_config": CONFIGS["gemma3"] | {"eos_token_id": 1}, "eos_token_id": [1, 106]})

    assert spec.eos_ids == (1, 106)


@pytest.mark.parametrize("tied", [True, False])
def test_tie_word_embeddings_of_the_wrapper_holds_where_the_text_says_nothing(tied: bool) -> None:
    """Mistral 3 and Gemma 3 write it on the outside only; a head that is not in the file was looked for."""
    for text in (CONFIGS["mistral"], CONFIGS["gemma3"]):
        assert read({"text_config": text, "tie_word_embeddings": tied}).tied is tied


@pytest.mark.parametrize("family_name", [None, "gemma5", "", 3, ["llama"], "x" * 500])
def test_an_unknown_model_type_lists_the_known_ones(family_name: object) -> None:
    """An unhashable model_type was a TypeError."""
    with pytest.raises(SpecError) as caught:
        read({"model_type": family_name})

    assert "is not supported" in caught.value.what and len(caught.value.what) < 140
    assert "gemma4" in caught.value.do and "gpt_oss" in caught.value.do


@pytest.mark.parametrize("place", ["top", "inside", "beside"])
def test_weights_packed_by_another_tool_are_refused_by_their_format(place: str) -> None:
    """AWQ weights would have been looked up under names that are not there."""
    quant = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {
        "top": CONFIGS["llama"] | quant,
        "inside": {"text_config": CONFIGS["llama"] | quant},
        "beside": {"text_config": CONFIGS["llama"], **quant},
    }[place]

    with pytest.raises(SpecError, match="'awq'"):
        read(config)


def test_mxfp4_weights_are_read() -> None:
    """gpt-oss is published so."""
    quant = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}

    assert read(CONFIGS["gpt_oss"] | quant) == read(CONFIGS["gpt_oss"])


@pytest.mark.parametrize("types", [[SLIDING] * 3, [SLIDING] * 5, [SLIDING, FULL, "linear_attention", FULL], SLIDING, [1, 2, 3, 4]])
@pytest.mark.parametrize("name", ["gemma4", "gemma3", "exaone4", "qwen3", "gpt_oss"])
def test_a_wrong_list_of_layer_types_is_refused(name: str, types: object) -> None:
    """A list one short, or a kind of attention that is not built here."""
    with pytest.raises(SpecError, match="layer_types"):
        read(CONFIGS[name] | {"layer_types": types})


def test_an_activation_without_maths_here_is_refused(family: str) -> None:
    """Anything but SiLU became tanh-GELU or the other way about."""
    key = "hidden_activation" if family.startswith("gemma") else "hidden_act"

    with pytest.raises(SpecError, match=key):
        read(CONFIGS[family] | {key: "relu2"})


def test_query_heads_are_a_multiple_of_kv_heads() -> None:
    """5 heads over 2 KV heads have no grouping."""
    with pytest.raises(SpecError, match="5 query heads for 2 KV heads"):
        read(CONFIGS["llama"] | {"num_attention_heads": 5})


def test_an_odd_head_is_refused() -> None:
    """Rotary pairs of 15 dims leave one over."""
    with pytest.raises(SpecError, match="head_dim 15"):
        read(CONFIGS["llama"] | {"head_dim": 15})


# rope


def inv_freq(config: dict[str, Any], layer: int = 0) -> tuple[float, ...]:
    rope = read(config).layers[layer].rope
    assert rope is not None
    return rope.inv_freq


def test_old_and_new_spelling_of_one_rope_are_one_rope() -> None:
    """transformers 5 renamed rope_scaling to rope_parameters and moved theta into it."""
    old = CONFIGS["llama"]
    new = without(old, "rope_theta", "rope_scaling") | {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}}
    oldest = old | {"rope_scaling": {"type": "llama3"} | without(LLAMA3, "rope_type")}

    assert read(old) == read(new) == read(oldest)


def test_theta_inside_rope_parameters_wins_over_the_top() -> None:
    """Both are in configs that transformers saved again."""
    config = without(CONFIGS["qwen3"], "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}

    assert read(config | {"rope_theta": 5.0}) == read(CONFIGS["qwen3"])


def test_theta_alone_gives_the_plain_frequencies() -> None:
    """theta ** (-2 i / head_dim), 16 dims."""
    assert inv_freq(CONFIGS["qwen3"]) == pytest.approx([10 ** (-6 * i / 8) for i in range(8)])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_ropes_that_differ_are_refused(name: str) -> None:
    """One of them was dropped in silence."""
    nested = {SLIDING: {"rope_type": "default"}, FULL: {"rope_type": "default"}}
    given = {"rope_parameters": nested if name == "gemma3" else {"rope_type": "default"}}

    with pytest.raises(SpecError, match="rope_parameters and rope_scaling"):
        read(CONFIGS[name] | given)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", 3, None, ["yarn"], "x" * 500])
def test_a_rope_without_maths_here_is_refused(kind: object) -> None:
    """Unknown scaling fell back to plain frequencies and the model drifted after 8k tokens."""
    config = CONFIGS["llama"] | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}

    with pytest.raises(SpecError) as caught:
        read(config)

    assert ("rope_type" in caught.value.what) or (kind is None and "factor" in caught.value.what)
    assert len(caught.value.what) < 140


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "8"},
        without(LLAMA3, "low_freq_factor"), without(LLAMA3, "high_freq_factor"), LLAMA3 | {"factor": -1.0},
        LLAMA3 | {"original_max_position_embeddings": 0}, YARN | {"beta_fast": float("nan")},
        YARN | {"truncate": 1}, YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}, {"rope_theta": 1.0}, {"rope_theta": 0},
        {"rope_theta": float("inf")}, {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)  # fmt: skip
def test_a_bad_rope_names_its_key(rope: dict[str, Any]) -> None:
    """theta = 1 divided by zero inside YaRN; a partial rope was taken for a whole one."""
    with pytest.raises(SpecError) as caught:
        read(CONFIGS["llama"] | {"rope_scaling": rope})

    assert "rope_scaling" in caught.value.what


@pytest.mark.parametrize("name", ["gemma4", "gemma3"])
def test_a_rope_for_a_third_kind_of_layer_is_refused(name: str) -> None:
    """Nobody would have read it."""
    ropes = GEMMA4_ROPES if name == "gemma4" else {FULL: {"rope_type": "default"}}
    config = without(CONFIGS[name], "rope_scaling") | {"rope_parameters": ropes | {"chunked_attention": {"rope_theta": 5.0}}}

    with pytest.raises(SpecError, match="chunked_attention"):
        read(config)


def test_a_partial_rope_at_the_top_is_refused() -> None:
    """partial_rotary_factor beside rope_theta (Phi, GLM) is no key of the families here."""
    with pytest.raises(SpecError, match="partial_rotary_factor"):
        read(CONFIGS["llama"] | {"partial_rotary_factor": 0.5})


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_a_partial_rope_of_the_whole_head_is_a_whole_rope(rope: dict[str, Any]) -> None:
    """Converters write partial_rotary_factor 1.0 beside every rope; it was an unknown key."""
    config = CONFIGS["llama"]

    assert read(config | {"rope_scaling": rope | {"partial_rotary_factor": 1.0}}) == read(config | {"rope_scaling": rope})


def test_linear_scaling_divides_every_frequency() -> None:
    """Gemma 3's full layers: factor 8."""
    assert inv_freq(CONFIGS["gemma3"], 1) == pytest.approx([10 ** (-6 * i / 8) / 8 for i in range(8)])


def test_llama3_scaling_keeps_short_waves_and_divides_long_ones() -> None:
    """Original context 64: a wave under 16 tokens is kept, one over 64 divided by 8."""
    plain = [500_000 ** (-2 * i / 16) for i in range(8)]
    scaled = inv_freq(CONFIGS["llama"])

    waves = [2 * math.pi / f for f in plain]
    assert all(got == f for got, f, wave in zip(scaled, plain, waves, strict=True) if wave < 16)
    assert all(got == pytest.approx(f / 8) for got, f, wave in zip(scaled, plain, waves, strict=True) if wave > 64)
    assert any(wave < 16 for wave in waves) and any(wave > 64 for wave in waves)


def test_llama3_scaling_without_its_original_context_takes_the_context() -> None:
    """transformers fills it in with max_position_embeddings."""
    assert inv_freq(CONFIGS["llama"] | {"rope_scaling": without(LLAMA3, "original_max_position_embeddings")}) == inv_freq(
        CONFIGS["llama"] | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}}
    )


@pytest.mark.parametrize(
    ("more", "magnitude"),
    [
        ({}, 0.1 * math.log(32) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),  # they cancel
        ({"mscale": 1.0}, 0.1 * math.log(32) + 1),  # one alone counts for nothing
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_scales_the_logits_as_its_keys_say(more: dict[str, float], magnitude: float) -> None:
    """mscale = mscale_all_dim = 1 means 1, not 1.35."""
    rope = read(CONFIGS["gpt_oss"] | {"rope_scaling": YARN | more}).layers[0].rope

    assert rope is not None and rope.magnitude == pytest.approx(magnitude)


# one family at a time


def test_gemma4_reads_both_forms_of_its_global_heads() -> None:
    """transformers 5.23 saves global_head_dim again as per_layer_config, one entry per full layer."""
    plain = CONFIGS["gemma4"]
    saved = without(plain, "global_head_dim", "num_global_key_value_heads") | {
        "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}, "3": {"head_dim": 32, "num_key_value_heads": 1}}
    }

    assert read(saved) == read(plain)
    assert [(layer.head_dim, layer.n_kv_heads) for layer in read(plain).layers] == [(16, 2), (32, 1)] * 2


@pytest.mark.parametrize(
    "wrong",
    [{"9": {"head_dim": 32}}, {"1": {"head_dims": 32}}, {"1": 32}, [], {"1": {"head_dim": -1}}, {"1": {"num_key_value_heads": 3}}],
    ids=str,
)
def test_gemma4_refuses_a_wrong_override(wrong: object) -> None:
    """An override of a layer that does not exist was ignored."""
    with pytest.raises(SpecError):
        read(CONFIGS["gemma4"] | {"per_layer_config": wrong})


@pytest.mark.parametrize("dim", [0, 8])
def test_gemma4_counts_a_per_layer_vocabulary_only_where_there_are_per_layer_embeddings(dim: int) -> None:
    """The 12B writes 0 for both; 0 rows for embeddings that are there is a damaged file."""
    config = CONFIGS["gemma4"] | {"hidden_size_per_layer_input": dim, "vocab_size_per_layer_input": 0}

    if dim:
        with pytest.raises(SpecError, match="vocab_size_per_layer_input = 0"):
            read(config)
    else:
        assert read(config).ple is None


def test_gemma4_builds_a_rope_for_each_size_of_head() -> None:
    """Two full layers of different head sizes got the rope of the last one."""
    spec = read(CONFIGS["gemma4"] | {"per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 32}}})

    assert [len(layer.rope.inv_freq) for layer in spec.layers if layer.rope] == [8, 32, 8, 16]


def test_gemma4_global_layers_project_k_and_v_as_one_and_the_others_do_not() -> None:
    """K = V is a matter of full layers; sliding ones have their own V."""
    spec = read(CONFIGS["gemma4"])

    assert [layer.k_eq_v for layer in spec.layers] == [False, True, False, True]
    assert all(layer.scale == 1.0 and layer.qk_norm and layer.v_norm for layer in spec.layers)
    assert not any(layer.k_eq_v for layer in read(CONFIGS["gemma4"] | {"attention_k_eq_v": False}).layers)


def test_gemma4_global_kv_heads_count_only_with_k_eq_v() -> None:
    """E2B writes null there; a value without attention_k_eq_v is not used by transformers either."""
    spec = read(CONFIGS["gemma4"] | {"attention_k_eq_v": False})

    assert [layer.n_kv_heads for layer in spec.layers] == [2, 2, 2, 2]


def test_gemma4_global_ropes_turn_a_quarter_of_the_head() -> None:
    """32 dims, a quarter: 8 dims in 4 pairs, with the exponent of all 32."""
    rope = read(CONFIGS["gemma4"]).layers[1].rope

    assert rope is not None and rope.rotated_dims == 8
    assert rope.inv_freq == pytest.approx([10 ** (-6 * i / 16) for i in range(4)] + [0.0] * 12)


def test_gemma4_shares_the_last_cache_of_each_kind() -> None:
    """Of 10 layers the last 5 own nothing: 5-8 read layer 3, and 9 reads layer 4."""
    spec = read(
        CONFIGS["gemma4"]
        | {
            "num_hidden_layers": 10,
            "layer_types": ([SLIDING] * 4 + [FULL]) * 2,
            "num_kv_shared_layers": 5,
            "use_double_wide_mlp": True,
            "attention_k_eq_v": False,
        }
    )

    assert [layer.kv_source for layer in spec.layers] == [None] * 5 + [3, 3, 3, 3, 4]
    assert [layer.mlp.width for layer in spec.layers] == [80] * 5 + [160] * 5
    assert [layer.index for layer in spec.kv_layers] == [0, 1, 2, 3, 4]


def test_gemma4_sharing_with_no_owner_is_refused() -> None:
    """The only full layers share; nobody holds what they read."""
    types = [SLIDING, SLIDING, FULL, FULL]

    with pytest.raises(SpecError, match="layer 2 shares the cache of a full_attention layer"):
        read(CONFIGS["gemma4"] | {"layer_types": types, "num_kv_shared_layers": 2})
    with pytest.raises(SpecError, match="num_kv_shared_layers"):
        read(CONFIGS["gemma4"] | {"num_kv_shared_layers": 4})


def test_gemma4_forces_its_last_layer_to_full() -> None:
    """transformers does, with a warning; five to one where no list is given."""
    listed = read(CONFIGS["gemma4"] | {"layer_types": [FULL, SLIDING, SLIDING, SLIDING]})
    by_rule = read(without(CONFIGS["gemma4"], "layer_types") | {"num_hidden_layers": 8})

    assert [layer.kind for layer in listed.layers] == ["global", "sliding", "sliding", "global"]
    assert [layer.index for layer in by_rule.of_kind("global")] == [5, 7]


def test_gemma4_experts_stand_beside_the_dense_mlp() -> None:
    """26B-A4B has both in every layer, and its embeddings are scaled by sqrt(hidden)."""
    spec = read(CONFIGS["gemma4"])
    moe = spec.layers[0].mlp.moe

    assert moe is not None and (moe.n_experts, moe.n_active, moe.width, moe.beside_dense) == (7, 3, 24, True)
    assert spec.layers[0].mlp.width == 80
    assert spec.embed_scale == pytest.approx(48**0.5)
    assert spec.ple is not None and (spec.ple.dim, spec.ple.vocab_size) == (8, 90)
    assert spec.tied and spec.layer_scalar and spec.norms == "sandwich" and spec.final_softcap == 30.0


def test_gemma4_without_experts_skips_their_keys() -> None:
    """The dense sizes carry the keys of the experts, mostly as null."""
    spec = read(CONFIGS["gemma4"] | {"enable_moe_block": False})

    assert spec.layers[0].mlp.moe is None


def test_gemma4_that_looks_both_ways_is_refused() -> None:
    """use_bidirectional_attention "all" is an encoder; "vision" leaves text causal."""
    assert read(CONFIGS["gemma4"] | {"use_bidirectional_attention": "vision"}) == read(CONFIGS["gemma4"])
    with pytest.raises(SpecError, match="use_bidirectional_attention"):
        read(CONFIGS["gemma4"] | {"use_bidirectional_attention": "all"})


def test_gemma4_more_active_experts_than_there_are_is_refused() -> None:
    """top-8 of 7."""
    with pytest.raises(SpecError, match="top_k_experts"):
        read(CONFIGS["gemma4"] | {"top_k_experts": 8})


def test_gemma4_without_ropes_takes_its_own() -> None:
    """An absent rope_parameters means theta 1e4 and 1e6, a quarter of the full head."""
    assert read(without(CONFIGS["gemma4"], "rope_parameters")) == read(CONFIGS["gemma4"])


def test_the_12b_has_no_per_layer_embeddings_unless_it_says_so() -> None:
    """gemma4_unified_text has no such key; the default of its sibling family would add 2.3 B parameters."""
    text = without(CONFIGS["gemma4"], "hidden_size_per_layer_input", "vocab_size_per_layer_input")

    assert read(text | {"model_type": "gemma4_unified_text"}).ple is None
    assert read(text).ple is not None


def test_gemma3_reads_a_config_that_leaves_out_its_defaults() -> None:
    """google/gemma-3-4b-it: heads, head size and activation are the defaults of its class, and absent."""
    spec = read(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
            "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        }
    )  # fmt: skip

    layer = spec.layers[0]
    assert (layer.n_heads, layer.n_kv_heads, layer.head_dim, layer.mlp.activation) == (8, 4, 256, "gelu_tanh")
    assert (spec.vocab_size, spec.max_context, spec.tied, spec.bos_id) == (262_208, 131_072, True, 2)
    assert layer.scale == 256**-0.5
    assert len(spec.of_kind("global")) == 5


def test_gemma3_that_looks_both_ways_is_refused() -> None:
    """EmbeddingGemma is a gemma3_text with use_bidirectional_attention true: an encoder, which would have talked."""
    assert read(CONFIGS["gemma3"] | {"use_bidirectional_attention": False}) == read(CONFIGS["gemma3"])
    with pytest.raises(SpecError, match="use_bidirectional_attention = True"):
        read(CONFIGS["gemma3"] | {"use_bidirectional_attention": True})


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
@pytest.mark.parametrize("wrong", [-30.0, 0, "30", True, float("nan")])
def test_a_softcap_of_the_logits_is_a_positive_number(name: str, wrong: object) -> None:
    """0 divides by zero; NaN makes every token the first."""
    assert read(CONFIGS[name] | {"final_logit_softcapping": 20.0}).final_softcap == 20.0
    assert read(CONFIGS[name] | {"final_logit_softcapping": None}).final_softcap is None
    with pytest.raises(SpecError, match="final_logit_softcapping"):
        read(CONFIGS[name] | {"final_logit_softcapping": wrong})


def test_gemma3_old_and_new_ropes_are_one() -> None:
    """rope_local_base_freq became a rope of its own."""
    new = without(CONFIGS["gemma3"], "rope_theta", "rope_local_base_freq", "rope_scaling") | {
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        }
    }

    assert read(new) == read(CONFIGS["gemma3"])


def test_gemma3_keeps_scale_and_softcap_apart() -> None:
    """query_pre_attn_scalar is not head_dim in the 27B."""
    layer = read(CONFIGS["gemma3"]).layers[0]

    assert (layer.scale, layer.softcap, layer.window) == (24**-0.5, 50.0, 13)
    assert [x.kind for x in read(CONFIGS["gemma3"]).layers] == ["sliding", "global"] * 2


def test_exaone4_full_layers_have_no_rope_where_there_is_a_window() -> None:
    """The 32B; the 1.2B has no window and turns everywhere."""
    hybrid, plain = read(CONFIGS["exaone4"]), read(CONFIGS["exaone4"] | {"sliding_window": None, "sliding_window_pattern": None})

    assert [layer.rope is None for layer in hybrid.layers] == [False, False, False, True]
    assert [layer.window for layer in hybrid.layers] == [13, 13, 13, None]
    assert all(layer.rope is not None and layer.window is None for layer in plain.layers)
    assert hybrid.norms == "post" and all(layer.qk_norm for layer in hybrid.layers)


@pytest.mark.parametrize(
    ("pattern", "n", "full"), [("LLLG", 6, [3, 5]), (4, 8, [3, 7]), (3, 7, [2, 5]), (None, 8, [3, 7]), ("LG", 4, [1, 3])]
)
def test_exaone4_patterns_place_the_full_layers(pattern: object, n: int, full: list[int]) -> None:
    """A string ends with a full layer whatever its letters say; a number counts; absent is 4."""
    spec = read(CONFIGS["exaone4"] | {"sliding_window_pattern": pattern, "num_hidden_layers": n})

    assert [layer.index for layer in spec.of_kind("global")] == full


@pytest.mark.parametrize("pattern", ["", "LLXG", "lllg", -1, 0, 2.5, []])
def test_exaone4_refuses_a_pattern_it_cannot_place(pattern: object) -> None:
    """Every letter but G counted as local."""
    with pytest.raises(SpecError, match="sliding_window_pattern"):
        read(CONFIGS["exaone4"] | {"sliding_window_pattern": pattern})


def test_qwen3_uses_its_window_only_where_it_says_so() -> None:
    """sliding_window 4096 with use_sliding_window false is in published configs, and was refused as unknown."""
    on = read(CONFIGS["qwen3"])
    off = read(CONFIGS["qwen3"] | {"use_sliding_window": False})

    assert [layer.window for layer in on.layers] == [None, None, None, 13]
    assert all(layer.window is None for layer in off.layers)


def test_qwen3_head_is_128_where_no_key_says_otherwise() -> None:
    """hidden / heads is 8 here; the class says 128."""
    assert read(without(CONFIGS["qwen3"], "head_dim")).layers[0].head_dim == 128


def test_qwen3_moe_places_its_dense_layers() -> None:
    """Every second layer has experts, and layer 3 is dense by name."""
    spec = read(CONFIGS["qwen3_moe"])

    assert [layer.mlp.moe is not None for layer in spec.layers] == [False, True, False, False]
    assert [layer.mlp.width for layer in spec.layers] == [80, 0, 80, 80]
    moe = spec.layers[1].mlp.moe
    assert moe is not None and (moe.selection, moe.renormalise, moe.n_active) == ("softmax_topk", True, 2)


def test_qwen3_moe_reads_both_names_of_its_experts() -> None:
    """transformers 5 writes num_local_experts."""
    config = without(CONFIGS["qwen3_moe"], "num_experts") | {"num_local_experts": 7}

    assert read(config) == read(CONFIGS["qwen3_moe"])
    with pytest.raises(SpecError, match="num_experts is missing"):
        read(without(CONFIGS["qwen3_moe"], "num_experts"))


def test_llama_biases_are_its_own_to_choose() -> None:
    """attention_bias covers q, k, v and o; mlp_bias the MLP."""
    layer = read(CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True}).layers[0]

    assert layer.qkv_bias and layer.o_bias and layer.mlp.bias
    plain = read(CONFIGS["llama"]).layers[0]
    assert not (plain.qkv_bias or plain.o_bias or plain.mlp.bias or plain.qk_norm)


def test_llama_without_kv_heads_has_as_many_as_query_heads() -> None:
    """Llama 2 7B writes none."""
    assert read(without(CONFIGS["llama"], "num_key_value_heads")).layers[0].n_kv_heads == 6


def test_llama_without_a_head_size_divides_its_width() -> None:
    """Llama 3 8B: 4096 / 32."""
    assert read(without(CONFIGS["llama"], "head_dim")).layers[0].head_dim == 8


@pytest.mark.parametrize(("given", "window"), [({"sliding_window": 9}, 9), ({"sliding_window": None}, None), ({}, 4096)])
def test_mistral_window_is_null_a_number_or_the_default(given: dict[str, Any], window: int | None) -> None:
    """Absent is 4,096 (Mistral 7B v0.1), and null is none."""
    spec = read(without(CONFIGS["mistral"], "sliding_window") | given)

    assert {layer.window for layer in spec.layers} == {window}


def test_gpt_oss_has_sinks_biases_and_alternating_windows() -> None:
    """Each is silent when wrong: the text is fluent, and worse."""
    spec = read(CONFIGS["gpt_oss"])
    moe = spec.layers[0].mlp.moe

    assert [layer.window for layer in spec.layers] == [13, None, 13, None]
    assert all(layer.sinks and layer.qkv_bias and layer.o_bias for layer in spec.layers)
    assert moe is not None and (moe.selection, moe.bias, moe.activation, moe.width) == ("topk_softmax", True, "swiglu_clamped", 80)
    assert spec.layers[0].mlp.width == 0 and not spec.tied


@pytest.mark.parametrize(("key", "value"), [("swiglu_limit", 9.0), ("swiglu_alpha", 1.0), ("num_experts_per_tok", 6)])
def test_gpt_oss_refuses_what_its_activation_does_not_do(key: str, value: float) -> None:
    """alpha and limit are constants of the kernel."""
    with pytest.raises(SpecError, match=key):
        read(CONFIGS["gpt_oss"] | {key: value})


# files


def test_a_folder_gives_the_spec_its_name(tmp_path: Path) -> None:
    """The name in every table is the folder's."""
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))

    assert read_hf(folder).name == "my-llama"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b'{"vocab_size": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["empty", "cut", "list", "utf-16", "null", "5000 digits", "deep"],
)
def test_a_damaged_config_file_is_named(tmp_path: Path, content: bytes) -> None:
    """A number of 5,000 digits is a plain ValueError, and deep nesting a RecursionError."""
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(SpecError) as caught:
        read_hf(tmp_path)

    assert "config.json" in caught.value.what


def test_a_folder_without_a_config_says_what_one_would_hold(tmp_path: Path) -> None:
    """A folder of GGUF files was called damaged."""
    with pytest.raises(SpecError, match=r"has no config\.json"):
        read_hf(tmp_path)


def test_a_config_that_is_a_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    """IsADirectoryError reached the terminal."""
    (tmp_path / "config.json").mkdir()

    with pytest.raises(SpecError, match="cannot be read"):
        read_hf(tmp_path)


def test_a_config_that_may_not_be_read_is_no_damaged_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other people's files were to be downloaded again, where a permission was missing."""
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SpecError, match="may not be read") as error:
        read_hf(tmp_path)

    assert error.value.do == f"ls -l {tmp_path}"
