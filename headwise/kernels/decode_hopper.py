"""Decode attention on Hopper: cached keys stream through TMA while one warpgroup multiplies. Gluon, for triton 3.6.

The matrix unit wants 64 rows and a decode step has few queries, so the roles are turned round: keys are the rows.

    S^T = K q^T          (64 keys, rows of queries)       P = softmax over keys
    O^T += V^T P         (D, rows of queries)

A cache of another type is read by eight more warps, which hold the next tile in registers while they write this one as
f16 to shared memory; nothing is converted outside the kernel. They wait for memory, so it is slower than its bytes allow.

Launches overlap (programmatic dependent launch): the keys of earlier steps are fetched while the launch before still runs, the
step's own keys and queries after it has ended. So nothing may write keys of earlier steps in the two launches before.

A row is a (query, head) pair of one group; a key is read once for all of them. The keys of a sequence are shared between
`n_splits` programs; the last one to finish merges the partial results (or, where they are many, a second kernel does).

Shapes    as in `attend`. At most 32 * 512 / D rows (queries times heads of a group).
Cost      the bytes of the keys in sight, once, and n_splits * rows * D * 8 bytes of partial results through L2.
"""

from __future__ import annotations

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headwise.kernels.attend import LOG2E, merge
from headwise.kernels.stored import FLOAT, FP8, Q4_0, Q8_0, Sequences, Slots, Stored

BN = 64  # keys of a tile, which is a page


@gluon.jit
def _share(starts, lengths, window, ring, n_splits, WINDOWED: gl.constexpr, RING: gl.constexpr):
    """The tiles [first, last) of this program, and what the tiles of its sequence are."""
    seq = gl.program_id(2)
    q0 = gl.load(starts + seq)
    T = gl.load(starts + seq + 1) - q0
    n = gl.load(lengths + seq)
    lo = 0
    if WINDOWED:
        lo = gl.maximum(0, n - T - window + 1)
        if not RING:
            lo = lo // 64 * 64
    run = n - lo
    if RING:
        run = gl.minimum(run, ring - lo % ring)
    tiles_run = gl.cdiv(run, 64)
    tiles = tiles_run + gl.cdiv(n - lo - run, 64)
    split = gl.program_id(0)
    first = split * tiles // n_splits
    last = (split + 1) * tiles // n_splits
    if T == 0:
        last = first
    return seq, q0, T, n, lo, run, tiles_run, first, last


@gluon.jit
def _load(
    kd, td, vd, starts, lengths, table, table_stride, ring, window, n_splits, sk, st, sv, k_full, v_full, k_empty, v_empty,
    D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = _share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    for i in range(first, last):
        if PAGED:
            slot = gl.load(table + seq * table_stride + lo // 64 + i) * 64
        else:
            slot = gl.load(table + seq)
            if RING:
                slot += gl.where(i < tiles_run, lo % ring + i * 64, (i - tiles_run) * 64)
            else:
                slot += lo + i * 64
        newest = lo + i * 64 + 63
        if RING:
            newest = gl.where(i < tiles_run, newest, lo + run + (i - tiles_run) * 64 + 63)
        if newest >= n - T:
            gdc_wait()
        s = (i - first) % NS
        ph = (((i - first) // NS) & 1) ^ 1
        mbarrier.wait(k_empty.index(s), ph)
        mbarrier.expect(k_full.index(s), 64 * (D + R) * 2)
        tma.async_copy_global_to_shared(kd, [slot, g * (D + R)], k_full.index(s), sk.index(s))
        if R > 0:
            tma.async_copy_global_to_shared(td, [slot, g * (D + R) + D], k_full.index(s), st.index(s))
        else:
            mbarrier.wait(v_empty.index(s), ph)
            mbarrier.expect(v_full.index(s), 64 * D * 2)
            tma.async_copy_global_to_shared(vd, [slot, g * D], v_full.index(s), sv.index(s))


@gluon.jit
def _fetch(data, scales, rows, W: gl.constexpr, AT: gl.constexpr, N: gl.constexpr, FORMAT: gl.constexpr, L4: gl.constexpr):
    """Stored words of values [AT, AT + N) of 64 rows, (64, N / 64, lanes, 4), and each 64 values' two scales, (64, N / 64).

    Lanes side by side hold 64 values: no two write one bank of swizzled shared memory. A lane's 16 bytes are a run.
    """
    LANES: gl.constexpr = 2 if FORMAT == Q4_0 else 4
    l3: gl.constexpr = gl.SliceLayout(3, L4)
    l2: gl.constexpr = gl.SliceLayout(2, l3)
    group = gl.arange(0, N // 64, gl.SliceLayout(0, l2))
    lane = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(0, l3)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L4))))
    row = gl.expand_dims(rows, 1)
    at = row * (W // 64 * LANES * 4) + gl.expand_dims(AT // 64 + group, 0) * (LANES * 4)
    at3 = gl.expand_dims(at, 2) + gl.expand_dims(gl.expand_dims(lane, 0), 0) * 4
    x = gl.load(data + gl.expand_dims(at3, 3) + gl.expand_dims(gl.expand_dims(gl.expand_dims(word, 0), 0), 0))
    d = gl.zeros([64, N // 64], gl.int32, l2)
    if FORMAT != FP8:
        d = gl.load(scales + row * (W // 64) + gl.expand_dims(AT // 64 + group, 0))
    return x, d


@gluon.jit
def _halves(x, d, N: gl.constexpr, FORMAT: gl.constexpr, L4: gl.constexpr):
    """The values of what `_fetch` gave, pairs of f16 in words, (64, N / 2); f16 holds them better than bf16 would.

    A byte u in the low half of 0x6400 is the f16 number 1024 + u; taking 1024 and the format's offset away leaves it exact.
    """
    LANES: gl.constexpr = 2 if FORMAT == Q4_0 else 4
    l3: gl.constexpr = gl.SliceLayout(3, L4)
    lane = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(0, l3)))
    select = gl.where(lane < LANES // 2, 0x1010, 0x3232)  # the half word that is this lane's scale, twice
    d3, select3 = gl.broadcast(gl.expand_dims(d, 2), gl.expand_dims(gl.expand_dims(select, 0), 0))
    twice = gl.inline_asm_elementwise("prmt.b32 $0, $1, $1, $2;", "=r,r,r", [d3, select3], dtype=gl.int32, is_pure=True, pack=1)
    d4, _ = gl.broadcast(gl.expand_dims(twice, 3), x)
    if FORMAT == FP8:
        a, b = gl.inline_asm_elementwise(
            """{
            .reg .b16 u, v;
            mov.b32 {u, v}, $2;
            cvt.rn.f16x2.e4m3x2 $0, u;
            cvt.rn.f16x2.e4m3x2 $1, v;
            }""",
            "=r,=r,r", [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(a, b).reshape([64, N // 2])
    elif FORMAT == Q8_0:
        a, b = gl.inline_asm_elementwise(
            """{
            .reg .b32 u, a, b, c;
            mov.b32 c, 0x64806480;
            xor.b32 u, $2, 0x80808080;
            prmt.b32 a, u, 0x64646464, 0x4140;
            prmt.b32 b, u, 0x64646464, 0x4342;
            sub.f16x2 a, a, c;
            sub.f16x2 b, b, c;
            mul.f16x2 $0, a, $3;
            mul.f16x2 $1, b, $3;
            }""",
            "=r,=r,r,r", [x, d4], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(a, b).reshape([64, N // 2])
    else:
        a, b, e, f = gl.inline_asm_elementwise(
            """{
            .reg .b32 u, v, a, b, c;
            mov.b32 c, 0x64086408;
            and.b32 u, $4, 0x0f0f0f0f;
            shr.u32 v, $4, 4;
            and.b32 v, v, 0x0f0f0f0f;
            prmt.b32 a, u, 0x64646464, 0x4140;
            prmt.b32 b, u, 0x64646464, 0x4342;
            sub.f16x2 a, a, c;
            sub.f16x2 b, b, c;
            mul.f16x2 $0, a, $5;
            mul.f16x2 $1, b, $5;
            prmt.b32 a, v, 0x64646464, 0x4140;
            prmt.b32 b, v, 0x64646464, 0x4342;
            sub.f16x2 a, a, c;
            sub.f16x2 b, b, c;
            mul.f16x2 $2, a, $5;
            mul.f16x2 $3, b, $5;
            }""",
            "=r,=r,=r,=r,r,r", [x, d4], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return gl.join(gl.join(a, b), gl.join(e, f)).permute((0, 1, 2, 5, 3, 4)).reshape([64, N // 2])


@gluon.jit
def _rows(
    i, lo, run, tiles_run, ring, n, seq, g, G, table, table_stride, RING: gl.constexpr, PAGED: gl.constexpr, L4: gl.constexpr
):  # fmt: skip
    """Row numbers (slot * G + g) of tile i's keys; past the end of its run, the run's last."""
    keys = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L4))))
    pos = lo + i * 64
    end = n
    if RING:
        end = gl.where(i < tiles_run, lo + run, n)
        pos = gl.where(i < tiles_run, pos, lo + run + (i - tiles_run) * 64)
    p = gl.minimum(pos + keys, end - 1)
    if PAGED:
        slot = gl.load(table + seq * table_stride + p // 64).to(gl.int64) * 64 + p % 64
    else:
        slot = gl.load(table + seq).to(gl.int64)
        if RING:
            slot += p % ring
        else:
            slot += p
    return slot * G + g


@gluon.jit
def _convert(
    kd, ks, vd, vs, starts, lengths, table, table_stride, ring, window, n_splits, G, sk, st, sv, k_full, v_full, k_empty, v_empty,
    D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr,
    FORMAT: gl.constexpr,
):  # fmt: skip
    """Tiles of another type into shared memory as floats; each tile in parts of P values and a last part (rotated dims, or V)."""
    seq, q0, T, n, lo, run, tiles_run, first, last = _share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    gdc_wait()
    P: gl.constexpr = min(D, 256)
    words: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D // 2], gl.int32)
    words_t: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, max(R, 64) // 2], gl.int32)
    # lanes of a warp write 64 columns of 8 (16) rows: side by side in one slab of swizzled shared memory, no two in one bank
    if FORMAT == Q4_0:
        l4: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [16, 1, 2, 1], [4, 2, 1, 1], [3, 2, 1, 0])
    else:
        l4: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [8, 1, 4, 1], [8, 1, 1, 1], [3, 2, 1, 0])
    if first < last:
        rows = _rows(first, lo, run, tiles_run, ring, n, seq, g, G, table, table_stride, RING, PAGED, l4)
        x, s = _fetch(kd, ks, rows, D + R, 0, P, FORMAT, l4)
        z, u = x, s
        if D > P:
            z, u = _fetch(kd, ks, rows, D + R, P, P, FORMAT, l4)
        if R > 0:
            y, t = _fetch(kd, ks, rows, D + R, D, R, FORMAT, l4)
        else:
            y, t = _fetch(vd, vs, rows, D, 0, D, FORMAT, l4)
        for i in range(first, last):  # a part is written, and the same part of the next tile fetched into its registers
            j = gl.minimum(i + 1, last - 1)
            b = (i - first) % NS
            ph = (((i - first) // NS) & 1) ^ 1
            rows = _rows(j, lo, run, tiles_run, ring, n, seq, g, G, table, table_stride, RING, PAGED, l4)
            mbarrier.wait(k_empty.index(b), ph)
            k_words = sk.index(b)._reinterpret(gl.int32, [64, D // 2], words)
            k_words.slice(0, P // 2, dim=1).store(_halves(x, s, P, FORMAT, l4))
            x, s = _fetch(kd, ks, rows, D + R, 0, P, FORMAT, l4)
            if D > P:
                k_words.slice(P // 2, P // 2, dim=1).store(_halves(z, u, P, FORMAT, l4))
                z, u = _fetch(kd, ks, rows, D + R, P, P, FORMAT, l4)
            if R > 0:
                st.index(b)._reinterpret(gl.int32, [64, R // 2], words_t).store(_halves(y, t, R, FORMAT, l4))
                fence_async_shared()
                mbarrier.arrive(k_full.index(b), count=1)
                y, t = _fetch(kd, ks, rows, D + R, D, R, FORMAT, l4)
            else:
                fence_async_shared()
                mbarrier.arrive(k_full.index(b), count=1)
                mbarrier.wait(v_empty.index(b), ph)
                sv.index(b)._reinterpret(gl.int32, [64, D // 2], words).store(_halves(y, t, D, FORMAT, l4))
                fence_async_shared()
                mbarrier.arrive(v_full.index(b), count=1)
                y, t = _fetch(vd, vs, rows, D, 0, D, FORMAT, l4)


@gluon.jit
def _consume(
    q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G, q_stride,
    sq, sqt, sk, st, sv, sp, k_full, v_full, k_empty, v_empty,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr, SP: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = _share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ql: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    gdc_wait()
    r_q = gl.arange(0, ROWS, gl.SliceLayout(1, ql))
    q_row = (q0 + r_q // GROUP).to(gl.int64) * q_stride + (g * GROUP + r_q % GROUP) * (D + R)
    ok_q = gl.expand_dims(r_q < T * GROUP, 1)
    d_q = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, ql)), 0)
    q = gl.load(q_ptr + gl.expand_dims(q_row, 1) + d_q, mask=ok_q, other=0.0)
    qt = q
    if R > 0:
        r_t = gl.expand_dims(gl.arange(0, R, gl.SliceLayout(0, ql)), 0)
        qt = gl.load(q_ptr + gl.expand_dims(q_row, 1) + D + r_t, mask=ok_q, other=0.0)
    scales = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(0, sl)) * scale
    if q.dtype != dtype:  # a bf16 query as f16: by a power of two into its range, exact
        largest = gl.maximum(gl.max(gl.abs(q.to(gl.float32)), 1), gl.max(gl.abs(qt.to(gl.float32)), 1))
        power = gl.exp2(gl.ceil(gl.log2(gl.maximum(largest, 1e-30))))
        q = (q.to(gl.float32) / gl.expand_dims(power, 1)).to(dtype)
        qt = (qt.to(gl.float32) / gl.expand_dims(power, 1)).to(dtype)
        scales = scales * gl.convert_layout(power, gl.SliceLayout(0, sl))
    sq.store(q)
    if R > 0:
        sqt.store(qt)
    fence_async_shared()
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, sl))
    pos_q = n - T + rows // GROUP
    keys = gl.arange(0, 64, gl.SliceLayout(1, sl))
    acc = gl.zeros([D, ROWS], gl.float32, sl)
    m = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(0, sl))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, sl))
    for i in range(first, last):
        b = (i - first) % NS
        ph = ((i - first) // NS) & 1
        mbarrier.wait(k_full.index(b), ph)
        s = gl.zeros([64, ROWS], gl.float32, sl)
        s = warpgroup_mma(sk.index(b), sq.permute((1, 0)), s, use_acc=False, is_async=True)
        if R > 0:
            s = warpgroup_mma(st.index(b), sqt.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if R == 0:
            mbarrier.arrive(k_empty.index(b), count=1)
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
        a = gl.exp2(m - m_new)
        l = l * a + gl.sum(p, 0)
        m = m_new
        sp.permute((1, 0)).store(p.to(dtype))
        fence_async_shared()
        acc = acc * gl.expand_dims(a, 0)
        if R > 0:
            acc = warpgroup_mma(sk.index(b).permute((1, 0)), sp.permute((1, 0)), acc, is_async=True)
        else:
            mbarrier.wait(v_full.index(b), ph)
            acc = warpgroup_mma(sv.index(b).permute((1, 0)), sp.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if R > 0:
            mbarrier.arrive(k_empty.index(b), count=1)
        else:
            mbarrier.arrive(v_empty.index(b), count=1)
    dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(1, sl)), 1)
    h = g * GROUP + rows % GROUP
    valid = rows < T * GROUP
    if MERGE == 0:
        if SINKS:
            l += gl.exp2(gl.load(sinks_ptr + h, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634 - m)
        at = ((q0 + rows // GROUP).to(gl.int64) * H + h) * D
        o = (acc / gl.expand_dims(l, 0)).to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + gl.expand_dims(at, 0) + dims, o, mask=gl.expand_dims(valid, 0))
    else:
        base = ((seq * G + g) * n_splits + gl.program_id(0)).to(gl.int64) * ROWS
        gl.store(part_ptr + gl.expand_dims((base + rows) * D, 0) + dims, acc, mask=gl.expand_dims(valid, 0))
        gl.store(stat_ptr + (base + rows) * 2, m, mask=valid)
        gl.store(stat_ptr + (base + rows) * 2 + 1, l, mask=valid)
        if MERGE == 1:
            gl.thread_barrier()
            done = gl.atomic_add(count_ptr + seq * G + g, 1, sem="acq_rel")
            if done == n_splits - 1:
                ml: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
                sx = gl.arange(0, SP, gl.SliceLayout(1, ml))
                dx = gl.arange(0, D, gl.SliceLayout(0, ml))
                in_s = sx < n_splits
                for r in gl.static_range(MERGED):
                    x_base = ((seq * G + g) * n_splits + sx).to(gl.int64) * ROWS + r
                    x = gl.load(part_ptr + gl.expand_dims(x_base * D, 1) + gl.expand_dims(dx, 0), mask=gl.expand_dims(in_s, 1),
                    other=0.0,
                                cache_modifier=".cg")  # fmt: skip
                    m_s = gl.load(stat_ptr + x_base * 2, mask=in_s, other=-1e30, cache_modifier=".cg")
                    l_s = gl.load(stat_ptr + x_base * 2 + 1, mask=in_s, other=0.0, cache_modifier=".cg")
                    top = gl.max(m_s, 0)
                    w = gl.exp2(m_s - top)
                    total = gl.sum(w * l_s, 0)
                    h_r = g * GROUP + r % GROUP
                    if SINKS:
                        total += gl.exp2(gl.load(sinks_ptr + h_r).to(gl.float32) * 1.4426950408889634 - top)
                    o = gl.sum(x * gl.expand_dims(w, 1), 0) / total
                    at = ((q0 + r // GROUP).to(gl.int64) * H + h_r) * D
                    gl.store(out_ptr + at + dx, o.to(out_ptr.dtype.element_ty), mask=dx < D * (r < T * GROUP))
                gl.store(count_ptr + seq * G + g, 0)


@gluon.jit
def _decode(
    kd, ks, td, vd, vs, q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, table, table_stride, ring,
    window,
    scale,
    n_splits, G, q_stride,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr, NS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr,
    SP: gl.constexpr,
    FORMAT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    ql: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    sq = gl.allocate_shared_memory(dtype, [ROWS, D], ql)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    sk = gl.allocate_shared_memory(dtype, [NS, 64, D], tile)
    pl: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], dtype)
    sp = gl.allocate_shared_memory(dtype, [ROWS, 64], pl)
    if R > 0:
        tl_: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, R], dtype)
        sqt = gl.allocate_shared_memory(dtype, [ROWS, R], tl_)
        tail: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, R], dtype)
        st = gl.allocate_shared_memory(dtype, [NS, 64, R], tail)
        sv = sk
    else:
        sqt = sq
        st = sk
        sv = gl.allocate_shared_memory(dtype, [NS, 64, D], tile)
    k_full = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [NS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
    fence_async_shared()
    if FORMAT == FLOAT:
        gl.warp_specialize([
            (_consume, (q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G,
                        q_stride, sq, sqt, sk, st, sv, sp, k_full, v_full, k_empty, v_empty,
                        H, GROUP, ROWS, D, R, NS, WINDOWED, RING, SINKS, MERGE, MERGED, SP, dtype)),
            (_load, (kd, td, vd, starts, lengths, table, table_stride, ring, window, n_splits, sk, st, sv, k_full, v_full, k_empty,
                     v_empty, D, R, NS, WINDOWED, RING, PAGED)),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G,
                        q_stride, sq, sqt, sk, st, sv, sp, k_full, v_full, k_empty, v_empty,
                        H, GROUP, ROWS, D, R, NS, WINDOWED, RING, SINKS, MERGE, MERGED, SP, dtype)),
            (_convert, (kd, ks, vd, vs, starts, lengths, table, table_stride, ring, window, n_splits, G, sk, st, sv, k_full, v_full,
                        k_empty, v_empty, D, R, NS, WINDOWED, RING, PAGED, FORMAT)),
        ], [8], [200])  # fmt: skip


def pairs(x: Stored) -> Tensor:
    """Scales two by two, as words."""
    return x.data_SGW if x.scales_SGB is None else x.scales_SGB.view(torch.int32)


def attend_decode(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float,
    window: int | None = None, sinks_H: Tensor | None = None, n_splits: int = 1, scratch: Tensor | None = None,
    count: Tensor | None = None, overlap: bool = True,
) -> Tensor:  # fmt: skip
    """Decode, or the verification of a few draft tokens.

    Args:
        scratch: `partial_floats` fp32 values where keys are split.
        count: int32 zeros, one a sequence and KV head: the last program merges, in this launch, which pays for few rows. It
            leaves zeros. None: a second launch merges.
        overlap: begin while the launch before still runs; False where that one, or the one before it, may write the keys.
    """
    _, H, E = q_NHE.shape
    D = out_NHD.shape[-1]
    S, G, _ = k.data_SGW.shape
    R, group, B = E - D, H // G, seqs.lengths_B.shape[0]
    rows = max(8, triton.next_power_of_2(seqs.max_queries * group))
    if rows * D > 32 * 512:
        raise ValueError(f"attend_decode: {seqs.max_queries} queries of {group} heads are {rows} rows (<= {32 * 512 // D})")
    native = int(k.format.value) == int(FLOAT.value)
    dtype = gl.bfloat16 if native and q_NHE.dtype == torch.bfloat16 else gl.float16
    NS = min(8, max(2, (190 * 1024 - rows * E * 2) // (64 * (E if v is None else 2 * D) * 2)))

    def desc(x: Tensor, columns: int) -> TensorDescriptor:
        flat = x.view(S, -1)
        return TensorDescriptor.from_tensor(flat, [64, columns], gl.NVMMASharedLayout.get_default_for([64, columns], dtype))

    if native:
        kd = desc(k.data_SGW, D)
        td, vd = desc(k.data_SGW, R) if R else kd, kd if v is None else desc(v.data_SGW, D)
    else:
        kd = td = k.data_SGW.view(torch.int32)
        vd = kd if v is None else v.data_SGW.view(torch.int32)
    part = stat = q_NHE
    if n_splits > 1:
        n = B * G * n_splits * rows
        if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < n * (D + 2):
            raise ValueError(f"attend_decode: {n_splits} splits need scratch of {n * (D + 2)} fp32 values, got {scratch}")
        part, stat = scratch[: n * D], scratch[n * D :]
    mode = 0 if n_splits == 1 else 2 if count is None else 1
    _decode[(n_splits, G, B)](
        kd, pairs(k), td, vd, pairs(k if v is None else v), q_NHE, out_NHD,
        q_NHE if sinks_H is None else sinks_H, part, stat, seqs.lengths_B if count is None else count, seqs.starts_B1,
        seqs.lengths_B,
        slots.table, slots.table.stride(0), max(1, slots.ring), window or 0, scale * LOG2E, n_splits, G, q_NHE.stride(0),
        H=H, GROUP=group, ROWS=rows, D=D, R=R, NS=NS, WINDOWED=window is not None, RING=slots.ring > 0, PAGED=slots.page > 0,
        SINKS=sinks_H is not None, MERGE=mode, MERGED=seqs.max_queries * group, SP=triton.next_power_of_2(n_splits),
        FORMAT=k.format,
        dtype=dtype, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    if mode == 2:
        merge(part, stat, out_NHD, sinks_H, seqs, G=G, n_splits=n_splits, blocks=1, rows=rows, early=True)
    return out_NHD
