"""Decode attention on Hopper over fp8, q8_0 and q4_0: bytes stay bytes until they are in a matrix product's registers.

    S^T = K q^T          (64 keys, rows of queries)       P = softmax over keys
    O^T += V^T P         (D, rows of queries)

As in `decode_hopper`, keys are the rows. One warp fetches tiles as they are stored (TMA; scales by asynchronous copies), a
warpgroup multiplies; two programs share a multiprocessor. Both products read their left operand from registers, where the words of
a tile become f16: a tile crosses shared memory as bytes, twice, and never as floats.

Columns   A sum over values does not mind their order. A thread reads a run of a key's bytes and multiplies it as it lies: queries
          are stored in that order (`_query_column`). For V^T a transposing load brings the same two bytes of two keys that follow
          each other into a register, and the values of each byte have a product of their own.
Scales    For V^T they cross shared memory once more, so that a register has those of two keys.
Shapes    as in `attend`: head_dim 128, 256, 512 (q4_0: 256, 512). At most 16 * 512 / D rows (queries times heads of a group).
Cost      the bytes of the keys in sight, once; 4 instructions a byte. Source: FlashMLA (DeepSeek 2025) for the roles.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headwise.kernels.attend import LOG2E, merge
from headwise.kernels.decode_hopper import finish, partials, share, shares, tile_slot
from headwise.kernels.stored import FP8, Q4_0, Q8_0, Sequences, Slots, Stored


@gluon.constexpr_function
def _words_a_row(n_values, FORMAT):
    """32-bit words of a stored row."""
    return n_values // 8 if FORMAT == Q4_0 else n_values // 4


@gluon.constexpr_function
def _blocks(words, FORMAT):
    """Blocks of 32 values in `words`; fp8 has no scales, so its words are one block."""
    return 1 if FORMAT == FP8 else words // 4 if FORMAT == Q4_0 else words // 8


@gluon.constexpr_function
def _split(bit, words, n_blocks):
    """A word's bit as a step in (block, word of the block)."""
    step, size = 1 << bit, words // n_blocks
    return [0, step] if step < size else [step // size, 0]


@gluon.constexpr_function
def _score_layout(words, n_blocks):
    """(64 keys, blocks, words): the first operand of a product over values. Four lanes share a key, each reads a run."""
    bits = words.bit_length() - 1
    word = [[0, *_split(b, words, n_blocks)] for b in range(bits)]
    return gl.DistributedLinearLayout(
        [*word[:-2], [8, 0, 0]], [*word[-2:], [1, 0, 0], [2, 0, 0], [4, 0, 0]], [[16, 0, 0], [32, 0, 0]], [],
        [64, n_blocks, words // n_blocks],
    )  # fmt: skip


@gluon.constexpr_function
def _value_layout(FORMAT):
    """(blocks, pairs of bytes of a block, 64 keys): the first operand of a product over keys, whose 64 rows are pairs of bytes."""
    pairs = 8 if FORMAT == Q4_0 else 16

    def row(r):
        return [r // pairs, r % pairs, 0]

    key = [[0, 0, 1 << b] for b in range(6)]
    return gl.DistributedLinearLayout(
        [key[0], row(8), *key[3:]], [*key[1:3], row(1), row(2), row(4)], [row(16), row(32)], [], [64 // pairs, pairs, 64]
    )


@gluon.constexpr_function
def _flat(layout):
    """(keys, blocks, words) as (keys, words)."""
    size = layout.shape[2]

    def flat(bases):
        return [[k, b * size + w] for k, b, w in bases]

    return gl.DistributedLinearLayout(
        flat(layout.reg_bases), flat(layout.lane_bases), flat(layout.warp_bases), [], [layout.shape[0], layout.shape[1] * size]
    )


@gluon.jit
def _query_column(j, WORDS: gl.constexpr, FORMAT: gl.constexpr):
    """Which value of a slab of WORDS words stands in column j of the stored queries."""
    quarter = j // 2 % 4  # which of the four lanes of a key
    low = j % 2 + j // 8 % 2 * 2  # the byte
    step = j // 16
    if FORMAT == Q4_0:
        word = quarter * (WORDS // 4) + step // 2
        return word // 4 * 32 + word % 4 * 4 + step % 2 * 16 + low
    else:
        return (quarter * (WORDS // 4) + step) * 4 + low


@gluon.jit
def _fetch_scales(ptr, slot, left, out, G, AT: gl.constexpr, N: gl.constexpr, W: gl.constexpr, CUT: gl.constexpr):
    """Scales of values [AT, AT + N) of 64 slots from `slot` on, two to a word, into shared memory, asynchronously."""
    columns: gl.constexpr = min(N // 64, 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // columns, columns], [1, 1], [1, 0])
    column = gl.expand_dims(gl.arange(0, N // 64, gl.SliceLayout(0, layout)), 0)
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    if CUT:  # slots past the last are not there
        row = gl.minimum(row, left - 1)
    words = out._reinterpret(gl.int32, [64, N // 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    base = ptr + (slot.to(gl.int64) * G + gl.program_id(1)) * (W // 64) + AT // 64
    async_copy.async_copy_global_to_shared(words, base + gl.expand_dims(row * (G * (W // 64)), 1) + column)


@gluon.jit
def _load(
    kd, td, vd, ks, vs, starts, lengths, table, table_stride, ring, window, n_splits, G, n_slots, sk, st, sv, ak, at, av, full,
    empty,
    D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr,
    FORMAT: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    BYTES: gl.constexpr = 4 * (_words_a_row(D + R, FORMAT) if R > 0 else 2 * _words_a_row(D, FORMAT))
    W: gl.constexpr = 4 * _words_a_row(D + R, FORMAT)
    for i in range(first, last):
        slot, newest = tile_slot(i, seq, lo, run, tiles_run, ring, table, table_stride, RING, PAGED)
        if newest >= n - T:
            gdc_wait()
        s = (i - first) % NS
        mbarrier.wait(empty.index(s), (((i - first) // NS) & 1) ^ 1)
        if FORMAT != FP8:
            _fetch_scales(ks, slot, n_slots - slot, ak.index(s), G, 0, D, D + R, CUT)
            if R > 0:
                _fetch_scales(ks, slot, n_slots - slot, at.index(s), G, D, R, D + R, CUT)
            else:
                _fetch_scales(vs, slot, n_slots - slot, av.index(s), G, 0, D, D, CUT)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        mbarrier.expect(full.index(s), 64 * BYTES)
        tma.async_copy_global_to_shared(kd, [slot, g * W], full.index(s), sk.index(s))
        if R > 0:
            tma.async_copy_global_to_shared(td, [slot, g * W + 4 * _words_a_row(D, FORMAT)], full.index(s), st.index(s))
        else:
            tma.async_copy_global_to_shared(vd, [slot, g * W], full.index(s), sv.index(s))


@gluon.jit
def _words(tile, AT: gl.constexpr, N: gl.constexpr, W: gl.constexpr, layout: gl.constexpr):
    """Words [AT, AT + N) of a stored tile, (64, blocks, words)."""
    words = tile._reinterpret(gl.int32, [64, W], gl.NVMMASharedLayout.get_default_for([64, W], gl.int32))
    x = words.slice(AT, N, dim=1).load(_flat(layout))
    return gl.convert_layout(x.reshape(layout.shape), layout, assert_trivial=True)


@gluon.jit
def _for_scores(tile, scales, SLAB: gl.constexpr, W: gl.constexpr, FORMAT: gl.constexpr, dot: gl.constexpr):
    """Slab SLAB of a tile of W words a key as f16, (64 keys, values in the order of `_query_column`).

    A byte u in the low half of 0x6400 is the f16 number 1024 + u; taking 1024 and the format's offset away leaves it exact.
    """
    N: gl.constexpr = min(W, 32)
    B: gl.constexpr = _blocks(N, FORMAT)
    layout: gl.constexpr = _score_layout(N, B)
    x = _words(tile, SLAB * N, N, W, layout)
    C: gl.constexpr = N // 4
    if FORMAT == FP8:
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b16 u, v;
            .reg .b32 x, y;
            mov.b32 {u, v}, $4;
            cvt.rn.f16x2.e4m3x2 x, u;
            cvt.rn.f16x2.e4m3x2 y, v;
            mov.b32 {$0, $1}, x;
            mov.b32 {$2, $3}, y;
            }""",
            "=h,=h,=h,=h,r", [x], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        y = gl.join(gl.join(a, b), gl.join(c, d)).reshape([64, 4, C, 2, 2]).permute((0, 2, 4, 1, 3))
        return gl.convert_layout(y.reshape([64, 16 * C]), dot, assert_trivial=True)
    else:
        s = scales.slice(SLAB * B, B, dim=1).load(gl.SliceLayout(2, layout))
        twice = gl.inline_asm_elementwise("mov.b32 $0, {$1, $1};", "=r,h", [s], dtype=gl.int32, is_pure=True, pack=1)
        t, _ = gl.broadcast(gl.expand_dims(twice, 2), x)
        if FORMAT == Q8_0:
            a, b, c, d = gl.inline_asm_elementwise(
                """{
                .reg .b32 u, x, y, c;
                mov.b32 c, 0x64806480;
                xor.b32 u, $4, 0x80808080;
                prmt.b32 x, u, 0x64646464, 0x4140;
                prmt.b32 y, u, 0x64646464, 0x4342;
                sub.f16x2 x, x, c;
                sub.f16x2 y, y, c;
                mul.f16x2 x, x, $5;
                mul.f16x2 y, y, $5;
                mov.b32 {$0, $1}, x;
                mov.b32 {$2, $3}, y;
                }""",
                "=h,=h,=h,=h,r,r", [x, t], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
            )  # fmt: skip
            y = gl.join(gl.join(a, b), gl.join(c, d)).reshape([64, 4, C, 2, 2]).permute((0, 2, 4, 1, 3))
            return gl.convert_layout(y.reshape([64, 16 * C]), dot, assert_trivial=True)
        else:
            a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
                """{
                .reg .b32 u, v, x, y, z, w, c;
                mov.b32 c, 0x64086408;
                and.b32 u, $8, 0x0f0f0f0f;
                shr.u32 v, $8, 4;
                and.b32 v, v, 0x0f0f0f0f;
                prmt.b32 x, u, 0x64646464, 0x4140;
                prmt.b32 y, u, 0x64646464, 0x4342;
                prmt.b32 z, v, 0x64646464, 0x4140;
                prmt.b32 w, v, 0x64646464, 0x4342;
                sub.f16x2 x, x, c;
                sub.f16x2 y, y, c;
                sub.f16x2 z, z, c;
                sub.f16x2 w, w, c;
                mul.f16x2 x, x, $9;
                mul.f16x2 y, y, $9;
                mul.f16x2 z, z, $9;
                mul.f16x2 w, w, $9;
                mov.b32 {$0, $1}, x;
                mov.b32 {$2, $3}, y;
                mov.b32 {$4, $5}, z;
                mov.b32 {$6, $7}, w;
                }""",
                "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [x, t],
                dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
                is_pure=True, pack=1,
            )  # fmt: skip
            lo = gl.join(gl.join(a, b), gl.join(c, d))
            hi = gl.join(gl.join(e, f), gl.join(g, h))
            y = gl.join(lo, hi).reshape([64, 4, C, 2, 2, 2]).permute((0, 2, 5, 4, 1, 3))
            return gl.convert_layout(y.reshape([64, 32 * C]), dot, assert_trivial=True)


@gluon.jit
def _for_values(tile, scales, SLAB: gl.constexpr, W: gl.constexpr, FORMAT: gl.constexpr, dot: gl.constexpr):
    """Slab SLAB of a tile as f16, transposed: (64 pairs of bytes, 64 keys) for each of the values that a pair holds.

    Two keys' pairs share a register: taking a byte of both is one instruction.
    """
    pairs = tile._reinterpret(gl.int16, [64, 2 * W], gl.NVMMASharedLayout.get_default_for([64, 2 * W], gl.int16))
    x = pairs.slice(SLAB * 64, 64, dim=1).permute((1, 0)).load(dot)
    if FORMAT == FP8:
        return gl.inline_asm_elementwise(
            """{
            .reg .b16 u, v;
            .reg .b32 x;
            prmt.b32 x, $2, 0, 0x3120;
            mov.b32 {u, v}, x;
            cvt.rn.f16x2.e4m3x2 $0, u;
            cvt.rn.f16x2.e4m3x2 $1, v;
            }""",
            "=r,=r,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        layout: gl.constexpr = _value_layout(FORMAT)
        B: gl.constexpr = layout.shape[0]
        x3 = gl.convert_layout(x.reshape(layout.shape), layout, assert_trivial=True)
        s = scales.slice(SLAB * B, B, dim=0).load(gl.SliceLayout(1, layout))
        if FORMAT == Q8_0:
            t, _ = gl.broadcast(gl.expand_dims(s, 1), x3)
            ys = gl.inline_asm_elementwise(
                """{
                .reg .b32 x, y, c;
                mov.b32 c, 0x64806480;
                lop3.b32 x, $2, 0x00ff00ff, 0x64806480, 0x6a;
                shr.u32 y, $2, 8;
                lop3.b32 y, y, 0x00ff00ff, 0x64806480, 0x6a;
                sub.f16x2 x, x, c;
                sub.f16x2 y, y, c;
                mul.f16x2 $0, x, $3;
                mul.f16x2 $1, y, $3;
                }""",
                "=r,=r,r,r", [x3, t], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            t, _ = gl.broadcast(gl.expand_dims(s, 1), x3)
            t16, _ = gl.broadcast(gl.expand_dims(s * gl.full([], 0.0625, gl.float16), 1), x3)
            ys = gl.inline_asm_elementwise(
                """{
                .reg .b32 x, y, z, w, v, c, d;
                mov.b32 c, 0x64086408;
                mov.b32 d, 0x64806480;
                shr.u32 v, $4, 8;
                lop3.b32 x, $4, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 y, v, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 z, $4, 0x00f000f0, 0x64006400, 0xea;
                lop3.b32 w, v, 0x00f000f0, 0x64006400, 0xea;
                sub.f16x2 x, x, c;
                sub.f16x2 y, y, c;
                sub.f16x2 z, z, d;
                sub.f16x2 w, w, d;
                mul.f16x2 $0, x, $5;
                mul.f16x2 $1, y, $5;
                mul.f16x2 $2, z, $6;
                mul.f16x2 $3, w, $6;
                }""",
                "=r,=r,=r,=r,r,r,r", [x3, t, t16], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
            )  # fmt: skip
        out = ()
        for i in gl.static_range(len(ys)):
            out = out + (gl.convert_layout(ys[i].reshape([64, 64]), dot, assert_trivial=True),)
        return out


@gluon.jit
def _consume(
    q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G, q_stride,
    sq, sqt, sk, st, sv, ak, at, av, ts, sp, sm, full, empty,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    NS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr,
    SP: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dot: gl.constexpr = gl.DotOperandLayout(0, sl, 2)
    col: gl.constexpr = gl.SliceLayout(0, sl)
    WD: gl.constexpr = _words_a_row(D, FORMAT)
    WR: gl.constexpr = _words_a_row(R, FORMAT)
    EACH: gl.constexpr = 4 if FORMAT == Q4_0 else 2  # values of a pair of bytes
    gdc_wait()
    sm.store(_store_queries(q_ptr, sq, sqt, q0, T, g, q_stride, GROUP, ROWS, D, R, FORMAT))
    fence_async_shared()
    scales = sm.load(col) * scale
    rows = gl.arange(0, ROWS, col)
    pos_q = n - T + rows // GROUP
    keys = gl.arange(0, 64, gl.SliceLayout(1, sl))
    C: gl.constexpr = min(8, D // 32)
    by_row: gl.constexpr = gl.BlockedLayout([1, C], [32 * C * 32 // D, D // 32 // C], [4, 1], [1, 0])
    accs = ()
    for t in gl.static_range(D // 64):
        accs = accs + (gl.zeros([64, ROWS], gl.float32, sl),)
    m = gl.full([ROWS], -1e30, gl.float32, col)
    l = gl.zeros([64, ROWS], gl.float32, sl)
    N: gl.constexpr = D * min(WD, 32) // WD  # values of a slab
    BEHIND: gl.constexpr = 0 if FORMAT == Q4_0 else 1  # products under way while the next words become floats: two need registers
    for i in range(first, last):
        b = (i - first) % NS
        mbarrier.wait(full.index(b), ((i - first) // NS) & 1)
        s = gl.zeros([64, ROWS], gl.float32, sl)
        for t in gl.static_range(WD // min(WD, 32)):
            x = _for_scores(sk.index(b), ak.index(b), t, WD, FORMAT, dot)
            s = warpgroup_mma(x, sq.slice(t * N, N, dim=1).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(BEHIND, deps=(s,))
        if R > 0:
            x = _for_scores(st.index(b), at.index(b), 0, WR, FORMAT, dot)
            s = warpgroup_mma(x, sqt.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        pos = lo + i * 64
        end = n
        if RING:
            end = gl.where(i < tiles_run, lo + run, n)
            pos = gl.where(i < tiles_run, pos, lo + run + (i - tiles_run) * 64)
        cut = pos + 63 > n - T
        if RING:
            cut = cut | (pos + 64 > end)
        if WINDOWED:
            cut = cut | (pos <= n - 1 - window)
        if cut:
            j = gl.expand_dims(pos + keys, 1)
            i_q = gl.expand_dims(pos_q, 0)
            seen = (j <= i_q) & (j < end)
            if WINDOWED:
                seen = seen & (j > i_q - window)
            s = gl.where(seen, s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 0) * scales)
        p = gl.exp2(s * gl.expand_dims(scales, 0) - gl.expand_dims(m_new, 0))
        a = gl.expand_dims(gl.exp2(m - m_new), 0)
        l = l * a + p
        m = m_new
        sp.permute((1, 0)).store(p.to(gl.float16))
        if FORMAT != FP8:  # scales of two keys side by side
            ts.permute((1, 0)).store((ak if R > 0 else av).index(b).load(by_row))
        fence_async_shared()
        new = ()
        for t in gl.static_range(D // 64 // EACH):
            if R > 0:
                xs = _for_values(sk.index(b), ts, t, WD, FORMAT, dot)
            else:
                xs = _for_values(sv.index(b), ts, t, WD, FORMAT, dot)
            os = ()
            for e in gl.static_range(EACH):
                os = os + (warpgroup_mma(xs[e], sp.permute((1, 0)), accs[t * EACH + e] * a, is_async=True),)
            if BEHIND == 0:
                os = warpgroup_mma_wait(0, deps=os)
            elif t > 0:
                new = new[:-EACH] + warpgroup_mma_wait(EACH, deps=new[-EACH:])
            new = new + os
        mbarrier.arrive(empty.index(b), count=1)
        if BEHIND == 0:
            accs = new
        else:
            accs = new[:-EACH] + warpgroup_mma_wait(0, deps=new[-EACH:])
    total = gl.sum(l, 0)
    pair = gl.arange(0, 64, gl.SliceLayout(1, sl))
    if FORMAT == Q4_0:
        pair = pair // 8 * 32 + pair % 8 * 2
    else:
        pair = pair * 2
    for t in gl.static_range(D // 64):
        values = t // EACH * 64 * EACH + t % EACH // 2 * 16 + t % 2 + pair
        partials(accs[t], values, m, total, out_ptr, sinks_ptr, part_ptr, stat_ptr, seq, q0, T, g, G, n_splits, H, GROUP, ROWS, D,
                 SINKS, MERGE)  # fmt: skip
    finish(out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, seq, q0, T, g, G, n_splits, H, GROUP, ROWS, D, SINKS, MERGE, MERGED,
           SP)  # fmt: skip


@gluon.jit
def _store_queries(
    q_ptr, sq, sqt, q0, T, g, q_stride, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    FORMAT: gl.constexpr,
):  # fmt: skip
    """Queries as f16 in the order of the products, each row divided by a power of two that brings it into range; the powers."""
    ql: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ql))
    at = gl.expand_dims((q0 + row // GROUP).to(gl.int64) * q_stride + (g * GROUP + row % GROUP) * (D + R), 1)
    ok = gl.expand_dims(row < T * GROUP, 1)
    WD: gl.constexpr = _words_a_row(D, FORMAT)
    SLAB: gl.constexpr = D * min(WD, 32) // WD
    j = gl.arange(0, D, gl.SliceLayout(0, ql))
    d = j // SLAB * SLAB + _query_column(j % SLAB, min(WD, 32), FORMAT)
    q = gl.load(q_ptr + at + gl.expand_dims(d, 0), mask=ok, other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(q), 1)
    qt = q
    if R > 0:
        r = _query_column(gl.arange(0, R, gl.SliceLayout(0, ql)), _words_a_row(R, FORMAT), FORMAT)
        qt = gl.load(q_ptr + at + D + gl.expand_dims(r, 0), mask=ok, other=0.0).to(gl.float32)
        largest = gl.maximum(largest, gl.max(gl.abs(qt), 1))
    power = gl.exp2(gl.ceil(gl.log2(gl.maximum(largest, 1e-30))))
    sq.store((q / gl.expand_dims(power, 1)).to(gl.float16))
    if R > 0:
        sqt.store((qt / gl.expand_dims(power, 1)).to(gl.float16))
    return power


@gluon.jit
def _decode(
    kd, td, vd, ks, vs, q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, table, table_stride, ring,
    window, scale, n_splits, G, n_slots, q_stride,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr,
    SP: gl.constexpr, FORMAT: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    f16: gl.constexpr = gl.float16
    sq = gl.allocate_shared_memory(f16, [ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], f16))
    pl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], f16)
    sp = gl.allocate_shared_memory(f16, [ROWS, 64], pl)
    BD: gl.constexpr = 4 * _words_a_row(D, FORMAT)
    BR: gl.constexpr = 4 * _words_a_row(R, FORMAT)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BD], gl.uint8)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sk = gl.allocate_shared_memory(gl.uint8, [NS, 64, BD], tile)
    ak = gl.allocate_shared_memory(f16, [NS, 64, D // 32], plain)
    if R > 0:
        sqt = gl.allocate_shared_memory(f16, [ROWS, R], gl.NVMMASharedLayout.get_default_for([ROWS, R], f16))
        st = gl.allocate_shared_memory(gl.uint8, [NS, 64, BR], gl.NVMMASharedLayout.get_default_for([64, BR], gl.uint8))
        at = gl.allocate_shared_memory(f16, [NS, 64, R // 32], plain)
        sv = sk
        av = ak
    else:
        sqt = sq
        st = sk
        at = ak
        sv = gl.allocate_shared_memory(gl.uint8, [NS, 64, BD], tile)
        av = gl.allocate_shared_memory(f16, [NS, 64, D // 32], plain)
    ts = gl.allocate_shared_memory(f16, [D // 32, 64], plain)
    sm = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NS):
        mbarrier.init(full.index(i), count=1 if FORMAT == FP8 else 33)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G,
                    q_stride, sq, sqt, sk, st, sv, ak, at, av, ts, sp, sm, full, empty,
                    H, GROUP, ROWS, D, R, NS, WINDOWED, RING, SINKS, MERGE, MERGED, SP, FORMAT)),
        (_load, (kd, td, vd, ks, vs, starts, lengths, table, table_stride, ring, window, n_splits, G, n_slots, sk, st, sv, ak, at,
                 av, full, empty, D, R, NS, WINDOWED, RING, PAGED, FORMAT, CUT)),
    ], [1], [56])  # fmt: skip


def attend_packed(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float,
    window: int | None = None, sinks_H: Tensor | None = None, n_splits: int = 1, scratch: Tensor | None = None,
    count: Tensor | None = None, overlap: bool = True,
) -> Tensor:  # fmt: skip
    """As `decode_hopper.attend_decode`, for fp8, q8_0 and q4_0."""
    _, H, E = q_NHE.shape
    D = out_NHD.shape[-1]
    S, G, width = k.data_SGW.shape
    R, group, B = E - D, H // G, seqs.lengths_B.shape[0]
    rows = max(8, triton.next_power_of_2(seqs.max_queries * group))
    if rows * D > 16 * 512:
        raise ValueError(f"attend_packed: {seqs.max_queries} queries of {group} heads are {rows} rows (<= {16 * 512 // D})")
    stage = 64 * (width + E // 16 if v is None else 2 * (width + E // 16))
    NS = min(8, max(2, (112 * 1024 - rows * (E * 2 + 132) - 4 * D) // stage))

    def desc(x: Tensor, columns: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([64, columns], gl.uint8)
        return TensorDescriptor.from_tensor(x.view(torch.uint8).view(S, -1), [64, columns], layout)

    kd = desc(k.data_SGW, width * D // E)
    td = desc(k.data_SGW, width * R // E) if R else kd
    vd = kd if v is None else desc(v.data_SGW, width)
    ks, vs = (x.data_SGW if x.scales_SGB is None else x.scales_SGB.view(torch.int32) for x in (k, v or k))
    part, stat, mode = shares("attend_packed", q_NHE, scratch, count, B * G * n_splits * rows, n_splits, D)
    _decode[(n_splits, G, B)](
        kd, td, vd, ks, vs, q_NHE, out_NHD, q_NHE if sinks_H is None else sinks_H, part, stat,
        seqs.lengths_B if count is None else count, seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0),
        max(1, slots.ring), window or 0, scale * LOG2E, n_splits, G, S, q_NHE.stride(0),
        H=H, GROUP=group, ROWS=rows, D=D, R=R, NS=NS, WINDOWED=window is not None, RING=slots.ring > 0, PAGED=slots.page > 0,
        SINKS=sinks_H is not None, MERGE=mode, MERGED=seqs.max_queries * group, SP=triton.next_power_of_2(n_splits),
        FORMAT=k.format, CUT=S % 64 > 0, num_warps=4, maxnreg=128, launch_pdl=overlap,
    )  # fmt: skip
    if mode == 2:
        merge(part, stat, out_NHD, sinks_H, seqs, G=G, n_splits=n_splits, blocks=1, rows=rows, early=True)
    return out_NHD
