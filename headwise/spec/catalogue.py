"""The models everyone asks about, known offline: `headwise plan gemma-4-31b` needs no download.

`data/catalogue.json` holds one Hugging Face config per model, with its sources; `layer_types` is written as one letter per
layer (S sliding, F full). It goes through the same door as any config.json. Not found verbatim, and assembled from the
sources they name: the configs of gemma-4-e4b and exaone-4.0-32b, the longest context of Qwen3, the rope scaling of Llama.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from headwise.errors import SpecError
from headwise.spec.hf import FULL, SLIDING, spec_from_config
from headwise.spec.layers import ModelSpec


@functools.cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(resources.files("headwise").joinpath("data/catalogue.json").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    return tuple(_entries())


def _key(name: str) -> str:
    """One form for all spellings of a name: `Gemma-4-31B-it` and `gemma4:31b` are both gemma4-31b."""
    plain = name.strip().lower().removesuffix(":latest").replace("_", "-").replace(":", "-")
    return re.sub(r"(?<=[a-z])-(?=\d)", "", re.sub(r"-(it|instruct)$", "", plain))


@functools.cache
def _spellings() -> Mapping[str, str]:
    known: dict[str, str] = {}
    for name, entry in _entries().items():
        repository = entry["repository"]
        for spelling in (name, repository, repository.split("/")[1], *entry["ollama"]):
            known.setdefault(_key(spelling), name)
    return known


def find(name: str) -> str | None:
    """The canonical name behind any spelling (ours, the repository's, Ollama's), or None."""
    return _spellings().get(_key(name))


def spec(name: str, *, ignore_keys: tuple[str, ...] = ()) -> ModelSpec:
    """The description of one model of the catalogue.

    Raises:
        SpecError: no such model, with the nearest names.
    """
    canonical = find(name)
    if canonical is None:
        raise _unknown(name)
    return spec_from_config(config(canonical), name=canonical, where=f"catalogue entry {canonical}", ignore_keys=ignore_keys)


def config(canonical: str) -> dict[str, Any]:
    """The Hugging Face config of one of `names`, its layer types spelt out."""
    found = dict(_entries()[canonical]["config"])
    if isinstance(found.get("layer_types"), str):
        found["layer_types"] = [SLIDING if letter == "S" else FULL for letter in found["layer_types"]]
    return found


def _unknown(name: str) -> SpecError:
    """Another organisation's copy is another model: it may have been trained on, or quantised."""
    shown = name if len(name) <= 80 else name[:77] + "..."
    last = name.rsplit("/", 1)[-1][:80]
    near = dict.fromkeys(_spellings()[k] for k in difflib.get_close_matches(_key(last), _spellings(), n=5, cutoff=0.6))
    why = "it is no path and not in the catalogue"
    if near:
        why += f"; the nearest names are {', '.join(list(near)[:3])}"
    elsewhere = f"hf:{shown} reads it from the Hub; " if name.count("/") == 1 and name.isascii() else ""
    do = elsewhere + "a directory, a .gguf file, ollama:NAME or hf:ORG/NAME; the catalogue has: " + ", ".join(names())
    return SpecError(f"no model {shown!r}", why=why, do=do)


def repository(name: str) -> str | None:
    """Where the weights of a catalogue model live on the Hub."""
    canonical = find(name)
    return None if canonical is None else _entries()[canonical]["repository"]


def specs() -> dict[str, ModelSpec]:
    return {name: spec(name) for name in names()}
