"""What every result says of itself."""

from __future__ import annotations

import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def commit(checkout: Path | None = None) -> str:
    """The commit of a checkout, default the one that the script runs in."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()


def card(*packages: str) -> dict[str, Any]:
    """Of a result taken on a GPU: which one ("cpu" where there is none), when, of which commit, and the versions of PyTorch and of
    `packages`."""
    versions = {name.replace("-", "_"): version(name) for name in packages}
    when = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"gpu": name, "torch": torch.__version__, **versions, **when}
