"""A file's quantised matrices re-tiled at load and multiplied as they are, in triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import write_gguf
from programs import program

from headwise.kernels.tiled import LAYOUTS
from headwise.planner.residence import PLANE_TYPES, ROWS_TOGETHER


@pytest.mark.parametrize(("family", "quant"), [("gemma4-31b", "q5_0"), ("llama", "q4_0")])
def test_a_loaded_file_multiplies_as_its_values_do(family: str, quant: str, tmp_path: Path) -> None:
    """Rows that were stored in pairs (llama), members of a group, rows of the last tile."""
    path = tmp_path / "m.gguf"
    write_gguf(family, path, quant=quant)
    found = program("model.planes_case", path, interpret=True)[0]

    assert found.pop("planes") > 4
    assert found.pop("counters") == 0
    for case, error in found.items():
        assert error < 1e-3, case


def test_the_planner_knows_what_the_kernels_take() -> None:
    from headwise.kernels.tiled import EIGHT

    assert set(LAYOUTS) == PLANE_TYPES and EIGHT == ROWS_TOGETHER
