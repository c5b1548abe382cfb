"""Products whose K is shared out between programs: into how many parts, where the partial sums lie, and how the last adds them up.

Each program of a row of tiles leaves its part; the one that finishes last (a counter per tile says which) sums them in the order of
K, so that results do not depend on who was first, and leaves the counter at zero.
"""

from __future__ import annotations

from functools import cache as remember
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Card(NamedTuple):
    """What a launch is chosen for: multiprocessors, shared memory of one and of a program, bytes."""

    processors: int
    shared: int
    most: int


H200 = Card(132, 228 << 10, 227 << 10)


@remember
def card(device: torch.device) -> Card:
    if device.type != "cuda":  # the interpreter's
        return Card(1, 96 << 10, 96 << 10)
    p = torch.cuda.get_device_properties(device)
    return Card(p.multi_processor_count, p.shared_memory_per_multiprocessor, p.shared_memory_per_block_optin)


def splits_for(steps: int, programs: int, at_once: int) -> int:
    """Programs that share `steps` of K, where `programs` are needed without: so many that the last wave of them is nearly full.

    Args:
        at_once: programs that the card runs at a time.
    """
    splits = min(range(1, min(16, steps) + 1), key=lambda n: (-(-programs * n // at_once) * (-(-steps // n) + 2), n))
    return -(-steps // -(-steps // splits))


def partial_floats(T: int, N: int, splits: int) -> int:
    """fp32 values of scratch that a launch over `splits` programs a row needs."""
    return T * N * splits if splits > 1 else 0


def room(
    what: str, out_TN: Tensor, splits: int, programs: int, scratch: Tensor | None, done: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partial sums and counters of a launch; the result itself where nothing is shared out.

    Raises:
        ValueError: too little scratch or too few counters, with both numbers.
    """
    if splits == 1:
        return out_TN, out_TN
    T, N = out_TN.shape
    n = partial_floats(T, N, splits)
    if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < n:
        raise ValueError(f"{what}: {splits} splits need scratch of {n} fp32 values, got {scratch}")
    if done is None or done.dtype != torch.int32 or done.numel() < programs:
        raise ValueError(f"{what}: {splits} splits need {programs} int32 zeros, got {done}")
    return scratch, done


@triton.jit
def is_last(done, splits):
    """Whether all other programs of these rows have left their partial sums."""
    tl.debug_barrier()
    return tl.atomic_add(done + tl.program_id(0), 1, sem="acq_rel") == splits - 1


@triton.jit
def store_sum(acc, n, t, out, part, done, N, T, out_stride, splits):
    """A tile's result, or part of it: acc of rows n of W and t of x; once all parts are there, their sum."""
    ok = (n < N)[:, None] & (t < T)[None, :]
    where = t[None, :] * out_stride + n[:, None]
    if splits == 1:
        tl.store(out + where, acc.to(out.dtype.element_ty), mask=ok)
    else:
        mine = t[None, :] * N + n[:, None]
        tl.store(part + tl.program_id(1) * T * N + mine, acc, mask=ok)
        if is_last(done, splits):
            y = tl.zeros(acc.shape, tl.float32)
            for i in range(splits):
                y += tl.load(part + i * T * N + mine, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(out + where, y.to(out.dtype.element_ty), mask=ok)
            tl.store(done + tl.program_id(0), 0)
