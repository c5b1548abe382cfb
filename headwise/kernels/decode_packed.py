"""Decode attention on Hopper over fp8, q8_0 and q4_0: bytes stay bytes until they are in a matrix product's registers.

    S^T = K q^T          (64 keys, rows of queries)       P = softmax over keys
    O^T += V^T P         (D, rows of queries)

As in `decode_hopper`, keys are the rows. One warp fetches tiles as they are stored (TMA; scales by asynchronous copies), a
warpgroup multiplies; two programs share a multiprocessor. A tile crosses shared memory as bytes, twice, and never as floats.

Blocks    A scale belongs to 32 values of a key. Over values, a product of integers sums a block exactly, and the sum is scaled:
          keys are never converted (q8_0 does not even pass registers), queries are 16-bit numbers whose two bytes are rows of
          their own. Over keys, a warp's 16 rows are values of one block, so that its scales go to the keys' shares of the
          softmax. There a stored value is offset by 128 (q4_0: 8): a product of that number and the shares takes it away.
fp8       Without blocks: values become f16 in the registers of both products. A sum over values does not mind their order, so a
          thread reads a run of a key's bytes, and queries are stored in that order (`_query_column`).
V^T       A transposing load brings the same two bytes of two keys that follow each other into a register. An integer u < 256 in the
          low bits of an f16 is u * 2^-24 (a subnormal number), which the product takes as it is.
Shapes    as in `attend`: head_dim 128, 256, 512. At most 16 * 512 / D rows (queries times heads of a group).
Accuracy  as in `attend`. Queries over blocks are rounded to 2^-16 of their row's largest value; scales are at most 255 (values of
          32,000).
Cost      the bytes of the keys in sight, once; about 3 instructions a byte, fp8 2. Source: FlashMLA (DeepSeek 2025) for the roles.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
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

ROOM = gl.constexpr(8.0)  # shares are up to 2**8: their products with scales stay where f16 has all its bits


@gluon.constexpr_function
def _words_a_row(n_values, FORMAT):
    """32-bit words of a stored row."""
    return n_values // 8 if FORMAT == Q4_0 else n_values // 4


@gluon.constexpr_function
def _bits(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _float_layout(words):
    """(64 keys, words) of fp8: the first operand of a product over values. Four lanes share a key, each reads a run of it."""
    word = [[0, 1 << b] for b in range(words.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*word[:-2], [8, 0]], [*word[-2:], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, words]
    )


@gluon.constexpr_function
def _nibble_layout():
    """(64 keys, 16 bytes) of a block of q4_0: the first operand of a product over 32 bytes, half of it."""
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 16]
    )


@gluon.constexpr_function
def _scale_layout(n_blocks):
    """(64 keys, blocks): scales as a thread needs them for its two rows of a product's result."""
    block = [[0, 1 << b] for b in range(n_blocks.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*block, [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, n_blocks]
    )


@gluon.constexpr_function
def _pair_layout(pairs, keys):
    """(4 blocks of so many pairs of bytes, keys): the first operand of a product over keys, each warp a block."""
    row = [[1 << b, 0] for b in range(pairs.bit_length() + 1)]
    key = [[0, 1 << b] for b in range(keys.bit_length() - 1)]
    return gl.DistributedLinearLayout([key[0], *row[3:-2], *key[3:]], [*key[1:3], *row[:3]], row[-2:], [], [4 * pairs, keys])


@gluon.jit
def _query_column(j, WORDS: gl.constexpr):
    """Which value of a slab of WORDS words of fp8 stands in column j of the stored queries."""
    quarter = j // 2 % 4  # which of the four lanes of a key
    low = j % 2 + j // 8 % 2 * 2  # the byte
    return (quarter * (WORDS // 4) + j // 16) * 4 + low


@gluon.jit
def _fetch_scales(ptr, slot, left, out, G, AT: gl.constexpr, N: gl.constexpr, W: gl.constexpr, CUT: gl.constexpr):
    """Scales of values [AT, AT + N) of 64 slots from `slot` on, two to a word, into shared memory, asynchronously."""
    columns: gl.constexpr = N // 128  # of 8 bytes, as a row of scales begins at a multiple of them only
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [32 // columns, columns], [1, 1], [1, 0])
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
        mbarrier.expect(full.index(s), 64 * BYTES)
        tma.async_copy_global_to_shared(kd, [slot, g * W], full.index(s), sk.index(s))
        if R > 0:
            tma.async_copy_global_to_shared(td, [slot, g * W + 4 * _words_a_row(D, FORMAT)], full.index(s), st.index(s))
        else:
            tma.async_copy_global_to_shared(vd, [slot, g * W], full.index(s), sv.index(s))
        if FORMAT != FP8:
            _fetch_scales(ks, slot, n_slots - slot, ak.index(s), G, 0, D, D + R, CUT)
            if R > 0:
                _fetch_scales(ks, slot, n_slots - slot, at.index(s), G, D, R, D + R, CUT)
            else:
                _fetch_scales(vs, slot, n_slots - slot, av.index(s), G, 0, D, D, CUT)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)


@gluon.jit
def _float_scores(s, tile, sq, W: gl.constexpr):
    """Adds the product of fp8 keys, W words each, and the queries in `sq`, whose order is that of `_query_column`."""
    N: gl.constexpr = min(W, 32)
    layout: gl.constexpr = _float_layout(N)
    dot: gl.constexpr = gl.DotOperandLayout(0, s.type.layout, 2)
    words = tile._reinterpret(gl.int32, [64, W], gl.NVMMASharedLayout.get_default_for([64, W], gl.int32))
    for t in gl.static_range(W // N):
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
            "=h,=h,=h,=h,r", [words.slice(t * N, N, dim=1).load(layout)],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=1,
        )  # fmt: skip
        x = gl.join(gl.join(a, b), gl.join(c, d)).reshape([64, 4, N // 4, 2, 2]).permute((0, 2, 4, 1, 3))
        x = gl.convert_layout(x.reshape([64, 4 * N]), dot, assert_trivial=True)
        s = warpgroup_mma(x, sq.slice(t * 4 * N, 4 * N, dim=1).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
    return warpgroup_mma_wait(0, deps=(s,))


@gluon.jit
def _scales(scales, N: gl.constexpr, layout: gl.constexpr):
    """The scales (64 keys, N blocks) of a tile as N vectors of keys."""
    apart = (scales.load(_scale_layout(N)),)
    for _ in gl.static_range(_bits(N)):
        halves = ()
        for i in gl.static_range(len(apart)):
            halves = halves + gl.split(apart[i].reshape([64, 2, apart[i].shape[1] // 2]).permute((0, 2, 1)))
        apart = halves
    out = ()
    for i in gl.static_range(N):
        out = out + (gl.convert_layout(apart[i].reshape([64]), gl.SliceLayout(1, layout), assert_trivial=True).to(gl.float32),)
    return out


@gluon.jit
def _add_blocks(s, products, LEFT: gl.constexpr, scales, AT: gl.constexpr):
    """Adds sums of blocks from AT on, each by its scale, once no more than LEFT later ones are under way.

    Sums are integers: (64 keys, rows by their high bytes, rows by their low ones).
    """
    ROWS: gl.constexpr = s.shape[1]
    if len(products) == 1:
        sums = (warpgroup_mma_wait(LEFT, deps=products),)
    else:
        sums = warpgroup_mma_wait(LEFT, deps=products)
    for i in gl.static_range(len(products)):
        high, low = gl.split(sums[i].reshape([64, 2, ROWS]).permute((0, 2, 1)))
        total = gl.convert_layout((high * 256 + low).to(gl.float32), s.type.layout, assert_trivial=True)
        s += total * gl.expand_dims(scales[AT + i], 1)
    return s


@gluon.jit
def _integer_scores(s, tile, scales, sq, N: gl.constexpr, FORMAT: gl.constexpr):
    """Adds the product of keys of N values, as the integers they are stored as, and the queries in `sq`."""
    ROWS: gl.constexpr = s.shape[1]
    il: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * ROWS, 32])
    SOME: gl.constexpr = min(N // 32, max(1, (32 if FORMAT == Q8_0 else 16) // ROWS))  # blocks in one wait
    sl: gl.constexpr = s.type.layout
    of_block = _scales(scales, N // 32, sl)
    before = ()
    for first in gl.static_range(0, N // 32, SOME):
        now = ()
        for j in gl.static_range(first, first + SOME):
            if FORMAT == Q8_0:
                x = tile._reinterpret(gl.int8, [64, N], gl.NVMMASharedLayout.get_default_for([64, N], gl.int8)).slice(
                    j * 32, 32, dim=1
                )
            else:  # the sign bit of a nibble is the other one: in the high half of a byte it is 16 times its value
                low, high = gl.inline_asm_elementwise(
                    """{
                    .reg .b32 x;
                    shl.b32 x, $2, 4;
                    lop3.b32 $0, x, 0xf0f0f0f0, 0x80808080, 0x6a;
                    lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a;
                    }""",
                    "=r,=r,r", [tile.slice(j * 16, 16, dim=1).load(_nibble_layout())], dtype=(gl.int8, gl.int8), is_pure=True,
                    pack=4,
                )  # fmt: skip
                x = gl.join(low, high).permute((0, 2, 1)).reshape([64, 32])
                x = gl.convert_layout(x, gl.DotOperandLayout(0, il, 4), assert_trivial=True)
            queries = sq.slice(j * 32, 32, dim=1).permute((1, 0))
            zero = gl.zeros([64, 2 * ROWS], gl.int32, il)
            now = now + (warpgroup_mma(x, queries, zero, use_acc=False, is_async=True),)
        if ROWS < 32:  # else their registers would spill
            if first > 0:
                s = _add_blocks(s, before, SOME, of_block, first - SOME)
            before = now
        else:
            s = _add_blocks(s, now, 0, of_block, first)
    if ROWS < 32:
        s = _add_blocks(s, before, 0, of_block, N // 32 - SOME)
    return s


@gluon.jit
def _for_values(
    tile, SLAB: gl.constexpr, KEY: gl.constexpr, KEYS: gl.constexpr, W: gl.constexpr, FORMAT: gl.constexpr, dot: gl.constexpr
):
    """Four blocks, from block 4 * SLAB on, of keys from KEY on: (4, 16 values, KEYS) for either half of their values."""
    pairs = tile._reinterpret(gl.int16, [64, 2 * W], gl.NVMMASharedLayout.get_default_for([64, 2 * W], gl.int16))
    N: gl.constexpr = 8 if FORMAT == Q4_0 else 16  # pairs of bytes of a block
    x = pairs.slice(SLAB * 4 * N, 4 * N, dim=1).slice(KEY, KEYS).permute((1, 0)).load(_pair_layout(N, KEYS))
    if FORMAT == FP8:
        ys = gl.inline_asm_elementwise(
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
    elif FORMAT == Q8_0:
        ys = gl.inline_asm_elementwise(
            """{
            .reg .b32 y;
            lop3.b32 $0, $2, 0x00ff00ff, 0x00800080, 0x6a;
            shr.u32 y, $2, 8;
            lop3.b32 $1, y, 0x00ff00ff, 0x00800080, 0x6a;
            }""",
            "=r,=r,r", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            """{
            .reg .b32 x, y, z;
            shr.u32 x, $4, 8;
            shr.u32 y, $4, 4;
            shr.u32 z, $4, 12;
            and.b32 $0, $4, 0x000f000f;
            and.b32 $1, x, 0x000f000f;
            and.b32 $2, y, 0x000f000f;
            and.b32 $3, z, 0x000f000f;
            }""",
            "=r,=r,=r,=r,r", [x], dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
        ys = (_both_bytes(a, b, KEYS), _both_bytes(c, d, KEYS))
    out = ()
    for i in gl.static_range(2):
        out = out + (gl.convert_layout(ys[i].reshape([4, 16, KEYS]), dot, assert_trivial=True),)
    return out


@gluon.jit
def _product(a, b):
    return gl.inline_asm_elementwise("mul.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _both_bytes(a, b, KEYS: gl.constexpr):
    """Values of the first and the second byte of a pair, (4 blocks of 8 pairs, keys), as (4 blocks, 2 bytes of 8 pairs, keys)."""
    return gl.join(a.reshape([4, 8, KEYS]), b.reshape([4, 8, KEYS])).permute((0, 3, 1, 2))


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
    col: gl.constexpr = gl.SliceLayout(0, sl)
    vl: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])  # a warp has whole blocks
    of_v: gl.constexpr = gl.DotOperandLayout(0, vl, 2)
    of_p: gl.constexpr = gl.DotOperandLayout(1, vl, 2)
    WD: gl.constexpr = _words_a_row(D, FORMAT)
    WR: gl.constexpr = _words_a_row(R, FORMAT)
    KEYS: gl.constexpr = 64 if ROWS < 32 else 16  # of a product over keys: its operands share the registers with the sums
    OFFSET: gl.constexpr = 8 if FORMAT == Q4_0 else 128  # what is stored of 0, unsigned
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
        accs = accs + (gl.zeros([4, 16, ROWS], gl.float32, vl),)
    m = gl.full([ROWS], -1e30, gl.float32, col)
    l = gl.zeros([64, ROWS], gl.float32, sl)
    for i in range(first, last):
        b = (i - first) % NS
        mbarrier.wait(full.index(b), ((i - first) // NS) & 1)
        s = gl.zeros([64, ROWS], gl.float32, sl)
        if FORMAT == FP8:
            s = _float_scores(s, sk.index(b), sq, WD)
            if R > 0:
                s = _float_scores(s, st.index(b), sqt, WR)
        else:
            s = _integer_scores(s, sk.index(b), ak.index(b), sq, D, FORMAT)
            if R > 0:
                s = _integer_scores(s, st.index(b), at.index(b), sqt, R, FORMAT)
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
        m_new = gl.maximum(m, gl.max(s, 0) * scales - ROOM)
        p = gl.exp2(s * gl.expand_dims(scales, 0) - gl.expand_dims(m_new, 0))
        a = gl.exp2(m - m_new)
        l = l * gl.expand_dims(a, 0) + p
        m = m_new
        a = gl.convert_layout(a, gl.SliceLayout(0, gl.SliceLayout(0, vl)), assert_trivial=True)
        a = gl.expand_dims(gl.expand_dims(a, 0), 0)
        sp.permute((1, 0)).store(p.to(gl.float16))
        if FORMAT != FP8:  # scales of two keys side by side
            ts.permute((1, 0)).store((ak if R > 0 else av).index(b).load(by_row))
        for key in gl.static_range(0, 64, KEYS):
            y = gl.expand_dims(sp.slice(key, KEYS, dim=1).permute((1, 0)).load(gl.SliceLayout(0, of_p)), 0)
            new = ()
            for t in gl.static_range(D // 128):
                halves = _for_values(sk.index(b) if R > 0 else sv.index(b), t, key, KEYS, WD, FORMAT, of_v)
                zero = gl.zeros([4, 16, ROWS], gl.float32, vl)
                minus = gl.full([4, 16, KEYS], -OFFSET / 2**24, gl.float16, of_v)
                if FORMAT == FP8:
                    of_block = gl.broadcast(y, gl.zeros([4, KEYS, ROWS], gl.float16, of_p))[0]
                else:
                    d = ts.slice(t * 4, 4, dim=0).slice(key, KEYS, dim=1).load(gl.SliceLayout(2, of_p))
                    of_block = _product(*gl.broadcast(y, gl.expand_dims(d, 2)))
                if KEYS == 64:  # both halves begin with one product
                    start = zero if FORMAT == FP8 else mma_v2(minus, of_block, zero)
                    for e in gl.static_range(2):
                        new = new + (accs[t * 2 + e] * a + mma_v2(halves[e], of_block, start),)
                else:
                    for e in gl.static_range(2):
                        acc = accs[t * 2 + e] * a if key == 0 else accs[t * 2 + e]
                        acc = acc if FORMAT == FP8 else mma_v2(minus, of_block, acc)
                        new = new + (mma_v2(halves[e], of_block, acc),)
            accs = new
        mbarrier.arrive(empty.index(b), count=1)
    total = gl.sum(l, 0)
    r = gl.arange(0, 64, gl.SliceLayout(1, sl))
    if FORMAT == Q4_0:
        first_half = r // 16 * 32 + r % 8 * 2 + r % 16 // 8
    else:
        first_half = r // 16 * 32 + r % 16 * 2
    for t in gl.static_range(D // 128):
        for e in gl.static_range(2):
            values = t * 128 + first_half + e * (16 if FORMAT == Q4_0 else 1)
            acc = gl.convert_layout(accs[t * 2 + e].reshape([64, ROWS]), sl, assert_trivial=True)
            if FORMAT != FP8:
                acc *= 2.0**24
            partials(acc, values, m, total, out_ptr, sinks_ptr, part_ptr, stat_ptr, seq, q0, T, g, G, n_splits, H, GROUP, ROWS, D,
                     SINKS, MERGE)  # fmt: skip
    finish(out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, seq, q0, T, g, G, n_splits, H, GROUP, ROWS, D, SINKS, MERGE, MERGED,
           SP)  # fmt: skip


@gluon.jit
def _store_queries(
    q_ptr, sq, sqt, q0, T, g, q_stride, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr,
    FORMAT: gl.constexpr,
):  # fmt: skip
    """Queries as the products take them, each row divided by what brings it into range; the divisors.

    For fp8 f16, by a power of two. For integers 16 bits, the largest value of a row 127 * 256: the rows' high bytes, then low ones.
    """
    ql: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ql))
    at = gl.expand_dims((q0 + row // GROUP).to(gl.int64) * q_stride + (g * GROUP + row % GROUP) * (D + R), 1)
    ok = gl.expand_dims(row < T * GROUP, 1)
    j = gl.arange(0, D, gl.SliceLayout(0, ql))
    j_r = gl.arange(0, max(R, 8), gl.SliceLayout(0, ql))
    if FORMAT == FP8:
        j = j // 128 * 128 + _query_column(j % 128, 32)
        j_r = _query_column(j_r, R // 4)
    q = gl.load(q_ptr + at + gl.expand_dims(j, 0), mask=ok, other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(q), 1)
    qt = q
    if R > 0:
        qt = gl.load(q_ptr + at + D + gl.expand_dims(j_r, 0), mask=ok, other=0.0).to(gl.float32)
        largest = gl.maximum(largest, gl.max(gl.abs(qt), 1))
    if FORMAT == FP8:
        by = gl.exp2(gl.ceil(gl.log2(gl.maximum(largest, 1e-30))))
        sq.store((q / gl.expand_dims(by, 1)).to(gl.float16))
        if R > 0:
            sqt.store((qt / gl.expand_dims(by, 1)).to(gl.float16))
        return by
    else:
        wrong = gl.sum(q, 1) + gl.sum(qt, 1)  # an integer cannot say that it is no number: the divisor does
        by = gl.maximum(largest, 1e-30) / 32512.0 + 0.0 * wrong
        _store_bytes(sq, q / gl.expand_dims(by, 1), ROWS)
        if R > 0:
            _store_bytes(sqt, qt / gl.expand_dims(by, 1), ROWS)
        if FORMAT == Q4_0:
            by /= 16
        return by


@gluon.jit
def _store_bytes(out, x, ROWS: gl.constexpr):
    """x = 256 * high + low, both in [-128, 127]."""
    whole = gl.floor(x + 0.5).to(gl.int32)
    high = (whole + 128) >> 8
    out.slice(0, ROWS, dim=0).store(high.to(gl.int8))
    out.slice(ROWS, ROWS, dim=0).store((whole - high * 256).to(gl.int8))


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
    of_q: gl.constexpr = f16 if FORMAT == FP8 else gl.int8
    QR: gl.constexpr = ROWS if FORMAT == FP8 else 2 * ROWS
    sq = gl.allocate_shared_memory(of_q, [QR, D], gl.NVMMASharedLayout.get_default_for([QR, D], of_q))
    pl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], f16)
    sp = gl.allocate_shared_memory(f16, [ROWS, 64], pl)
    BD: gl.constexpr = 4 * _words_a_row(D, FORMAT)
    BR: gl.constexpr = 4 * _words_a_row(R, FORMAT)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BD], gl.uint8)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sk = gl.allocate_shared_memory(gl.uint8, [NS, 64, BD], tile)
    ak = gl.allocate_shared_memory(f16, [NS, 64, D // 32], plain)
    if R > 0:
        sqt = gl.allocate_shared_memory(of_q, [QR, R], gl.NVMMASharedLayout.get_default_for([QR, R], of_q))
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
