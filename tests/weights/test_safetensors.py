"""Hugging Face checkpoints: types, shards, prefixes, and what is wrong with a broken one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import folder
from safetensors.torch import load_file, save_file

from headwise import LLM
from headwise.errors import SpecError

IDS = list(range(5, 45))


def logits(path: Path) -> torch.Tensor:
    return LLM(path, context=64, chunk=32, device="cpu", check=False).logits(IDS)


def changed(name: str, to: Path, change: object) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    to.mkdir()
    shutil.copy(folder(name) / "config.json", to)
    tensors = change(load_file(folder(name) / "model.safetensors"))  # type: ignore[operator]
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors")
    return to


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    half = changed("gemma4-31b", tmp_path / "half", lambda t: {k: v.to(dtype) for k, v in t.items()})
    wide = changed("gemma4-31b", tmp_path / "wide", lambda t: {k: v.to(dtype).float() for k, v in t.items()})

    assert torch.equal(logits(half), logits(wide))


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma4-e2b"])
def test_shards_give_what_one_file_gives(name: str, tmp_path: Path) -> None:
    tiny.save(name, tmp_path / "sharded", max_shard_size="300KB")

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "sharded"), logits(folder(name)))


@pytest.mark.parametrize(
    ("before", "head"), [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")]
)
def test_conditional_generation_names_are_read_and_vision_is_skipped(before: str, head: str, tmp_path: Path) -> None:
    def rename(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {k.replace("model.", before, 1) if k.startswith("model.") else k.replace("lm_head.", head): v for k, v in t.items()}
        return out | {"model.vision_tower.patch.weight": torch.ones(2, 2), "model.multi_modal_projector.weight": torch.ones(2, 2)}

    assert torch.equal(logits(changed("gemma3", tmp_path / "m", rename)), logits(folder("gemma3")))


def without(key: str) -> object:
    return lambda t: {k: v for k, v in t.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.layers.1.self_attn.q_proj.weight"), "layers.1.self_attn.q_proj"),
        (without("model.norm.weight"), "norm"),
        (lambda t: t | {"model.layers.0.mlp.adapter.weight": torch.ones(3, 3)}, "mlp.adapter"),
        (lambda t: t | {"model.norm.weight": torch.ones(7)}, "7"),
        (lambda t: t | {"model.layers.0.mlp.up_proj.weight": torch.ones(160, 96, dtype=torch.int8)}, "i8"),
    ],
)
def test_a_checkpoint_that_is_not_this_model_is_refused_by_name(change: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words):
        logits(changed("llama", tmp_path / "m", change))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:4],
        lambda b: b[:2000],
        lambda b: b[:-100],
        lambda b: (2**62).to_bytes(8, "little") + b[8:],
        lambda b: b[:8] + b"x" + b[9:],
        lambda b: b"",
    ],
)
def test_damaged_safetensors_are_refused(damage: object, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(folder("llama"), copy)
    file = copy / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(SpecError):
        logits(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny.save("qwen3-moe", tmp_path / "m", max_shard_size="300KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / "m" / gone).unlink()
    with pytest.raises(SpecError, match=gone):
        logits(tmp_path / "m")
