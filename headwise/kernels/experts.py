"""Products with the experts that tokens chose: down(act(gate(x)) * up(x)) of each pair (token, choice), and their weighted sum.

Few pairs: a program has some rows of one pair's expert and walks along them (`pairs`), or multiplies them as integers where the
expert is quantised (`integer_pairs`, which is `matvec`'s kernel). Many: pairs sorted by expert (`router.order`) go through the
matrix unit in tiles of one expert each (`grouped`); quantised experts are expanded before, as many at a time as there is room for.
Both `pairs` and `grouped` read e4m3 too: it becomes x's type in the kernel, as in `fp8`, and scales are applied to sums.
A pair's result is a row of its own, so that `combine` adds them up in the order of the choice, whatever order they were made in.

Shapes    x_TD; stacks (E, rows, K), rows contiguous, experts any distance apart; P = T * n_active pairs; gated_PW, y_PD;
          scales of e4m3 (E, rows, 1), or of each 128 of K, (E, rows, ceil(K / 128)), as far apart as the rows.
Accuracy  sums in fp32; gated_PW and y_PD are rounded to their types, weights and their sum are fp32.
Cost      few: the bytes of each pair's expert; many: 6*P*D*W operations, and the experts' bytes once.
Source    transformers 5.23 Gemma4TextExperts, Qwen3MoeExperts, GptOssExperts (its clamped gate, biases).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from headwise.kernels.configs import Arch
from headwise.kernels.fp8 import BLOCK, _sixteens, as_floats, converts
from headwise.kernels.gates import ACTIVATIONS, ALPHA, LIMIT, Gate, gated
from headwise.kernels.matvec import _integers, integer_words, step_groups, to_integers
from headwise.kernels.router import Chosen, Order
from headwise.kernels.split import card
from headwise.kernels.stored import bits, device_arch, in_turn, overlap
from headwise.kernels.tiled import LAYOUTS, Q4_K, Q5_K, Q6_K, Q8_0, Planes, pointers

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # relative error of the weighted sum
PLANES = 2  # of the integers, see `matvec`


class Launch(NamedTuple):
    """One launch of `pairs`: rows a program and values of K at a time; of `grouped`: pairs, rows, and K a tile."""

    rows: int
    k: int
    warps: int
    pairs: int = 1
    stages: int = 1


# Fastest on an H200 at 26B-A4B's shape, benchmarks/experts.py.
ALONE = {True: Launch(2, 1024, 2), False: Launch(4, 512, 2)}  # by gated
ALONE_FP8 = {True: Launch(4, 1024, 2), False: Launch(8, 512, 2)}  # as many bytes at a time
# by the pairs of a tile; then by gated
GROUPED = {
    16: {True: Launch(32, 128, 4, 16, 3), False: Launch(64, 128, 4, 16, 3)},
    64: {True: Launch(64, 64, 4, 64, 3), False: Launch(128, 64, 4, 64, 3)},
    128: {True: Launch(128, 64, 8, 128, 4), False: Launch(256, 64, 8, 128, 4)},
}
GROUPED_FP8 = {  # the largest without spills, tests/kernels/compile_experts.py
    16: {True: Launch(64, 128, 4, 16, 4), False: Launch(64, 128, 4, 16, 4)},
    64: {True: Launch(128, 64, 8, 64, 3), False: Launch(128, 128, 8, 64, 3)},
    128: {True: Launch(64, 128, 8, 128, 3), False: Launch(128, 128, 8, 128, 3)},
}
AMPERE_GATED = Launch(64, 64, 8, 128, 4)  # as many rows as the last would not fit its registers
SHARED_BYTES = {"hopper": 227 << 10, "ampere": 99 << 10, "rdna3": 64 << 10}  # of a program; consumer cards have no more
FEW_PROGRAMS = (8, 1, 1)  # rows of a program, rows of a thread, warps: while larger ones would not fill the card
MANY_PROGRAMS = (64, 2, 4)


def reference(
    x_TD: Tensor, chosen: Chosen, gate_EWD: Tensor, up_EWD: Tensor, down_EDW: Tensor, gate: Gate, down_bias_ED: Tensor | None = None
) -> Tensor:
    """The weighted sum in fp64, a pair at a time."""
    out = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for t, row in enumerate(chosen.ids_TK.tolist()):
        for k, e in enumerate(row):
            x = x_TD[t].double()
            g, u = gate_EWD[e].double() @ x, up_EWD[e].double() @ x
            if gate.gate_bias_EW is not None and gate.up_bias_EW is not None:
                g, u = g + gate.gate_bias_EW[e].double(), u + gate.up_bias_EW[e].double()
            if gate.activation == "swiglu_clamped":
                g, u = g.clamp(max=LIMIT.value), u.clamp(-LIMIT.value, LIMIT.value) + 1
                a = g * torch.sigmoid(ALPHA.value * g)
            else:
                a = torch.nn.functional.silu(g) if gate.activation == "silu" else torch.nn.functional.gelu(g, approximate="tanh")
            y = down_EDW[e].double() @ (a * u)
            out[t] += chosen.weights_TK[t, k].double() * (y if down_bias_ED is None else y + down_bias_ED[e].double())
    return out


def grouped_launch(tile_rows: int, gated: bool, arch: Arch, item_bytes: int, *, fp8: bool = False) -> Launch:
    """The row of the table, with as many stages as the card has shared memory for."""
    table = GROUPED_FP8 if fp8 else GROUPED
    c = AMPERE_GATED if (tile_rows, gated, arch) == (128, True, "ampere") else table[tile_rows][gated]
    stage = (c.pairs * item_bytes + (1 + gated) * c.rows * (1 if fp8 else item_bytes)) * c.k
    return c._replace(stages=max(1, min(c.stages, SHARED_BYTES[arch] // stage)))


@triton.jit
def _products(w, x, s, k0, SCALES: tl.constexpr, CVT: tl.constexpr):
    """Rows of an expert by values of x (columns), fp32: each product, or of e4m3 sums of 16 under the scale of their block."""
    if SCALES == 0:
        return w.to(tl.float32) * x[None, :]
    elif SCALES == 1:
        return _sixteens(w, x, CVT)
    else:
        block = (k0 + tl.arange(0, w.shape[1] // 16) * 16) // 128
        return _sixteens(w, x, CVT) * tl.load(s[:, None] + tl.minimum(block, SCALES - 1)[None, :])


@triton.jit
def _added(acc, w, x, s, k0, SCALES: tl.constexpr, CVT: tl.constexpr):
    """acc + the product: (rows of x, of an expert); of e4m3, which comes from registers and so on the left, the other way round."""
    if SCALES == 0:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    elif SCALES == 1:
        return tl.dot(as_floats(w, x.dtype, CVT), tl.trans(x), acc, input_precision="ieee")
    else:
        part = tl.dot(as_floats(w, x.dtype, CVT), tl.trans(x), input_precision="ieee")
        return acc + part * tl.load(s + k0 // 128)[:, None]


@triton.jit
def _pairs(
    x, ids, a, b, scales_a, scales_b, bias_a, bias_b, out, N, K, expert_stride, pairs_a_row, GATED: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, SCALES: tl.constexpr, CVT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    p = tl.program_id(1)
    e = tl.load(ids + p).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = e * expert_stride + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
    sa, sb = scales_a, scales_b
    if SCALES > 0:
        row = (e * (expert_stride // K) + tl.minimum(n, N - 1)) * SCALES
        sa, sb = scales_a + row, scales_b + row
    x += (p // pairs_a_row).to(tl.int64) * K
    acc = tl.zeros((BN, BK // 16 if SCALES > 0 else BK), tl.float32)
    acc_b = tl.zeros((BN, BK // 16 if SCALES > 0 else BK), tl.float32)
    for k0 in range(0, K, BK):
        ok = k0 + k < K
        v = tl.load(x + k0 + k, mask=ok, other=0).to(tl.float32)
        acc += _products(tl.load(a + at + k0, mask=ok[None, :], other=0), v, sa, k0, SCALES, CVT)
        if GATED:
            acc_b += _products(tl.load(b + at + k0, mask=ok[None, :], other=0), v, sb, k0, SCALES, CVT)
    y = tl.sum(acc, 1)
    if SCALES == 1:
        y *= tl.load(sa)
    if BIAS:
        y += tl.load(bias_a + e * N + n, mask=n < N, other=0)
    if GATED:
        u = tl.sum(acc_b, 1)
        if SCALES == 1:
            u *= tl.load(sb)
        if BIAS:
            u += tl.load(bias_b + e * N + n, mask=n < N, other=0)
        y = gated(y, u, ACT)
    tl.store(out + p.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["N", "groups", "eights", "out_stride", "share", "pairs_a_row"])
def _integer_pairs(
    x, ids, order, low, high, head, halves, out, N, groups, eights, out_stride, share, pairs_a_row,
    KIND: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    PLANES: tl.constexpr, ORDERED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    p = tl.program_id(2)
    if ORDERED:
        p = tl.load(order + p)
    at = tl.load(ids + p).to(tl.int64) * eights * groups  # groups of eight rows before this expert
    low += at * (64 if KIND == Q8_0 else 32)
    high += at * (16 if KIND == Q6_K else 8)
    head += at // BLOCK * (32 if KIND == Q4_K or KIND == Q5_K else (36 if KIND == Q6_K else 8))
    halves += at // BLOCK * (72 if KIND == Q6_K else 8)
    x += (p // pairs_a_row) * groups * (8 * PLANES + 4)
    out += p.to(tl.int64) * out_stride
    _integers(
        x, low, high, head, halves, out, out, out, N, groups, 1, 0, 0, share, 1,
        KIND, 1, BN, EACH, LANES, STEP, BLOCK, PLANES, ASM, True, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["W", "groups", "stride"])
def _gate_integers(
    both, ids, bias_a, bias_b, out, W, groups, stride, ACT: tl.constexpr, BIAS: tl.constexpr, PLANES: tl.constexpr,
    G: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    p = tl.program_id(1)
    g = tl.program_id(0) * G + tl.arange(0, G)
    n = g[:, None] * 32 + tl.arange(0, 32)[None, :]
    ok = (g < groups)[:, None]
    at = both + p.to(tl.int64) * stride + n
    a = tl.load(at, mask=ok, other=0).to(tl.float32)
    u = tl.load(at + W, mask=ok, other=0).to(tl.float32)
    if BIAS:
        e = tl.load(ids + p)
        a += tl.load(bias_a + e * W + n, mask=ok, other=0)
        u += tl.load(bias_b + e * W + n, mask=ok, other=0)
    to_integers(gated(a, u, ACT), out + (p * groups + g)[:, None] * (8 * PLANES + 4), ok, PLANES)


@triton.jit(do_not_specialize=["first_expert", "n_experts"])
def _grouped(
    x, pairs, starts, first, experts, a, b, scales_a, scales_b, bias_a, bias_b, out, N, K, expert_stride, n_active, first_expert,
    n_experts, GATED: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, SCALES: tl.constexpr, CVT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    columns = tl.cdiv(N, BN)
    tile = tl.program_id(0) // columns + tl.load(first + first_expert)
    if tile < tl.load(first + first_expert + n_experts):
        e = tl.load(experts + tile)
        at = tl.load(starts + e) + (tile - tl.load(first + e)) * BM + tl.arange(0, BM)
        stop = tl.load(starts + e + 1)
        inside = at < stop
        at = tl.minimum(at, stop - 1)
        pair = tl.load(pairs + at)
        row = (pair // n_active if GATED else at).to(tl.int64)
        n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        px = x + row[:, None] * K + k[None, :]
        w = (e - first_expert).to(tl.int64) * expert_stride + tl.minimum(n, N - 1)[:, None] * K + k[None, :]
        pa = a + w
        pb = b + w
        sa, sb = scales_a, scales_b
        if SCALES > 0:
            s = ((e - first_expert).to(tl.int64) * (expert_stride // K) + tl.minimum(n, N - 1)) * SCALES
            sa, sb = scales_a + s, scales_b + s
        acc = tl.zeros((BN, BM) if SCALES > 0 else (BM, BN), tl.float32)
        acc_b = tl.zeros((BN, BM) if SCALES > 0 else (BM, BN), tl.float32)
        for k0 in tl.range(0, K, BK, num_stages=STAGES):
            ok = (k0 + k < K)[None, :]
            v = tl.load(px + k0) if EVEN else tl.load(px + k0, mask=ok, other=0)
            wa = tl.load(pa + k0) if EVEN else tl.load(pa + k0, mask=ok, other=0)
            acc = _added(acc, wa, v, sa, k0, SCALES, CVT)
            if GATED:
                wb = tl.load(pb + k0) if EVEN else tl.load(pb + k0, mask=ok, other=0)
                acc_b = _added(acc_b, wb, v, sb, k0, SCALES, CVT)
        if SCALES == 1:
            acc *= tl.load(sa)[:, None]
            if GATED:
                acc_b *= tl.load(sb)[:, None]
        if SCALES > 0:
            acc = tl.trans(acc)
            acc_b = tl.trans(acc_b)
        if BIAS:
            acc += tl.load(bias_a + e * N + n, mask=n < N, other=0)[None, :]
        if GATED:
            if BIAS:
                acc_b += tl.load(bias_b + e * N + n, mask=n < N, other=0)[None, :]
            acc = gated(acc, acc_b, ACT)
        to = (at if GATED else pair).to(tl.int64)
        tl.store(out + to[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit
def _combine(
    y, weights, ids, bias, dense, dense_norm, sum_norm, out, D, eps, K: tl.constexpr, BIAS: tl.constexpr, BESIDE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    in_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < D
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        p = t * K + k
        v = tl.load(y + p * D + i, mask=ok, other=0).to(tl.float32)
        if BIAS:
            v += tl.load(bias + tl.load(ids + p) * D + i, mask=ok, other=0)
        total += tl.load(weights + p) * v
    if BESIDE:
        total *= tl.rsqrt(tl.sum(total * total) / D + eps) * tl.load(sum_norm + i, mask=ok, other=0)
        d = tl.load(dense + t * D + i, mask=ok, other=0).to(tl.float32)
        total += d * tl.rsqrt(tl.sum(d * d) / D + eps) * tl.load(dense_norm + i, mask=ok, other=0)
    tl.store(out + t * D + i, total.to(out.dtype.element_ty), mask=ok)


def _stacks(
    what: str, x: Tensor, stacks: tuple[Tensor, ...], scales: tuple[Tensor, ...], out: Tensor, rows_out: int
) -> tuple[int, int, int]:
    """Rows and columns of an expert, and how many scales a row has: 0 of floats."""
    N, K = stacks[0].shape[1:]
    if x.shape[1] != K or tuple(out.shape) != (rows_out, N) or not x.is_contiguous() or not out.is_contiguous():
        raise ValueError(
            f"{what}: {tuple(x.shape)} by experts of ({N}, {K}) into {tuple(out.shape)}, not ({rows_out}, {N}), rows contiguous"
        )
    for w in stacks:
        kept = w.element_size() == 1 if scales else w.dtype == x.dtype
        if w.shape[1:] != (N, K) or w.stride() != (stacks[0].stride(0), K, 1) or not kept:
            raise ValueError(f"{what}: experts {w.dtype} {tuple(w.shape)} of strides {w.stride()}; the rows of each one together")
    if not scales:
        return N, K, 0
    S = scales[0].shape[-1]
    for w, s in zip(stacks, scales, strict=True):
        apart = (w.stride(0) // K * S, S, 1)
        if s.dtype != torch.float32 or s.shape != (*w.shape[:2], S) or s.stride() != apart or S not in (1, -(-K // BLOCK)):
            raise ValueError(
                f"{what}: scales {s.dtype} {tuple(s.shape)} of strides {s.stride()}: "
                f"fp32, 1 or {-(-K // BLOCK)} a row, strides {apart}"
            )
    return N, K, S


def _ends(x: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The first and the last as the kernels take them: e4m3 as plain bytes; none where there is none."""
    return (bits(x[0]), bits(x[-1])) if x else (None, None)


def pairs(
    x: Tensor, ids_TK: Tensor, stacks: tuple[Tensor, ...], out: Tensor, gate: Gate | None = None, *,
    scales: tuple[Tensor, ...] = (), launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Each pair's product into its row of `out`: (gate, up) of a token with `gate`, or one stack of a pair's own row.

    Args:
        scales: of each stack in e4m3.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    N, K, S = _stacks("pairs", x, stacks, scales, out, ids_TK.numel())
    c = launch or (ALONE_FP8 if S else ALONE)[gate is not None]
    some = gate is not None and gate.gate_bias_EW is not None
    biases = (gate.gate_bias_EW, gate.up_bias_EW) if gate is not None and some else (x, x)
    _pairs[(triton.cdiv(N, c.rows), ids_TK.numel())](
        x, ids_TK, *_ends(stacks), *_ends(scales), *biases, out, N, K, stacks[0].stride(0), ids_TK.numel() // x.shape[0],
        GATED=gate is not None, ACT=ACTIVATIONS[gate.activation if gate else "silu"], BIAS=some, SCALES=S,
        CVT=S > 0 and converts(x.device), BN=c.rows, BK=c.k, num_warps=c.warps, **overlap(x),
    )  # fmt: skip
    return out


def pair_words(P: int, K: int) -> int:
    """int32 values of the integers of P rows of K."""
    return integer_words(P, K, PLANES)


def integer_pairs(
    words: Tensor, ids_TK: Tensor, w: Planes, out_PN: Tensor, *, order: Tensor | None = None,
    config: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Each pair's product with its expert of a stack of planes, from integers (rows, groups, words) of tokens or of pairs.

    Args:
        order: pairs in the order in which programs take them: those of one expert together find it in the cache.
        config: rows of a program, rows of a thread, warps.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    P, N, K, t = ids_TK.numel(), w.rows, w.K, LAYOUTS[w.type]
    many = P * N // MANY_PROGRAMS[0] >= 4 * card(out_PN.device).processors
    groups, (rows, each, warps) = K // 32, config or (MANY_PROGRAMS if many else FEW_PROGRAMS)
    if w.low.dim() != 3 or not (w.low.is_contiguous() and w.head.is_contiguous()):
        raise ValueError(f"integer_pairs: planes {tuple(w.low.shape)} of strides {w.low.stride()}, not a stack, contiguous")
    if words.shape[1] != groups or words.shape[2] != 8 * PLANES + 4 or P % words.shape[0]:
        raise ValueError(f"integer_pairs: integers {tuple(words.shape)} for {P} pairs of {groups} groups, {PLANES} planes")
    if out_PN.shape != (P, N) or out_PN.stride(1) != 1:
        raise ValueError(f"integer_pairs: {P} pairs of {N} rows into {tuple(out_PN.shape)} of strides {out_PN.stride()}")
    step = step_groups(w.type, K, 1)
    lanes = 32 * warps * each // rows
    share = -(-(groups // step) // lanes) * lanes
    _integer_pairs[(triton.cdiv(N, rows), 1, P)](
        words, ids_TK, ids_TK if order is None else order, *pointers(w), out_PN, N, groups, -(-N // 8), out_PN.stride(0), share,
        P // words.shape[0], KIND=t.kind, BN=rows // each, EACH=each, LANES=32 * warps, STEP=step, BLOCK=t.block // 32,
        PLANES=PLANES, ORDERED=order is not None, ASM=not knobs.runtime.interpret, num_warps=warps, **overlap(out_PN),
    )  # fmt: skip
    return out_PN


def gate_integers(both_P2W: Tensor, ids_TK: Tensor, gate: Gate, words: Tensor) -> Tensor:
    """act(gate) * up of each pair as integers (P, groups, words) in `words`."""
    P, W = both_P2W.shape[0], both_P2W.shape[1] // 2
    if W % 32 or words.numel() < pair_words(P, W) or both_P2W.stride(1) != 1:
        raise ValueError(f"gate_integers: {P} pairs of {W} values (whole groups of 32) into {words.numel()} words")
    out = words.flatten()[: pair_words(P, W)].view(P, W // 32, -1)
    some = gate.gate_bias_EW is not None
    biases = (gate.gate_bias_EW, gate.up_bias_EW) if some else (both_P2W, both_P2W)
    _gate_integers[(triton.cdiv(W // 32, 8), P)](
        both_P2W, ids_TK, *biases, out, W, W // 32, both_P2W.stride(0), ACT=ACTIVATIONS[gate.activation], BIAS=some,
        PLANES=PLANES, G=8, num_warps=2, **overlap(both_P2W),
    )  # fmt: skip
    return out


def grouped(
    x: Tensor, order: Order, stacks: tuple[Tensor, ...], out: Tensor, n_active: int, gate: Gate | None = None, *,
    scales: tuple[Tensor, ...] = (), experts: tuple[int, int] | None = None, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """The pairs' products by tiles: (gate, up) of tokens into rows in the order of `order`; or one stack of such rows into pairs'.

    Args:
        scales: of each stack in e4m3.
        experts: first and number of those that the stacks hold; all.
    Raises:
        ValueError: shapes, strides or types this kernel does not take, with both numbers.
    """
    P = order.pairs_P.numel()
    N, K, S = _stacks("grouped", x, stacks, scales, out, P)
    first, n = experts or (0, stacks[0].shape[0])
    c = launch or grouped_launch(order.tile_rows, gate is not None, device_arch(x.device), x.element_size(), fp8=S > 0)
    if c.pairs != order.tile_rows or (S > 1 and BLOCK % c.k):
        raise ValueError(
            f"grouped: a launch of {c.pairs} pairs a tile, {c.k} of K, with an order of {order.tile_rows}, {S} scales a row"
        )
    some = gate is not None and gate.gate_bias_EW is not None
    biases = (gate.gate_bias_EW, gate.up_bias_EW) if gate is not None and some else (x, x)
    _grouped[(order.tiles(n) * triton.cdiv(N, c.rows),)](
        x, *order[:4], *_ends(stacks), *_ends(scales), *biases, out, N, K, stacks[0].stride(0), n_active, first, n,
        GATED=gate is not None, ACT=ACTIVATIONS[gate.activation if gate else "silu"], BIAS=some, SCALES=S,
        CVT=S > 0 and converts(x.device), BM=c.pairs, BN=c.rows, BK=c.k, EVEN=K % c.k == 0, STAGES=c.stages, num_warps=c.warps,
        **overlap(x),
    )  # fmt: skip
    return out


def combine(
    y_PD: Tensor, chosen: Chosen, out_TD: Tensor, bias_ED: Tensor | None = None, *,
    beside: tuple[Tensor, Tensor, Tensor] | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The weighted sum of each token's pairs, their bias added before.

    Args:
        beside: a dense result, its norm's weight and the sum's: out = norm(dense) + norm(sum), as in Gemma 4.
    """
    (T, K), D = chosen.ids_TK.shape, y_PD.shape[1]
    if y_PD.shape[0] != T * K or tuple(out_TD.shape) != (T, D) or not y_PD.is_contiguous() or not out_TD.is_contiguous():
        raise ValueError(f"combine: {tuple(y_PD.shape)} of {K} experts a token into {tuple(out_TD.shape)}, contiguous")
    block = triton.next_power_of_2(D)
    _combine[(T,)](
        y_PD, chosen.weights_TK, chosen.ids_TK, y_PD if bias_ED is None else bias_ED, *(beside or (y_PD, y_PD, y_PD)), out_TD,
        D, eps, K=K, BIAS=bias_ED is not None, BESIDE=beside is not None, BLOCK=block, num_warps=max(1, min(8, block // 512)),
        **overlap(y_PD),
    )  # fmt: skip
    return out_TD
