"""The same weights through GGUF: names, permutations, offsets and every quantised type."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf_files import SCALES_AT, write_gguf

from headwise import LLM
from headwise.errors import SpecError
from headwise.planner.residence import KEPT_TYPES
from headwise.weights.blocks import BLOCK_TYPES, dequantise

IDS = torch.randint(1, 320, (47,), generator=torch.Generator().manual_seed(5)).tolist()
PACKABLE = ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq1_0", "tq2_0")


def oracle(name: str, held: dict[str, np.ndarray]) -> torch.Tensor:
    """transformers with the values that the file holds."""
    net = copy.deepcopy(tiny.model(name))
    net.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in held.items()})
    with torch.no_grad():
        return net(torch.tensor([IDS]), use_cache=False).logits[0]


def logits(path: Path) -> torch.Tensor:
    return LLM(path, context=64, chunk=32, device="cpu", check=False).logits(IDS)


@pytest.mark.parametrize("name", [n for n in tiny.FAMILIES if n != "gemma3"])
def test_a_gguf_gives_the_logits_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    """A q/k permutation not undone, or a norm less one, leaves shapes right and logits wrong."""
    write_gguf(name, tmp_path / "m.gguf")

    assert (logits(tmp_path / "m.gguf") - tiny.logits(name, IDS)).abs().max() <= (1e-3 if name in tiny.MOE else 1e-4)


@pytest.mark.parametrize("quant", PACKABLE)
@pytest.mark.parametrize("name", ["qwen3-wide", "gpt-oss", "gemma4-31b"])
def test_every_type_gives_the_logits_of_its_dequantised_values(name: str, quant: str, tmp_path: Path) -> None:
    held = write_gguf(name, tmp_path / "m.gguf", quant=quant)

    assert (logits(tmp_path / "m.gguf") - oracle(name, held)).abs().max() <= (1e-3 if name in tiny.MOE else 1e-4)


@pytest.mark.parametrize("quant", SCALES_AT)
def test_every_type_that_gguf_py_only_reads_loads_too(quant: str, tmp_path: Path) -> None:
    held = write_gguf("qwen3-wide", tmp_path / "m.gguf", quant=quant)

    assert (logits(tmp_path / "m.gguf") - oracle("qwen3-wide", held)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", sorted(BLOCK_TYPES))
def test_blocks_are_read_bit_for_bit(kind: str) -> None:
    """Random bytes are blocks too: extreme scales and every code, against gguf-py."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    data = np.random.default_rng(1).integers(0, 256, (64, 3 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    ours = dequantise(torch.from_numpy(data), kind, torch.float32).numpy()

    assert ours.shape == (64, 3 * block)
    np.testing.assert_array_equal(ours[np.isfinite(theirs)], theirs[np.isfinite(theirs)])


def test_the_planner_and_the_loader_keep_the_same_types() -> None:
    assert KEPT_TYPES == BLOCK_TYPES


def test_text_goes_through_a_gguf_vocabulary(tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf")
    llm = LLM(tmp_path / "m.gguf", context=64, chunk=32, device="cpu", check=False)

    assert llm.tokenizer.decode(llm.tokenize("def f(x):\n\treturn x")) == "def f(x):\n\treturn x"
    assert len(llm.generate("hello", max_tokens=3).tokens) == 3


@pytest.mark.parametrize("cut", [10, 1000, -1])
def test_a_truncated_file_is_refused_before_anything_runs(cut: int, tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:cut])
    with pytest.raises(SpecError):
        logits(tmp_path / "cut.gguf")
