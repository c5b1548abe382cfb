"""A file's blocks as the planes our kernels read: the same bytes, moved. `kernels.tiled` says where to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.kernels.tiled import EIGHT, LAYOUTS, Planes, plane_bytes
from headwise.weights.blocks import _bits, _k_scales, _nibbles, _shifted

Taken = tuple[Tensor, Tensor | None, Tensor]  # low and high integers of a block in the order of its values, and its head


def empty(type_name: str, shape: tuple[int, ...], device: torch.device | str) -> Planes:
    """Planes for a weight of `shape`, in one allocation of the bytes that its blocks have, rows rounded up to eights."""
    *stack, rows, K = shape
    eights = -(-rows // EIGHT)
    sizes = [EIGHT * n for n in plane_bytes(type_name, K)]
    n = torch.Size(stack).numel() * eights
    whole = torch.empty(n * sum(sizes), dtype=torch.uint8, device=device)
    low, high, head = (x.view(*stack, eights, m) for x, m in zip(whole.split([n * m for m in sizes]), sizes, strict=True))
    return Planes(type_name, rows, K, low, high if sizes[1] else None, head)


def retile(blocks: Tensor, type_name: str, into: Planes) -> None:
    """Rows of blocks (..., rows, bytes) into the rows of `into`."""
    t = LAYOUTS[type_name]
    blocks = pad(blocks, (0, 0, 0, -blocks.shape[-2] % EIGHT)).unflatten(-2, (-1, EIGHT))
    low, high, head = _TAKEN[type_name](blocks.unflatten(-1, (-1, sum(plane_bytes(type_name, t.block)))))
    q = low.flatten(-2).unflatten(-1, (-1, 2, 4, 4))  # (..., eights, 8, groups, halves, bytes b, words i)
    if type_name == "q8_0":
        into.low.copy_((q ^ 0x80).transpose(-1, -2).flatten(-2).movedim(-4, -2).flatten(-4))
    else:
        if type_name == "mxfp4":
            nibbles = q.flatten(-3, -2)
            q = nibbles[..., 0::2, :] | (nibbles[..., 1::2, :] << 4)
        else:
            q = q[..., 0, :, :] | (q[..., 1, :, :] << 4)
        into.low.copy_(_eights(q.transpose(-1, -2).flatten(-2)))
    if into.high is not None:
        assert high is not None
        h = high.flatten(-2).unflatten(-1, (-1, 2, 4, 4))
        bits = sum((h[..., i] << i * t.high // 4 for i in range(1, 4)), h[..., 0])  # (..., groups, halves, bytes)
        into.high.copy_(_eights(bits.flatten(-2) if t.high == 8 else bits[..., 0, :] | (bits[..., 1, :] << 4)))
    if type_name == "q6_k":
        parts = [_eights(part).unflatten(-1, (head.shape[-2], -1)) for part in head.split((16, 2), dim=-1)]
        into.head.copy_(torch.cat(parts, dim=-1).flatten(-2))
    else:
        into.head.copy_(_eights(head))


def _eights(x: Tensor) -> Tensor:
    """(..., 8 rows, things, bytes) with the rows of a thing side by side."""
    return x.transpose(-3, -2).flatten(-3)


def _q4_k(b: Tensor) -> Taken:
    return _nibbles(b[..., 16:144].unflatten(-1, (4, 32))).flatten(-3), None, _k_head(b)


def _q5_k(b: Tensor) -> Taken:
    low = _nibbles(b[..., 48:176].unflatten(-1, (4, 32))).flatten(-3)
    return low, _shifted(b[..., 16:48], 1, 1).flatten(-2), _k_head(b)


def _k_head(b: Tensor) -> Tensor:
    scales, minima = _k_scales(b[..., 4:16])
    upper = minima >> 2
    return torch.cat((b[..., :4], scales | ((minima & 3) << 6), upper[..., :4] | (upper[..., 4:] << 4)), dim=-1)


def _q6_k(b: Tensor) -> Taken:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).flatten(-3)
    high = _shifted(b[..., 128:192].unflatten(-1, (2, 32)), 2, 3).flatten(-3)
    return low, high, b[..., 192:210]


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
