"""The models that this machine has, by the names that clients ask for: named at start, embedded, Ollama's, the Hub's cache.

Directories are listed and manifests read; no header of a model is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from headwise.errors import SpecError
from headwise.spec.hub import cached
from headwise.spec.ollama import default_roots, find_ollama, list_ollama
from headwise.spec.read import EMBEDDED, Source, open_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One model.

    Args:
        opens: what `open_model` takes; None: the embedded model.
        aliases: further names.
        problem: why it cannot be run, where that is known without reading it.
    """

    name: str
    origin: Literal["named", "embedded", "ollama", "hub"]
    opens: str | None
    path: Path | None = None
    n_bytes: int = 0
    changed: float = 0.0  # seconds since 1970
    aliases: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def loads(self) -> str | None:
        """What another process opens it by, whatever its environment and without a network."""
        return str(self.path) if self.origin in ("ollama", "hub") else self.opens

    def open(self, env: Mapping[str, str], ignore_keys: Sequence[str] = ()) -> Source:
        """Reads headers and configs. Raises SpecError: it cannot be read."""
        if self.problem is not None:
            raise SpecError(f"{self.name} cannot be run", why=self.problem, do="headwise list")
        return replace(open_model(self.opens, env=env, ignore_keys=ignore_keys, weights=True), name=self.name)


def held(opens: str | None, source: Source, aliases: Iterable[str] = ()) -> Held:
    """A model that was named at start."""
    n_bytes, changed = _size(source)
    return Held(
        name=source.name,
        origin="named",
        opens=opens,
        path=source.path,
        n_bytes=n_bytes,
        changed=changed,
        aliases=tuple(n for n in dict.fromkeys(aliases) if n != source.name),
    )


def shelf(env: Mapping[str, str]) -> list[Held]:
    """What is here, the embedded model first; what cannot be run says why.

    Args:
        env: the environment, for the places of Ollama's store and of the Hub's cache (HF_HUB_CACHE).
    """
    embedded = open_model(None, env=env)
    n_bytes, changed = _size(embedded)
    found = [Held(name=EMBEDDED, origin="embedded", opens=None, path=embedded.path, n_bytes=n_bytes, changed=changed)]
    roots = default_roots(env)
    for name, manifest in list_ollama(roots).items():
        try:
            model = find_ollama(name, roots)
            stat = model.gguf.stat()
        except SpecError as error:
            found.append(Held(name=name, origin="ollama", opens=f"ollama:{name}", path=manifest, problem=error.why or error.what))
            continue
        except OSError as error:
            found.append(Held(name=name, origin="ollama", opens=f"ollama:{name}", path=manifest, problem=str(error)))
            continue
        found.append(
            Held(
                name=name,
                origin="ollama",
                opens=f"ollama:{name}",
                path=model.gguf,
                n_bytes=stat.st_size,
                changed=manifest.stat().st_mtime,
            )
        )
    for c in cached(Path(env["HF_HUB_CACHE"]) if env.get("HF_HUB_CACHE") else None):
        problem = None if c.missing is None else f"{c.missing}: headwise pull {c.name}"
        found.append(
            Held(
                name=c.name,
                origin="hub",
                opens=str(c.path),
                path=c.path,
                n_bytes=c.n_bytes,
                changed=c.changed,
                problem=problem,
            )
        )
    return found


def find(models: Sequence[Held], name: str) -> Held | None:
    """The model of a name, as written or in Ollama's manner: without its tag `latest`, with a scheme, in any case.

    What named a model at start, such as a path, is a name of it too; no other path is.
    """
    wanted = _key(name)
    for m in models:
        if wanted in {_key(n) for n in (m.name, *m.aliases)} or (m.origin == "named" and name == m.opens):
            return m
    return None


def nearest(models: Sequence[Held], name: str) -> list[str]:
    """The names most like `name`, best first, at most three."""
    names = {_key(n): n for m in models for n in (m.name, *m.aliases)}
    return [names[key] for key in difflib.get_close_matches(_key(name), list(names), n=3, cutoff=0.5)]


def hub_name(name: str) -> str | None:
    """`org/name` or `org/name:TYPE` behind a name of a Hub repository, in our spelling or Ollama's; None for another name."""
    short = name
    for scheme in ("https://", "hf:", "hf.co/", "huggingface.co/"):
        short = short.removeprefix(scheme)
    return short if short.count("/") == 1 and not short.startswith((".", "/", "~")) else None


def _key(name: str) -> str:
    plain = name.strip().casefold()
    for scheme in ("ollama:", "hf:", "hf.co/", "huggingface.co/"):
        plain = plain.removeprefix(scheme)
    return plain.removesuffix(":latest")


def _size(source: Source) -> tuple[int, float]:
    """Bytes of a model's files, and when the last of them changed."""
    if source.path is None:
        return 0, 0.0
    if source.gguf is not None:
        files = list(source.gguf.paths)
    else:
        files = [f for f in source.path.iterdir() if f.is_file()] if source.path.is_dir() else [source.path]
    stats = [f.stat() for f in files]
    return sum(s.st_size for s in stats), max((s.st_mtime for s in stats), default=0.0)
