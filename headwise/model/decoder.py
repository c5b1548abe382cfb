"""The decoder, written once and driven by the spec: embed, layers, norm, logits. Reads top to bottom.

It allocates nothing of its own: every result goes to a buffer of the arena (`planner.workspace` lists them), with
operators that take `out=`. It knows no device, no file and no environment.

Legend: T tokens of this step, D hidden size, H query heads, G KV heads, A dims per head, R rotated pairs.
Source of the maths: transformers 5.23 models/<family>/modeling_<family>.py; Gemma 4 also google-deepmind/gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Span
from headwise.model.arena import Arena
from headwise.model.heads import HeadShape, HeadViews, LayerWeights, Step, head_views
from headwise.model.linear import acted, linear, linears, rows
from headwise.model.mlp import dense, experts_beside_dense, routed_experts
from headwise.model.ops import PLAIN, Ops
from headwise.planner.workspace import ropes
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.weights.blocks import Weight

Weights = Mapping[str, Weight]
Attend = Callable[..., None]


class Decoder:
    """Weights and the order of operations; the state of a sequence lives in its caches.

    Args:
        attends: one function per layer, chosen by `attention.choose`.
        tile_tokens: cached keys converted at a time where a cache stores another type.
        ops: what stands between the products, `model.ops`.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, attends: Sequence[Attend], tile_tokens: int, ops: Ops = PLAIN) -> None:
        self.spec, self.attends, self.tile_tokens, self.ops = spec, attends, tile_tokens, ops
        self.w: LayerWeights = weights
        self.per_layer: list[LayerWeights] = [
            {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")}
            for i in range(len(spec.layers))
        ]
        rope_index = {rope: i for i, rope in enumerate(ropes(spec))}
        self.shapes = [HeadShape.of(layer, rope_index) for layer in spec.layers]
        norms = [w.get("attn_norm") for w in self.per_layer]  # None where a family norms after each branch alone
        self.first_norm, self.next_norms = norms[0], [*norms[1:], None]
        self.mask_names = [f"mask.{layer.window}" for layer in spec.layers]

    def forward(self, step: Step, caches: Mapping[int, LayerCache]) -> Tensor:
        """The hidden state of every token of the step, (T, D), after the last layer and before the final norm.

        Args:
            caches: by the index of the layer that owns it.
        """
        spec, arena, ops = self.spec, step.arena, self.ops
        x = arena.take("x", step.n, spec.hidden)
        rows(self.w["embed"], step.ids_T, x)
        if spec.embed_scale != 1.0:
            x.mul_(torch.tensor(spec.embed_scale, dtype=x.dtype))  # the scale is rounded to the activations' type
        ple = self._per_layer_embeddings(step, x) if spec.ple else None
        free = arena.take("h", *x.shape)
        h = x if self.first_norm is None else ops.norm(x, self.first_norm, free, arena)
        for layer, w, attend, after in zip(spec.layers, self.per_layer, self.attends, self.next_norms, strict=True):
            cache = caches[layer.index if layer.kv_source is None else layer.kv_source]
            y = self._attention(layer, w, attend, cache, step, h)
            h = ops.branch(y, w.get("attn_post_norm"), x, w.get("mlp_norm"), free, arena)
            y = self._mlp(layer, w, step, x, h)
            scale = w["layer_scalar"] if spec.layer_scalar else None
            if ple is None:
                h = ops.branch(y, w.get("mlp_post_norm"), x, after, free, arena, scale)
            else:
                ops.branch(y, w.get("mlp_post_norm"), x, None, free, arena)
                y = self._ple(w, step, x, ple[:, layer.index])
                h = ops.branch(y, w["ple_post_norm"], x, after, free, arena, scale)
        return x

    def logits(self, x_TD: Tensor, arena: Arena, out: Tensor | None = None) -> Tensor:
        """Logits of the given hidden states, (T, vocab)."""
        spec = self.spec
        h = self.ops.norm(x_TD, self.w["norm"], arena.take("h", *x_TD.shape), arena)
        if out is None:
            out = arena.take("logits", x_TD.shape[0], spec.vocab_size)
        linear(h, self.w["embed" if spec.tied else "head"], out, arena.room)
        if spec.final_softcap is not None:
            out.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)
        return out

    def _attention(self, layer: LayerSpec, w: LayerWeights, attend: Attend, cache: LayerCache, step: Step, h: Tensor) -> Tensor:
        """o(attention(h)), (T, D)."""
        arena, T = step.arena, step.n
        shape = self.shapes[layer.index]
        q = self.ops.heads(shape, w, self._project(shape, w, h, arena), cache, step)
        out = arena.take("attn", T, layer.n_heads, layer.head_dim)
        mask = arena.get(self.mask_names[layer.index]) if T > 1 else None
        if mask is not None:
            mask = mask[:T, : min(cache.n_slots, step.start + T)]
        span = Span(step.start, T, mask, arena.flat("span"))
        sinks, scratch = w.get("sinks"), arena.keep("scratch", lambda: self._scratch(arena))
        attend(q, cache, span, scale=layer.scale, softcap=layer.softcap, sinks_H=sinks, scratch=scratch, out_THD=out)
        y = linear(out.flatten(1), w["o"], arena.take("y", T, self.spec.hidden), arena.room)
        return y.add_(w["o_bias"]) if layer.o_bias else y

    def _scratch(self, arena: Arena) -> Scratch:
        return Scratch(arena.flat("kv.k"), arena.flat("kv.v"), arena.flat("partial"), arena.flat("done"), self.tile_tokens)

    def _project(self, shape: HeadShape, w: LayerWeights, h: Tensor, arena: Arena) -> HeadViews:
        """q, then k and v where the layer owns its cache (k alone where K=V), as heads side by side."""
        T = h.shape[0]
        views = arena.keep(("heads", T, shape.layer.index), lambda: head_views(shape, "k" in w, "v" in w, T, arena))
        if "qkv" in w:
            linear(h, w["qkv"], views.packed, arena.room)
        else:  # members of different types stand apart
            linears(h, [(w[name], part) for name, part in views.flat.items()], arena.room)
        if shape.layer.qkv_bias:
            for name, part in views.flat.items():
                part.add_(w[f"{name}_bias"])
        return views

    def _mlp(self, layer: LayerSpec, w: LayerWeights, step: Step, x: Tensor, h: Tensor) -> Tensor:
        """mlp(h), (T, D): dense, routed experts, or Gemma 4's both."""
        arena, moe = step.arena, layer.mlp.moe
        y = arena.take("y", *x.shape)
        if moe and moe.beside_dense:
            return experts_beside_dense(layer.mlp, w, x, h, y, arena, self.ops)
        if moe:
            return routed_experts(moe, w, h, h, y, arena, self.ops)
        return dense(layer.mlp, w, h, y, arena, self.ops)

    def _per_layer_embeddings(self, step: Step, x: Tensor) -> Tensor:
        """One slice per layer, (T, layers, P): half from the token's own row, half from its scaled embedding."""
        spec, arena, T = self.spec, step.arena, step.n
        assert spec.ple is not None
        P, L = spec.ple.dim, len(spec.layers)
        token = rows(self.w["ple.embed"], step.ids_T, arena.take("ple.rows", T, L * P)).mul_(P**0.5)
        ple = linear(x, self.w["ple.proj"], arena.take("ple", T, L * P), arena.room).mul_(spec.hidden**-0.5)
        ple_TLP = ple.unflatten(-1, (L, P))
        self.ops.norm(ple_TLP, self.w["ple.norm"], ple_TLP, arena)
        ple.add_(token).mul_(2**-0.5)
        return ple_TLP

    def _ple(self, w: LayerWeights, step: Step, x: Tensor, ple_TP: Tensor) -> Tensor:
        arena = step.arena
        gate = arena.take("ple.gate", step.n, ple_TP.shape[-1])
        if not acted(x, w["ple_gate"], "gelu_tanh", gate, arena.room, ple_TP):
            linear(x, w["ple_gate"], gate, arena.room)
            self.ops.gate("gelu_tanh", gate, ple_TP, None)
        return linear(gate, w["ple_proj"], arena.take("y", *x.shape), arena.room)
