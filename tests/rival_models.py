"""The models that the rivals are checked on: published shapes, as small Hugging Face configs.

Sources: google/gemma-4-*-it, google/gemma-3-27b-it, LGAI-EXAONE/EXAONE-4.0-32B, openai/gpt-oss-20b,
meta-llama/Llama-3.2-3B, Qwen/Qwen3-32B config.json.
"""

from __future__ import annotations

import functools
from typing import Any

from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def _types(n_layers: int, period: int) -> list[str]:
    return [FULL if (i + 1) % period == 0 else SLIDING for i in range(n_layers)]


def _gemma4(
    hidden: int, width: int, n_layers: int, heads: tuple[int, int, int | None], *, window: int = 1024, **more: Any
) -> dict[str, Any]:
    n_heads, n_kv, n_global_kv = heads
    return {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 262_144,
        "sliding_window": window,
        "layer_types": _types(n_layers, 6),
        "attention_k_eq_v": n_global_kv is not None,
        "hidden_size_per_layer_input": 0,
        **({"num_global_key_value_heads": n_global_kv} if n_global_kv else {}),
        **more,
    }


_PLE = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144, "max_position_embeddings": 131_072}
_MOE = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma-4-31b": _gemma4(5376, 21504, 60, (32, 16, 4)),
    "gemma-4-26b-a4b": _gemma4(2816, 2112, 30, (16, 8, 2), **_MOE),
    "gemma-4-12b": _gemma4(3840, 15360, 48, (16, 8, 1)),
    "gemma-4-e4b": _gemma4(2560, 10240, 42, (8, 2, None), window=512, num_kv_shared_layers=18, **_PLE),
    "gemma-4-e2b": _gemma4(
        1536, 6144, 35, (8, 1, None), window=512, num_kv_shared_layers=20, use_double_wide_mlp=True, **_PLE
    )
    | {"layer_types": _types(35, 5)},
    "gemma-3-27b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "sliding_window": 1024,
    },
    "exaone-4.0-32b": {
        "model_type": "exaone4",
        "vocab_size": 102_400,
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
    },
}
MODELS = tuple(_CONFIGS)


@functools.cache
def model(name: str) -> ModelSpec:
    return spec_from_config(_CONFIGS[name], name=name)


@functools.cache
def windowed_llama(*, head_dim: int = 128) -> ModelSpec:
    """A model with windows that llama.cpp's graph of its family does not know (Mistral 7B v0.1's shape)."""
    config = _CONFIGS["llama-3.2-3b"] | {"model_type": "mistral", "sliding_window": 4096, "head_dim": head_dim}
    return spec_from_config(config, name="windowed")
