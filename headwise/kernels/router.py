"""Which experts a token takes, their weights, and the order in which a grouped product meets the tokens; all on the device.

Few tokens: one launch, a program per score; the last of a token chooses. Many: scores on the matrix unit, then a program a token.
A choice is by rank: an expert's rank is the number of those with a higher score, or an equal one and a lower index, so that ties go
to the lower index (`torch.topk` leaves that open) and no two experts meet. `order` sorts pairs (token, choice) by expert, stable.

Shapes    x_TD in any float type, w_ED and all vectors fp32; ids_TK int32, weights_TK fp32. At most 256 experts.
Accuracy  fp32; on the matrix unit weights are split into three parts of x's type, or both sides of fp32 into TF32.
Cost      E*D*4 bytes of weights for few tokens; 2*T*E*D operations for many.
Source    transformers 5.23: Gemma4TextRouter (softmax, top-k, renormalised, times the expert's scale), Qwen3MoeTopKRouter,
          GptOssTopKRouter (softmax of the chosen scores, which is the same as renormalised).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.configs import Arch
from headwise.kernels.stored import device_arch, in_turn, overlap
from headwise.planner.residence import MAX_EXPERTS
from headwise.planner.workspace import ORDER_BLOCK, ORDER_TILE, ROUTER_ROWS, most_tiles

TOLERANCE = 1e-5  # relative error of a weight
# tokens, experts and values of a tile, warps; in the larger tile Ampere's registers spill
SCORES = {"hopper": (64, 32, 128, 4), "ampere": (64, 32, 64, 4), "rdna3": (64, 32, 64, 4)}
FEW = ROUTER_ROWS  # tokens whose scores are a program each


class Chosen(NamedTuple):
    """The chosen experts (T, K), best first, and their weights."""

    ids_TK: Tensor  # int32
    weights_TK: Tensor  # fp32


class Choice(NamedTuple):
    """How scores become weights; the tensors are fp32.

    Args:
        norm_D: x is first divided by its root mean square and times this, and scores are times `factor`.
        over_all: weights are a softmax over all experts; else over the chosen.
    """

    over_all: bool
    bias_E: Tensor | None = None
    expert_scale_E: Tensor | None = None
    norm_D: Tensor | None = None
    eps: float = 0.0
    factor: float = 1.0


class Order(NamedTuple):
    """Pairs t * K + k sorted by expert, in tiles of `tile_rows`; int32."""

    pairs_P: Tensor
    starts_E1: Tensor  # where an expert's pairs begin
    first_E1: Tensor  # its first tile
    experts: Tensor  # of each tile
    tile_rows: int

    def tiles(self, n_experts: int) -> int:
        """Most tiles that `n_experts` of the experts have."""
        return most_tiles(self.pairs_P.shape[0], n_experts, self.tile_rows)


def reference(x_TD: Tensor, w_ED: Tensor, n_active: int, choice: Choice) -> Chosen:
    """In fp64; ties go to the lower index."""
    x = x_TD.double()
    if choice.norm_D is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + choice.eps) * choice.norm_D.double() * choice.factor
    scores = x @ w_ED.double().T
    if choice.bias_E is not None:
        scores = scores + choice.bias_E.double()
    ids = scores.sort(dim=-1, descending=True, stable=True)[1][:, :n_active]
    weights = scores.softmax(-1).gather(-1, ids) if choice.over_all else scores.gather(-1, ids).softmax(-1)
    return Chosen(ids, weights if choice.expert_scale_E is None else weights * choice.expert_scale_E.double()[ids])


@triton.jit
def _choose_one(t, scores, scale, ids, weights, E, K, ALL: tl.constexpr, SCALED: tl.constexpr, EP: tl.constexpr):
    e = tl.arange(0, EP)
    s = tl.load(scores + t * E + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
    s = tl.where(s == s, s, float("-inf"))  # a NaN has no rank, and a place left empty is no expert
    rank = tl.zeros((EP,), tl.int32)
    for first in range(0, E, 32):
        other = first + tl.arange(0, 32)
        v = tl.load(scores + t * E + other, mask=other < E, other=float("-inf"), cache_modifier=".cg")
        v = tl.where(v == v, v, float("-inf"))[None, :]
        rank += tl.sum(((v > s[:, None]) | ((v == s[:, None]) & (other[None, :] < e[:, None]))).to(tl.int32), 1)
    chosen = (rank < K) & (e < E)
    p = tl.exp(s - tl.max(s, 0))
    weight = p / tl.sum(p if ALL else tl.where(chosen, p, 0.0), 0)
    if SCALED:
        weight *= tl.load(scale + e, mask=e < E, other=0.0)
    tl.store(ids + t * K + rank, e, mask=chosen)
    tl.store(weights + t * K + rank, weight, mask=chosen)


@triton.jit
def _choose(scores, scale, ids, weights, E, K, ALL: tl.constexpr, SCALED: tl.constexpr, EP: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    _choose_one(tl.program_id(0), scores, scale, ids, weights, E, K, ALL, SCALED, EP)


@triton.jit
def _route(
    x, w, norm, bias, scale, scores, ids, weights, done, D, E, K, eps, factor, NORMED: tl.constexpr, BIAS: tl.constexpr,
    ALL: tl.constexpr, SCALED: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    e, t = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    ok = i < D
    v = tl.load(x + t * D + i, mask=ok, other=0).to(tl.float32)
    s = v * tl.load(w + e * D + i, mask=ok, other=0)
    if NORMED:
        s = tl.sum(s * tl.load(norm + i, mask=ok, other=0)) * tl.rsqrt(tl.sum(v * v) / D + eps) * factor
    else:
        s = tl.sum(s)
    if BIAS:
        s += tl.load(bias + e)
    tl.store(scores + t * E + e, s)
    tl.debug_barrier()
    if tl.atomic_add(done + t, 1, sem="acq_rel") == E - 1:
        _choose_one(t, scores, scale, ids, weights, E, K, ALL, SCALED, EP)
        tl.store(done + t, 0)


@triton.jit(do_not_specialize=["T"])
def _scores(
    x, w, norm, bias, scores, T, D, E, eps, factor, NORMED: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    rows = tl.minimum(t, T - 1).to(tl.int64) * D
    kind: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BT, BE), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for d in range(0, D, BD):
        i = d + tl.arange(0, BD)
        v = tl.load(x + rows[:, None] + i[None, :], mask=(i < D)[None, :], other=0)
        r = tl.load(w + e[:, None] * D + i[None, :], mask=(e < E)[:, None] & (i < D)[None, :], other=0)
        if NORMED:
            squares += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
            r *= tl.load(norm + i, mask=i < D, other=0)[None, :]
        if kind == tl.float32:
            acc = tl.dot(v, tl.trans(r), acc, input_precision="tf32x3")
        else:
            for _ in tl.static_range(3):  # what x's type leaves of a weight is a weight of its own
                part = r.to(kind)
                acc = tl.dot(v, tl.trans(part), acc)
                r -= part.to(tl.float32)
    if NORMED:
        acc *= (tl.rsqrt(squares / D + eps) * factor)[:, None]
    if BIAS:
        acc += tl.load(bias + e, mask=e < E, other=0)[None, :]
    tl.store(scores + t[:, None] * E + e[None, :], acc, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["P"])
def _count(ids, counts, P, E, EP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    p, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EP)
    mine = tl.load(ids + p, mask=p < P, other=-1)
    tl.store(counts + tl.program_id(0) * E + e, tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0), mask=e < E)


@triton.jit(do_not_specialize=["P", "blocks"])
def _order(
    ids, counts, pairs, starts, first, experts, P, E, blocks, tile_rows,
    EP: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    here = tl.program_id(0)
    i, e = tl.arange(0, BLOCK), tl.arange(0, EP)
    p = here * BLOCK + i
    mine = tl.load(ids + p, mask=p < P, other=-1)
    if ALONE:
        total = tl.sum((mine[:, None] == e[None, :]).to(tl.int32), 0)
        before = e * 0
    else:
        total, before = e * 0, e * 0
        for b0 in range(0, blocks, 32):
            b = b0 + tl.arange(0, 32)
            n = tl.load(counts + b[:, None] * E + e[None, :], mask=(b < blocks)[:, None] & (e < E)[None, :], other=0)
            total += tl.sum(n, 0)
            before += tl.sum(tl.where((b < here)[:, None], n, 0), 0)
    start = tl.cumsum(total, 0) - total
    rank = tl.sum(((mine[None, :] == mine[:, None]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    at = tl.sum(tl.where(mine[:, None] == e[None, :], (start + before)[None, :], 0), 1) + rank
    tl.store(pairs + at, p, mask=p < P)
    if here == 0:
        tiles = (total + tile_rows - 1) // tile_rows
        tile = tl.cumsum(tiles, 0) - tiles
        tl.store(starts + e, start, mask=e < E)
        tl.store(first + e, tile, mask=e < E)
        tl.store(starts + E, P)
        tl.store(first + E, tl.sum(tiles, 0))
        for k in range(tl.max(tiles, 0)):
            tl.store(experts + tile + k, e, mask=k < tiles)


def route(
    x_TD: Tensor, w_ED: Tensor, chosen: Chosen, choice: Choice, *, scores_TE: Tensor, done: Tensor, arch: Arch | None = None
) -> Chosen:
    """The experts of each token into `chosen`.

    Args:
        scores_TE: fp32 room for the scores.
        done: int32 zeros, one for each of up to 16 tokens; zeros again afterwards.
        arch: whose row of `SCORES`; the device's.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    (T, D), E, K = x_TD.shape, w_ED.shape[0], chosen.ids_TK.shape[1]
    if not K <= E <= MAX_EXPERTS or w_ED.shape[1] != D:
        raise ValueError(f"route: {K} of {E} experts (at most {MAX_EXPERTS}), rows of {D} by {tuple(w_ED.shape)}")
    if tuple(scores_TE.shape) != (T, E) or any(tuple(x.shape) != (T, K) for x in chosen):
        raise ValueError(f"route: {T} tokens into scores {tuple(scores_TE.shape)} and {tuple(chosen.ids_TK.shape)} of {E} experts")
    tensors = (w_ED, scores_TE, chosen.weights_TK, choice.bias_E, choice.expert_scale_E, choice.norm_D)
    if chosen.ids_TK.dtype != torch.int32 or any(x is not None and x.dtype != torch.float32 for x in tensors):
        raise ValueError(f"route: {chosen.ids_TK.dtype} ids (int32) and {[x.dtype for x in tensors if x is not None]} (float32)")
    if not all(x is None or x.is_contiguous() for x in (x_TD, *chosen, *tensors)):
        raise ValueError("route: a tensor is not contiguous")
    some = w_ED
    norm, bias, scale = (some if x is None else x for x in (choice.norm_D, choice.bias_E, choice.expert_scale_E))
    flags = {"NORMED": choice.norm_D is not None, "BIAS": choice.bias_E is not None}
    last = {"ALL": choice.over_all, "SCALED": choice.expert_scale_E is not None, "EP": triton.next_power_of_2(E)}
    pdl = overlap(x_TD)
    if T <= FEW:
        if done.dtype != torch.int32 or done.numel() < T:
            raise ValueError(f"route: {T} tokens need as many int32 zeros, got {done.numel()} {done.dtype}")
        _route[(E, T)](
            x_TD, w_ED, norm, bias, scale, scores_TE, *chosen, done, D, E, K, choice.eps, choice.factor,
            BLOCK=triton.next_power_of_2(D), num_warps=4, **flags, **last, **pdl,
        )  # fmt: skip
        return chosen
    BT, BE, BD, warps = SCORES[arch or device_arch(x_TD.device)]
    _scores[(triton.cdiv(T, BT), triton.cdiv(E, BE))](
        x_TD, w_ED, norm, bias, scores_TE, T, D, E, choice.eps, choice.factor, BT=BT, BE=BE, BD=BD, num_warps=warps, **flags, **pdl
    )
    _choose[(T,)](scores_TE, scale, *chosen, E, K, num_warps=1, **last, **pdl)
    return chosen


def order(ids_TK: Tensor, n_experts: int, tile_rows: int, room: Tensor) -> Order:
    """The pairs sorted by expert, in `room`: int32, `planner.workspace.order_values` of them.

    Raises:
        ValueError: room or ids this kernel does not take, with both numbers.
    """
    P, E = ids_TK.numel(), n_experts
    n_blocks, n_tiles = -(-P // ORDER_BLOCK), P // tile_rows + E
    sizes = (P, E + 1, E + 1, n_tiles, n_blocks * E)
    if E > MAX_EXPERTS or tile_rows < ORDER_TILE or ids_TK.dtype != torch.int32 or not ids_TK.is_contiguous():
        raise ValueError(
            f"order: {E} experts (at most {MAX_EXPERTS}), tiles of {tile_rows} (at least {ORDER_TILE}), {ids_TK.dtype} ids (int32)"
        )
    if room.dtype != torch.int32 or room.numel() < sum(sizes):
        raise ValueError(f"order: {P} pairs of {E} experts need {sum(sizes)} int32 values, got {room.numel()} {room.dtype}")
    pairs, starts, first, experts, counts = room.flatten()[: sum(sizes)].split(sizes)
    options = {"EP": triton.next_power_of_2(E), "BLOCK": ORDER_BLOCK, "num_warps": 8, **overlap(ids_TK)}
    if n_blocks > 1:
        _count[(n_blocks,)](ids_TK, counts, P, E, **options)
    _order[(n_blocks,)](ids_TK, counts, pairs, starts, first, experts, P, E, n_blocks, tile_rows, ALONE=n_blocks == 1, **options)
    return Order(pairs, starts, first, experts, tile_rows)
