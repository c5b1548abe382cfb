"""Quantised weights re-tiled for our kernels: the same bytes as the file's blocks, taken apart into three planes.

A block of a file is 17 to 210 bytes, so its fields lie at odd addresses. Here every field has a plane of its own, and eight
rows of the matrix lie together: neighbouring threads read 16 bytes each of neighbouring rows, while a thread walks along its own
row and meets the scales of a block once. A group is 32 values of a row; a matrix is padded to whole eights of rows.

low     16 bytes a row and group. Byte b of word i has element 4b + i of the group in its low nibble, element 16 + 4b + i in its
        high one; mxfp4 has the first of them in nibble b, the other in nibble 4 + b. q8_0: 16 bytes for each half of a group,
        value + 128 of element 4b + i in byte b of word i.
high    what 5 and 6 bits have beside the nibble. 5 bits: a word a row and group; the bit of half h, word i, byte b is bit
        8b + 4h + i. 6 bits: two words, one a half; the bits of word i, byte b are bits 8b + 2i and the next.
head    scales, 8 rows of a block together. q4_k, q5_k: d, dmin (f16), eight bytes scale | (min & 3) << 6, four bytes of the
        minima's upper nibbles, of groups 0 to 3 the lower ones. q6_k: 16 signed bytes, and after those of 8 rows their d (f16).
        Others: the block's f16, or mxfp4's exponent.

So a half of a word's fields is four bytes under one mask: what an integer dot product of four takes. `weights.retile` writes
what is read here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Q4_K, Q5_K, Q6_K, Q8_0, Q5_0, Q4_0, MXFP4 = (tl.constexpr(i) for i in range(7))
EIGHT = 8  # rows that lie together


class Layout(NamedTuple):
    """Bytes of the planes. `low`, `high`: bytes of a group; `block`: values that share a head of `head` bytes."""

    kind: Any
    low: int
    high: int
    block: int
    head: int


LAYOUTS = {
    "q4_k": Layout(Q4_K, 16, 0, 256, 16),
    "q5_k": Layout(Q5_K, 16, 4, 256, 16),
    "q6_k": Layout(Q6_K, 16, 8, 256, 18),
    "q8_0": Layout(Q8_0, 32, 0, 32, 2),
    "q5_0": Layout(Q5_0, 16, 4, 32, 2),
    "q4_0": Layout(Q4_0, 16, 0, 32, 2),
    "mxfp4": Layout(MXFP4, 16, 0, 32, 1),
}


class Planes(NamedTuple):
    """One quantised matrix of `rows` by `K`, or a stack of them: uint8 planes (..., eights of rows, bytes of eight rows)."""

    type: str
    rows: int
    K: int
    low: Tensor
    high: Tensor | None
    head: Tensor

    def part(self, start: int, stop: int) -> Planes:
        """Rows `start` to `stop`, as a view; both multiples of 8, or `stop` the end."""
        a, b = start // EIGHT, -(-stop // EIGHT)
        high = None if self.high is None else self.high[..., a:b, :]
        return Planes(self.type, stop - start, self.K, self.low[..., a:b, :], high, self.head[..., a:b, :])

    def matrix(self, i: int | slice) -> Planes:
        """One matrix of a stack, or a stack of some, as a view."""
        if self.low.dim() < 3:
            raise IndexError(f"planes of {self.rows} by {self.K} are no stack")
        return Planes(self.type, self.rows, self.K, self.low[i], None if self.high is None else self.high[i], self.head[i])

    def tall(self) -> Planes:
        """The matrices of a stack under one another, as a view; of whole eights of rows, one after another in memory."""
        if self.low.dim() != 3 or self.rows % EIGHT or not self.low.is_contiguous() or not self.head.is_contiguous():
            raise ValueError(f"planes {tuple(self.low.shape)} of {self.rows} rows, strides {self.low.stride()}, are no whole stack")
        high = None if self.high is None else self.high.flatten(0, 1)
        return Planes(self.type, self.low.shape[0] * self.rows, self.K, self.low.flatten(0, 1), high, self.head.flatten(0, 1))


def plane_bytes(type_name: str, K: int) -> tuple[int, int, int]:
    """Bytes of a row of K values in each plane; they sum to the bytes of its blocks."""
    t = LAYOUTS[type_name]
    if K % t.block:
        raise ValueError(f"{type_name} packs {t.block} values a block; a row has {K}")
    return K // 32 * t.low, K // 32 * t.high, K // t.block * t.head


def pointers(w: Planes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The planes as the kernels take them: words, high words, heads as words or bytes, and as f16 where they have any."""
    t = LAYOUTS[w.type]
    high = w.low if w.high is None else w.high
    head = w.head if t.head == 1 else w.head.view(torch.int32)
    return w.low.view(torch.int32), high.view(torch.int32), head, w.head if t.head == 1 else w.head.view(torch.float16)


@triton.jit
def load_low(low, at, r, half: tl.constexpr, KIND: tl.constexpr):
    """Words of half `half` of groups `at` (eight of rows * groups + group) for row `r` of eight; (..., 4)."""
    if KIND == Q8_0:
        return tl.load(low + (tl.expand_dims(at * 64 + half * 32 + r * 4, -1) + tl.arange(0, 4)))
    else:
        return tl.load(low + (tl.expand_dims(at * 32 + r * 4, -1) + tl.arange(0, 4)))


@triton.jit
def load_high(high, at, r, KIND: tl.constexpr):
    """High words of both halves; the types without: 0."""
    if KIND == Q5_K or KIND == Q5_0:
        h = tl.load(high + at * 8 + r)
        return h, h
    elif KIND == Q6_K:
        return tl.split(tl.load(high + (tl.expand_dims(at * 16 + r * 2, -1) + tl.arange(0, 2))))
    else:
        return 0, 0


@triton.jit
def _permuted(a, b, selector):
    """Four bytes of a (0 to 3) and b (4 to 7), all < 128, by the low nibbles of `selector`; 0 where one is above 7."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _e2m1(nibbles, ASM: tl.constexpr):
    """mxfp4's values, doubled, plus 12, of the low four nibbles as four bytes."""
    if ASM:
        zero = nibbles & 0
        above = _permuted(zero + 0x0F0E0D0C, zero + 0x18141210, nibbles)
        below = _permuted(zero + 0x090A0B0C, zero + 0x00040608, nibbles ^ 0x8888)
        return above | below
    else:
        out = nibbles & 0
        for b in tl.static_range(4):
            c = (nibbles >> 4 * b) & 15
            m = c & 7
            m = tl.where(m < 4, m, tl.where(m == 4, 4, tl.where(m == 5, 6, tl.where(m == 6, 8, 12))))
            out |= (12 + tl.where(c > 7, -m, m)) << 8 * b
        return out


@triton.jit
def four(w, h, i, half: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Four fields of word i, unsigned bytes b: of element 16 * half + 4b + i the stored integer (+ 12 for mxfp4's, doubled)."""
    if KIND == Q8_0:
        return w
    elif KIND == MXFP4:
        return _e2m1(w >> 16 * half, ASM)
    else:
        q = (w >> 4 * half) & 0x0F0F0F0F
        if KIND == Q5_K or KIND == Q5_0:
            q |= ((h >> (4 * half + i)) & 0x01010101) << 4
        elif KIND == Q6_K:
            q |= ((h >> 2 * i) & 0x03030303) << 4
        return q


@triton.jit
def offset(KIND: tl.constexpr):
    """What `four` has above the value that is multiplied by the scale."""
    if KIND == Q8_0:
        return tl.constexpr(128.0)
    elif KIND == Q6_K:
        return tl.constexpr(32.0)
    elif KIND == Q5_0:
        return tl.constexpr(16.0)
    elif KIND == MXFP4:
        return tl.constexpr(12.0)
    elif KIND == Q4_0:
        return tl.constexpr(8.0)
    else:
        return tl.constexpr(0.0)


@triton.jit
def four_words(x):
    """(n, 4) as four tensors (n)."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def half_float(bits):
    """The f16 in the low half of an int32, as fp32."""
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_head(head, halves, at, r, KIND: tl.constexpr):
    """The head of blocks `at` (eight of rows * blocks + block) for row `r` of eight: scale d, minimum's, words of scales.

    mxfp4: half of 2**(e - 127), for values doubled, in two steps that neither overflow nor lose bits.
    """
    if KIND == Q4_K or KIND == Q5_K:
        dd, a, b, c = four_words(tl.load(head + (at * 32 + r * 4)[:, None] + tl.arange(0, 4)[None, :]))
        return half_float(dd), half_float(dd >> 16), a, b, c, c
    elif KIND == Q6_K:
        a, b, c, e = four_words(tl.load(head + (at * 36 + r * 4)[:, None] + tl.arange(0, 4)[None, :]))
        return tl.load(halves + at * 72 + 64 + r).to(tl.float32), 0.0, a, b, c, e
    elif KIND == MXFP4:
        e = tl.load(head + at * 8 + r).to(tl.int32)
        return tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (e - 1) << 23).to(tl.float32, bitcast=True), 0.0, 0, 0, 0, 0
    else:
        return tl.load(halves + at * 8 + r).to(tl.float32), 0.0, 0, 0, 0, 0


@triton.jit
def load_scale(head, halves, at, r, g, KIND: tl.constexpr):
    """Of the same head what group g of the block, a tensor, needs: d, the minimum's, its word of scales, the minima's nibbles."""
    if KIND == Q4_K or KIND == Q5_K:
        word = head + at * 32 + r * 4
        dd = tl.load(word)
        return half_float(dd), half_float(dd >> 16), tl.load(word + 1 + g // 4), tl.load(word + 3)
    elif KIND == Q6_K:
        return tl.load(halves + at * 72 + 64 + r).to(tl.float32), 0.0, tl.load(head + at * 36 + r * 4 + g // 2), 0
    else:
        d, dmin, a, _, c, _ = load_head(head, halves, at, r, KIND)
        return d, dmin, a, c


@triton.jit
def scales(word, c, g, KIND: tl.constexpr):
    """(scale of the first half of group g of its block, of its second, minimum), to be multiplied by the head's d and dmin."""
    if KIND == Q4_K or KIND == Q5_K:
        s = ((word >> 8 * (g % 4)) & 63).to(tl.float32)
        m = ((word >> (8 * (g % 4) + 6)) & 3) | (((c >> (8 * (g % 4) + 4 * (g // 4))) & 15) << 2)
        return s, s, m.to(tl.float32)
    elif KIND == Q6_K:
        return ((word << (24 - 16 * (g % 2))) >> 24).to(tl.float32), ((word << (16 - 16 * (g % 2))) >> 24).to(tl.float32), 0.0
    else:
        return 1.0, 1.0, 0.0
