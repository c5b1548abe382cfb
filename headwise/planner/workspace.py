"""Every buffer a forward pass writes, as data: the planner sums them, the engine carves them out of one allocation.

Buffers of different phases never live at once, so phases overlay each other: the arena is what is needed always plus the
largest phase. What PyTorch's attention operators allocate themselves (their result; they take no `out=`) cannot be
carved; room for it is reserved in the arena, so that the plan bounds the measured peak.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from headwise.spec.kv import DRAFT_TOKENS, PAGE_TOKENS, KVFormat, k_values, kv_slots, q_values, turned_pairs, v_values
from headwise.spec.layers import Kind, LayerSpec, ModelSpec, MoeSpec
from headwise.spec.rope import RopeSpec

ITEM_BYTES: Mapping[str, int] = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i64": 8}
ALIGN = 64  # bytes; every buffer starts on a cache line
DEQUANT_TILE_VALUES = 2 * 2**20  # weights of a quantised matrix expanded at a time
DEQUANT_TEMP_BYTES = 16  # per value, most of all block types: what `weights.blocks.dequantise` holds on the way
PLANE_TILE_VALUES = 64 * 2**20  # as many at a time by our kernel, or the largest matrix: wide enough for the product
QUANT_ROWS, QUANT_GROUP_WORDS = 8, 20  # rows that are multiplied as integers, and words of a group of 32 of them
SKINNY_ROWS, SKINNY_STEP = 64, 256  # most rows that are arranged, in the tile, and values of a row at a time
QUANT_PARTIAL, QUANT_DONE = 2**21, 2**15  # partial sums of products that are shared out, and counters of programs
EXPERT_ROWS = 160  # most tokens whose pairs meet quantised experts as integers, each pair by itself
RECORDED_TOKENS = 1024  # of a prompt's chunk that is recorded; the kernels of more take longer than the host needs to launch them
ROUTER_ROWS = 16  # tokens whose scores are counted before one program chooses
PAIR_ROWS = 1024  # most tokens whose pairs meet quantised experts arranged, in tiles of one expert
PAIR_TILES = {8: 7, 16: 20, 32: 64}  # pairs of a tile, and up to how many an expert has where it is taken
ORDER_TILE, ORDER_BLOCK = min(PAIR_TILES), 128  # pairs of the smallest tile, and of a program that sorts
DRAW_VALUES, DRAW_GROUP, DRAW_BLOCK = 2**16, 64, 4096  # that 16 bits have; logits of which one bounds top-k, and of a program
PARTIAL_TILES = 264 * 16  # rows of partial results: two programs on each of 132 multiprocessors, 16 rows each
Phase = Literal["always", "attention", "mlp", "head"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """`shape` elements of `dtype`; `reserved` ones are room left, never carved."""

    name: str
    phase: Phase
    shape: tuple[int, ...]
    dtype: str
    reserved: bool = False

    @property
    def n_bytes(self) -> int:
        return -(-prod(self.shape) * ITEM_BYTES[self.dtype] // ALIGN) * ALIGN


def padded(T: int) -> int:
    """Rows of the product on the tensor cores that T rows are part of: 8, 16, 32 or 64."""
    return max(8, 1 << (T - 1).bit_length())


def arranged_values(T: int, K: int) -> int:
    """Values of T rows of K as `kernels.arrange` writes them."""
    return padded(T) * -(-K // SKINNY_STEP) * SKINNY_STEP


def pair_rows(n_experts: int, n_active: int) -> int:
    """Most tokens whose pairs are arranged; with more, experts are expanded."""
    return min(PAIR_ROWS, max(PAIR_TILES.values()) * n_experts // n_active)


def pair_tile(n_pairs: int, n_experts: int) -> int:
    """Pairs of a tile whose rows are arranged: of most experts one tile has them all, or two."""
    return next(tile for tile, each in PAIR_TILES.items() if n_pairs <= each * n_experts)


def most_tiles(n_pairs: int, n_experts: int, tile: int) -> int:
    """Tiles of one expert each, however the pairs are shared out among the experts."""
    return min(n_pairs, n_pairs // tile + n_experts)


def arranged_pair_values(n_tokens: int, moe: MoeSpec, hidden: int) -> int:
    """The most values of the rows of all pairs of a step, arranged by tiles of an expert."""
    E = moe.n_experts
    P = min(n_tokens, pair_rows(E, moe.n_active)) * moe.n_active
    tile = pair_tile(P, E)
    return most_tiles(P, E, tile) * arranged_values(tile, max(hidden, moe.width))


def scaled_bytes(T: int, K: int) -> int:
    """T rows of K values in e4m3, and after them an fp32 scale a row."""
    return T * (K + 4)


def order_values(n_tokens: int, n_experts: int, n_active: int) -> int:
    """int32 values of pairs sorted by expert: the pairs, where each expert and its tiles begin, tiles, counts of blocks."""
    P = n_tokens * n_active
    return P + 2 * (n_experts + 1) + P // ORDER_TILE + n_experts + -(-P // ORDER_BLOCK) * n_experts


def partial_values(layer: LayerSpec) -> int:
    """fp32 values of the partial results of a decode step: a result, a maximum and a sum for each row."""
    return PARTIAL_TILES * (layer.head_dim + 2)


def turn_values(layer: LayerSpec, n: int) -> int:
    """fp32 values that PyTorch's operators need to make the keys of `n` slots of V alone: positions, cos and sin, and the pairs."""
    return n * (1 + 2 * turned_pairs(layer) * (1 + layer.n_kv_heads))


def draw_words(rows: int, vocab: int) -> int:
    """int32 values that drawing tokens of so many rows takes: of each a count of every value, the best of each group of logits and
    of each program, what programs sum, and four numbers of the row."""
    blocks = -(-vocab // DRAW_BLOCK)
    return rows * (DRAW_VALUES + blocks * (DRAW_BLOCK // DRAW_GROUP + 3) + 4)


def logit_rows(slots: int, chunk: int) -> int:
    """Most tokens of a step whose logits are wanted: one a sequence, or of few sequences their drafts' too."""
    return min(chunk, max(slots, DRAFT_TOKENS))


def launches(slots: int, chunk: int) -> int:
    """Most sequences that attention sees in a step: drafts of one may count as several, and a chunk's scattered pages."""
    return 2 * slots + DRAFT_TOKENS + chunk // PAGE_TOKENS


def span_words(spec: ModelSpec, slots: int, chunk: int) -> int:
    """int32 values that tell kernels of a step: of each token its position, and its slot in layers of each window; of each
    sequence where its queries begin and end, its keys, and its first slot in layers of each window."""
    kinds = len({x.window for x in spec.kv_layers})
    return (1 + kinds) * chunk + (3 + kinds) * launches(slots, chunk)


def ropes(spec: ModelSpec) -> tuple[RopeSpec, ...]:
    """The distinct ropes of a model, in order of first use."""
    return tuple(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope))


def ring_slots(spec: ModelSpec, *, n_tokens: int, chunk: int) -> dict[int, int]:
    """Slots of the ring of each distinct window."""
    return {layer.window: kv_slots(layer, n_tokens=n_tokens, chunk=chunk) for layer in spec.kv_layers if layer.window is not None}


def workspace(
    spec: ModelSpec,
    *,
    n_tokens: int,
    chunk: int,
    dtype: str,
    kv: Mapping[Kind, KVFormat],
    cpu: bool,
    slots: int = 1,
    block_weights: bool = False,
    plane_values: int = 0,
    plain_experts: bool = True,
    fused_experts: bool = False,
    plane_experts: bool = False,
    scaled_rows: bool = False,
    reads: Collection[str] = ("tiles",),
    first: bool = True,
    last: bool = True,
) -> tuple[Buffer, ...]:
    """The buffers for steps of up to `chunk` tokens in a context of `n_tokens`.

    Args:
        dtype: of the activations.
        slots: sequences that one step may serve.
        block_weights: some matrices stay quantised and are expanded tile by tile by PyTorch.
        plane_values: of the largest matrix, or stack of experts in planes, that our kernels read; they expand tiles for long steps.
        plain_experts, fused_experts, plane_experts: some experts are multiplied one by one; some by our kernels; and in planes.
        scaled_rows: some matrices are in e4m3 with a scale a row, and rows of activations that meet them may become e4m3 as well.
        reads: what the layers' backends need beside the cache, `attention.capability.Capability.reads` of each.
        first, last: whether this stage embeds, and whether it has the logits. Other buffers are those of the whole model, so
            that what a stage needs beside its layers does not depend on which they are.
    """
    C, D = chunk, spec.hidden
    layers = spec.layers
    out: list[Buffer] = []

    def add(name: str, phase: Phase, *shape: int, kind: str = dtype, reserved: bool = False) -> None:
        if prod(shape):
            out.append(Buffer(name, phase, shape, kind, reserved))

    n_heads = max(x.n_heads for x in layers)
    if first:
        add("ids", "always", C, kind="i64")
    add("eps", "always", 1, kind="f32")
    for name in ("x", "h", "y"):
        add(name, "always", C, D)
    heads_all = max([len(layers) if spec.ple else 1, *(x.n_heads + 2 * x.n_kv_heads for x in layers)])
    add("norm", "always", C, heads_all, kind="f32")
    for i, rope in enumerate(ropes(spec)):
        pairs = rope.rotated_dims // 2
        add(f"rope.{i}.freq", "always", pairs, kind="f32")
        for table in ("cos", "sin"):
            add(f"rope.{i}.{table}", "always", C, 1, pairs)
    tiles = "tiles" in reads or "scores" in reads
    if tiles:
        for window, ring in ring_slots(spec, n_tokens=n_tokens, chunk=chunk).items():
            add(f"mask.{window}", "always", C, ring)
    if "slots" in reads:
        # of all tokens; of those that are wanted, and which rows of all these are
        add("span", "always", 2 * span_words(spec, slots, C) + C, kind="i32")
        add("pages", "always", 2 * launches(slots, C), -(-n_tokens // PAGE_TOKENS), kind="i32")
        add("done", "always", launches(slots, C) * max(x.n_kv_heads for x in layers), kind="i32")
        add("partial", "attention", max(partial_values(x) for x in layers), kind="f32")
    if spec.ple:
        add("ple", "always", C, len(layers) * spec.ple.dim)
        add("ple.rows", "attention", C, len(layers) * spec.ple.dim)  # rows of the table, and later those that go on
        add("ple.gate", "mlp", C, spec.ple.dim)

    q_width = max(x.n_heads * x.head_dim for x in layers)
    add("qkv", "attention", C, max(x.n_heads * x.head_dim + 2 * x.n_kv_heads * x.head_dim for x in layers))
    fused = set(reads) == {"slots"}  # norm, RoPE and store are one launch, which needs nothing beside its results
    if fused:
        add("q.own", "attention", C, max([0, *(x.n_heads * x.head_dim for x in layers if not x.k_eq_v)]))
    else:
        turning = [(x.n_heads + x.n_kv_heads) * x.rope.rotated_dims // 2 for x in layers if x.rope]
        add("rope.tmp", "attention", C, max([0, *turning]))
        stored = [x for x in layers if x.k_eq_v and not turned_pairs(x)]
        add("kv.one", "attention", C, max([0, *(x.n_kv_heads * k_values(x) for x in stored)]))
    add("attn", "attention", C, q_width)
    add("q.one", "attention", C, max([0, *(x.n_heads * q_values(x) for x in layers if x.k_eq_v)]))
    loose = [x for x in spec.kv_layers if kv[x.kind].name != dtype]
    if tiles:
        turned = [x for x in spec.kv_layers if turned_pairs(x)]
        add("kv.k", "attention", C * max([0, *(x.n_kv_heads * q_values(x) for x in (*loose, *turned))]))
        add("kv.turn", "attention", max([0, *(turn_values(x, C) for x in turned)]), kind="f32")
        add("kv.v", "attention", C * max([0, *(x.n_kv_heads * v_values(x) for x in loose)]))
    if not fused:
        add("kv.write", "attention", C * max([0, *(x.n_kv_heads * k_values(x) for x in loose)]), kind="f32")
    # one result and, per query and head, a few log-sum-exps; CUDA's operator runs one head of each group at a time, with
    # an fp32 accumulator beside its part of the result
    result = max(x.n_heads * (q_values(x) + 8) for x in layers)
    if not cpu:
        result += max(x.n_kv_heads * q_values(x) for x in layers) * (1 + 4 // ITEM_BYTES[dtype])
    if tiles:
        add("attention result", "always", C, result, reserved=True)
    if "scores" in reads:
        add("scores", "always", 3 * C, n_heads, n_tokens, kind="f32", reserved=True)

    wide = max(max(x.mlp.width, x.mlp.moe.width if x.mlp.moe else 0) for x in layers)
    add("gate_up", "mlp", C, 2 * wide)
    moes = [x.mlp.moe for x in layers if x.mlp.moe]
    active = max((m.n_active for m in moes), default=0)
    if moes:
        add("router", "mlp", C, max(m.n_experts for m in moes), kind="f32")
        add("router.weight", "mlp", C, active, kind="f32")
    if moes and plain_experts:
        add("router.index", "mlp", C, active, kind="i64")
        for name in ("expert.in", "expert.out", "expert.sum", "expert.total"):
            add(name, "mlp", C, D)
    if moes and fused_experts:
        add("router.done", "always", ROUTER_ROWS, kind="i32")
        add("router.ids", "mlp", C, active, kind="i32")
        add("expert.order", "mlp", max(order_values(C, m.n_experts, m.n_active) for m in moes), kind="i32")
        both = 2 * min(C, max(pair_rows(m.n_experts, m.n_active) for m in moes)) if plane_experts else 0  # gate beside up
        add("expert.gated", "mlp", max(C, both), max(m.n_active * m.width for m in moes))
        add("expert.pairs", "mlp", C, active, D)
        if plane_experts:
            values = min(C, EXPERT_ROWS) * max(D, *(m.n_active * m.width for m in moes))
            add("expert.words", "mlp", values // 32 * QUANT_GROUP_WORDS, kind="i32")
    if last:
        add("logits", "head", logit_rows(slots, C), spec.vocab_size)
        if fused and ITEM_BYTES[dtype] == 2:
            add("draw", "head", draw_words(logit_rows(slots, C), spec.vocab_size), kind="i32")
    widest = max(D, q_width, wide)
    if plane_values:
        add("quant.words", "always", QUANT_ROWS * -(-widest // 32) * QUANT_GROUP_WORDS, kind="i32")
        add("quant.partial", "always", QUANT_PARTIAL, kind="f32")
        add("quant.done", "always", QUANT_DONE, kind="i32")
    if block_weights or plane_values:
        expert = max((2 * m.width * D for m in moes), default=0) if plane_experts else 0  # gate and up
        arranged = arranged_values(SKINNY_ROWS, widest) if plane_values else 0
        of_pairs = (arranged_pair_values(C, m, D) for m in moes if expert)
        scaled = -(-scaled_bytes(C, widest) // ITEM_BYTES[dtype]) if scaled_rows else 0
        tile = max(min(PLANE_TILE_VALUES, plane_values), expert, arranged, scaled, *of_pairs)
        add("weight.tile", "always", max(tile, DEQUANT_TILE_VALUES if block_weights else 0))
    if block_weights:
        add("weight.tile on the way", "always", DEQUANT_TILE_VALUES * DEQUANT_TEMP_BYTES // 4, kind="f32", reserved=True)
    return tuple(out)


def arena_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes of the one allocation: what lives always, and the largest of the phases that overlay each other."""
    totals: dict[str, int] = {}
    for b in buffers:
        totals[b.phase] = totals.get(b.phase, 0) + b.n_bytes
    return totals.pop("always", 0) + max(totals.values(), default=0)


def offsets(buffers: Iterable[Buffer]) -> dict[str, int]:
    """Where each carved buffer starts in the arena; reserved room lies at the very end."""
    buffers = [b for b in buffers if not b.reserved]
    where: dict[str, int] = {}
    ends: dict[str, int] = {}
    base = sum(b.n_bytes for b in buffers if b.phase == "always")
    for b in buffers:
        start = ends.setdefault(b.phase, 0 if b.phase == "always" else base)
        where[b.name], ends[b.phase] = start, start + b.n_bytes
    return where
