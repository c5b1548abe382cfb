"""Between the projection of the heads and attention: norms, RoPE, the query for one tensor, and keys and values to the cache.

`plain_heads` says it with PyTorch's operators, one after another, in buffers of the arena; `fused_heads` is one launch
(`kernels.heads`). Both leave the query as the layer's attention reads it.

Legend: T tokens of this step, H query heads, G KV heads, A dims per head, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Span, Values
from headwise.model.arena import Arena
from headwise.model.norm import rms_norm
from headwise.spec.kv import q_values, turned_pairs
from headwise.spec.layers import LayerSpec
from headwise.spec.rope import RopeSpec

LayerWeights = Mapping[str, Any]  # our short name -> a Tensor, or for a matrix that stays quantised a BlockTensor


class Part(NamedTuple):
    """Tokens [first, last) of a step, which attention takes in one go: `span` says whose they are."""

    first: int
    last: int
    span: Span


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over n tokens of one or several sequences.

    Ids, or what the stage before has sent, lie in the arena; rope tables and ring masks are filled once, for all layers.

    Args:
        positions_T: of each token, on the device.
        slots: by window (None: global layers), int32 on the device, the slot of each token's keys, -1 where they are not stored;
            kernels that store need it.
        tail: the tokens whose hidden states are wanted, where not all are; layers that own no cache need no others.
    """

    n: int
    positions_T: Tensor
    parts: tuple[Part, ...]
    arena: Arena
    slots: Mapping[int | None, Tensor]
    tail: Tail | None = None


@dataclass(frozen=True, slots=True)
class Tail:
    """Of a step the tokens `rows_W` (int32 or int64 on the device) alone."""

    rows_W: Tensor
    step: Step


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a layer's heads look like: rotated pairs, values of a key as a query meets it, the index of its rope's tables."""

    layer: LayerSpec
    pairs: int
    key_values: int
    rope: int | None

    @classmethod
    def of(cls, layer: LayerSpec, rope_index: Mapping[RopeSpec, int]) -> HeadShape:
        pairs = layer.rope.rotated_dims // 2 if layer.rope else 0
        return cls(layer, pairs, q_values(layer), None if layer.rope is None else rope_index[layer.rope])


class HeadViews(NamedTuple):
    """The projected heads of one layer in their buffer, from every side that the layer looks at them."""

    packed: Tensor  # (T, all heads * A)
    flat: dict[str, Tensor]  # q, k, v as (T, heads * A)
    normed: Tensor  # (T, heads that are normed, A)
    q: Tensor  # (T, H, A)
    k: Tensor  # (T, G, A); of a layer that owns no cache: not its own, and not read
    v: Tensor | None
    rotated: tuple[Tensor, Tensor] | None  # both halves of the pairs of q, and of k where it is rotated here


def head_views(shape: HeadShape, has_k: bool, has_v: bool, T: int, arena: Arena) -> HeadViews:
    layer = shape.layer
    H, G, A = layer.n_heads, layer.n_kv_heads, layer.head_dim
    counts = {"q": H} | ({"k": G} if has_k else {}) | ({"v": G} if has_v else {})
    packed = arena.take("qkv", T, sum(counts.values()) * A)
    heads = packed.unflatten(-1, (-1, A))
    parts = dict(zip(counts, heads.split(list(counts.values()), dim=1), strict=True))
    flat = dict(zip(counts, packed.split([n * A for n in counts.values()], dim=-1), strict=True))
    n_normed = heads.shape[1] if layer.v_norm or not has_v else H + G
    rotated = None
    if layer.rope is not None:  # K of a K=V layer is rotated where it is stored
        half = A // 2
        turning = heads[:, : H + (G if has_k and not layer.k_eq_v else 0)]
        rotated = (turning[..., : shape.pairs], turning[..., half : half + shape.pairs])
    return HeadViews(packed, flat, heads[:, :n_normed], parts["q"], parts.get("k", heads), parts.get("v"), rotated)


def _tables(shape: HeadShape, arena: Arena, T: int, *middle: int) -> tuple[Tensor, Tensor]:
    names = (f"rope.{shape.rope}.{t}" for t in ("cos", "sin"))
    cos, sin = (arena.take(name, T, *middle, shape.pairs) for name in names)
    return cos, sin


def plain_heads(shape: HeadShape, w: LayerWeights, views: HeadViews, cache: LayerCache, step: Step) -> Tensor:
    """(T, H, A), or (T, H, values of a key) for one tensor."""
    layer, arena = shape.layer, step.arena
    owns = layer.kv_source is None
    if layer.qk_norm:  # q, k and (where it has one) v share one statistic pass; their weights differ
        rms_norm(views.normed, None, views.normed, arena)
        views.q.mul_(w["q_norm"])
        if owns and not layer.k_eq_v:
            views.k.mul_(w["k_norm"])
    if views.rotated is not None:
        _rotate(*views.rotated, shape, arena, step.n)
    if not layer.k_eq_v:
        if owns:
            _write(cache, step, views.k, views.v)
        return views.q
    if owns:
        _store_one(shape, w, cache, step, views.k)
    return _query_for_one(shape, w, views.q, arena)


def _rotate(a: Tensor, b: Tensor, shape: HeadShape, arena: Arena, T: int) -> None:
    """RoPE in place: a holds the first, b the second dims of the rotating pairs (i, i + A / 2)."""
    cos, sin = arena.keep(("rope", T, shape.layer.index), lambda: _tables(shape, arena, T, 1))
    tmp = torch.mul(a, sin, out=arena.take("rope.tmp", *a.shape))
    a.mul_(cos).addcmul_(b, sin, value=-1.0)
    b.mul_(cos).add_(tmp)


def _store_one(shape: HeadShape, w: LayerWeights, cache: LayerCache, step: Step, v: Tensor) -> None:
    """K=V: V = norm(u), given, and where the layout is so, beside it the rotated dims of K = RoPE(w_k * V), see `spec.kv`."""
    layer, arena, T, P = shape.layer, step.arena, step.n, shape.pairs
    if turned_pairs(layer):
        _write(cache, step, v, None)
        return
    A, half = layer.head_dim, layer.head_dim // 2
    one = arena.take("kv.one", T, layer.n_kv_heads, cache.k.n_values)
    one[..., :A].copy_(v)
    if layer.rope is not None:
        a, b = one[..., A : A + P], one[..., A + P : A + 2 * P]
        torch.mul(v[..., :P], w["k_norm"][:P], out=a)
        torch.mul(v[..., half : half + P], w["k_norm"][half : half + P], out=b)
        _rotate(a, b, shape, arena, T)
        one[..., A + 2 * P :].zero_()  # padding, see spec.kv
    _write(cache, step, one, None)


def _write(cache: LayerCache, step: Step, k: Tensor, v: Tensor | None) -> None:
    scratch = step.arena.flat("kv.write")
    for first, last, span in step.parts:
        if last - first < step.n:
            cache.write(span.place, span.start, k[first:last], None if v is None else v[first:last], scratch)
        else:
            cache.write(span.place, span.start, k, v, scratch)


def _query_for_one(shape: HeadShape, w: LayerWeights, q: Tensor, arena: Arena) -> Tensor:
    """The query against [V, rotated K]: w_k folded into the dims that do not rotate, the rotated ones moved."""
    T, H, A = q.shape
    half, P = A // 2, shape.pairs
    out = arena.take("q.one", T, H, shape.key_values)
    torch.mul(q, w["k_norm"], out=out[..., :A])
    if P:
        out[..., :P].zero_()
        out[..., half : half + P].zero_()
        out[..., A : A + P].copy_(q[..., :P])
        out[..., A + P : A + 2 * P].copy_(q[..., half : half + P])
        out[..., A + 2 * P :].zero_()
    return out


def fused_heads(shape: HeadShape, w: LayerWeights, views: HeadViews, cache: LayerCache, step: Step) -> Tensor:
    """As `plain_heads`, in one launch; positions and slots come from the device, so that a graph can replay it."""
    from headwise.kernels.heads import heads

    layer, arena, T = shape.layer, step.arena, step.n
    owns = layer.kv_source is None
    if layer.k_eq_v:
        q = arena.take("q.one", T, layer.n_heads, shape.key_values)
    else:  # packed heads are strided; attention wants its queries side by side
        q = arena.take("q.own", T, layer.n_heads, layer.head_dim)
    cos, sin = (None, None) if shape.rope is None else arena.keep(("rope", T, layer.index), lambda: _tables(shape, arena, T))
    return heads(
        views.packed, q, _stored(cache.k) if owns else None, _stored(cache.v) if owns and cache.v else None,
        step.slots[layer.window] if owns else None,
        head_dim=layer.head_dim, pairs=shape.pairs, cos_TP=cos, sin_TP=sin,
        q_norm=w["q_norm"] if layer.qk_norm else None,
        k_norm=w["k_norm"] if layer.qk_norm and (owns or layer.k_eq_v) else None,
        v_norm=layer.v_norm, eps=arena.eps_value,
    )  # fmt: skip


def _stored(values: Values) -> Any:
    from headwise.kernels.stored import Stored

    return Stored(values.data_SGD, values.scales_SGB)
