"""What a model is: one frozen description that every later room reads and nobody writes.

The window convention, once: `window = W` means a query at position i sees the keys j with i - W < j <= i, that is W
keys, itself included. Conventions that differ (flash-attention's `window_size=(W - 1, 0)`) are converted in adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headwise.spec.rope import RopeSpec

Kind = Literal["sliding", "global"]
Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]
Norms = Literal["pre", "post", "sandwich"]
KVLayout = Literal["v+rotated", "v"]  # of one tensor for K and V, see `spec.kv`


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Routed experts of one layer; every expert is a gated MLP of `width`."""

    n_experts: int
    n_active: int
    width: int
    selection: Literal["softmax_topk", "topk_softmax"]  # which comes first
    renormalise: bool  # the chosen weights are divided by their sum (softmax_topk only)
    activation: Activation
    bias: bool = False  # on the router and both expert projections (gpt-oss)
    beside_dense: bool = False  # Gemma 4: experts run beside the dense MLP, with norms, router scale and expert scales


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """The feed-forward part of a layer: a dense gated MLP, routed experts, or (Gemma 4 26B-A4B) both."""

    width: int  # of the dense gated MLP; 0 = experts only
    activation: Activation
    bias: bool = False
    moe: MoeSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: what attention and MLP need to know, and nothing about files or devices."""

    index: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None  # keys a query sees, itself included; None = all
    kv_source: int | None  # layer whose cache this one reads; None = it owns its cache
    k_eq_v: bool  # one projection feeds both K and V; the two norms still differ
    kv_layout: KVLayout = "v+rotated"  # of a K=V layer; chosen, not read: `spec.kv.laid_out`
    rope: RopeSpec | None  # None = NoPE
    scale: float  # multiplies q.k; Gemma 4: 1.0
    softcap: float | None = None  # on attention logits
    sinks: bool = False  # one learned logit per query head in the softmax's denominator
    qk_norm: bool = False  # RMS norm per head on q and k, with weight
    v_norm: bool = False  # RMS norm per head on v, without weight
    qkv_bias: bool = False
    o_bias: bool = False
    mlp: MlpSpec

    @property
    def kind(self) -> Kind:
        return "global" if self.window is None else "sliding"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class PleSpec:
    """Per-layer embeddings (Gemma 4 E2B and E4B): a second table, one slice of `dim` values per token and layer."""

    dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model, read once; see `headwise.read_model`."""

    name: str
    family: str  # gemma4, gemma3, exaone4, qwen3, qwen3_moe, llama, mistral, gpt_oss
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden: int
    max_context: int  # tokens
    rms_eps: float
    norms: Norms  # where RMS norms stand around attention and MLP
    tied: bool  # the embedding is also the output projection
    embed_scale: float = 1.0  # multiplies the embedding; Gemma: sqrt(hidden)
    final_softcap: float | None = None
    ple: PleSpec | None = None
    layer_scalar: bool = False  # Gemma 4: one learned number multiplies the stream after each layer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def of_kind(self, kind: Kind) -> tuple[LayerSpec, ...]:
        return tuple(layer for layer in self.layers if layer.kind == kind)

    @property
    def kv_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that own a cache."""
        return tuple(layer for layer in self.layers if layer.kv_source is None)
