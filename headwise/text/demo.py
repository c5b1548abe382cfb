"""The text that `headwise run` continues when no prompt is given: a real module of this Python's standard library.

`calendar.py` was kept out of tiny-hybrid's training data (tools/tiny_hybrid/README.md), so what follows is no recital.
"""

from __future__ import annotations

import calendar
import inspect

CHARACTERS = 18_000


def demo_prompt() -> str:
    """The head of calendar.py, cut after a `def` line, so that the model has a body to write."""
    source = inspect.getsource(calendar)[:CHARACTERS]
    lines = source.splitlines(keepends=True)[:-1]
    while lines and not lines[-1].lstrip().startswith("def "):
        lines.pop()
    return "".join(lines)
