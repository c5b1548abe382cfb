"""PyTorch's fused attention operators behind one adapter: no score matrix, pinned, so nothing can fall back.

`scaled_dot_product_attention` chooses a backend per call and falls to the math path without a word (on CPU already for
a 3-D mask). Here the operator itself is called: it runs fused or raises. The cache is read in segments (history, own
tokens, a ring under its mask; a tile at a time where values must be converted, or keys made of V alone), and the partial
results are merged by their log-sum-exp, which is exact: softmax over a union is the weighted mean of the softmaxes of its parts.

Legend: T queries, S keys, H query heads, G KV heads, E values per key, D values per output head (D <= E).
Source    PyTorch 2.11 native_functions.yaml, `_scaled_dot_product_{flash_attention_for_cpu,efficient,flash}_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Segment, Span, carve

SPLIT_BELOW = 2  # KV heads; with fewer the CPU operator would run on one core
SPLIT_MIN_KEYS = 1024  # per run: splitting costs about ten small operators
EMPTY = -1e30  # log-sum-exp of a query that sees no key of a tile; finite, so that merging two of them stays finite
Partial = tuple[Tensor, Tensor]  # out_HTE, logsumexp_HT
Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Partial]


def _flash_cpu(q_HTE: Tensor, k_GSE: Tensor, v_GSE: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Partial:
    """The operator reads the keys once per query head; a lone query's heads of a group go as rows of one, so once."""
    H, T, E = q_HTE.shape
    G, S, _ = k_GSE.shape
    if T > 1 or H == G:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_HTE[None], k_GSE[None], v_GSE[None], 0.0, causal, attn_mask=None if mask is None else mask[None, None], scale=scale
        )
        return out[0], lse[0]
    q_GRE = q_HTE.view(G, H // G, E)
    if mask is not None or G >= SPLIT_BELOW or S < 2 * SPLIT_MIN_KEYS:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_GRE[None], k_GSE[None], v_GSE[None], 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0].reshape(H, 1, E), lse[0].reshape(H, 1)
    return _split_cpu(q_GRE, k_GSE, v_GSE, scale)


def _split_cpu(q_GRE: Tensor, k_GSE: Tensor, v_GSE: Tensor, scale: float) -> Partial:
    """Few KV heads leave cores idle (the operator's threads share heads, not keys): the keys go as a batch of runs."""
    G, R, E = q_GRE.shape
    S = k_GSE.shape[1]
    runs = min(torch.get_num_threads(), S // SPLIT_MIN_KEYS)
    n = S // runs
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    k_PGNE, v_PGNE = (x[:, : runs * n].unflatten(1, (runs, n)).transpose(0, 1) for x in (k_GSE, v_GSE))
    out, lse = operator(q_GRE.expand(runs, G, R, E), k_PGNE, v_PGNE, 0.0, False, scale=scale)
    if runs * n < S:
        rest, rest_lse = operator(q_GRE[None], k_GSE[None, :, runs * n :], v_GSE[None, :, runs * n :], 0.0, False, scale=scale)
        out, lse = torch.cat((out, rest)), torch.cat((lse, rest_lse))
    total = lse.logsumexp(0)
    out = (out * (lse - total).exp_()[..., None].to(out.dtype)).sum(0)
    return out.reshape(G * R, 1, E), total.reshape(G * R, 1)


def _efficient(q_HTE: Tensor, k_GSE: Tensor, v_GSE: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Partial:
    """CUDA's memory-efficient operator; it has no grouped heads, so each head of the groups goes with all KV heads."""
    H, T, E = q_HTE.shape
    G, S, _ = k_GSE.shape
    if mask is not None:
        mask = _aligned(mask).expand(1, G, T, S)
    out = torch.empty(G, H // G, T, E, dtype=q_HTE.dtype, device=q_HTE.device)
    lse = torch.empty(G, H // G, T, dtype=torch.float32, device=q_HTE.device)
    q_GRTE = q_HTE.unflatten(0, (G, H // G))
    for r in range(H // G):
        part, part_lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_GRTE[:, r][None], k_GSE[None], v_GSE[None], mask, True, 0.0, causal, scale=scale
        )
        out[:, r], lse[:, r] = part[0], part_lse[0, :, :T]
    return out.flatten(0, 1), lse.flatten(0, 1)


def _aligned(mask_TS: Tensor) -> Tensor:
    """The operator reads mask rows 16 bytes at a time: a view of a copy whose rows start on that boundary."""
    T, S = mask_TS.shape
    if mask_TS.stride(0) % 8 == 0 and mask_TS.storage_offset() % 8 == 0:
        return mask_TS[None, None]
    padded = torch.empty(T, -(-S // 8) * 8, dtype=mask_TS.dtype, device=mask_TS.device)
    padded[:, :S] = mask_TS
    return padded[None, None, :, :S]


def _flash_cuda(q_HTE: Tensor, k_GSE: Tensor, v_GSE: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Partial:
    """FlashAttention-2 as built into PyTorch: grouped heads, no mask (its capability row says so)."""
    if mask is not None:
        raise ValueError("flash-attn-2 takes no mask")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q_HTE[None], k_GSE[None], v_GSE[None], 0.0, causal, False, scale=scale
    )
    return out[0], lse[0]


def _cudnn(q_HTE: Tensor, k_GSE: Tensor, v_GSE: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Partial:
    """cuDNN's operator: grouped heads, no mask (its capability row says so)."""
    if mask is not None:
        raise ValueError("torch-cudnn takes no mask")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_HTE[None], k_GSE[None], v_GSE[None], None, True, 0.0, causal, False, scale=scale
    )
    return out[0], lse[0].reshape(q_HTE.shape[:2])


OPERATORS: dict[str, Operator] = {
    "torch-flash-cpu": _flash_cpu,
    "torch-efficient": _efficient,
    "flash-attn-2": _flash_cuda,
    "torch-cudnn": _cudnn,
}


def attend(
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
    """Attention of `q_THE` over what its `span` sees in `cache`, into `out_THD`.

    Raises:
        ValueError: a softcap (no row of these backends claims one).
    """
    if softcap is not None:
        raise ValueError(f"{backend} has no softcap")
    operator, D, E = OPERATORS[backend], out_THD.shape[-1], q_THE.shape[-1]
    converted = cache.turn is not None or not cache.k.native(q_THE.dtype)
    segments = cache.segments(span)
    if span.n == 1 and len(segments) == 1 and backend == "torch-flash-cpu" and not converted and sinks_H is None:
        _decode_cpu(q_THE, cache, segments[0], scale, out_THD)
        return
    q_HTE = q_THE.transpose(0, 1)
    total_TH: Tensor | None = None
    for segment in segments:
        step = scratch.tile_tokens if converted else segment.stop - segment.start
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            position = segment.position + start - segment.start
            k_GSE, v_GSE = _tile(cache, start, stop, position, E, scratch if converted else None)
            mask = None
            if segment.mask_TS is not None:
                mask = segment.mask_TS[:, start - segment.start : stop - segment.start]
            out_HTE, lse_HT = operator(q_HTE, k_GSE, v_GSE, mask, segment.causal, scale)
            if mask is not None and stop - start < segment.stop - segment.start:
                lse_HT = lse_HT.masked_fill(~(mask == 0).any(1), EMPTY)
            part_THD, part_TH = out_HTE[..., :D].transpose(0, 1), lse_HT.t()
            if total_TH is None:
                out_THD.copy_(part_THD)
                total_TH = part_TH
            else:
                total_TH = merge(out_THD, total_TH, part_THD, part_TH)
            del out_HTE, part_THD  # one partial result lives at a time: the plan reserves room for one
    if sinks_H is not None and total_TH is not None:  # the sink joins the denominator only
        out_THD.mul_(torch.sigmoid(total_TH - sinks_H[None, :])[..., None])


def merge(out_THD: Tensor, total_TH: Tensor, part_THD: Tensor, part_TH: Tensor) -> Tensor:
    """Adds a partial result to `out_THD`, both in place; the log-sum-exp of the two."""
    merged = torch.logaddexp(total_TH, part_TH)
    out_THD.mul_((total_TH - merged).exp_()[..., None])
    out_THD.add_(part_THD.mul_((part_TH - merged).exp_()[..., None]))
    return merged


def _decode_cpu(q_1HE: Tensor, cache: LayerCache, segment: Segment, scale: float, out_1HD: Tensor) -> None:
    """One query, one run of slots, nothing to convert or merge: the same operator with half of the views around it."""
    _, H, E = q_1HE.shape
    G, D = cache.k.data_SGD.shape[1], out_1HD.shape[-1]
    k_GSE = cache.k.data_SGD[segment.start : segment.stop].transpose(0, 1)
    v_GSE = k_GSE if cache.v is None else cache.v.data_SGD[segment.start : segment.stop].transpose(0, 1)
    q_GRE = q_1HE.view(G, H // G, E)
    if G < SPLIT_BELOW and k_GSE.shape[1] >= 2 * SPLIT_MIN_KEYS:
        out, _ = _split_cpu(q_GRE, k_GSE, v_GSE, scale)
        out_1HD.copy_(out[:, 0, :D])
        return
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_GRE[None], k_GSE[None], v_GSE[None], 0.0, False, scale=scale
    )
    out_1HD.view(1, G, H // G, D).copy_(out[..., :D] if E != D else out)


def _tile(cache: LayerCache, start: int, stop: int, position: int, E: int, scratch: Scratch | None) -> tuple[Tensor, Tensor]:
    """Keys and values of slots [start, stop), (G, S, E) each; one tensor serves as both where the layer stores one.

    Args:
        position: of slot `start`, in a global layer.
        scratch: where they are converted or made; None: they are read as they lie.
    """
    k_buffer, v_buffer = (None, None) if scratch is None else (scratch.k, scratch.v)
    shape = cache.k.data_SGD[start:stop].shape[:2]
    room = None if k_buffer is None else carve(k_buffer, (*shape, E))
    if cache.turn is not None:
        assert room is not None and scratch is not None and scratch.turn is not None
        k = cache.turned(start, stop, position, room, scratch.turn)
    else:
        k = cache.k.read(start, stop, room)
    if cache.v is None:
        return k.transpose(0, 1), k.transpose(0, 1)
    v = cache.v.read(start, stop, None if v_buffer is None else carve(v_buffer, (*shape, cache.v.n_values)))
    return k.transpose(0, 1), v.transpose(0, 1)
