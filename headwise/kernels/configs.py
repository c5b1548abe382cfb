"""Tile sizes of the attention kernel, as data: by head size, store, phase and card. No search at run time.

Each row names the least compute capability and the shared memory it was made for; `tests/kernels/test_compile.py` compiles
every row for its card without one and holds shared memory and spills to their limits. Rates: docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prefill", "decode"]
Arch = Literal["hopper", "ampere", "consumer", "rdna3"]


@dataclass(frozen=True, slots=True)
class Config:
    """One launch: `rows` (query, head) pairs by `keys` keys a tile."""

    rows: int
    keys: int
    warps: int
    stages: int
    heads_packed: int = 16  # most heads of a group whose queries share a tile

    def pack(self, group: int) -> int:
        """Heads of a group in one tile: the largest divisor of `group` up to `heads_packed`."""
        return max(n for n in range(1, group + 1) if group % n == 0 and n <= self.heads_packed)


def arch_of(capability: tuple[int, int] | None, *, rocm: bool = False) -> Arch:
    """The column of the table a card reads: by what its blocks may hold in shared memory."""
    if rocm or capability is None:
        return "rdna3"
    if capability[0] in (9, 10, 11):
        return "hopper"
    return "ampere" if capability in ((8, 0), (8, 7)) else "consumer"


# (phase, head_dim, one tensor for K and V) -> by arch
TABLE: dict[Arch, dict[tuple[Phase, int, bool], Config]] = {
    "hopper": {
        ("prefill", 64, False): Config(128, 64, 4, 3, 1),
        ("prefill", 128, False): Config(128, 64, 8, 3, 1),
        ("prefill", 256, False): Config(128, 64, 8, 2, 2),
        ("prefill", 512, False): Config(64, 32, 8, 2, 8),
        ("prefill", 512, True): Config(64, 32, 8, 2, 8),
        ("decode", 64, False): Config(16, 128, 4, 3),
        ("decode", 128, False): Config(16, 64, 4, 3),
        ("decode", 256, False): Config(16, 64, 4, 2),
        ("decode", 512, False): Config(16, 32, 4, 2),
        ("decode", 512, True): Config(16, 32, 4, 3),
    },
}


def config_for(D: int, R: int, *, one: bool, format: int, queries: int, dtype: object, arch: Arch = "hopper") -> Config:
    phase: Phase = "decode" if queries <= 16 else "prefill"
    return TABLE[arch][(phase, D, one)]
