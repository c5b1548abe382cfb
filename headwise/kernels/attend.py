"""Attention of a step's queries over cached keys, fused: prefill, decode and the verification of draft tokens in one kernel.

The rows of a tile are (query, head) pairs of one group, so that a key is read once for all heads that share it and a lone
query still fills a matrix tile. The keys of a row are its window, or everything before it. With `splits` > 1 the keys go to
several programs (a batch of one fills the card) and a second, small kernel merges their partial results, which is exact.

Shapes    N queries of all sequences, H query heads, G KV heads, D values of a head (64, 128, 256, 512), E values of a key:
          q_NHE, cached k (S, G, E) and v (S, G, D) -> out_NHD. One tensor for both (E = D + R, a power of two R): v None; the
          first D values are the value, all E the key. V alone (v None, k (S, G, D), `turn`): the R values are made here, of the
          2 * P values that rotate, read a second time (from the first-level cache, mostly).
Accuracy  fp32 scores, softmax and sums; products in q's type. Relative error within TOLERANCE of `reference`. Of V alone the
          rotation is fp32, rounded once; its angle is the product position * frequency in fp32, as that of the query is: an angle
          put together of a tile's and a key's in it would be rounded otherwise, by up to 2^-6 at position 2^18, and a table of
          all positions would be memory and reads. cos and sin (`stored.cos_sin`) hold for positions below 2^18.
Cost      prefill 2 * (E + D) * H operations a visible (query, key) pair; decode the bytes of the keys in sight, once.
Source    FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et al. 2023); packed groups as in FlashInfer's decode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from headwise.kernels.configs import CROSSED, DECODE_ROWS, GLUON, Config, Crossed, config_for
from headwise.kernels.stored import (
    Sequences,
    Slots,
    Stored,
    bits,
    columns,
    cos_sin,
    device_arch,
    load_values,
    slot_of,
)
from headwise.kernels.turn import Turn

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LOG2E = 1.4426950408889634
HEAD_DIMS = (64, 128, 256, 512)


def reference(
    q_NHE: Tensor, k_BSGE: list[Tensor], v_BSGD: list[Tensor] | None, seqs: Sequences, *, scale: float, D: int,
    window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula in fp64, sequence by sequence; keys and values in order of position, not of slot. (N, H, D) in fp64."""
    out = torch.empty(*q_NHE.shape[:2], D, dtype=torch.float64, device=q_NHE.device)
    starts, lengths = seqs.starts_B1.tolist(), seqs.lengths_B.tolist()
    for b, n in enumerate(lengths):
        q = q_NHE[starts[b] : starts[b + 1]].double()
        T, H, _ = q.shape
        if not T:
            continue
        k = k_BSGE[b][:n].double()
        v = k[..., :D] if v_BSGD is None else v_BSGD[b][:n].double()
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        s = torch.einsum("the,nhe->htn", q, k) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        i = torch.arange(n - T, n, device=q.device)[:, None]
        j = torch.arange(n, device=q.device)[None, :]
        seen = (j <= i) & (j > i - window) if window else j <= i
        s = s.masked_fill(~seen, float("-inf"))
        if sinks_H is not None:
            s = torch.cat((s, sinks_H.double()[:, None, None].expand(H, T, 1)), -1)
        p = s.softmax(-1)[..., :n]
        out[starts[b] : starts[b + 1]] = torch.einsum("htn,nhd->thd", p, v)
    return out


@triton.jit
def _tiles(
    acc, m, l, q, q_tail, q_turn, pos_q, lo, hi, k_data, k_scales, v_data, v_scales, turn_w, turn_freq, magnitude, table, seq,
    table_stride, ring, g, G, scale, softcap, window,
    D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, ONE: tl.constexpr, FORMAT: tl.constexpr, RING: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax's running sums over the keys at positions [lo, hi); without MASKED every row sees all of them, whole tiles."""
    dtype: tl.constexpr = q.dtype
    W: tl.constexpr = D if P > 0 else D + R
    if P > 0:
        PW: tl.constexpr = q_tail.shape[1]
        c = columns(PW, FORMAT)
        freq = tl.load(turn_freq + c, mask=c < P, other=0.0)
        w_a = tl.load(turn_w + c, mask=c < P, other=0.0).to(tl.float32) * magnitude
        w_b = tl.load(turn_w + D // 2 + c, mask=c < P, other=0.0).to(tl.float32) * magnitude
    for n0 in tl.range(lo, hi, BN, num_stages=STAGES):
        pos = n0 + tl.arange(0, BN)
        ok = pos < hi
        at = tl.where(ok, pos, lo) if MASKED else pos  # no table entry past the end is read
        rows = slot_of(at, table, seq, table_stride, ring, RING, PAGE) * G + g
        k = load_values(k_data, k_scales, rows, ok, 0, D, W, FORMAT, MASKED, dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if P > 0:
            cos, sin = cos_sin(pos.to(tl.float32)[:, None] * freq[None, :])
            v_a = load_values(k_data, k_scales, rows, ok, 0, PW, W, FORMAT, MASKED, tl.float32) * w_a[None, :]
            v_b = load_values(k_data, k_scales, rows, ok, D // 2, PW, W, FORMAT, MASKED, tl.float32) * w_b[None, :]
            s = tl.dot(q_tail, tl.trans((v_a * cos - v_b * sin).to(dtype)), s, input_precision="ieee")
            s = tl.dot(q_turn, tl.trans((v_b * cos + v_a * sin).to(dtype)), s, input_precision="ieee")
        elif R > 0:
            k_tail = load_values(k_data, k_scales, rows, ok, D, R, W, FORMAT, MASKED, dtype)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
        s = s * scale  # log2(e) is in it
        if SOFTCAP:  # tanh(x) = 1 - 2 / (e^2x + 1)
            s = softcap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(s * (2.0 / softcap)) + 1.0))
        if MASKED:
            seen = (pos[None, :] <= pos_q[:, None]) & ok[None, :]
            if WINDOWED:
                seen = seen & (pos[None, :] > pos_q[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # m starts finite, so a row that sees nothing yet adds exactly nothing
        p = tl.exp2(s - m_new[:, None])
        a = tl.exp2(m - m_new)
        l = l * a + tl.sum(p, 1)
        acc = acc * a[:, None]
        m = m_new
        if ONE:
            acc = tl.dot(p.to(dtype), k, acc, input_precision="ieee")
        else:
            v = load_values(v_data, v_scales, rows, ok, 0, D, D, FORMAT, MASKED, dtype)
            acc = tl.dot(p.to(dtype), v, acc, input_precision="ieee")
    return acc, m, l


@triton.jit
def _attend(
    q_ptr, k_data, k_scales, v_data, v_scales, turn_w, turn_freq, magnitude, out_ptr, sinks_ptr, part_ptr, stat_ptr, starts,
    lengths, table, table_stride, ring, G,
    scale, softcap, window, n_splits,
    q_stride, H: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    PW: tl.constexpr, ONE: tl.constexpr, FORMAT: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(2)
    q0 = tl.load(starts + seq)
    T = tl.load(starts + seq + 1) - q0
    n = tl.load(lengths + seq)
    if SPLIT:
        split = tl.program_id(0) % n_splits
        block = tl.program_id(0) // n_splits
    else:
        split = 0
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows start first
    if block * BM >= T * PACK:
        return
    g = tl.program_id(1) // (GROUP // PACK)
    rows = block * BM + tl.arange(0, BM)
    t = rows // PACK
    h = g * GROUP + tl.program_id(1) % (GROUP // PACK) * PACK + rows % PACK
    valid = t < T
    cols = columns(D, FORMAT)
    q_row = (q0 + t).to(tl.int64) * q_stride + h * (D + R)
    q = tl.load(q_ptr + q_row[:, None] + cols[None, :], mask=valid[:, None], other=0.0)
    q_tail = q
    q_turn = q
    if P > 0:  # the halves of the pairs apart, each padded to a power of two
        c = columns(PW, FORMAT)
        here = valid[:, None] & (c < P)[None, :]
        q_tail = tl.load(q_ptr + q_row[:, None] + D + c[None, :], mask=here, other=0.0)
        q_turn = tl.load(q_ptr + q_row[:, None] + D + P + c[None, :], mask=here, other=0.0)
    elif R > 0:
        q_tail = tl.load(q_ptr + q_row[:, None] + D + columns(R, FORMAT)[None, :], mask=valid[:, None], other=0.0)
    past = n - T
    pos_q = past + t
    nearest = past + block * BM // PACK
    furthest = past + tl.minimum((block * BM + BM - 1) // PACK, T - 1)
    hi = furthest + 1
    lo = 0
    if WINDOWED:
        lo = tl.maximum(0, nearest - window + 1) // BN * BN
    acc = tl.zeros((BM, D), tl.float32)
    m = tl.full((BM,), -1e30, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, n_splits), BN) * BN
        lo = tl.minimum(lo + split * share, hi)
        hi = tl.minimum(lo + share, hi)
        acc, m, l = _tiles(acc, m, l, q, q_tail, q_turn, pos_q, lo, hi, k_data, k_scales, v_data, v_scales,
            turn_w, turn_freq, magnitude, table, seq, table_stride, ring, g, G, scale, softcap, window,
            D, R, P, ONE, FORMAT, RING, PAGE, WINDOWED, SOFTCAP, True, BN, STAGES)  # fmt: skip
        base = (((seq * G + g) * (GROUP // PACK) + tl.program_id(1) % (GROUP // PACK)) * n_splits + split).to(tl.int64)
        base = (base * (tl.num_programs(0) // n_splits) + block) * BM
        r = tl.arange(0, BM)
        tl.store(part_ptr + (base + r)[:, None] * D + cols[None, :], acc, mask=valid[:, None])
        tl.store(stat_ptr + (base + r) * 2, m, mask=valid)
        tl.store(stat_ptr + (base + r) * 2 + 1, l, mask=valid)
        return
    left = lo
    if WINDOWED:  # the window's edge cuts these tiles
        left = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(0, furthest - window + 1), BN) * BN), hi)
        acc, m, l = _tiles(acc, m, l, q, q_tail, q_turn, pos_q, lo, left, k_data, k_scales, v_data, v_scales,
            turn_w, turn_freq, magnitude, table, seq, table_stride, ring, g, G, scale, softcap, window,
            D, R, P, ONE, FORMAT, RING, PAGE, WINDOWED, SOFTCAP, True, BN, STAGES)  # fmt: skip
    right = tl.maximum(left, (nearest + 1) // BN * BN)
    acc, m, l = _tiles(acc, m, l, q, q_tail, q_turn, pos_q, left, right, k_data, k_scales, v_data, v_scales,
        turn_w, turn_freq, magnitude, table, seq, table_stride, ring, g, G, scale, softcap, window,
        D, R, P, ONE, FORMAT, RING, PAGE, WINDOWED, SOFTCAP, False, BN, STAGES)  # fmt: skip
    acc, m, l = _tiles(acc, m, l, q, q_tail, q_turn, pos_q, right, hi, k_data, k_scales, v_data, v_scales,
        turn_w, turn_freq, magnitude, table, seq, table_stride, ring, g, G, scale, softcap, window,
        D, R, P, ONE, FORMAT, RING, PAGE, WINDOWED, SOFTCAP, True, BN, STAGES)  # fmt: skip
    if SINKS:
        l += tl.exp2(tl.load(sinks_ptr + h, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634 - m)
    out = acc / l[:, None]
    out_row = ((q0 + t).to(tl.int64) * H + h) * D
    tl.store(out_ptr + out_row[:, None] + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _merge(
    part_ptr, stat_ptr, out_ptr, sinks_ptr, starts, max_queries, G, n_splits, blocks,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr, SP: tl.constexpr,
    BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of the result, BD columns of it: the splits' sums, each weighted by what its own maximum was short of the largest."""
    if EARLY:  # the launch after this one may begin to fetch keys
        gdc_launch_dependents()
    seq = tl.program_id(0) // max_queries
    t = tl.program_id(0) % max_queries
    q0 = tl.load(starts + seq)
    if t >= tl.load(starts + seq + 1) - q0:
        return
    h = tl.program_id(1)
    g = h // GROUP
    row = t * GROUP + h % GROUP
    s = tl.arange(0, SP)
    base = ((((seq * G + g) * n_splits + s).to(tl.int64)) * blocks + row // BM) * BM + row % BM
    m = tl.load(stat_ptr + base * 2, mask=s < n_splits, other=-1e30)
    l = tl.load(stat_ptr + base * 2 + 1, mask=s < n_splits, other=0.0)
    top = tl.max(m, 0)
    w = tl.exp2(m - top)
    total = tl.sum(w * l, 0)
    if SINKS:
        total += tl.exp2(tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634 - top)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    x = tl.load(part_ptr + base[:, None] * D + d[None, :], mask=(s < n_splits)[:, None], other=0.0)
    out = tl.sum(x * w[:, None], 0) / total
    tl.store(out_ptr + ((q0 + t).to(tl.int64) * H + h) * D + d, out.to(out_ptr.dtype.element_ty))


def partial_floats(n_seqs: int, n_heads: int, n_kv_heads: int, max_queries: int, D: int, n_splits: int, rows: int) -> int:
    """fp32 values that a split launch needs as scratch: a partial result, a maximum and a sum for each row and split."""
    if n_splits == 1:
        return 0
    blocks = -(-max_queries * (n_heads // n_kv_heads) // rows)
    return n_seqs * n_kv_heads * n_splits * blocks * rows * (D + 2)


def attend(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, *, scale: float,
    window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None, n_splits: int = 1,
    scratch: Tensor | None = None, config: Config | None = None, turn: Turn | None = None,
) -> Tensor:  # fmt: skip
    """Attention into `out_NHD`. Queries are the last of their sequence: query t of T sits at position length - T + t.

    Args:
        window: keys a query sees, itself included; None: all before it.
        n_splits: programs that share the keys of one row; more than 1 needs `scratch` of `partial_floats` fp32 values.
        turn: what makes keys, where `k` holds V alone.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    _, H, E = q_NHE.shape
    D, G = out_NHD.shape[-1], k.data_SGW.shape[1]
    check(q_NHE, k, v, out_NHD, seqs, slots, window, sinks_H, turn)
    group = H // G
    plain = config is not None or turn is not None or n_splits > 1
    crossed = None if plain else _crossed(q_NHE, k, v, D, seqs.max_queries * group)
    if crossed is not None:
        from headwise.kernels.attend_mma import attend_mma  # Gluon's API changes between versions of triton

        return attend_mma(q_NHE, k, v, out_NHD, seqs, slots, crossed, scale=scale, window=window, softcap=softcap, sinks_H=sinks_H)
    config = config or _config(q_NHE, k, v, D, seqs.max_queries * group, turn)
    pack = group if n_splits > 1 else config.pack(group)
    blocks = -(-seqs.max_queries * pack // config.rows)
    B = seqs.lengths_B.shape[0]
    part = stat = q_NHE
    if n_splits > 1:
        n = B * G * n_splits * blocks * config.rows
        if scratch is None or scratch.dtype != torch.float32 or scratch.numel() < n * (D + 2):
            raise ValueError(f"attend: {n_splits} splits need scratch of {n * (D + 2)} fp32 values, got {scratch}")
        part, stat = scratch[: n * D], scratch[n * D :]
    vs = k if v is None else v
    none = q_NHE
    P = 0 if turn is None else turn.freq_P.shape[0]
    _attend[(blocks * n_splits, G * group // pack, B)](
        q_NHE, bits(k.data_SGW),
        none if k.scales_SGB is None else k.scales_SGB,
        bits(vs.data_SGW),
        none if vs.scales_SGB is None else vs.scales_SGB,
        none if turn is None else turn.w_D, none if turn is None else turn.freq_P, 1.0 if turn is None else turn.magnitude,
        out_NHD, none if sinks_H is None else sinks_H, part, stat, seqs.starts_B1, seqs.lengths_B, slots.table,
        slots.table.stride(0), max(1, slots.ring), G, scale * LOG2E, softcap or 1.0, window or 0, n_splits, q_NHE.stride(0),
        H=H, GROUP=group, PACK=pack, D=D, R=E - D, P=P,
        PW=max(32, triton.next_power_of_2(P)), ONE=v is None, FORMAT=k.format, RING=slots.ring > 0, PAGE=slots.page,
        WINDOWED=window is not None, SOFTCAP=softcap is not None, SINKS=sinks_H is not None, SPLIT=n_splits > 1,
        BM=config.rows, BN=config.keys, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    if n_splits > 1:
        merge(part, stat, out_NHD, sinks_H, seqs, G=G, n_splits=n_splits, blocks=blocks, rows=config.rows)
    return out_NHD


def _config(q_NHE: Tensor, k: Stored, v: Stored | None, D: int, rows: int, turn: Turn | None) -> Config:
    arch = device_arch(q_NHE.device)
    return config_for(D, one=v is None, blocks=not k.floats, turned=turn is not None, rows=rows, arch=arch)


def _crossed(q_NHE: Tensor, k: Stored, v: Stored | None, D: int, rows: int) -> Crossed | None:
    """The launch of `attend_mma`, for prefill where `configs.CROSSED` has one; None: the kernel here takes it."""
    if not q_NHE.is_cuda or rows <= DECODE_ROWS or tuple(map(int, triton.__version__.split(".")[:2])) != GLUON:
        return None
    R = q_NHE.shape[2] - D
    if q_NHE.dtype == torch.float32 or (k.floats and k.data_SGW.dtype != q_NHE.dtype) or (v is None) != (R > 0):
        return None
    if any(x.data_ptr() % 16 for x in (*k, *(v or ())) if x is not None):  # it copies so much at a time
        return None
    return CROSSED.get((device_arch(q_NHE.device), D, R, k.floats))


def tile_rows(q_NHE: Tensor, k: Stored, v: Stored | None, D: int, rows: int, turn: Turn | None = None) -> int:
    """Rows that a split of `rows` (query, head) pairs has in scratch: whole tiles of the launch that the table gives."""
    tile = _config(q_NHE, k, v, D, rows, turn).rows
    return -(-rows // tile) * tile


def merge(
    part: Tensor, stat: Tensor, out_NHD: Tensor, sinks_H: Tensor | None, seqs: Sequences, *, G: int, n_splits: int, blocks: int,
    rows: int, early: bool = False,
) -> None:  # fmt: skip
    """The second launch: `part` and `stat` of every split into `out_NHD`. `early`: lets the next launch begin (sm90)."""
    _, H, D = out_NHD.shape
    bd = min(D, 128)
    _merge[(seqs.lengths_B.shape[0] * seqs.max_queries, H, D // bd)](
        part, stat, out_NHD, out_NHD if sinks_H is None else sinks_H, seqs.starts_B1, seqs.max_queries, G, n_splits, blocks,
        H=H, GROUP=H // G, D=D, SINKS=sinks_H is not None, BM=rows, SP=triton.next_power_of_2(n_splits), BD=bd, EARLY=early,
        num_warps=4,
    )  # fmt: skip


def check(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, window: int | None,
    sinks_H: Tensor | None, turn: Turn | None = None,
) -> None:  # fmt: skip
    """Refuses misuse before a launch. What a table on the device holds is not read, that would wait for it: only its size is.

    Raises:
        ValueError: everything that is wrong, with both numbers.
    """
    found = [*_problems(q_NHE, k, v, out_NHD, window, sinks_H, turn), *_slot_problems(k, seqs, slots)]
    if found:
        raise ValueError("attend: " + "; ".join(found))


def _problems(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, window: int | None, sinks_H: Tensor | None, turn: Turn | None
) -> Iterator[str]:
    N, H, E = q_NHE.shape
    S, G, _ = k.data_SGW.shape
    D = out_NHD.shape[-1]
    R = E - D
    if q_NHE.dtype not in TOLERANCE:
        yield f"queries in {q_NHE.dtype}, not one of {', '.join(map(str, TOLERANCE))}"
    if D not in HEAD_DIMS:
        yield f"head_dim {D} not in {HEAD_DIMS}"
    if R < 0 or (R > 0 and (R < 16 or R & (R - 1))):
        yield f"{R} rotated values beside the value: 0 or a power of two of at least 16"
    if H % G:
        yield f"{H} query heads over {G} KV heads"
    if window is not None and window < 1:
        yield f"a window of {window} keys (>= 1)"
    if turn is not None:
        yield from _turn_problems(turn, k, v, D, R)
    elif k.n_values != E:
        yield f"keys of {k.n_values} values for queries of {E}"
    if v is not None and R:
        yield f"queries of {E} values with values of {D}: two tensors have one size"
    if v is not None and v.n_values != D:
        yield f"values of {v.n_values}, results of {D}"
    if v is not None and v.data_SGW.dtype != k.data_SGW.dtype:
        yield f"keys in {k.data_SGW.dtype}, values in {v.data_SGW.dtype}"
    if out_NHD.shape != (N, H, D):
        yield f"results {tuple(out_NHD.shape)} for queries {tuple(q_NHE.shape)}"
    if q_NHE.stride()[1:] != (E, 1) or not out_NHD.is_contiguous():
        yield f"query strides {q_NHE.stride()} (a token's heads together), result strides {out_NHD.stride()} (contiguous)"
    if sinks_H is not None and sinks_H.shape != (H,):
        yield f"sinks {tuple(sinks_H.shape)} for {H} heads"
    for x in (k,) if v is None else (k, v):
        if not x.data_SGW.is_contiguous():
            yield f"cache strides {x.data_SGW.stride()} (contiguous)"
        if x.data_SGW.dtype in (torch.int8, torch.uint8):
            of, needs = None if x.scales_SGB is None else tuple(x.scales_SGB.shape), (S, G, x.n_values // 32)
            if of != needs:
                yield f"scales {of} of blocks in {x.data_SGW.dtype}: {needs}"


def _turn_problems(turn: Turn, k: Stored, v: Stored | None, D: int, R: int) -> Iterator[str]:
    P = turn.freq_P.shape[0]
    if v is not None or k.n_values != D:
        yield f"keys to be made of V alone, and {'a second tensor' if v else f'{k.n_values} values stored of heads of {D}'}"
    if turn.w_D.shape != (D,) or turn.freq_P.dtype != torch.float32 or not turn.freq_P.is_contiguous():
        yield f"a norm of {tuple(turn.w_D.shape)} for heads of {D}, frequencies in {turn.freq_P.dtype} (float32, contiguous)"
    if not 0 < 2 * P <= R:
        yield f"{P} rotating pairs for {R} rotated values of a query"


def _slot_problems(k: Stored, seqs: Sequences, slots: Slots) -> Iterator[str]:
    S, table, B = k.data_SGW.shape[0], slots.table, seqs.lengths_B.shape[0]
    for name, x in (("slot table", table), ("starts", seqs.starts_B1), ("lengths", seqs.lengths_B)):
        if x.dtype != torch.int32:
            yield f"{name} of {x.dtype} (int32)"
    if seqs.starts_B1.shape[0] != B + 1 or table.shape[0] != B:
        yield f"{table.shape[0]} rows of the slot table and {seqs.starts_B1.shape[0]} starts for {B} sequences ({B}, {B + 1})"
    if slots.ring and slots.page:
        yield f"a ring of {slots.ring} and pages of {slots.page}: one of them"
    if slots.ring > S:
        yield f"a ring of {slots.ring} in a cache of {S} slots"
    if slots.page and (table.dim() != 2 or table.shape[1] * slots.page < seqs.max_length):
        yield f"a page table {tuple(table.shape)} with pages of {slots.page} for sequences of up to {seqs.max_length} keys"
    if table.device.type == "cpu" and table.numel() and table.dtype == torch.int32:
        what, last = ("page", S // slots.page - 1) if slots.page else ("slot", S - 1)
        if int(table.min()) < 0 or int(table.max()) > last:
            yield f"slot table of {int(table.min())} to {int(table.max())}, the cache ends at {what} {last}"
