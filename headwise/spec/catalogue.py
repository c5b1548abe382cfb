"""The models everyone asks about, known offline: `headwise plan gemma-4-31b` needs no download.

`data/catalogue.json` holds one Hugging Face config per model, with its sources; `layer_types` is written as one letter per
layer (S sliding, F full). It goes through the same door as any config.json. Three configs were not found verbatim
(E4B, EXAONE 4.0 32B, and maxima of Qwen3 and Llama): their entries are assembled from the sources they name.
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
    """Spellings that mean the same model: case, -it and -instruct endings, dashes and underscores, an organisation."""
    plain = name.strip().lower().rsplit("/", 1)[-1].replace("_", "-")
    return re.sub(r"-(it|instruct)(-\d{4})?$", "", plain).replace("-", "")


@functools.cache
def _spellings() -> Mapping[str, str]:
    known: dict[str, str] = {}
    for name, entry in _entries().items():
        for spelling in (name, entry["repository"], *entry["ollama"]):
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
        near = difflib.get_close_matches(
            name.lower(), [*names(), *(o for e in _entries().values() for o in e["ollama"])], n=3, cutoff=0.4
        )
        raise SpecError(
            f"no model {name!r}",
            why="it is no path and not in the catalogue" + (f"; the nearest names are {', '.join(near)}" if near else ""),
            do="a directory, a .gguf file, ollama:NAME or hf:ORG/NAME; the catalogue has: " + ", ".join(names()),
        )
    config = dict(_entries()[canonical]["config"])
    if isinstance(config.get("layer_types"), str):
        config["layer_types"] = [SLIDING if letter == "S" else FULL for letter in config["layer_types"]]
    return spec_from_config(config, name=canonical, where=f"catalogue entry {canonical}", ignore_keys=ignore_keys)


def repository(name: str) -> str | None:
    """Where the weights of a catalogue model live on the Hub."""
    canonical = find(name)
    return None if canonical is None else _entries()[canonical]["repository"]


def specs() -> dict[str, ModelSpec]:
    return {name: spec(name) for name in names()}
