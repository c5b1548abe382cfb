"""A file's quantised matrices re-tiled at load and multiplied as they are, in triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import write_gguf

from headwise.kernels.tiled import LAYOUTS
from headwise.planner.residence import PLANE_TYPES, ROWS_TOGETHER


@pytest.mark.parametrize(("family", "quant"), [("gemma4-31b", "q5_0"), ("llama", "q4_0")])
def test_a_loaded_file_multiplies_as_its_values_do(family: str, quant: str, tmp_path: Path) -> None:
    """Rows that were stored in pairs (llama), members of a group, rows of the last tile."""
    path = tmp_path / "m.gguf"
    write_gguf(family, path, quant=quant)
    root = Path(__file__).parents[2]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    command = [sys.executable, "-m", "model.planes_case", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    assert found.pop("planes") > 4
    assert found.pop("counters") == 0
    for case, error in found.items():
        assert error < 1e-3, case


def test_the_planner_knows_what_the_kernels_take() -> None:
    from headwise.kernels.tiled import EIGHT

    assert set(LAYOUTS) == PLANE_TYPES and EIGHT == ROWS_TOGETHER
