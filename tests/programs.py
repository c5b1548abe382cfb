"""Programs of these tests that need a process of their own: triton's interpreter, or a driver that stands in for a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def program(name: str, *words: object, interpret: bool = False, given: Iterable[Any] = ()) -> list[Any]:
    """The JSON lines that module `name` prints, told `words`, and `given` in JSON lines as its standard input."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", *(["interpreter"] if interpret else []), name, *map(str, words)]
    lines = "\n".join(map(json.dumps, given))
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
