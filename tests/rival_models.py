"""The models that the rivals are checked on: the catalogue's, and one with windows that llama.cpp does not know."""

from __future__ import annotations

import functools

from headwise.spec import catalogue
from headwise.spec.hf import spec_from_config
from headwise.spec.layers import ModelSpec

MODELS = (
    "gemma-4-31b",
    "gemma-4-26b-a4b",
    "gemma-4-12b",
    "gemma-4-e4b",
    "gemma-4-e2b",
    "gemma-3-27b",
    "exaone-4.0-32b",
    "gpt-oss-20b",
    "llama-3.2-3b",
    "qwen3-32b",
)


@functools.cache
def model(name: str) -> ModelSpec:
    return catalogue.spec(name)


@functools.cache
def windowed_llama(*, head_dim: int = 128) -> ModelSpec:
    """The shape of Mistral 7B v0.1: every layer has a window, and llama.cpp's `llama` graph has none."""
    config = {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
    }
    return spec_from_config(config, name="windowed")
