"""Every error a user can meet: what happened, why, and what to do about it.

    HeadwiseError
    ├── UsageError      the command line or an argument makes no sense       exit 2
    ├── SpecError       a model file, config or store cannot be read         exit 2
    ├── PlanError       the plan does not fit, or its arithmetic is refused  exit 1
    ├── BackendError    a layer has no fused backend, or one is wrong        exit 1
    └── ProbeError      a machine or a server did not answer as expected     exit 1

A caller's bug (a wrong type, a negative count inside the library) is a plain ValueError, never one of these.
"""

from __future__ import annotations

from collections.abc import Iterable


class HeadwiseError(Exception):
    """What (one line), why (the numbers), do (a command or setting to paste; computed, not guessed)."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.do = what, why, do

    @property
    def parts(self) -> tuple[str, str, str]:
        """What, why, do: as it travels between processes."""
        return self.what, self.why, self.do

    @property
    def sentence(self) -> str:
        """For where there is one line."""
        return sentence(self.parts)

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "why": self.why, "do": self.do}

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.do:
            lines.append(f"  do:  {self.do}")
        return "\n".join(lines)


def sentence(parts: Iterable[str]) -> str:
    """The parts of an error that there are, in one line."""
    return ". ".join(part for part in parts if part)


class UsageError(HeadwiseError):
    exit_code = 2


class SpecError(HeadwiseError):
    exit_code = 2


class PlanError(HeadwiseError):
    exit_code = 1


class BackendError(HeadwiseError):
    exit_code = 1


class ProbeError(HeadwiseError):
    exit_code = 1
