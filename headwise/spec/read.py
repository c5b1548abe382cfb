"""The one door: a path, `ollama:NAME`, `hf:ORG/NAME` or a catalogue name becomes a Source with its ModelSpec."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from headwise.errors import SpecError, UsageError
from headwise.spec import catalogue
from headwise.spec.gguf import GgufFile, read_gguf
from headwise.spec.gguf_model import spec_from_gguf
from headwise.spec.hf import read_hf
from headwise.spec.hub import fetch
from headwise.spec.layers import ModelSpec
from headwise.spec.ollama import default_roots, find_ollama

EMBEDDED = "tiny-hybrid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from; `path` is a Hugging Face directory or a GGUF file, None for a catalogue entry."""

    name: str
    kind: Literal["hf", "gguf", "ollama", "hub", "catalogue"]
    spec: ModelSpec
    path: Path | None = None
    gguf: GgufFile | None = None
    params: Mapping[str, Any] = field(default_factory=dict)  # Ollama's num_ctx, temperature, ...


def open_model(
    source: str | Path | None, *, env: Mapping[str, str], ignore_keys: Sequence[str] = (), weights: bool = False
) -> Source:
    """Reads headers and configs only.

    Args:
        source: None is the embedded tiny-hybrid.
        env: the environment, for the places of Ollama's store.
        weights: the caller wants weights too: a Hub repository is downloaded whole, a catalogue name is refused.
    Raises:
        SpecError: nothing there, or it cannot be read; with what to do.
    """
    if source is None or str(source).lower() == EMBEDDED:
        return _gguf(Path(str(resources.files("headwise").joinpath("data/tiny-hybrid.gguf"))), EMBEDDED, ignore_keys)
    text = str(source)
    if text.startswith("ollama:"):
        model = find_ollama(text.removeprefix("ollama:"), default_roots(env))
        file = read_gguf(model.gguf)
        spec = spec_from_gguf(file, ignore_keys=ignore_keys)
        return Source(name=model.name, kind="ollama", spec=spec, path=model.gguf, gguf=file, params=model.params)
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        found = _path(fetch(name, weights=weights), ignore_keys)
        spec = found.spec if found.gguf else replace(found.spec, name=name.split("/")[1])  # its folder is named by a hash
        return replace(found, name=name, kind="hub", spec=spec)
    if not text.strip():
        raise UsageError("the model has no name", why="it is an empty text", do="leave it out for the embedded tiny-hybrid")
    path, exists = _looked_up(source if isinstance(source, Path) else Path(text))
    if exists:
        return _path(path, ignore_keys)
    if isinstance(source, Path) or text.lower().endswith((".gguf", ".json", "/")) or text.startswith((".", "/", "~")):
        raise _no_such_path(path)
    spec = catalogue.spec(text, ignore_keys=tuple(ignore_keys))
    if weights:
        raise SpecError(
            f"{spec.name} is known by its description only",
            why="the catalogue holds no weights",
            do=f"headwise run hf:{catalogue.repository(spec.name)}, or a directory, a .gguf file or ollama:NAME",
        )
    return Source(name=spec.name, kind="catalogue", spec=spec)


def _looked_up(path: Path) -> tuple[Path, bool]:
    """`path` with ~ expanded, and whether anything is there; a name that no file can have is not."""
    try:
        path = path.expanduser()
        return path, path.exists() or path.is_symlink()
    except (OSError, RuntimeError, ValueError):  # too long, a user without a home, a NUL
        return path, False


def _no_such_path(path: Path) -> SpecError:
    """Names the first directory of the path that is missing, or the nearest name in the last that is there."""
    parent = path.parent
    if not _looked_up(parent)[1]:
        while not _looked_up(parent.parent)[1] and parent != parent.parent:
            parent = parent.parent
        return SpecError(f"{path} does not exist", why=f"there is no directory {parent}", do="check the path")
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3)
    except OSError:
        near = []
    why = f"{parent} holds no {path.name}" + (f"; the nearest names there are {', '.join(near)}" if near else "")
    return SpecError(f"{path} does not exist", why=why, do=str(parent / near[0]) if near else "check the path")


def _path(path: Path, ignore_keys: Sequence[str]) -> Source:
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if inside and not (path / "config.json").exists():
            raise SpecError(
                f"{path} holds no config.json but {len(inside)} GGUF file{'s' * (len(inside) > 1)}",
                why=f"a directory is read as Hugging Face's; here are {', '.join(p.name for p in inside[:6])}",
                do=str(inside[0]),
            )
        return Source(name=path.resolve().name, kind="hf", spec=read_hf(path, ignore_keys=ignore_keys), path=path)
    if path.name == "config.json":
        return _path(path.parent, ignore_keys)
    return _gguf(path, path.stem, ignore_keys)


def _gguf(path: Path, name: str, ignore_keys: Sequence[str]) -> Source:
    file = read_gguf(path)
    return Source(name=name, kind="gguf", spec=spec_from_gguf(file, ignore_keys=ignore_keys), path=path, gguf=file)
