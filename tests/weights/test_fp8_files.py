"""Safetensors in FP8, in each published form: the values that are loaded, what is planned for them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fp8_files
import pytest
import torch
import transformers
from checkpoints import folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise import LLM
from headwise.engine.measure import allocated_bytes
from headwise.errors import SpecError, UsageError
from headwise.planner.quantise import made_at_load, weight_types
from headwise.planner.residence import groups, resident_types, weight_bytes
from headwise.spec.read import open_model
from headwise.weights.blocks import Fp8Tensor, expand_fp8, to_fp8
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import match, stored_types

IDS = list(range(5, 45))


def llm(path: Path) -> LLM:
    return LLM(path, context=64, chunk=32, device="cpu", check=False)


@pytest.mark.parametrize("form", fp8_files.FORMS)
@pytest.mark.parametrize("family", ["gemma4-31b", "qwen3-moe", "gemma4-26b-a4b"])
def test_a_checkpoint_in_fp8_is_its_values(family: str, form: str, tmp_path: Path) -> None:
    """A scale of the next block where rows or columns are no whole 128, experts that come one by one, a router in bf16."""
    path = fp8_files.save(folder(family), tmp_path, form)
    ours = llm(path)

    assert torch.equal(ours.logits(IDS), llm(tmp_path / "floats").logits(IDS))
    assert ours.plan.total_bytes == allocated_bytes(ours.runner)


def test_transformers_reads_the_same_values(tmp_path: Path) -> None:
    """Its own reading of `weight_scale_inv`; it takes 128 for granted, so whole blocks."""
    path = fp8_files.save(folder("qwen3-wide"), tmp_path, "blocks")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.tensor([IDS]), use_cache=False).logits[0].float()

    assert (llm(path).logits(IDS) - want).abs().max() < 1e-4


@pytest.mark.parametrize("form", [*fp8_files.FORMS, "make"])
def test_a_gpu_holds_what_is_planned(form: str, tmp_path: Path) -> None:
    """Scales that are copied for every row of a block, members of a group in one allocation, stacks of experts."""
    path = folder("gemma4-26b-a4b") if form == "make" else fp8_files.save(folder("gemma4-26b-a4b"), tmp_path, form)
    spec = open_model(path, env={}).spec
    stored = stored_types(spec, list_checkpoint(path))
    types = made_at_load(spec, stored, "fp8" if form == "make" else None)
    resident = resident_types(spec, types, cpu=False, dtype="f32")
    weights = load_weights(spec, path, resident=resident, device="cpu", groups=groups(spec, resident))
    floats = load_weights(spec, path, resident=dict.fromkeys(resident, "f32"), device="cpu")

    assert allocated_bytes(weights) == sum(weight_bytes(spec, resident).values())
    kept = {name: w for name, w in weights.items() if isinstance(w, Fp8Tensor)}
    assert {"layers.0.qkv", "layers.0.gate_up", "layers.1.down", "layers.3.o"} <= set(kept)
    assert {"layers.0.experts_gate_up", "layers.0.experts_up", "layers.3.experts_down"} <= set(kept)
    for name, w in kept.items():
        if (want := floats.get(name)) is None:  # a group
            continue
        assert isinstance(want, Tensor)
        got = expand_fp8(w.data, w.scales)
        if form == "make":
            assert ((got - want).abs() <= want.abs().amax(-1, keepdim=True) / 448 * 16 + 1e-9).all()
            assert torch.allclose(w.scales, want.abs().amax(-1, keepdim=True) / 448)
        else:
            assert torch.equal(got, want)


def test_a_row_of_zeros_stays_one() -> None:
    """Its largest magnitude is no divisor."""
    data, scales = to_fp8(torch.tensor([[0.0, 0.0], [-7.0, 3.5]]))

    assert torch.equal(data.float() * scales, torch.tensor([[0.0, 0.0], [-7.0, 3.5]]))


def test_a_plan_without_a_file_counts_what_is_made_of_one() -> None:
    spec = open_model(folder("gemma4-26b-a4b"), env={}).spec
    made = made_at_load(spec, stored_types(spec, list_checkpoint(folder("gemma4-26b-a4b"))), "fp8")

    with pytest.raises(UsageError, match="--weights q8_0 is not made at load"):
        made_at_load(spec, made, "q8_0")
    planned, held = (resident_types(spec, t, cpu=False, dtype="bf16") for t in (weight_types(spec, "fp8"), made))
    assert planned == held
    assert held["layers.0.q"] == held["layers.0.experts_up"] == "fp8" and held["embed"] == "bf16"


def test_scales_that_are_not_needed_are_skipped_by_reason(tmp_path: Path) -> None:
    """Static activations and an fp8 cache, as older compressed-tensors files have them."""
    path = fp8_files.save(folder("llama"), tmp_path, "ct-tensor")
    stem, file = "model.layers.0.self_attn.", path / "model.safetensors"
    more = {
        f"{stem}q_proj.input_scale": torch.ones(1),
        f"{stem}k_scale": torch.ones(1),
        f"{stem}v_proj.output_scale": torch.ones(1),
    }
    more |= {"lm_head.weight": torch.zeros(320, 96).to(torch.float8_e4m3fn), "lm_head.weight_scale": torch.ones(320, 1)}
    save_file(load_file(file) | more, file)

    matched = match(open_model(path, env={}).spec, list_checkpoint(path))
    assert {name for name, why in matched.skipped.items() if why} == set(more)


def without_scale(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in t.items() if not k.endswith("layers.1.mlp.up_proj.weight_scale_inv")}


def other_blocks(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return t | {"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(3, 2)}


def exponents(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return t | {"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(2, 1).to(torch.float8_e8m0fnu)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, "up_proj.weight is stored as f8_e4m3"),
        (other_blocks, r"up_proj.weight_scale_inv is f32 \[3, 2\]"),
        (exponents, r"up_proj.weight_scale_inv is f8_e8m0 \[2, 1\]"),
    ],
)
def test_scales_of_another_kind_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str, tmp_path: Path
) -> None:
    path = fp8_files.save(folder("llama"), tmp_path, "blocks")
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")
    with pytest.raises(SpecError, match=words):
        llm(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_block_size": [64, 64]}, r"fp8 with weight_block_size \[64, 64\]"),
        ({"fmt": "e5m2"}, "fp8 of fmt 'e5m2'"),
        ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors of format 'pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "config_groups None"),
    ],
)
def test_other_forms_are_refused_before_the_weights_are_looked_at(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    path = fp8_files.save(folder("llama"), tmp_path, "blocks")
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(values))
    (path / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=words) as caught:
        open_model(path, env={})
    assert "128 by 128" in caught.value.why and "GGUF" in caught.value.do


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"num_bits": 4}, "compressed-tensors with weights"),
        ({"type": "int"}, "compressed-tensors with weights"),
        ({"strategy": "group"}, "'group' scales"),
        ({"strategy": "block", "block_structure": [64, 128]}, r"block_structure \[64, 128\]"),
    ],
)
def test_compressed_tensors_of_other_weights_are_refused(weights: dict[str, object], words: str, tmp_path: Path) -> None:
    path = fp8_files.save(folder("llama"), tmp_path, "ct-channel")
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(SpecError, match=words):
        open_model(path, env={})
