"""Ollama's store on disk, read-only: a model's name becomes the path of its GGUF file and the settings beside it.

    <root>/manifests/<host>/<namespace>/<model>/<tag>      JSON: layers, each a media type and a digest
    <root>/manifests-v2/ollama.com/...                     the same since 2026; or a list of manifests, one per runner
    <root>/blobs/sha256-<64 hex>                           the layers' contents

Names are case-blind. A digest is checked before it becomes a path, so a manifest can name nothing outside `blobs`.
Source: ollama manifest/{manifest,paths,layer}.go, types/model/name.go, envconfig/config.go.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.errors import SpecError

_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_PUBLIC_HOSTS = (_HOST, "ollama.com")  # one registry under two names
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_SHADOW = re.compile(r"llamacpp:[0-9a-f]{64}")  # Ollama's own anchors for converted models, not names of a user
_LIST_TYPE = "application/vnd.ollama.manifest.list.v2+json"
_LAYER_PREFIX = "application/vnd.ollama.image."
_RUNNERS = ("llamacpp", "ggml", "ollama", "")  # of a manifest list, best first: llamacpp children carry standard GGUF
_MAX_TEXT_BYTES = 16 << 20  # a manifest of an MLX model has some thousand layers; parameters and templates are small


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """One installed model; `gguf` exists and has the size its manifest states."""

    name: str  # as `ollama list` prints it
    manifest: Path
    gguf: Path
    params: Mapping[str, Any]  # of the Modelfile: num_ctx, temperature, stop ...
    template: str | None  # a Go template
    system: str | None
    projector: Path | None  # vision or audio encoder, a second GGUF
    draft: Path | None  # a model for speculative decoding


@dataclass(frozen=True, slots=True)
class _Name:
    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        short = f"{self.model}:{self.tag}"
        if self.host.lower() not in _PUBLIC_HOSTS:
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace.lower() == _NAMESPACE else f"{self.namespace}/{short}"


@dataclass(frozen=True, slots=True)
class _Entry:
    name: _Name
    path: Path
    root: Path


def default_roots(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Where Ollama keeps models: $OLLAMA_MODELS, the user's home, the Linux service's home."""
    roots = []
    if named := env.get("OLLAMA_MODELS", "").strip().strip("\"'"):
        roots.append(Path(named))
    if home := env.get("HOME") or env.get("USERPROFILE"):
        roots.append(Path(home) / ".ollama" / "models")
    roots.append(Path("/usr/share/ollama/.ollama/models"))
    return tuple(dict.fromkeys(roots))


def list_ollama(roots: Sequence[Path]) -> dict[str, Path]:
    """Name -> manifest of every installed model, sorted; where two roots have one name, the first root's."""
    entries, _ = _scan(roots)
    found: dict[str, Path] = {}
    for entry in entries:
        name = str(entry.name)
        if not _SHADOW.fullmatch(name):
            found.setdefault(name, entry.path)
    return dict(sorted(found.items()))


def find_ollama(name: str, roots: Sequence[Path]) -> OllamaModel:
    """The installed model `name`: `gemma4`, `gemma4:31b`, `user/model:tag` or `host/namespace/model:tag`.

    Raises:
        SpecError: no such model, a damaged manifest, a missing or short blob, or a model that is no GGUF.
    """
    wanted = _parse(name)
    entries, locked = _scan(roots)
    same = [e for e in entries if str(e.name).lower() == str(wanted).lower()]
    if not same:
        raise _not_found(wanted, [str(e.name) for e in entries], roots, locked)
    entry = next((e for e in same if str(e.name) == str(wanted)), same[0])
    return _Manifest(entry).model()


def _parse(text: str) -> _Name:
    rest = re.sub(r"^https?://", "", text.strip())
    head, slash, last = rest.rpartition("/")
    model, _, tag = last.partition(":")
    parts = [p for p in head.split("/") if slash] + [model]
    if len(parts) == 2:
        parts = [_HOST, *parts]
    elif len(parts) == 1:
        parts = [_HOST, _NAMESPACE, *parts]
    found = [*parts, tag if ":" in last else _TAG]
    if len(found) != 4 or not all(_PART.fullmatch(p) and ".." not in p for p in found) or ":" in "".join(found[1:]):
        raise SpecError(
            f"{text!r} is not the name of an Ollama model",
            why="a name is [host/][namespace/]model[:tag] of letters, digits, '.', '_' and '-'",
            do="copy it from: ollama list",
        )
    return _Name(*found)


def _scan(roots: Sequence[Path]) -> tuple[list[_Entry], list[Path]]:
    """Every named manifest, and the directories that may not be read; newer layout first, as Ollama looks it up."""
    entries: list[_Entry] = []
    locked: list[Path] = []

    def children(folder: Path) -> Iterator[Path]:
        try:
            yield from sorted(folder.iterdir())
        except PermissionError:
            locked.append(folder)
        except OSError:  # not there, or a stray file where a directory belongs
            pass

    def is_file(path: Path) -> bool:
        try:
            return path.is_file()  # False for a dangling link of manifests-v2: the older entry then counts
        except OSError:
            return False

    for root in roots:
        for layout in ("manifests-v2", "manifests"):
            for host in children(root / layout):
                for namespace in children(host):
                    for model in children(namespace):
                        for path in children(model):
                            name = _Name(host.name, namespace.name, model.name, path.name)
                            if _PART.fullmatch(path.name) and is_file(path):
                                entries.append(_Entry(name, path, root))
    return entries, locked


def _not_found(wanted: _Name, names: list[str], roots: Sequence[Path], locked: list[Path]) -> SpecError:
    what = f"Ollama has no model {wanted}"
    searched = ", ".join(str(r) for r in roots)
    if locked:
        why = f"{locked[0]} may not be read by this user; searched: {searched}"
        return SpecError(what, why=why, do="sudo usermod -aG ollama $USER   (then log in again)")
    names = sorted({n for n in names if not _SHADOW.fullmatch(n)})
    if not names:
        return SpecError(what, why=f"no models in {searched}", do=f"ollama pull {wanted}   (or set OLLAMA_MODELS)")
    near = difflib.get_close_matches(str(wanted).lower(), names, n=3, cutoff=0.5)
    near += [n for n in names if n.split(":")[0] == wanted.model.lower() and n not in near]
    shown = near[:5] or names[:8]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    do = f"use {near[0]}, or: ollama pull {wanted}" if near else f"ollama pull {wanted}"
    return SpecError(what, why=f"installed in {searched}: {', '.join(shown)}{more}", do=do)


class _Manifest:
    """One model's layers. Everything in it was written by another program, and is checked as it is used."""

    def __init__(self, entry: _Entry) -> None:
        self.name, self.path, self.root = str(entry.name), entry.path, entry.root
        self.layers = self._layers(self._json(entry.path, "manifest"))

    def model(self) -> OllamaModel:
        kinds = [kind for kind, _ in self.layers]
        if "model" not in kinds:
            raise self._no_gguf(kinds)
        for kind, why in (
            ("model", "it is split over several files, which Ollama's store does not name"),
            ("adapter", "its LoRA adapter would change every layer, and adapters are not read"),
        ):
            if kinds.count(kind) > (kind == "model"):
                raise SpecError(f"Ollama's {self.name} cannot be used as it is", why=why, do="use the base model, or one GGUF file")
        params = self._json(blob, "parameters") if (blob := self._blob("params")) else {}
        gguf = self._blob("model")
        assert gguf is not None
        return OllamaModel(
            name=self.name,
            manifest=self.path,
            gguf=gguf,
            params=params,
            template=self._text("template"),
            system=self._text("system"),
            projector=self._blob("projector"),
            draft=self._blob("draft"),
        )

    def _no_gguf(self, kinds: list[str]) -> SpecError:
        what = f"Ollama's {self.name} is not a GGUF model"
        base = self.name.rpartition(":")[0]
        if "tensor" in kinds:
            why = "it is stored as safetensors for Apple's MLX"
            return SpecError(what, why=why, do=f"pull another tag of it, without mlx, mxfp8 or nvfp4: ollama pull {base}")
        return SpecError(what, why="it has no weights here: a model that runs in Ollama's cloud", do="pull a local tag")

    def _damaged(self, path: Path, why: str) -> SpecError:
        return SpecError(f"Ollama's {self.name} is damaged", why=f"{path}: {why}", do=f"ollama pull {self.name}")

    def _bytes(self, path: Path) -> bytes:
        try:
            with path.open("rb") as f:
                raw = f.read(_MAX_TEXT_BYTES + 1)
        except PermissionError:
            raise SpecError(
                f"Ollama's {self.name} may not be read",
                why=f"{path}: permission denied",
                do="sudo usermod -aG ollama $USER   (then log in again)",
            ) from None
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from None
        if len(raw) > _MAX_TEXT_BYTES:
            raise self._damaged(path, f"more than {_MAX_TEXT_BYTES} bytes of text")
        return raw

    def _json(self, path: Path, what: str) -> dict[str, Any]:
        try:
            values = json.loads(self._bytes(path))
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise self._damaged(path, f"the {what} is no JSON") from None
        if not isinstance(values, dict):
            raise self._damaged(path, f"the {what} is no JSON object")
        return values

    def _layers(self, manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """(kind, layer) in order; the kind is the last word of the media type."""
        if manifest.get("mediaType") == _LIST_TYPE:
            manifest = self._chosen(self._dicts(manifest, "manifests"))
        layers = []
        for layer in self._dicts(manifest, "layers"):
            kind = layer.get("mediaType")
            if isinstance(kind, str) and kind.startswith(_LAYER_PREFIX):
                layers.append((kind.removeprefix(_LAYER_PREFIX), layer))
        return layers

    def _dicts(self, manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
        found = manifest.get(key) or []
        if not isinstance(found, list) or not all(isinstance(d, dict) for d in found):
            raise self._damaged(self.path, f"{key} is no list of objects")
        return found

    def _chosen(self, children: list[dict[str, Any]]) -> dict[str, Any]:
        """The GGUF child of a manifest list: inline, or a blob of its own."""
        usable = [c for c in children if c.get("runner", "") in _RUNNERS and c.get("format", "gguf") == "gguf"]
        usable.sort(key=lambda c: _RUNNERS.index(c.get("runner", "")))
        here = [c for c in usable if c.get("layers") or self._path(c).is_file()]
        if not here and usable:
            raise self._damaged(self.path, f"the manifest {self._path(usable[0]).name} is missing")
        if not here:
            raise self._no_gguf(["tensor"] if children else [])
        return here[0] if here[0].get("layers") else self._json(self._path(here[0]), "manifest")

    def _path(self, layer: dict[str, Any]) -> Path:
        digest = layer.get("digest")
        match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
        if match is None:
            raise self._damaged(self.path, f"{str(digest)[:80]!r} is no sha256 digest")
        return self.root / "blobs" / f"sha256-{match[1].lower()}"

    def _blob(self, kind: str) -> Path | None:
        """The last layer of a kind, as Ollama takes it; present and of the stated size."""
        layer = next((layer for k, layer in reversed(self.layers) if k == kind), None)
        if layer is None:
            return None
        path, stated = self._path(layer), layer.get("size")
        try:
            size = os.stat(path).st_size
        except PermissionError:
            self._bytes(path)  # raises with what to do
            raise
        except OSError:
            raise self._damaged(path, f"this {kind} file is missing") from None
        if isinstance(stated, int) and size != stated:
            raise self._damaged(path, f"{size} bytes; the manifest states {stated}")
        return path

    def _text(self, kind: str) -> str | None:
        path = self._blob(kind)
        return None if path is None else self._bytes(path).decode("utf-8", "replace")
