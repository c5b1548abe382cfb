"""Decode attention on Hopper: cached keys stream through TMA while one warpgroup multiplies. Gluon, for triton 3.6.

The matrix unit wants 64 rows and a decode step has few queries, so the roles are turned round: keys are the rows.

    S^T = K q^T          (64 keys, rows of queries)       P = softmax over keys
    O^T += V^T P         (D, rows of queries)

A cache of another type than the queries' is `decode_packed`'s. Of V alone (`turn`) the rotated values of a tile's keys are made in
registers while the product with the others runs, as `attend` makes them, and lie in shared memory as the other layout's would.

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
from headwise.kernels.newer import thread_barrier
from headwise.kernels.stored import Sequences, Slots, Stored, cos_sin
from headwise.kernels.turn import Turn

_cos_sin = gluon.jit(cos_sin.fn)
BN = 64  # keys of a tile, which is a page


@gluon.jit
def share(starts, lengths, window, ring, n_splits, WINDOWED: gl.constexpr, RING: gl.constexpr):
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
def tile_slot(i, seq, lo, run, tiles_run, ring, table, table_stride, RING: gl.constexpr, PAGED: gl.constexpr):
    """Tile i's first slot, and its last position."""
    newest = lo + i * 64 + 63
    if PAGED:
        slot = gl.load(table + seq * table_stride + lo // 64 + i) * 64
    else:
        slot = gl.load(table + seq)
        if RING:
            slot += gl.where(i < tiles_run, lo % ring + i * 64, (i - tiles_run) * 64)
            newest = gl.where(i < tiles_run, newest, lo + run + (i - tiles_run) * 64 + 63)
        else:
            slot += lo + i * 64
    return slot, newest


@gluon.jit
def _load(
    kd, td, vd, starts, lengths, table, table_stride, ring, window, n_splits, sk, st, sv, k_full, v_full, k_empty, v_empty,
    D: gl.constexpr, R: gl.constexpr, P: gl.constexpr, NS: gl.constexpr, WINDOWED: gl.constexpr, RING: gl.constexpr,
    PAGED: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
    g = gl.program_id(1)
    W: gl.constexpr = D if P > 0 else D + R
    for i in range(first, last):
        slot, newest = tile_slot(i, seq, lo, run, tiles_run, ring, table, table_stride, RING, PAGED)
        if newest >= n - T:
            gdc_wait()
        s = (i - first) % NS
        ph = (((i - first) // NS) & 1) ^ 1
        mbarrier.wait(k_empty.index(s), ph)
        mbarrier.expect(k_full.index(s), 64 * W * 2)
        tma.async_copy_global_to_shared(kd, [slot, g * W], k_full.index(s), sk.index(s))
        if W > D:
            tma.async_copy_global_to_shared(td, [slot, g * W + D], k_full.index(s), st.index(s))
        if R == 0:
            mbarrier.wait(v_empty.index(s), ph)
            mbarrier.expect(v_full.index(s), 64 * D * 2)
            tma.async_copy_global_to_shared(vd, [slot, g * D], v_full.index(s), sv.index(s))


@gluon.jit
def _turn(sk, st, pos, freq, w_a, w_b, D: gl.constexpr, PW: gl.constexpr, layout: gl.constexpr, dtype: gl.constexpr):
    """The rotated values of the tile `sk`, whose first key is at `pos`, to `st`: first the pairs' first halves, then the others."""
    at = (pos + gl.arange(0, 64, gl.SliceLayout(1, layout))).to(gl.float32)
    cos, sin = _cos_sin(gl.expand_dims(at, 1) * gl.expand_dims(freq, 0))
    a = sk.slice(0, PW, dim=1).load(layout).to(gl.float32) * gl.expand_dims(w_a, 0)
    b = sk.slice(D // 2, PW, dim=1).load(layout).to(gl.float32) * gl.expand_dims(w_b, 0)
    st.slice(0, PW, dim=1).store((a * cos - b * sin).to(dtype))
    st.slice(PW, PW, dim=1).store((b * cos + a * sin).to(dtype))


@gluon.jit
def _consume(
    turn_w, turn_freq, magnitude,
    q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G, q_stride,
    sq, sqt, sk, st, sv, sp, k_full, v_full, k_empty, v_empty,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr, P: gl.constexpr, NS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr, SP: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    seq, q0, T, n, lo, run, tiles_run, first, last = share(starts, lengths, window, ring, n_splits, WINDOWED, RING)
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
        here = ok_q
        if P > 0:  # the halves of the pairs, each as wide as the tile's
            here = ok_q & (r_t % (R // 2) < P)
            r_t = gl.where(r_t < R // 2, r_t, r_t - R // 2 + P)
        qt = gl.load(q_ptr + gl.expand_dims(q_row, 1) + D + r_t, mask=here, other=0.0)
    sq.store(q)
    if R > 0:
        sqt.store(qt)
    fence_async_shared()
    pairs: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if P > 0:
        c = gl.arange(0, R // 2, gl.SliceLayout(0, pairs))
        freq = gl.load(turn_freq + c, mask=c < P, other=0.0)
        w_a = gl.load(turn_w + c, mask=c < P, other=0.0).to(gl.float32) * magnitude
        w_b = gl.load(turn_w + D // 2 + c, mask=c < P, other=0.0).to(gl.float32) * magnitude
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
        if P > 0:
            _turn(sk.index(b), st.index(0), i * 64, freq, w_a, w_b, D, R // 2, pairs, dtype)
            fence_async_shared()
            s = warpgroup_mma(st.index(0), sqt.permute((1, 0)), s, is_async=True)
        elif R > 0:
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
        m_new = gl.maximum(m, gl.max(s, 0) * scale)
        p = gl.exp2(s * scale - gl.expand_dims(m_new, 0))
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
    partials(acc, gl.arange(0, D, gl.SliceLayout(1, sl)), m, l, out_ptr, sinks_ptr, part_ptr, stat_ptr, seq, q0, T, g, G, n_splits,
             H, GROUP, ROWS, D, SINKS, MERGE)  # fmt: skip
    finish(out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, seq, q0, T, g, G, n_splits, H, GROUP, ROWS, D, SINKS, MERGE, MERGED,
           SP)  # fmt: skip


@gluon.jit
def partials(
    acc, dims, m, l, out_ptr, sinks_ptr, part_ptr, stat_ptr, seq, q0, T, g, G, n_splits,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Values `dims` of a program's rows, `acc` (dims, rows): the result, or what is merged with other programs' shares."""
    rows = gl.arange(0, ROWS, m.type.layout)
    h = g * GROUP + rows % GROUP
    valid = rows < T * GROUP
    if MERGE == 0:
        if SINKS:
            l += gl.exp2(gl.load(sinks_ptr + h, mask=valid, other=0.0).to(gl.float32) * 1.4426950408889634 - m)
        at = ((q0 + rows // GROUP).to(gl.int64) * H + h) * D
        o = (acc / gl.expand_dims(l, 0)).to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + gl.expand_dims(at, 0) + gl.expand_dims(dims, 1), o, mask=gl.expand_dims(valid, 0))
    else:
        base = ((seq * G + g) * n_splits + gl.program_id(0)).to(gl.int64) * ROWS
        gl.store(part_ptr + gl.expand_dims((base + rows) * D, 0) + gl.expand_dims(dims, 1), acc, mask=gl.expand_dims(valid, 0))
        gl.store(stat_ptr + (base + rows) * 2, m, mask=valid)
        gl.store(stat_ptr + (base + rows) * 2 + 1, l, mask=valid)


@gluon.jit
def finish(
    out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, seq, q0, T, g, G, n_splits,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr,
    MERGED: gl.constexpr, SP: gl.constexpr,
):  # fmt: skip
    """With MERGE 1, the last program of a group merges the shares of all.

    Where they fit registers (64 a thread), a thread has all shares of its values and no row waits for the one before; else rows
    come one after another, their shares over the warps.
    """
    if MERGE == 1:
        thread_barrier()
        done = gl.atomic_add(count_ptr + seq * G + g, 1, sem="acq_rel")
        if done == n_splits - 1:
            MR: gl.constexpr = 1 if MERGED == 1 else 2 if MERGED == 2 else 4  # own_kernels.MERGED_ROWS
            AT_ONCE: gl.constexpr = SP * MR * D <= 64 * 128
            N: gl.constexpr = MR if AT_ONCE else 1
            V: gl.constexpr = D if SP * N * D <= 64 * 128 else 64 * 128 // SP
            WIDE: gl.constexpr = 4 if V >= 128 else V // 32
            ml: gl.constexpr = gl.BlockedLayout(
                [SP if AT_ONCE else 1, 1, WIDE], [1, 1, 32], [1, N, 4 // N] if AT_ONCE else [4, 1, 1], [2, 1, 0]
            )
            stats: gl.constexpr = gl.SliceLayout(2, ml)  # (shares, rows)
            sums: gl.constexpr = gl.SliceLayout(0, ml)  # (rows, values)
            sx = gl.expand_dims(gl.arange(0, SP, gl.SliceLayout(1, stats)), 1)
            dx = gl.expand_dims(gl.arange(0, V, gl.SliceLayout(0, sums)), 0)
            for first in gl.static_range(0, MERGED, N):
                r = first + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, stats)), 0)
                share_row = ((seq * G + g) * n_splits + sx) * ROWS + r  # all shares' values are less than 2**31
                ok = (sx < n_splits) & (r < MERGED)
                m_s = gl.load(stat_ptr + share_row * 2, mask=ok, other=-1e30, cache_modifier=".cg")
                l_s = gl.load(stat_ptr + share_row * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
                top = gl.max(m_s, 0)
                w = gl.exp2(m_s - gl.expand_dims(top, 0))
                total = gl.convert_layout(gl.sum(w * l_s, 0), gl.SliceLayout(1, sums))
                r_o = first + gl.arange(0, N, gl.SliceLayout(1, sums))
                h = g * GROUP + r_o % GROUP
                if SINKS:
                    sink = gl.load(sinks_ptr + h, mask=r_o < MERGED, other=0.0).to(gl.float32) * 1.4426950408889634
                    total += gl.exp2(sink - gl.convert_layout(top, gl.SliceLayout(1, sums)))
                to = gl.expand_dims(((q0 + r_o // GROUP).to(gl.int64) * H + h) * D, 1) + dx
                wanted = gl.expand_dims((r_o < MERGED) & (r_o < T * GROUP), 1)
                for v0 in gl.static_range(0, D, V):
                    x = gl.load(part_ptr + gl.expand_dims(share_row * D + v0, 2) + gl.expand_dims(dx, 0),
                                mask=gl.expand_dims(ok, 2), other=0.0, cache_modifier=".cg")  # fmt: skip
                    o = gl.sum(x * gl.expand_dims(w, 2), 0) / gl.expand_dims(total, 1)
                    gl.store(out_ptr + to + v0, o.to(out_ptr.dtype.element_ty), mask=wanted)
            gl.store(count_ptr + seq * G + g, 0)


@gluon.jit
def _decode(
    kd, td, vd, turn_w, turn_freq, magnitude, q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, table,
    table_stride, ring, window, scale, n_splits, G, q_stride,
    H: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, R: gl.constexpr, P: gl.constexpr, NS: gl.constexpr,
    WINDOWED: gl.constexpr, RING: gl.constexpr, PAGED: gl.constexpr, SINKS: gl.constexpr, MERGE: gl.constexpr, MERGED: gl.constexpr,
    SP: gl.constexpr, dtype: gl.constexpr,
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
        st = gl.allocate_shared_memory(dtype, [1 if P > 0 else NS, 64, R], tail)
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
    gl.warp_specialize([
        (_consume, (turn_w, turn_freq, magnitude,
                    q_ptr, out_ptr, sinks_ptr, part_ptr, stat_ptr, count_ptr, starts, lengths, ring, window, scale, n_splits, G,
                    q_stride, sq, sqt, sk, st, sv, sp, k_full, v_full, k_empty, v_empty,
                    H, GROUP, ROWS, D, R, P, NS, WINDOWED, RING, SINKS, MERGE, MERGED, SP, dtype)),
        (_load, (kd, td, vd, starts, lengths, table, table_stride, ring, window, n_splits, sk, st, sv, k_full, v_full, k_empty,
                 v_empty, D, R, P, NS, WINDOWED, RING, PAGED)),
    ], [1], [24])  # fmt: skip


def shares(
    who: str, none: Tensor, scratch: Tensor | None, count: Tensor | None, rows: int, n_splits: int, D: int
) -> tuple[Tensor, Tensor, int]:
    """Where the shares of `rows` rows go, their maxima and sums; and who merges them: nobody, the launch itself, the next one."""
    if n_splits == 1:
        return none, none, 0
    if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < rows * (D + 2):
        raise ValueError(f"{who}: {n_splits} splits need scratch of {rows * (D + 2)} fp32 values, got {scratch}")
    return scratch[: rows * D], scratch[rows * D :], 2 if count is None else 1


def attend_decode(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float,
    window: int | None = None, sinks_H: Tensor | None = None, n_splits: int = 1, scratch: Tensor | None = None,
    count: Tensor | None = None, overlap: bool = True, turn: Turn | None = None,
) -> Tensor:  # fmt: skip
    """Decode, or the verification of a few draft tokens.

    Args:
        scratch: `partial_floats` fp32 values where keys are split.
        count: int32 zeros, one a sequence and KV head: the last program merges, in this launch, which pays for few rows. It
            leaves zeros. None: a second launch merges.
        overlap: begin while the launch before still runs; False where that one, or the one before it, may write the keys.
        turn: what makes keys, where `k` holds V alone.
    """
    _, H, E = q_NHE.shape
    D = out_NHD.shape[-1]
    S, G, _ = k.data_SGW.shape
    R, group, B = E - D, H // G, seqs.lengths_B.shape[0]
    rows = max(8, triton.next_power_of_2(seqs.max_queries * group))
    if rows * D > 32 * 512:
        raise ValueError(f"attend_decode: {seqs.max_queries} queries of {group} heads are {rows} rows (<= {32 * 512 // D})")
    P = 0 if turn is None else turn.freq_P.shape[0]
    dtype = gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16
    made, tile = (64 * R, D) if P else (0, E if v is None else 2 * D)
    NS = min(8, max(2, (190 * 1024 - (rows * E + made) * 2) // (64 * tile * 2)))

    def desc(x: Tensor, columns: int) -> TensorDescriptor:
        flat = x.view(S, -1)
        return TensorDescriptor.from_tensor(flat, [64, columns], gl.NVMMASharedLayout.get_default_for([64, columns], dtype))

    kd = desc(k.data_SGW, D)
    td, vd = desc(k.data_SGW, R) if R and not P else kd, kd if v is None else desc(v.data_SGW, D)
    part, stat, mode = shares("attend_decode", q_NHE, scratch, count, B * G * n_splits * rows, n_splits, D)
    _decode[(n_splits, G, B)](
        kd, td, vd, q_NHE if turn is None else turn.w_D, q_NHE if turn is None else turn.freq_P,
        1.0 if turn is None else turn.magnitude,
        q_NHE, out_NHD, q_NHE if sinks_H is None else sinks_H, part, stat, seqs.lengths_B if count is None else count,
        seqs.starts_B1, seqs.lengths_B, slots.table, slots.table.stride(0), max(1, slots.ring), window or 0, scale * LOG2E,
        n_splits, G, q_NHE.stride(0),
        H=H, GROUP=group, ROWS=rows, D=D, R=R, P=P, NS=NS, WINDOWED=window is not None, RING=slots.ring > 0, PAGED=slots.page > 0,
        SINKS=sinks_H is not None, MERGE=mode, MERGED=seqs.max_queries * group, SP=triton.next_power_of_2(n_splits),
        dtype=dtype, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    if mode == 2:
        merge(part, stat, out_NHD, sinks_H, seqs, G=G, n_splits=n_splits, blocks=1, rows=rows, early=True)
    return out_NHD
