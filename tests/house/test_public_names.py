"""The names a program may rely on: written out, loaded lazily, documented, and shadowed by nothing."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwise

ROOT = Path(__file__).parents[2]


def test_the_public_names_are_these() -> None:
    """Adding one is a decision, and so is losing one."""
    assert headwise.__all__ == ["LLM", "plan", "read_model"]


@pytest.mark.parametrize("name", headwise.__all__)
def test_a_public_name_loads_and_says_what_it_does(name: str) -> None:
    thing = getattr(headwise, name)

    assert callable(thing)
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("method", ["generate", "stream", "tokenize", "logits"])
def test_the_model_has_its_four_methods(method: str) -> None:
    thing = getattr(headwise.LLM, method)

    assert inspect.getdoc(thing)


def test_the_keyword_arguments_of_the_api_stay() -> None:
    """A renamed keyword breaks callers as surely as a renamed function."""
    assert {"context", "kv", "device", "dtype"} <= set(inspect.signature(headwise.LLM).parameters)
    assert {"context", "kv", "kv_global", "kv_sliding", "slots", "ubatch", "weights", "gpus"} <= set(
        inspect.signature(headwise.plan).parameters
    )
    assert list(inspect.signature(headwise.LLM.logits).parameters)[1:3] == ["token_ids", "chunk"]


def test_no_module_bears_the_name_of_a_function() -> None:
    """`import headwise.plan` would put a module where `headwise.plan` was a function."""
    modules = {p.stem for p in (ROOT / "headwise").iterdir() if p.suffix == ".py" or p.is_dir()}

    assert modules.isdisjoint(headwise.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'diagnoze'"):
        _ = headwise.diagnoze  # type: ignore[attr-defined]


def test_importing_headwise_loads_none_of_its_rooms() -> None:
    code = "import sys, headwise; print(sorted(m for m in sys.modules if m.startswith('headwise.') or m == 'torch'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert done.stdout.strip() == "[]", done.stderr


def test_the_readme_shows_every_public_name() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]

    for name in (*headwise.__all__, "generate", "stream", "tokenize", "logits"):
        assert re.search(rf"\.{name}\(", code), name
