"""Quantised weights re-tiled for our kernels: the same bytes as the file's blocks, taken apart into three planes.

A block of a file is 17 to 210 bytes, so its fields lie at odd addresses. Here every field has a plane of its own, rows one
after another, and 16 bytes of the first plane, one load of a thread, are one unit of 32 values (16 for q8_0):

low     words of 8 nibbles. Element e of a unit is nibble e // 4 of word e % 4, so that 4 words of a thread meet 4 neighbouring
        activations, nibble by nibble. q8_0: 4 bytes a word, value + 128, byte e // 4 of word e % 4.
high    what 5 and 6 bits have beside the nibble, a byte or two a word. Bits of nibbles 2k and 2k + 1 stand 4 apart, as their
        nibbles do, so that one shift serves both.
head    scales, block after block. q4_k, q5_k: d, dmin (f16), eight bytes scale | (min & 3) << 6, four bytes of the minima's
        upper nibbles. q6_k: d, then 16 signed bytes. Others: the block's f16, or mxfp4's exponent.

`weights.retile` writes what is read here. Numbers come out of a word without a conversion instruction: a field moved to the top
of a float's mantissa, under the exponent that makes its lowest bit 1, is that exponent's power plus the field.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Q4_K, Q5_K, Q6_K, Q8_0, Q5_0, Q4_0, MXFP4 = (tl.constexpr(i) for i in range(7))


class Layout(NamedTuple):
    """Bytes of the planes. `unit`: values of 16 bytes of `low`; `high`: bytes beside each word of it."""

    kind: Any
    unit: int
    high: int
    block: int  # values that share a head
    head: int  # bytes of a head


LAYOUTS = {
    "q4_k": Layout(Q4_K, 32, 0, 256, 16),
    "q5_k": Layout(Q5_K, 32, 1, 256, 16),
    "q6_k": Layout(Q6_K, 32, 2, 256, 18),
    "q8_0": Layout(Q8_0, 16, 0, 32, 2),
    "q5_0": Layout(Q5_0, 32, 1, 32, 2),
    "q4_0": Layout(Q4_0, 32, 0, 32, 2),
    "mxfp4": Layout(MXFP4, 32, 0, 32, 1),
}


class Planes(NamedTuple):
    """One quantised matrix, or a stack of them: uint8 planes (..., rows, bytes of a row), rows contiguous."""

    type: str
    K: int
    low: Tensor
    high: Tensor | None
    head: Tensor

    @property
    def rows(self) -> int:
        return self.low.shape[-2]


def plane_bytes(type_name: str, K: int) -> tuple[int, int, int]:
    """Bytes of a row of K values in each plane; they sum to the bytes of its blocks."""
    t = LAYOUTS[type_name]
    if K % t.block:
        raise ValueError(f"{type_name} packs {t.block} values a block; a row has {K}")
    words = K // t.unit * 4
    return words * 4, words * t.high, K // t.block * t.head


def pointers(w: Planes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The planes as the kernels take them: words, high fields, heads as bytes and heads as wide as they allow."""
    t = LAYOUTS[w.type]
    high = w.head if w.high is None else w.high.view(torch.int16) if t.high == 2 else w.high
    wide = w.head.view(torch.int32) if t.head == 16 else w.head if t.head == 1 else w.head.view(torch.float16)
    return w.low.view(torch.int32), high, w.head, wide


@triton.jit
def shifted(w, by: tl.constexpr):
    """w shifted right by a constant of either sign."""
    if by > 0:
        return w >> by
    elif by < 0:
        return w << -by
    else:
        return w


def magic(type_name: str) -> tuple[int, int]:
    """The exponents under which `number` puts even and odd fields.

    As arguments of a launch, not constants of the program: mask and exponent are then one instruction, not two immediates.
    """
    position = {"q6_k": 13, "q5_k": 14, "q5_0": 14}.get(type_name, 15)
    if type_name == "mxfp4":
        return 0x01C00000, 0  # a mask
    return (127 + 23 - position) << 23, (127 + 23 - position - 4) << 23


@triton.jit
def number(w, h, j: tl.constexpr, even, odd, KIND: tl.constexpr):
    """Field j of words `w` and their high fields `h` as fp32: the stored integer + `bias`; mxfp4: the value * 2**-126.

    even, odd: `magic` of the type.
    """
    k: tl.constexpr = j // 2
    up: tl.constexpr = 4 * (j % 2)
    exponent = odd if j % 2 else even
    if KIND == Q8_0:
        return ((shifted(w, 8 * j - 15) & 0x7F8000) | even).to(tl.float32, bitcast=True)
    elif KIND == MXFP4:  # sign to bit 31, exponent and mantissa to bits 22 to 24; the exponent 0 is a subnormal in both
        return ((shifted(w, 4 * j - 28) & -0x80000000) | (shifted(w, 4 * j - 22) & even)).to(tl.float32, bitcast=True)
    elif KIND == Q6_K:
        bits = (shifted(w, 8 * k - 13) & (0x0F << 13 + up)) ^ exponent
        return (bits | (shifted(h, (k % 2) * 2 + (k // 2) * 8 - 17) & (0x03 << 17 + up))).to(tl.float32, bitcast=True)
    elif KIND == Q5_K or KIND == Q5_0:
        bits = (shifted(w, 8 * k - 14) & (0x0F << 14 + up)) ^ exponent
        return (bits | (shifted(h, k - 18) & (0x01 << 18 + up))).to(tl.float32, bitcast=True)
    else:
        return ((shifted(w, 8 * k - 15) & (0x0F << 15 + up)) | exponent).to(tl.float32, bitcast=True)


@triton.jit
def bias(j: tl.constexpr, KIND: tl.constexpr):
    """What `number` adds to the stored integer of field j, and the offset its type takes off, together."""
    if KIND == Q8_0:
        return tl.constexpr(256.0 + 128.0)
    elif KIND == MXFP4:
        return tl.constexpr(0.0)
    elif KIND == Q6_K:
        return tl.constexpr((64.0 if j % 2 else 1024.0) + 32.0)
    elif KIND == Q5_K:
        return tl.constexpr(32.0 if j % 2 else 512.0)
    elif KIND == Q5_0:
        return tl.constexpr((32.0 if j % 2 else 512.0) + 16.0)
    elif KIND == Q4_0:
        return tl.constexpr((16.0 if j % 2 else 256.0) + 8.0)
    else:
        return tl.constexpr(16.0 if j % 2 else 256.0)


@triton.jit
def load_high(high, at, ok, KIND: tl.constexpr, MASKED: tl.constexpr):
    """High fields of the words `at`, int32; the types without: 0."""
    if KIND == Q5_K or KIND == Q5_0 or KIND == Q6_K:
        if MASKED:
            return tl.load(high + at, mask=ok, other=0).to(tl.int32)
        else:
            return tl.load(high + at).to(tl.int32)
    else:
        return 0


@triton.jit
def _get(p, ok, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(p, mask=ok, other=0)
    else:
        return tl.load(p)


@triton.jit
def load_head(head, wide, row, unit, ok, K, KIND: tl.constexpr, MASKED: tl.constexpr):
    """What the scales of units `unit` of rows `row` are decoded from, as loaded: three tensors, unused ones repeat the first."""
    if KIND == Q4_K or KIND == Q5_K:
        word = (row * (K // 256) + unit // 8) * 4
        return _get(wide + word, ok, MASKED), _get(wide + word + 1 + unit % 8 // 4, ok, MASKED), _get(wide + word + 3, ok, MASKED)
    elif KIND == Q6_K:
        block = row * (K // 256) + unit // 8
        at = block * 18 + 2 + unit % 8 * 2
        d = _get(wide + block * 9, ok, MASKED)
        return d, _get(head + at, ok, MASKED), _get(head + at + 1, ok, MASKED)
    elif KIND == Q8_0:
        d = _get(wide + row * (K // 32) + unit // 2, ok, MASKED)
        return d, d, d
    else:
        d = _get(wide + row * (K // 32) + unit, ok, MASKED)
        return d, d, d


@triton.jit
def half(bits):
    """The f16 in the low half of an int32, as fp32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales(d, a, b, unit, KIND: tl.constexpr):
    """(scale of a unit's first half, of its second, minimum to take off) from what `load_head` gave, fp32.

    mxfp4: half of 2**(e - 127), for values doubled, in two steps that neither overflow nor lose bits.
    """
    if KIND == Q4_K or KIND == Q5_K:
        first = a >> (unit % 4 * 8)
        m = ((first >> 6) & 3) | (((b >> (unit % 8 * 4)) & 15) << 2)
        s = half(d) * (first & 63).to(tl.float32)
        return s, s, half(d >> 16) * m.to(tl.float32)
    elif KIND == Q6_K:
        f = d.to(tl.float32)
        return f * a.to(tl.int8, bitcast=True).to(tl.float32), f * b.to(tl.int8, bitcast=True).to(tl.float32), 0.0
    elif KIND == MXFP4:
        e = d.to(tl.int32)
        s = tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (e - 1) << 23).to(tl.float32, bitcast=True)
        return s, s, 0.0
    else:
        f = d.to(tl.float32)
        return f, f, 0.0
