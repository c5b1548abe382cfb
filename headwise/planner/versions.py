"""The versions of other people's engines: read, compared, and placed against what is known of them.

Ollama and vLLM count releases. llama.cpp counts builds (`b8609`) and is also known by the day it was built; its
features are placed on both lines, and between two known points the honest answer is "not known" (None).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from headwise.errors import UsageError

Engine = Literal["llama.cpp", "ollama", "vllm"]
Feature = Literal["head_512_cuda", "head_512_metal", "all_kv_pairs", "quantised_v_forces_fa"]

_ALIASES: Mapping[str, Engine] = {
    "llama.cpp": "llama.cpp",
    "llamacpp": "llama.cpp",
    "llama-cpp": "llama.cpp",
    "llama-server": "llama.cpp",
    "ollama": "ollama",
    "vllm": "vllm",
}
# The newest and the oldest version whose source was read; a version outside is served with a note.
NEWEST: Mapping[Engine, str] = {"llama.cpp": "2026-10-01", "ollama": "0.33.0-rc0", "vllm": "0.33.0"}
OLDEST: Mapping[Engine, str] = {"ollama": "0.5.7", "vllm": "0.19.0"}

_RELEASE = re.compile(
    r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?:[-.]?(dev|a|b|rc|ci|post)[-.]?(\d{0,6}))?(?:[+-][0-9A-Za-z.-]*)?",
    re.ASCII,
)
_BUILD = re.compile(r"b?(\d{3,7})(?:-[0-9a-f]{6,40})?", re.ASCII)
_DAY = re.compile(r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])", re.ASCII)
_COMMITS: Mapping[str, str] = {"0c1e57098": "2026-10-01"}  # of llama.cpp, and the day each was the newest
_STAGE = {"dev": 0, "a": 1, "b": 2, "ci": 3, "rc": 4, "": 5, "post": 6}


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where a llama.cpp feature lies: absent up to, present from; nothing is claimed between."""

    absent_build: int
    present_build: int | None  # None: no build number is known to have it
    absent_day: str
    present_day: str


_FEATURES: Mapping[Feature, _Placed] = {
    # PR #20998 = b8609, before Gemma 4's release of 2026-04-02
    "head_512_cuda": _Placed(8608, 8609, "2025-12-31", "2026-04-02"),
    # Ollama v0.20.4 (2026-04-07) back-ported it from upstream; b9452 is the first build it pinned after that
    "head_512_metal": _Placed(0, 9452, "", "2026-04-07"),
    # PR #28079, merged September 2026; b10488 was pinned in August
    "all_kv_pairs": _Placed(10488, None, "2026-08-31", "2026-10-01"),
    # PR #25871; described by #26553 of 2026-08-04; which builds carry it is not established
    "quantised_v_forces_fa": _Placed(0, None, "", "2026-10-01"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineVersion:
    """One version of one engine; `release`, `build` or `day` says where it lies, `notes` what was assumed."""

    engine: Engine
    text: str
    release: tuple[int, int, int] = (0, 0, 0)  # ollama, vllm
    stage: tuple[int, int] = (5, 0)  # pre-releases sort before their release
    build: int | None = None  # llama.cpp
    day: str | None = None  # llama.cpp
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.engine} {self.text}"

    def at_least(self, *release: int) -> bool:
        """Whether a release carries what `release` brought; a pre-release of X counts as X."""
        return self.release >= release

    def before(self, other: EngineVersion) -> bool:
        """Whether this version came before `other`; builds and days of llama.cpp do not compare with each other."""
        if self.engine != other.engine:
            raise ValueError(f"{self} and {other} are different engines")
        if self.engine != "llama.cpp":
            return (self.release, self.stage) < (other.release, other.stage)
        if self.build is not None and other.build is not None:
            return self.build < other.build
        if self.day is not None and other.day is not None:
            return self.day < other.day
        raise ValueError(f"{self} and {other}: one is a build, one is a day")

    def has(self, feature: Feature) -> bool | None:
        """Whether this llama.cpp has `feature`; None = not established for this build or day."""
        placed = _FEATURES[feature]
        if self.build is not None:
            if placed.present_build is not None and self.build >= placed.present_build:
                return True
            return False if self.build <= placed.absent_build else None
        day = self.day or ""
        return True if day >= placed.present_day else False if day <= placed.absent_day else None


def engine_named(name: str) -> Engine:
    """The engine a user means; raises UsageError with the names there are."""
    engine = _ALIASES.get(name.strip().lower())
    if engine is None:
        raise UsageError(f"unknown engine {name!r}", why="its rules are not known here", do="llama.cpp, ollama or vllm")
    return engine


def engine_version(engine: str, text: str | None = None) -> EngineVersion:
    """The version that `text` names ("0.20.2", "v0.33.0-rc1", "b8609", "2026-10-01"); None = the newest known.

    An unreadable, newer or older version is served by the nearest known one, and `notes` says so.
    """
    name = engine_named(engine)
    if text is None:
        return cast(EngineVersion, _read(name, NEWEST[name]))
    version = _read(name, text.strip())
    if version is None:
        note = f"{text.strip()!r} is no {name} version placed here; the rules of {NEWEST[name]} are used"
        return _noted(cast(EngineVersion, _read(name, NEWEST[name])), note)
    newest = cast(EngineVersion, _read(name, NEWEST[name]))
    if name == "llama.cpp":
        if version.day is not None and newest.before(version):
            return _noted(version, f"{version.text} is newer than what was read; the rules of {newest.text} are used")
        return version
    if version.release > newest.release:
        return _noted(version, f"{version.text} is newer than what was read; the rules of {newest.text} are used")
    oldest = cast(EngineVersion, _read(name, OLDEST[name]))
    if version.before(oldest):
        return _noted(version, f"{version.text} is older than what was read; the rules of {oldest.text} are used")
    return version


def split_engine(text: str) -> EngineVersion:
    """The version that `ENGINE[@VERSION]` names."""
    engine, _, version = text.partition("@")
    return engine_version(engine, version or None)


def _read(engine: Engine, text: str) -> EngineVersion | None:
    if engine == "llama.cpp":
        if text.lower() in _COMMITS:
            return EngineVersion(engine=engine, text=text, day=_COMMITS[text.lower()])
        if _DAY.fullmatch(text):
            return EngineVersion(engine=engine, text=text, day=text)
        build = _BUILD.fullmatch(text.lower())
        return EngineVersion(engine=engine, text=text, build=int(build[1])) if build else None
    match = _RELEASE.fullmatch(text.lower())
    if match is None:
        return None
    major, minor, patch, stage, n = match.groups()
    return EngineVersion(
        engine=engine,
        text=text.lower().removeprefix("v"),
        release=(int(major), int(minor), int(patch or 0)),
        stage=(_STAGE[stage or ""], int(n or 0)),
    )


def _noted(version: EngineVersion, note: str) -> EngineVersion:
    return replace(version, notes=(*version.notes, note))
