"""The decoder, written once and driven by the spec: embed, layers, norm, logits. Reads top to bottom.

One that runs a part of the layers begins with what the part before it has left, and ends with what the next one needs. It
allocates nothing of its own: every result goes to a buffer of the arena (`planner.workspace` lists them), with
operators that take `out=`. It knows no device, no file and no environment.

Legend: T tokens of this step, D hidden size, H query heads, G KV heads, A dims per head, R rotated pairs.
Source of the maths: transformers 5.23 models/<family>/modeling_<family>.py; Gemma 4 also google-deepmind/gemma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch
from headwise.model.arena import Arena
from headwise.model.heads import HeadShape, HeadViews, LayerWeights, Step, Tail, head_views
from headwise.model.linear import acted, linear, linears, rows
from headwise.model.mlp import dense, experts_beside_dense, routed_experts
from headwise.model.ops import PLAIN, Ops
from headwise.planner.workspace import ropes
from headwise.spec.layers import LayerSpec, ModelSpec
from headwise.weights.blocks import Weight

Weights = Mapping[str, Weight]
Attend = Callable[..., None]


def readers(spec: ModelSpec) -> int:
    """The first of the last layers that own no cache: from there on only tokens whose hidden states are wanted matter."""
    return 1 + max(layer.index for layer in spec.kv_layers)


class Decoder:
    """Weights and the order of operations; the state of a sequence lives in its caches.

    Args:
        layers: those it runs; the first part also embeds, the last has the final norm and the logits.
        attends: one function per layer it runs, chosen by `attention.choose`.
        tile_tokens: cached keys converted at a time where a cache stores another type.
        ops: what stands between the products, `model.ops`.
    """

    def __init__(
        self, spec: ModelSpec, layers: range, weights: Weights, attends: Sequence[Attend], tile_tokens: int, ops: Ops = PLAIN
    ) -> None:
        self.spec, self.layers, self.attends, self.tile_tokens, self.ops = spec, layers, attends, tile_tokens, ops
        self.w: LayerWeights = weights
        self.per_layer: list[LayerWeights] = [
            {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{i}.")} for i in layers
        ]
        self.ropes = [(rope, rope.rotated_dims // 2) for rope in ropes(spec)]
        rope_index = {rope: i for i, (rope, _) in enumerate(self.ropes)}
        self.shapes = [HeadShape.of(layer, rope_index) for layer in spec.layers]
        self.readers = readers(spec)
        norms = [w.get("attn_norm") for w in self.per_layer]  # None where a family norms after each branch alone
        self.first_norm, self.next_norms = norms[0], [*norms[1:], None]
        self.mask_names = [f"mask.{layer.window}" for layer in spec.layers]

    def forward(self, step: Step, caches: Mapping[int, LayerCache]) -> Tensor:
        """The hidden states after the last of the layers and before the final norm: of every token, (T, D), where a part follows,
        else those that the step wants, (W, D).

        Args:
            caches: by the index of the layer that owns it.
        """
        spec, arena, ops = self.spec, step.arena, self.ops
        x = arena.take("x", step.n, spec.hidden)
        self._rope_tables(step)
        if self.layers.start == 0:
            self._embed(step, x)
        ple = self._slices(step.n, arena) if spec.ple else None
        free = arena.take("h", *x.shape)
        h = x if self.first_norm is None else ops.norm(x, self.first_norm, free, arena)
        tail = step.tail if self.layers.stop == len(spec.layers) else None
        for i, w, attend, after in zip(self.layers, self.per_layer, self.attends, self.next_norms, strict=True):
            layer = spec.layers[i]
            if tail is not None and i == self.readers:
                x, h, ple = self._narrow(tail, x, h, ple)
                step, tail, free = tail.step, None, arena.take("h", *x.shape)
                if not step.n:
                    return x
                self._rope_tables(step)
            cache = caches[layer.index if layer.kv_source is None else layer.kv_source]
            y = self._attention(layer, w, attend, cache, step, h)
            h = ops.branch(y, w.get("attn_post_norm"), x, w.get("mlp_norm"), free, arena)
            y = self._mlp(layer, w, step, x, h)
            scale = w["layer_scalar"] if spec.layer_scalar else None
            if ple is None:
                h = ops.branch(y, w.get("mlp_post_norm"), x, after, free, arena, scale)
            else:
                ops.branch(y, w.get("mlp_post_norm"), x, None, free, arena)
                y = self._ple(w, step, x, ple[:, i - self.layers.start])
                h = ops.branch(y, w["ple_post_norm"], x, after, free, arena, scale)
        return x if tail is None else self._narrow(tail, x, x, None)[0]

    def _rope_tables(self, step: Step) -> None:
        for i, (rope, pairs) in enumerate(self.ropes):
            cos, sin = (step.arena.take(f"rope.{i}.{t}", step.n, pairs) for t in ("cos", "sin"))
            self.ops.rope(step.positions_T, step.arena.take(f"rope.{i}.freq", pairs), cos, sin, rope.magnitude)

    def _narrow(self, tail: Tail, x: Tensor, h: Tensor, ple: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The wanted rows alone, at the start of the same buffers, and their rope tables."""
        arena, W = tail.step.arena, tail.step.n

        def rows_of(t: Tensor, buffer: str, room: str) -> Tensor:
            got = torch.index_select(t, 0, tail.rows_W, out=arena.take(room, W, t.shape[1]))
            return arena.take(buffer, W, t.shape[1]).copy_(got)

        if not W:
            return x[:0], h[:0], ple
        same = h.data_ptr() == x.data_ptr()
        x = rows_of(x, "x", "y")
        h = x if same else rows_of(h, "h", "y")
        return x, h, None if ple is None else rows_of(ple.flatten(1), "ple", "ple.rows").unflatten(-1, ple.shape[1:])

    def outgoing(self, n: int, arena: Arena) -> dict[str, Tensor]:
        """What the part after this one finds in its arena of a step of n tokens: hidden states, and its layers' slices."""
        out = {"x": arena.take("x", n, self.spec.hidden)}
        if self.spec.ple:
            rest = self._slices(n, arena)[:, len(self.layers) :]
            out["ple"] = arena.take("ple.rows", *rest.shape).copy_(rest)
        return out

    def logits(self, x_TD: Tensor, arena: Arena, out: Tensor | None = None, *, capped: bool = True) -> Tensor:
        """Logits of the given hidden states, (T, vocab); not `capped` where what draws from them does that."""
        spec = self.spec
        h = self.ops.norm(x_TD, self.w["norm"], arena.take("h", *x_TD.shape), arena)
        if out is None:
            out = arena.take("logits", x_TD.shape[0], spec.vocab_size)
        linear(h, self.w["embed" if spec.tied else "head"], out, arena.room)
        if capped and spec.final_softcap is not None:
            self.ops.softcap(out, spec.final_softcap)
        return out

    def _embed(self, step: Step, x: Tensor) -> None:
        rows(self.w["embed"], step.arena.take("ids", step.n), x)
        if self.spec.embed_scale != 1.0:
            x.mul_(torch.tensor(self.spec.embed_scale, dtype=x.dtype))  # the scale is rounded to the activations' type
        if self.spec.ple:
            self._embed_per_layer(step, x)

    def _attention(self, layer: LayerSpec, w: LayerWeights, attend: Attend, cache: LayerCache, step: Step, h: Tensor) -> Tensor:
        """o(attention(h)), (T, D)."""
        arena, T = step.arena, step.n
        shape = self.shapes[layer.index]
        q = self.ops.heads(shape, w, self._project(shape, w, h, arena), cache, step)
        out = arena.take("attn", T, layer.n_heads, layer.head_dim)
        sinks, scratch = w.get("sinks"), arena.keep("scratch", lambda: self._scratch(arena))
        masks = arena.get(self.mask_names[layer.index])
        for first, last, span in step.parts:
            if masks is not None and span.n > 1:
                span = span._replace(mask_TS=masks[first:last, : min(cache.n_slots, span.stop)])
            part, into = (q, out) if last - first == T else (q[first:last], out[first:last])
            attend(part, cache, span, scale=layer.scale, softcap=layer.softcap, sinks_H=sinks, scratch=scratch, out_THD=into)
        y = linear(out.flatten(1), w["o"], arena.take("y", T, self.spec.hidden), arena.room)
        return y.add_(w["o_bias"]) if layer.o_bias else y

    def _scratch(self, arena: Arena) -> Scratch:
        k, v, partial, done, turn = map(arena.flat, ("kv.k", "kv.v", "partial", "done", "kv.turn"))
        return Scratch(k, v, partial, done, self.tile_tokens, turn)

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

    def _embed_per_layer(self, step: Step, x: Tensor) -> None:
        """One slice per layer, (T, layers, P): half from the token's own row, half from its scaled embedding."""
        spec, arena, T = self.spec, step.arena, step.n
        assert spec.ple is not None
        P, L = spec.ple.dim, len(spec.layers)
        token = rows(self.w["ple.embed"], arena.take("ids", T), arena.take("ple.rows", T, L * P)).mul_(P**0.5)
        ple = linear(x, self.w["ple.proj"], arena.take("ple", T, L * P), arena.room).mul_(spec.hidden**-0.5)
        ple_TLP = ple.unflatten(-1, (L, P))
        self.ops.norm(ple_TLP, self.w["ple.norm"], ple_TLP, arena)
        ple.add_(token).mul_(2**-0.5)

    def _slices(self, n: int, arena: Arena) -> Tensor:
        """The slices of the layers from this part's first on, (T, layers, P)."""
        assert self.spec.ple is not None
        return arena.take("ple", n, len(self.spec.layers) - self.layers.start, self.spec.ple.dim)

    def _ple(self, w: LayerWeights, step: Step, x: Tensor, ple_TP: Tensor) -> Tensor:
        arena = step.arena
        gate = arena.take("ple.gate", step.n, ple_TP.shape[-1])
        if not acted(x, w["ple_gate"], "gelu_tanh", gate, arena.room, ple_TP):
            linear(x, w["ple_gate"], gate, arena.room)
            self.ops.gate("gelu_tanh", gate, ple_TP, None)
        return linear(gate, w["ple_proj"], arena.take("y", *x.shape), arena.room)
