"""Tokens of rows of logits: the cap, temperature, top-k, top-p, min-p, and the draw, without sorting anything.

A kept token is one whose logit is above a row's threshold, or one of the first few that equal it. `_peaks` caps the logits in
place, finds the best token, and a bound below which no token can be kept. `_count` counts how often each value that 16 bits can
have occurs above that, among few tokens unless the row is flat: summed from the top, counts give the threshold of top-k and top-p.
`_pick` sums what is kept and takes the first token, in the order of the vocabulary, at which the sum passes the share u of all.
Several programs share a row; the one that finishes last goes on for the row. Rows with and without filters go together.

Shapes    W rows of V logits in bf16 or f16, contiguous; tokens int64.
Accuracy  `engine.sample` has the same in PyTorch's operators; sums are fp32 in another order, the same in every run. Which tokens
          top-k keeps is exact.
Cost      1 launch where all rows are greedy, 2 with temperatures or min-p, 3 with top-k or top-p; 2*W*V bytes each, the first twice
          with a cap.
Source    transformers 5.23 generation/logits_process.py: the order of the filters, and that the token which passes top-p is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.kernels.rows import capped
from headwise.kernels.split import is_last
from headwise.kernels.stored import in_turn, overlap
from headwise.planner.workspace import DRAW_BLOCK, DRAW_GROUP, DRAW_VALUES, draw_words

PROGRAMS = 512  # of a launch, where a block each is not fewer
BINS = 2048  # values at a time whose counts are summed
BELOW_ONE = tl.constexpr(1 - 2**-24)  # the largest fp32 below 1
MARGIN = tl.constexpr(0.5)  # of the bound of top-p: roundings of sums stay far below


@triton.jit
def _key(x):
    """Of 16-bit floats, 1 to 65,535 in their order: of both zeros the same, of NaN the last."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    size = bits & 0x7FFF
    return tl.where(x != x, 65535, tl.where(bits < 0, 32768 - size, 32768 + size))


@triton.jit
def _value(key, like: tl.constexpr):
    size = key - 32768
    return tl.where(size < 0, -size | 0x8000, size).to(tl.int16).to(like, bitcast=True).to(tl.float32)


@triton.jit
def _weight(x, best, temperature):
    """Of a logit, in those of the best token."""
    return tl.exp((x - best) / temperature)


@triton.jit(do_not_specialize=["per", "parts"])
def _peaks(
    x_ptr, numbers, tokens, counts, groups, keys, places, state, done, V, per, parts, cap,
    CAPPED: tl.constexpr, RANKED: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, VALUES: tl.constexpr,
    BINS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each row the best token, and [its logit, the least that may be kept, a threshold that keeps all, 0]."""
    in_turn(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += row.to(tl.int64) * V
    row_groups = groups + row * (tl.cdiv(V, BLOCK) * (BLOCK // GROUP))
    best, place = 0, 0
    for b in range(part * per, tl.minimum(part * per + per, tl.cdiv(V, BLOCK))):
        i = b * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < V, other=0)
        if CAPPED:
            x = capped(x.to(tl.float32), cap).to(kind)
            tl.store(x_ptr + i, x, mask=i < V)
        key = tl.where(i < V, _key(x), 0)
        top = tl.max(key, 0)
        place = tl.where(top > best, tl.min(tl.where(key == top, i, V), 0), place)
        best = tl.maximum(best, top)
        if RANKED:
            at = b * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            tl.store(row_groups + at, tl.max(tl.reshape(key, (BLOCK // GROUP, GROUP)), 1))
    tl.store(keys + row * parts + part, best)
    tl.store(places + row * parts + part, place)
    if RANKED:
        for b in range(part * BINS, VALUES, parts * BINS):
            tl.store(counts + row * VALUES + b + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    if is_last(done, parts):
        p = tl.arange(0, PARTS)
        key = tl.load(keys + row * parts + p, mask=p < parts, other=0, cache_modifier=".cg")
        first = tl.load(places + row * parts + p, mask=p < parts, other=0, cache_modifier=".cg")
        best = tl.max(key, 0)
        tl.store(tokens + row, tl.min(tl.where(key == best, first, V), 0).to(tl.int64))
        most = _value(best, kind)
        least = most
        if RANKED:
            top_k, top_p = tl.load(numbers + row * 5 + 2).to(tl.int32), tl.load(numbers + row * 5 + 3)
            if top_k < V:  # as many groups have a logit of at least
                g = tl.arange(0, GROUPS)
                held = tl.load(row_groups + g, mask=g < tl.cdiv(V, GROUP), other=0, cache_modifier=".cg")
                bound = 0
                for i in tl.static_range(16):
                    tried = bound | (32768 >> i)
                    bound = tl.where(tl.sum((held >= tried).to(tl.int32), 0) >= top_k, tried, bound)
                least = tl.where(bound == 0, float("-inf"), _value(bound, kind))
            elif top_p < 1.0:  # all that is less has together less than the share that top-p leaves out
                least = most + tl.log((1.0 - top_p) * MARGIN / V) * tl.load(numbers + row * 5)
        tl.store(state + row * 4, most)
        tl.store(state + row * 4 + 1, least)
        tl.store(state + row * 4 + 2, 0.0)
        tl.store(state + row * 4 + 3, 0.0)
        tl.store(done + row, 0)


@triton.jit
def _left(counts, top, d, n, before, top_k, BINS: tl.constexpr):
    """Of BINS values, d below the best, the keys, how often each occurs, and how many of these top-k leaves."""
    key = top - d - tl.arange(0, BINS)
    c = tl.load(counts + key, mask=key > top - n, other=0, cache_modifier=".cg")
    return key, c, tl.minimum(tl.maximum(top_k - before - tl.cumsum(c, 0) + c, 0), c)


@triton.jit(do_not_specialize=["per", "parts"])
def _count(
    x_ptr, numbers, counts, sums, state, done, V, per, parts,
    VALUES: tl.constexpr, BINS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of each row with top-k or top-p the threshold, as a key, and how many of those that equal it are kept."""
    in_turn(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    temperature = tl.load(numbers + row * 5)
    top_k, top_p = tl.load(numbers + row * 5 + 2).to(tl.int32), tl.load(numbers + row * 5 + 3)
    if (temperature == 0.0) | ((top_k >= V) & (top_p >= 1.0)):
        return
    best, least = tl.load(state + row * 4), tl.load(state + row * 4 + 1)
    x_ptr += row.to(tl.int64) * V
    counts += row * VALUES
    rest = 0.0
    for b in range(part * per, tl.minimum(part * per + per, tl.cdiv(V, BLOCK))):
        i = b * BLOCK + tl.arange(0, BLOCK)
        raw = tl.load(x_ptr + i, mask=i < V, other=0)
        x = raw.to(tl.float32)
        tl.atomic_add(counts + _key(raw), 1, mask=(i < V) & (x >= least), sem="relaxed")
        rest += tl.sum(tl.where((i < V) & (x < least), _weight(x, best, temperature), 0.0), 0)
    tl.store(sums + row * parts + part, rest)
    if is_last(done, parts):
        top = _key(best.to(kind))
        n = top - tl.maximum(_key(least.to(kind)) - 1, 0)  # rounded it may have moved up by a value
        goal = float("inf")
        if top_p < 1.0:
            total = 0.0
            if top_k >= V:
                p = tl.arange(0, PARTS)
                total = tl.sum(tl.load(sums + row * parts + p, mask=p < parts, other=0.0, cache_modifier=".cg"), 0)
            before = 0
            for d in range(0, n, BINS):
                key, c, kept = _left(counts, top, d, n, before, top_k, BINS)
                total += tl.sum(tl.where(c > 0, kept * _weight(_value(key, kind), best, temperature), 0.0), 0)
                before += tl.sum(c, 0)
            goal = top_p * total
        threshold, ties, before, passed = 65536, 0, 0, 0.0
        for d in range(0, n, BINS):
            key, c, kept = _left(counts, top, d, n, before, top_k, BINS)
            w = tl.where(c > 0, _weight(_value(key, kind), best, temperature), 0.0)
            mass = kept * w
            more = tl.ceil((goal - passed - (tl.cumsum(mass, 0) - mass)) / w)  # tokens of this value that begin before the goal
            kept = tl.where(w > 0.0, tl.minimum(tl.maximum(more, 0.0), kept.to(tl.float32)), 0.0).to(tl.int32)
            lowest = tl.min(tl.where(kept > 0, key, 65536), 0)
            ties = tl.where(lowest < threshold, tl.sum(tl.where(key == lowest, kept, 0), 0), ties)
            threshold = tl.minimum(threshold, lowest)
            before += tl.sum(c, 0)
            passed += tl.sum(mass, 0)
        tl.store(state + row * 4 + 2, threshold.to(tl.float32))
        tl.store(state + row * 4 + 3, ties.to(tl.float32))
        tl.store(done + row, 0)


@triton.jit
def _weighed(x_ptr, b, V, best, temperature, min_p, BLOCK: tl.constexpr):
    """Of a block the places, keys (0 beyond the row), and the weights that min-p leaves."""
    i = b * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < V, other=0)
    w = _weight(x.to(tl.float32), best, temperature)
    return i, tl.where(i < V, _key(x), 0), tl.where(w >= min_p, w, 0.0)


@triton.jit(do_not_specialize=["per", "parts"])
def _pick(
    x_ptr, numbers, tokens, sums, equals, state, done, V, per, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Of each row that is not greedy the token at which the sum of what is kept passes the share u of all."""
    in_turn(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    temperature, min_p = tl.load(numbers + row * 5), tl.load(numbers + row * 5 + 4)
    if temperature == 0.0:
        return
    best, threshold = tl.load(state + row * 4), tl.load(state + row * 4 + 2).to(tl.int32)
    ties = tl.load(state + row * 4 + 3).to(tl.int32)
    x_ptr += row.to(tl.int64) * V
    total, n = 0.0, 0
    for b in range(part * per, tl.minimum(part * per + per, tl.cdiv(V, BLOCK))):
        i, key, w = _weighed(x_ptr, b, V, best, temperature, min_p, BLOCK)
        total += tl.sum(tl.where(key > threshold, w, 0.0), 0)
        n += tl.sum((key == threshold).to(tl.int32), 0)
    tl.store(sums + row * parts + part, total)
    tl.store(equals + row * parts + part, n)
    if is_last(done, parts):
        p = tl.arange(0, PARTS)
        mass = tl.load(sums + row * parts + p, mask=p < parts, other=0.0, cache_modifier=".cg")
        equal = tl.load(equals + row * parts + p, mask=p < parts, other=0, cache_modifier=".cg")
        before = tl.cumsum(equal, 0) - equal
        tie = _weight(_value(threshold, kind), best, temperature)
        kept = tl.minimum(tl.maximum(ties - before, 0), equal)
        mass += tl.where(kept > 0, kept * tl.where(tie >= min_p, tie, 0.0), 0.0)
        passed = tl.where(mass > 0.0, tl.cumsum(mass, 0), 0.0)  # sums made side by side need not grow
        goal = tl.minimum(tl.load(numbers + row * 5 + 1), BELOW_ONE) * tl.max(passed, 0)
        part = tl.min(tl.where(passed > goal, p, PARTS), 0) % PARTS  # none passes where a logit is NaN or infinite
        total = tl.sum(tl.where(p < part, mass, 0.0), 0)
        n = tl.sum(tl.where(p < part, equal, 0), 0)
        token, last = V, 0
        for b in range(part * per, tl.minimum(part * per + per, tl.cdiv(V, BLOCK))):
            i, key, w = _weighed(x_ptr, b, V, best, temperature, min_p, BLOCK)
            same = (key == threshold).to(tl.int32)
            w = tl.where((key > threshold) | ((same > 0) & (n + tl.cumsum(same, 0) <= ties)), w, 0.0)
            token = tl.minimum(token, tl.min(tl.where((total + tl.cumsum(w, 0) > goal) & (w > 0.0), i, V), 0))
            last = tl.maximum(last, tl.max(tl.where(w > 0.0, i, 0), 0))
            total += tl.sum(w, 0)
            n += tl.sum(same, 0)
        tl.store(tokens + row, tl.where(token < V, token, last).to(tl.int64))
        tl.store(done + row, 0)


def draw(logits_WV: Tensor, numbers_W5: Tensor | None, *, ranked: bool, cap: float | None, words: Tensor, done: Tensor) -> Tensor:
    """The token of each row, (W,). The logits are capped afterwards.

    Args:
        numbers_W5: of each row temperature (0: the best token, the first of them), u, top-k (V: all), top-p (1: all), min-p; fp32.
            None: all temperatures are 0.
        ranked: whether a row has top-k or top-p.
        cap: logits are cap * tanh(logits / cap).
        words: int32 room, `planner.workspace.draw_words` of it.
        done: int32 zeros, one a row; zeros again afterwards.
    Raises:
        ValueError: types, strides or room these kernels do not take, with both numbers.
    """
    W, V = logits_WV.shape
    if logits_WV.dtype not in (torch.bfloat16, torch.float16) or not logits_WV.is_contiguous():
        raise ValueError(f"draw: {logits_WV.dtype} (bf16 or f16), strides {logits_WV.stride()} (contiguous)")
    some = numbers_W5
    if some is not None and (some.shape != (W, 5) or some.dtype != torch.float32 or not some.is_contiguous()):
        raise ValueError(f"draw: numbers {tuple(some.shape)} {some.dtype}, not float32 ({W}, 5)")
    if some is None and ranked:
        raise ValueError("draw: top-k or top-p of rows without a temperature")
    n = draw_words(W, V)
    if words.dtype != torch.int32 or words.numel() < n or done.dtype != torch.int32 or done.numel() < W:
        raise ValueError(
            f"draw: {W} rows of {V} need {n} and {W} int32, got {words.numel()} {words.dtype} and {done.numel()} {done.dtype}"
        )
    tokens = torch.empty(W, dtype=torch.int64, device=logits_WV.device)
    if not W:
        return tokens
    blocks = triton.cdiv(V, DRAW_BLOCK)
    per = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // W)))
    parts = triton.cdiv(blocks, per)
    sizes = (W * DRAW_VALUES, W * blocks * (DRAW_BLOCK // DRAW_GROUP), W * parts, W * parts, W * parts, W * 4)
    counts, groups, keys, places, sums, state = words[: sum(sizes)].split(sizes)
    sums, state = sums.view(torch.float32), state.view(torch.float32)
    shared = {"PARTS": triton.next_power_of_2(blocks), "BLOCK": DRAW_BLOCK, "num_warps": 8, **overlap(logits_WV)}
    _peaks[(W, parts)](
        logits_WV, state if numbers_W5 is None else numbers_W5, tokens, counts, groups, keys, places, state, done, V, per, parts,
        float(cap or 0.0), CAPPED=cap is not None, RANKED=ranked, GROUP=DRAW_GROUP,
        GROUPS=triton.next_power_of_2(triton.cdiv(V, DRAW_GROUP)), VALUES=DRAW_VALUES, BINS=BINS, **shared,
    )  # fmt: skip
    if ranked:
        _count[(W, parts)](logits_WV, numbers_W5, counts, sums, state, done, V, per, parts, VALUES=DRAW_VALUES, BINS=BINS, **shared)
    if numbers_W5 is not None:
        _pick[(W, parts)](logits_WV, numbers_W5, tokens, sums, keys, state, done, V, per, parts, **shared)
    return tokens
