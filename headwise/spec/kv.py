"""The bytes of the KV cache: the one arithmetic that plans, allocates and reports.

Store-bytes (`kv_bytes`, what a layer holds) and read-bytes (`kv_read_bytes`, what one decode step moves) are two
functions, because a window makes them differ.

A K=V layer (Gemma 4 12B, 26B-A4B, 31B: every global layer) stores one tensor for both. With n = the un-weighted norm of
the one projection, V = n and K = RoPE(w * n): so V holds all of K but the rotation. Two layouts, one for all such layers:
"v+rotated" stores V and, beside it, the rotated dims of K (Gemma 4: 512 + 128 values instead of 1,024); "v" stores V alone
(512), and attention rotates what it reads. Both fold w into the query for the dims that do not rotate, and the query is
the same: [q * w, zeros where dims rotate | its rotated values]. Exact in real arithmetic.
Source: transformers 5.23 models/gemma4/modeling_gemma4.py `Gemma4TextAttention.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast, get_args

from headwise.errors import UsageError
from headwise.spec.layers import KVLayout, LayerSpec, ModelSpec

PAGE_TOKENS = 64  # token slots per page of a global layer
DRAFT_TOKENS = 8  # most draft tokens that one verify step may append
TAIL_BLOCK = 32  # the rotated part of a one-tensor layer is padded to whole blocks of every KV format
KV_LAYOUTS = get_args(KVLayout)
FP8_MAX = 448.0  # the largest e4m3 value; larger ones saturate


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How cached values are stored: blocks of `block` values in `block_bytes` bytes along a head."""

    name: str
    block: int
    block_bytes: int

    def row_bytes(self, n_values: int) -> int:
        """Bytes of `n_values` consecutive values of one head; raises ValueError if blocks do not divide them."""
        if n_values % self.block:
            raise ValueError(f"{self.name}: {n_values} values are not whole blocks of {self.block}")
        return n_values // self.block * self.block_bytes

    @property
    def bytes_per_value(self) -> Fraction:
        return Fraction(self.block_bytes, self.block)

    @property
    def quantised(self) -> bool:
        return self.block > 1


KV_FORMATS: Mapping[str, KVFormat] = {
    f.name: f
    for f in (
        KVFormat("f32", 1, 4),
        KVFormat("f16", 1, 2),
        KVFormat("bf16", 1, 2),
        KVFormat("fp8", 1, 1),  # e4m3, saturating at 448, no scale
        KVFormat("q8_0", 32, 34),  # 32 int8 and one f16 scale (ggml-common.h block_q8_0)
        KVFormat("q4_0", 32, 18),  # 32 nibbles and one f16 scale (ggml-common.h block_q4_0)
    )
}


def kv_format(name: str) -> KVFormat:
    if name.lower() not in KV_FORMATS:
        raise UsageError(f"unknown KV type {name!r}", why="it is none of ours", do=f"one of: {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name.lower()]


def laid_out(spec: ModelSpec, asked: str | None) -> ModelSpec:
    """`spec` with its K=V layers in the layout asked for; None: "v+rotated", which costs attention nothing.

    Raises:
        UsageError: no such layout, or no such layers.
    """
    if asked is None:
        return spec
    if asked not in KV_LAYOUTS:
        raise UsageError(f"unknown KV layout {asked!r}", why="it is none of ours", do=f"one of: {', '.join(KV_LAYOUTS)}")
    if not any(layer.k_eq_v for layer in spec.layers):
        raise UsageError(
            f"--kv-layout {asked} says nothing of {spec.name}",
            why=f"none of its {len(spec.layers)} layers has one tensor for K and V",
            do="leave --kv-layout out",
        )
    layout = cast(KVLayout, asked)
    return replace(spec, layers=tuple(replace(x, kv_layout=layout) if x.k_eq_v else x for x in spec.layers))


def q_values(layer: LayerSpec) -> int:
    """Values of a key, and of a query's head, as attention has them: a head's, and for a K=V layer the rotated ones beside V's."""
    if not layer.k_eq_v:
        return layer.head_dim
    rotated = layer.rope.rotated_dims if layer.rope else 0
    return layer.head_dim + -(-rotated // TAIL_BLOCK) * TAIL_BLOCK


def k_values(layer: LayerSpec) -> int:
    """Values per token and KV head in the first tensor: K, or for a K=V layer V, with the rotated part of K in one layout."""
    return layer.head_dim if turned_pairs(layer) else q_values(layer)


def turned_pairs(layer: LayerSpec) -> int:
    """Pairs of dims that attention rotates itself, because the layer stores V alone; 0 where keys are stored as they are read."""
    return layer.rope.rotated_dims // 2 if layer.k_eq_v and layer.kv_layout == "v" and layer.rope else 0


def v_values(layer: LayerSpec) -> int:
    """Values per token and KV head in the second tensor; 0 where one tensor serves as both."""
    return 0 if layer.k_eq_v else layer.head_dim


def check_format(layer: LayerSpec, fmt: KVFormat) -> None:
    """Raises UsageError when blocks of `fmt` do not divide what a head stores."""
    for n in (k_values(layer), v_values(layer)):
        if n % fmt.block:
            raise UsageError(
                f"KV type {fmt.name} does not fit layer {layer.index}",
                why=f"its blocks of {fmt.block} values do not divide the {n} values a head stores",
                do="--kv f16 fits every head size",
            )


def kv_slots(layer: LayerSpec, *, n_tokens: int, chunk: int) -> int:
    """Token slots `layer` holds for one sequence of up to `n_tokens`.

    A windowed layer holds a ring: its window, one prefill chunk and room for draft tokens, never more than the
    sequence. A global layer holds whole pages. A layer with `kv_source` holds nothing.
    """
    if n_tokens < 0 or chunk <= 0:
        raise ValueError(f"kv_slots: n_tokens {n_tokens} (>= 0), chunk {chunk} (> 0)")
    if layer.kv_source is not None:
        return 0
    pages = -(-n_tokens // PAGE_TOKENS) * PAGE_TOKENS
    return pages if layer.window is None else min(layer.window + chunk + DRAFT_TOKENS, pages)


def kv_bytes(layer: LayerSpec, *, n_tokens: int, chunk: int, fmt: KVFormat) -> int:
    """Bytes `layer` holds for one sequence; what `cache.storage` allocates, to the byte.

    Args:
        n_tokens: prompt + generated, >= 0.
        chunk: most tokens that one prefill step appends, > 0.
    """
    per_token = layer.n_kv_heads * (fmt.row_bytes(k_values(layer)) + fmt.row_bytes(v_values(layer)))
    return kv_slots(layer, n_tokens=n_tokens, chunk=chunk) * per_token


def kv_read_bytes(layer: LayerSpec, *, position: int, fmt: KVFormat) -> int:
    """Bytes of cache one decode step reads in `layer` at `position` (keys 0..position); a sharing layer reads too."""
    if position < 0:
        raise ValueError(f"kv_read_bytes: position {position} (>= 0)")
    keys = position + 1 if layer.window is None else min(position + 1, layer.window)
    return keys * layer.n_kv_heads * (fmt.row_bytes(k_values(layer)) + fmt.row_bytes(v_values(layer)))
