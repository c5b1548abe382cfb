"""The decoder, written once and driven by the spec: embed, layers, norm, logits. Reads top to bottom.

It allocates nothing of its own: every result goes to a buffer of the arena (`planner.workspace` lists them), with
operators that take `out=`. It knows no device, no file and no environment.

Legend: T tokens of this step, D hidden size, H query heads, G KV heads, A dims per head, R rotated pairs.
Source of the maths: transformers 5.23 models/<family>/modeling_<family>.py; Gemma 4 also google-deepmind/gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Span
from headwise.model.arena import Arena
from headwise.model.linear import linear, rows
from headwise.model.mlp import dense, experts_beside_dense, gelu_tanh_, routed_experts
from headwise.model.norm import rms_norm
from headwise.planner.workspace import ropes
from headwise.spec.kv import k_values
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.weights.blocks import Weight

Weights = Mapping[str, Weight]
LayerWeights = Mapping[str, Any]  # our short name -> a Tensor, or for a matrix that stays quantised a BlockTensor
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


class HeadViews(NamedTuple):
    """The projected heads of one layer in their buffer, from every side that the layer looks at them."""

    packed: Tensor  # (T, all heads * A)
    flat: dict[str, Tensor]  # q, k, v as (T, heads * A)
    normed: Tensor  # (T, heads that are normed, A)
    q: Tensor  # (T, H, A)
    k: Tensor  # (T, G, A); of a layer that owns no cache: not its own, and not read
    v: Tensor | None
    rotated: tuple[Tensor, Tensor] | None  # both halves of the pairs of q, and of k where it is rotated here


class Decoder:
    """Weights and the order of operations; the state of a sequence lives in its caches.

    Args:
        attends: one function per layer, chosen by `attention.choose`.
        tile_tokens: cached keys converted at a time where a cache stores another type.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, attends: Sequence[Attend], tile_tokens: int) -> None:
        self.spec, self.attends, self.tile_tokens = spec, attends, tile_tokens
        self.w: LayerWeights = weights
        self.per_layer: list[LayerWeights] = [
            {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")}
            for i in range(len(spec.layers))
        ]
        self.rope_index = {rope: i for i, rope in enumerate(ropes(spec))}
        self.pairs = [layer.rope.rotated_dims // 2 if layer.rope else 0 for layer in spec.layers]
        self.key_dims = [k_values(layer) for layer in spec.layers]
        self.mask_names = [f"mask.{layer.window}" for layer in spec.layers]

    def forward(self, step: Step, caches: Mapping[int, LayerCache]) -> Tensor:
        """The hidden state of every token of the step, (T, D), after the last layer and before the final norm.

        Args:
            caches: by the index of the layer that owns it.
        """
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
        h = rms_norm(x_TD, self.w["norm"], arena.take("h", *x_TD.shape), arena)
        if out is None:
            out = arena.take("logits", x_TD.shape[0], spec.vocab_size)
        linear(h, self.w["embed" if spec.tied else "head"], out, arena.flat("weight.tile"))
        if spec.final_softcap is not None:
            out.div_(spec.final_softcap).tanh_().mul_(spec.final_softcap)
        return out

    def _attention(self, layer: LayerSpec, w: LayerWeights, attend: Attend, cache: LayerCache, step: Step, x: Tensor) -> None:
        """x += o(attention(norm(x))), with the norms where the family has them."""
        spec, arena, T = self.spec, step.arena, step.n
        H, A = layer.n_heads, layer.head_dim
        h = x if spec.norms == "post" else rms_norm(x, w["attn_norm"], arena.take("h", *x.shape), arena)
        owns = layer.kv_source is None
        views = self._project(layer, w, h, arena)
        if layer.qk_norm:  # q, k and (where it has one) v share one statistic pass; their weights differ
            rms_norm(views.normed, None, views.normed, arena)
            views.q.mul_(w["q_norm"])
            if owns and not layer.k_eq_v:
                views.k.mul_(w["k_norm"])
        if views.rotated is not None:
            self._rotate(*views.rotated, layer, arena, T)
        q = views.q
        if layer.k_eq_v:
            if owns:
                self._store_one(layer, w, cache, step, views.k)
            q = self._query_for_one(layer, w, q, arena)
        elif owns:
            cache.write(step.start, views.k, views.v, arena.flat("kv.write"))
        out = arena.take("attn", T, H, A)
        mask = arena.get(self.mask_names[layer.index]) if T > 1 else None
        if mask is not None:
            mask = mask[:T, : min(cache.n_slots, step.start + T)]
        span = Span(step.start, T, mask, arena.flat("span"))
        sinks, scratch = w.get("sinks"), arena.keep("scratch", lambda: self._scratch(arena))
        attend(q, cache, span, scale=layer.scale, softcap=layer.softcap, sinks_H=sinks, scratch=scratch, out_THD=out)
        y = linear(out.flatten(1), w["o"], arena.take("y", *x.shape), arena.flat("weight.tile"))
        if layer.o_bias:
            y.add_(w["o_bias"])
        self._add_branch(y, w.get("attn_post_norm"), x, arena)

    def _scratch(self, arena: Arena) -> Scratch:
        return Scratch(arena.flat("kv.k"), arena.flat("kv.v"), arena.flat("partial"), arena.flat("done"), self.tile_tokens)

    def _project(self, layer: LayerSpec, w: LayerWeights, h: Tensor, arena: Arena) -> HeadViews:
        """q, then k and v where the layer owns its cache (k alone where K=V), as heads side by side."""
        T = h.shape[0]
        views = arena.keep(("heads", T, layer.index), lambda: self._head_views(layer, "k" in w, "v" in w, T, arena))
        tile = arena.flat("weight.tile")
        if "qkv" in w:
            linear(h, w["qkv"], views.packed, tile)
        else:  # members of different types stand apart
            for name, part in views.flat.items():
                linear(h, w[name], part, tile)
        if layer.qkv_bias:
            for name, part in views.flat.items():
                part.add_(w[f"{name}_bias"])
        return views

    def _head_views(self, layer: LayerSpec, has_k: bool, has_v: bool, T: int, arena: Arena) -> HeadViews:
        H, G, A = layer.n_heads, layer.n_kv_heads, layer.head_dim
        counts = {"q": H} | ({"k": G} if has_k else {}) | ({"v": G} if has_v else {})
        packed = arena.take("qkv", T, sum(counts.values()) * A)
        heads = packed.unflatten(-1, (-1, A))
        parts = dict(zip(counts, heads.split(list(counts.values()), dim=1), strict=True))
        flat = dict(zip(counts, packed.split([n * A for n in counts.values()], dim=-1), strict=True))
        n_normed = heads.shape[1] if layer.v_norm or not has_v else H + G
        rotated = None
        if layer.rope is not None:  # K of a K=V layer is rotated where it is stored
            half, pairs = A // 2, self.pairs[layer.index]
            turning = heads[:, : H + (G if has_k and not layer.k_eq_v else 0)]
            rotated = (turning[..., :pairs], turning[..., half : half + pairs])
        return HeadViews(packed, flat, heads[:, :n_normed], parts["q"], parts.get("k", heads), parts.get("v"), rotated)

    def _rotate(self, a: Tensor, b: Tensor, layer: LayerSpec, arena: Arena, T: int) -> None:
        """RoPE in place: a holds the first, b the second dims of the rotating pairs (i, i + A / 2)."""
        cos, sin = arena.keep(("rope", T, layer.index), lambda: self._tables(layer, arena, T))
        tmp = torch.mul(a, sin, out=arena.take("rope.tmp", *a.shape))
        a.mul_(cos).addcmul_(b, sin, value=-1.0)
        b.mul_(cos).add_(tmp)

    def _tables(self, layer: LayerSpec, arena: Arena, T: int) -> tuple[Tensor, Tensor]:
        assert layer.rope is not None
        names = (f"rope.{self.rope_index[layer.rope]}.{t}" for t in ("cos", "sin"))
        cos, sin = (arena.take(name, T, 1, self.pairs[layer.index]) for name in names)
        return cos, sin

    def _store_one(self, layer: LayerSpec, w: LayerWeights, cache: LayerCache, step: Step, v: Tensor) -> None:
        """K=V: V = norm(u), given, and beside it the rotated dims of K = RoPE(w_k * V). `spec.kv` says why this is exact."""
        arena, T, A = step.arena, step.n, layer.head_dim
        one = arena.take("kv.one", T, layer.n_kv_heads, cache.k.n_values)
        one[..., :A].copy_(v)
        if layer.rope is not None:
            half, pairs = A // 2, self.pairs[layer.index]
            a, b = one[..., A : A + pairs], one[..., A + pairs : A + 2 * pairs]
            torch.mul(v[..., :pairs], w["k_norm"][:pairs], out=a)
            torch.mul(v[..., half : half + pairs], w["k_norm"][half : half + pairs], out=b)
            self._rotate(a, b, layer, arena, T)
            one[..., A + 2 * pairs :].zero_()  # padding, see spec.kv
        cache.write(step.start, one, None, arena.flat("kv.write"))

    def _query_for_one(self, layer: LayerSpec, w: LayerWeights, q: Tensor, arena: Arena) -> Tensor:
        """The query against [V, rotated K]: w_k folded into the dims that do not rotate, the rotated ones moved."""
        T, H, A = q.shape
        half, pairs = A // 2, self.pairs[layer.index]
        out = arena.take("q.one", T, H, self.key_dims[layer.index])
        torch.mul(q, w["k_norm"], out=out[..., :A])
        if pairs:
            out[..., :pairs].zero_()
            out[..., half : half + pairs].zero_()
            out[..., A : A + pairs].copy_(q[..., :pairs])
            out[..., A + pairs : A + 2 * pairs].copy_(q[..., half : half + pairs])
            out[..., A + 2 * pairs :].zero_()
        return out

    def _mlp(self, layer: LayerSpec, w: LayerWeights, step: Step, x: Tensor) -> None:
        """x += mlp(norm(x)): dense, routed experts, or Gemma 4's both."""
        spec, arena, moe = self.spec, step.arena, layer.mlp.moe
        h = x if spec.norms == "post" else rms_norm(x, w["mlp_norm"], arena.take("h", *x.shape), arena)
        y = arena.take("y", *x.shape)
        if moe and moe.beside_dense:
            experts_beside_dense(layer.mlp, w, x, h, y, arena)
        elif moe:
            routed_experts(moe, w, h, h, y, arena)
        else:
            dense(layer.mlp, w, h, y, arena)
        self._add_branch(y, w.get("mlp_post_norm"), x, arena)

    def _add_branch(self, y: Tensor, post_norm: Tensor | None, x: Tensor, arena: Arena) -> None:
        if post_norm is not None:
            rms_norm(y, post_norm, y, arena)
        x.add_(y)

    def _per_layer_embeddings(self, step: Step, x: Tensor) -> Tensor:
        """One slice per layer, (T, layers, P): half from the token's own row, half from its scaled embedding."""
        spec, arena, T = self.spec, step.arena, step.n
        assert spec.ple is not None
        P, L = spec.ple.dim, len(spec.layers)
        token = rows(self.w["ple.embed"], step.ids_T, arena.take("ple.rows", T, L * P)).mul_(P**0.5)
        ple = linear(x, self.w["ple.proj"], arena.take("ple", T, L * P), arena.flat("weight.tile")).mul_(spec.hidden**-0.5)
        ple_TLP = ple.unflatten(-1, (L, P))
        rms_norm(ple_TLP, self.w["ple.norm"], ple_TLP, arena)
        ple.add_(token).mul_(2**-0.5)
        return ple_TLP

    def _add_ple(self, w: LayerWeights, step: Step, x: Tensor, ple_TP: Tensor) -> None:
        arena = step.arena
        gate = linear(x, w["ple_gate"], arena.take("ple.gate", step.n, ple_TP.shape[-1]), arena.flat("weight.tile"))
        gelu_tanh_(gate).mul_(ple_TP)
        y = linear(gate, w["ple_proj"], arena.take("y", *x.shape), arena.flat("weight.tile"))
        self._add_branch(y, w["ple_post_norm"], x, arena)
