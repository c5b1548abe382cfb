"""The kernels around attention against PyTorch, in triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from kernels.row_cases import HEADS
from programs import program

from headwise.kernels.floats import product
from headwise.kernels.heads import heads
from headwise.kernels.rows import branch, gate, norm
from headwise.kernels.stored import Stored

BOUND = {"f32": 2e-6, "f16": 1e-3}
STORED = {"f16": 1e-3, "fp8": 2e-3, "q8_0": 1e-3, "q4_0": 3e-3}  # a value at the border of two steps may go either way


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    return program("kernels.row_cases", interpret=True)[0]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("case", HEADS, ids=lambda c: c[0])
def test_heads_are_normed_rotated_and_stored(case: tuple[object, ...], dtype: str, results: dict[str, dict[str, float]]) -> None:
    """A pair rotated with the wrong partner, a slot past the ring's end, a block that takes another block's scale."""
    found = results[f"{case[0]} {dtype}"]

    assert found["q"] < BOUND[dtype]
    assert found.get("tables", 0.0) < 1e-6
    assert all(found[name] < STORED[str(case[-1])] for name in ("k", "v") if name in found), found
    assert all(n == 0 for name, n in found.items() if name.endswith("elsewhere"))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_norms_residuals_and_gates(dtype: str, results: dict[str, dict[str, float]]) -> None:
    for name, error in results[f"rows {dtype}"].items():
        assert error < BOUND[dtype], name


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_a_product_of_one_row_is_the_product(dtype: str, results: dict[str, dict[str, float]]) -> None:
    """Rows and columns past the end, a gate that meets another row's up, tiles of the next rows taken for these."""
    assert len(results[f"products {dtype}"]) == 15
    for name, error in results[f"products {dtype}"].items():
        assert error < BOUND[dtype], name


def test_a_gate_leaves_the_integers_of_its_result(results: dict[str, dict[str, float]]) -> None:
    """A group that takes its neighbour's scale, or a byte another's place."""
    for name, error in results["integers"].items():
        assert error < 1e-4, name


def test_misuse_is_refused_before_a_launch() -> None:
    x = torch.zeros(2, 100)
    with pytest.raises(ValueError, match="alike, contiguous"):
        norm(x, None, torch.zeros(2, 99), 1e-6)
    with pytest.raises(ValueError, match="alike, contiguous"):
        branch(x.t(), None, x.t(), None, x, 1e-6)
    with pytest.raises(ValueError, match="gate: relu"):
        gate(x, x, "relu")
    with pytest.raises(ValueError, match=r"2 planes .* in 40 torch.int32, not 160"):
        gate(torch.zeros(2, 128), torch.zeros(2, 128), "silu", torch.zeros(40, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"one type, \(8, 100\), contiguous"):
        product(x[0], torch.zeros(4, 100), torch.zeros(4), act="silu")
    with pytest.raises(ValueError, match="product: relu"):
        product(x[0], torch.zeros(8, 100), torch.zeros(4), act="relu")
    with pytest.raises(ValueError, match=r"times \(5,\) for \(4,\)"):
        product(x[0], torch.zeros(4, 100), torch.zeros(4), act="silu", times=torch.zeros(5))
    at = torch.zeros(1, dtype=torch.int32)
    rest = {"pairs": 0, "cos_TP": None, "sin_TP": None, "q_norm": None, "k_norm": None, "v_norm": False, "eps": 1e-6}
    cache = Stored(torch.zeros(8, 1, 96))
    with pytest.raises(ValueError, match="96 values a head"):
        heads(torch.zeros(1, 3 * 96), torch.zeros(1, 1, 96), cache, cache, at, head_dim=96, **rest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for 3 heads of 1 tokens"):
        heads(torch.zeros(1, 4 * 64), torch.zeros(1, 1, 64), cache, cache, at, head_dim=64, **rest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="608 values a query"):
        heads(torch.zeros(1, 2 * 512), torch.zeros(1, 1, 608), cache, None, at, head_dim=512, **rest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="80 rotated pairs"):
        heads(torch.zeros(1, 3 * 64), torch.zeros(1, 1, 64), cache, cache, at, head_dim=64, **(rest | {"pairs": 80}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"torch.int64.*not int32 \(1,\)"):
        heads(torch.zeros(1, 3 * 64), torch.zeros(1, 1, 64), cache, cache, at.long(), head_dim=64, **rest)  # type: ignore[arg-type]
