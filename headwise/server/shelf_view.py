"""`headwise list` and `headwise ps`: the models on disk, and those that a server has loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from headwise.planner.render import gib
from headwise.spec.shelf import Held

_SOURCES = {"named": "named", "embedded": "embedded", "ollama": "Ollama's store", "hub": "Hub cache"}


def shelf_json(models: Iterable[Held]) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": m.name,
                "source": m.origin,
                "bytes": m.n_bytes,
                "path": None if m.path is None else str(m.path),
                "problem": m.problem,
            }
            for m in models
        ]
    }


def shelf_view(models: Iterable[Held]) -> RenderableType:
    table = _table("name", "size", "source", "")
    for m in models:
        table.add_row(Text(m.name), gib(m.n_bytes), _SOURCES[m.origin], Text(m.problem or "", style="yellow"))
    return table


def ps_view(models: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Of `/api/ps`: planned memory, where it lies, context, requests, and when the model goes."""
    table = _table("name", "planned", "on", "context", "requests", "until")
    for m in models:
        on = "GPU" if m.get("size_vram") else "CPU"
        table.add_row(
            Text(str(m["name"])), gib(int(m.get("size", 0))), on, str(m.get("context_length", "")), str(m.get("requests", "")),
            _until(str(m.get("expires_at", ""))),
        )  # fmt: skip
    return table if table.row_count else "no model is loaded; a request loads one"


def _until(expires: str) -> str:
    try:
        at = datetime.fromisoformat(expires)
    except ValueError:
        return ""
    if at.year == 9999:
        return "no end"
    left = (at - datetime.now(UTC)).total_seconds()
    return f"in {max(0, round(left))} s" if left < 120 else f"in {round(left / 60)} min"


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, justify="right" if head in ("size", "planned", "context", "requests") else "left", overflow="fold")
    return table
