"""Tile sizes of the portable attention kernel, as data: by card, phase, head size and store. No search at run time.

`tests/kernels/test_compile.py` compiles every row for its cards without one: shared memory within the card's limit, spills
below 64 bytes. Rows of "ampere" hold their tiles in 99 KiB, so they also run on consumer cards (sm86, sm89, sm120), which have
no more. Rows of "hopper" were timed on one H200, docs/kernels.md. Rows of "rdna3" are compiled for gfx1100 and were never run: its
lanes hold a query whole, twice, so from head_dim 256 on every tile spills (312 bytes and more), and none is offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]
Arch = Literal["hopper", "ampere", "rdna3"]
GLUON = (3, 6)  # of triton, PyTorch 2.11's: the version whose Gluon our kernels were run with; its API changes between versions
DECODE_ROWS = 16  # (query, head) pairs of a group up to which a launch is a decode
FEW_ROWS = 32  # up to which programs share the keys of a sequence


def heads_together(group: int, most: int) -> int:
    """The largest divisor of `group` up to `most`: heads whose queries share a tile."""
    return max(n for n in range(1, group + 1) if group % n == 0 and n <= most)


@dataclass(frozen=True, slots=True)
class Config:
    """One launch: `rows` (query, head) pairs by `keys` keys a tile."""

    rows: int
    keys: int
    warps: int
    stages: int
    heads_packed: int = 16  # most heads of a group whose queries share a tile

    def pack(self, group: int) -> int:
        """Heads of a group in one tile."""
        return heads_together(group, self.heads_packed)


@dataclass(frozen=True, slots=True)
class Crossed:
    """One launch of `attend_mma`: eight warps share `rows` (query, head) pairs by `chunks` of the head's values, each chunk by rows
    in `by_row` parts, and these by keys; the result by chunks, rows in `out_by_row` parts and values.

    `stages` tiles of `keys` keys are held, and of two tensors as many of values; with 1 the keys and the values come in turn. Of
    fp8, q8_0 and q4_0 these are bytes, beside one tile of floats.
    """

    rows: int
    keys: int
    stages: int
    chunks: int
    by_row: int
    out_by_row: int


@dataclass(frozen=True, slots=True)
class Row:
    """The launches of one head size and store: from float caches, and from fp8, q8_0 and q4_0, which need more registers; from
    these of V alone still more: `turned`, where that takes another launch."""

    floats: Config
    blocks: Config
    turned: Config | None = None


# Fewer keys a tile are wrong for q4_0: triton 3.6 compiles the joining of nibbles in tiles of 16 keys into another order (seen
# on an H200 in every such launch of at most 32 rows; the interpreter and tiles of 32 are right).
LEAST_BLOCK_KEYS = 32

# (phase, head_dim, one tensor for K and V)
TABLE: dict[Arch, dict[tuple[Phase, int, bool], Row]] = {
    "hopper": {
        ("prefill", 64, False): Row(Config(128, 64, 4, 3, 1), Config(64, 64, 4, 2, 1)),
        ("prefill", 128, False): Row(Config(128, 64, 8, 3, 1), Config(128, 64, 8, 2, 1)),
        ("prefill", 256, False): Row(Config(128, 64, 8, 2, 2), Config(64, 64, 8, 2, 2)),
        ("prefill", 512, False): Row(Config(32, 32, 8, 3, 8), Config(32, 32, 8, 2, 8)),
        ("prefill", 512, True): Row(Config(32, 64, 8, 2, 8), Config(32, 32, 8, 1, 8), Config(16, 32, 8, 1, 8)),
        ("decode", 64, False): Row(Config(16, 128, 4, 3), Config(16, 64, 4, 3)),
        ("decode", 128, False): Row(Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
        ("decode", 256, False): Row(Config(16, 64, 4, 2), Config(16, 32, 4, 3)),
        ("decode", 512, False): Row(Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
        ("decode", 512, True): Row(Config(16, 32, 4, 3), Config(16, 32, 4, 3), Config(16, 32, 8, 3)),
    },
    "ampere": {
        ("prefill", 64, False): Row(Config(64, 64, 4, 2, 1), Config(64, 32, 4, 2, 1)),
        ("prefill", 128, False): Row(Config(128, 64, 8, 3, 1), Config(64, 32, 4, 2, 1)),
        ("prefill", 256, False): Row(Config(64, 64, 8, 1, 2), Config(64, 64, 8, 1, 2)),
        ("prefill", 512, False): Row(Config(32, 32, 8, 2, 8), Config(32, 32, 8, 2, 8)),
        ("prefill", 512, True): Row(Config(32, 32, 8, 2, 8), Config(16, 32, 8, 1, 8)),
        ("decode", 64, False): Row(Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
        ("decode", 128, False): Row(Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
        ("decode", 256, False): Row(Config(16, 32, 4, 3), Config(16, 32, 4, 3)),
        ("decode", 512, False): Row(Config(16, 32, 4, 2), Config(16, 32, 8, 1)),
        ("decode", 512, True): Row(Config(16, 32, 4, 2), Config(16, 32, 8, 1)),
    },
    "rdna3": {
        ("prefill", 64, False): Row(Config(64, 32, 4, 1, 1), Config(64, 32, 8, 1, 1)),
        ("prefill", 128, False): Row(Config(64, 32, 4, 1, 1), Config(32, 32, 8, 1, 1)),
        ("decode", 64, False): Row(Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
        ("decode", 128, False): Row(Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    },
}

# (card, head_dim, rotated values beside it, floats or not): prefill. Plain Triton gives a warp 16 rows of a tile to itself; where
# registers hold fewer rows than eight warps need so, those left over do the same work again, and make floats of the same bytes.
CROSSED: dict[tuple[Arch, int, int, bool], Crossed] = {
    ("ampere", 64, 0, True): Crossed(256, 32, 2, 1, 8, 8),
    ("ampere", 256, 0, True): Crossed(128, 16, 3, 1, 8, 8),
    ("ampere", 512, 0, True): Crossed(64, 16, 1, 4, 2, 1),
    ("ampere", 512, 128, True): Crossed(64, 16, 3, 4, 2, 1),
    ("ampere", 64, 0, False): Crossed(256, 32, 1, 1, 8, 8),
    ("ampere", 128, 0, False): Crossed(128, 32, 1, 1, 8, 8),
    ("ampere", 256, 0, False): Crossed(128, 16, 2, 1, 8, 8),
    ("ampere", 512, 0, False): Crossed(64, 16, 1, 4, 2, 1),
    ("ampere", 512, 128, False): Crossed(64, 16, 1, 4, 2, 1),
    ("hopper", 64, 0, False): Crossed(256, 32, 1, 1, 8, 8),
    ("hopper", 128, 0, False): Crossed(128, 32, 1, 1, 8, 8),
    ("hopper", 256, 0, False): Crossed(128, 16, 2, 1, 8, 8),
    ("hopper", 512, 0, False): Crossed(64, 16, 1, 4, 2, 1),
    ("hopper", 512, 128, False): Crossed(64, 16, 1, 4, 2, 1),
}


def arch_of(capability: tuple[int, int], *, rocm: bool = False) -> Arch:
    """The rows a card reads."""
    if rocm:
        return "rdna3"
    return "hopper" if capability == (9, 0) else "ampere"


def config_for(D: int, *, one: bool, blocks: bool, turned: bool, rows: int, arch: Arch) -> Config:
    """The launch for head size `D`; below 512 one tensor takes the rows of two.

    Args:
        one: one tensor for K and V; turned: V alone; blocks: the cache is fp8, q8_0 or q4_0; rows: queries times heads of a group.
    """
    phase: Phase = "decode" if rows <= DECODE_ROWS else "prefill"
    row = TABLE[arch][(phase, D, one and D == 512)]
    return row.floats if not blocks else row.turned if turned and row.turned else row.blocks


KEYS_A_PROGRAM = 128  # of a decode; fewer are not worth a partial result


def doublings(keys: int) -> int:
    """Shares of `keys`, a power of two: a recorded decode step is replayed until the next doubling."""
    return 1 << (-(-keys // KEYS_A_PROGRAM) - 1).bit_length()
