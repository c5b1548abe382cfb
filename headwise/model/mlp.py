"""Gated MLPs, dense and routed. `out` and every intermediate are buffers of the arena.

Legend: T tokens, D hidden size, W width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwise.model.arena import Arena
from headwise.model.experts import multiplied, routed
from headwise.model.linear import acted, linear, linears, ready_room
from headwise.model.ops import Ops
from headwise.spec.layers import MlpSpec, MoeSpec


def dense(mlp: MlpSpec, w: Mapping[str, Any], h: Tensor, out: Tensor, arena: Arena, ops: Ops) -> Tensor:
    """out = down(act(gate(h)) * up(h))."""
    T, W = h.shape[0], mlp.width
    both = arena.take("gate_up", T, 2 * W)
    gate, up = arena.keep(("gate_up", T, W), lambda: both.split(W, dim=-1))
    if "gate_up" in w and not mlp.bias and acted(h, w["gate_up"], mlp.activation, gate, arena.room):
        return linear(gate, w["down"], out, arena.room)
    if "gate_up" in w:
        linear(h, w["gate_up"], both, arena.room)
    else:
        linears(h, [(w["gate"], gate), (w["up"], up)], arena.room)
    if mlp.bias:
        gate.add_(w["gate_bias"])
        up.add_(w["up_bias"])
    gated = ops.gate(mlp.activation, gate, up, ready_room(w["down"], T, arena.room))
    linear(gated, w["down"], out, arena.room)
    return out.add_(w["down_bias"]) if mlp.bias else out


def routed_experts(moe: MoeSpec, w: Mapping[str, Any], routed_by: Tensor, h: Tensor, out: Tensor, arena: Arena, ops: Ops) -> Tensor:
    """out = the chosen experts' MLPs of `h`, weighted; the router looks at `routed_by`."""
    if multiplied(w, arena):
        return routed(moe, w, routed_by, h, out, arena)
    T, E, K, W = h.shape[0], moe.n_experts, moe.n_active, moe.width
    room = arena.room
    scores = torch.mm(routed_by.to(torch.float32), w["router"].t(), out=arena.take("router", T, E))
    if moe.bias:
        scores.add_(w["router_bias"])
    if moe.selection == "softmax_topk":
        torch.softmax(scores, -1, out=scores)
    weight, index = arena.take("router.weight", T, K), arena.take("router.index", T, K)
    torch.topk(scores, K, dim=-1, out=(weight, index))
    if moe.selection == "topk_softmax":
        torch.softmax(weight, -1, out=weight)
    elif moe.renormalise:
        weight.div_(weight.sum(-1, keepdim=True))
    if moe.beside_dense:
        weight.mul_(w["expert_scale"][index])
    out.zero_()
    for e in torch.unique(index).tolist():
        token, slot = (index == e).nonzero(as_tuple=True)
        n = token.shape[0]
        rows = torch.index_select(h, 0, token, out=arena.take("expert.in", n, h.shape[1]))
        both = arena.take("gate_up", 2, n, W)
        gate, up = linear(rows, w["experts_gate"][e], both[0], room), linear(rows, w["experts_up"][e], both[1], room)
        if moe.bias:
            gate.add_(w["experts_gate_bias"][e])
            up.add_(w["experts_up_bias"][e])
        y = linear(ops.gate(moe.activation, gate, up, None), w["experts_down"][e], arena.take("expert.out", n, h.shape[1]), room)
        if moe.bias:
            y.add_(w["experts_down_bias"][e])
        out.index_add_(0, token, y.mul_(weight[token, slot, None]))
    return out


def experts_beside_dense(mlp: MlpSpec, w: Mapping[str, Any], x: Tensor, h: Tensor, out: Tensor, arena: Arena, ops: Ops) -> Tensor:
    """Gemma 4 26B-A4B: norm(dense(h)) + norm(experts(norm(x))); the router reads the raw residual x, normed and scaled.

    Source: transformers 5.23 models/gemma4/modeling_gemma4.py `Gemma4TextDecoderLayer`, `Gemma4TextRouter`.
    """
    assert mlp.moe is not None
    dense(mlp, w, h, out, arena, ops)
    if multiplied(w, arena):
        ops.norm(x, w["experts_norm"], h, arena)
        beside = (out, w["mlp_post_norm_1"], w["experts_post_norm"])
        return routed(mlp.moe, w, x, h, out, arena, router_norm=w["router_scale"], beside=beside)
    ops.norm(out, w["mlp_post_norm_1"], out, arena)
    routed_by = ops.norm(x, w["router_scale"], arena.take("expert.sum", *x.shape), arena).mul_(x.shape[-1] ** -0.5)
    ops.norm(x, w["experts_norm"], h, arena)
    total = arena.take("expert.total", *x.shape)
    routed_experts(mlp.moe, w, routed_by, h, total, arena, ops)
    ops.norm(total, w["experts_post_norm"], total, arena)
    return out.add_(total)
