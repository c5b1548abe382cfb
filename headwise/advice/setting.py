"""Advice as data: settings with their reasons, blocks to paste, and what the planner says of them."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.planner.memory import Target
from headwise.planner.versions import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as its engine spells it; `value` None leaves it unset on purpose."""

    name: str
    value: str | None
    reason: str
    source: str  # whose rule it is: upstream, or our planner

    @property
    def is_variable(self) -> bool:
        """A variable of the environment, not a flag or a key."""
        return self.name.isupper()


@dataclass(frozen=True, slots=True)
class Block:
    """A text to paste, whole."""

    title: str  # what it is and where it goes
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one device holds under these settings, by the planner of that engine."""

    target: Target
    usable_bytes: int
    planned_bytes: int
    layers: tuple[int, ...]  # empty where every card holds a part of every layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The settings of one engine for one model."""

    engine: Engine | str
    version: str
    model: str
    weights: str | None  # the type that was counted; None where no weights were
    context: int  # tokens of one sequence
    kv: str | None
    total_bytes: int | None
    cards: tuple[Card, ...]
    settings: tuple[Setting, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    def value(self, name: str) -> str | None:
        """The value of the setting `name`; None where it is unset or not there."""
        return next((s.value for s in self.settings if s.name == name), None)

    def to_json(self) -> dict[str, object]:
        keys = ("engine", "version", "model", "weights", "context", "kv", "total_bytes")
        return {key: getattr(self, key) for key in keys} | {
            "gpus": [
                {
                    "name": c.target.name if c.target.gpu is None else c.target.gpu.name,
                    "usable_bytes": c.usable_bytes,
                    "planned_bytes": c.planned_bytes,
                    "layers": list(c.layers),
                }
                for c in self.cards
            ],
            "settings": [{"name": s.name, "value": s.value, "reason": s.reason, "source": s.source} for s in self.settings],
            "blocks": [{"title": b.title, "text": b.text} for b in self.blocks],
            "notes": list(self.notes),
        }


def text(advice: Advice) -> str:
    """The blocks to paste, then one line a setting with its reason."""
    parts = [f"# {b.title}\n{b.text.rstrip()}\n" for b in advice.blocks]
    lines = []
    for s in advice.settings:
        shown = "left unset" if s.value is None else s.value
        lines.append(f"{s.name} {shown}: {s.reason} [{s.source}]")
    lines += [f"note: {note}" for note in advice.notes]
    return "\n".join(parts) + "\n" + "\n".join(lines)
