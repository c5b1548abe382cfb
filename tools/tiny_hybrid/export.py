"""Writes tiny-hybrid as GGUF (architecture gemma4, matrices Q8_0, norms and scalars float32).

    python export.py --weights RUN/weights.pt --tokenizer tokenizer.json --out tiny-hybrid.gguf
    python export.py --random --out tiny-hybrid.gguf        untrained weights of the same shape

Keys and tensor names are llama.cpp's for Gemma 4: head_count_kv per layer, key_length for full and key_length_swa for
sliding layers, no attn_v in full layers (their values are the raw keys), and rope_freqs, which stops the turning of all
but the first 64 pairs of a full layer's head.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import gguf
import numpy as np
import torch
from model import Config, TinyHybrid
from tokenizer import BOS, CHAT_TEMPLATE, CONTROL, END_OF_TURN, EOS, MASK, PAD, PRE, RESERVED, UNK, USER_DEFINED

MAX_FILE_BYTES = 16_000_000
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "layer_scalar": "layer_output_scale",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter named as in transformers' Gemma4ForCausalLM."""
    stem = name.removesuffix(".weight")
    if stem in ("model.embed_tokens", "model.norm"):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.weight"


def rope_freqs(c: Config) -> np.ndarray:
    """Divisors of a full layer's frequencies: 1 where a pair turns, 1e30 where it must not."""
    pairs = c.global_head_dim // 2
    turning = int(c.partial_rotary_factor * pairs)
    return np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)


def add_hyperparameters(w: gguf.GGUFWriter, c: Config) -> None:
    layers = range(c.num_hidden_layers)
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name("tiny-hybrid")
    w.add_basename("tiny-hybrid")
    w.add_size_label("14M")
    w.add_license("apache-2.0")
    w.add_description("Gemma 4's architecture in small, trained on permissively licensed Python source")
    w.add_languages(["en"])
    w.add_tags(["text-generation", "code"])
    w.add_sampling_temp(0.8)
    w.add_sampling_top_p(0.95)
    w.add_sampling_top_k(64)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv([c.num_global_key_value_heads if c.is_full(i) else c.num_key_value_heads for i in layers])
    w.add_key_length(c.global_head_dim)
    w.add_value_length(c.global_head_dim)
    w.add_key_length_swa(c.head_dim)
    w.add_value_length_swa(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_sliding_window(c.sliding_window)
    w.add_sliding_window_pattern([not c.is_full(i) for i in layers])
    w.add_shared_kv_layers(0)
    w.add_embedding_length_per_layer_input(0)
    w.add_final_logit_softcapping(c.final_logit_softcapping)
    w.add_rope_freq_base(c.rope_theta_full)
    w.add_rope_freq_base_swa(c.rope_theta_sliding)
    w.add_rope_dimension_count(c.global_head_dim)
    w.add_rope_dimension_count_swa(c.head_dim)


def add_tokenizer(w: gguf.GGUFWriter, path: pathlib.Path) -> None:
    model = json.loads(path.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = dict.fromkeys(CONTROL + RESERVED, gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(USER_DEFINED, gguf.TokenType.USER_DEFINED)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(PRE)
    w.add_token_list(tokens)
    w.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    w.add_token_merges([" ".join(pair) for pair in model["merges"]])
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_eot_token_id(END_OF_TURN)
    w.add_pad_token_id(PAD)
    w.add_unk_token_id(UNK)
    w.add_mask_token_id(MASK)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHAT_TEMPLATE.read_text())


def write(state: dict[str, torch.Tensor], tokenizer: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the file; `state` maps transformers' names to tensors.

    Raises:
        ValueError: the file is over MAX_FILE_BYTES, the most the package may ship.
    """
    c = Config()
    w = gguf.GGUFWriter(str(out), "gemma4")
    add_hyperparameters(w, c)
    add_tokenizer(w, tokenizer)
    w.add_tensor("rope_freqs.weight", rope_freqs(c))
    for name, tensor in state.items():
        values = tensor.detach().float().cpu().numpy()
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            w.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            w.add_tensor(gguf_name(name), values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    if (n_bytes := out.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{out} takes {n_bytes} bytes, more than {MAX_FILE_BYTES}")
    print(f"{out}: {n_bytes} bytes, {len(state) + 1} tensors")


def read_state(path: pathlib.Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of a written file, Q8_0 undone: what a runtime computes with."""
    by_gguf_name = {gguf_name(name): name for name in TinyHybrid(Config()).state_dict()}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name != "rope_freqs.weight":
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            state[by_gguf_name[tensor.name]] = torch.from_numpy(values.astype(np.float32))
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=pathlib.Path)
    source.add_argument("--random", action="store_true")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=pathlib.Path(__file__).with_name("tokenizer.json"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if args.random:
        model = TinyHybrid(Config())
        model.initialise(seed=4)
        state = model.state_dict()
    else:
        state = torch.load(args.weights, weights_only=True)
    write(state, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
