"""Products with quantised matrices against fp64 over the gguf package's values, in triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.quant_cases import BLOCK, BLOCK_BYTES, random_blocks, run_all

TYPES = tuple(BLOCK)
LIMIT = {"f32": 2e-5, "f16": 1e-3}
VECTOR = [  # T, N, units between whole blocks, config: rows, units, warps, splits, ahead
    (1, 7, 24, {"rows": 4, "units": 8, "warps": 1}),
    (2, 13, 24, {"rows": 8, "units": 16, "warps": 2, "splits": 2}),
    (1, 5, 40, {"rows": 4, "units": 8, "warps": 1, "splits": 4, "ahead": False}),
]
MATRIX = [
    (3, 17, 24, {"rows": 16, "units": 8, "warps": 2, "matrix": True}),
    (8, 33, 40, {"rows": 32, "units": 16, "warps": 2, "splits": 2, "matrix": True}),
    (16, 20, 16, {"rows": 16, "units": 4, "warps": 1, "splits": 2, "matrix": True}),
    (1, 9, 8, {"rows": 16, "units": 8, "warps": 1, "matrix": True}),
]


def cases() -> list[dict[str, Any]]:
    out = []
    for i, name in enumerate(TYPES):
        for k, (T, N, units, config) in enumerate((*VECTOR, *MATRIX)):
            values = 16 if name == "q8_0" else 32
            K = units * values + (32 if BLOCK[name] == 32 and k % 2 else 0)  # an odd number of blocks masks the last step
            out.append({"type": name, "T": T, "N": N, "K": K, "dtype": ("f32", "f16")[(i + k) % 2], "config": config})
    return out


CASES = cases()


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        halves = [*pool.map(run_all, (CASES[::2], CASES[1::2]))]
    return [halves[i % 2][i // 2] for i in range(len(CASES))]


@pytest.mark.parametrize(
    "i", range(len(CASES)), ids=lambda i: f"{CASES[i]['type']}-{CASES[i]['T']}x{CASES[i]['N']}x{CASES[i]['K']}"
)
def test_a_product_with_a_quantised_matrix_is_the_product_with_its_values(i: int, results: list[dict[str, Any]]) -> None:
    """A field read from the wrong place, a row or block past the end, a partial sum lost or added twice."""
    assert results[i]["error"] < LIMIT[CASES[i]["dtype"]], (CASES[i], results[i])


def test_a_split_launch_leaves_its_counters_at_zero(results: list[dict[str, Any]]) -> None:
    """The next launch would take a partial sum for the whole."""
    assert {r["done"] for r in results} == {0}


@pytest.mark.parametrize("name", TYPES)
def test_planes_hold_exactly_the_bytes_of_the_blocks(name: str) -> None:
    """Planned bytes are allocated bytes only if re-tiling keeps their number."""
    from headwise.kernels.tiled import plane_bytes
    from headwise.weights.retile import empty, retile

    K = 3 * 256
    stack = empty(name, (2, 5, K), "cpu")
    retile(random_blocks(name, 10, K).view(2, 5, -1), name, stack)

    assert sum(plane_bytes(name, K)) == K // BLOCK[name] * BLOCK_BYTES[name]
    assert stack.low.untyped_storage().nbytes() == 10 * K // BLOCK[name] * BLOCK_BYTES[name]
    assert stack.rows == 5


def wrong(name: str) -> tuple[dict[str, Any], str]:
    from headwise.kernels.matvec import Config
    from headwise.weights.retile import empty

    two = Config(16, 8, 4, 2)
    return {
        "rows": ({"x_TK": torch.zeros(17, 256), "out_TN": torch.zeros(17, 8)}, "17 rows of activations not in 1 to 16"),
        "K": ({"x_TK": torch.zeros(1, 512)}, "(1, 512) by a matrix of (8, 256)"),
        "N": ({"out_TN": torch.zeros(1, 9)}, "(8, 256) into (1, 9)"),
        "stride": ({"x_TK": torch.zeros(256, 2).t(), "out_TN": torch.zeros(2, 8)}, "strides (1, 2) and (8, 1)"),
        "dtype": ({"x_TK": torch.zeros(1, 256, dtype=torch.float64)}, "torch.float64 not in"),
        "planes": ({"w": empty("q4_k", (8, 512), "cpu")._replace(K=256, low=torch.zeros(8, 512, dtype=torch.uint8)[:, ::2])},
                   "planes of strides (512, 2)"),
        "vector": ({"x_TK": torch.zeros(3, 256), "out_TN": torch.zeros(3, 8), "config": Config(16, 8, 4)},
                   "3 rows of activations, at most 2"),
        "scratch": ({"config": two, "scratch": torch.zeros(5)}, "2 splits need scratch of 16 fp32 values"),
        "done": ({"config": two, "scratch": torch.zeros(16)}, "2 splits need 1 int32 zeros, got None"),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["rows", "K", "N", "stride", "dtype", "planes", "vector", "scratch", "done"])
def test_misuse_is_refused_before_launch_with_both_numbers(name: str) -> None:
    from headwise.kernels.matvec import matvec
    from headwise.weights.retile import empty

    changes, message = wrong(name)
    a = {"x_TK": torch.zeros(1, 256), "w": empty("q4_k", (8, 256), "cpu"), "out_TN": torch.zeros(1, 8)} | changes
    with pytest.raises(ValueError, match="matvec") as caught:
        matvec(**a)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parents[1]), str(here.parent)))}
    env.pop("TRITON_INTERPRET", None)
    runs = [
        subprocess.Popen(
            [sys.executable, str(here / "compile_matvec.py"), str(part)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=env,
        )
        for part in range(2)
    ]  # fmt: skip
    out = []
    for run in runs:
        printed, said = run.communicate(timeout=300)
        assert run.returncode == 0, said[-3000:]
        out += [json.loads(line) for line in printed.splitlines()]
    return out


def test_no_launch_spills_or_wants_more_shared_memory_than_its_card_has(compiled: list[dict[str, Any]]) -> None:
    assert {r["type"] for r in compiled} == set(TYPES)
    assert not [r for r in compiled if r["spill_bytes"] >= 64 or r["shared_bytes"] > r["shared_limit"]]


def test_words_are_loaded_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """A change of layout would read them one by one, at a fraction of the speed, with the same result."""
    assert not [r for r in compiled if not r["wide"]]
