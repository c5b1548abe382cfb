"""The floor plan of ARCHITECTURE.md, enforced: a room imports only rooms above it, and some never touch torch."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "headwise").rglob("*.py"))
ROOMS = (
    "errors hardware spec planner text kernels cache attention weights api doctor advice model engine bench integrations server "
    "options arguments cli"
).split()
TORCH_FREE = (
    "__init__", "__main__", "errors", "hardware.", "spec.", "planner.", "text.", "attention.capability", "attention.choose",
    "attention.engines", "attention.render", "attention.docs", "kernels.configs", "weights.names", "weights.listing", "api",
    "doctor.", "advice.", "engine.request", "engine.schedule", "engine.process", "engine.rates", "engine.worker", "server.",
    "options", "arguments", "cli",
)  # fmt: skip
HEAVY = {"torch", "triton", "transformers"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "headwise").with_suffix("").parts)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Every module that `source` names in an import, lazy ones too: no hidden stairs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                yield node.lineno, "." * node.level + base
            elif base == "headwise":
                yield from ((node.lineno, f"headwise.{a.name}") for a in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def faults(name: str, source: str) -> list[str]:
    """What module `name` may not import and does. The front door (`__init__`, `__main__`) stands before every room."""
    room, found = name.split(".")[0], []
    for line, target in imported(source):
        top, _, rest = target.partition(".")
        if target.startswith("."):
            found.append(f"{name}:{line} imports {target}, which hides the room")
        elif top == "headwise" and rest not in ("", "__version__") and room in ROOMS:
            if ROOMS.index(rest.split(".")[0]) > ROOMS.index(room):
                found.append(f"{name}:{line} imports {target}")
        elif top in HEAVY and name.startswith(TORCH_FREE):
            found.append(f"{name}:{line} must stay free of {top}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """A planner that imports the engine cannot plan on a laptop without torch."""
    assert name_of(path).split(".")[0] in {*ROOMS, "__init__", "__main__"}
    assert faults(name_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("planner.memory", "from headwise.engine.llm import LLM"),
        ("planner.memory", "from headwise import cli"),
        ("spec.read", "def f():\n    import headwise.cache.storage"),
        ("cache.storage", "import importlib\nimportlib.import_module('headwise.attention.choose')"),
        ("attention.choose", "import torch.nn"),
        ("api", "def f():\n    from torch import Tensor"),
        ("model.mlp", "from .decoder import Decoder"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    """A check that cannot fail guards nothing."""
    assert len(faults(name, source)) == 1


def test_a_right_import_is_let_through() -> None:
    assert faults("model.mlp", "import torch\nfrom headwise.model.linear import product\nfrom headwise.spec import kv") == []
    assert faults("attention.torch_fused", "import torch\nfrom headwise import __version__") == []


def test_every_torch_free_entry_names_something() -> None:
    names = [name_of(path) for path in FILES]
    for entry in TORCH_FREE:
        assert any(n.startswith(entry) for n in names), entry


def test_the_architecture_lists_the_rooms_in_this_order() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## The floor plan")[1].split("\n## ")[0]

    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == ROOMS


def test_importing_a_torch_free_module_imports_no_torch() -> None:
    """What the source says is one thing, what Python loads another: an import of an import counts too."""
    names = [
        f"headwise.{name_of(p)}" for p in FILES if name_of(p).startswith(TORCH_FREE) and p.stem not in ("__init__", "__main__")
    ]
    if importlib.util.find_spec("starlette") is None:  # the extra `serve`
        for name in ("app", "openapi", "slow"):
            names.remove(f"headwise.server.{name}")
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_no_room_is_a_dumping_ground() -> None:
    for path in FILES:
        assert path.stem not in {"utils", "common", "helpers", "misc"}, path
