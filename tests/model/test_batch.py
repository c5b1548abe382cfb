"""Sequences that share a step, with scattered pages, wrapped rings and drafts, say what each says alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((family, "operators") for family in ("gemma4-e2b", "gemma4-31b", "gpt-oss", "llama")),
        ("gemma4-e2b", "kernels"),
        ("gemma4-31b", "operators-v"),
        ("gemma4-31b", "kernels-v"),
    ],
)
def test_sequences_of_a_step_do_not_meet(family: str, mode: str, tmp_path: Path) -> None:
    """A row of one sequence that reads another's keys, position or ring answers fluently about another conversation."""
    root = Path(__file__).parents[2]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    command = [sys.executable, "-m", "model.batch_case", str(tmp_path), family, mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    most = 3e-2 if found.pop("dtype") else 2e-4

    assert len(found) == 9
    for case, error in found.items():
        assert error < most, (case, found)
