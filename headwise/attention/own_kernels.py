"""Our kernels behind the adapter: they read the cache where it lies, in its own type, by slots. No mask, no copy.

Queries are few (decode, drafts): the keys are shared between programs, as many as the card has multiprocessors. Queries are
many (a prefill chunk): one program a block of queries.
"""

from __future__ import annotations

from functools import cache as remember
from functools import partial as partial_of

import torch
from torch import Tensor

from headwise.cache.storage import LayerCache, Scratch, Span, Values
from headwise.kernels import attend as portable
from headwise.kernels.configs import FEW_ROWS, doublings
from headwise.kernels.stored import Sequences, Slots, Stored
from headwise.kernels.turn import Turn

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
    on_device = span.device
    if on_device is None:
        raise ValueError(f"{backend} needs the span on the device")
    table = on_device.tables[cache.window]
    launch(
        backend, q_THE, stored(cache.k), None if cache.v is None else stored(cache.v), out_THD,
        Sequences(on_device.starts_B1, on_device.lengths_B, span.n, span.stop),
        Slots(table.rows, ring=cache.n_slots if cache.window else 0, page=table.page),
        scale=scale, window=cache.window, softcap=softcap, sinks_H=sinks_H, partial=scratch.partial, done=scratch.done,
        overlap=not on_device.fresh, turn=cache.turn,
    )  # fmt: skip


def launch(
    backend: str, q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float,
    window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None, partial: Tensor | None = None,
    done: Tensor | None = None, overlap: bool = True, turn: Turn | None = None,
) -> None:  # fmt: skip
    """The kernel of `backend` for these shapes, over the cached keys of one or several sequences.

    Args:
        partial: fp32 scratch; None: keys are not shared between programs.
        done: int32 zeros, one a sequence and KV head: a decode launch merges its partial results itself.
        overlap: nothing has written keys of earlier steps in the two launches before (`decode_hopper`).
        turn: what makes keys, where `k` holds V alone.
    Raises:
        ValueError: a softcap with the Hopper kernels, whose row claims none; what `kernels.attend.check` refuses.
    """
    hopper = backend == "headwise-hopper"
    if hopper and softcap is not None:
        raise ValueError(f"{backend} has no softcap")
    if hopper and slots.page not in (0, 64):
        raise ValueError(f"{backend}: pages of {slots.page} slots, its tiles are of 64")
    if hopper:  # the portable kernel asks itself
        portable.check(q_NHE, k, v, out_NHD, seqs, slots, window, sinks_H, turn)
    D, G, B = out_NHD.shape[-1], k.data_SGW.shape[1], seqs.lengths_B.shape[0]
    native = k.data_SGW.dtype == q_NHE.dtype
    rows = seqs.max_queries * q_NHE.shape[1] // G
    keys = seqs.max_length if window is None else min(seqs.max_length, window + seqs.max_queries - 1)
    few = rows <= FEW_ROWS
    pair = v is not None and D == 512
    if few:  # of floats, two tiles of both do not fit shared memory
        by_portable = not hopper or (pair if native else turn is not None or not packed_takes(D, rows))
    else:  # the prefill kernels of 512 have no window and no sinks, and none makes keys of V alone or reads floats of another type
        only_512 = D == 512 and (window is not None or sinks_H is not None)
        by_portable = not hopper or only_512 or turn is not None or (not native and k.floats)
    merged = not by_portable and rows <= MERGED_ROWS and done is not None  # by the launch itself
    share = 2.0 if by_portable or not native else 0.75 if merged else 1.0
    tile = portable.tile_rows(q_NHE, k, v, D, rows, turn) if by_portable else max(16, 1 << (rows - 1).bit_length())
    n_splits = splits(keys, tile, G * B, D, q_NHE.device, partial, share) if few else 1
    if by_portable:
        portable.attend(
            q_NHE, k, v, out_NHD, seqs, slots, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H,
            n_splits=n_splits, scratch=partial, turn=turn,
        )  # fmt: skip
        return
    from headwise.kernels import attend_hopper, attend_packed, decode_hopper, decode_packed  # Gluon's modules are of triton 3.6

    if few:
        decode = partial_of(decode_hopper.attend_decode, turn=turn) if native else decode_packed.attend_packed
        decode(
            q_NHE, k, v, out_NHD, seqs, slots, scale=scale, window=window, sinks_H=sinks_H, n_splits=n_splits, scratch=partial,
            count=done if merged else None, overlap=overlap,
        )  # fmt: skip
    elif not native and D == 512:
        attend_packed.attend_packed(q_NHE, k, v, out_NHD, seqs, slots, scale=scale)
    elif not native and v is not None:
        attend_packed.attend_packed_two(
            q_NHE, k, v, out_NHD, seqs, slots, scale=scale, window=window, sinks_H=sinks_H, processors=processors(q_NHE.device)
        )
    elif v is None:
        attend_hopper.attend_one512(q_NHE, k, out_NHD, seqs, slots, scale=scale)
    elif pair:
        attend_hopper.attend_pair512(q_NHE, k, v, out_NHD, seqs, slots, scale=scale)
    else:
        attend_hopper.attend_two(
            q_NHE, k, v, out_NHD, seqs, slots, scale=scale, window=window, sinks_H=sinks_H, processors=processors(q_NHE.device)
        )


def packed_takes(D: int, rows: int) -> bool:
    """Whether `decode_packed` has a kernel: each warp has a block of a row, and its sums fit the registers."""
    return D >= 128 and rows * D <= 16 * 512


def stored(values: Values) -> Stored:
    return Stored(values.data_SGD, values.scales_SGB)


def splits(keys: int, tile: int, groups: int, D: int, device: torch.device, partial: Tensor | None, share: float) -> int:
    """Programs that share the keys of a KV head: `share` a multiprocessor, none with too few keys, as `partial` has room.

    Three programs to four multiprocessors leave room for the next launch to fetch its keys meanwhile; two to one hide latency
    where loads are not asynchronous. Measured on one H200, docs/kernels.md.

    Args:
        tile: rows of a program's partial result; groups: KV heads of all sequences.
    """
    if partial is None:
        return 1
    wanted = max(1, int(processors(device) * share) // groups)
    room = partial.numel() // (groups * tile * (D + 2))
    return max(1, min(wanted, room, doublings(keys)))


def partial_scratch(q_NHE: Tensor, k: Stored, seqs: Sequences) -> Tensor | None:
    """Room for the partial results of a launch of few rows, two programs to a multiprocessor; None for others."""
    rows = seqs.max_queries * q_NHE.shape[1] // k.data_SGW.shape[1]
    if rows > FEW_ROWS:
        return None
    tile = 16 if rows <= 16 else 128
    return torch.empty(2 * processors(q_NHE.device) * tile * (q_NHE.shape[2] + 2), dtype=torch.float32, device=q_NHE.device)


@remember
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
