"""Tiny random checkpoints of every family, made by transformers itself in the true formats; the oracle of our logits.

Shapes are odd on purpose (windows that are no power of two, head counts of 3 and 5), weights are large enough that every
part of a layer changes the logits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers

FULL, SLIDING = "full_attention", "sliding_attention"
_GEMMA4_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_GEMMA4: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    global_head_dim=64,
    sliding_window=13,
    max_position_embeddings=512,
    rope_parameters=_GEMMA4_ROPE,
    final_logit_softcapping=30.0,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=320,
)
_PLAIN: dict[str, Any] = dict(vocab_size=320, hidden_size=96, num_hidden_layers=4, max_position_embeddings=512)
_GEMMA3 = _PLAIN | dict(
    num_hidden_layers=6,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=13,
    layer_types=[SLIDING, SLIDING, FULL] * 2,
    query_pre_attn_scalar=24,
    rope_parameters={
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
)
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (model type, config); several shapes of one family where the real sizes differ in kind
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4-e2b": (
        "gemma4_text",
        _GEMMA4
        | dict(
            num_hidden_layers=10,
            layer_types=[SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
            num_key_value_heads=1,
            num_kv_shared_layers=5,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=24,
        ),
    ),
    "gemma4-31b": (
        "gemma4_text",
        _GEMMA4
        | dict(
            num_hidden_layers=6,
            layer_types=[SLIDING, SLIDING, FULL] * 2,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            use_bidirectional_attention="vision",
        ),
    ),
    "gemma4-26b-a4b": (
        "gemma4_text",
        _GEMMA4
        | dict(
            num_hidden_layers=4,
            layer_types=[SLIDING, FULL] * 2,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=7,
            top_k_experts=3,
            moe_intermediate_size=48,
        ),
    ),
    "gemma3": ("gemma3_text", _GEMMA3),
    "gemma3-5to1": (  # the pattern and scale that GGUF's gemma3 has no keys for
        "gemma3_text",
        _GEMMA3 | dict(layer_types=[SLIDING] * 5 + [FULL], query_pre_attn_scalar=32),
    ),
    "exaone4": (
        "exaone4",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=13,
            sliding_window_pattern="LLLG",
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_parameters=_LLAMA3,
        ),
    ),
    "exaone4-1.2b": (
        "exaone4",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=[FULL] * 4,
            rope_parameters=_LLAMA3,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": (
        "qwen3",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=5,
            num_key_value_heads=1,
            head_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    ),
    "qwen3-wide": (  # rows of whole super-blocks, for the k-quants
        "qwen3",
        _PLAIN
        | dict(
            hidden_size=256,
            num_hidden_layers=2,
            intermediate_size=512,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    ),
    "qwen3-moe": (
        "qwen3_moe",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        ),
    ),
    "llama": (
        "llama",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters=_LLAMA3,
            tie_word_embeddings=True,
        ),
    ),
    "mistral": (
        "mistral",
        _PLAIN
        | dict(
            intermediate_size=160,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000_000.0},
        ),
    ),
    "gpt-oss": (
        "gpt_oss",
        _PLAIN
        | dict(
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=13,
            layer_types=[SLIDING, FULL] * 2,
            num_local_experts=5,
            num_experts_per_tok=2,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
}
FAMILIES = tuple(CONFIGS)
MOE = {"gemma4-26b-a4b", "qwen3-moe", "gpt-oss"}


def model_config(name: str, **changes: Any) -> transformers.PreTrainedConfig:
    kind, values = CONFIGS[name]
    return transformers.AutoConfig.for_model(kind, **(values | changes))


@functools.cache
def model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The oracle: transformers' own class with lively random weights, fp32, eager attention."""
    torch.manual_seed(seed)
    return lively(name, transformers.AutoModelForCausalLM.from_config(model_config(name), attn_implementation="eager"))


def lively(name: str, net: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Weights under which every part of a layer of family `name` changes the logits."""
    net = net.float().eval()
    with torch.no_grad():
        for key, value in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
            if key.endswith("inv_freq") or not value.dim():  # rope tables and the embedding scale are no weights
                continue
            if key.endswith("layer_scalar"):
                value.uniform_(0.7, 1.2)
            elif name.startswith("gemma4") and key.endswith(("q_norm.weight", "k_norm.weight")):
                # scores have no scale of their own: lively weights here make fp32 itself differ by 1e-4 from fp64
                value.copy_((torch.rand_like(value) + 0.5) * value.shape[-1] ** -0.25)
            elif "norm" in key or key.endswith(("per_expert_scale", "router.scale")):
                value.copy_(torch.rand_like(value) + (-0.5 if name.startswith("gemma3") else 0.5))
            elif key.endswith("sinks") or "bias" in key:
                value.normal_(0, 0.5)
            else:
                value.normal_(0, value.shape[-1] ** -0.5)
    return net


def save(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
    """A Hugging Face directory with the oracle's weights."""
    net = model(name)
    if dtype != torch.float32:
        import copy

        net = copy.deepcopy(net).to(dtype)
    net.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def logits(name: str, ids: list[int]) -> torch.Tensor:
    """The oracle's logits at every position: (len(ids), vocab)."""
    with torch.no_grad():
        return model(name)(torch.tensor([ids]), use_cache=False).logits[0].float()
