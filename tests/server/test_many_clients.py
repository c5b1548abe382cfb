"""A small share of the load that `benchmarks/serve_load.py` puts on a server, on every change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are found in /proc")
def test_a_few_clients_and_a_killed_engine_leave_nothing_behind(tmp_path: Path) -> None:
    """Every request ends, answers are those of a quiet server, and all pages and slots are given back."""
    for package in ("uvicorn", "starlette", "llguidance"):
        pytest.importorskip(package)
    out = tmp_path / "out.json"
    words = [sys.executable, str(ROOT / "benchmarks/serve_load.py"), "--requests", "6", "--seconds", "3", "--kills", "1", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["violations"] == []
    assert sum(seen.get("answered", 0) for seen in found["outcomes"].values()) > 0
    assert (found["quiet"]["engine_restarts_total"], found["quiet"]["pages_lost"], found["quiet"]["slots_used"]) == (1, 0, 0)
