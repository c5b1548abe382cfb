"""Prefill over quantised caches (fp8, q8_0, q4_0) on Hopper: a warpgroup makes floats of bytes while others multiply those of the
tiles before. At head_dim 512 (`_attend`):

    scores    S(i) = Q K(i), softmax -> P(i) in shared memory
    values    half of O += P(i) V(i): with one tensor the right half under the softmax of the next tile, with two both
    widen     a part comes in registers while those before it become floats in shared memory, as soon as there is room

With one tensor for K and V two tiles are in shared memory, whose halves are values; with two, one tile of each. Below 512 (`_two`)
two warpgroups have 64 queries each, as in `attend_hopper`; at 256 registers hold no scores ahead of the softmax.

A part is 64 values of 64 keys; bytes go through shared memory as floats only. These are f16 whatever the activations are, which the
queries become too: fewer instructions than bf16 takes, and more of a value is kept.

Shapes    as in `attend`: one tensor (512 + 128 rotated values) or two; no softcap, at 512 no window or sinks; contiguous, a
          ring, or pages of 64.
Accuracy  a stored value is its product with the scale, rounded to f16 once: queries and values over 65,504 become infinite.
Cost      64 keys of one tensor: 40,960 values, 1 (fp8) to 2 instructions each on four warps, beside 2,048 clocks of products.
Source    roles after FlashAttention-3 (Shah et al. 2024) and FlashMLA (DeepSeek 2025), which widens fp8 so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headwise.kernels.attend_hopper import (
    BM,
    LOG2E,
    _as_keys,
    _barriers,
    _described,
    _extent,
    _half_of,
    _kind,
    _shares,
    _slot,
    _softmax,
    _store,
    _sums,
    _tile_slot,
    _two_consume,
    _two_launch,
    _two_queries,
    _work,
)
from headwise.kernels.attend_mma import widened
from headwise.kernels.stored import FP8, Q4_0, Q8_0, Sequences, Slots, Stored

# four e4m3 values to pairs of f16
FP8_TO_F16 = gl.constexpr("{\n.reg .b16 l, h;\nmov.b32 {l, h}, $2;\ncvt.rn.f16x2.e4m3x2 $0, l;\ncvt.rn.f16x2.e4m3x2 $1, h;\n}")


@gluon.constexpr_function
def _layout(FORMAT):
    """(keys, blocks of 32 values, words of a block): a block and its scale to a thread; half a block where there are no scales, so
    that lanes fill sectors together. 16 bytes of floats meet no other's banks."""
    words = 8 if FORMAT == Q8_0 else 4
    return gl.BlockedLayout([1, 1, words], [8, 2, 2] if FORMAT == FP8 else [16, 2, 1], [4, 1, 1], [2, 1, 0])


@gluon.jit
def _rows(table, seq, table_stride, i, tiles, n, g, G, FORMAT: gl.constexpr, PAGED: gl.constexpr):
    """Rows of the cache of a tile's keys; past the end the last one again, which the mask leaves out."""
    layout: gl.constexpr = _layout(FORMAT)
    i = gl.minimum(i, tiles - 1)
    j = gl.minimum(gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, layout))), n - 1 - i * 64)
    return (_slot(table, seq, table_stride, i, PAGED) + j).to(gl.int64) * G + g


@gluon.jit
def _starts_of(data, scales, rows, W: gl.constexpr, FORMAT: gl.constexpr):
    """Where the first 64 of W values of each row and their scales are."""
    layout: gl.constexpr = _layout(FORMAT)
    WORDS: gl.constexpr = 4 if FORMAT == Q4_0 else 8
    in_row = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    blocks = gl.expand_dims(rows * (W // 32), 1) + gl.expand_dims(in_row, 0)
    words = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return data + gl.expand_dims(blocks * WORDS, 2) + gl.expand_dims(gl.expand_dims(words, 0), 1), scales + blocks


@gluon.jit
def _part(x, s, at: gl.constexpr, FORMAT: gl.constexpr):
    """64 values of each row from value 64 * `at` on, as they are stored: (64, blocks, words), and the scales of the blocks."""
    words = gl.load(x + at * (8 if FORMAT == Q4_0 else 16))
    of_blocks = words
    if FORMAT != FP8:
        of_blocks = gl.load(s + at * 2)
    return words, of_blocks


@gluon.jit
def _parts(x, s, at: gl.constexpr, N: gl.constexpr, FORMAT: gl.constexpr):
    """N of them from value 64 * `at` on."""
    parts = ()
    for c in gl.static_range(N):
        parts = parts + (_part(x, s, at + c, FORMAT),)
    return parts


@gluon.jit
def _queries(qd, row, column, sq, bq, ONE: gl.constexpr):
    """Of one tensor 512 of 640: the first 64 of either half rotate, and stand at the end."""
    mbarrier.expect(bq, 64 * 512 * 2)
    for c in gl.static_range(8):
        at = 64 * c
        if ONE:
            at = 64 * c + (64 if c < 3 else 128)
        tma.async_copy_global_to_shared(qd, [row, column + at], bq, sq.index(c))


@gluon.jit
def _parts_of(sk, N: gl.constexpr):
    """Shared memory by parts: 64 columns of 64 keys, pairs of floats."""
    return sk._reinterpret(gl.int32, [N, 64, 32], gl.NVMMASharedLayout(128, 32, 2))


@gluon.jit
def _give(to, at, part, FORMAT: gl.constexpr):
    """A part as floats, to 64 columns of shared memory."""
    if FORMAT == FP8:
        a, b = gl.inline_asm_elementwise(FP8_TO_F16, "=r,=r,r", [part[0]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
        to.index(at).store(gl.join(a, b).reshape((64, 32)))
    else:
        to.index(at).store(widened(part[0], part[1], FORMAT))


@gluon.jit
def _signal(full):
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _in_turn(e, tiles):
    """Whether tile `e` of K(0), K(1), V(0), K(2), V(1) ... is one of keys, and its number: room for keys is free once scores are
    made of those before, for values once the values before are multiplied, which is later."""
    keys = ((e == 0) | (e % 2 == 1)) & (e < 2 * tiles - 1)
    return keys, (e + 1) // 2 - gl.where(keys, 0, 1)


@gluon.jit
def _widen(
    qd, k_data, k_scales, v_data, v_scales, starts, lengths, table, table_stride, H, sq, sk, st, bq, full, empty, t_full, t_empty,
    ONE: gl.constexpr, GROUP: gl.constexpr, PAGED: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Of one tensor each tile's left half, rotated values and right half, three or four of ten parts on their way; of two half a
    tile is on its way while the one before becomes floats."""
    seq, q0, T, past, block = _extent(starts, lengths)
    h = gl.program_id(0)
    g = h // GROUP
    G = H // GROUP
    W: gl.constexpr = 640 if ONE else 512
    if block * 64 < T:
        n = past + gl.minimum((block + 1) * 64, T)
        tiles = gl.cdiv(n, 64)
        _queries(qd, q0 + block * 64, h * W, sq, bq, ONE)
        fk = _parts_of(sk, 16)
        x, s = _starts_of(k_data, k_scales, _rows(table, seq, table_stride, 0, tiles, n, g, G, FORMAT, PAGED), W, FORMAT)
        a0, a1, a2 = _parts(x, s, 0, 3, FORMAT)
        if ONE:
            ft = _parts_of(st, 2)
            for i in range(tiles):
                left = i % 2 * 2
                ph = ((i // 2) & 1) ^ 1
                after = _rows(table, seq, table_stride, i + 1, tiles, n, g, G, FORMAT, PAGED)
                mbarrier.wait(empty.index(left), ph)
                b0, b1, b2 = _part(x, s, 3, FORMAT), _part(x, s, 8, FORMAT), _part(x, s, 9, FORMAT)
                _give(fk, 4 * left, a0, FORMAT)
                _give(fk, 4 * left + 1, a1, FORMAT)
                _give(fk, 4 * left + 2, a2, FORMAT)
                c0, c1, c2, c3 = _parts(x, s, 4, 4, FORMAT)
                _give(fk, 4 * left + 3, b0, FORMAT)
                _signal(full.index(left))
                mbarrier.wait(t_empty, (i & 1) ^ 1)
                _give(ft, 0, b1, FORMAT)
                _give(ft, 1, b2, FORMAT)
                _signal(t_full)
                mbarrier.wait(empty.index(left + 1), ph)
                x, s = _starts_of(k_data, k_scales, after, W, FORMAT)
                a0, a1, a2 = _parts(x, s, 0, 3, FORMAT)
                _give(fk, 4 * left + 4, c0, FORMAT)
                _give(fk, 4 * left + 5, c1, FORMAT)
                _give(fk, 4 * left + 6, c2, FORMAT)
                _give(fk, 4 * left + 7, c3, FORMAT)
                _signal(full.index(left + 1))
        else:
            a3 = _part(x, s, 3, FORMAT)
            for e in range(2 * tiles):
                keys, i = _in_turn(e, tiles)
                left = gl.where(keys, 0, 2)
                ph = (i & 1) ^ 1
                of_keys, after = _in_turn(e + 1, tiles)
                rows = _rows(table, seq, table_stride, after, tiles, n, g, G, FORMAT, PAGED)
                mbarrier.wait(empty.index(left), ph)
                _give(fk, 4 * left, a0, FORMAT)
                b0, b1, b2, b3 = _parts(x, s, 4, 4, FORMAT)
                _give(fk, 4 * left + 1, a1, FORMAT)
                _give(fk, 4 * left + 2, a2, FORMAT)
                _give(fk, 4 * left + 3, a3, FORMAT)
                _signal(full.index(left))
                mbarrier.wait(empty.index(left + 1), ph)
                _give(fk, 4 * left + 4, b0, FORMAT)
                if of_keys:
                    x, s = _starts_of(k_data, k_scales, rows, W, FORMAT)
                else:
                    x, s = _starts_of(v_data, v_scales, rows, W, FORMAT)
                a0, a1, a2, a3 = _parts(x, s, 0, 4, FORMAT)
                _give(fk, 4 * left + 5, b1, FORMAT)
                _give(fk, 4 * left + 6, b2, FORMAT)
                _give(fk, 4 * left + 7, b3, FORMAT)
                _signal(full.index(left + 1))


@gluon.jit
def _scores(
    starts, lengths, sq, sk, st, sp, sa, bq, full, empty, t_full, t_empty, p_full, p_empty, go, scale, ONE: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths)
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
        pos_q = past + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, sl))
        cols = gl.arange(0, 64, gl.SliceLayout(0, sl))
        mbarrier.wait(bq, 0)
        q = sq._reinterpret(gl.float16, [8, 64, 64], sq.layout)
        if sq.dtype != gl.float16:
            for c in gl.static_range(8):
                q.index(c).store(sq.index(c).load(sl).to(gl.float32).to(gl.float16))
            fence_async_shared()
        for i in range(tiles):
            b = i % 2
            first = 2 * b if ONE else 0
            ph = ((i // 2) if ONE else i) & 1
            s = gl.zeros([64, 64], gl.float32, sl)
            mbarrier.wait(full.index(first), ph)
            for c in gl.static_range(8):
                if ONE:  # the left half, the rotated values, the right half
                    if c == 3:
                        mbarrier.wait(t_full, i & 1)
                    if c == 5:
                        mbarrier.wait(full.index(first + 1), ph)
                    if c < 3:
                        keys = sk.index(first).slice(64 * c + 64, 64, dim=1)
                    elif c < 5:
                        keys = st.slice(64 * c - 192, 64, dim=1)
                    else:
                        keys = sk.index(first + 1).slice(64 * c - 256, 64, dim=1)
                    queries = q.index(c if c < 3 else c + 3 if c < 5 else c - 2)
                else:
                    if c == 4:
                        mbarrier.wait(full.index(1), ph)
                    keys = sk.index(c // 4).slice(c % 4 * 64, 64, dim=1)
                    queries = q.index(c)
                s = warpgroup_mma(queries, keys.permute((1, 0)), s, use_acc=c > 0, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            if i > 0:  # the matrix unit is free for the values of the tile before
                mbarrier.arrive(go.index((i - 1) % 2), count=1)
            if ONE:
                mbarrier.arrive(t_empty, count=1)
            else:
                mbarrier.arrive(empty.index(0), count=1)
                mbarrier.arrive(empty.index(1), count=1)
            m, l = _shares(s, m, l, i, past + block * 64, pos_q, cols, scale, sp, sa, p_full, p_empty)
        mbarrier.arrive(go.index((tiles - 1) % 2), count=1)
        _sums(l, tiles, sa, p_full, p_empty)


@gluon.jit
def _values(
    starts, lengths, out, H, sk, sp, sa, full, empty, p_full, p_empty, go, HALF: gl.constexpr, ONE: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row: gl.constexpr = gl.SliceLayout(1, accl)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        acc0 = gl.zeros([64, 128], gl.float32, accl)
        acc1 = acc0
        for i in range(tiles):
            b = i % 2
            ph = (i // 2) & 1
            mbarrier.wait(p_full.index(b), ph)
            a = gl.expand_dims(sa.index(b).load(row), 1)
            acc0 *= a
            acc1 *= a
            if HALF == 1 or not ONE:
                mbarrier.wait(go.index(b), ph)
            half = (2 * b if ONE else 2) + HALF
            mbarrier.wait(full.index(half), ph if ONE else i & 1)
            acc0 = warpgroup_mma(sp.index(b), sk.index(half).slice(0, 128, dim=1), acc0, is_async=True)
            acc1 = warpgroup_mma(sp.index(b), sk.index(half).slice(128, 128, dim=1), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
            mbarrier.arrive(empty.index(half), count=1)
            mbarrier.arrive(p_empty.index(b), count=1)
        b = tiles % 2
        mbarrier.wait(p_full.index(b), (tiles // 2) & 1)
        part = gl.expand_dims(1.0 / sa.index(b).load(row), 1)
        _store(out, (acc0 * part).to(dtype), q0, block * 64, T, H, gl.program_id(0), HALF * 256, 512, 128, accl)
        _store(out, (acc1 * part).to(dtype), q0, block * 64, T, H, gl.program_id(0), HALF * 256 + 128, 512, 128, accl)


@gluon.jit
def _attend(
    qd, k_data, k_scales, v_data, v_scales, out, starts, lengths, table, table_stride, H, scale, ONE: gl.constexpr,
    GROUP: gl.constexpr, PAGED: gl.constexpr, FORMAT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [8, 64, 64], qd.layout)
    sk = gl.allocate_shared_memory(gl.float16, [4, 64, 256], qd.layout)  # halves of two tiles; or of a tile of K and one of V
    st = sk
    if ONE:
        st = gl.allocate_shared_memory(gl.float16, [64, 128], qd.layout)
    sp = gl.allocate_shared_memory(gl.float16, [2, 64, 64], qd.layout)
    sa = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bq, t_full, t_empty = _barriers(1, 1).index(0), _barriers(1, 1).index(0), _barriers(1, 1).index(0)
    full, empty, p_full, p_empty, go = _barriers(4, 1), _barriers(4, 1), _barriers(2, 1), _barriers(2, 2), _barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_scores, (starts, lengths, sq, sk, st, sp, sa, bq, full, empty, t_full, t_empty, p_full, p_empty, go, scale, ONE)),
        (_values, (starts, lengths, out, H, sk, sp, sa, full, empty, p_full, p_empty, go, 0, ONE, dtype)),
        (_values, (starts, lengths, out, H, sk, sp, sa, full, empty, p_full, p_empty, go, 1, ONE, dtype)),
        (_widen, (qd, k_data, k_scales, v_data, v_scales, starts, lengths, table, table_stride, H, sq, sk, st, bq, full, empty,
                  t_full, t_empty, ONE, GROUP, PAGED, FORMAT)),
    ], [4, 4, 4], [160, 160, 96 if ONE else 104])  # fmt: skip


@gluon.jit
def _ring_rows(
    table, seq, table_stride, i, lo, hi, run, tiles_run, ring, g, G, FORMAT: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr
):  # fmt: skip
    """Rows of the cache of tile `i` of the keys from position `lo` on; past the end of its run of slots the last one again."""
    j = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, _layout(FORMAT))))
    slot = _tile_slot(table, seq, table_stride, i, lo, tiles_run, ring, 64, RING, PAGED)
    left = hi - lo - i * 64  # keys from here on
    if RING:
        left = gl.where(i < tiles_run, run - i * 64, hi - lo - run - (i - tiles_run) * 64)
    return (slot + gl.minimum(j, left - 1)).to(gl.int64) * G + g


@gluon.jit
def _widen_two(
    qd, k_data, k_scales, v_data, v_scales, starts, lengths, table, table_stride, ring, window, H, works, blocks, pairs, short,
    sq, sk, sv, q_full, k_full, v_full, k_empty, v_empty, GROUP: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Tiles of both, block after block; a tile's rows are asked for while the one before becomes floats."""
    G = H // GROUP
    n = 0  # tiles so far
    PARTS: gl.constexpr = D // 64
    FIRST: gl.constexpr = (PARTS + 1) // 2  # of a tile, before more are asked for: registers hold a tile and a half
    fk, fv = _parts_of(sk, 2 * PARTS), _parts_of(sv, 2 * PARTS)
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(
            w, starts, lengths, blocks, pairs, short, window, ring, HEADS, 64, WINDOWED, RING
        )
        g = h // GROUP
        if tiles > 0:
            mbarrier.wait(k_empty.index((n + 1) % 2), (((n + 1) // 2) & 1) ^ 1)  # the block before has met its last keys
            _two_queries(qd, q0, first, h, sq, q_full, D, HEADS)
            rows = _ring_rows(table, seq, table_stride, 0, lo, hi, run, tiles_run, ring, g, G, FORMAT, RING, PAGED)
            x, s = _starts_of(k_data, k_scales, rows, D, FORMAT)
            asked = _parts(x, s, 0, PARTS, FORMAT)
            for i in range(tiles):
                b = n % 2
                ph = ((n // 2) & 1) ^ 1
                mbarrier.wait(k_empty.index(b), ph)
                for c in gl.static_range(FIRST):
                    _give(fk, PARTS * b + c, asked[c], FORMAT)
                x, s = _starts_of(v_data, v_scales, rows, D, FORMAT)
                of_v = _parts(x, s, 0, PARTS, FORMAT)
                for c in gl.static_range(FIRST, PARTS):
                    _give(fk, PARTS * b + c, asked[c], FORMAT)
                _signal(k_full.index(b))
                after = gl.minimum(i + 1, tiles - 1)
                rows = _ring_rows(table, seq, table_stride, after, lo, hi, run, tiles_run, ring, g, G, FORMAT, RING, PAGED)
                mbarrier.wait(v_empty.index(b), ph)
                for c in gl.static_range(FIRST):
                    _give(fv, PARTS * b + c, of_v[c], FORMAT)
                x, s = _starts_of(k_data, k_scales, rows, D, FORMAT)
                asked = _parts(x, s, 0, PARTS, FORMAT)
                for c in gl.static_range(FIRST, PARTS):
                    _give(fv, PARTS * b + c, of_v[c], FORMAT)
                _signal(v_full.index(b))
                n += 1


@gluon.jit
def _256_consume(
    out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, q_full, k_full, v_full,
    k_empty, v_empty, WHO: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = 256
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    q16 = sq._reinterpret(gl.float16, [2, 64, D], sq.layout).index(WHO)
    zero = gl.zeros([64, 64], gl.float32, sl)
    cols = gl.arange(0, 64, gl.SliceLayout(0, sl))
    n = 0
    done = 0
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(
            w, starts, lengths, blocks, pairs, short, window, ring, HEADS, 64, WINDOWED, RING
        )
        if tiles > 0:
            first, h = _half_of(first, h, WHO, HEADS)
            nearest = past + first
            pos_q = nearest + gl.arange(0, 64, gl.SliceLayout(1, sl))
            acc = gl.zeros([64, D], gl.float32, accl)
            m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
            l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
            mbarrier.wait(q_full.index(WHO), done & 1)
            _as_keys(sq.index(WHO), q16, D)
            for i in range(tiles):
                b = n % 2
                ph = (n // 2) & 1
                mbarrier.wait(k_full.index(b), ph)
                s = warpgroup_mma(q16, sk.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_empty.index(b), count=1)
                p, a, m, l = _softmax(
                    s, m, l, i, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale, 64, WINDOWED, RING, gl.float16, accl
                )
                acc = acc * gl.expand_dims(a, 1)
                mbarrier.wait(v_full.index(b), ph)
                acc = warpgroup_mma(p, sv.index(b), acc, is_async=True)
                acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                mbarrier.arrive(v_empty.index(b), count=1)
                n += 1
            if SINKS:
                l += gl.exp2(gl.load(sinks + h).to(gl.float32) * 1.4426950408889634 - m)
            part = gl.expand_dims(gl.convert_layout(1.0 / l, gl.SliceLayout(1, accl)), 1)
            _store(out, (acc * part).to(sq.dtype), q0, first, T, H, h, 0, D, D, accl)
            done += 1


@gluon.jit
def _two_packed(
    od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so, q_full, k_full, v_full,
    k_empty, v_empty, WHO: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    SINKS: gl.constexpr,
):  # fmt: skip
    if D == 256:  # registers hold no tile of scores ahead, nor results that leave while the next block begins
        _256_consume(out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, q_full, k_full,
                     v_full, k_empty, v_empty, WHO, HEADS, WINDOWED, RING, SINKS)  # fmt: skip
    else:
        _two_consume(od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so, q_full,
                     k_full, v_full, k_empty, v_empty, WHO, D, 64, HEADS, WINDOWED, RING, SINKS)  # fmt: skip


@gluon.jit
def _two(
    qd, k_data, k_scales, v_data, v_scales, od, out, sinks, starts, lengths, table, table_stride, ring, window, H, works, blocks,
    pairs, short, scale, GROUP: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    PAGED: gl.constexpr, SINKS: gl.constexpr, FORMAT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [2, 64, D], qd.layout)
    sk = gl.allocate_shared_memory(gl.float16, [2, 64, D], qd.layout)
    sv = gl.allocate_shared_memory(gl.float16, [2, 64, D], qd.layout)
    q_full, k_full, v_full = _barriers(2, 1), _barriers(2, 1), _barriers(2, 1)
    k_empty, v_empty = _barriers(2, 2), _barriers(2, 2)
    fence_async_shared()
    so = sq  # at 256 results leave from registers
    if D < 256:
        so = gl.allocate_shared_memory(dtype, [2, 64, D], od.layout)
    gl.warp_specialize([
        (_two_packed, (od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so, q_full,
                       k_full, v_full, k_empty, v_empty, 0, D, HEADS, WINDOWED, RING, SINKS)),
        (_two_packed, (od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so, q_full,
                       k_full, v_full, k_empty, v_empty, 1, D, HEADS, WINDOWED, RING, SINKS)),
        (_widen_two, (qd, k_data, k_scales, v_data, v_scales, starts, lengths, table, table_stride, ring, window, H, works, blocks,
                      pairs, short, sq, sk, sv, q_full, k_full, v_full, k_empty, v_empty, GROUP, D, HEADS, WINDOWED, RING, PAGED,
                      FORMAT)),
    ], [4, 4], [208, 88])  # fmt: skip


def attend_packed_two(
    q_NHE: Tensor, k: Stored, v: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float, window: int | None = None,
    sinks_H: Tensor | None = None, processors: int = 132,
) -> Tensor:  # fmt: skip
    """Prefill at head_dim 64, 128 or 256 over fp8, q8_0 or q4_0, as `attend_hopper.attend_two`."""
    held = [(x.data_SGW.view(torch.int32), q_NHE if x.scales_SGB is None else x.scales_SGB) for x in (k, v)]
    programs, args, options = _two_launch(q_NHE, k, out_NHD, seqs, slots, scale, window, sinks_H, processors)
    _two[programs](_described(q_NHE, 64, q_NHE.shape[2]), *held[0], *held[1], *args, FORMAT=k.format, **options)
    return out_NHD


def attend_packed(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float
) -> Tensor:  # fmt: skip
    """Prefill at head_dim 512 over fp8, q8_0 or q4_0; no window, softcap or sinks."""
    H, G = q_NHE.shape[1], k.data_SGW.shape[1]
    held = [(x.data_SGW.view(torch.int32), q_NHE if x.scales_SGB is None else x.scales_SGB) for x in (k, k if v is None else v)]
    _attend[(H, -(-seqs.max_queries // BM), seqs.lengths_B.shape[0])](
        _described(q_NHE, 64, 64), *held[0], *held[1], out_NHD, seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0),
        H, scale * LOG2E, ONE=v is None, GROUP=H // G, PAGED=slots.page > 0, FORMAT=k.format, dtype=_kind(q_NHE), num_warps=4,
    )  # fmt: skip
    return out_NHD
