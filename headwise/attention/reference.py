"""Attention by its formula: slow, with a score matrix, right. The oracle of every backend; chosen only when asked for.

Shapes    T queries, S keys, H query heads, G KV heads (H a multiple of G), D head size:
          q_THD, k_SGD, v_SGD -> out_THD, logsumexp_TH.
Accuracy  in float64 throughout when the inputs are; else in the inputs' own type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Span
from headwise.kernels.turn import Turn


def visible(q_pos_T: Tensor, k_pos_S: Tensor, window: int | None) -> Tensor:
    """Which key each query sees, (T, S) bool; `window` keys, itself included; a negative position is an empty slot."""
    q_pos, k_pos = q_pos_T[:, None], k_pos_S[None, :]
    seen = k_pos <= q_pos
    seen &= k_pos >= (0 if window is None else (q_pos - (window - 1)).clamp_(min=0))
    return seen


def attend(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    seen_TS: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q.k) . v over the keys that `seen_TS` allows; a query that sees none gives zeros."""
    group = q_THD.shape[1] // k_SGD.shape[1]
    k, v = k_SGD.repeat_interleave(group, 1), v_SGD.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->ths", q_THD, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_TS[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    if sinks_H is not None:
        lse = torch.logaddexp(lse, sinks_H.to(lse.dtype)[None, :])
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return torch.einsum("ths,shd->thd", weights, v), lse


def turned(v_SGD: Tensor, position_S: Tensor, turn: Turn, E: int) -> Tensor:
    """In fp64 the keys (S, G, E) of V alone: [V | the rotated values of RoPE(w * V), zeros up to E].

    Angles are products in fp32, as those of queries are everywhere; only what follows is exact.
    """
    D, P = v_SGD.shape[-1], turn.freq_P.shape[0]
    angle = (position_S.float()[:, None] * turn.freq_P).double()[:, None]
    a, b = ((v_SGD.double() * turn.w_D.double())[..., i : i + P] for i in (0, D // 2))
    cos, sin = angle.cos() * turn.magnitude, angle.sin() * turn.magnitude
    keys = v_SGD.new_zeros(*v_SGD.shape[:2], E, dtype=torch.float64)
    keys[..., :D] = v_SGD
    keys[..., D : D + P], keys[..., D + P : D + 2 * P] = a * cos - b * sin, b * cos + a * sin
    return keys


def attend_cache(
    backend: str,
    q_THE: Tensor,
    cache: LayerCache,
    span: Span,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    scratch: Scratch,
    out_THD: Tensor,
) -> None:
    """The same call as `torch_fused.attend`, by the formula: the whole cache as floats, every score stored."""
    keys, values, seen = [], [], []
    for s in cache.segments(span):
        shape = (s.stop - s.start, cache.k.data_SGD.shape[1])
        room = q_THE.new_empty(*shape, q_THE.shape[-1])
        if cache.turn is None:
            k = cache.k.read(s.start, s.stop, room)
        else:
            at = torch.arange(s.position, s.position + shape[0], device=room.device)
            v = cache.k.read(s.start, s.stop, room[..., : cache.k.n_values])
            k = turned(v, at, cache.turn, room.shape[-1]).to(room.dtype)
        keys.append(k)
        values.append(k if cache.v is None else cache.v.read(s.start, s.stop, q_THE.new_empty(*shape, cache.v.n_values)))
        open_TS = torch.ones(q_THE.shape[0], shape[0], dtype=torch.bool, device=q_THE.device)
        seen.append(open_TS.tril() if s.causal else open_TS if s.mask_TS is None else s.mask_TS == 0)
    out, _ = attend(q_THE, torch.cat(keys), torch.cat(values), torch.cat(seen, 1), scale=scale, softcap=softcap, sinks_H=sinks_H)
    out_THD.copy_(out[..., : out_THD.shape[-1]])
