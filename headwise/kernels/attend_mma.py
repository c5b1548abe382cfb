"""Prefill attention of wide heads on cards with `mma.sync` alone (sm80 to sm89, sm120): warps share a tile in three directions.

Plain Triton gives a warp 16 rows of a tile to itself, and registers hold 32 to 64 rows of 512 or 256 values, so that some of eight
warps do others' work again. Here scores are split along the head too, into C chunks of its values: a batch of products, [C, rows,
keys], whose sum goes through shared memory and comes out with whole rows to a warp, so that softmax needs no other exchange.
The result is split by the same chunks. Queries stay in registers, each value of a row in as few warps as there are parts of keys.

    wait K(i), V(i) | S = Q K(i), a chunk a warp | sum, softmax -> P in shared memory | O = O a + P V(i)
    one stage: wait K(i)   V(i) comes               K(i + 1) comes             wait V(i)

Shapes    as in `attend`: K and V in the type of the queries (bf16, f16), one tensor (with rotated values) or two; D 256 or 512.
Accuracy  as `attend`; the chunks of a score are summed in fp32.
Cost      64 rows by 16 keys of one tensor, 512 + 128: 126 KB through shared memory, 1,008 clocks, beside 576 products.
Source    FlashAttention-2 (Dao 2023); scores split along the head as in split-K products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from headwise.kernels.configs import Crossed
from headwise.kernels.stored import Sequences, Slots, Stored

LOG2E = 1.4426950408889634


@gluon.jit
def _rows(
    n0, hi, table, seq, table_stride, ring, g, G, N: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Rows of the cache of a tile's keys; those past the end are the last key again, which the mask leaves out."""
    pos = gl.minimum(n0 + gl.arange(0, N, gl.SliceLayout(1, layout)), hi - 1)
    if PAGE > 0:
        slot = gl.load(table + seq * table_stride + pos // PAGE).to(gl.int64) * PAGE + pos % PAGE
    elif RING:
        slot = gl.load(table + seq).to(gl.int64) + pos % ring
    else:
        slot = gl.load(table + seq).to(gl.int64) + pos
    return gl.expand_dims(slot * G + g, 1)


@gluon.jit
def _copy(to, data, rows, at, W: gl.constexpr, layout: gl.constexpr):
    columns = at + gl.arange(0, to.shape[1], gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(to, data + rows * W + gl.expand_dims(columns, 0))


@gluon.jit
def _tile(
    sk, st, sv, k_data, v_data, rows, D: gl.constexpr, R: gl.constexpr, V_TOO: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    _copy(sk, k_data, rows, 0, D + R, layout)
    if R > 0:
        _copy(st, k_data, rows, D, D + R, layout)
    if V_TOO:
        _copy(sv, v_data, rows, 0, D, layout)
    async_copy.commit_group()


@gluon.jit
def _by_row(x):
    """Of rows (C, rows, columns)."""
    return gl.expand_dims(gl.expand_dims(x, 0), 2)


@gluon.jit
def _values(C: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """0 to N - 1 in C chunks, (C, 1, N / C)."""
    c = gl.arange(0, C, gl.SliceLayout(1, gl.SliceLayout(2, layout))) * (N // C)
    d = gl.arange(0, N // C, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return gl.expand_dims(gl.expand_dims(c, 1), 2) + gl.expand_dims(gl.expand_dims(d, 0), 1)


@gluon.jit
def _wide(p, C: gl.constexpr):
    return gl.expand_dims(p, 0).broadcast_to((C, p.shape[0], p.shape[1]))


@gluon.jit
def _chunked(tile, C: gl.constexpr):
    """A tile (keys, N) of shared memory as (C, keys, N / C)."""
    return tile.reshape((tile.shape[0], C, tile.shape[1] // C)).permute((1, 0, 2))


@gluon.jit
def _attend(
    q_ptr, k_data, v_data, out_ptr, sinks_ptr, starts, lengths, table, table_stride, ring, G, scale, softcap, window, q_stride,
    H: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, R: gl.constexpr, ONE: gl.constexpr,
    RING: gl.constexpr, PAGE: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, NS: gl.constexpr, C: gl.constexpr, BY_ROW: gl.constexpr, OUT_BY_ROW: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    ml3: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C, BY_ROW, 8 // C // BY_ROW], [1, 16, 8])
    ol3: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C, OUT_BY_ROW, 8 // C // OUT_BY_ROW], [1, 16, 8])
    ql: gl.constexpr = gl.DotOperandLayout(0, ml3, 2)
    kl: gl.constexpr = gl.DotOperandLayout(1, ml3, 2)
    pl: gl.constexpr = gl.DotOperandLayout(0, ol3, 2)
    vl: gl.constexpr = gl.DotOperandLayout(1, ol3, 2)
    all3: gl.constexpr = gl.BlockedLayout([C, 1, 4], [1, 128 // BN, BN // 4], [1, 8, 1], [2, 1, 0])  # whole rows to a warp
    sl: gl.constexpr = gl.SliceLayout(0, all3)
    row: gl.constexpr = gl.SliceLayout(1, sl)
    line: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, ol3))
    BY_KEY: gl.constexpr = 8 if BN >= 32 else BN // 4
    cl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [BY_KEY, 8 // BY_KEY], [1, 0])  # 128 bytes of four keys a warp
    W: gl.constexpr = D + R
    ALONE: gl.constexpr = NS == 1  # K and V come in turn
    V_TOO: gl.constexpr = NS > 1 and not ONE
    sk = gl.allocate_shared_memory(dtype, [NS, BN, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    st = sk
    sv = sk
    if R > 0:
        st = gl.allocate_shared_memory(dtype, [NS, BN, R], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    if not ONE:
        sv = gl.allocate_shared_memory(dtype, [NS, BN, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    ss = gl.allocate_shared_memory(gl.float32, [C, BM, BN], gl.SwizzledSharedLayout(8, 32 // BN, BN // 8, [2, 1, 0]))
    sp = gl.allocate_shared_memory(dtype, [BM, BN], gl.SwizzledSharedLayout(8, 64 // BN, BN // 8, [1, 0]))
    sa = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    seq = gl.program_id(2)
    q0 = gl.load(starts + seq)
    T = gl.load(starts + seq + 1) - q0
    n = gl.load(lengths + seq)
    block = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest rows start first
    if block * BM >= T * PACK:
        return
    g = gl.program_id(1) // (GROUP // PACK)
    head = g * GROUP + gl.program_id(1) % (GROUP // PACK) * PACK
    past = n - T
    nearest = past + block * BM // PACK
    furthest = past + gl.minimum((block * BM + BM - 1) // PACK, T - 1)
    hi = furthest + 1
    lo = 0
    if WINDOWED:
        lo = gl.maximum(0, nearest - window + 1) // BN * BN
    for i in gl.static_range(NS - 1 if NS > 1 else 1):
        rows = _rows(lo + i * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
        _tile(sk.index(i), st.index(i), sv.index(i), k_data, v_data, rows, D, R, V_TOO, cl)
    r_q = block * BM + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, ql)))
    q_row = q_ptr + _by_row((q0 + r_q // PACK).to(gl.int64) * q_stride + (head + r_q % PACK) * W)
    valid = _by_row(r_q // PACK < T)
    q = gl.load(q_row + _values(C, D, ql), mask=valid, other=0.0)
    qt = q
    if R > 0:
        qt = gl.load(q_row + D + _values(C, R, ql), mask=valid, other=0.0)
    r_s = block * BM + gl.arange(0, BM, row)
    pos_q = gl.expand_dims(past + r_s // PACK, 1)
    keys = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, sl)), 0)
    acc = gl.zeros([C, BM, D // C], gl.float32, ol3)
    m = gl.full([BM], -1e30, gl.float32, row)
    l = gl.zeros([BM, BN], gl.float32, sl)
    b = 0
    for n0 in range(lo, hi, BN):
        if ALONE:
            async_copy.wait_group(0)
            _copy(sv.index(0), v_data, rows, 0, W, cl)
            async_copy.commit_group()
        else:
            to = gl.where(b == 0, NS - 1, b - 1)
            rows = _rows(n0 + (NS - 1) * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
            async_copy.wait_group(NS - 2)
        s3 = gl.zeros([C, BM, BN], gl.float32, ml3)
        s3 = mma_v2(q, _chunked(sk.index(b), C).permute((0, 2, 1)).load(kl), s3)
        if R > 0:
            s3 = mma_v2(qt, _chunked(st.index(b), C).permute((0, 2, 1)).load(kl), s3)
        ss.store(s3)
        s = gl.sum(ss.load(all3), 0)
        if ALONE:
            rows = _rows(n0 + BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
            _copy(sk.index(0), k_data, rows, 0, W, cl)
            async_copy.commit_group()
        else:  # the tile before has been read by all: the sum of the scores is behind a barrier
            _tile(sk.index(to), st.index(to), sv.index(to), k_data, v_data, rows, D, R, V_TOO, cl)
        s = s * scale  # log2(e) is in it
        if SOFTCAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
            s = softcap * 1.4426950408889634 * (1.0 - 2.0 / (gl.exp2(s * (2.0 / softcap)) + 1.0))
        cut = n0 + BN - 1 > nearest
        if WINDOWED:
            cut = cut | (n0 <= furthest - window)
        if cut:
            seen = n0 + keys <= pos_q
            if WINDOWED:
                seen = seen & (n0 + keys > pos_q - window)
            s = gl.where(seen & (n0 + keys < hi), s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))  # m starts finite, so a row that sees nothing yet adds exactly nothing
        p = gl.exp2(s - gl.expand_dims(m_new, 1))
        a = gl.exp2(m - m_new)
        l = l * gl.expand_dims(a, 1) + p
        m = m_new
        sp.store(p.to(dtype))
        sa.store(a)
        if ALONE:
            async_copy.wait_group(1)
        acc = acc * _by_row(sa.load(line))
        p3 = _wide(sp.load(gl.SliceLayout(0, pl)), C)
        acc = mma_v2(p3, _chunked(sv.index(b), C).load(vl), acc)
        b = gl.where(b == NS - 1, 0, b + 1)
    async_copy.wait_group(0)
    total = gl.sum(l, 1)
    if SINKS:
        here = r_s // PACK < T
        total += gl.exp2(gl.load(sinks_ptr + head + r_s % PACK, mask=here, other=0.0).to(gl.float32) * 1.4426950408889634 - m)
    sa.store(total)
    acc = acc / _by_row(sa.load(line))
    r_o = block * BM + gl.arange(0, BM, line)
    t = r_o // PACK
    at = ((q0 + t).to(gl.int64) * H + head + r_o % PACK) * D
    gl.store(out_ptr + _by_row(at) + _values(C, D, ol3), acc.to(dtype), mask=_by_row(t < T))


def attend_mma(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, how: Crossed, *, scale: float,
    window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `attend.attend`, which has checked its arguments; that of one tensor has rotated values, and tiles start at 16 bytes."""
    _, H, E = q_NHE.shape
    D, G, vs = out_NHD.shape[-1], k.data_SGW.shape[1], k if v is None else v
    group = H // G
    pack = max(n for n in range(1, min(group, 8) + 1) if group % n == 0)
    _attend[(-(-seqs.max_queries * pack // how.rows), H // pack, seqs.lengths_B.shape[0])](
        q_NHE, k.data_SGW, vs.data_SGW, out_NHD, q_NHE if sinks_H is None else sinks_H, seqs.starts_B1, seqs.lengths_B, slots.table,
        slots.table.stride(0), max(1, slots.ring), G, scale * LOG2E, softcap or 1.0, window or 0, q_NHE.stride(0),
        H=H, GROUP=group, PACK=pack, D=D, R=E - D, ONE=v is None, RING=slots.ring > 0, PAGE=slots.page,
        WINDOWED=window is not None, SOFTCAP=softcap is not None, SINKS=sinks_H is not None,
        BM=how.rows, BN=how.keys, NS=how.stages, C=how.chunks, BY_ROW=how.by_row, OUT_BY_ROW=how.out_by_row,
        dtype=gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16, num_warps=8,
    )  # fmt: skip
    return out_NHD
