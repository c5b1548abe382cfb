"""Our kernels behind the adapter: they read the cache where it lies, in its own type, by slots. No mask, no copy.

Queries are few (decode, drafts): the keys are shared between programs, as many as the card has multiprocessors. Queries are
many (a prefill chunk): one program a block of queries.
"""

from __future__ import annotations

from functools import cache as remember

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Span, Values
from headwise.kernels import attend as portable
from headwise.kernels.configs import doublings
from headwise.kernels.stored import Sequences, Slots, Stored

FEW_ROWS = 32  # (query, head) pairs of a group that a decode launch takes
MERGED_ROWS = 4  # up to as many, the launch itself merges the partial results


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
    """As `torch_fused.attend`; `span.device` and, for a split decode, `scratch.partial` are needed.

    Raises:
        ValueError: the span is not on the device, or a softcap with the Hopper kernels, whose row claims none.
    """
    if span.device is None:
        raise ValueError(f"{backend} needs the span on the device")
    hopper = backend == "headwise-hopper"
    if hopper and softcap is not None:
        raise ValueError(f"{backend} has no softcap")
    k, v = stored(cache.k), None if cache.v is None else stored(cache.v)
    seqs = Sequences(span.device[:2], span.device[2:3], span.n, span.stop)
    slots = Slots(span.device[3:4], ring=cache.n_slots if cache.window else 0)
    D, G = out_THD.shape[-1], cache.k.data_SGD.shape[1]
    rows = span.n * q_THE.shape[1] // G
    keys = span.stop if cache.window is None else min(span.stop, cache.window + span.n - 1)
    few = rows <= FEW_ROWS
    pair = v is not None and D == 512  # decoded by the portable kernel: two tiles of both do not fit shared memory
    merged = hopper and rows <= MERGED_ROWS  # by the launch itself
    share = 2.0 if pair or not hopper else 0.75 if merged else 1.0
    n_splits = splits(keys, rows, G, D, q_THE.device, scratch.partial, share) if few else 1
    global_only = D == 512 and (cache.window is not None or sinks_H is not None)  # the prefill kernels of 512 have neither
    if not hopper or not (cache.k.native(q_THE.dtype) or few) or (pair and few) or (global_only and not few):
        portable.attend(
            q_THE, k, v, out_THD, seqs, slots, scale=scale, window=cache.window, softcap=softcap, sinks_H=sinks_H,
            n_splits=n_splits, scratch=scratch.partial,
        )  # fmt: skip
        return
    from headwise.kernels import attend_hopper, decode_hopper  # Gluon's modules exist in triton 3.6 only

    if few:
        decode_hopper.attend_decode(
            q_THE, k, v, out_THD, seqs, slots, scale=scale, window=cache.window, sinks_H=sinks_H, n_splits=n_splits,
            scratch=scratch.partial, count=scratch.done if merged else None,
        )  # fmt: skip
    elif v is None:
        attend_hopper.attend_one512(q_THE, k, out_THD, seqs, slots, scale=scale)
    elif pair:
        attend_hopper.attend_pair512(q_THE, k, v, out_THD, seqs, slots, scale=scale)
    else:
        attend_hopper.attend_two(q_THE, k, v, out_THD, seqs, slots, scale=scale, window=cache.window, sinks_H=sinks_H)


def stored(values: Values) -> Stored:
    return Stored(values.data_SGD, values.scales_SGB)


def splits(keys: int, rows: int, G: int, D: int, device: torch.device, partial: Tensor | None, share: float) -> int:
    """Programs that share the keys of a KV head: `share` a multiprocessor, none with too few keys, as `partial` has room.

    Three programs to four multiprocessors leave room for the next launch to fetch its keys meanwhile; two to one hide latency
    where loads are not asynchronous. Measured on one H200, docs/kernels.md.
    """
    if partial is None:
        return 1
    wanted = max(1, int(_processors(device) * share) // G)
    room = partial.numel() // (G * max(16, 1 << (rows - 1).bit_length()) * (D + 2))
    return max(1, min(wanted, room, doublings(keys)))



@remember
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
