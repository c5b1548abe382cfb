"""tiny-hybrid's decoder for training: Gemma 4's text maths over whole sequences, with fast block attention.

Parameter names are those of transformers' `Gemma4ForCausalLM`, so a state dict fits both. Every token sees itself and
those before it: the last 256 with itself in a sliding layer, all of them in a full layer.

Shapes    B sequences, S tokens (a multiple of 256), D hidden, H query heads, K key/value heads, d head size.
Accuracy  float32 parameters; bf16 products under autocast, softmax and norms in float32.
Source    transformers 5.23 models/gemma4/modeling_gemma4.py; evaluate.py --check compares with it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RECOMPUTE_ABOVE = 8192  # tokens; longer sequences keep no scores for the backward pass but compute them again


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 10
    full_every: int = 5  # layers 4 and 9 see everything, the others a window
    num_attention_heads: int = 4
    num_key_value_heads: int = 2  # sliding layers
    num_global_key_value_heads: int = 1
    head_dim: int = 256
    global_head_dim: int = 512
    sliding_window: int = 256
    max_position_embeddings: int = 65536
    rope_theta_sliding: float = 1e4
    rope_theta_full: float = 1e6
    partial_rotary_factor: float = 0.25  # of a full layer's head
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0

    def is_full(self, layer: int) -> bool:
        return layer % self.full_every == self.full_every - 1

    def hf_config(self) -> dict:
        """The same as a config.json that transformers opens as Gemma4ForCausalLM."""
        full, sliding = "full_attention", "sliding_attention"
        rope = {
            full: {"rope_type": "proportional", "rope_theta": self.rope_theta_full,
                   "partial_rotary_factor": self.partial_rotary_factor},
            sliding: {"rope_type": "default", "rope_theta": self.rope_theta_sliding},
        }  # fmt: skip
        same = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
                "num_global_key_value_heads head_dim global_head_dim sliding_window max_position_embeddings rms_norm_eps "
                "final_logit_softcapping").split()  # fmt: skip
        return {name: getattr(self, name) for name in same} | {
            "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "attention_k_eq_v": True,
            "layer_types": [full if self.is_full(i) else sliding for i in range(self.num_hidden_layers)],
            "rope_parameters": rope, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "enable_moe_block": False,
            "use_double_wide_mlp": False, "attention_bias": False, "use_bidirectional_attention": None,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": [1, 6], "dtype": "float32",
        }  # fmt: skip


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis in float32, given back in x's type."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rope_tables(n_tokens: int, head_dim: int, theta: float, fraction: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [n_tokens, head_dim / 2]; pair i turns by theta^(-2i / head_dim), the pairs past `fraction` not at all."""
    pair = torch.arange(head_dim // 2, device=device)
    frequency = torch.where(pair < int(fraction * head_dim // 2), theta ** (-2.0 * pair / head_dim), 0.0)
    angle = torch.arange(n_tokens, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, S, heads, d] by its position; pair i is (i, i + d / 2)."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ, masked) v, scale 1: q [..., M, d], k and v [..., N, d], mask [M, N]."""
    scores = (q @ k.transpose(-1, -2)).float().masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Each block of `window` queries against its own block and the one before it: q [B, S, H, d], k, v [B, S, K, d]."""
    B, S, H, d = q.shape
    K, n_blocks = k.shape[2], S // window
    group = H // K

    def with_previous(x: Tensor) -> Tensor:  # [B, S, K, d] -> [B, K, n_blocks, 2 * window, d]
        blocks = x.transpose(1, 2).reshape(B, K, n_blocks, window, d)
        before = F.pad(blocks[:, :, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat([before, blocks], 3)

    rows = q.view(B, n_blocks, window, K, group, d).permute(0, 3, 1, 2, 4, 5).reshape(B, K, n_blocks, window * group, d)
    i = torch.arange(window, device=q.device).repeat_interleave(group)[:, None] + window
    j = torch.arange(2 * window, device=q.device)[None, :]
    mask = (j <= i) & (i - j < window)
    not_padding = (torch.arange(n_blocks, device=q.device) > 0)[:, None, None] | (j >= window)
    out = _softmax_product(rows, with_previous(k), with_previous(v), mask & not_padding)
    return out.view(B, K, n_blocks, window, group, d).permute(0, 2, 3, 1, 4, 5).reshape(B, S, H * d)


def full_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Causal attention with one key/value head, `chunk` queries at a time: q [B, S, H, d], k and v [B, S, 1, d]."""
    B, S, H, d = q.shape
    k, v = k[:, :, 0], v[:, :, 0]
    out = []
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        rows = q[:, start:stop].reshape(B, (stop - start) * H, d)
        i = torch.arange(start, stop, device=q.device).repeat_interleave(H)[:, None]
        mask = torch.arange(stop, device=q.device)[None, :] <= i
        parts = (rows, k[:, :stop], v[:, :stop], mask)
        part = checkpoint(_softmax_product, *parts, use_reentrant=False) if S > RECOMPUTE_ABOVE else _softmax_product(*parts)
        out.append(part.view(B, stop - start, H * d))
    return torch.cat(out, 1)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.c, self.is_full = c, c.is_full(layer)
        self.d = c.global_head_dim if self.is_full else c.head_dim
        n_kv = c.num_global_key_value_heads if self.is_full else c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, n_kv * self.d, bias=False)
        if not self.is_full:  # a full layer's values are its raw keys
            self.v_proj = nn.Linear(c.hidden_size, n_kv * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(self.d, c.rms_norm_eps), Norm(self.d, c.rms_norm_eps)

    def forward(self, h: Tensor, tables: tuple[Tensor, Tensor], chunk: int) -> Tensor:
        B, S, _ = h.shape
        q = self.q_proj(h).view(B, S, -1, self.d)
        k = self.k_proj(h).view(B, S, -1, self.d)
        v = k if self.is_full else self.v_proj(h).view(B, S, -1, self.d)
        v = rms(v, None, self.c.rms_norm_eps)
        q, k = rotate(self.q_norm(q), *tables), rotate(self.k_norm(k), *tables)
        if self.is_full:
            return self.o_proj(full_attention(q, k, v, chunk))
        return self.o_proj(sliding_attention(q, k, v, self.c.sliding_window))


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))


class Layer(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            setattr(self, f"{name}_layernorm", Norm(c.hidden_size, c.rms_norm_eps))
        self.layer_scalar = nn.Parameter(torch.ones(1))  # multiplies the whole stream

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], chunk: int) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), tables, chunk))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar.to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)


class TinyHybrid(nn.Module):
    """`forward(inputs)` gives logits [B, S, V] in float32. Inputs [B, S], S a multiple of the window."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c, self.model = c, Decoder(c)
        self.chunk = 1024  # queries of a full layer at a time: scores take B * 4 * chunk * S elements

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Rows of unit RMS after the embedding's scale; attention starts at the usual 1 / sqrt(d), in the norms."""
        torch.manual_seed(seed)
        for name, p in self.named_parameters():
            if "embed" in name:
                p.normal_(std=self.c.hidden_size**-0.5)
            elif p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            elif "q_norm" in name or "k_norm" in name:
                p.fill_(p.shape[0] ** -0.25)
            elif "post_" in name:
                p.fill_(0.3)

    def hidden(self, inputs: Tensor) -> Tensor:
        c, S = self.c, inputs.shape[1]
        sliding = rope_tables(S, c.head_dim, c.rope_theta_sliding, 1.0, inputs.device)
        full = rope_tables(S, c.global_head_dim, c.rope_theta_full, c.partial_rotary_factor, inputs.device)
        x = self.model.embed_tokens(inputs) * math.sqrt(c.hidden_size)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, full if c.is_full(i) else sliding, self.chunk)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        cap = self.c.final_logit_softcapping
        return cap * torch.tanh(F.linear(hidden, self.model.embed_tokens.weight).float() / cap)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(self.hidden(inputs))

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token of the final hidden states."""
        return F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten())
