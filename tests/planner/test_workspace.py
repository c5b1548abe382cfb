"""Room for the pairs of tokens and experts: what the engine takes of a step, of the buffers that the plan counted."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from headwise.planner.workspace import RECORDED_TOKENS, arranged_values, order_values, pair_rows, pair_tile, workspace
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS

QWEN = catalogue.spec("qwen3-30b-a3b")


@pytest.mark.parametrize("chunk", [1, 64, 300, 2048])
@pytest.mark.parametrize(("E", "K", "W"), [(128, 8, 768), (128, 8, 3072), (32, 4, 2880), (8, 2, 14336), (256, 8, 512), (2, 2, 64)])
def test_every_step_finds_the_room_that_was_planned(E: int, K: int, W: int, chunk: int) -> None:
    moe = replace(QWEN.layers[0].mlp.moe, n_experts=E, n_active=K, width=W)  # type: ignore[type-var]
    layers = tuple(replace(x, mlp=replace(x.mlp, moe=moe)) for x in QWEN.layers[:1])
    kv = {"global": KV_FORMATS["bf16"], "sliding": KV_FORMATS["bf16"]}
    buffers = workspace(
        replace(QWEN, layers=layers), n_tokens=chunk, chunk=chunk, dtype="bf16", kv=kv, cpu=False, reads=("slots",),
        plane_values=1, plain_experts=False, fused_experts=True, plane_experts=True,
    )  # fmt: skip
    room = {b.name: prod(b.shape) for b in buffers}
    for T in range(1, min(chunk, pair_rows(E, K)) + 1):
        P, tile = T * K, pair_tile(T * K, E)
        tiles = min(P, P // tile + E)  # `router.Order.tiles`
        assert room["weight.tile"] >= tiles * arranged_values(tile, max(QWEN.hidden, W))
        assert room["expert.gated"] >= P * 2 * W
        assert room["expert.order"] >= order_values(T, E, K)


def test_tiles_grow_with_the_pairs_of_an_expert_and_end_where_expanding_is_cheaper() -> None:
    """Gemma 4 26B-A4B, as measured: 8 pairs a tile up to 96 tokens, 16 up to 256, 32 up to what is recorded."""
    assert [pair_tile(8 * T, 128) for T in (5, 96, 128, 256, 384, 1024)] == [8, 8, 16, 16, 32, 32]
    assert pair_rows(128, 8) == RECORDED_TOKENS
    assert (pair_rows(32, 4), pair_rows(8, 2), pair_rows(2, 2)) == (512, 256, 64)
