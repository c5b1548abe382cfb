"""Whole configs as they lie in public repositories, and as transformers saves them again.

The published ones are composed: each key and value as in the public file, put together by hand, so not verbatim (the order
of keys, the encoders' sections and the transformers version may differ).
"""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import tiny
import transformers

from headwise.errors import SpecError
from headwise.spec import catalogue
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"
BF16 = {"torch_dtype": "bfloat16", "transformers_version": "4.52.0", "use_cache": True}
GEMMA4_ROPES = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
}
GEMMA4_OUTSIDE: dict[str, Any] = {
    "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_id": 258883,
    "eoa_token_index": 258883, "eoi_token_id": 258882, "eos_token_id": [1, 106, 50], "image_token_id": 258880,
    "initializer_range": 0.02, "tie_word_embeddings": True, "transformers_version": "5.5.0.dev0", "video_token_id": 258884,
    "vision_soft_tokens_per_image": 280,
}  # fmt: skip
GEMMA4_TEXT: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "dtype": "bfloat16", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_parameters": GEMMA4_ROPES,
    "tie_word_embeddings": True, "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-4-31b": GEMMA4_OUTSIDE
    | {
        "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "model_type": "gemma4",
        "text_config": GEMMA4_TEXT
        | {
            "attention_k_eq_v": True, "enable_moe_block": False, "hidden_size": 5376, "hidden_size_per_layer_input": 0,
            "intermediate_size": 21504, "layer_types": ([SLIDING] * 5 + [FULL]) * 10, "max_position_embeddings": 262144,
            "model_type": "gemma4_text", "moe_intermediate_size": None, "num_attention_heads": 32, "num_experts": None,
            "num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16, "num_kv_shared_layers": 0,
            "sliding_window": 1024, "top_k_experts": None, "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False, "vocab_size_per_layer_input": 262144,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "gemma4_vision", "num_hidden_layers": 27, "standardize": True},
    },
    "gemma-4-12b": GEMMA4_OUTSIDE
    | {
        "architectures": ["Gemma4UnifiedForConditionalGeneration"], "audio_config": {"model_type": "gemma4_unified_audio"},
        "model_type": "gemma4_unified",
        "text_config": GEMMA4_TEXT
        | {
            "attention_k_eq_v": True, "enable_moe_block": False, "hidden_size": 3840, "hidden_size_per_layer_input": 0,
            "intermediate_size": 15360, "layer_types": ([SLIDING] * 5 + [FULL]) * 8, "max_position_embeddings": 262144,
            "model_type": "gemma4_unified_text", "moe_intermediate_size": None, "num_attention_heads": 16, "num_experts": None,
            "num_global_key_value_heads": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_kv_shared_layers": 0,
            "sliding_window": 1024, "top_k_experts": None, "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False, "vocab_size_per_layer_input": 0,
        },
        "vision_config": {"model_type": "gemma4_unified_vision"},
    },
    "gemma-4-e2b": GEMMA4_OUTSIDE
    | {
        "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": {"hidden_size": 1024, "model_type": "gemma4_audio"},
        "model_type": "gemma4",
        "text_config": GEMMA4_TEXT
        | {
            "attention_k_eq_v": False, "enable_moe_block": False, "hidden_size": 1536, "hidden_size_per_layer_input": 256,
            "intermediate_size": 6144, "layer_types": ([SLIDING] * 4 + [FULL]) * 7, "max_position_embeddings": 131072,
            "model_type": "gemma4_text", "moe_intermediate_size": None, "num_attention_heads": 8, "num_experts": None,
            "num_global_key_value_heads": None, "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20,
            "sliding_window": 512, "top_k_experts": None, "use_bidirectional_attention": None, "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": 262144,
        },
        "vision_config": {"hidden_size": 768, "model_type": "gemma4_vision"},
    },
    "gemma-3-27b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
            "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config": SIGLIP,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
        "tie_word_embeddings": True,
    }
    | BF16,
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }
    | BF16,
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }
    | BF16,
    "llama-3.2-3b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    }
    | BF16,
    "mistral-small-3.2-24b": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "multimodal_projector_bias": False, "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
            "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0,
            "sliding_window": None, "use_cache": True, "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16", "transformers_version": "4.52.4",
        "vision_config": {"head_dim": 64, "hidden_size": 1024, "image_size": 1540, "model_type": "pixtral", "rope_theta": 1e4},
        "vision_feature_layer": -1,
    },
    "exaone-4.0-1.2b": {
        "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 361,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 4096,
        "layer_types": [FULL] * 30, "max_position_embeddings": 65536, "model_type": "exaone4", "num_attention_heads": 32,
        "num_hidden_layers": 30, "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True,
        "vocab_size": 102400,
    }
    | BF16,
    "exaone-4.0-32b": {
        "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0, "attn_implementation": "flash_attention_2",
        "bos_token_id": 1, "eos_token_id": 361, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "initializer_range": 0.02, "intermediate_size": 27392, "max_position_embeddings": 131072, "model_type": "exaone4",
        "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 0, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": False,
        "vocab_size": 102400,
    }
    | BF16,
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": [SLIDING, FULL] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
    },
}  # fmt: skip
ENDS: dict[str, tuple[int | None, tuple[int, ...]]] = {  # first token, and those that end a reply
    "gemma-4-31b": (2, (1, 106, 50)),
    "gemma-4-12b": (2, (1, 106, 50)),
    "gemma-4-e2b": (2, (1, 106, 50)),
    "gemma-3-27b": (2, (1, 106)),
    "gemma-3-1b": (2, (1, 106)),
    "qwen3-8b": (151643, (151645,)),
    "qwen3-30b-a3b": (151643, (151645,)),
    "llama-3.2-3b": (128000, (128001, 128008, 128009)),
    "mistral-small-3.2-24b": (1, (2,)),
    "exaone-4.0-1.2b": (1, (361,)),
    "exaone-4.0-32b": (1, (361,)),
    "gpt-oss-20b": (None, (200002,)),
}


def read(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(json.loads(json.dumps(config)), name="m")


def bare(spec: ModelSpec) -> ModelSpec:
    """Without what the catalogue need not know: the name and the tokens of the chat."""
    return replace(spec, name="m", bos_id=None, eos_ids=())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_needs_no_ignored_key_and_is_the_catalogue_s_model(name: str) -> None:
    """gemma-4-12B writes vocab_size_per_layer_input 0, which was refused: the 12B could be planned and not opened."""
    spec = read(PUBLISHED[name])

    assert bare(spec) == bare(catalogue.spec(name))
    assert (spec.bos_id, spec.eos_ids) == ENDS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_reading_leaves_the_config_as_it_was(name: str) -> None:
    """Gemma 4's last layer was forced to full in the caller's own list."""
    config = copy.deepcopy(PUBLISHED[name])
    if "gemma-4" in name:
        config["text_config"]["layer_types"][-1] = SLIDING
    before = copy.deepcopy(config)

    spec_from_config(config, name="m")

    assert config == before


def tiny_by_hand(name: str) -> tuple[str, list[tuple[int | None, int, int, int, int | None, bool]]]:
    """Family, and per layer (window, heads, KV heads, head size, kv_source, k_eq_v), read off tests/tiny.py by eye."""
    return {
        "gemma4-e2b": ("gemma4", [
            *[(13, 4, 1, 32, None, False)] * 4, (None, 4, 1, 64, None, False),
            *[(13, 4, 1, 32, 3, False)] * 4, (None, 4, 1, 64, 4, False),
        ]),
        "gemma4-31b": ("gemma4", [*[(13, 4, 2, 32, None, False)] * 2, (None, 4, 1, 64, None, True)] * 2),
        "gemma4-26b-a4b": ("gemma4", [(13, 4, 2, 32, None, False), (None, 4, 1, 64, None, True)] * 2),
        "gemma3": ("gemma3", [*[(13, 4, 2, 32, None, False)] * 2, (None, 4, 2, 32, None, False)] * 2),
        "gemma3-5to1": ("gemma3", [*[(13, 4, 2, 32, None, False)] * 5, (None, 4, 2, 32, None, False)]),
        "exaone4": ("exaone4", [*[(13, 6, 2, 16, None, False)] * 3, (None, 6, 2, 16, None, False)]),
        "exaone4-1.2b": ("exaone4", [(None, 6, 2, 16, None, False)] * 4),
        "qwen3": ("qwen3", [(None, 5, 1, 32, None, False)] * 4),
        "qwen3-wide": ("qwen3", [(None, 8, 2, 32, None, False)] * 2),
        "qwen3-moe": ("qwen3_moe", [(None, 4, 2, 32, None, False)] * 4),
        "llama": ("llama", [(None, 6, 2, 16, None, False)] * 4),
        "mistral": ("mistral", [(None, 4, 2, 32, None, False)] * 4),
        "gpt-oss": ("gpt_oss", [(13, 4, 2, 32, None, False), (None, 4, 2, 32, None, False)] * 2),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("form", ["to_dict", "to_diff_dict", "to_json_string"])
def test_what_transformers_saves_is_read_as_what_it_was_made_from(name: str, form: str) -> None:
    """A checkpoint that someone fine-tuned has been saved again, with every default written out."""
    saved = getattr(tiny.model_config(name), form)()
    spec = read(json.loads(saved) if isinstance(saved, str) else saved)

    family, layers = tiny_by_hand(name)
    assert spec.family == family
    assert [
        (x.window, x.n_heads, x.n_kv_heads, x.head_dim, x.kv_source, x.k_eq_v) for x in spec.layers
    ] == layers  # fmt: skip
    assert (spec.vocab_size, spec.max_context) == (320, 512)


def test_layer_numbers_saved_with_leading_zeros_are_layer_numbers() -> None:
    """transformers pads the keys of per_layer_config: "05" in a model of ten layers or more was an unknown key."""
    text = PUBLISHED["gemma-4-31b"]["text_config"]
    saved = transformers.AutoConfig.for_model("gemma4_text", **{k: v for k, v in text.items() if k != "model_type"}).to_dict()
    assert "05" in saved["per_layer_config"] and "global_head_dim" not in saved  # the form this test is about

    assert bare(read(saved)) == bare(catalogue.spec("gemma-4-31b"))


@pytest.mark.parametrize("wrong", ["5x", "-1", "4.0", "60", "005 ", "", "9" * 5000])
def test_a_per_layer_config_of_no_layer_is_refused(wrong: str) -> None:
    """60 layers are numbered 0 to 59."""
    text = PUBLISHED["gemma-4-31b"]["text_config"] | {"per_layer_config": {"05": {"head_dim": 512}, wrong: {"head_dim": 512}}}

    with pytest.raises(SpecError, match="per_layer_config: key"):
        read(text)


def test_one_layer_configured_twice_is_refused() -> None:
    """"5" and "05" are one layer; one of the two would have been dropped."""
    two = {"5": {"head_dim": 512}, "05": {"head_dim": 256}}

    with pytest.raises(SpecError, match="per_layer_config: key '5'"):
        read(PUBLISHED["gemma-4-31b"]["text_config"] | {"per_layer_config": two})


@pytest.mark.parametrize(("kind", "tied"), [("gemma4", True), ("gemma4_unified", True), ("gemma3", True), ("mistral3", False)])
def test_a_multimodal_wrapper_saved_by_transformers_needs_no_ignored_key(kind: str, tied: bool) -> None:
    """Its own keys name tokens and encoders, which this runtime skips.

    Mistral 3 writes tie_word_embeddings true outside and false inside, and its files carry a head: the text's word counts.
    """
    config = transformers.AutoConfig.for_model(kind)
    text = config.get_text_config()

    for saved in (config.to_dict(), json.loads(config.to_json_string())):
        spec = read(saved)
        assert (len(spec.layers), spec.hidden, spec.vocab_size) == (text.num_hidden_layers, text.hidden_size, text.vocab_size)
        assert spec.tied is tied
