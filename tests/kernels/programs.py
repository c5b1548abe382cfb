"""Programs of these tests that need a process of their own: triton's interpreter, or a driver that stands in for a card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def programs(name: str, *, parts: int = 0, interpret: bool = False) -> list[str]:
    """What `kernels.NAME` prints: once; or of each of its parts, told which of how many, which run at once."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", f"kernels.{name}", *part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for part in ([[str(i), str(parts)] for i in range(parts)] or [[]])
    ]
    out = []
    for run in runs:
        printed, said = run.communicate(timeout=600)
        assert run.returncode == 0, said[-3000:]
        out.append(printed)
    return out
