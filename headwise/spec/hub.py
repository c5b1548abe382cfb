"""Files of a Hub repository, through huggingface_hub: its cache, its progress bars, its credentials.

A plan needs config.json alone; nothing is downloaded twice, and what is in the cache needs no network.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import SpecError, UsageError

Progress = Callable[[str, int, int], None]  # a file, its bytes that are here, of how many

_PLAN = ["config.json"]
_RUN = ["*.json", "*.jinja", "*.model", "*.safetensors"]
_SECOND_COPIES = ["*/*", "consolidated*"]  # the same weights for other programs: original/, metal/, Mistral's own
_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-\d{5}\.gguf", re.IGNORECASE | re.DOTALL)
_TYPE = re.compile(r"[-_.]((?:I?Q|TQ)\d\w*|BF16|F16|F32|MXFP4\w*)$", re.IGNORECASE)


def fetch(name: str, *, weights: bool, progress: Progress | None = None) -> Path:
    """A local directory (safetensors repositories) or GGUF file (`org/name:Q4_K_M`, or a repository of GGUFs only).

    Args:
        name: `org/name`, or `org/name:TYPE` for one GGUF of the repository.
        weights: download the weights too; a GGUF is one file, so its header needs the download either way.
        progress: told of every file as it comes, in place of huggingface_hub's own bars; what it raises ends the download,
            and files that came whole are kept.
    Raises:
        UsageError: `name` names no repository.
        SpecError: no such repository, no access, no network and nothing cached, or no room on disk.
    """
    repository, colon, kind = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII) or (colon and not kind):
        raise _malformed(name)
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise SpecError(
            f"hf:{name} needs the package huggingface_hub",
            why=f"it is not installed ({error})",
            do="pip install 'headwise[engine]', or give a local path",
        ) from error
    clients = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    unreachable: tuple[type[Exception], ...] = (OSError, *clients)  # the HTTP client's own errors, whichever it is
    try:
        if kind:
            return _gguf(huggingface_hub, repository, kind, unreachable, progress)
        return _any(huggingface_hub, repository, weights, unreachable, progress)
    except HFValidationError as error:
        raise _malformed(name) from error
    except GatedRepoError as error:
        raise SpecError(
            f"{repository} is gated",
            why=_line(error),
            do=f"accept its licence on https://huggingface.co/{repository}, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise SpecError(
            f"the Hub has no repository {repository}, or it is private",
            why=_line(error),
            do="check the name; for a private one set HF_TOKEN or run `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        raise _offline(repository, error) from error
    except HfHubHTTPError as error:
        raise SpecError(f"the Hub refused {repository}", why=_line(error), do="try again later") from error
    except (*unreachable, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise SpecError(
                f"no room on disk for {repository}",
                why=_line(error),
                do="free some, or set HF_HOME to another disk; files that came whole are kept",
            ) from error
        if isinstance(error, PermissionError):
            raise SpecError(
                f"{repository} cannot be stored", why=_line(error), do="set HF_HOME to a directory that you may write"
            ) from error
        if isinstance(error, RuntimeError) and not isinstance(error, unreachable):  # hf_xet's, huggingface_hub issue 3036
            raise SpecError(
                f"the download of {repository} broke off",
                why=_line(error),
                do="run it again: files that came whole are kept; HF_HUB_DISABLE_XET=1 downloads in the plain way",
            ) from error
        raise _offline(repository, error) from error


def _malformed(name: str) -> UsageError:
    return UsageError(
        f"hf:{name[:120]} names no repository",
        why="it is not of the form hf:ORG/NAME or hf:ORG/NAME:TYPE",
        do="hf:google/gemma-4-31B-it, or hf:ggml-org/gemma-4-31B-it-GGUF:Q4_K_M",
    )


def _offline(repository: str, error: Exception) -> SpecError:
    return SpecError(
        f"{repository} is not in the cache, and the Hub cannot be reached",
        why=_line(error),
        do="connect, or give a local directory or .gguf file; a catalogue name plans without any download",
    )


def _line(error: Exception) -> str:
    """The first line of a message that may have none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _any(
    hub: Any, repository: str, weights: bool, unreachable: tuple[type[Exception], ...], progress: Progress | None = None
) -> Path:
    patterns = {"allow_patterns": _RUN if weights else _PLAN, "ignore_patterns": _SECOND_COPIES}
    if progress is None:
        folder = Path(hub.snapshot_download(repository, **patterns))
    else:
        from huggingface_hub.utils import filter_repo_objects

        here = _listed(hub, repository, unreachable)
        files = list(filter_repo_objects(here, allow_patterns=patterns["allow_patterns"], ignore_patterns=_SECOND_COPIES))
        if "config.json" not in files:
            return _gguf(hub, repository, "", unreachable, progress)
        paths = [_download(hub, repository, file, progress) for file in files]
        folder = paths[0].parent
    if not (folder / "config.json").exists():
        return _gguf(hub, repository, "", unreachable, progress)
    if weights and not any(folder.glob("*.safetensors")):
        raise SpecError(
            f"{repository} has no safetensors",
            why="weights are read from safetensors or GGUF",
            do="look for a repository of the same model whose name ends in -GGUF: hf:ORG/NAME-GGUF:Q4_K_M",
        )
    return folder


def _download(hub: Any, repository: str, file: str, progress: Progress | None) -> Path:
    if progress is None:
        return Path(hub.hf_hub_download(repository, file))
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Draws nothing; huggingface_hub moves it."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115
            self.tell()

        def update(self, n: float | None = 1) -> bool | None:
            moved = super().update(n)
            self.tell()
            return moved

        def tell(self) -> None:
            assert progress is not None
            progress(file, int(self.n), int(self.total or 0))

    path = Path(hub.hf_hub_download(repository, file, tqdm_class=Bar))
    size = path.stat().st_size
    progress(file, size, size)
    return path


def _ggufs(files: Iterable[str]) -> dict[str, list[str]]:
    """A GGUF's name without part and ending -> its parts, in order."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and "mmproj" not in file.lower():
            part = _PART.fullmatch(file)
            found.setdefault(part["stem"] if part else file[: -len(".gguf")], []).append(file)
    return found


def _gguf(hub: Any, repository: str, kind: str, unreachable: tuple[type[Exception], ...], progress: Progress | None = None) -> Path:
    """The GGUF of a repository whose type is `kind`, or the only one there is; a split file comes whole.

    A type has to match as a whole first: F16 is no BF16, and Q4_K no Q4_K_M.
    """
    files = _ggufs(_listed(hub, repository, unreachable))
    types = {stem: found[1] for stem in files if (found := _TYPE.search(stem))}
    chosen = [stem for stem in files if types.get(stem, "").lower() == kind.lower()] if kind else list(files)
    chosen = chosen or [stem for stem in files if kind.lower() in stem.lower()]
    if len(chosen) != 1:
        wanted = f" of type {kind}" if kind else ""
        how_many = f"{len(chosen)} GGUF files{wanted}" if chosen else f"no GGUF file{wanted}"
        offered = chosen or list(files)
        raise SpecError(
            f"{repository} has {how_many}" + ("" if files else " and no config.json"),
            why=f"it holds {', '.join(offered[:12])}" + (" ..." if len(offered) > 12 else "") if offered else "it holds no model",
            do=f"hf:{repository}:{types.get(offered[0], offered[0])}" if offered else "check the name",
        )
    paths = [_download(hub, repository, file, progress) for file in files[chosen[0]]]
    return paths[0]


def _listed(hub: Any, repository: str, unreachable: tuple[type[Exception], ...]) -> list[str]:
    """The files of a repository; where the Hub does not answer or refuses, those in the cache."""
    from huggingface_hub.errors import CacheNotFound

    try:
        return [file.rfilename for file in hub.model_info(repository).siblings or []]  # one request; a list retries for 24 s
    except unreachable:
        try:
            cached = [r for r in hub.scan_cache_dir().repos if (r.repo_type, r.repo_id) == ("model", repository)]
        except CacheNotFound:
            cached = []
        revisions = [revision for repo in cached for revision in repo.revisions]
        files = {f.file_path.relative_to(r.snapshot_path).as_posix() for r in revisions for f in r.files}
        if not files:
            raise
        return sorted(files)


@dataclass(frozen=True, slots=True)
class Cached:
    """One model in the Hub's cache: a directory with config.json, or a GGUF file. `missing`: what a broken download left out."""

    name: str  # `org/name`, or `org/name:TYPE`
    path: Path
    n_bytes: int
    changed: float
    missing: str | None = None


def cached(cache_dir: Path | None = None) -> list[Cached]:
    """The models in the cache that could be run, or whose download broke off; [] without huggingface_hub.

    Args:
        cache_dir: default huggingface_hub's own (HF_HUB_CACHE, HF_HOME).
    """
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:
        return []
    try:
        repos = scan_cache_dir(cache_dir).repos
    except CacheNotFound:
        return []
    found: list[Cached] = []
    for repo in sorted((r for r in repos if r.repo_type == "model"), key=lambda r: r.repo_id):
        revisions = sorted(repo.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
        if revisions:
            found += _cached(repo.repo_id, revisions[-1])
    return found


def _cached(repository: str, revision: Any) -> list[Cached]:
    sizes = {f.file_path.relative_to(revision.snapshot_path).as_posix(): f.size_on_disk for f in revision.files}
    folder, changed = Path(revision.snapshot_path), float(revision.last_modified)
    weights = [file for file in sizes if file.endswith(".safetensors") and "/" not in file]
    if "config.json" in sizes and (weights or "model.safetensors.index.json" in sizes):
        n_bytes = sum(size for file, size in sizes.items() if "/" not in file)
        return [Cached(repository, folder, n_bytes, changed, _missing(folder, weights))]
    found = []
    for stem, parts in _ggufs(sizes).items():
        kind = _TYPE.search(stem)
        part = re.search(r"-of-(\d{5})\.gguf$", parts[0], re.IGNORECASE)
        missing = f"{len(parts)} of {int(part[1])} parts are here" if part and len(parts) != int(part[1]) else None
        name = f"{repository}:{kind[1] if kind else stem}"
        found.append(Cached(name, folder / parts[0], sum(sizes[p] for p in parts), changed, missing))
    return found


def _missing(folder: Path, weights: list[str]) -> str | None:
    """What is missing of the files that the index names."""
    import json

    try:
        named = set(json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its index cannot be read: {_line(error)}"
    lacking = sorted(str(name) for name in named - set(weights))
    return f"{len(lacking)} of {len(named)} weight files are not here" if lacking else None
