"""A file's blocks as the planes our kernels read: the same bytes, moved. `kernels.tiled` says where to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headwise.kernels.tiled import LAYOUTS, Planes, plane_bytes
from headwise.weights.blocks import _bits, _k_scales, _nibbles, _shifted

Taken = tuple[Tensor, Tensor | None, Tensor]  # low and high integers of a block in the order of its values, and its head


def empty(type_name: str, shape: tuple[int, ...], device: torch.device | str) -> Planes:
    """Planes for a weight of `shape`, in one allocation of the bytes that its blocks have."""
    sizes = plane_bytes(type_name, shape[-1])
    rows = torch.Size(shape[:-1]).numel()
    whole = torch.empty(rows * sum(sizes), dtype=torch.uint8, device=device)
    parts = [x.view(*shape[:-1], n) for x, n in zip(whole.split([rows * n for n in sizes]), sizes, strict=True)]
    return Planes(type_name, shape[-1], parts[0], parts[1] if sizes[1] else None, parts[2])


def retile(blocks: Tensor, type_name: str, into: Planes) -> None:
    """Rows of blocks (..., rows, bytes) into the rows of `into`."""
    t = LAYOUTS[type_name]
    size = sum(plane_bytes(type_name, t.block))
    low, high, head = _TAKEN[type_name](blocks.unflatten(-1, (-1, size)))
    rows = blocks.shape[:-1]
    if type_name == "q8_0":  # 4 bytes a word
        into.low.copy_((low ^ 0x80).unflatten(-1, (2, 4, 4)).transpose(-1, -2).reshape(*rows, -1))
    else:
        q = low.unflatten(-1, (-1, 4, 2, 4))  # units, pairs k of nibbles, which of the pair, words i
        into.low.copy_((q[..., 0, :] | (q[..., 1, :] << 4)).transpose(-1, -2).reshape(*rows, -1))
    if into.high is not None:
        assert high is not None
        h = high.unflatten(-1, (-1, 4, 2, 4))
        pairs = h[..., 0, :] | (h[..., 1, :] << 4)  # (..., units, k, i)
        if t.high == 1:
            field = sum((pairs[..., k, :] << k for k in range(1, 4)), pairs[..., 0, :])
        else:  # two bytes a word: pairs 0 and 1, pairs 2 and 3
            field = torch.stack([pairs[..., k, :] | (pairs[..., k + 1, :] << 2) for k in (0, 2)], dim=-1)
        into.high.copy_(field.reshape(*rows, -1))
    into.head.copy_(head.reshape(*rows, -1))


def _q4_k(b: Tensor) -> Taken:
    return _nibbles(b[..., 16:144].unflatten(-1, (4, 32))).flatten(-3), None, _k_head(b)


def _q5_k(b: Tensor) -> Taken:
    low = _nibbles(b[..., 48:176].unflatten(-1, (4, 32))).flatten(-3)
    return low, _shifted(b[..., 16:48], 1, 1).flatten(-2), _k_head(b)


def _k_head(b: Tensor) -> Tensor:
    scales, minima = _k_scales(b[..., 4:16])
    upper = minima >> 2
    return torch.cat((b[..., :4], scales | ((minima & 3) << 6), upper[..., 0::2] | (upper[..., 1::2] << 4)), dim=-1)


def _q6_k(b: Tensor) -> Taken:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).flatten(-3)
    high = _shifted(b[..., 128:192].unflatten(-1, (2, 32)), 2, 3).flatten(-3)
    return low, high, torch.cat((b[..., 208:210], b[..., 192:208]), dim=-1)


def _q8_0(b: Tensor) -> Taken:
    return b[..., 2:], None, b[..., :2]


def _q5_0(b: Tensor) -> Taken:
    return _nibbles(b[..., 6:]).flatten(-2), _bits(b[..., 2:6]), b[..., :2]


def _q4_0(b: Tensor) -> Taken:
    return _nibbles(b[..., 2:]).flatten(-2), None, b[..., :2]


def _mxfp4(b: Tensor) -> Taken:
    return _nibbles(b[..., 1:]).flatten(-2), None, b[..., :1]


_TAKEN: dict[str, Callable[[Tensor], Taken]] = {
    "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "q8_0": _q8_0, "q5_0": _q5_0, "q4_0": _q4_0, "mxfp4": _mxfp4,
}  # fmt: skip
