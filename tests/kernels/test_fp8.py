"""Products with e4m3 and what is around them against fp64, in triton's interpreter; and compiled for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import program

from headwise.kernels.fp8 import TOLERANCE, Config, config_for, one_row, product
from headwise.kernels.fp8_rows import expand, quantise
from headwise.kernels.split import H200

DTYPES = {"f32": torch.float32, "f16": torch.float16}
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    return program("kernels.fp8_cases", interpret=True)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_meets_every_weight_under_its_own_scale(dtype: str, results: dict[str, dict[str, float]]) -> None:
    """Rows and columns past the end, a block that takes its neighbour's scale, a gate that meets another row's up."""
    found = results[f"row {dtype}"]
    assert len(found) == 18
    for name, error in found.items():
        assert error < TOLERANCE[DTYPES[dtype]], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_several_rows_shared_out_or_not(dtype: str, results: dict[str, dict[str, float]]) -> None:
    """A partial sum left out, K's last block beyond its share, a value written beside `out`, a counter left standing."""
    found = results[f"rows {dtype}"]
    assert len(found) == 12
    for name, error in found.items():
        assert error < (1 if name.endswith("beside") else TOLERANCE[DTYPES[dtype]]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_as_pytorch_rounds_them(dtype: str, results: dict[str, dict[str, float]]) -> None:
    """A value / 448 times its scale in the activations' type: rounded twice."""
    found = results[f"converted {dtype}"]
    assert len(found) == 8
    for name, error in found.items():
        assert error < (1e-6 if name.startswith("scales") else 1e-4 if name.startswith("quantise") else 1), name


@pytest.mark.parametrize("T", [2, 9, 32, 64])
@pytest.mark.parametrize(("N", "K"), [(5376, 21504), (43008, 5376), (96, 100), (262144, 5376)])
def test_every_program_of_a_launch_has_work(T: int, N: int, K: int) -> None:
    """A share that begins past K would add nothing, and its programs wait for memory all the same."""
    c = config_for(T, N, K, H200)
    steps = -(-K // 128)
    assert (c.splits - 1) * -(-steps // c.splits) < steps


def test_misuse_is_refused_before_a_launch() -> None:
    w, s, y = torch.zeros(8, 256).to(E4M3), torch.zeros(8, 1), torch.zeros(1, 8)
    x = torch.zeros(1, 256)
    with pytest.raises(ValueError, match=r"\(1, 256\) by torch.float32"):
        one_row(x, w.float(), s, y)
    with pytest.raises(ValueError, match=r"fp32, \(8, 1\) or \(8, 2\)"):
        one_row(x, w, torch.zeros(8, 3), y)
    with pytest.raises(ValueError, match=r"bytes \(16, 256\)"):
        one_row(x, w, s, y, act="silu")
    with pytest.raises(ValueError, match="fp8: relu"):
        one_row(x, w, s, y[:, :4], act="relu")
    with pytest.raises(ValueError, match=r"times \(1, 5\)"):
        one_row(x, w, s, y, act="silu", times=torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"\(65, 256\)"):
        product(x.expand(65, -1), w, s, torch.zeros(65, 8), config=Config())
    with pytest.raises(ValueError, match=r"into torch\.float16"):
        product(x.expand(2, -1), w, s, torch.zeros(2, 8, dtype=torch.float16), config=Config())
    with pytest.raises(ValueError, match="scratch of 32 fp32"):
        product(x.expand(2, -1), w, s, torch.zeros(2, 8), config=Config(splits=2))
    with pytest.raises(ValueError, match="need 1 int32"):
        product(x.expand(2, -1), w, s, torch.zeros(2, 8), scratch=torch.zeros(32), config=Config(splits=2))
    with pytest.raises(ValueError, match=r"expand: bytes \(8, 256\)"):
        expand(w, s, torch.zeros(8, 255))
    with pytest.raises(ValueError, match=r"into torch.float8_e4m3fn \(8, 256\)"):
        quantise(x, w, torch.zeros(8))


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_fp8")


def test_no_launch_spills_or_wants_more_shared_memory_than_its_card_has(compiled: list[dict[str, Any]]) -> None:
    assert {r["card"] for r in compiled} == {80, 86, 89, 90}
    assert not [r for r in compiled if r["spill_bytes"] >= 64 or r["shared_bytes"] > r["shared_limit"]]


def test_weights_are_read_wide_or_ahead_and_converted_by_the_card_where_it_can(compiled: list[dict[str, Any]]) -> None:
    """Byte by byte, a matrix takes many times as long, with the same result."""
    for r in compiled:
        several = r["kernel"].startswith("rows")
        assert r["copies_ahead" if several else "wide_loads"], r
        assert r["matrix_unit"] == several, r
        assert r["instruction"] == (r["card"] >= 89 and r["kernel"] != "quantise"), r
