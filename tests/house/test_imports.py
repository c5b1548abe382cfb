"""The floor plan of ARCHITECTURE.md, enforced: a room imports only rooms above it, and some never touch torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "headwise").rglob("*.py"))
ROOMS = [
    "__init__", "errors", "hardware", "spec", "planner", "text", "cache", "attention", "weights", "api", "model", "engine",
    "cli", "__main__",
]  # fmt: skip
TORCH_FREE = (
    "errors", "hardware.", "spec.", "planner.", "text.", "attention.capability", "attention.choose", "attention.engines",
    "attention.render", "attention.docs", "weights.names", "weights.listing", "api", "cli", "__init__",
)  # fmt: skip
# The front door's lazy names, the decoder's arena in the adapters' callers: written beside the import they excuse.
ALLOWED = {("__init__", "api"), ("__init__", "engine")}


def imported(path: Path, name: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):  # lazy imports too: no hidden stairs
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            found += [(node.lineno, f"{base}.{a.name}" if base == "headwise" else base) for a in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """A planner that imports the engine cannot plan on a laptop without torch."""
    name = ".".join(path.relative_to(ROOT / "headwise").with_suffix("").parts)
    room = name.split(".")[0]
    for line, target in imported(path, name):
        top, _, rest = target.partition(".")
        if top == "headwise" and rest and rest.split(".")[0] not in ("__version__",):
            other = rest.split(".")[0]
            assert (room, other) in ALLOWED or ROOMS.index(other) <= ROOMS.index(room), f"{name}:{line} imports {target}"
        elif top in ("torch", "triton", "transformers"):
            assert not name.startswith(TORCH_FREE), f"{name}:{line} must stay free of {top}"


def test_no_room_is_a_dumping_ground() -> None:
    for path in FILES:
        assert path.stem not in {"utils", "common", "helpers", "misc"}, path
