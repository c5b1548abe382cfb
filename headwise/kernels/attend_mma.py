"""Prefill attention on consumer cards, and over quantised caches, with `mma.sync` (sm80 to sm89, sm120): warps share a tile in
three directions.

Plain Triton gives a warp 16 rows of a tile to itself, and registers hold 32 to 64 rows of 512 or 256 values, so that some of eight
warps do others' work again. Here scores are split along the head too, into C chunks of its values: a batch of products, [C, rows,
keys], whose sum goes through shared memory and comes out with whole rows to a warp, so that softmax needs no other exchange.
The result is split by the same chunks. Queries stay in registers, each value of a row in as few warps as there are parts of keys.
With one chunk (up to 256) a warp has whole rows of every product, and scores and shares never leave its registers.

    wait K(i), V(i) | S = Q K(i), a chunk a warp | sum, softmax -> P in shared memory | O = O a + P V(i)
    one stage: wait K(i)   V(i) comes               K(i + 1) comes             wait V(i)
    stored:    wait K(i), V(i), once made floats, in shared memory too        K(i + stages), V(i + stages) come

fp8, q8_0 and q4_0 come as bytes, and a tile is made floats once a program, where a warp of plain Triton makes its own. These are
f16 whatever the activations are, which queries become too: fewer instructions than bf16 takes, and more of a value is kept. A byte
becomes one without a conversion instruction, which are few a clock: it goes into the low bits of one whose exponent makes them an
integer, and what that adds is taken away, exactly.

Shapes    as in `attend`: K and V in the type of the queries (bf16, f16) or stored in fp8, q8_0 or q4_0; one tensor (with rotated
          values) or two; D 64, 256 or 512, of stored values 128 too.
Accuracy  as `attend`; the chunks of a score are summed in fp32. A stored value is its product with the scale, rounded to f16 once:
          queries and values over 65,504 become infinite, and results NaN.
Cost      64 rows by 16 keys of one tensor, 512 + 128: 126 KB through shared memory, 1,008 clocks, beside 576 products; stored,
          30 KB and 1.75 to 2 instructions a value more.
Source    FlashAttention-2 (Dao 2023); scores split along the head as in split-K products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from headwise.kernels.attend import LOG2E
from headwise.kernels.configs import Crossed, heads_together
from headwise.kernels.stored import FLOAT, FP8, Q4_0, Q8_0, Sequences, Slots, Stored, slot_of

_slot_of = gluon.jit(slot_of.fn)


def _assembly(registers: str, *parts: str) -> gl.constexpr:
    return gl.constexpr("{\n.reg .b32 " + registers + ";\n" + "\n".join(parts) + "\n}")


def _halves(first: int, offset: str, scale: str) -> str:
    """The bytes of x as f16: 1024 and what 0 is stored as are taken away, exactly, before the product."""
    return f"mov.b32 k, {offset};\nmov.b32 s, {{{scale}, {scale}}};\n" + "\n".join(
        f"prmt.b32 y, x, 0x64646464, {select};\nsub.f16x2 y, y, k;\nmul.f16x2 ${out}, y, s;"
        for out, select in ((first, "0x4140"), (first + 1, "0x4342"))
    )


# A word of stored values to pairs of f16; $n: the pairs, the word, its scale. Bits of fp8, moved into the exponent and mantissa,
# are the value / 256: scores and results are taken times 256.
FP8_TO_F16 = _assembly("x, y", *(
    f"prmt.b32 x, $2, 0, {select};\nshr.u32 y, x, 1;\nand.b32 y, y, 0x3f803f80;\nlop3.b32 ${out}, x, 0x80008000, y, 0xea;"
    for out, select in ((0, "0x1404"), (1, "0x3424"))
))  # fmt: skip
Q8_0_TO_F16 = _assembly("x, y, k, s", "xor.b32 x, $2, 0x80808080;", _halves(0, "0x64806480", "$3"))
Q4_0_TO_F16 = _assembly(
    "x, y, k, s", "and.b32 x, $4, 0x0f0f0f0f;", _halves(0, "0x64086408", "$5"),
    "shr.u32 x, $4, 4;\nand.b32 x, x, 0x0f0f0f0f;", _halves(2, "0x64086408", "$5"),
)  # fmt: skip


@gluon.jit
def _rows(
    n0, hi, table, seq, table_stride, ring, g, G, N: gl.constexpr, RING: gl.constexpr, PAGE: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Rows of the cache of a tile's keys; those past the end are the last key again, which the mask leaves out."""
    pos = gl.minimum(n0 + gl.arange(0, N, gl.SliceLayout(1, layout)), hi - 1)
    return gl.expand_dims(_slot_of(pos, table, seq, table_stride, ring, RING, PAGE) * G + g, 1)


@gluon.jit
def _copy(to, data, rows, at, W: gl.constexpr, layout: gl.constexpr):
    columns = at + gl.arange(0, to.shape[1], gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(to, data + rows * W + gl.expand_dims(columns, 0))


@gluon.jit
def _tile(tk, tt, tv, k, v, rows, D: gl.constexpr, R: gl.constexpr, V_TOO: gl.constexpr, layout: gl.constexpr):
    """Of each key D items, R behind them and D of its value, to shared memory of their own."""
    _copy(tk, k, rows, 0, D + R, layout)
    if R > 0:
        _copy(tt, k, rows, D, D + R, layout)
    if V_TOO:
        _copy(tv, v, rows, 0, D, layout)


@gluon.jit
def _stored_tile(
    bk, bt, bv, ak, at, av, k_data, v_data, k_scales, v_scales, rows, of_scales, D: gl.constexpr, R: gl.constexpr,
    ONE: gl.constexpr, FORMAT: gl.constexpr, layout: gl.constexpr, by_scale: gl.constexpr,
):  # fmt: skip
    """Words of a tile as they are stored, and its scales."""
    A_WORD: gl.constexpr = 8 if FORMAT == Q4_0 else 4
    _tile(bk, bt, bv, k_data, v_data, rows, D // A_WORD, R // A_WORD, not ONE, layout)
    if FORMAT != FP8:
        _tile(ak, at, av, k_scales, v_scales, of_scales, D // 32, R // 32, not ONE, by_scale)


@gluon.constexpr_function
def _word_layout(keys, blocks, FORMAT):
    """(keys, blocks of 32 values, words): two words a thread, which become one store (of q4_0 two) of 16 bytes; banks differ."""
    if FORMAT != Q4_0:
        return gl.BlockedLayout([1, 1, 2], [2, 4, 4], [8, 1, 1], [2, 1, 0])
    more = [[0, 1 << b, 0] for b in range(1, blocks.bit_length() - 1)]
    far = [[1 << b, 0, 0] for b in range(4, keys.bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 1, 0], [2, 0, 0], [4, 0, 0], [1, 0, 0]]
    warps = [[8, 0, 0], *more[:2], *([[0, 0, 0]] * (2 - len(more)))]
    return gl.DistributedLinearLayout([[0, 0, 1], *more[2:], *far], lanes, warps, [], [keys, blocks, 4])


@gluon.jit
def widened(x, s, FORMAT: gl.constexpr):
    """Stored words (keys, blocks of 32 values, words) and the scales of their blocks as pairs of f16, (keys, values / 2) of int32:
    the product with the scale, rounded once; of fp8 the value / 256."""
    if FORMAT == FP8:
        a, b = gl.inline_asm_elementwise(FP8_TO_F16, "=r,=r,r", [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
        out = gl.join(a, b)
    else:
        s = gl.expand_dims(s, 2).broadcast_to(x.shape)
        if FORMAT == Q8_0:
            a, b = gl.inline_asm_elementwise(
                Q8_0_TO_F16, "=r,=r,r,h", [x, s], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
            )  # fmt: skip
            out = gl.join(a, b)
        else:
            a, b, c, d = gl.inline_asm_elementwise(
                Q4_0_TO_F16, "=r,=r,=r,=r,r,h", [x, s], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
            )
            low, high = gl.join(a, b).reshape((x.shape[0], x.shape[1], 8)), gl.join(c, d).reshape((x.shape[0], x.shape[1], 8))
            out = gl.join(low, high).permute((0, 1, 3, 2))
    return out.reshape((x.shape[0], 16 * x.shape[1]))


@gluon.jit
def _widen(to, words, scales, N: gl.constexpr, FORMAT: gl.constexpr):
    """A tile of N values a key, as they are stored, to floats in `to`."""
    KEYS: gl.constexpr = words.shape[0]
    layout: gl.constexpr = _word_layout(KEYS, N // 32, FORMAT)
    x = words.reshape((KEYS, N // 32, words.shape[1] // (N // 32))).load(layout)
    s = x
    if FORMAT != FP8:
        s = scales.load(gl.SliceLayout(2, layout))
    to._reinterpret(gl.int32, [KEYS, N // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])).store(widened(x, s, FORMAT))


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
    q_ptr, k_data, v_data, k_scales, v_scales, out_ptr, sinks_ptr, starts, lengths, table, table_stride, ring, G, scale, softcap,
    window, q_stride,
    H: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, R: gl.constexpr, ONE: gl.constexpr,
    RING: gl.constexpr, PAGE: gl.constexpr, WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, NS: gl.constexpr, C: gl.constexpr, BY_ROW: gl.constexpr, OUT_BY_ROW: gl.constexpr,
    FORMAT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    ml3: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C, BY_ROW, 8 // C // BY_ROW], [1, 16, 8])
    ol3: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [C, OUT_BY_ROW, 8 // C // OUT_BY_ROW], [1, 16, 8])
    ql: gl.constexpr = gl.DotOperandLayout(0, ml3, 2)
    kl: gl.constexpr = gl.DotOperandLayout(1, ml3, 2)
    pl: gl.constexpr = gl.DotOperandLayout(0, ol3, 2)
    vl: gl.constexpr = gl.DotOperandLayout(1, ol3, 2)
    all3: gl.constexpr = gl.BlockedLayout([C, 1, 4], [1, 128 // BN, BN // 4], [1, 8, 1], [2, 1, 0])  # whole rows to a warp
    WHOLE: gl.constexpr = C == 1 and BY_ROW == 8 and OUT_BY_ROW == 8  # rows are whole as they come out of the product
    sl: gl.constexpr = gl.SliceLayout(0, ml3 if WHOLE else all3)
    row: gl.constexpr = gl.SliceLayout(1, sl)
    line: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, ol3))
    BY_KEY: gl.constexpr = 8 if BN >= 32 else BN // 4
    STORED: gl.constexpr = FORMAT != FLOAT
    A_COPY: gl.constexpr = 4 if STORED else 8  # words, or values: 16 bytes
    cl: gl.constexpr = gl.BlockedLayout([1, A_COPY], [4, 8], [BY_KEY, 8 // BY_KEY], [1, 0])  # 128 bytes of four keys a warp
    A_SCALE: gl.constexpr = 4 if D >= 128 else 2
    al: gl.constexpr = gl.BlockedLayout([1, A_SCALE], [1024 * A_SCALE // D, D // (32 * A_SCALE)], [8, 1], [1, 0])
    W: gl.constexpr = D + R
    ALONE: gl.constexpr = NS == 1 and not STORED  # K and V come in turn
    V_TOO: gl.constexpr = NS > 1 and not ONE
    TILES: gl.constexpr = 1 if STORED else NS
    kind: gl.constexpr = gl.float16 if STORED else dtype
    sk = gl.allocate_shared_memory(kind, [TILES, BN, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    st = sk
    sv = sk
    if R > 0:
        st = gl.allocate_shared_memory(kind, [TILES, BN, R], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    if not ONE:
        sv = gl.allocate_shared_memory(kind, [TILES, BN, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    bk = sk  # as stored: words, and scales
    if STORED:
        A_WORD: gl.constexpr = 8 if FORMAT == Q4_0 else 4
        bk = gl.allocate_shared_memory(gl.int32, [NS, BN, D // A_WORD], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    bt, bv, ak, at, av = bk, bk, bk, bk, bk
    if STORED and R > 0:
        bt = gl.allocate_shared_memory(gl.int32, [NS, BN, R // A_WORD], gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))
    if STORED and not ONE:
        bv = gl.allocate_shared_memory(gl.int32, [NS, BN, D // A_WORD], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    if STORED and FORMAT != FP8:
        ak = gl.allocate_shared_memory(gl.float16, [NS, BN, D // 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        if R > 0:
            at = gl.allocate_shared_memory(gl.float16, [NS, BN, R // 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        if not ONE:
            av = gl.allocate_shared_memory(gl.float16, [NS, BN, D // 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ss, sp, sa = sk, sk, sk
    if not WHOLE:
        ss = gl.allocate_shared_memory(gl.float32, [C, BM, BN], gl.SwizzledSharedLayout(8, 32 // BN, BN // 8, [2, 1, 0]))
        sp = gl.allocate_shared_memory(kind, [BM, BN], gl.SwizzledSharedLayout(8, 64 // BN, BN // 8, [1, 0]))
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
    for i in gl.static_range(NS if STORED or ALONE else NS - 1):
        rows = _rows(lo + i * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
        if STORED:
            of_scales = _rows(lo + i * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, al)
            _stored_tile(
                bk.index(i), bt.index(i), bv.index(i), ak.index(i), at.index(i), av.index(i), k_data, v_data, k_scales, v_scales,
                rows, of_scales, D, R, ONE, FORMAT, cl, al,
            )  # fmt: skip
        else:
            _tile(sk.index(i), st.index(i), sv.index(i), k_data, v_data, rows, D, R, V_TOO, cl)
        async_copy.commit_group()
    r_q = block * BM + gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, ql)))
    q_row = q_ptr + _by_row((q0 + r_q // PACK).to(gl.int64) * q_stride + (head + r_q % PACK) * W)
    valid = _by_row(r_q // PACK < T)
    q = gl.load(q_row + _values(C, D, ql), mask=valid, other=0.0).to(kind)
    qt = q
    if R > 0:
        qt = gl.load(q_row + D + _values(C, R, ql), mask=valid, other=0.0).to(kind)
    r_s = block * BM + gl.arange(0, BM, row)
    pos_q = gl.expand_dims(past + r_s // PACK, 1)
    keys = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, sl)), 0)
    acc = gl.zeros([C, BM, D // C], gl.float32, ol3)
    m = gl.full([BM], -1e30, gl.float32, row)
    l = gl.zeros([BM, BN], gl.float32, sl)
    b = 0
    for n0 in range(lo, hi, BN):
        tile = b
        if STORED:
            tile = 0
            rows = _rows(n0 + NS * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
            of_scales = _rows(n0 + NS * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, al)
            async_copy.wait_group(NS - 1)
            _widen(sk.index(0), bk.index(b), ak.index(b), D, FORMAT)
            if R > 0:
                _widen(st.index(0), bt.index(b), at.index(b), R, FORMAT)
            if not ONE:
                _widen(sv.index(0), bv.index(b), av.index(b), D, FORMAT)
        elif ALONE:
            async_copy.wait_group(0)
            _copy(sv.index(0), v_data, rows, 0, W, cl)
            async_copy.commit_group()
        else:
            to = gl.where(b == 0, NS - 1, b - 1)
            rows = _rows(n0 + (NS - 1) * BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
            async_copy.wait_group(NS - 2)
        s3 = gl.zeros([C, BM, BN], gl.float32, ml3)
        s3 = mma_v2(q, _chunked(sk.index(tile), C).permute((0, 2, 1)).load(kl), s3)
        if R > 0:
            s3 = mma_v2(qt, _chunked(st.index(tile), C).permute((0, 2, 1)).load(kl), s3)
        if WHOLE:
            s = gl.sum(s3, 0)
        else:
            ss.store(s3)
            s = gl.sum(ss.load(all3), 0)
        if STORED:  # all have read this tile's words
            _stored_tile(
                bk.index(b), bt.index(b), bv.index(b), ak.index(b), at.index(b), av.index(b), k_data, v_data, k_scales, v_scales,
                rows, of_scales, D, R, ONE, FORMAT, cl, al,
            )  # fmt: skip
        elif ALONE:
            rows = _rows(n0 + BN, hi, table, seq, table_stride, ring, g, G, BN, RING, PAGE, cl)
            _copy(sk.index(0), k_data, rows, 0, W, cl)
        else:  # the tile before has been read by all: the sum of the scores is behind a barrier
            _tile(sk.index(to), st.index(to), sv.index(to), k_data, v_data, rows, D, R, V_TOO, cl)
        async_copy.commit_group()
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
        if WHOLE:
            p3 = gl.convert_layout(gl.expand_dims(p.to(kind), 0), pl)
            a = gl.convert_layout(a, line)
        else:
            sp.store(p.to(kind))
            sa.store(a)
        if ALONE:
            async_copy.wait_group(1)
        if not WHOLE:
            p3 = _wide(sp.load(gl.SliceLayout(0, pl)), C)
            a = sa.load(line)
        acc = acc * _by_row(a)
        acc = mma_v2(p3, _chunked(sv.index(tile), C).load(vl), acc)
        b = gl.where(b == NS - 1, 0, b + 1)
    async_copy.wait_group(0)
    total = gl.sum(l, 1)
    if SINKS:
        here = r_s // PACK < T
        total += gl.exp2(gl.load(sinks_ptr + head + r_s % PACK, mask=here, other=0.0).to(gl.float32) * 1.4426950408889634 - m)
    if FORMAT == FP8:
        total = total / 256.0
    if WHOLE:
        total = gl.convert_layout(total, line)
    else:
        sa.store(total)
        total = sa.load(line)
    acc = acc / _by_row(total)
    r_o = block * BM + gl.arange(0, BM, line)
    t = r_o // PACK
    to = out_ptr + _by_row(((q0 + t).to(gl.int64) * H + head + r_o % PACK) * D)
    gl.store(to + _values(C, D, ol3), acc.to(dtype), mask=_by_row(t < T))


def attend_mma(
    q_NHE: Tensor, k: Stored, v: Stored | None, out_NHD: Tensor, seqs: Sequences, slots: Slots, how: Crossed, *, scale: float,
    window: int | None = None, softcap: float | None = None, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `attend.attend`, which has checked its arguments; that of one tensor has rotated values, and tiles start at 16 bytes."""
    _, H, E = q_NHE.shape
    D, G, vs = out_NHD.shape[-1], k.data_SGW.shape[1], k if v is None else v
    group = H // G
    pack = heads_together(group, 8)
    of_k, of_v = (x.data_SGW if x.floats else x.data_SGW.view(torch.int32) for x in (k, vs))
    scale *= LOG2E * (256 if k.format.value == FP8.value else 1)
    ak, av = (q_NHE if x.scales_SGB is None else x.scales_SGB for x in (k, vs))
    _attend[(-(-seqs.max_queries * pack // how.rows), H // pack, seqs.lengths_B.shape[0])](
        q_NHE, of_k, of_v, ak, av, out_NHD, q_NHE if sinks_H is None else sinks_H, seqs.starts_B1, seqs.lengths_B, slots.table,
        slots.table.stride(0), max(1, slots.ring), G, scale, softcap or 1.0, window or 0, q_NHE.stride(0),
        H=H, GROUP=group, PACK=pack, D=D, R=E - D, ONE=v is None, RING=slots.ring > 0, PAGE=slots.page,
        WINDOWED=window is not None, SOFTCAP=softcap is not None, SINKS=sinks_H is not None,
        BM=how.rows, BN=how.keys, NS=how.stages, C=how.chunks, BY_ROW=how.by_row, OUT_BY_ROW=how.out_by_row,
        FORMAT=k.format, dtype=gl.bfloat16 if q_NHE.dtype == torch.bfloat16 else gl.float16, num_warps=8,
    )  # fmt: skip
    return out_NHD
