"""How kernels read a cache: which slot holds a position, and the values of a slot in every KV format.

A cached tensor is (S, G, W): S slots, G KV heads, W values of a key or value (q4_0: W / 2 bytes), rows contiguous. Blocks of
32 values have one f16 scale each, (S, G, W / 32). `cache.storage` writes what is read here.

Columns   A packed format comes out of its bytes in pairs: byte j of a block holds values j and j + 16. A sum over values does not
          mind their order, so nothing is shuffled: queries are read, and results written, in the order of `columns`.
fp8       e4m3 bits moved into f16's exponent and mantissa are the value / 256, subnormals included: three integer operations on
          any card, no conversion instruction needed. NaN is never stored (writes saturate at 448).
"""

from __future__ import annotations

from functools import cache as remember
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headwise.kernels.configs import Arch, arch_of


@remember
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(x: Tensor) -> dict[str, bool]:
    """Launch options where launches may overlap (programmatic dependent launch, from Hopper on).

    A kernel that is started so lets the next one start at once, and waits itself, before it reads or writes anything that an
    earlier launch may touch, until the launch before has ended. Weights nobody writes: they are asked for before that.
    """
    pdl = x.is_cuda and _overlaps(x.device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@remember
def device_arch(device: torch.device) -> Arch:
    """Whose rows of the tables of launches a device reads; the interpreter's CPU any."""
    if device.type != "cuda":
        return "ampere"
    return arch_of(torch.cuda.get_device_capability(device), rocm=torch.version.hip is not None)


FLOAT, FP8, Q8_0, Q4_0 = (tl.constexpr(i) for i in range(4))
FORMATS = {torch.float8_e4m3fn: FP8, torch.int8: Q8_0, torch.uint8: Q4_0}
BLOCK = tl.constexpr(32)


class Slots(NamedTuple):
    """Where the positions of each sequence lie.

    Contiguous (`page` 0): position p of sequence b in slot table_B[b] + p, or with a ring of n slots table_B[b] + p % n.
    Paged: in slot table_BP[b, p // page] * page + p % page.
    """

    table: Tensor  # int32
    ring: int = 0
    page: int = 0


class Sequences(NamedTuple):
    """The sequences of one launch, int32: where each one's queries start, and its keys, the new ones included."""

    starts_B1: Tensor
    lengths_B: Tensor
    max_queries: int  # of one sequence
    max_length: int


class Stored(NamedTuple):
    """One cached tensor as a kernel sees it."""

    data_SGW: Tensor
    scales_SGB: Tensor | None = None

    @property
    def format(self) -> Any:
        return FORMATS.get(self.data_SGW.dtype, FLOAT)

    @property
    def floats(self) -> bool:
        """Whether a kernel reads values as they are: neither fp8 nor blocks."""
        return self.data_SGW.dtype not in FORMATS

    @property
    def n_values(self) -> int:
        return self.data_SGW.shape[2] * (2 if self.data_SGW.dtype == torch.uint8 else 1)


def bits(x: Tensor) -> Tensor:
    """A cached tensor as a kernel takes it: e4m3 as plain bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@triton.jit
def in_turn(PDL: tl.constexpr):
    """The first line of a kernel that is launched with `overlap`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """The first line of a kernel that has something to do before `wait_turn`: the next launch may start."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_turn(PDL: tl.constexpr):
    """What earlier launches wrote is there from here on."""
    if PDL:
        gdc_wait()


@triton.jit
def slot_of(pos, table, seq, table_stride, ring, RING: tl.constexpr, PAGE: tl.constexpr):
    """The slots (int64) of positions `pos` of sequence `seq`."""
    if PAGE > 0:
        return tl.load(table + seq * table_stride + pos // PAGE).to(tl.int64) * PAGE + pos % PAGE
    first = tl.load(table + seq).to(tl.int64)
    return first + (pos % ring if RING else pos)


@triton.jit
def columns(N: tl.constexpr, FORMAT: tl.constexpr):
    """Which value each of N columns of a tile holds."""
    c = tl.arange(0, N)
    if FORMAT == Q4_0:
        return c // 32 * 32 + (c % 2) * 16 + c % 32 // 2
    return c


@triton.jit
def cos_sin(a):
    """cos and sin of fp32 angles, |a| < 2^18, within 2e-6: whole turns are taken off in three parts of 2 pi, of which the first
    two have 8 bits, so that nothing is lost; what is left is a polynomial's (Chebyshev, |r| <= pi)."""
    n = (a * 0.15915494309189535 + 12582912.0) - 12582912.0
    r = ((a - n * 6.28125) - n * 0.0019378662109375) + n * 2.559031351023075e-06
    z = r * r
    c = -2.7078129501744875e-07 + z * 1.7241772578059573e-09
    c = 2.4769792533675994e-05 + z * c
    c = -0.0013887799403592951 + z * c
    c = 0.04166648835449384 + z * c
    c = 0.9999999889838997 + z * (-0.49999989037165876 + z * c)
    s = 2.708742831282625e-06 + z * -2.06941591052593e-08
    s = 0.008332789409432856 + z * (-0.00019817563150956906 + z * s)
    s = r * (0.9999999374561976 + z * (-0.16666620886794467 + z * s))
    return c, s


@triton.jit
def from_fp8(bits, dtype: tl.constexpr):
    """e4m3 bits (uint8) as `dtype`."""
    x = bits.to(tl.uint16)
    half = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return (half.to(tl.float32) * 256.0).to(dtype)


@triton.jit
def load_values(
    data, scales, rows, ok, at, N: tl.constexpr, W: tl.constexpr, FORMAT: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Values [at, at + N) of the rows `rows` (slot * G + head; 0 where not `ok`), (BN, N) in `dtype` and the order of `columns`."""
    BN: tl.constexpr = rows.shape[0]
    if FORMAT == Q4_0:
        p = data + rows[:, None] * (W // 2) + (at // 2 + tl.arange(0, N // 2))[None, :]
    else:
        p = data + rows[:, None] * W + (at + tl.arange(0, N))[None, :]
    if MASKED:
        x = tl.load(p, mask=ok[:, None], other=0)
    else:
        x = tl.load(p)
    if FORMAT == FLOAT:
        return x.to(dtype)
    elif FORMAT == FP8:
        return from_fp8(x, dtype)
    else:
        ps = scales + rows[:, None] * (W // 32) + (at // 32 + tl.arange(0, N // 32))[None, :]
        if MASKED:
            s = tl.load(ps, mask=ok[:, None], other=0.0)
        else:
            s = tl.load(ps)
        if FORMAT == Q8_0:
            x3 = tl.reshape(x, (BN, N // 32, 32)).to(tl.float32) * s.to(tl.float32)[:, :, None]
            return tl.reshape(x3.to(dtype), (BN, N))
        else:
            b = tl.reshape(x, (BN, N // 32, 16))
            pair = tl.join((b & 15).to(tl.int8) - 8, (b >> 4).to(tl.int8) - 8)
            x4 = pair.to(tl.float32) * s.to(tl.float32)[:, :, None, None]
            return tl.reshape(x4.to(dtype), (BN, N))
