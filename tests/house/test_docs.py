"""The docs say what is: links lead somewhere, generated parts are current, nothing speaks of one machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import headwise
from headwise.attention.docs import markdown
from headwise.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tools").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_backends_page_is_current() -> None:
    assert (ROOT / "docs/backends.md").read_text() == markdown()


def test_the_readme_table_is_what_the_planner_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_pictures import table
    finally:
        sys.path.pop(0)
    shown = (ROOT / "README.md").read_text().split("<!-- table -->\n")[1].split("<!-- end table -->")[0]

    assert shown == table() == (ROOT / "docs/gemma4-table.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/quickstart.md"], ids=lambda p: p.name)
def test_every_command_shown_parses(page: Path) -> None:
    """A flag that was renamed stays in the README for years."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    commands = [shlex.split(line, comments=True) for b in blocks for line in b.splitlines() if line.startswith("headwise ")]
    for words in commands:
        _parser().parse_args(words[1:])


def test_the_readmes_python_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)

    assert done.returncode == 0, done.stderr


def test_one_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == headwise.__version__


def test_tracked_text_names_no_machine() -> None:
    """An absolute path of one machine helps nobody."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".sh", ".json", ".txt", ".jinja"} and path.exists():
            assert not re.search(r"(?<![\w.])/(work|root|home/(?!me/)\w+)/", path.read_text(errors="replace")), name
