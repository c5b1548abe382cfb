"""Files of a Hub repository, through huggingface_hub and its cache; nothing is downloaded twice."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from headwise.errors import SpecError, UsageError

_SMALL = ["config.json", "*.json", "*.jinja", "*.model"]  # everything a plan reads
_WEIGHTS = ["*.safetensors"]


def fetch(name: str, *, weights: bool) -> Path:
    """A local directory (safetensors repositories) or GGUF file (`org/name:Q4_K_M`, or a repository of GGUFs only).

    Args:
        name: `org/name`, or `org/name:TYPE` for one GGUF of the repository.
        weights: download the weights too; a GGUF is one file, so its header needs the download either way.
    Raises:
        SpecError: no such repository, no access, no network and nothing cached, or no room on disk.
    """
    repository, _, kind = name.partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"hf:{name} names no repository", why="it is not of the form hf:ORG/NAME", do="hf:google/gemma-4-31B-it")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise SpecError(
            f"hf:{name} needs the package huggingface_hub",
            why=f"it is not installed ({error})",
            do="pip install 'headwise[engine]', or give a local path",
        ) from error
    try:
        if kind:
            return _gguf(huggingface_hub, repository, kind)
        patterns = _SMALL + (_WEIGHTS if weights else [])
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        return folder if (folder / "config.json").exists() else _gguf(huggingface_hub, repository, None)
    except RepositoryNotFoundError as error:
        raise SpecError(
            f"the Hub has no repository {repository}, or it needs a login",
            why=str(error).splitlines()[0],
            do="check the name; for a gated model accept its licence there and set HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise SpecError(
            f"{repository} is not in the cache, and the Hub cannot be reached",
            why=str(error).splitlines()[0],
            do="connect, or give a local directory or .gguf file; a catalogue name plans without any download",
        ) from error
    except HfHubHTTPError as error:
        raise SpecError(
            f"the Hub refused {repository}", why=str(error).splitlines()[0], do="set HF_TOKEN if it is gated; else try later"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SpecError(
                f"no room on disk for {repository}",
                why=str(error),
                do="free some, or set HF_HOME to another disk; what came is kept",
            ) from error
        raise SpecError(
            f"{repository} cannot be fetched",
            why=str(error).splitlines()[0] or type(error).__name__,
            do="check the connection, or give a local path",
        ) from error


def _gguf(hub: Any, repository: str, kind: str | None) -> Path:
    """The one GGUF of a repository, or the one whose name carries the type asked for; split files come whole."""
    files = sorted(f for f in hub.list_repo_files(repository) if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    chosen = [f for f in files if kind is None or kind.lower() in f.lower()]
    whole = [f for f in chosen if "-of-" not in f or "-00001-of-" in f]
    if len(whole) != 1:
        what = f"{len(whole)} GGUF files" if whole else "no GGUF file"
        raise SpecError(
            f"{repository} has {what}{f' of type {kind}' if kind else ' and no config.json' if not files else ''}",
            why=", ".join(files[:12]) or "it holds none",
            do=f"hf:{repository}:TYPE with a part of one file's name",
        )
    parts = chosen if "-of-" in whole[0] else whole
    paths = [Path(hub.hf_hub_download(repository, f)) for f in parts if f.split("-00")[0] == whole[0].split("-00")[0]]
    return paths[0]
