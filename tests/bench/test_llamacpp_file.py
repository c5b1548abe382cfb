"""The random model that benchmarks/llamacpp.py writes for llama.cpp is the one that the engine measures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise import LLM
from headwise.bench.engine import blocks_of, first_layers, random_weights, runner_for
from headwise.engine.devices import device_kind
from headwise.errors import UsageError
from headwise.planner.quantise import weight_types
from headwise.spec import catalogue
from headwise.spec.kv import KVFormat, kv_format
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import Weight, dequantise

CPU = torch.device("cpu")
F32: dict[Kind, KVFormat] = {"global": kv_format("f32"), "sliding": kv_format("f32")}
NARROW = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """Six layers of Gemma 4 12B, narrow, under its name."""
    entry = dict(catalogue._entries()["gemma-4-12b"])
    entry["config"] = entry["config"] | NARROW
    monkeypatch.setitem(catalogue._entries(), "gemma-4-12b", entry)  # type: ignore[arg-type]
    return first_layers(catalogue.spec("gemma-4-12b"))


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import llamacpp

    return llamacpp


@pytest.mark.parametrize("scheme", ["f32", "q4_k_m"])
def test_the_file_gives_the_logits_of_the_random_weights(scheme: str, narrow: ModelSpec, llamacpp: Any, tmp_path: Path) -> None:
    stored = weight_types(narrow, scheme)
    common: dict[str, Any] = {"context": 64, "chunk": 32, "kv": F32, "dtype": "f32", "kind": device_kind(CPU), "device": CPU}
    common["stored"] = dict.fromkeys(stored, "f32")
    *_, p = runner_for(narrow, **common)
    floats = random_weights(narrow, p, CPU)[0]
    held: dict[str, Weight | None] = dict(floats)
    for t in weight_tensors(narrow):
        if stored[t.name] != "f32":  # as a plan for a GPU keeps it
            held[t.name] = None
            parts = [dequantise(blocks, stored[t.name], torch.float32) for *_, blocks in blocks_of(t, stored[t.name], CPU)]
            floats[t.name].copy_(torch.cat(parts))  # type: ignore[union-attr]
    runner, *_ = runner_for(narrow, weights=floats, **common)
    ids = torch.randint(3, narrow.vocab_size, (47,), generator=torch.Generator().manual_seed(5)).tolist()

    llamacpp.write(tmp_path / "m.gguf", narrow, replace(p, resident=stored), CPU, held)

    want = runner.logits(runner.prefill(ids))[0]
    got = LLM(tmp_path / "m.gguf", context=64, chunk=32, device="cpu", dtype="f32", check=False).logits(ids)[-1]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_another_family_is_refused(llamacpp: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"llama-3\.2-3b is not written as a GGUF here"):
        llamacpp.write(tmp_path / "m.gguf", catalogue.spec("llama-3.2-3b"), None, CPU)


def test_a_folder_without_the_library_is_refused(llamacpp: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no llama"):
        llamacpp.LlamaCpp(tmp_path, tmp_path / "m.gguf", context=64, ubatch=32)
