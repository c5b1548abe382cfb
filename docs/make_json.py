"""Writes the examples of docs/json.md: every command of the page runs, and its output is put below its table.

python docs/make_json.py
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "json.md"
LONGEST = 12  # numbers in a list that is shown whole
SECTION = re.compile(r"^## (?P<title>.+?)\n(?P<body>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"```console\n(.+?)\n```")
EXAMPLE = re.compile(r"<!-- example -->\n(?:\n```json\n.*?\n```\n)?", re.DOTALL)


def sections(page: str) -> dict[str, str]:
    return {m["title"]: m["body"] for m in SECTION.finditer(page)}


def command(body: str) -> list[str] | None:
    """The arguments of a section's command."""
    found = COMMAND.search(body)
    return shlex.split(found[1])[1:] if found else None


def run(argv: list[str]) -> Any:
    return json.loads(subprocess.run([sys.executable, "-m", "headwise", *argv], stdout=subprocess.PIPE, text=True).stdout)


def cut(value: Any) -> Any:
    """Long lists cut to their beginning; of a list of objects two are shown."""
    if isinstance(value, dict):
        return {k: cut(v) for k, v in value.items()}
    if isinstance(value, list):
        return [cut(v) for v in value[: 2 if any(isinstance(v, dict) for v in value) else LONGEST]]
    return value


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for body in sections(page).values():
        if argv := command(body):
            shown = json.dumps(cut(run(argv)), indent=1, ensure_ascii=False)
            shown = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", shown)  # numbers on one line
            written = EXAMPLE.sub(lambda _, s=shown: f"<!-- example -->\n\n```json\n{s}\n```\n", body)
            page = page.replace(body, written)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
