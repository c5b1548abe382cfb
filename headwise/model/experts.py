"""Routed experts on our kernels: the chosen ones read from the device, nothing synchronised, so that a step can be recorded.

One token: each pair (token, choice) by itself; more: pairs sorted by expert, a grouped product. Both read floats and e4m3. Other
quantised experts meet 5 to 1,024 tokens on the tensor cores where those kernels run, others up to 160 as integers, and are
expanded before more, as many at a time as the tile holds. `model.mlp` has the plain form.

Legend: T tokens, D hidden size, W width, E experts, K experts per token, P = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from headwise.model.arena import Arena
from headwise.planner.workspace import EXPERT_ROWS, pair_rows, pair_tile
from headwise.spec.layers import MoeSpec
from headwise.weights.blocks import BlockTensor, Fp8Tensor

STACKS = ("experts_gate", "experts_up", "experts_down")
ALONE_ROWS = 1  # tokens whose pairs each read their expert; with more, experts that several chose are read once
INTEGER_ROWS = 4  # tokens whose quantised experts are fastest with integers
TILES = ((12, 16), (48, 64))  # up to so many pairs an expert, a tile has so many; else 128


def multiplied(w: Mapping[str, Any], arena: Arena) -> bool:
    """Whether these experts have a form that our kernels read, and the plan their buffers."""
    if arena.flat("expert.order") is None or any(isinstance(w[name], BlockTensor) for name in STACKS):
        return False
    fp8 = [isinstance(w[name], Fp8Tensor) for name in STACKS]
    return not any(fp8) or (all(fp8) and "experts_gate_up" in w)


def routed(
    moe: MoeSpec, w: Mapping[str, Any], routed_by: Tensor, h: Tensor, out: Tensor, arena: Arena, *,
    router_norm: Tensor | None = None, beside: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """out = the chosen experts' MLPs of `h`, weighted.

    Args:
        router_norm: Gemma's router looks at `routed_by` normed and times this, divided by the root of its size.
        beside: a dense result, its norm's weight and the sum's: out = norm(dense) + norm(sum).
    """
    from headwise.kernels import experts as X
    from headwise.kernels import router as R

    (T, D), E, K, W = h.shape, moe.n_experts, moe.n_active, moe.width
    chosen = R.Chosen(arena.take("router.ids", T, K), arena.take("router.weight", T, K))
    over_all = moe.selection == "softmax_topk" and not moe.renormalise
    choice = R.Choice(over_all, w.get("router_bias"), w.get("expert_scale"), router_norm, arena.eps_value, D**-0.5)
    R.route(routed_by, w["router"], chosen, choice, scores_TE=arena.take("router", T, E), done=arena.take("router.done", R.FEW))
    gate = X.Gate(moe.activation, w.get("experts_gate_bias"), w.get("experts_up_bias"))
    whole = isinstance(w["experts_down"], Tensor | Fp8Tensor)
    y, gated = arena.take("expert.pairs", T * K, D), arena.take("expert.gated", T * K, W)
    if whole and T <= ALONE_ROWS:
        for _, stacks, scales in _first(w, W, arena):
            X.pairs(h, chosen.ids_TK, stacks, gated, gate, scales=scales)
        for _, stacks, scales in _parts(w["experts_down"], arena):
            X.pairs(gated, chosen.ids_TK, stacks, y, scales=scales)
        return _sum(X, w, y, chosen, out, beside, arena)
    arranged = not whole and arena.room.skinny_rows > 0 and INTEGER_ROWS < T <= pair_rows(E, K)
    tile_rows = pair_tile(T * K, E) if arranged else next((rows for most, rows in TILES if most >= T * K // E), 128)
    order = R.order(chosen.ids_TK, E, tile_rows, arena.take("expert.order", arena.size("expert.order"))) if T > 1 else None
    if arranged:
        _arranged(w, h, order, gate, y, arena)
    elif not whole and T <= EXPERT_ROWS:
        _as_integers(w, h, chosen.ids_TK, gate, y, arena, None if order is None else order.pairs_P)
    else:
        assert order is not None
        for experts, stacks, scales in _first(w, W, arena):
            X.grouped(h, order, stacks, gated, K, gate, scales=scales, experts=experts)
        for experts, stacks, scales in _parts(w["experts_down"], arena):
            X.grouped(gated, order, stacks, y, K, scales=scales, experts=experts)
    return _sum(X, w, y, chosen, out, beside, arena)


def _sum(X: Any, w: Mapping[str, Any], y: Tensor, chosen: Any, out: Tensor, beside: Any, arena: Arena) -> Tensor:
    return X.combine(y, chosen, out, w.get("experts_down_bias"), beside=beside, eps=arena.eps_value)


def _halves(w: Mapping[str, Any], both_P2W: Tensor) -> list[tuple[Any, Tensor]]:
    """The stacks that give gate and up, side by side, and where each writes: one, or where they are of two types two."""
    if "experts_gate_up" in w:
        return [(w["experts_gate_up"], both_P2W)]
    return list(zip((w["experts_gate"], w["experts_up"]), both_P2W.chunk(2, -1), strict=True))


def _arranged(w: Mapping[str, Any], h: Tensor, order: Any, gate: Any, y: Tensor, arena: Arena) -> None:
    from headwise.kernels.arrange import arrange_pairs
    from headwise.kernels.skinny import skinny_experts

    P, E, W, room = y.shape[0], w["experts_gate"].low.shape[0], w["experts_gate"].rows, arena.room.tile
    assert room is not None  # planned for every step whose rows are arranged
    both = arena.take("expert.gated", P, 2 * W)
    given = arrange_pairs(h, order, E, room)
    for stack, part in _halves(w, both):
        skinny_experts(given, stack, part, by_pair=False)
    skinny_experts(arrange_pairs(both, order, E, room, gate), w["experts_down"], y, by_pair=True)


def _as_integers(w: Mapping[str, Any], h: Tensor, ids_TK: Tensor, gate: Any, y: Tensor, arena: Arena, order: Tensor | None) -> None:
    from headwise.kernels import experts as X
    from headwise.kernels.matvec import quantise

    P, W, room = ids_TK.numel(), w["experts_gate"].rows, arena.take("expert.words", arena.size("expert.words"))
    both = arena.take("expert.gated", P, 2 * W)
    words = quantise(h, room, planes=X.PLANES).words
    for stack, part in _halves(w, both):
        X.integer_pairs(words, ids_TK, stack, part, order=order)
    X.integer_pairs(X.gate_integers(both, ids_TK, gate, room), ids_TK, w["experts_down"], y, order=order)


Part = tuple[tuple[int, int], tuple[Tensor, ...], tuple[Tensor, ...]]  # first and number of experts, stacks, scales of e4m3


def _first(w: Mapping[str, Any], width: int, arena: Arena) -> Iterator[Part]:
    """Gate and up."""
    if "experts_gate_up" in w:
        for experts, (both,), scales in _parts(w["experts_gate_up"], arena):
            halves = ((x[:, :width], x[:, width:]) for x in (both, *scales))
            yield experts, next(halves), next(halves, ())
    else:
        for part, other in zip(_parts(w["experts_gate"], arena, half=0), _parts(w["experts_up"], arena, half=1), strict=True):
            yield part[0], (*part[1], *other[1]), ()


def _parts(stack: Any, arena: Arena, half: int | None = None) -> Iterator[Part]:
    """A stack of floats or e4m3 as it is; else as floats, as many experts at a time as the tile, or one half of it, holds."""
    if isinstance(stack, Tensor):
        yield (0, stack.shape[0]), (stack,), ()
        return
    if isinstance(stack, Fp8Tensor):
        yield (0, stack.shape[0]), (stack.data,), (stack.scales,)
        return
    from headwise.kernels.expand import expand

    tile = arena.room.tile
    if tile is not None and half is not None:
        tile = tile[tile.numel() // 2 * half :][: tile.numel() // 2]
    E, rows, columns, whole = stack.low.shape[0], stack.rows, stack.K, stack.tall()
    if tile is None or tile.numel() < rows * columns:
        raise ValueError(f"experts of {rows} by {columns} need a tile of that many values, got {tile}")
    step = tile.numel() // (rows * columns)
    for start in range(0, E, step):
        n = min(step, E - start)
        part = tile[: n * rows * columns].view(n * rows, columns)
        expand(whole, start * rows, (start + n) * rows, part)
        yield (start, n), (part.view(n, rows, columns),), ()
