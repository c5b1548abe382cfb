"""True-format GGUF files of the tiny models: llama.cpp's keys and tensor names, through gguf-py's own tables.

Tensor names come from `gguf.get_tensor_name_map`, not from headwise's tables, so the two check each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FULL, SLIDING = "full_attention", "sliding_attention"
ARCHITECTURES = {
    "gemma4_text": "gemma4", "gemma3_text": "gemma3", "exaone4": "exaone4", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "llama": "llama", "mistral": "llama", "gpt_oss": "gpt-oss",
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """What differs from layer to layer, and the rope factors that go into a tensor."""

    types: list[str]
    dims: list[int]
    kv_heads: list[int]
    widths: list[int]
    factors: list[float] | None
    n_shared: int
    n_experts: int
    expert_width: int


def add_metadata(w: gguf.GGUFWriter, arch: str, config: dict[str, Any]) -> Geometry:
    """The keys that llama.cpp's converter writes for a Hugging Face config."""
    n, hidden, n_heads, head_dim = (config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"))
    types = config.get("layer_types") or [FULL] * n
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10_000.0)} | config.get("rope_scaling", {})
    full = rope.get(FULL, rope)

    w.add_block_count(n)
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(hidden)
    w.add_head_count(n_heads)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_file_type(1)
    w.add_rope_freq_base(full["rope_theta"])
    w.add_bos_token_id(config["bos_token_id"])
    w.add_eos_token_id(config["eos_token_id"])
    if arch in ("llama", "mistral3", "exaone4"):
        w.add_vocab_size(config["vocab_size"])
    n_shared = config.get("num_kv_shared_layers", 0)
    widths = [config["intermediate_size"]] * n
    if config.get("use_double_wide_mlp"):
        widths = [width * (2 if i >= n - n_shared else 1) for i, width in enumerate(widths)]
        w.add_feed_forward_length(widths)
    else:
        w.add_feed_forward_length(widths[0])
    kv_heads = [config["num_key_value_heads"]] * n
    if global_kv := config.get("num_global_key_value_heads"):
        kv_heads = [kv if t == SLIDING else global_kv for kv, t in zip(kv_heads, types, strict=True)]
        w.add_head_count_kv(kv_heads)
    else:
        w.add_head_count_kv(kv_heads[0])
    dims = [head_dim] * n
    if arch == "gemma4":
        wide = config["global_head_dim"]
        dims = [head_dim if t == SLIDING else wide for t in types]
        w.add_key_length(wide)
        w.add_value_length(wide)
        w.add_key_length_swa(head_dim)
        w.add_value_length_swa(head_dim)
        w.add_rope_dimension_count(wide)
        w.add_rope_dimension_count_swa(head_dim)
        w.add_rope_freq_base_swa(rope[SLIDING]["rope_theta"])
        w.add_shared_kv_layers(n_shared)
        w.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
        rotated = int(wide * full["partial_rotary_factor"] / 2)
        factors = [1.0] * rotated + [1e30] * (wide // 2 - rotated)
    else:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
        w.add_rope_dimension_count(head_dim)
        factors = llama3_factors(head_dim, full) if full.get("rope_type") == "llama3" else None
    if config.get("sliding_window"):
        w.add_sliding_window(config["sliding_window"])
        if arch in ("gemma4", "exaone4"):
            w.add_sliding_window_pattern([t == SLIDING for t in types])
    if config.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(config["final_logit_softcapping"])
    if full.get("rope_type") in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        w.add_rope_scaling_factor(full["factor"])
    if full.get("rope_type") == "yarn":
        w.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if "beta_fast" in full:
            w.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
            w.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
    n_experts = config.get("num_experts") or config.get("num_local_experts") or 0
    expert_width = config.get("moe_intermediate_size", config["intermediate_size"])
    if n_experts:
        w.add_expert_count(n_experts)
        w.add_expert_used_count(config.get("top_k_experts") or config["num_experts_per_tok"])
        w.add_expert_feed_forward_length(expert_width)
    return Geometry(types, dims, kv_heads, widths, factors, n_shared, n_experts, expert_width)


def llama3_factors(head_dim: int, rope: dict[str, Any]) -> list[float]:
    """As llama.cpp's converter computes them."""
    factors = []
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def add_tokenizer(w: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary with one merge: every byte is a token, the rest are unused."""
    from headwise.text.pieces import _byte_alphabet

    tokens = ["<pad>", "<bos>", "<eos>", *_byte_alphabet()]
    tokens.append("he")
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([3] * 3 + [1] * 257 + [5] * (size - 260))
    w.add_token_merges(["h e"])


def write_gguf(name: str, path: Path, *, quant: str = "f32") -> dict[str, np.ndarray]:
    """A GGUF twin of the tiny model `name`.

    Args:
        quant: type of every matrix whose rows are whole blocks of it; the others, and vectors, stay f32.
    Returns:
        Hugging Face name -> the values that the file really holds, for an oracle with the same weights.
    """
    import tiny

    net = tiny.model(name)
    config = {k: v for k, v in net.config.to_dict().items() if v is not None}
    if "per_layer_config" in config:
        first = next(iter(config.pop("per_layer_config").values()))
        config |= {"global_head_dim": first["head_dim"], "num_global_key_value_heads": first.get("num_key_value_heads")}
    config = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | config
    config["num_experts"] = config.get("num_experts") or config.get("num_local_experts")
    config["bos_token_id"], config["eos_token_id"] = 1, 2
    arch = ARCHITECTURES[net.config.model_type]
    w = gguf.GGUFWriter(path, arch)
    g = add_metadata(w, arch, config)
    add_tokenizer(w, config["vocab_size"])
    kind = gguf.GGMLQuantizationType[quant.upper()]
    held: dict[str, np.ndarray] = {}

    def add(stored: str, values: np.ndarray, *, matrix: bool) -> np.ndarray:
        """Writes `values` and gives back what a reader will see."""
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if not matrix or quant == "f32" or values.shape[-1] % block:
            w.add_tensor(stored, values.astype(np.float32))
            return values
        packed = random_blocks(kind, values.shape) if quant in SCALES_AT else gguf.quants.quantize(values, kind)
        w.add_tensor(stored, packed, raw_dtype=kind)
        return gguf.quants.dequantize(packed, kind).reshape(values.shape)

    if g.factors:
        w.add_tensor("rope_freqs.weight", np.array(g.factors, np.float32))
    table = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), config["num_hidden_layers"])
    for key, tensor in net.state_dict().items():
        values = tensor.float().numpy()
        held[key] = values
        layer = int(key.split(".")[2]) if key.startswith("model.layers.") else -1
        if key.endswith("v_proj.weight") and config.get("attention_k_eq_v") and g.types[layer] == FULL:
            continue
        if key == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if key.endswith(("inv_freq", "embed_scale")):
            continue
        stem, _, suffix = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "weight")
        special = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
        if arch == "gemma4" and (tail := key.split(f"layers.{layer}.")[-1]) in special:
            add(f"blk.{layer}.{special[tail]}", values, matrix=False)
            continue
        if arch == "gpt-oss" and "experts." in key:
            _gpt_oss_experts(add, held, key, layer, values)
            continue
        if arch == "qwen3moe" and ".experts." in key:
            what = key.rsplit(".", 1)[-1]
            names = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}[what]
            parts = np.split(values, len(names), axis=1)
            seen = [add(f"blk.{layer}.{n}.weight", np.ascontiguousarray(p), matrix=True) for n, p in zip(names, parts, strict=True)]
            held[key] = np.concatenate(seen, axis=1)
            continue
        stored = table.get_name(stem)
        if stored is None and arch == "qwen3moe":  # gguf-py's table has no dense layers for it
            stored = f"blk.{layer}.ffn_{key.split('.')[-2].removesuffix('_proj')}"
        assert stored is not None, key
        if arch == "gpt-oss" and key.endswith("self_attn.sinks"):
            stored = f"blk.{layer}.attn_sinks"
        if arch == "gpt-oss" and "post_attention_layernorm" in key:
            stored = f"blk.{layer}.post_attention_norm"
        if arch == "gemma3" and "norm" in key:
            values = values + 1
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            n = config["num_attention_heads"] if "q_proj" in key else config["num_key_value_heads"]
            back = add(f"{stored}.{suffix}", _permuted(values, n), matrix=True)
            held[key] = _unpermuted(back, n)
            continue
        router = stored.endswith("ffn_gate_inp")
        matrix = values.ndim > 1 and not router and "per_layer_model_proj" not in stored
        seen_values = add(f"{stored}.{suffix}", values, matrix=matrix)
        if not (arch == "gemma3" and "norm" in key):
            held[key] = seen_values
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if config["tie_word_embeddings"] and "lm_head.weight" in held:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    return held


# Types that gguf-py reads and cannot write: where the f16 scales lie in a block. Random codes under small scales will do.
SCALES_AT = {
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq2_xxs": (0,), "iq2_xs": (0,),
    "iq2_s": (0,),
    "iq3_xxs": (0,), "iq3_s": (0,), "iq1_s": (0,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(shape[0])
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for at in SCALES_AT[kind.name.lower()]:
        data[..., at : at + 2] = np.frombuffer(np.float16(3e-4).tobytes(), np.uint8)
    return data.reshape(*shape[:-1], -1)


def _permuted(x: np.ndarray, n_heads: int) -> np.ndarray:
    """Rotary pairs side by side, as llama.cpp's LlamaModel.permute stores them."""
    return np.ascontiguousarray(x.reshape(n_heads, 2, x.shape[0] // n_heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


def _unpermuted(x: np.ndarray, n_heads: int) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(n_heads, x.shape[0] // n_heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


def _gpt_oss_experts(add: Any, held: dict[str, np.ndarray], key: str, layer: int, values: np.ndarray) -> None:
    """Gate and up alternate in Hugging Face's (experts, in, out); GGUF has them apart and (experts, out, in)."""
    bias = key.endswith("_bias")
    suffix = "bias" if bias else "weight"
    if "down_proj" in key:
        out = add(
            f"blk.{layer}.ffn_down_exps.{suffix}", values if bias else np.ascontiguousarray(values.swapaxes(1, 2)), matrix=not bias
        )
        held[key] = out if bias else np.ascontiguousarray(out.swapaxes(1, 2))
        return
    result = np.empty_like(values)
    for start, name in ((0, "gate"), (1, "up")):
        part = values[..., start::2]
        out = add(
            f"blk.{layer}.ffn_{name}_exps.{suffix}",
            part.copy() if bias else np.ascontiguousarray(part.swapaxes(1, 2)),
            matrix=not bias,
        )
        result[..., start::2] = out if bias else out.swapaxes(1, 2)
    held[key] = result
