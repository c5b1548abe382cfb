"""Frames on the wire: server-sent events and lines of JSON."""

from __future__ import annotations

import json
from typing import Any

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
SSE_END = b"data: [DONE]\n\n"


def sse(data: Any, event: str | None = None) -> bytes:
    """One event; JSON has no line breaks, so one data line holds it."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + _json(data) + b"\n\n"


def line(data: Any) -> bytes:
    return _json(data) + b"\n"


def _json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
