"""What is wrong, said so that it can be checked and cured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True, slots=True)
class Evidence:
    source: str  # a file, "standard input", or a request
    line: int | None  # of the file, from 1; None where there are no lines
    text: str

    def to_json(self) -> dict[str, object]:
        return {"source": self.source, "line": self.line, "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`id` is stable; `cure` is a command or setting to paste, or "" where there is nothing to do."""

    id: str
    severity: Severity
    what: str
    why: str
    cure: str = ""
    evidence: tuple[Evidence, ...] = ()
    sure: Literal["proven", "likely", "possible"] = "proven"

    def to_json(self) -> dict[str, object]:
        keys = ("id", "severity", "what", "why", "cure", "sure")
        out: dict[str, object] = {key: getattr(self, key) for key in keys}
        return out | {"evidence": [e.to_json() for e in self.evidence]}


def worst_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Problems, then warnings, then notes; each in the order they were found."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))
