"""docs/json.md promises keys to other programs: its commands run here, and print those keys and no others."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from headwise.cli import main

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
from make_json import command, cut, sections  # noqa: E402

sys.path.pop(0)
SECTIONS = sections((DOCS / "json.md").read_text(encoding="utf-8"))
RUN = {title: argv for title, body in SECTIONS.items() if (argv := command(body))}
SAME_EVERYWHERE = (
    "plan",
    "plan for another engine",
    "plan without a model",
    "explain",
    "explain for another engine",
    "llama-flags",
    "ollama-env",
    "vllm-args",
    "codex-config",
)


def promised(title: str) -> set[str]:
    rows = re.findall(r"^\| (`.+?) \|", SECTIONS[title], re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def printed(value: Any, path: str = "") -> Iterator[str]:
    """The keys of `value`, `[]` for a list's elements; an empty list, or one without objects, is a leaf."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from printed(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for inner in value:
            yield from printed(inner, f"{path}[]") if inner is not None else ()
    else:
        yield path


def example(title: str) -> Any:
    return json.loads(SECTIONS[title].split("```json\n")[1].split("```")[0])


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("title", RUN)
def test_a_command_prints_the_promised_keys(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A key renamed in the code breaks other people's programs; a key that is not on the page helps nobody."""
    main(RUN[title])
    answer = json.loads(capsys.readouterr().out)
    leaves = set(printed(answer))
    leaves = {x for x in leaves if not any(y.startswith(f"{x}[]") for y in leaves)}  # a list that is empty here and not there
    shown = set(printed(example(title)))

    assert leaves == promised(title)
    assert {x for x in shown if not any(y.startswith(f"{x}[]") for y in leaves)} <= leaves
    if title in SAME_EVERYWHERE:
        assert cut(answer) == example(title), "python docs/make_json.py"


def test_a_comparison_with_a_server_prints_the_promised_keys() -> None:
    from headwise.engine.against import Comparison

    whole = {"model", "engine", "version", "agrees"}
    each = {f"prompts[].{f.name}" for f in fields(Comparison)} | {"prompts[].agrees"}
    assert promised("verify against a server") == whole | each


def test_every_verb_is_on_the_page() -> None:
    from headwise.cli import _VERBS

    # they need a card, a server, an end, a network; a script is no object
    there = set(_VERBS) - {"bench", "probe", "serve", "pull", "ps", "stop", "completion"}
    assert {argv[0] for argv in RUN.values()} == there
    page = (DOCS / "json.md").read_text()
    assert all(f"`{key}`" in page for key in ("matrix_tflops", "read_tb_s", "rows[].who", "rows[].fraction"))
