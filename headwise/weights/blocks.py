"""Quantised weights as GGUF stores them: rows of blocks, each a few scales and packed integers.

A BlockTensor keeps the file's bytes. `dequantise` turns rows of them into floats on any device; in fp32 it gives bit for
bit what gguf.quants 0.19 gives (same operations, same order), and other dtypes are that, rounded once. Beside them matrices in
e4m3 with their scales, as safetensors have them or made of floats: Fp8Tensor.
Source of the layouts: ggml/src/ggml-quants.c dequantize_row_*, as spelt out in gguf-py/gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.planner.residence import FP8_BLOCK
from headwise.spec.kv import FP8_MAX

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # MXFP4 values, doubled


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A quantised weight; `shape` counts elements, `data` is uint8 of shape (*shape[:-1], bytes of a row)."""

    data: Tensor
    type: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        expected = (*self.shape[:-1], row_bytes(self.type, self.shape[-1]))
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != expected:
            raise ValueError(f"BlockTensor {self.type} {self.shape}: {self.data.dtype} {tuple(self.data.shape)}, not {expected}")

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __getitem__(self, i: int) -> BlockTensor:
        """One matrix of a stack."""
        if len(self.shape) < 3:
            raise IndexError(f"a BlockTensor of shape {self.shape} is no stack")
        return BlockTensor(self.data[i], self.type, self.shape[1:])


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """A matrix in e4m3, `data` (N, K), times fp32 `scales`: of each row (N, 1), or of each 128 of a row (N, ceil(K / 128)).

    Or a stack of them, (E, N, K) and (E, N, ...).
    """

    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        (*rows, K), S = self.data.shape, self.scales.shape[-1]
        if self.data.dtype != torch.float8_e4m3fn or self.scales.shape != (*rows, S) or S not in (1, -(-K // FP8_BLOCK)):
            raise ValueError(f"Fp8Tensor: {self.data.dtype} {(*rows, K)} with scales {tuple(self.scales.shape)}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def part(self, start: int, stop: int) -> Fp8Tensor:
        """Rows `start` to `stop`, of each matrix of a stack, as a view."""
        return Fp8Tensor(self.data[..., start:stop, :], self.scales[..., start:stop, :])

    def __getitem__(self, i: int | tuple[slice, ...]) -> Fp8Tensor:
        """One matrix of a stack, or some rows, as a view."""
        return Fp8Tensor(self.data[i], self.scales[i])


if TYPE_CHECKING:
    from headwise.kernels.tiled import Planes

    Weight = Tensor | BlockTensor | Fp8Tensor | Planes
else:
    Weight = Tensor | BlockTensor | Fp8Tensor  # and, where triton is, kernels.tiled.Planes


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row of `columns` elements.

    Raises:
        ValueError: an unknown type, or a row that is no whole number of blocks.
    """
    if type_name not in _LAYOUTS:
        raise ValueError(f"{type_name} is not one of {', '.join(sorted(_LAYOUTS))}")
    block, block_bytes, _ = _LAYOUTS[type_name]
    if columns % block:
        raise ValueError(f"{type_name} packs {block} elements a block; a row has {columns}")
    return columns // block * block_bytes


def dequantise(data: Tensor, type_name: str, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Rows of blocks (..., bytes) as floats (..., elements); written into `out` where given, whose dtype then counts."""
    block, block_bytes, values = _LAYOUTS[type_name]
    n_blocks = data.shape[-1] // block_bytes
    floats = values(data.reshape(*data.shape[:-1], n_blocks, block_bytes))
    floats = floats.reshape(*data.shape[:-1], n_blocks * block)
    if out is None:
        return floats.to(dtype)
    return out.copy_(floats)


def expand_fp8(data: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """e4m3 values (..., N, K) times their scales (..., N, 1 or ceil(K / 128)), in fp32; rounded once into `out` where given."""
    each = scales if scales.shape[-1] == 1 else scales.repeat_interleave(FP8_BLOCK, -1)[..., : data.shape[-1]]
    floats = data.float() * each
    return floats if out is None else out.copy_(floats)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of floats (N, K) as e4m3 and a scale each, (N, 1) fp32: the row's largest magnitude becomes 448."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30).div_(FP8_MAX)
    return (x.float() / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def repack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Safetensors MXFP4 (..., blocks, 16) with exponents (..., blocks) as GGUF's: (..., blocks * 17), nothing lost.

    Safetensors puts elements 2i and 2i + 1 into byte i, GGUF elements i and i + 16, behind the block's exponent.
    Source: transformers 5.23 integrations/mxfp4.py `_convert_moe_packed_tensors`; ggml-quants.c dequantize_row_mxfp4.
    """
    low, high = blocks & 0x0F, blocks >> 4
    elements = torch.stack((low, high), dim=-1).flatten(-2)
    packed = elements[..., :16] | (elements[..., 16:] << 4)
    return torch.cat((scales.unsqueeze(-1), packed), dim=-1).flatten(-2)


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).float()


def _shifted(packed: Tensor, step: int, mask: int) -> Tensor:
    """Every byte of (..., n) taken apart, lowest bits first: (..., 8 / step, n)."""
    shifts = torch.arange(0, 8, step, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & mask


def _nibbles(packed: Tensor) -> Tensor:
    return _shifted(packed, 4, 0x0F)


def _bits(packed: Tensor) -> Tensor:
    """(..., n) bytes as (..., 8 * n) bits, the first byte's lowest first."""
    return _shifted(packed, 1, 1).transpose(-1, -2).flatten(-2)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[..., :2]) * (_nibbles(b[..., 2:]).flatten(-2).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[..., :2]) * _nibbles(b[..., 4:]).flatten(-2).float() + _half(b[..., 2:4])


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[..., 6:]).flatten(-2) | (_bits(b[..., 2:6]) << 4)
    return _half(b[..., :2]) * (q.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[..., 8:]).flatten(-2) | (_bits(b[..., 4:8]) << 4)
    return _half(b[..., :2]) * q.float() + _half(b[..., 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return b[..., 2:].view(torch.int8).float() * _half(b[..., :2])


def _q2_k(b: Tensor) -> Tensor:
    scales, d, d_min = b[..., :16], _half(b[..., 80:82]), _half(b[..., 82:84])
    q = _shifted(b[..., 16:80].unflatten(-1, (2, 32)), 2, 3)  # (..., 2, 4, 32)
    q = q.flatten(-3).unflatten(-1, (16, 16)).float()
    scale, low = (d * (scales & 0x0F).float()).unsqueeze(-1), (d_min * (scales >> 4).float()).unsqueeze(-1)
    return (scale * q - low).flatten(-2)


def _q3_k(b: Tensor) -> Tensor:
    high_bits, low_bits, packed, d = b[..., :32], b[..., 32:96], b[..., 96:108], _half(b[..., 108:110])
    low_scales = _nibbles(packed[..., :8]).flatten(-2)
    high_scales = _shifted(packed[..., 8:], 2, 3).flatten(-2)
    scale = (d * ((low_scales | (high_scales << 4)).float() - 32)).unsqueeze(-1)
    q = _shifted(low_bits.unflatten(-1, (2, 32)), 2, 3).flatten(-3)
    absent = (_shifted(high_bits, 1, 1) ^ 1).flatten(-2)  # the offset of 4 applies where the bit is 0
    return (scale * (q.float() - (absent << 2).float()).unflatten(-1, (16, 16))).flatten(-2)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes."""
    scale, low, both = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    return (
        torch.cat((scale & 0x3F, (both & 0x0F) | ((scale >> 2) & 0x30)), dim=-1),
        torch.cat((low & 0x3F, (both >> 4) | ((low >> 2) & 0x30)), dim=-1),
    )


def _scaled_k(b: Tensor, q: Tensor) -> Tensor:
    """q (..., 8, 32) under the scales at the head of a Q4_K or Q5_K block."""
    scales, minima = _k_scales(b[..., 4:16])
    d = (_half(b[..., 0:2]) * scales.float()).unsqueeze(-1)
    low = (_half(b[..., 2:4]) * minima.float()).unsqueeze(-1)
    return (d * q.float() - low).flatten(-2)


def _q4_k(b: Tensor) -> Tensor:
    return _scaled_k(b, _nibbles(b[..., 16:144].unflatten(-1, (4, 32))).flatten(-3, -2))


def _q5_k(b: Tensor) -> Tensor:
    low = _nibbles(b[..., 48:176].unflatten(-1, (4, 32))).flatten(-3, -2)
    return _scaled_k(b, low | (_shifted(b[..., 16:48], 1, 1) << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).flatten(-3)
    high = _shifted(b[..., 128:192].unflatten(-1, (2, 32)), 2, 3).flatten(-3)
    scale = (_half(b[..., 208:210]) * b[..., 192:208].view(torch.int8).float()).unsqueeze(-1)
    return (scale * ((low | (high << 4)).float() - 32).unflatten(-1, (16, 16))).flatten(-2)


def _mxfp4(b: Tensor) -> Tensor:
    e = b[..., :1].int()
    # half of 2^(e - 127), as bits of a float: subnormal below 2
    scale = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)
    values = torch.tensor(_E2M1, dtype=torch.float32, device=b.device)
    return scale * values[_nibbles(b[..., 1:]).flatten(-2).long()]


# type -> (elements of a block, bytes of a block, blocks (..., bytes) -> floats (..., elements))
_LAYOUTS: Mapping[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "q4_0": (32, 18, _q4_0),
    "q4_1": (32, 20, _q4_1),
    "q5_0": (32, 22, _q5_0),
    "q5_1": (32, 24, _q5_1),
    "q8_0": (32, 34, _q8_0),
    "q2_k": (256, 84, _q2_k),
    "q3_k": (256, 110, _q3_k),
    "q4_k": (256, 144, _q4_k),
    "q5_k": (256, 176, _q5_k),
    "q6_k": (256, 210, _q6_k),
    "mxfp4": (32, 17, _mxfp4),
}
BLOCK_TYPES = frozenset(_LAYOUTS)
