"""Products of a few to 64 rows with a quantised matrix on the tensor cores: y_TN = x_TK @ W_NK.T, W in planes.

    y^T += W x^T          (rows of W, 32 values of K) by (32 values of K, rows of x)

Rows of W are the rows of the product. A sum over K does not mind its order, so a thread takes a group of 32 of its row whole:
what it reads of the planes is one operand of `mma.sync`, and its scale is worked out once. x is stored before in the order in which
the other operand is read (`kernels.arrange`). Both cross shared memory as they are stored, copied a step ahead. K is shared out
between programs where rows are few; each leaves a partial sum and the last to finish adds them up, in the order of K.

Of a stack of experts a program takes a tile of 8, 16 or 32 pairs (token, choice) of one expert, which it finds by `router.Order`.

Shapes    x in bf16 or f16, to 64 rows; W in planes (`tiled.Planes`), a matrix or a stack; out_TN in the type of x.
Accuracy  Weights become x's type: scale and minimum rounded, then one multiply-add; sums in fp32.
Cost      the bytes of W once; 2.4 instructions a weight of q4_k where rows are few, half of them on integers. Measured by
          benchmarks/skinny.py.
Source    the layouts of ggml-quants.c; Marlin (Frantar 2024) for copies ahead and weights that become floats in registers.
"""

from __future__ import annotations

from functools import cache as remember
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headwise.kernels.arrange import STEP, Arranged, ArrangedPairs
from headwise.kernels.newer import thread_barrier
from headwise.kernels.split import Card, card, room, splits_for
from headwise.kernels.stored import overlap
from headwise.kernels.tiled import EIGHT, LAYOUTS, MXFP4, Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0, Planes
from headwise.planner.workspace import SKINNY_ROWS, padded

PLAIN = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))


class Config(NamedTuple):
    """One launch: `rows` rows of W a program; `splits` programs share a row."""

    rows: int = 128
    warps: int = 4
    stages: int = 2
    splits: int = 1
    registers: int = 128  # most a thread


# By the pairs of a tile: fastest on an H200, benchmarks/experts.py OUT.json arranged.
OF_EXPERTS = {8: Config(64, 2, registers=168), 16: Config(128, 4, registers=128), 32: Config(128, 4, registers=168)}


@gluon.constexpr_function
def _field_words(KIND):
    """Words of `low`, `high` and `head` that eight rows have of a step."""
    low = 512 if KIND == Q8_0 else 256
    high = 64 if KIND in (Q5_K, Q5_0) else 128 if KIND == Q6_K else 0
    return low, high, 16 if KIND == MXFP4 else 32


@gluon.constexpr_function
def _copy_layout(words, warps):
    """A copy of `words` words for each of eight rows: 16 bytes a thread, or what there is."""
    each = 2 if words == 16 else 4
    across = min(32, words // each)
    return gl.BlockedLayout([1, each], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def _bases(rows, warps):
    """Steps in eights of rows: of the second and further registers, and of warps. A warp's 16 rows are two eights."""
    eights, log = rows // 8, warps.bit_length() - 1
    w = [2 << i for i in range(log)]
    return [1, *(1 << i for i in range(1 + log, eights.bit_length() - 1))], w


@gluon.constexpr_function
def _group_layout(rows, warps, inner, step):
    """(eights, words) of four groups, of which a thread reads `inner` words of its row; rows of eight are `inner` words apart."""
    more, warp = _bases(rows, warps)
    bits = inner.bit_length() - 1
    return gl.DistributedLinearLayout(
        [*([0, 1 << b] for b in range(bits)), *([m, 0] for m in more)],
        [[0, step], [0, 2 * step], [0, inner], [0, 2 * inner], [0, 4 * inner]],
        [[w, 0] for w in warp], [], [rows // 8, 4 * step],
    )  # fmt: skip


@gluon.constexpr_function
def _row_layout(rows, warps, words):
    """(eights, 8 * words): the words of a row, read by all four of its threads."""
    more, warp = _bases(rows, warps)
    bits = words.bit_length() - 1
    return gl.DistributedLinearLayout(
        [*([0, 1 << b] for b in range(bits)), *([m, 0] for m in more)],
        [[0, 0], [0, 0], [0, words], [0, 2 * words], [0, 4 * words]],
        [[w, 0] for w in warp], [], [rows // 8, 8 * words],
    )  # fmt: skip


@gluon.constexpr_function
def _own_layout(rows, warps):
    """(rows, 4 groups), a group a thread."""
    more, warp = _bases(rows, warps)
    return gl.DistributedLinearLayout(
        [[8 * m, 0] for m in more], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[8 * w, 0] for w in warp], [], [rows, 4]
    )


@gluon.constexpr_function
def _x_layout(TP, warps):
    """(1, TP * 32): a thread reads the eight values of its column and group."""
    tiles = [[0, 256 << b] for b in range((TP // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *tiles], [[0, 8], [0, 16], [0, 32], [0, 64], [0, 128]],
        [[0, 0]] * (warps.bit_length() - 1), [], [1, TP * 32],
    )  # fmt: skip


@gluon.constexpr_function
def _taken(KIND):
    """What a stored integer has above the value that is multiplied by the scale."""
    return next((n for kind, n in ((Q6_K, 32), (Q5_0, 16), (Q4_0, 8), (MXFP4, 12), (Q8_0, 128)) if kind == KIND), 0)


@gluon.constexpr_function
def _nibbles(KIND, BF16):
    """Whether words of nibbles become floats as they lie, without bytes in between."""
    return BF16 and KIND in (Q4_K, Q4_0)


@gluon.constexpr_function
def _to_floats(KIND, BF16, HALF):
    """Four stored integers of $4 as two pairs of floats: times $5, plus $6.

    bf16: an integer u < 256 in the low bits is the float u * 2**-133, exactly; $5 is the scale times 2**133.
    f16: u in the low byte of 0x6400 is 1024 + u; taking 1024 and the type's offset away leaves it exact.
    """
    if _nibbles(KIND, BF16):
        mask = "0x00f000f0" if HALF else "0x000f000f"
        begin = f"shr.u32 y, $4, 8; and.b32 x, $4, {mask}; and.b32 y, y, {mask};"
    elif BF16:
        begin = "prmt.b32 x, $4, 0, 0x4240; prmt.b32 y, $4, 0, 0x4341;"
    else:
        less = {0: "0xe400e400", 32: "0xe420e420", 16: "0xe410e410", 8: "0xe408e408", 12: "0xe40ce40c", 128: "0xe480e480"}
        begin = f"""mov.b32 p, 0x3c003c00; mov.b32 c, {less[_taken(KIND)]};
            prmt.b32 x, $4, 0x64646464, 0x4240; prmt.b32 y, $4, 0x64646464, 0x4341;
            fma.rn.f16x2 x, x, p, c; fma.rn.f16x2 y, y, p, c;"""
    pair = "bf16x2" if BF16 else "f16x2"
    return f"""{{
            .reg .b32 x, y, p, c;
            {begin}
            fma.rn.{pair} x, x, $5, $6;
            fma.rn.{pair} y, y, $5, $6;
            mov.b32 {{$0, $1}}, x;
            mov.b32 {{$2, $3}}, y;
        }}"""


@gluon.constexpr_function
def _scaled_asm(KIND, BF16):
    """$2 twice; and minus the offset times it."""
    if not BF16:
        return "cvt.rn.f16x2.f32 $0, $2, $2; mov.b32 $1, 0;"
    less = f"0x8{_taken(KIND):03x}"
    return f"""{{
            .reg .b32 s, c, z;
            cvt.rn.bf16x2.f32 s, $2, $2;
            mov.b32 c, {less}{less[2:]};
            mov.b32 z, 0x80008000;
            fma.rn.bf16x2 $1, s, c, z;
            mov.b32 $0, s;
        }}"""


@gluon.jit
def _scaled(x, KIND: gl.constexpr, BF16: gl.constexpr):
    """An fp32 scale as two equal halves of a word, and what goes with each product for the type's offset."""
    return gl.inline_asm_elementwise(_scaled_asm(KIND, BF16), "=&r,=r,r", [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def _twice(x, BF16: gl.constexpr):
    """An fp32 as two equal halves of a word."""
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, $1;" if BF16 else "cvt.rn.f16x2.f32 $0, $1, $1;"
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _sixteenth(s, KIND: gl.constexpr, BF16: gl.constexpr):
    """The scale of a second half: its nibbles stay where they are, 16 times too large."""
    if _nibbles(KIND, BF16):
        asm: gl.constexpr = """{
            .reg .b32 c, z;
            mov.b32 c, 0x3d803d80;
            mov.b32 z, 0x80008000;
            fma.rn.bf16x2 $0, $1, c, z;
        }"""
        return gl.inline_asm_elementwise(asm, "=r,r", [s], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return s


@gluon.jit
def _half(x):
    """The f16 in the low half of a word, as fp32."""
    return (x & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _four(x):
    """(..., 2, 2) as four tensors."""
    even, odd = gl.split(x)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return a, b, c, d


@gluon.jit
def _wide(x, own: gl.constexpr):
    """(rows) as (rows, 1)."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, own), assert_trivial=True), 1)


@gluon.jit
def _scales(heads, more, QUAD: gl.constexpr, KIND: gl.constexpr, BF16: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Of each row and group of a quad, (rows, 4), twice each: scale and addend of the first half, of the second."""
    own: gl.constexpr = _own_layout(ROWS, WARPS)
    UP: gl.constexpr = 2.0**93 if BF16 else 1.0  # 2**133, and 2**-40 of room: sums are multiplied by 2**40 at the end
    DOWN: gl.constexpr = -(2.0**-40) if BF16 else -1.0
    c = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, own)), 0)
    if KIND == Q4_K or KIND == Q5_K:
        dd, a, b, m = _four(heads.load(_row_layout(ROWS, WARPS, 4)).reshape([ROWS, 2, 2]))
        word = _wide(b if QUAD else a, own) >> 8 * c
        low = _wide(m >> 4 if QUAD else m, own) >> 8 * c
        minimum = ((word >> 6) & 3) | ((low & 15) << 2)
        s, _ = _scaled(_wide(_half(dd) * UP, own) * (word & 63).to(gl.float32), KIND, BF16)
        m = _twice(_wide(_half(dd >> 16) * DOWN, own) * minimum.to(gl.float32), BF16)
        return s, m, _sixteenth(s, KIND, BF16), m
    elif KIND == Q6_K:
        w = _four(heads.load(_row_layout(ROWS, WARPS, 4)).reshape([ROWS, 2, 2]))
        halves = more._reinterpret(gl.float16, [ROWS // 8, 8], PLAIN)
        d = _wide(halves.load(_row_layout(ROWS, WARPS, 1)).reshape([ROWS]).to(gl.float32) * UP, own)
        word = gl.where(c < 2, _wide(w[2 * QUAD], own), _wide(w[2 * QUAD + 1], own)) >> 16 * (c % 2)
        s0, m0 = _scaled(d * ((word << 24) >> 24).to(gl.float32), KIND, BF16)
        s1, m1 = _scaled(d * ((word << 16) >> 24).to(gl.float32), KIND, BF16)
        return s0, m0, s1, m1
    else:
        kind: gl.constexpr = gl.int8 if KIND == MXFP4 else gl.float16
        x = _own(heads._reinterpret(kind, [ROWS // 8, 64], PLAIN).slice(QUAD * 32, 32, dim=1), 1, 8, ROWS, WARPS)
        if KIND == MXFP4:  # half of 2**(e - 127), for values doubled
            e = x.to(gl.int32) & 255
            d = gl.where(e < 2, 0x00200000 << gl.minimum(e, 1), (e - 1) << 23).to(gl.float32, bitcast=True)
        else:
            d = x.to(gl.float32)
        s, m = _scaled(d * UP, KIND, BF16)
        return s, m, _sixteenth(s, KIND, BF16), m


@gluon.jit
def _own(words, INNER: gl.constexpr, APART: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """What each thread reads of its row and group, groups `APART` words apart: (rows, 4, INNER); INNER 1: (rows, 4)."""
    E: gl.constexpr = ROWS // 8
    own: gl.constexpr = _own_layout(ROWS, WARPS)
    x = words.load(_group_layout(ROWS, WARPS, INNER, APART))
    if INNER == 1:
        x = x.reshape([E, 4, 8]).permute((0, 2, 1)).reshape([ROWS, 4])
        return gl.convert_layout(x, own, assert_trivial=True)
    else:
        return x.reshape([E, 4, 8, INNER]).permute((0, 2, 1, 3)).reshape([ROWS, 4, INNER])


@gluon.jit
def _parts(x, own: gl.constexpr):
    """(rows, 4, 4) as four tensors (rows, 4)."""
    a, b, c, d = _four(x.reshape([x.shape[0], 4, 2, 2]))
    return (
        gl.convert_layout(a, own, assert_trivial=True), gl.convert_layout(b, own, assert_trivial=True),
        gl.convert_layout(c, own, assert_trivial=True), gl.convert_layout(d, own, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def _e2m1(nibbles):
    """mxfp4's values, doubled, plus 12, of the low four nibbles as four bytes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        prmt.b32 a, 0x0f0e0d0c, 0x18141210, $1;
        xor.b32 b, $1, 0x8888;
        prmt.b32 b, 0x090a0b0c, 0x00040608, b;
        or.b32 $0, a, b;
        }""",
        "=r,r", [nibbles], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _fields(w, h, I: gl.constexpr, HALF: gl.constexpr, KIND: gl.constexpr, BF16: gl.constexpr):
    """Four fields of word I, a byte each: of elements 16 * HALF + 4 * byte + I; or the word itself, for `_to_floats`."""
    if KIND == Q8_0 or _nibbles(KIND, BF16):
        return w
    elif KIND == MXFP4:
        return _e2m1(w >> 16 * HALF)
    else:
        q = (w >> 4 * HALF) & 0x0F0F0F0F
        if KIND == Q5_K or KIND == Q5_0:
            q |= ((h >> (4 * HALF + I)) & 0x01010101) << 4
        elif KIND == Q6_K:
            q |= ((h >> 2 * I) & 0x03030303) << 4
        return q


@gluon.jit
def _pairs(f, s, m, KIND: gl.constexpr, BF16: gl.constexpr, HALF: gl.constexpr):
    """Four fields of a group as floats, (rows, 4 groups, e, h)."""
    a, b, c, d = gl.inline_asm_elementwise(
        _to_floats(KIND, BF16, HALF), "=h,=h,=h,=h,r,r,r", [f, s, m], dtype=(gl.int16, gl.int16, gl.int16, gl.int16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(gl.join(a, b), gl.join(c, d)).to(gl.bfloat16 if BF16 else gl.float16, bitcast=True)


@gluon.jit
def _copy_planes(
    low, high, head, s, groups, eights, at_low, at_high, at_head, at_more, KIND: gl.constexpr, ROWS: gl.constexpr,
    WARPS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Step `s` of the planes' rows, asked for."""
    E: gl.constexpr = ROWS // 8
    LOW: gl.constexpr = _field_words(KIND)[0]
    HIGH: gl.constexpr = _field_words(KIND)[1]
    HEAD: gl.constexpr = _field_words(KIND)[2]
    _plane(low, at_low, s, groups, eights, LOW, LOW, 0, E, WARPS, MASKED)
    if HIGH > 0:
        _plane(high, at_high, s, groups, eights, HIGH, HIGH, 0, E, WARPS, MASKED)
    if KIND == Q6_K:  # 16 bytes of scales for each of eight rows, and then their d
        _plane(head, at_head, s, groups, eights, HEAD, HEAD + 4, 0, E, WARPS, MASKED)
        _plane(head, at_more, s, groups, eights, 4, HEAD + 4, HEAD, E, WARPS, MASKED)
    else:
        _plane(head, at_head, s, groups, eights, HEAD, HEAD, 0, E, WARPS, MASKED)


@gluon.jit
def _copy_x(x_ptr, s, to, TP: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(1, layout)), 1)
    col = gl.expand_dims(gl.arange(0, TP * 32, gl.SliceLayout(0, layout)), 0)
    async_copy.async_copy_global_to_shared(to, x_ptr + s * (8 * TP * 32) + row * (TP * 32) + col)


@gluon.jit
def _plane(
    plane, to, s, groups, eights, WORDS: gl.constexpr, A_STEP: gl.constexpr, FIRST: gl.constexpr, E: gl.constexpr,
    WARPS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """WORDS words from FIRST on of the A_STEP that eight rows have of a step; groups past the last become zeros."""
    layout: gl.constexpr = _copy_layout(WORDS, WARPS)
    e = gl.minimum(gl.program_id(0) * E + gl.arange(0, E, gl.SliceLayout(1, layout)), eights - 1)
    col = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, layout)), 0)
    if A_STEP % 8 == 0:
        row = (e.to(gl.int64) * groups + s * 8) * (A_STEP // 8)
    else:
        row = (e.to(gl.int64) * (groups // 8) + s) * A_STEP + FIRST
    at = plane + (gl.expand_dims(row, 1) + col)
    if MASKED:
        async_copy.async_copy_global_to_shared(to, at, mask=s * 8 + col // (A_STEP // 8) < groups)
    else:
        async_copy.async_copy_global_to_shared(to, at)


@gluon.jit(do_not_specialize=["N", "groups", "T", "out_stride", "share", "splits", "n_experts"])
def _skinny(
    x_ptr, low, high, head, out, part, done, pairs, starts, first, experts, N, groups, T, out_stride, share, splits, n_experts,
    EXPERTS: gl.constexpr, BY_PAIR: gl.constexpr, KIND: gl.constexpr, TP: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr, BF16: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = ROWS // 8
    dtype: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    own: gl.constexpr = _own_layout(ROWS, WARPS)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 2)
    LOW: gl.constexpr = _field_words(KIND)[0]
    HIGH: gl.constexpr = _field_words(KIND)[1]
    HEAD: gl.constexpr = _field_words(KIND)[2]
    if PDL:
        gdc_launch_dependents()
    lows = gl.allocate_shared_memory(gl.int32, [STAGES, E, LOW], PLAIN)
    heads = gl.allocate_shared_memory(gl.int32, [STAGES, E, HEAD], PLAIN)
    highs = gl.allocate_shared_memory(gl.int32, [STAGES, E, HIGH], PLAIN) if HIGH > 0 else heads
    mores = gl.allocate_shared_memory(gl.int32, [STAGES, E, 4], PLAIN) if KIND == Q6_K else heads
    xs = gl.allocate_shared_memory(dtype, [STAGES, 8, TP * 32], gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))

    eights = (N + 7) // 8
    split = 0 if EXPERTS else gl.program_id(1)
    begin = split * share
    end = gl.minimum(begin + share, (groups + 7) // 8)
    row = 0
    if EXPERTS:  # a tile of pairs of one expert; which, the router may just have said
        if PDL:
            gdc_wait()
        tile = gl.program_id(1)
        live = tile < gl.load(first + n_experts)
        expert = gl.load(experts + gl.where(live, tile, 0))
        row = gl.load(starts + expert) + (tile - gl.load(first + expert)) * TP
        T = gl.where(live, gl.minimum(gl.load(starts + expert + 1) - row, TP), 0)
        end = gl.where(live, end, begin)
        of = expert.to(gl.int64) * eights * groups
        low += of * (LOW // 8)
        high += of * (HIGH // 8)
        head += of * (HEAD + 4) // 8 if KIND == Q6_K else of * HEAD // 8
        x_ptr += tile * ((groups + 7) // 8 * (8 * TP * 32))
    for i in gl.static_range(STAGES - 1):
        if begin + i < end:
            _copy_planes(low, high, head, begin + i, groups, eights, lows.index(i), highs.index(i), heads.index(i),
                         mores.index(i), KIND, ROWS, WARPS, MASKED)  # fmt: skip
    if PDL and not EXPERTS:  # nobody writes weights; x may just have been
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        if begin + i < end:
            _copy_x(x_ptr, begin + i, xs.index(i), TP, WARPS)
        async_copy.commit_group()
    acc = gl.zeros([ROWS, TP], gl.float32, acc_layout)
    for s in range(begin, end):
        at = (s - begin) % STAGES
        async_copy.wait_group(STAGES - 2)
        thread_barrier()
        to = (s - begin + STAGES - 1) % STAGES
        if s + STAGES - 1 < end:
            _copy_planes(low, high, head, s + STAGES - 1, groups, eights, lows.index(to), highs.index(to), heads.index(to),
                         mores.index(to), KIND, ROWS, WARPS, MASKED)  # fmt: skip
            _copy_x(x_ptr, s + STAGES - 1, xs.index(to), TP, WARPS)
        async_copy.commit_group()
        x = xs.index(at)
        for quad in gl.static_range(2):
            s0, m0, s1, m1 = _scales(heads.index(at), mores.index(at), quad, KIND, BF16, ROWS, WARPS)
            if KIND == Q8_0:
                both = lows.index(at).slice(quad * 256, 256, dim=1)
                w0 = _parts(_halves(both, 0, ROWS, WARPS), own)
                w1 = _parts(_halves(both, 1, ROWS, WARPS), own)
            else:
                w0 = _parts(_own(lows.index(at).slice(quad * 128, 128, dim=1), 4, 32, ROWS, WARPS), own)
                w1 = w0
            if KIND == Q6_K:
                h0, h1 = gl.split(_own(highs.index(at).slice(quad * 64, 64, dim=1), 2, 16, ROWS, WARPS))
                h0 = gl.convert_layout(h0, own, assert_trivial=True)
                h1 = gl.convert_layout(h1, own, assert_trivial=True)
            elif HIGH > 0:
                h0 = _own(highs.index(at).slice(quad * 32, 32, dim=1), 1, 8, ROWS, WARPS)
                h1 = h0
            else:
                h0, h1 = w0[0], w0[0]
            for i in gl.static_range(4):
                lo = _pairs(_fields(w0[i], h0, i, 0, KIND, BF16), s0, m0, KIND, BF16, 0)
                hi = _pairs(_fields(w1[i], h1, i, 1, KIND, BF16), s1, m1, KIND, BF16, 1)
                a = gl.join(lo, hi).permute((0, 4, 3, 1, 2)).reshape([ROWS, 32])
                xi = x.slice(quad * 4 + i, 1, dim=0).load(_x_layout(TP, WARPS))
                b = xi.reshape([TP, 4, 2, 2, 2]).permute((2, 3, 1, 4, 0)).reshape([32, TP])
                a = gl.convert_layout(a, a_layout, assert_trivial=True)
                b = gl.convert_layout(b, b_layout, assert_trivial=True)
                acc = mma_v2(a, b, acc)
    async_copy.wait_group(0)
    thread_barrier()

    ol: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [1, WARPS], [0, 1])
    y = gl.convert_layout(acc, ol) * (2.0**40 if BF16 else 1.0)
    n = gl.program_id(0) * ROWS + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, ol)), 1)
    t = gl.expand_dims(gl.arange(0, TP, gl.SliceLayout(0, ol)), 0)
    ok = (n < N) & (t < T)
    if EXPERTS:
        t = gl.load(pairs + row + t, mask=t < T, other=0) if BY_PAIR else row + t
    where = t * out_stride + n
    if splits == 1 or EXPERTS:
        gl.store(out + where, y.to(dtype), mask=ok)
    else:
        mine = t * N + n
        gl.store(part + split * T * N + mine, y, mask=ok)
        thread_barrier()
        if gl.atomic_add(done + gl.program_id(0), 1, sem="acq_rel") == splits - 1:
            y = gl.zeros([ROWS, TP], gl.float32, ol)
            for k in range(splits):
                y += gl.load(part + k * T * N + mine, mask=ok, other=0.0, cache_modifier=".cg")
            gl.store(out + where, y.to(dtype), mask=ok)
            gl.store(done + gl.program_id(0), 0)


@gluon.jit
def _halves(words, HALF: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """q8_0: of (eights, 4 groups of two halves of 8 rows of 4 words), one half as `_own` gives it."""
    E: gl.constexpr = ROWS // 8
    layout: gl.constexpr = _half_layout(ROWS, WARPS)
    x = words.load(layout).reshape([E, 4, 2, 8, 4]).permute((0, 3, 1, 4, 2))
    a, b = gl.split(x)
    return (b if HALF else a).reshape([ROWS, 4, 4])


@gluon.constexpr_function
def _half_layout(rows, warps):
    more, warp = _bases(rows, warps)
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 32], *([m, 0] for m in more)], [[0, 64], [0, 128], [0, 4], [0, 8], [0, 16]],
        [[w, 0] for w in warp], [], [rows // 8, 256],
    )  # fmt: skip


def most_rows(card: Card) -> int:
    """Rows of x a launch can have: tiles of 64 are too large for the shared memory of consumer cards."""
    return SKINNY_ROWS if card.most > 128 << 10 else SKINNY_ROWS // 2


def shared_bytes(type_name: str, TP: int, config: Config) -> int:
    """Shared memory of a program."""
    low, high, head = _field_words(LAYOUTS[type_name].kind)
    words = low + high + head + (4 if type_name == "q6_k" else 0)
    return config.stages * (config.rows // 8 * words * 4 + 8 * TP * 32 * 2)


def _fitting(c: Config, type_name: str, TP: int, card: Card) -> Config:
    """With half the rows while a program's copies are more than the card's shared memory."""
    while c.rows > 32 and shared_bytes(type_name, TP, c) > card.most:
        c = c._replace(rows=c.rows // 2, warps=c.rows // 32)
    return c


@remember
def config_of_experts(type_name: str, tile: int, card: Card) -> Config:
    """The launch for tiles of so many pairs."""
    return _fitting(OF_EXPERTS[tile], type_name, tile, card)


@remember
def config_for(type_name: str, T: int, N: int, K: int, card: Card) -> Config:
    """The launch of a shape: so many programs a row that the last wave of them is nearly full."""
    TP = padded(T)
    c = Config(128, 4 if TP < 64 else 8, registers=128 if TP < 32 else 168 if TP < 64 else 255)
    c = _fitting(c, type_name, TP, card)
    at_once = card.processors * min(65536 // (c.registers * 32 * c.warps), card.shared // (shared_bytes(type_name, TP, c) + 1024))
    return c._replace(splits=splits_for(-(-K // (32 * STEP)), -(-N // c.rows), at_once))


def skinny(
    x: Arranged, w: Planes, out_TN: Tensor, *, scratch: Tensor | None = None, done: Tensor | None = None, config: Config
) -> Tensor:
    """x @ W.T into `out_TN`.

    Args:
        scratch: T * N * splits fp32 values where `config.splits` > 1.
        done: int32 zeros, one for each `config.rows` rows of W where `config.splits` > 1; zeros again afterwards.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    (T, K), N, c = x.shape, w.rows, config
    if w.K != K or tuple(out_TN.shape) != (T, N) or out_TN.stride(1) != 1:
        raise ValueError(f"skinny: ({T}, {K}) by a matrix of ({N}, {w.K}) into {tuple(out_TN.shape)} of strides {out_TN.stride()}")
    if out_TN.dtype != x.values.dtype:
        raise ValueError(f"skinny: activations of {x.values.dtype} into {out_TN.dtype}, not alike")
    planes = _words(w, c)
    programs, groups = -(-N // c.rows), K // 32
    part, count = room("skinny", out_TN, c.splits, programs, scratch, done)
    _skinny[(programs, c.splits)](
        x.values, *planes, out_TN, part, count, *[count] * 4, N, groups, T, out_TN.stride(0), -(-groups // (STEP * c.splits)),
        c.splits, 0, EXPERTS=False, BY_PAIR=False, KIND=LAYOUTS[w.type].kind, TP=padded(T), ROWS=c.rows, WARPS=c.warps,
        STAGES=c.stages, MASKED=groups % STEP != 0, BF16=x.values.dtype == torch.bfloat16, num_warps=c.warps,
        maxnreg=c.registers, **overlap(out_TN),
    )  # fmt: skip
    return out_TN


def skinny_experts(x: ArrangedPairs, w: Planes, out_PN: Tensor, *, by_pair: bool, config: Config | None = None) -> Tensor:
    """Each pair's product with its expert of a stack, into rows in the order of `x.order`, or with `by_pair` of the pairs.

    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    (P, K), N, order = x.shape, w.rows, x.order
    c = config or config_of_experts(w.type, order.tile_rows, card(out_PN.device))
    if w.low.dim() != 3 or w.K != K or tuple(out_PN.shape) != (P, N) or out_PN.stride(1) != 1 or N % EIGHT:
        raise ValueError(f"skinny_experts: ({P}, {K}) by a stack {tuple(w.low.shape)} of ({N}, {w.K}) into {tuple(out_PN.shape)}")
    if out_PN.dtype != x.values.dtype:
        raise ValueError(f"skinny_experts: activations of {x.values.dtype} into {out_PN.dtype}, not alike")
    groups, E = K // 32, w.low.shape[0]
    _skinny[(-(-N // c.rows), order.tiles(E))](
        x.values, *_words(w, c), out_PN, out_PN, out_PN, *order[:4], N, groups, 0, out_PN.stride(0), -(-groups // STEP), 1, E,
        EXPERTS=True, BY_PAIR=by_pair, KIND=LAYOUTS[w.type].kind, TP=order.tile_rows, ROWS=c.rows, WARPS=c.warps, STAGES=c.stages,
        MASKED=groups % STEP != 0, BF16=x.values.dtype == torch.bfloat16, num_warps=c.warps, maxnreg=c.registers, **overlap(out_PN),
    )  # fmt: skip
    return out_PN


def _words(w: Planes, c: Config) -> list[Tensor]:
    planes = [w.low if p is None else p for p in (w.low, w.high, w.head)]
    if not all(p.is_contiguous() for p in planes):
        raise ValueError(f"skinny: planes of strides {w.low.stride()} and {w.head.stride()} for {w.rows} rows, not contiguous")
    if c.rows % (16 * c.warps) or c.warps not in (1, 2, 4, 8):
        raise ValueError(f"skinny: {c.rows} rows by {c.warps} warps, not 16 or more by 1, 2, 4 or 8")
    return [p.view(torch.int32) for p in planes]
