"""What every result says of itself."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(checkout: Path | None = None) -> str:
    """The commit of a checkout, default the one that the script runs in."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
