"""The decoder, written once and driven by the spec: embed, layers, norm, logits. Reads top to bottom.

It allocates nothing of its own: every result goes to a buffer of the arena (`planner.workspace` lists them), with
operators that take `out=`. It knows no device, no file and no environment.

Legend: T tokens of this step, D hidden size, H query heads, G KV heads, A dims per head, R rotated pairs.
Source of the maths: transformers 5.23 models/<family>/modeling_<family>.py; Gemma 4 also google-deepmind/gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache
from headwise.model.arena import Arena
from headwise.model.mlp import dense, experts_beside_dense, gelu_tanh_, routed_experts
from headwise.model.norm import rms_norm
from headwise.planner.workspace import ropes
from headwise.spec.kv import k_values
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.weights.blocks import Weight
from headwise.model.linear import linear, rows

Weights = Mapping[str, Weight]
Attend = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: `ids_T` at positions [start, start + T). Rope tables and ring masks are filled once, for all layers."""

    ids_T: Tensor
    start: int
    arena: Arena

    @property
    def n(self) -> int:
        return self.ids_T.shape[0]


class Decoder:
    """Weights and the order of operations; the state of a sequence lives in its caches.

    Args:
        attends: one function per layer, chosen by `attention.choose`.
        tile_tokens: cached keys converted at a time where a cache stores another type.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, attends: Sequence[Attend], tile_tokens: int) -> None:
        self.spec, self.attends, self.tile_tokens = spec, attends, tile_tokens
        self.w = weights
        self.per_layer = [
            {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")}
            for i in range(len(spec.layers))
        ]
        self.rope_index = {rope: i for i, rope in enumerate(ropes(spec))}

    def forward(self, step: Step, caches: Sequence[LayerCache]) -> Tensor:
        """The hidden state of every token of the step, (T, D), after the last layer and before the final norm."""
        spec, arena = self.spec, step.arena
        x = arena.take("x", step.n, spec.hidden)
        rows(self.w["embed"], step.ids_T, x)
        if spec.embed_scale != 1.0:
            x.mul_(torch.tensor(spec.embed_scale, dtype=x.dtype))  # the scale is rounded to the activations' type
        ple = self._per_layer_embeddings(step, x) if spec.ple else None
        for layer, w, attend in zip(spec.layers, self.per_layer, self.attends, strict=True):
            cache = caches[layer.index if layer.kv_source is None else layer.kv_source]
            self._attention(layer, w, attend, cache, step, x)
            self._mlp(layer, w, step, x)
            if ple is not None:
                self._add_ple(w, step, x, ple[:, layer.index])
            if spec.layer_scalar:
                x.mul_(w["layer_scalar"])
        return x

    def logits(self, x_TD: Tensor, arena: Arena, out: Tensor | None = None) -> Tensor:
        """Logits of the given hidden states, (T, vocab)."""
        spec = self.spec
        h = rms_norm(x_TD, self.w["norm"], spec.rms_eps, arena.take("h", *x_TD.shape), arena)
        if out is None:
            out = arena.take("logits", x_TD.shape[0], spec.vocab_size)
        linear(h, self.w["embed" if spec.tied else "head"], out, arena.flat("weight.tile"))
        if spec.final_softcap is not None:
            out.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)
        return out

    def _attention(
        self, layer: LayerSpec, w: Mapping[str, Tensor], attend: Attend, cache: LayerCache, step: Step, x: Tensor
    ) -> None:
        """x += o(attention(norm(x))), with the norms where the family has them."""
        spec, arena, T = self.spec, step.arena, step.n
        H, G, A = layer.n_heads, layer.n_kv_heads, layer.head_dim
        h = x if spec.norms == "post" else rms_norm(x, w["attn_norm"], spec.rms_eps, arena.take("h", *x.shape), arena)
        owns = layer.kv_source is None
        heads, parts = self._projections(layer, w, h, arena)
        q, *kv = parts
        if layer.qk_norm:  # q, k and (where it has one) v share one statistic pass; their weights differ
            n = heads.shape[1] if layer.v_norm or not owns else H + G
            rms_norm(heads[:, :n], None, spec.rms_eps, heads[:, :n], arena)
            q.mul_(w["q_norm"])
        self._rotate(q, layer, arena, T)
        if layer.k_eq_v:
            if owns:
                self._store_one(layer, w, cache, step, kv[0])
            q = self._query_for_one(layer, w, q, arena)
        elif owns:
            k, v = kv
            if layer.qk_norm:
                k.mul_(w["k_norm"])
            self._rotate(k, layer, arena, T)
            cache.write(step.start, k, v, arena.flat("kv.k"))
        out = arena.take("attn", T, H, A)
        mask = arena.get(f"mask.{layer.window}")
        attend(
            q,
            cache,
            cache.segments(step.start, T, None if mask is None else mask[:T, : min(cache.n_slots, step.start + T)]),
            scale=layer.scale,
            softcap=layer.softcap,
            sinks_H=w.get("sinks"),
            scratch=(arena.flat("kv.k"), arena.flat("kv.v")),
            tile_tokens=self.tile_tokens,
            out_THD=out,
        )
        y = linear(out.flatten(1), w["o"], arena.take("y", *x.shape), arena.flat("weight.tile"))
        if layer.o_bias:
            y.add_(w["o_bias"])
        self._add_branch(y, w.get("attn_post_norm"), x, arena)

    def _projections(
        self, layer: LayerSpec, w: Mapping[str, Tensor], h: Tensor, arena: Arena
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All heads side by side, (T, H + 2G, A), and the same as q, k, v; k and v only where the layer owns its cache,
        k alone where K=V."""
        counts = [layer.n_heads] + [layer.n_kv_heads] * (("k" in w) + ("v" in w))
        names = ("q", "k", "v")[: len(counts)]
        packed = arena.take("qkv", h.shape[0], sum(counts) * layer.head_dim)
        tile = arena.flat("weight.tile")
        heads = packed.unflatten(-1, (-1, layer.head_dim))
        if "qkv" in w:
            linear(h, w["qkv"], packed, tile)
        else:  # members of different types stand apart
            for name, part in zip(names, packed.split([n * layer.head_dim for n in counts], dim=-1), strict=True):
                linear(h, w[name], part, tile)
        parts = heads.split(counts, dim=1)
        if layer.qkv_bias:
            for name, part in zip(names, parts, strict=True):
                part.add_(w[f"{name}_bias"].view(-1, layer.head_dim))
        return heads, parts

    def _rotate(self, x_THA: Tensor, layer: LayerSpec, arena: Arena, T: int) -> None:
        """RoPE in place on the rotated pairs (i, i + A / 2)."""
        if layer.rope is None:
            return
        half, pairs = layer.head_dim // 2, layer.rope.rotated_dims // 2
        self._rotate_pairs(x_THA[..., :pairs], x_THA[..., half : half + pairs], layer, arena, T)

    def _rotate_pairs(self, a: Tensor, b: Tensor, layer: LayerSpec, arena: Arena, T: int) -> None:
        assert layer.rope is not None
        i = self.rope_index[layer.rope]
        cos, sin = (arena.take(f"rope.{i}.{t}", T, 1, a.shape[-1]) for t in ("cos", "sin"))
        tmp = torch.mul(a, sin, out=arena.take("rope.tmp", *a.shape))
        a.mul_(cos).addcmul_(b, sin, value=-1.0)
        b.mul_(cos).add_(tmp)

    def _store_one(self, layer: LayerSpec, w: Mapping[str, Tensor], cache: LayerCache, step: Step, v: Tensor) -> None:
        """K=V: V = norm(u), given, and beside it the rotated dims of K = RoPE(w_k * V). `spec.kv` says why this is exact."""
        arena, T, A = step.arena, step.n, layer.head_dim
        one = arena.take("kv.one", T, layer.n_kv_heads, cache.k.n_values)
        one[..., :A].copy_(v)
        if layer.rope is not None:
            half, pairs = A // 2, layer.rope.rotated_dims // 2
            a, b = one[..., A : A + pairs], one[..., A + pairs : A + 2 * pairs]
            torch.mul(v[..., :pairs], w["k_norm"][:pairs], out=a)
            torch.mul(v[..., half : half + pairs], w["k_norm"][half : half + pairs], out=b)
            self._rotate_pairs(a, b, layer, arena, T)
            one[..., A + 2 * pairs :].zero_()  # padding, see spec.kv
        cache.write(step.start, one, None, arena.flat("kv.k"))

    def _query_for_one(self, layer: LayerSpec, w: Mapping[str, Tensor], q: Tensor, arena: Arena) -> Tensor:
        """The query against [V, rotated K]: w_k folded into the dims that do not rotate, the rotated ones moved."""
        T, H, A = q.shape
        half, pairs = A // 2, layer.rope.rotated_dims // 2 if layer.rope else 0
        out = arena.take("q.one", T, H, k_values(layer))
        torch.mul(q, w["k_norm"], out=out[..., :A])
        if pairs:
            out[..., :pairs].zero_()
            out[..., half : half + pairs].zero_()
            out[..., A : A + pairs].copy_(q[..., :pairs])
            out[..., A + pairs : A + 2 * pairs].copy_(q[..., half : half + pairs])
            out[..., A + 2 * pairs :].zero_()
        return out

    def _mlp(self, layer: LayerSpec, w: Mapping[str, Tensor], step: Step, x: Tensor) -> None:
        """x += mlp(norm(x)): dense, routed experts, or Gemma 4's both."""
        spec, arena, moe = self.spec, step.arena, layer.mlp.moe
        h = x if spec.norms == "post" else rms_norm(x, w["mlp_norm"], spec.rms_eps, arena.take("h", *x.shape), arena)
        y = arena.take("y", *x.shape)
        if moe and moe.beside_dense:
            experts_beside_dense(layer.mlp, w, x, h, y, arena, spec.rms_eps)
        elif moe:
            routed_experts(moe, w, h, h, y, arena)
        else:
            dense(layer.mlp, w, h, y, arena)
        self._add_branch(y, w.get("mlp_post_norm"), x, arena)

    def _add_branch(self, y: Tensor, post_norm: Tensor | None, x: Tensor, arena: Arena) -> None:
        if post_norm is not None:
            rms_norm(y, post_norm, self.spec.rms_eps, y, arena)
        x.add_(y)

    def _per_layer_embeddings(self, step: Step, x: Tensor) -> Tensor:
        """One slice per layer, (T, layers, P): half from the token's own row, half from its scaled embedding."""
        spec, arena, T = self.spec, step.arena, step.n
        assert spec.ple is not None
        P, L = spec.ple.dim, len(spec.layers)
        token = rows(self.w["ple.embed"], step.ids_T, arena.take("ple.rows", T, L * P)).mul_(P**0.5)
        ple = linear(x, self.w["ple.proj"], arena.take("ple", T, L * P), arena.flat("weight.tile")).mul_(spec.hidden**-0.5)
        ple_TLP = ple.unflatten(-1, (L, P))
        rms_norm(ple_TLP, self.w["ple.norm"], spec.rms_eps, ple_TLP, arena)
        ple.add_(token).mul_(2**-0.5)
        return ple_TLP

    def _add_ple(self, w: Mapping[str, Tensor], step: Step, x: Tensor, ple_TP: Tensor) -> None:
        arena = step.arena
        gate = linear(x, w["ple_gate"], arena.take("ple.gate", step.n, ple_TP.shape[-1]), arena.flat("weight.tile"))
        gelu_tanh_(gate).mul_(ple_TP)
        y = linear(gate, w["ple_proj"], arena.take("y", *x.shape), arena.flat("weight.tile"))
        self._add_branch(y, w["ple_post_norm"], x, arena)
