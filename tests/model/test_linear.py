"""Weights that stay quantised: products by tiles, rows of tables, and a whole decoder on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf

from headwise import LLM
from headwise.attention.capability import CPU
from headwise.attention.choose import choose_layers
from headwise.engine.runner import Runner
from headwise.engine.stage import Stage
from headwise.model.arena import Room
from headwise.model.linear import linear, linears, ready_room, rows
from headwise.planner.memory import Workload, plan
from headwise.planner.residence import groups
from headwise.spec.kv import KV_FORMATS
from headwise.spec.read import open_model
from headwise.weights.blocks import BlockTensor, dequantise
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import stored_types


def quantised(n: int, k: int) -> BlockTensor:
    import gguf

    x = np.random.default_rng(n).standard_normal((n, k)).astype(np.float32)
    return BlockTensor(torch.from_numpy(gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)), "q8_0", (n, k))


@pytest.mark.parametrize("tile_rows", [1, 3, 7, 100])
def test_a_product_by_tiles_is_the_product(tile_rows: int) -> None:
    """The last tile is smaller than the others; a tile left over from the one before would show."""
    weight, x = quantised(20, 64), torch.randn(5, 64)
    out = torch.full((5, 20), float("nan"))
    linear(x, weight, out, Room(torch.empty(tile_rows * 64)))

    assert (out - x @ dequantise(weight.data, "q8_0", torch.float32).t()).abs().max() < 1e-4


def test_a_tile_too_small_for_a_row_is_a_bug_that_shows() -> None:
    with pytest.raises(ValueError, match="rows of 64"):
        linear(torch.ones(1, 64), quantised(4, 64), torch.empty(1, 4), Room(torch.empty(63)))


def test_a_few_rows_are_arranged_once_for_all_planes_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanding a block tensor in between overwrites what was arranged: the tile is the same."""
    pytest.importorskip("triton")
    import headwise.kernels.arrange as A
    import headwise.kernels.skinny as S
    from headwise.kernels import split
    from headwise.weights.retile import empty

    seen: list[str] = []

    def arrange(x: torch.Tensor, room: torch.Tensor) -> A.Arranged:
        seen.append("arrange")
        return A.Arranged(room, (x.shape[0], x.shape[1]))

    monkeypatch.setattr(A, "arrange", arrange)
    monkeypatch.setattr(S, "skinny", lambda x, w, out, **_: seen.append(f"{x.shape[0]} by {w.rows}"))
    monkeypatch.setattr(split, "card", lambda _: split.H200)
    half = torch.float16
    words, done = torch.empty(640, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    room = Room(torch.empty(4096, dtype=half), words, torch.empty(99), done, skinny_rows=4)
    a, b = empty("q8_0", (16, 64), "cpu"), empty("q4_0", (24, 64), "cpu")
    x, out = torch.randn(4, 64, dtype=half), torch.empty(4, 24, dtype=half)

    linears(x, [(a, out[:, :16]), (b, out)], room)
    assert seen == ["arrange", "4 by 16", "4 by 24"]
    seen.clear()
    linears(x, [(a, out[:, :16]), (quantised(20, 64), out[:, :20]), (b, out)], room)
    assert seen == ["arrange", "4 by 16", "arrange", "4 by 24"]
    seen.clear()
    linears(A.Arranged(room.tile, (1, 64)), [(a, out[:1, :16])], room)  # type: ignore[arg-type]
    assert seen == ["1 by 16"]
    assert ready_room(a, 4, room) is room.tile
    assert ready_room(a, 5, room) is room.words
    assert ready_room(quantised(4, 64), 1, room) is None


def test_rows_of_a_quantised_table_are_its_rows() -> None:
    table = quantised(9, 32)
    out = rows(table, torch.tensor([8, 0, 8]), torch.empty(3, 32))

    assert torch.equal(out, dequantise(table.data, "q8_0", torch.float32)[[8, 0, 8]])


@pytest.mark.parametrize("name", ["qwen3-wide", "gpt-oss", "gemma4-31b"])
def test_weights_kept_as_stored_give_the_logits_of_expanded_ones(name: str, tmp_path: Path) -> None:
    """What a GPU does with a quantised file, on the CPU: the planner's GPU rule, and its bytes."""
    path = tmp_path / "m.gguf"
    write_gguf(name, path, quant="q8_0")
    source = open_model(path, env={})
    kv = {"global": KV_FORMATS["f32"], "sliding": KV_FORMATS["f32"]}
    stored = stored_types(source.spec, list_checkpoint(path))
    p = plan(source.spec, stored, Workload(context=64, chunk=32, kv=kv, dtype="f32"))
    weights = load_weights(source.spec, path, resident=p.resident, device="cpu", groups=groups(source.spec, p.resident))
    choices = choose_layers(source.spec, kv=kv, dtype="f32", device=CPU)
    runner = Runner(p, [Stage(p, 0, choices, weights, torch.device("cpu"))])
    ids = list(range(4, 30))
    expanded = LLM(path, context=64, chunk=32, device="cpu", check=False).logits(ids)

    assert any(isinstance(w, BlockTensor) for w in weights.values())
    last = runner.logits(runner.prefill(ids, chunk=7))[0]
    assert (last - expanded[-1]).abs().max() < 1e-3
    assert p.total_bytes == runner.allocated_bytes
