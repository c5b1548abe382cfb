"""Tiny checkpoints on disk, made once per test run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import tiny

from headwise import LLM

_ROOT = tempfile.TemporaryDirectory(prefix="headwise-tests-")


@functools.cache
def folder(name: str) -> Path:
    return tiny.save(name, Path(_ROOT.name) / name)


def load(name: str, **settings: object) -> LLM:
    """The family's tiny model on the CPU, unchecked: the self-check has its own tests."""
    return LLM(folder(name), **({"context": 128, "chunk": 64, "device": "cpu", "check": False} | settings))  # type: ignore[arg-type]
