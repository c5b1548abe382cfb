"""The weight tensors of a model, in our own names: the planner sums them, the loader fills them, the decoder reads them.

Shapes are (out, in), as in Hugging Face checkpoints. A layer that shares another's cache has no k, v or k_norm, even
where a checkpoint still carries dead ones; a K=V layer has no v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from headwise.spec.layers import LayerSpec, ModelSpec

Role = Literal["table", "matrix", "experts", "vector"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: `table` is looked up by row, `matrix` multiplied, `experts` a stack of matrices, `vector` small."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def layer_of(name: str) -> int:
    """The layer of a tensor of one, by its name."""
    return int(name.split(".")[1])


def weight_tensors(spec: ModelSpec, layers: range | None = None) -> tuple[TensorSpec, ...]:
    """Every tensor the decoder of `spec` reads, in the order a forward pass meets them.

    Args:
        layers: those of a stage that runs these alone; default all.
    """
    layers = range(len(spec.layers)) if layers is None else layers
    before, after = outer_tensors(spec, layers)
    return (
        *before,
        *(TensorSpec(f"layers.{i}.{t.name}", t.shape, t.role) for i in layers for t in _layer_tensors(spec, spec.layers[i])),
        *after,
    )


def outer_tensors(spec: ModelSpec, layers: range) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """What a stage that runs `layers` reads before and after them: only the first embeds, only the last has the logits.

    A tied embedding is a tensor of both.
    """
    first, last = layers.start == 0, layers.stop == len(spec.layers)
    before: list[TensorSpec] = []
    if first or (last and spec.tied):
        before.append(TensorSpec("embed", (spec.vocab_size, spec.hidden), "table"))
    if first and spec.ple:
        width = spec.ple.dim * len(spec.layers)
        before += [
            TensorSpec("ple.embed", (spec.ple.vocab_size, width), "table"),
            TensorSpec("ple.proj", (width, spec.hidden), "matrix"),
            TensorSpec("ple.norm", (spec.ple.dim,), "vector"),
        ]
    after = [TensorSpec("norm", (spec.hidden,), "vector")] if last else []
    if last and not spec.tied:
        after.append(TensorSpec("head", (spec.vocab_size, spec.hidden), "matrix"))
    return before, after


def _layer_tensors(spec: ModelSpec, layer: LayerSpec) -> Iterator[TensorSpec]:
    hidden, mlp, moe = spec.hidden, layer.mlp, layer.mlp.moe
    q_width, kv_width = layer.n_heads * layer.head_dim, layer.n_kv_heads * layer.head_dim

    def vector(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, shape, "vector")

    def matrix(name: str, rows: int, columns: int) -> TensorSpec:
        return TensorSpec(name, (rows, columns), "matrix")

    if spec.norms != "post":
        yield vector("attn_norm", hidden)
    owns_kv = layer.kv_source is None
    projections = [("q", q_width)] + [("k", kv_width)] * owns_kv + [("v", kv_width)] * (owns_kv and not layer.k_eq_v)
    for name, width in projections:
        yield matrix(name, width, hidden)
        if layer.qkv_bias:
            yield vector(f"{name}_bias", width)
    if layer.qk_norm:
        yield vector("q_norm", layer.head_dim)
        if owns_kv:
            yield vector("k_norm", layer.head_dim)
    if layer.sinks:
        yield vector("sinks", layer.n_heads)
    yield matrix("o", hidden, q_width)
    if layer.o_bias:
        yield vector("o_bias", hidden)
    if spec.norms != "pre":
        yield vector("attn_post_norm", hidden)
    if spec.norms != "post":
        yield vector("mlp_norm", hidden)
    if mlp.width:
        for name, shape in (("gate", (mlp.width, hidden)), ("up", (mlp.width, hidden)), ("down", (hidden, mlp.width))):
            yield matrix(name, *shape)
            if mlp.bias:
                yield vector(f"{name}_bias", shape[0])
    if moe:
        yield TensorSpec("router", (moe.n_experts, hidden), "vector")  # kept in full precision by every format
        if moe.bias:
            yield vector("router_bias", moe.n_experts)
        if moe.beside_dense:
            yield vector("router_scale", hidden)
            yield vector("expert_scale", moe.n_experts)
            yield vector("mlp_post_norm_1", hidden)
            yield vector("experts_norm", hidden)
            yield vector("experts_post_norm", hidden)
        for name, rows, columns in (
            ("experts_gate", moe.width, hidden),
            ("experts_up", moe.width, hidden),
            ("experts_down", hidden, moe.width),
        ):
            yield TensorSpec(name, (moe.n_experts, rows, columns), "experts")
            if moe.bias:
                yield vector(f"{name}_bias", moe.n_experts, rows)
    if spec.norms != "pre":
        yield vector("mlp_post_norm", hidden)
    if spec.ple:
        yield matrix("ple_gate", spec.ple.dim, hidden)
        yield matrix("ple_proj", hidden, spec.ple.dim)
        yield vector("ple_post_norm", hidden)
    if spec.layer_scalar:
        yield vector("layer_scalar", 1)
