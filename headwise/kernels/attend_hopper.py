"""Prefill attention on Hopper: TMA loads, asynchronous matrix products, and warps with roles. Gluon, for triton 3.6.

Three kernels. `_one512` is for head_dim 512 with one tensor for K and V; its 64 x 512 accumulator fills half the registers of a
multiprocessor, so two warpgroups hold half of it each, and the products of one hide the softmax of the other:

    warpgroup 1   S(i) = Q K(i) | softmax -> P(i) in shared memory | left half of O += P(i) V(i)
    warpgroup 2                 | right half of O += P(i-1) V(i-1) |
    producer      loads a half of tile i + 2 as soon as that half of tile i is done with

`_pair512` is for a tensor each for K and V: one warpgroup makes scores, with three quarters of the queries in its registers, two
others half of the result each, and all of them load what they free. `_two` is for two tensors up to head_dim 256: two warpgroups
with 64 queries each, products of the next tile issued before the softmax of this one. In a window its programs go on from one block
of queries to the next: the next one's keys and queries come while results leave.

Shapes    as in `attend`; K and V in the type of the queries (bf16, f16); pages of 64 slots, or contiguous.
Cost      512: a key of 64 queries is 1,152 to 2,048 bytes from L2, and 36 clocks of shared memory beside 32 of products.
Source    roles after FlashAttention-3 (Shah et al. 2024) and FlashMLA (DeepSeek 2025).
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headwise.kernels.stored import Sequences, Slots, Stored

LOG2E = 1.4426950408889634
BM, BN = 64, 64  # queries of a warpgroup; keys of a tile, which is a page
LEAST_WIDE = 1024  # windows of less meet too few keys for tiles of 128


@gluon.jit
def _barriers(N: gl.constexpr, COUNT: gl.constexpr):
    out = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(out.index(i), count=COUNT)
    return out


@gluon.jit
def _extent(starts, lengths):
    """What this program works on: sequence, first query row, queries, position of query 0, its block (longest first)."""
    seq = gl.program_id(2)
    q0 = gl.load(starts + seq)
    T = gl.load(starts + seq + 1) - q0
    n = gl.load(lengths + seq)
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    return seq, q0, T, n - T, block


@gluon.jit
def _slot(table, seq, table_stride, i, PAGED: gl.constexpr):
    if PAGED:
        return gl.load(table + seq * table_stride + i) * 64
    else:
        return gl.load(table + seq) + i * 64


@gluon.jit
def _store(out, x, q0, first, T, H, h, column, D: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """64 results of a head from query `first` on, N columns of D from `column`; those past the last query are left out."""
    om = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    on = column + gl.arange(0, N, gl.SliceLayout(0, layout))
    at = ((q0 + om).to(gl.int64) * H + h) * D
    gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), x, mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _one_load(
    qd64, qd128, kd, td, starts, lengths, table, table_stride, GROUP: gl.constexpr,
    sq0, sq1, sq2, sq3, sq4, sk, st, bq, kl_full, kr_full, kl_empty, kr_empty, t_full, t_empty, PAGED: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths)
    h = gl.program_id(0)
    g = h // GROUP
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        row = q0 + block * 64
        at = h * 640
        mbarrier.expect(bq, 64 * 512 * 2)
        tma.async_copy_global_to_shared(qd64, [row, at + 64], bq, sq0)
        tma.async_copy_global_to_shared(qd128, [row, at + 128], bq, sq1)
        tma.async_copy_global_to_shared(qd64, [row, at + 320], bq, sq2)
        tma.async_copy_global_to_shared(qd128, [row, at + 384], bq, sq3)
        tma.async_copy_global_to_shared(qd128, [row, at + 512], bq, sq4)
        for i in range(tiles):
            s = i % 2
            ph = (i // 2) & 1
            slot = _slot(table, seq, table_stride, i, PAGED)
            mbarrier.wait(kl_empty.index(s), ph ^ 1)
            mbarrier.expect(kl_full.index(s), 64 * 256 * 2)
            tma.async_copy_global_to_shared(kd, [slot, g * 640], kl_full.index(s), sk.index(2 * s))
            mbarrier.wait(t_empty, (i & 1) ^ 1)
            mbarrier.expect(t_full, 64 * 128 * 2)
            tma.async_copy_global_to_shared(td, [slot, g * 640 + 512], t_full, st)
            mbarrier.wait(kr_empty.index(s), ph ^ 1)
            mbarrier.expect(kr_full.index(s), 64 * 256 * 2)
            tma.async_copy_global_to_shared(kd, [slot, g * 640 + 256], kr_full.index(s), sk.index(2 * s + 1))


@gluon.jit
def _one_right(starts, lengths, out, H, sk, sp, sa, p_full, p_empty, kr_empty, go, dtype: gl.constexpr):
    seq, q0, T, past, block = _extent(starts, lengths)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, accl)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        acc = gl.zeros([64, 256], gl.float32, accl)
        for i in range(tiles):
            b = i % 2
            mbarrier.wait(p_full.index(b), (i // 2) & 1)
            acc = acc * gl.expand_dims(sa.index(b).load(row), 1)
            mbarrier.wait(go, i & 1)
            acc = warpgroup_mma(sp.index(b), sk.index(2 * b + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(kr_empty.index(b), count=1)
            mbarrier.arrive(p_empty.index(b), count=1)
        b = tiles % 2
        mbarrier.wait(p_full.index(b), (tiles // 2) & 1)
        acc = acc / gl.expand_dims(sa.index(b).load(row), 1)
        _store(out, acc.to(dtype), q0, block * 64, T, H, gl.program_id(0), 256, 512, 256, accl)


@gluon.jit
def _one_tile(
    i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full, kl_empty, t_full, t_empty, p_full,
    p_empty, go, scale, dtype: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b = i % 2
    ph = (i // 2) & 1
    left = sk.index(2 * b)
    right = sk.index(2 * b + 1)
    s = gl.zeros([64, 64], gl.float32, sl)
    mbarrier.wait(kl_full.index(b), ph)
    s = warpgroup_mma(sq0, left.slice(64, 64, dim=1).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(sq1, left.slice(128, 128, dim=1).permute((1, 0)), s, is_async=True)
    mbarrier.wait(t_full, i & 1)
    s = warpgroup_mma(sq4, st.permute((1, 0)), s, is_async=True)
    mbarrier.wait(kr_full.index(b), ph)
    s = warpgroup_mma(sq2, right.slice(64, 64, dim=1).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(sq3, right.slice(128, 128, dim=1).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(t_empty, count=1)
    if i > 0:
        mbarrier.arrive(go, count=1)
    if MASKED:
        s = gl.where(gl.expand_dims(pos_q, 1) >= gl.expand_dims(i * 64 + cols, 0), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    a = gl.exp2(m - m_new)
    l = l * a + gl.sum(p, 1)
    p16 = p.to(dtype)
    mbarrier.wait(p_empty.index(b), ph ^ 1)
    sp.index(b).store(p16)
    sa.index(b).store(a)
    fence_async_shared()
    mbarrier.arrive(p_full.index(b), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(a, gl.SliceLayout(1, accl)), 1)
    p_regs = gl.convert_layout(p16, gl.DotOperandLayout(0, accl, 2))
    acc = warpgroup_mma(p_regs, left, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(kl_empty.index(b), count=1)
    return acc, m_new, l


@gluon.jit
def _one_left(
    starts, lengths, out, H, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, bq, kl_full, kr_full, kl_empty, t_full, t_empty, p_full,
    p_empty, go, scale, dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        full = (past + block * 64 + 1) // 64
        acc = gl.zeros([64, 256], gl.float32, accl)
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
        pos_q = past + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, sl))
        cols = gl.arange(0, 64, gl.SliceLayout(0, sl))
        mbarrier.wait(bq, 0)
        for i in range(full):
            acc, m, l = _one_tile(i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full,
                                  kl_empty, t_full, t_empty, p_full, p_empty, go, scale, dtype, False)  # fmt: skip
        for i in range(full, tiles):
            acc, m, l = _one_tile(i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full,
                                  kl_empty, t_full, t_empty, p_full, p_empty, go, scale, dtype, True)  # fmt: skip
        mbarrier.arrive(go, count=1)
        b = tiles % 2
        mbarrier.wait(p_empty.index(b), ((tiles // 2) & 1) ^ 1)
        sa.index(b).store(l)
        mbarrier.arrive(p_full.index(b), count=1)
        acc = acc / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, accl)), 1)
        _store(out, acc.to(dtype), q0, block * 64, T, H, gl.program_id(0), 0, 512, 256, accl)


@gluon.jit
def _one512(
    qd64, qd128, kd, td, out, starts, lengths, table, table_stride, H, scale,
    GROUP: gl.constexpr, PAGED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq0 = gl.allocate_shared_memory(dtype, [64, 64], qd64.layout)
    sq1 = gl.allocate_shared_memory(dtype, [64, 128], qd128.layout)
    sq2 = gl.allocate_shared_memory(dtype, [64, 64], qd64.layout)
    sq3 = gl.allocate_shared_memory(dtype, [64, 128], qd128.layout)
    sq4 = gl.allocate_shared_memory(dtype, [64, 128], qd128.layout)
    sk = gl.allocate_shared_memory(dtype, [4, 64, 256], kd.layout)
    st = gl.allocate_shared_memory(dtype, [64, 128], td.layout)
    play: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sp = gl.allocate_shared_memory(dtype, [2, 64, 64], play)
    sa = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bq, go, t_full, t_empty = _barriers(1, 1).index(0), _barriers(1, 1).index(0), _barriers(1, 1).index(0), _barriers(1, 1).index(0)
    kl_full, kl_empty, kr_full, kr_empty = _barriers(2, 1), _barriers(2, 1), _barriers(2, 1), _barriers(2, 1)
    p_full, p_empty = _barriers(2, 1), _barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_one_left, (starts, lengths, out, H, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, bq, kl_full, kr_full, kl_empty, t_full,
                     t_empty, p_full, p_empty, go, scale, dtype)),
        (_one_right, (starts, lengths, out, H, sk, sp, sa, p_full, p_empty, kr_empty, go, dtype)),
        (_one_load, (qd64, qd128, kd, td, starts, lengths, table, table_stride, GROUP, sq0, sq1, sq2, sq3, sq4, sk, st, bq,
                     kl_full, kr_full, kl_empty, kr_empty, t_full, t_empty, PAGED)),
    ], [4, 1], [216, 24])  # fmt: skip


def _kind(x: Tensor) -> gl.dtype:
    return gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of a tensor's rows, all heads of a token side by side."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], _kind(x))
    return TensorDescriptor.from_tensor(x.flatten(1), [rows, columns], layout)


def attend_one512(q_NHE: Tensor, k: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float) -> Tensor:
    """Prefill with one tensor for K and V: E = 512 + 128 as `spec.kv` lays it out; no window, softcap or sinks.

    Heads of a group run side by side, so that one reading of the keys from device memory serves them all.
    """
    H, G, kv = q_NHE.shape[1], k.data_SGW.shape[1], k.data_SGW
    _one512[(H, -(-seqs.max_queries // BM), seqs.lengths_B.shape[0])](
        _described(q_NHE, 64, 64), _described(q_NHE, 64, 128), _described(kv, 64, 256), _described(kv, 64, 128), out_NHD,
        seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0), H, scale * LOG2E, GROUP=H // G, PAGED=slots.page > 0,
        dtype=_kind(q_NHE), num_warps=4,
    )  # fmt: skip
    return out_NHD


@gluon.jit
def _shares(s, m, l, i, nearest, pos_q, cols, scale, sp, sa, p_full, p_empty):
    """Tile `i`: the softmax's shares, and the factor of what was summed before, to shared memory; the running maximum and sum."""
    b = i % 2
    if i * 64 + 63 > nearest:
        s = gl.where(gl.expand_dims(pos_q, 1) >= gl.expand_dims(i * 64 + cols, 0), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    a = gl.exp2(m - m_new)
    l = l * a + gl.sum(p, 1)
    mbarrier.wait(p_empty.index(b), ((i // 2) & 1) ^ 1)
    sp.index(b).store(p.to(sp.dtype))
    sa.index(b).store(a)
    fence_async_shared()
    mbarrier.arrive(p_full.index(b), count=1)
    return m_new, l


@gluon.jit
def _sums(l, tiles, sa, p_full, p_empty):
    """After the last tile's shares: what the results are divided by."""
    b = tiles % 2
    mbarrier.wait(p_empty.index(b), ((tiles // 2) & 1) ^ 1)
    sa.index(b).store(l)
    mbarrier.arrive(p_full.index(b), count=1)


@gluon.jit
def _halves(desc, row, column, full, left, right):
    mbarrier.expect(full, 64 * 512 * 2)
    tma.async_copy_global_to_shared(desc, [row, column], full, left)
    tma.async_copy_global_to_shared(desc, [row, column + 256], full, right)


@gluon.jit
def _pair_scores(
    qd, qcd, kd, starts, lengths, table, table_stride, sq, sk, sp, sa, q_full, k_full, k_free, p_full, p_empty, go, scale,
    GROUP: gl.constexpr, PAGED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Queries stay in registers; a tile of keys makes room for the next but one as soon as it is multiplied."""
    seq, q0, T, past, block = _extent(starts, lengths)
    h = gl.program_id(0)
    g = h // GROUP
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dot: gl.constexpr = gl.DotOperandLayout(0, sl, 2)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        mbarrier.expect(q_full, 64 * 128 * 2)
        tma.async_copy_global_to_shared(qcd, [q0 + block * 64, h * 512 + 384], q_full, sq)
        _halves(qd, q0 + block * 64, h * 512, k_full.index(1), sk.index(2), sk.index(3))
        _halves(kd, _slot(table, seq, table_stride, 0, PAGED), g * 512, k_full.index(0), sk.index(0), sk.index(1))
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
        pos_q = past + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, sl))
        cols = gl.arange(0, 64, gl.SliceLayout(0, sl))
        mbarrier.wait(k_full.index(1), 0)
        q = (sk.index(2).slice(0, 128, dim=1).load(dot), sk.index(2).slice(128, 128, dim=1).load(dot),
             sk.index(3).slice(0, 128, dim=1).load(dot), sq)  # fmt: skip
        mbarrier.wait(q_full, 0)
        mbarrier.arrive(k_free, count=1)
        mbarrier.wait(k_free, 0)
        if tiles > 1:
            _halves(kd, _slot(table, seq, table_stride, 1, PAGED), g * 512, k_full.index(1), sk.index(2), sk.index(3))
        for i in range(tiles):
            b = i % 2
            mbarrier.wait(k_full.index(b), ((i // 2) & 1) ^ b)  # the second tile's room was the queries' first
            s = gl.zeros([64, 64], gl.float32, sl)
            for c in gl.static_range(4):
                keys = sk.index(2 * b + c // 2).slice(c % 2 * 128, 128, dim=1).permute((1, 0))
                s = warpgroup_mma(q[c], keys, s, use_acc=c > 0, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            if i > 0:  # the matrix unit is free for the values of the tile before
                mbarrier.arrive(go.index((i - 1) % 2), count=1)
            mbarrier.arrive(k_free, count=1)
            mbarrier.wait(k_free, (i & 1) ^ 1)
            if i + 2 < tiles:
                slot = _slot(table, seq, table_stride, i + 2, PAGED)
                _halves(kd, slot, g * 512, k_full.index(b), sk.index(2 * b), sk.index(2 * b + 1))
            m, l = _shares(s, m, l, i, past + block * 64, pos_q, cols, scale, sp, sa, p_full, p_empty)
        mbarrier.arrive(go.index((tiles - 1) % 2), count=1)
        _sums(l, tiles, sa, p_full, p_empty)


@gluon.jit
def _pair_values(
    vd, starts, lengths, table, table_stride, out, H, sv, sp, sa, v_full, v_free, p_full, p_empty, go, HALF: gl.constexpr,
    GROUP: gl.constexpr, PAGED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Half of the result, and the loads of its half of the values."""
    seq, q0, T, past, block = _extent(starts, lengths)
    at = gl.program_id(0) // GROUP * 512 + HALF * 256
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, accl)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        mbarrier.expect(v_full, 64 * 256 * 2)
        tma.async_copy_global_to_shared(vd, [_slot(table, seq, table_stride, 0, PAGED), at], v_full, sv)
        acc = gl.zeros([64, 256], gl.float32, accl)
        for i in range(tiles):
            b = i % 2
            ph = (i // 2) & 1
            mbarrier.wait(p_full.index(b), ph)
            acc = acc * gl.expand_dims(sa.index(b).load(row), 1)
            mbarrier.wait(go.index(b), ph)
            mbarrier.wait(v_full, i & 1)
            acc = warpgroup_mma(sp.index(b), sv, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(p_empty.index(b), count=1)
            mbarrier.arrive(v_free, count=1)
            mbarrier.wait(v_free, i & 1)
            if i + 1 < tiles:
                mbarrier.expect(v_full, 64 * 256 * 2)
                tma.async_copy_global_to_shared(vd, [_slot(table, seq, table_stride, i + 1, PAGED), at], v_full, sv)
        b = tiles % 2
        mbarrier.wait(p_full.index(b), (tiles // 2) & 1)
        acc = acc / gl.expand_dims(sa.index(b).load(row), 1)
        _store(out, acc.to(dtype), q0, block * 64, T, H, gl.program_id(0), HALF * 256, 512, 256, accl)


@gluon.jit
def _pair512(
    qd, qcd, kd, vd, out, starts, lengths, table, table_stride, H, scale, GROUP: gl.constexpr, PAGED: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [64, 128], qcd.layout)
    sk = gl.allocate_shared_memory(dtype, [4, 64, 256], kd.layout)
    sv = gl.allocate_shared_memory(dtype, [2, 64, 256], vd.layout)
    sp = gl.allocate_shared_memory(dtype, [2, 64, 64], gl.NVMMASharedLayout(128, 16, 2))
    sa = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, k_free, v_full, v_free = _barriers(1, 1).index(0), _barriers(1, 1).index(0), _barriers(2, 1), _barriers(2, 1)
    k_full, p_full, p_empty, go = _barriers(2, 1), _barriers(2, 1), _barriers(2, 2), _barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_pair_scores, (qd, qcd, kd, starts, lengths, table, table_stride, sq, sk, sp, sa, q_full, k_full, k_free, p_full,
                        p_empty, go, scale, GROUP, PAGED, dtype)),
        (_pair_values, (vd, starts, lengths, table, table_stride, out, H, sv.index(0), sp, sa, v_full.index(0), v_free.index(0),
                        p_full, p_empty, go, 0, GROUP, PAGED, dtype)),
        (_pair_values, (vd, starts, lengths, table, table_stride, out, H, sv.index(1), sp, sa, v_full.index(1), v_free.index(1),
                        p_full, p_empty, go, 1, GROUP, PAGED, dtype)),
    ], [4, 4], [160, 160])  # fmt: skip


def attend_pair512(q_NHE: Tensor, k: Stored, v: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float) -> Tensor:
    """Prefill at head_dim 512 with a tensor each for K and V (Gemma 4 E2B, E4B); no window, softcap or sinks."""
    H, G = q_NHE.shape[1], k.data_SGW.shape[1]
    _pair512[(H, -(-seqs.max_queries // BM), seqs.lengths_B.shape[0])](
        _described(q_NHE, 64, 256), _described(q_NHE, 64, 128), _described(k.data_SGW, 64, 256), _described(v.data_SGW, 64, 256),
        out_NHD, seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0), H, scale * LOG2E, GROUP=H // G,
        PAGED=slots.page > 0, dtype=_kind(q_NHE), num_warps=4,
    )  # fmt: skip
    return out_NHD


@gluon.jit
def _work(
    w, starts, lengths, blocks, pairs, short, window, ring, HEADS: gl.constexpr, BN: gl.constexpr, WINDOWED: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """A block of queries of some heads, and the keys they see: from position `lo` to `hi`, `run` of them before the ring wraps.

    Blocks of a head one after another, longest first; the `short` first blocks of a window, which see less, after all others.
    """
    ROWS: gl.constexpr = 128 // HEADS
    seq = w // (blocks * pairs)
    u = w % (blocks * pairs)
    long = blocks - short
    if u < long * pairs:
        block = blocks - 1 - u % long
        hp = u // long
    else:
        u -= long * pairs
        block = short - 1 - u // pairs
        hp = u % pairs
    q0 = gl.load(starts + seq)
    T = gl.load(starts + seq + 1) - q0
    past = gl.load(lengths + seq) - T
    hi = past + gl.minimum((block + 1) * ROWS, T)
    lo = 0
    if WINDOWED:
        lo = gl.maximum(0, past + block * ROWS - window + 1)
        if not RING:
            lo = lo // 64 * 64
    run = hi - lo
    if RING:
        run = gl.minimum(run, ring - lo % ring)
    tiles_run = gl.cdiv(run, BN)
    tiles = gl.where(block * ROWS < T, tiles_run + gl.cdiv(hi - lo - run, BN), 0)
    return seq, q0, T, past, block * ROWS, hp * HEADS, lo, hi, run, tiles_run, tiles


@gluon.jit
def _half_of(first, h, WHO: gl.constexpr, HEADS: gl.constexpr):
    """First query and head of a consumer's 64 of a block: two heads' queries, or twice as many of one."""
    if HEADS == 2:
        return first, h + WHO
    else:
        return first + WHO * 64, h


@gluon.jit
def _two_queries(qd, q0, first, h, sq, q_full, D: gl.constexpr, HEADS: gl.constexpr):
    for who in gl.static_range(2):
        row, head = _half_of(first, h, who, HEADS)
        mbarrier.expect(q_full.index(who), 64 * D * 2)
        tma.async_copy_global_to_shared(qd, [q0 + row, head * D], q_full.index(who), sq.index(who))


@gluon.jit
def _tile_slot(
    table, seq, table_stride, i, lo, tiles_run, ring, BN: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr
):  # fmt: skip
    """The first slot of tile `i` of the keys from position `lo` on."""
    if PAGED:
        return gl.load(table + seq * table_stride + (lo + i * BN) // 64) * 64
    elif RING:
        return gl.load(table + seq) + gl.where(i < tiles_run, lo % ring + i * BN, (i - tiles_run) * BN)
    else:
        return gl.load(table + seq) + lo + i * BN


@gluon.jit
def _two_load(
    qd, kd, vd, starts, lengths, table, table_stride, ring, window, works, blocks, pairs, short, GROUP: gl.constexpr,
    D: gl.constexpr, BN: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr,
    sq, sk, sv, q_full, k_full, v_full, k_empty, v_empty,
):  # fmt: skip
    n = 0  # tiles so far
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(
            w, starts, lengths, blocks, pairs, short, window, ring, HEADS, BN, WINDOWED, RING
        )
        g = h // GROUP
        for i in range(tiles):
            s = n % 2
            ph = ((n // 2) & 1) ^ 1
            slot = _tile_slot(table, seq, table_stride, i, lo, tiles_run, ring, BN, RING, PAGED)
            mbarrier.wait(k_empty.index(s), ph)
            mbarrier.expect(k_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(kd, [slot, g * D], k_full.index(s), sk.index(s))
            if i == 0:  # once the block before has met its last keys, which are those of the other stage
                mbarrier.wait(k_empty.index((n + 1) % 2), (((n + 1) // 2) & 1) ^ 1)
                _two_queries(qd, q0, first, h, sq, q_full, D, HEADS)
            mbarrier.wait(v_empty.index(s), ph)
            mbarrier.expect(v_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(vd, [slot, g * D], v_full.index(s), sv.index(s))
            n += 1


@gluon.jit
def _softmax(
    s, m, l, i, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale,
    BN: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, dtype: gl.constexpr, accl: gl.constexpr,
):  # fmt: skip
    """P of a tile as the operand of the next product, the factor of what was summed before, and the running maximum and sum."""
    pos = lo + i * BN
    end = hi
    if RING:
        end = gl.where(i < tiles_run, lo + run, hi)
        pos = gl.where(i < tiles_run, pos, lo + run + (i - tiles_run) * BN)
    j = gl.expand_dims(cols, 0)  # each side alone: the predicates of both do not fit
    if (pos + BN > end) | (pos + BN - 1 > nearest):
        s = gl.where(j <= gl.expand_dims(gl.minimum(pos_q, end - 1) - pos, 1), s, float("-inf"))
    if WINDOWED:
        if pos <= nearest + 63 - window:
            s = gl.where(j > gl.expand_dims(pos_q - window - pos, 1), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    a = gl.exp2(m - m_new)
    l = l * a + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accl, 2)), gl.convert_layout(a, gl.SliceLayout(1, accl)), m_new, l


@gluon.jit
def _leave(
    od, out, so, x0, x1, row, rest, H, h, D: gl.constexpr, N: gl.constexpr, HALVES: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """64 results of a head, from row `row` on, N columns at a time through shared memory, 16 bytes each; where only `rest` are a
    sequence's, from registers, with a mask."""
    if rest >= 64:
        tma.store_wait(0)  # of what left before
        so.store(x0)
        fence_async_shared()
        tma.async_copy_shared_to_global(od, [row, h * D], so)
        if HALVES == 2:
            tma.store_wait(0)
            so.store(x1)
            fence_async_shared()
            tma.async_copy_shared_to_global(od, [row, h * D + N], so)
    else:
        _store(out, x0, row, 0, rest, H, h, 0, D, N, layout)
        if HALVES == 2:
            _store(out, x1, row, 0, rest, H, h, N, D, N, layout)


@gluon.jit
def _as_keys(x, y, D: gl.constexpr):
    """64 queries in shared memory in the type of the keys, where they lie."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    if x.dtype != y.dtype:
        for c in gl.static_range(D // 64):
            part = x.slice(64 * c, 64, dim=1).load(layout)
            y.slice(64 * c, 64, dim=1).store(part.to(gl.float32).to(y.dtype))
        fence_async_shared()


@gluon.jit
def _two_consume(
    od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so, q_full, k_full,
    v_full, k_empty, v_empty, WHO: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr,
    RING: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    HALVES: gl.constexpr = 2 if D == 256 else 1  # of the columns: the first leaves while the second is multiplied
    N: gl.constexpr = D // HALVES
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    q = sq._reinterpret(sk.dtype, [2, 64, D], sq.layout).index(WHO)
    zero = gl.zeros([64, BN], gl.float32, sl)
    cols = gl.arange(0, BN, gl.SliceLayout(0, sl))
    n = 0
    done = 0  # blocks so far
    o0 = gl.zeros([64, N], so.dtype, accl)  # a block's results, which leave while the next one begins
    o1 = o0
    o_row = 0
    o_rest = 0
    o_h = 0
    seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(
        gl.program_id(0), starts, lengths, blocks, pairs, short, window, ring, HEADS, BN, WINDOWED, RING
    )
    for w in range(gl.program_id(0), works, gl.num_programs(0)):
        after = gl.minimum(w + gl.num_programs(0), works - 1)
        if tiles > 0:
            first, h = _half_of(first, h, WHO, HEADS)
            nearest = past + first
            pos_q = nearest + gl.arange(0, 64, gl.SliceLayout(1, sl))
            acc0 = gl.zeros([64, N], gl.float32, accl)
            acc1 = acc0
            m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
            l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
            mbarrier.wait(q_full.index(WHO), done & 1)
            _as_keys(sq.index(WHO), q, D)
            mbarrier.wait(k_full.index(n % 2), (n // 2) & 1)
            s = warpgroup_mma(q, sk.index(n % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
            if done > 0:
                _leave(od, out, so.index(WHO), o0, o1, o_row, o_rest, H, o_h, D, N, HALVES, accl)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(n % 2), count=1)
            p, a, m, l = _softmax(
                s, m, l, 0, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale, BN, WINDOWED, RING, sv.dtype, accl
            )
            for i in range(1, tiles):
                before = n % 2
                n += 1
                b = n % 2
                mbarrier.wait(k_full.index(b), (n // 2) & 1)
                s = warpgroup_mma(q, sk.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), ((n - 1) // 2) & 1)
                acc0 = warpgroup_mma(p, sv.index(before).slice(0, N, dim=1), acc0, is_async=True)
                if HALVES == 2:
                    acc1 = warpgroup_mma(p, sv.index(before).slice(N, N, dim=1), acc1, is_async=True)
                s = warpgroup_mma_wait(HALVES, deps=(s,))
                mbarrier.arrive(k_empty.index(b), count=1)
                p_next, a, m, l = _softmax(
                    s, m, l, i, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale, BN, WINDOWED, RING, sv.dtype, accl
                )
                if HALVES == 2:
                    acc0, acc1, p = warpgroup_mma_wait(0, deps=(acc0, acc1, p))
                    acc1 = acc1 * gl.expand_dims(a, 1)
                else:
                    acc0, p = warpgroup_mma_wait(0, deps=(acc0, p))
                mbarrier.arrive(v_empty.index(before), count=1)
                acc0 = acc0 * gl.expand_dims(a, 1)
                p = p_next
            b = n % 2
            mbarrier.wait(v_full.index(b), (n // 2) & 1)
            acc0 = warpgroup_mma(p, sv.index(b).slice(0, N, dim=1), acc0, is_async=True)
            if HALVES == 2:
                acc1 = warpgroup_mma(p, sv.index(b).slice(N, N, dim=1), acc1, is_async=True)
            if SINKS:
                l += gl.exp2(gl.load(sinks + h).to(gl.float32) * 1.4426950408889634 - m)
            part = gl.expand_dims(gl.convert_layout(1.0 / l, gl.SliceLayout(1, accl)), 1)
            o_row = q0 + first
            o_rest = T - first
            o_h = h
            seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(  # the next one, while this one is multiplied
                after, starts, lengths, blocks, pairs, short, window, ring, HEADS, BN, WINDOWED, RING
            )
            acc0, p = warpgroup_mma_wait(HALVES - 1, deps=(acc0, p))
            o0 = (acc0 * part).to(so.dtype)
            if HALVES == 2:
                acc1 = warpgroup_mma_wait(0, deps=(acc1,))
                o1 = (acc1 * part).to(so.dtype)
            mbarrier.arrive(v_empty.index(b), count=1)
            n += 1
            done += 1
        else:
            seq, q0, T, past, first, h, lo, hi, run, tiles_run, tiles = _work(
                after, starts, lengths, blocks, pairs, short, window, ring, HEADS, BN, WINDOWED, RING
            )
    if done > 0:
        _leave(od, out, so.index(WHO), o0, o1, o_row, o_rest, H, o_h, D, N, HALVES, accl)
    tma.store_wait(0)


@gluon.jit
def _two(
    qd, kd, vd, od, out, sinks, starts, lengths, table, table_stride, ring, window, H, works, blocks, pairs, short, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    PAGED: gl.constexpr, SINKS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [2, 64, D], qd.layout)
    sk = gl.allocate_shared_memory(dtype, [2, BN, D], kd.layout)
    sv = gl.allocate_shared_memory(dtype, [2, BN, D], vd.layout)
    so = gl.allocate_shared_memory(dtype, [2, 64, min(D, 128)], od.layout)
    q_full, k_full, v_full = _barriers(2, 1), _barriers(2, 1), _barriers(2, 1)
    k_empty, v_empty = _barriers(2, 2), _barriers(2, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_two_consume, (od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so,
                        q_full, k_full, v_full, k_empty, v_empty, 0, D, BN, HEADS, WINDOWED, RING, SINKS)),
        (_two_consume, (od, out, sinks, starts, lengths, ring, window, H, works, blocks, pairs, short, scale, sq, sk, sv, so,
                        q_full, k_full, v_full, k_empty, v_empty, 1, D, BN, HEADS, WINDOWED, RING, SINKS)),
        (_two_load, (qd, kd, vd, starts, lengths, table, table_stride, ring, window, works, blocks, pairs, short, GROUP, D, BN,
                     HEADS, WINDOWED, RING, PAGED, sq, sk, sv, q_full, k_full, v_full, k_empty, v_empty)),
    ], [4, 1], [240, 24])  # fmt: skip


def _two_launch(
    q_NHE: Tensor, k: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, scale: float, window: int | None,
    sinks_H: Tensor | None, processors: int,
) -> tuple[tuple[int], tuple[object, ...], dict[str, object]]:  # fmt: skip
    """Programs, and arguments from the results on, by position and by name: of floats and of bytes."""
    H, D, G = q_NHE.shape[1], q_NHE.shape[2], k.data_SGW.shape[1]
    heads = 2 if (H // G) % 2 == 0 else 1
    rows = 128 // heads
    blocks, pairs = -(-seqs.max_queries // rows), H // heads
    works = blocks * pairs * seqs.lengths_B.shape[0]
    short = 0 if window is None else min(blocks, -(-window // rows))
    args = (
        _described(out_NHD, 64, min(D, 128)), out_NHD, q_NHE if sinks_H is None else sinks_H, seqs.starts_B1, seqs.lengths_B,
        slots.table, slots.table.stride(0), max(1, slots.ring), window or 0, H, works, blocks, pairs, short, scale * LOG2E,
    )  # fmt: skip
    options = {
        "GROUP": H // G, "D": D, "HEADS": heads, "WINDOWED": window is not None, "RING": slots.ring > 0, "PAGED": slots.page > 0,
        "SINKS": sinks_H is not None, "dtype": _kind(q_NHE), "num_warps": 4,
    }  # fmt: skip
    return (works if window is None else min(processors, works),), args, options


def attend_two(
    q_NHE: Tensor, k: Stored, v: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float, window: int | None = None,
    sinks_H: Tensor | None = None, processors: int = 132,
) -> Tensor:  # fmt: skip
    """Prefill with a tensor each for K and V, head_dim 64, 128 or 256; no softcap.

    Args:
        processors: programs of a window's launch, each with block after block; without a window blocks differ too much in length.
    """
    D = q_NHE.shape[2]
    narrow = window is not None and window < LEAST_WIDE
    keys = 64 if D == 256 or slots.page or narrow else 128
    programs, args, options = _two_launch(q_NHE, k, out_NHD, seqs, slots, scale, window, sinks_H, processors)
    tiles = _described(q_NHE, 64, D), _described(k.data_SGW, keys, D), _described(v.data_SGW, keys, D)
    _two[programs](*tiles, *args, BN=keys, **options)
    return out_NHD
