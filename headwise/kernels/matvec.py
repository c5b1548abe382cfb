"""Products of a few rows with a quantised matrix that stays as it is: y_TN = x_TK @ W_NK.T, 1 to 16 rows.

Up to eight rows are multiplied as integers (`_integers`): `quantise` turns x, once for all matrices that read it, into integers
of a scale per group of 32, in two planes of 8 bits (16 bits: finer than bf16 within a group) or one; four fields of W and four of
x meet in one instruction. A thread has a row of W, or a few, and walks along a share of the groups; for one or two rows of x it
asks for a step's weights before it multiplies the step before, and for the first before the launch ahead ends. More rows go to
the matrix unit (`_matrix`), 8 or 16 a tile. The keys of the sum, K, are shared out between the lanes of a program, and where N is
small between several programs; each leaves a partial sum and the last to finish adds them up, in the order of K.

Shapes    x_TK in bf16, f16 or fp32, rows `x_stride` apart; W in planes (`tiled.Planes`); out_TN, rows `out_stride` apart.
Accuracy  `_integers`: the integers exactly, their scaled sums in fp32; of x an error of 2**-16 (one plane: 2**-8) of the largest
          of its group. `_matrix` rounds the weights to x's type, as an expanded tile would be, and sums in fp32.
Cost      the bytes of W once. Measured by benchmarks/quant_matmul.py.
Source    the layouts of ggml-quants.c; products of integers as llama.cpp's vecdotq.cuh has them, with 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from headwise.kernels.split import card, is_last, room, store_sum
from headwise.kernels.stored import in_turn, overlap, start_next, wait_turn
from headwise.kernels.tiled import (
    LAYOUTS,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_K,
    Q6_K,
    Q8_0,
    Planes,
    four,
    four_words,
    half_float,
    load_head,
    load_high,
    load_low,
    load_scale,
    offset,
    pointers,
    scales,
)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative error of a result
INTEGER_TOLERANCE = {1: 1.2e-2, 2: 1e-4}  # beside it, by planes
MAX_ROWS = 16
INTEGER_ROWS = 8
RUNTIME = ["N", "groups", "T", "x_stride", "out_stride", "share", "splits"]  # numbers whose divisors change no program


class Config(NamedTuple):
    """One launch: `rows` rows of W a program, `each` a thread; `splits` programs share a row."""

    rows: int
    each: int
    warps: int
    splits: int = 1
    units: int = 8  # `_matrix`: groups a step
    stages: int = 3  # `_matrix`
    matrix: bool = False
    step: int = 0  # `_integers`: groups a thread reads of a row at once; 0: `step_groups`
    ahead: bool = True  # `_integers`: a step's weights are asked for before the step before is multiplied


class Integers(NamedTuple):
    """Activations as `quantise` leaves them: int32 (T, groups of 32, words)."""

    words: Tensor
    planes: int

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K) of the activations."""
        return self.words.shape[0], self.words.shape[1] * 32


def reference(x_TK: Tensor, dense_NK: Tensor) -> Tensor:
    """The product in fp64, of the dequantised values."""
    return x_TK.double() @ dense_NK.double().T


@triton.jit
def to_integers(x, to, ok, PLANES: tl.constexpr):
    """Groups of fp32, (G, 32), as integers and what goes with them, to where `to`, (G, 1), points; only where `ok`, (G, 1)."""
    G: tl.constexpr = x.shape[0]
    top: tl.constexpr = 32512 if PLANES == 2 else 127
    e = tl.arange(0, 32)
    largest = tl.max(tl.abs(x), 1)
    v = tl.floor(x * (top / tl.maximum(largest, 1e-30))[:, None] + 0.5).to(tl.int32)
    s = largest * (1.0 / top)
    high = (v + 128) >> 8 if PLANES == 2 else v
    for plane in tl.static_range(PLANES):
        b = (high if plane == 0 else v) & 255  # the lower plane is signed: its upper neighbour was rounded
        b = tl.sum(tl.reshape(b << (e // 4 % 4 * 8)[None, :], (G, 2, 4, 4)), 2)
        tl.store(to + plane * 8 + tl.arange(0, 8)[None, :], tl.reshape(b, (G, 8)), mask=ok)
    sums = tl.sum(tl.reshape(v, (G, 2, 16)), 2).to(tl.float32) * s[:, None]
    to += PLANES * 8
    first = tl.where(tl.arange(0, 2)[None, :] == 0, s[:, None], tl.sum(sums, 1)[:, None])
    tl.store(to + tl.arange(0, 2)[None, :], first.to(tl.int32, bitcast=True), mask=ok)
    tl.store(to + 2 + tl.arange(0, 2)[None, :], sums.to(tl.int32, bitcast=True), mask=ok)


@triton.jit
def _quantise(x_ptr, out, x_stride, groups, PLANES: tl.constexpr, G: tl.constexpr, PDL: tl.constexpr):
    in_turn(PDL)
    g = tl.program_id(0) * G + tl.arange(0, G)
    e = tl.arange(0, 32)
    ok = (g < groups)[:, None]
    x = tl.load(x_ptr + tl.program_id(1) * x_stride + g[:, None] * 32 + e[None, :], mask=ok, other=0.0).to(tl.float32)
    to_integers(x, out + (tl.program_id(1) * groups + g)[:, None] * (8 * PLANES + 4), ok, PLANES)


@triton.jit
def _dot(w, x, c, ASM: tl.constexpr):
    """c + the sum of four products of w's unsigned and x's signed bytes."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for b in tl.static_range(4):
            c += ((w >> 8 * b) & 255) * ((x << (24 - 8 * b)) >> 24)
        return c


@triton.jit
def _fields(w0, w1, h0, h1, KIND: tl.constexpr, ASM: tl.constexpr):
    """The eight words of four fields that a thread has of a group: those of the first half, then those of the second."""
    a, b = four_words(w0), four_words(w1)
    f = ()
    for i in tl.static_range(4):
        f += (four(a[i], h0, i, 0, KIND, ASM),)
    for i in tl.static_range(4):
        if KIND == Q4_K or KIND == Q4_0:
            f += (b[i] & -0x0F0F0F10,)  # where they are, 16 times too large
        else:
            f += (four(b[i], h1, i, 1, KIND, ASM),)
    return f


@triton.jit
def _four_dots(f, x, c, i: tl.constexpr, ASM: tl.constexpr):
    for k in tl.static_range(4):
        c = _dot(f[i + k], x[i + k], c, ASM)
    return c


@triton.jit
def _group(f, upper, lower, half: tl.constexpr, KIND: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr):
    """Sum over a group, or half 0 or 1 of one, of fields times x's integers, as fp32; 16 times too large where `_fields` is."""
    zero = f[0] & 0
    if half == 0 or half == 1:
        a = _four_dots(f, upper, zero, 4 * half, ASM)
        b = _four_dots(f, lower, zero, 4 * half, ASM) if PLANES == 2 else zero
    else:
        a = _four_dots(f, upper, zero, 0, ASM)
        b = _four_dots(f, lower, zero, 0, ASM) if PLANES == 2 else zero
        if KIND == Q4_K or KIND == Q4_0:
            a, b = a << 4, b << 4
        a = _four_dots(f, upper, a, 4, ASM)
        b = _four_dots(f, lower, b, 4, ASM) if PLANES == 2 else b
    return (a * 256 + b if PLANES == 2 else a).to(tl.float32)


@triton.jit
def _fetch(
    low, high, head, halves, first, groups, N, KIND: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a thread reads of W in a step, STEP groups from `first` on of EACH rows: all of it is asked for together."""
    p = tl.arange(0, LANES)
    r = p % 8
    w, h, heads = (), (), ()
    for e in tl.static_range(EACH):
        eight = tl.minimum((tl.program_id(0) * EACH + e) * (BN // 8) + p % BN // 8, (N - 1) // 8)
        at = eight.to(tl.int64) * groups + first
        for g in tl.static_range(STEP):
            w += (load_low(low, at + g, r, 0, KIND),)
            if KIND == Q8_0:
                w += (load_low(low, at + g, r, 1, KIND),)
            a, b = load_high(high, at + g, r, KIND)
            if KIND == Q5_K or KIND == Q5_0 or KIND == Q6_K:
                h += (a,)
            if KIND == Q6_K:
                h += (b,)
        if KIND == Q4_K or KIND == Q5_K:
            heads += four_words(tl.load(head + (at // BLOCK * 32 + r * 4)[:, None] + tl.arange(0, 4)[None, :]))
        elif KIND == Q6_K:
            word = head + at // BLOCK * 36 + r * 4 + (first % BLOCK).to(tl.int32) // 2
            for i in tl.static_range(STEP // 2):
                heads += (tl.load(word + i),)
            heads += (tl.load(halves + at // BLOCK * 72 + 64 + r),)
        else:
            for g in tl.static_range(STEP):
                heads += (load_head(head, halves, at + g, r, KIND)[0],)
    return w, h, heads


@triton.jit
def _byte(word, g):
    return ((word >> 8 * g) & 255).to(tl.float32)


@triton.jit
def _scales_of(heads, first, EACH: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row of `_fetch` and group: d, the minimum's, scale of the first half, of the second, minimum; EACH * STEP of them.

    q4_k, q5_k: scales and minima of four groups are taken apart together, as bytes of words.
    """
    out = ()
    for e in tl.static_range(EACH):
        if KIND == Q4_K or KIND == Q5_K:
            d, dmin = half_float(heads[4 * e]), half_float(heads[4 * e] >> 16)
            a, b, c = heads[4 * e + 1], heads[4 * e + 2], heads[4 * e + 3]
            if STEP < BLOCK:  # one of the two halves, moved so that this step's groups come first
                at = (first % BLOCK).to(tl.int32)
                a = tl.where(at >= 4, b, a) >> 8 * (at % 4)
                c = tl.where(at >= 4, c >> 4, c) >> 8 * (at % 4)
            for g in tl.static_range(STEP):
                word = b if g >= 4 else a
                upper = (c >> 2) if g >= 4 else (c << 2)
                minima = ((word >> 6) & 0x03030303) | (upper & 0x3C3C3C3C)
                scale = _byte(word & 0x3F3F3F3F, g % 4)
                out += ((d, dmin, scale, scale, _byte(minima, g % 4)),)
        elif KIND == Q6_K:
            d = heads[(STEP // 2 + 1) * e + STEP // 2].to(tl.float32)
            for g in tl.static_range(STEP):
                scale0, scale1, minimum = scales(heads[(STEP // 2 + 1) * e + g // 2], 0, g, KIND)
                out += ((d, 0.0, scale0, scale1, 0.0),)
        else:
            for g in tl.static_range(STEP):
                out += ((heads[STEP * e + g], 0.0, 1.0, 1.0, 0.0),)
    return out


@triton.jit
def _step(
    y, w, h, heads, first, ok, x_ptr, x_stride, KIND: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y, sums of EACH rows of W by ROWS of x, and the products of what `_fetch` gave, where `ok`."""
    WORDS: tl.constexpr = 8 * PLANES + 4
    TWO: tl.constexpr = 2 if KIND == Q8_0 else 1
    i4 = tl.arange(0, 4)[None, :]
    each = _scales_of(heads, first, EACH, KIND, STEP, BLOCK)
    sums, minima = (), ()
    for _ in tl.static_range(EACH * ROWS):
        sums += (tl.zeros(first.shape, tl.float32),)
        minima += (tl.zeros(first.shape, tl.float32),)
    for g in tl.static_range(STEP):
        upper, lower, floats = (), (), ()
        for t in tl.static_range(ROWS):
            x = x_ptr + ((t * (x_stride // 4)) + (first + g) * (WORDS // 4))[:, None] * 4 + i4
            upper += (four_words(tl.load(x)) + four_words(tl.load(x + 4)),)
            if PLANES == 2:
                lower += (four_words(tl.load(x + 8)) + four_words(tl.load(x + 12)),)
            else:
                lower += (0,)
            floats += (four_words(tl.load(x + 8 * PLANES).to(tl.float32, bitcast=True)),)
        sums1, minima1 = (), ()
        for e in tl.static_range(EACH):
            a, b = w[TWO * (e * STEP + g)], w[TWO * (e * STEP + g) + TWO - 1]
            if KIND == Q6_K:
                f = _fields(a, b, h[2 * (e * STEP + g)], h[2 * (e * STEP + g) + 1], KIND, ASM)
            elif KIND == Q5_K or KIND == Q5_0:
                f = _fields(a, b, h[e * STEP + g], h[e * STEP + g], KIND, ASM)
            else:
                f = _fields(a, b, 0, 0, KIND, ASM)
            d, dmin, scale0, scale1, minimum = each[e * STEP + g]
            for t in tl.static_range(ROWS):
                s, z, z0, z1 = floats[t]
                old = sums[e * ROWS + t]
                if KIND == Q6_K:
                    v = _group(f, upper[t], lower[t], 0, KIND, PLANES, ASM) * s - 32.0 * z0
                    u = _group(f, upper[t], lower[t], 1, KIND, PLANES, ASM) * s - 32.0 * z1
                    sums1 += (old + v * scale0 + u * scale1,)
                elif KIND == Q4_K or KIND == Q5_K:
                    v = _group(f, upper[t], lower[t], 2, KIND, PLANES, ASM)
                    sums1 += (old + v * ((s * 0.0625 if KIND == Q4_K else s) * scale0),)
                    minima1 += (minima[e * ROWS + t] + minimum * z,)
                else:
                    v = _group(f, upper[t], lower[t], 2, KIND, PLANES, ASM)
                    sums1 += (old + (v * (s * 0.0625 if KIND == Q4_0 else s) - offset(KIND) * z) * d,)
        sums, minima = sums1, minima1
    y1 = ()
    for e in tl.static_range(EACH):
        for t in tl.static_range(ROWS):
            v = sums[e * ROWS + t]
            if BLOCK > 1:
                v *= each[e * STEP][0]
            if KIND == Q4_K or KIND == Q5_K:
                v -= minima[e * ROWS + t] * each[e * STEP][1]
            y1 += (y[e * ROWS + t] + tl.where(ok, v, 0.0),)
    return y1


@triton.jit(do_not_specialize=RUNTIME)
def _integers(
    x_ptr, low, high, head, halves, out, part, done, N, groups, T, x_stride, out_stride, share, splits,
    KIND: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, PLANES: tl.constexpr, ASM: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    K_LANES: tl.constexpr = LANES // BN
    lane = tl.arange(0, LANES) // BN
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, groups // STEP)
    last = tl.maximum(end - 1, 0)
    if AHEAD:
        first = tl.minimum(begin + lane, last) * STEP
        w, h, heads = _fetch(low, high, head, halves, first, groups, N, KIND, BN, EACH, LANES, STEP, BLOCK)
    wait_turn(PDL)
    y = ()
    for _ in tl.static_range(EACH * ROWS):
        y += (tl.zeros((LANES,), tl.float32),)
    TURNS: tl.constexpr = 2 if AHEAD and ROWS == 1 else 1  # two: registers take turns, instead of moving
    for s0 in range(begin, end, TURNS * K_LANES):
        first = tl.minimum(s0 + lane, last) * STEP
        if AHEAD:
            second = tl.minimum(s0 + K_LANES + lane, last) * STEP
            w1, h1, heads1 = w, h, heads
            if s0 + K_LANES < end:
                w1, h1, heads1 = _fetch(low, high, head, halves, second, groups, N, KIND, BN, EACH, LANES, STEP, BLOCK)
        else:
            w, h, heads = _fetch(low, high, head, halves, first, groups, N, KIND, BN, EACH, LANES, STEP, BLOCK)
        y = _step(y, w, h, heads, first, s0 + lane < end, x_ptr, x_stride, KIND, ROWS, EACH, STEP, BLOCK, PLANES, ASM)
        if TURNS == 2:
            if s0 + K_LANES < end:
                ok = s0 + K_LANES + lane < end
                if s0 + 2 * K_LANES < end:
                    third = tl.minimum(s0 + 2 * K_LANES + lane, last) * STEP
                    w, h, heads = _fetch(low, high, head, halves, third, groups, N, KIND, BN, EACH, LANES, STEP, BLOCK)
                y = _step(y, w1, h1, heads1, second, ok, x_ptr, x_stride, KIND, ROWS, EACH, STEP, BLOCK, PLANES, ASM)
        elif AHEAD:
            w, h, heads = w1, h1, heads1
    for e in tl.static_range(EACH):
        n = (tl.program_id(0) * EACH + e) * BN + tl.arange(0, BN)
        for t in tl.static_range(ROWS):
            v = tl.sum(tl.reshape(y[e * ROWS + t], (K_LANES, BN)), 0)
            if splits == 1:
                tl.store(out + t * out_stride + n, v.to(out.dtype.element_ty), mask=n < N)
            else:
                tl.store(part + (tl.program_id(1) * T + t) * N + n, v, mask=n < N)
    if splits > 1:
        if is_last(done, splits):
            all_n = tl.program_id(0) * (BN * EACH) + tl.arange(0, BN * EACH)
            for row in range(T):
                total = tl.zeros((BN * EACH,), tl.float32)
                for k in range(splits):
                    total += tl.load(part + (k * T + row) * N + all_n, mask=all_n < N, other=0.0, cache_modifier=".cg")
                tl.store(out + row * out_stride + all_n, total.to(out.dtype.element_ty), mask=all_n < N)
            tl.store(done + tl.program_id(0), 0)


@triton.jit(do_not_specialize=RUNTIME)
def _matrix(
    x_ptr, low, high, head, halves, out, part, done, N, groups, T, x_stride, out_stride, share, splits,
    KIND: tl.constexpr, TP: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1)[:, None]
    r = row % 8
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, groups)
    t = tl.arange(0, TP)
    i = tl.arange(0, 4)[None, None, :]
    acc = tl.zeros((BN, TP), tl.float32)
    for u0 in tl.range(begin, end, U, num_stages=STAGES):
        group = u0 + tl.arange(0, U)[None, :]
        if MASKED:
            group = tl.minimum(group, groups - 1)
        at = (row // 8).to(tl.int64) * groups + group
        h0, h1 = load_high(high, at, r, KIND)
        d, dmin, word, c = load_scale(head, halves, at // BLOCK, r, group % BLOCK, KIND)
        scale0, scale1, minimum = scales(word, c, group % BLOCK, KIND)
        k = u0 * 4 + tl.arange(0, 4 * U)
        xk = x_ptr + t[None, :] * x_stride + (k // 4 * 32 + k % 4)[:, None]
        for half in tl.static_range(2):
            w = load_low(low, at, r, half, KIND)
            if KIND == Q5_K or KIND == Q5_0 or KIND == Q6_K:
                w = four(w, (h1 if half else h0)[:, :, None], i, half, KIND, ASM)
            else:
                w = four(w, 0, i, half, KIND, ASM)
            s = (d * (scale1 if half else scale0))[:, :, None]
            m = s * offset(KIND) + (dmin * minimum)[:, :, None] if KIND == Q4_K or KIND == Q5_K else s * offset(KIND)
            for b in tl.static_range(4):
                f = ((w >> 8 * b) & 255).to(tl.float32) * s - m
                ok = (t < T)[None, :] & (k // 4 < end)[:, None] if MASKED else (t < T)[None, :]
                x = tl.load(xk + (16 * half + 4 * b), mask=ok, other=0.0)
                acc = tl.dot(tl.reshape(f.to(dtype), (BN, 4 * U)), x, acc, input_precision="ieee")
    store_sum(acc, n, t, out, part, done, N, T, out_stride, splits)


def integer_words(T: int, K: int, planes: int) -> int:
    """int32 values that `quantise` writes for T rows of K."""
    return T * (K // 32) * (8 * planes + 4)


def step_groups(type_name: str, K: int, T: int) -> int:
    """Groups that a thread of `_integers` reads of a row at once."""
    wanted = 4 if T == 2 and LAYOUTS[type_name].low == 16 else 2
    return next(n for n in (wanted, 2, 1) if K // 32 % n == 0)


def config_for(type_name: str, T: int, N: int, K: int, processors: int) -> Config:
    """The launch of a shape, more programs a row of W where rows are few.

    One and two rows of x: as many programs as run at once, which share the work evenly. More: about four a multiprocessor, and
    registers for the sums instead of weights asked for ahead.
    """
    if T > 2:
        matrix = T > INTEGER_ROWS
        rows, each, warps, least = (32, 1, 2, 32) if matrix else (64, 2, 4, 4 * step_groups(type_name, K, T))
        splits = 1
        while -(-N // rows) * splits < 4 * processors and splits < 8 and K // 32 // (2 * splits) >= least:
            splits *= 2
        return Config(rows, each, warps, splits, matrix=matrix, ahead=False)
    four_each = T == 1 and LAYOUTS[type_name].low + LAYOUTS[type_name].high == 16  # more bytes a group need more registers
    rows, each, at_once = (128, 4, 3) if four_each else (64, 2, 4)
    turns = max(1, K // 32 // step_groups(type_name, K, T) // 4)  # of the loop, were there one program a row
    wanted = max(1, min(8, at_once * processors // -(-N // rows), turns // 2))
    return Config(rows, each, 4, -(-turns // -(-turns // wanted)))


def integers_in(words: Tensor, T: int, K: int, planes: int = 2) -> Integers:
    """The room for T rows of K in `words`, int32.

    Raises:
        ValueError: no whole groups of 32, or too little room.
    """
    if K % 32:
        raise ValueError(f"quantise: ({T}, {K}) activations, not in whole groups of 32")
    if planes not in (1, 2) or words.dtype != torch.int32 or words.numel() < integer_words(T, K, planes):
        raise ValueError(
            f"quantise: {planes} planes (1 or 2) in {words.numel()} {words.dtype}, not {integer_words(T, K, planes)} int32"
        )
    return Integers(words.flatten()[: integer_words(T, K, planes)].view(T, K // 32, -1), planes)


def quantise(x_TK: Tensor, words: Tensor, *, planes: int = 2) -> Integers:
    """Activations as the integers that `matvec` multiplies, written to `words`: int32, `integer_words` of them.

    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    T, K = x_TK.shape
    if x_TK.stride(1) != 1 or x_TK.dtype not in TOLERANCE:
        raise ValueError(f"quantise: {x_TK.dtype} activations ({T}, {K}) of strides {x_TK.stride()}, not floats, last stride 1")
    out = integers_in(words, T, K, planes)
    _quantise[(-(-(K // 32) // 32), T)](x_TK, out.words, x_TK.stride(0), K // 32, PLANES=planes, G=32, num_warps=4, **overlap(x_TK))
    return out


def matvec(
    x: Tensor | Integers, w: Planes, out_TN: Tensor, *, scratch: Tensor | None = None, done: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x @ W.T into `out_TN`.

    Args:
        x: (T, K); `Integers` for up to 8 rows, floats for the matrix unit.
        scratch: `split.partial_floats` fp32 values where `config.splits` > 1.
        done: int32 zeros, one for each `config.rows` rows of W where `config.splits` > 1; zeros again afterwards.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    integers = isinstance(x, Integers)
    T, K = x.shape
    N, t, most = w.rows, LAYOUTS[w.type], INTEGER_ROWS if integers else MAX_ROWS
    if not 1 <= T <= most:
        raise ValueError(f"matvec: {T} rows of activations not in 1 to {most}")
    if w.K != K or tuple(out_TN.shape) != (T, N):
        raise ValueError(f"matvec: ({T}, {K}) by a matrix of ({N}, {w.K}) into {tuple(out_TN.shape)}")
    if (not integers and x.stride(1) != 1) or out_TN.stride(1) != 1:
        raise ValueError(f"matvec: strides {x.stride()} and {out_TN.stride()}, the last of both must be 1")
    if not integers and x.dtype not in TOLERANCE:
        raise ValueError(f"matvec: activations of {x.dtype} not in {', '.join(map(str, TOLERANCE))}")
    if not all(p.is_contiguous() for p in (w.low, w.head)):
        raise ValueError(f"matvec: planes of strides {w.low.stride()} and {w.head.stride()} for {N} rows, not contiguous")
    c = config or config_for(w.type, T if integers else MAX_ROWS, N, K, card(out_TN.device).processors)
    if c.matrix == integers:
        raise ValueError(f"matvec: {type(x).__name__} with a launch {'of' if c.matrix else 'without'} the matrix unit")
    programs = -(-N // c.rows)
    data = x.words if isinstance(x, Integers) else x
    part, count = room("matvec", out_TN, c.splits, programs, scratch, done)
    groups, block, asm = K // 32, t.block // 32, not knobs.runtime.interpret
    step = c.units if c.matrix else c.step or step_groups(w.type, K, T)
    if not c.matrix and (groups % step or (block > 1 and block % step)):
        raise ValueError(f"matvec: steps of {step} groups do not divide {groups} groups in blocks of {block}")
    lanes = step if c.matrix else 32 * c.warps * c.each // c.rows
    share = -(-(groups if c.matrix else groups // step) // (c.splits * lanes)) * lanes
    arguments = (data, *pointers(w), out_TN, part, count, N, groups, T, data.stride(0), out_TN.stride(0), share, c.splits)
    if c.matrix:
        _matrix[(programs, c.splits)](
            *arguments, KIND=t.kind, TP=8 if T <= 8 else 16, BN=c.rows, U=step, BLOCK=block, MASKED=groups % step != 0,
            STAGES=c.stages, ASM=asm, num_warps=c.warps,
        )  # fmt: skip
    else:
        _integers[(programs, c.splits)](
            *arguments, KIND=t.kind, ROWS=T, BN=c.rows // c.each, EACH=c.each, LANES=32 * c.warps,
            STEP=step, BLOCK=block, PLANES=x.planes, ASM=asm, AHEAD=c.ahead, num_warps=c.warps, **overlap(out_TN),
        )  # fmt: skip
    return out_TN
