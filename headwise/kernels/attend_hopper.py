"""Prefill attention on Hopper: TMA loads, asynchronous matrix products, and warps with roles. Gluon, for triton 3.6.

Three kernels. `_one512` is for head_dim 512 with one tensor for K and V; its 64 x 512 accumulator fills half the registers of a
multiprocessor, so two warpgroups hold half of it each, and the products of one hide the softmax of the other:

    warpgroup 1   S(i) = Q K(i) | softmax -> P(i) in shared memory | left half of O += P(i) V(i)
    warpgroup 2                 | right half of O += P(i-1) V(i-1) |
    producer      loads a half of tile i + 2 as soon as that half of tile i is done with

`_pair512` is the same with a tensor each for K and V, one tile of both in flight: twice the traffic. `_two` is for two tensors
up to head_dim 256: two warpgroups with 64 queries each, products of the next tile issued before the
softmax of this one.

Shapes    as in `attend`; K and V in the type of the queries (bf16, f16); pages of 64 slots, or contiguous.
Cost      tile traffic: 64 queries read (E) * 2 bytes a key from L2; 5.5 TB/s of L2 bounds head_dim 512 with the rotated dims.
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


@gluon.jit
def _extent(starts, lengths, AXIS: gl.constexpr):
    """What this program works on: sequence, first query row, queries, position of query 0, its block (axis AXIS; longest first)."""
    seq = gl.program_id(2)
    q0 = gl.load(starts + seq)
    T = gl.load(starts + seq + 1) - q0
    n = gl.load(lengths + seq)
    block = gl.num_programs(AXIS) - 1 - gl.program_id(AXIS)
    return seq, q0, T, n - T, block


@gluon.jit
def _slot(table, seq, table_stride, i, PAGED: gl.constexpr):
    if PAGED:
        return gl.load(table + seq * table_stride + i) * 64
    else:
        return gl.load(table + seq) + i * 64


@gluon.jit
def _one_load(
    qd64, qd128, kd, td, starts, lengths, table, table_stride, G, GROUP: gl.constexpr,
    sq0, sq1, sq2, sq3, sq4, sk, st, bq, kl_full, kr_full, kl_empty, kr_empty, t_full, t_empty, PAGED: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths, 1)
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
def _one_right(
    starts, lengths, out, H, sk, sp, sa, p_full, p_empty, kr_empty, go, dtype: gl.constexpr, SKEW: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths, 1)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, accl)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        acc = gl.zeros([64, 256], gl.float32, accl)
        for i in range(tiles):
            b = i % 2
            mbarrier.wait(p_full.index(b), (i // 2) & 1)
            a = sa.index(b).load(row)
            acc = acc * gl.expand_dims(a, 1)
            if SKEW:
                mbarrier.wait(go, i & 1)
            acc = warpgroup_mma(sp.index(b), sk.index(2 * b + 1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(kr_empty.index(b), count=1)
            mbarrier.arrive(p_empty.index(b), count=1)
        b = tiles % 2
        mbarrier.wait(p_full.index(b), (tiles // 2) & 1)
        l = sa.index(b).load(row)
        acc = acc / gl.expand_dims(l, 1)
        om = block * 64 + gl.arange(0, 64, row)
        on = 256 + gl.arange(0, 256, gl.SliceLayout(0, accl))
        at = ((q0 + om).to(gl.int64) * H + gl.program_id(0)) * 512
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), acc.to(dtype), mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _one_tile(
    i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full, kl_empty, t_full, t_empty, p_full,
    p_empty, go,
    scale, dtype: gl.constexpr, MASKED: gl.constexpr, SKEW: gl.constexpr,
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
    if SKEW:
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
    p_empty, go,
    scale, dtype: gl.constexpr, SKEW: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths, 1)
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
            acc, m, l = _one_tile(i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full, kl_empty,
                t_full, t_empty, p_full, p_empty, go, scale, dtype, False, SKEW)  # fmt: skip
        for i in range(full, tiles):
            acc, m, l = _one_tile(i, acc, m, l, pos_q, cols, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, kl_full, kr_full, kl_empty,
                t_full, t_empty, p_full, p_empty, go, scale, dtype, True, SKEW)  # fmt: skip
        if SKEW:
            mbarrier.arrive(go, count=1)
        b = tiles % 2
        mbarrier.wait(p_empty.index(b), ((tiles // 2) & 1) ^ 1)
        sa.index(b).store(l)
        mbarrier.arrive(p_full.index(b), count=1)
        acc = acc / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, accl)), 1)
        om = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, accl))
        on = gl.arange(0, 256, gl.SliceLayout(0, accl))
        at = ((q0 + om).to(gl.int64) * H + gl.program_id(0)) * 512
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), acc.to(dtype), mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _one512(
    qd64, qd128, kd, td, out, starts, lengths, table, table_stride, H, G, scale,
    GROUP: gl.constexpr, PAGED: gl.constexpr, SKEW: gl.constexpr, dtype: gl.constexpr,
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
    bq = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kl_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kr_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kl_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kr_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bq, count=1)
    mbarrier.init(t_full, count=1)
    mbarrier.init(t_empty, count=1)
    mbarrier.init(go, count=1)
    for i in gl.static_range(2):
        mbarrier.init(kl_full.index(i), count=1)
        mbarrier.init(kr_full.index(i), count=1)
        mbarrier.init(kl_empty.index(i), count=1)
        mbarrier.init(kr_empty.index(i), count=1)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_one_left, (starts, lengths, out, H, sq0, sq1, sq2, sq3, sq4, sk, st, sp, sa, bq, kl_full, kr_full, kl_empty, t_full,
        t_empty,
                     p_full, p_empty, go, scale, dtype, SKEW)),
        (_one_right, (starts, lengths, out, H, sk, sp, sa, p_full, p_empty, kr_empty, go, dtype, SKEW)),
        (_one_load, (qd64, qd128, kd, td, starts, lengths, table, table_stride, G, GROUP, sq0, sq1, sq2, sq3, sq4, sk, st, bq,
                     kl_full, kr_full, kl_empty, kr_empty, t_full, t_empty, PAGED)),
    ], [4, 1], [216, 24])  # fmt: skip


def attend_one512(
    q_NHE: Tensor, k: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float, skew: bool = True,
) -> Tensor:  # fmt: skip
    """Prefill with one tensor for K and V: E = 512 + 128 as `spec.kv` lays it out; no window, softcap or sinks.

    Heads of a group run side by side, so that one reading of the keys from device memory serves them all.
    """
    N, H, E = q_NHE.shape
    S, G, _ = k.data_SGW.shape
    dtype = gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16
    q2, k2 = q_NHE.view(N, H * E), k.data_SGW.view(S, G * E)

    def desc(x: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [64, columns], gl.NVMMASharedLayout.get_default_for([64, columns], dtype))

    _one512[(H, -(-seqs.max_queries // BM), seqs.lengths_B.shape[0])](
        desc(q2, 64), desc(q2, 128), desc(k2, 256), desc(k2, 128), out_NHD, seqs.starts_B1, seqs.lengths_B, slots.table,
        slots.table.stride(0), H, G, scale * LOG2E, GROUP=H // G, PAGED=slots.page > 0, SKEW=skew, dtype=dtype, num_warps=4,
    )  # fmt: skip
    return out_NHD


@gluon.jit
def _pair_load(
    qd, kd, vd, starts, lengths, table, table_stride, GROUP: gl.constexpr, sq, sk, sv, bq, k_full, k_empty, v_full, v_empty,
    PAGED: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths, 1)
    h = gl.program_id(0)
    g = h // GROUP
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        mbarrier.expect(bq, 64 * 512 * 2)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(qd, [q0 + block * 64, h * 512 + half * 256], bq, sq.index(half))
        for i in range(tiles):
            slot = _slot(table, seq, table_stride, i, PAGED)
            for half in gl.static_range(2):
                mbarrier.wait(k_empty.index(half), (i & 1) ^ 1)
                mbarrier.expect(k_full.index(half), 64 * 256 * 2)
                tma.async_copy_global_to_shared(kd, [slot, g * 512 + half * 256], k_full.index(half), sk.index(half))
            for half in gl.static_range(2):
                mbarrier.wait(v_empty.index(half), (i & 1) ^ 1)
                mbarrier.expect(v_full.index(half), 64 * 256 * 2)
                tma.async_copy_global_to_shared(vd, [slot, g * 512 + half * 256], v_full.index(half), sv.index(half))


@gluon.jit
def _pair_right(starts, lengths, out, H, sv, sp, sa, p_full, p_empty, v_full, v_empty, go, dtype: gl.constexpr):
    seq, q0, T, past, block = _extent(starts, lengths, 1)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, accl)
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        acc = gl.zeros([64, 256], gl.float32, accl)
        for i in range(tiles):
            b = i % 2
            mbarrier.wait(p_full.index(b), (i // 2) & 1)
            acc = acc * gl.expand_dims(sa.index(b).load(row), 1)
            mbarrier.wait(v_full.index(1), i & 1)
            mbarrier.wait(go, i & 1)
            acc = warpgroup_mma(sp.index(b), sv.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(1), count=1)
            mbarrier.arrive(p_empty.index(b), count=1)
        b = tiles % 2
        mbarrier.wait(p_full.index(b), (tiles // 2) & 1)
        acc = acc / gl.expand_dims(sa.index(b).load(row), 1)
        om = block * 64 + gl.arange(0, 64, row)
        on = 256 + gl.arange(0, 256, gl.SliceLayout(0, accl))
        at = ((q0 + om).to(gl.int64) * H + gl.program_id(0)) * 512
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), acc.to(dtype), mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _pair_left(
    starts, lengths, out, H, sq, sk, sv, sp, sa, bq, k_full, k_empty, v_full, v_empty, p_full, p_empty, go, scale,
    dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block = _extent(starts, lengths, 1)
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    if block * 64 < T:
        tiles = gl.cdiv(past + gl.minimum((block + 1) * 64, T), 64)
        acc = gl.zeros([64, 256], gl.float32, accl)
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
        pos_q = past + block * 64 + gl.arange(0, 64, gl.SliceLayout(1, sl))
        cols = gl.arange(0, 64, gl.SliceLayout(0, sl))
        mbarrier.wait(bq, 0)
        for i in range(tiles):
            b = i % 2
            s = gl.zeros([64, 64], gl.float32, sl)
            for half in gl.static_range(2):
                mbarrier.wait(k_full.index(half), i & 1)
                s = warpgroup_mma(sq.index(half), sk.index(half).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(0), count=1)
            mbarrier.arrive(k_empty.index(1), count=1)
            if i > 0:
                mbarrier.arrive(go, count=1)
            if i * 64 + 63 > past + block * 64:
                s = gl.where(gl.expand_dims(pos_q, 1) >= gl.expand_dims(i * 64 + cols, 0), s, float("-inf"))
            m_new = gl.maximum(m, gl.max(s, 1) * scale)
            p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
            a = gl.exp2(m - m_new)
            l = l * a + gl.sum(p, 1)
            m = m_new
            p16 = p.to(dtype)
            mbarrier.wait(p_empty.index(b), ((i // 2) & 1) ^ 1)
            sp.index(b).store(p16)
            sa.index(b).store(a)
            fence_async_shared()
            mbarrier.arrive(p_full.index(b), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(a, gl.SliceLayout(1, accl)), 1)
            mbarrier.wait(v_full.index(0), i & 1)
            acc = warpgroup_mma(gl.convert_layout(p16, gl.DotOperandLayout(0, accl, 2)), sv.index(0), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(v_empty.index(0), count=1)
        mbarrier.arrive(go, count=1)
        b = tiles % 2
        mbarrier.wait(p_empty.index(b), ((tiles // 2) & 1) ^ 1)
        sa.index(b).store(l)
        mbarrier.arrive(p_full.index(b), count=1)
        acc = acc / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, accl)), 1)
        om = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, accl))
        on = gl.arange(0, 256, gl.SliceLayout(0, accl))
        at = ((q0 + om).to(gl.int64) * H + gl.program_id(0)) * 512
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), acc.to(dtype), mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _pair512(
    qd, kd, vd, out, starts, lengths, table, table_stride, H, scale, GROUP: gl.constexpr, PAGED: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [2, 64, 256], qd.layout)
    sk = gl.allocate_shared_memory(dtype, [2, 64, 256], kd.layout)
    sv = gl.allocate_shared_memory(dtype, [2, 64, 256], vd.layout)
    play: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    sp = gl.allocate_shared_memory(dtype, [2, 64, 64], play)
    sa = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bq = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bq, count=1)
    mbarrier.init(go, count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_pair_left, (starts, lengths, out, H, sq, sk, sv, sp, sa, bq, k_full, k_empty, v_full, v_empty, p_full, p_empty, go, scale,
                      dtype)),
        (_pair_right, (starts, lengths, out, H, sv, sp, sa, p_full, p_empty, v_full, v_empty, go, dtype)),
        (_pair_load, (qd, kd, vd, starts, lengths, table, table_stride, GROUP, sq, sk, sv, bq, k_full, k_empty, v_full,
        v_empty, PAGED)),
    ], [4, 1], [216, 24])  # fmt: skip


def attend_pair512(q_NHE: Tensor, k: Stored, v: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float) -> Tensor:
    """Prefill at head_dim 512 with a tensor each for K and V (Gemma 4 E2B, E4B); no window, softcap or sinks."""
    _, H, _ = q_NHE.shape
    G = k.data_SGW.shape[1]
    dtype = gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16

    def desc(x: Tensor) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([64, 256], dtype)
        return TensorDescriptor.from_tensor(x.flatten(1), [64, 256], layout)

    _pair512[(H, -(-seqs.max_queries // BM), seqs.lengths_B.shape[0])](
        desc(q_NHE), desc(k.data_SGW), desc(v.data_SGW), out_NHD, seqs.starts_B1, seqs.lengths_B, slots.table,
        slots.table.stride(0), H,
        scale * LOG2E, GROUP=H // G, PAGED=slots.page > 0, dtype=dtype, num_warps=4,
    )  # fmt: skip
    return out_NHD


@gluon.jit
def _run(starts, lengths, window, ring, table, HEADS: gl.constexpr, BN: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr):
    """The keys of a program's queries: from position `lo` to `hi`, `run` of them before the ring wraps, in `tiles` tiles."""
    seq, q0, T, past, block = _extent(starts, lengths, 0)
    ROWS: gl.constexpr = 128 // HEADS
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
    tiles = tiles_run + gl.cdiv(hi - lo - run, BN)
    return seq, q0, T, past, block, lo, hi, run, tiles_run, tiles


@gluon.jit
def _two_load(
    qd, kd, vd, starts, lengths, table, table_stride, ring, window, GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr,
    sq, sk, sv, bq, k_full, v_full, k_empty, v_empty,
):  # fmt: skip
    seq, q0, T, past, block, lo, hi, run, tiles_run, tiles = _run(starts, lengths, window, ring, table, HEADS, BN, WINDOWED, RING)
    ROWS: gl.constexpr = 128 // HEADS
    if block * ROWS < T:
        h = gl.program_id(1) * HEADS
        g = h // GROUP
        row = q0 + block * ROWS
        mbarrier.expect(bq, 2 * 64 * D * 2)
        tma.async_copy_global_to_shared(qd, [row, h * D], bq, sq.index(0))
        if HEADS == 2:
            tma.async_copy_global_to_shared(qd, [row, (h + 1) * D], bq, sq.index(1))
        else:
            tma.async_copy_global_to_shared(qd, [row + 64, h * D], bq, sq.index(1))
        for i in range(tiles):
            s = i % 2
            ph = ((i // 2) & 1) ^ 1
            if PAGED:
                pos = lo + i * BN
                slot = gl.load(table + seq * table_stride + pos // 64) * 64
            else:
                slot = gl.load(table + seq)
                if RING:
                    slot += gl.where(i < tiles_run, lo % ring + i * BN, (i - tiles_run) * BN)
                else:
                    slot += lo + i * BN
            mbarrier.wait(k_empty.index(s), ph)
            mbarrier.expect(k_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(kd, [slot, g * D], k_full.index(s), sk.index(s))
            mbarrier.wait(v_empty.index(s), ph)
            mbarrier.expect(v_full.index(s), BN * D * 2)
            tma.async_copy_global_to_shared(vd, [slot, g * D], v_full.index(s), sv.index(s))


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
    cut = (pos + BN > end) | (pos + BN - 1 > nearest)
    if WINDOWED:
        cut = cut | (pos <= nearest + 63 - window)
    if cut:
        j = gl.expand_dims(pos + cols, 0)
        i_q = gl.expand_dims(pos_q, 1)
        seen = (j <= i_q) & (j < end)
        if WINDOWED:
            seen = seen & (j > i_q - window)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    a = gl.exp2(m - m_new)
    l = l * a + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, accl, 2)), gl.convert_layout(a, gl.SliceLayout(1, accl)), m_new, l


@gluon.jit
def _two_consume(
    out, sinks, starts, lengths, table, ring, window, H, scale, sq, sk, sv, bq, k_full, v_full, k_empty, v_empty,
    WHO: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    SINKS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, past, block, lo, hi, run, tiles_run, tiles = _run(starts, lengths, window, ring, table, HEADS, BN, WINDOWED, RING)
    ROWS: gl.constexpr = 128 // HEADS
    accl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    if block * ROWS < T:
        h = gl.program_id(1) * HEADS
        first = block * ROWS
        if HEADS == 2:
            h += WHO
        else:
            first += WHO * 64
        nearest = past + first
        pos_q = nearest + gl.arange(0, 64, gl.SliceLayout(1, sl))
        cols = gl.arange(0, BN, gl.SliceLayout(0, sl))
        acc = gl.zeros([64, D], gl.float32, accl)
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, sl))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, sl))
        q = sq.index(WHO)
        mbarrier.wait(bq, 0)
        mbarrier.wait(k_full.index(0), 0)
        zero = gl.zeros([64, BN], gl.float32, sl)
        s = warpgroup_mma(q, sk.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        p, a, m, l = _softmax(
            s, m, l, 0, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale, BN, WINDOWED, RING, dtype, accl
        )
        for i in range(1, tiles):
            b = i % 2
            mbarrier.wait(k_full.index(b), (i // 2) & 1)
            s = warpgroup_mma(q, sk.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(b ^ 1), ((i - 1) // 2) & 1)
            acc = warpgroup_mma(p, sv.index(b ^ 1), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_empty.index(b), count=1)
            p_next, a, m, l = _softmax(
                s, m, l, i, lo, hi, run, tiles_run, pos_q, cols, nearest, window, scale, BN, WINDOWED, RING, dtype, accl
            )
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(v_empty.index(b ^ 1), count=1)
            acc = acc * gl.expand_dims(a, 1)
            p = p_next
        b = (tiles - 1) % 2
        mbarrier.wait(v_full.index(b), ((tiles - 1) // 2) & 1)
        acc = warpgroup_mma(p, sv.index(b), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if SINKS:
            l += gl.exp2(gl.load(sinks + h).to(gl.float32) * 1.4426950408889634 - m)
        acc = acc / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, accl)), 1)
        om = first + gl.arange(0, 64, gl.SliceLayout(1, accl))
        on = gl.arange(0, D, gl.SliceLayout(0, accl))
        at = ((q0 + om).to(gl.int64) * H + h) * D
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(on, 0), acc.to(dtype), mask=gl.expand_dims(om < T, 1))


@gluon.jit
def _two(
    qd, kd, vd, out, sinks, starts, lengths, table, table_stride, ring, window, H, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, HEADS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    PAGED: gl.constexpr, SINKS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    sq = gl.allocate_shared_memory(dtype, [2, 64, D], qd.layout)
    sk = gl.allocate_shared_memory(dtype, [2, BN, D], kd.layout)
    sv = gl.allocate_shared_memory(dtype, [2, BN, D], vd.layout)
    bq = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bq, count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_two_consume, (out, sinks, starts, lengths, table, ring, window, H, scale, sq, sk, sv, bq, k_full, v_full, k_empty,
        v_empty,
                        0, D, BN, HEADS, WINDOWED, RING, SINKS, dtype)),
        (_two_consume, (out, sinks, starts, lengths, table, ring, window, H, scale, sq, sk, sv, bq, k_full, v_full, k_empty,
        v_empty,
                        1, D, BN, HEADS, WINDOWED, RING, SINKS, dtype)),
        (_two_load, (qd, kd, vd, starts, lengths, table, table_stride, ring, window, GROUP, D, BN, HEADS, WINDOWED, RING, PAGED,
                     sq, sk, sv, bq, k_full, v_full, k_empty, v_empty)),
    ], [4, 1], [240, 24])  # fmt: skip


def attend_two(
    q_NHE: Tensor, k: Stored, v: Stored, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float, window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Prefill with a tensor each for K and V, head_dim 64, 128 or 256; no softcap."""
    N, H, D = q_NHE.shape
    S, G, _ = k.data_SGW.shape
    dtype = gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16
    heads = 2 if (H // G) % 2 == 0 else 1
    keys = 64 if D == 256 or slots.page else 128

    def desc(x: Tensor, rows: int) -> TensorDescriptor:
        flat = x.view(x.shape[0], -1)
        return TensorDescriptor.from_tensor(flat, [rows, D], gl.NVMMASharedLayout.get_default_for([rows, D], dtype))

    _two[(-(-seqs.max_queries // (128 // heads)), H // heads, seqs.lengths_B.shape[0])](
        desc(q_NHE, 64), desc(k.data_SGW, keys), desc(v.data_SGW, keys), out_NHD, q_NHE if sinks_H is None else sinks_H,
        seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0), max(1, slots.ring), window or 0, H, scale * LOG2E,
        GROUP=H // G, D=D, BN=keys, HEADS=heads, WINDOWED=window is not None, RING=slots.ring > 0, PAGED=slots.page > 0,
        SINKS=sinks_H is not None, dtype=dtype, num_warps=4,
    )  # fmt: skip
    return out_NHD
