"""Where the logs of this machine's engines are; read-only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headwise.errors import ProbeError, UsageError


@contextmanager
def log_of(
    path: str | None, *, unit: str | None = None, ollama: bool = False, env: Mapping[str, str], platform: str = sys.platform
) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a log and what to call it.

    Args:
        path: a file; "-" is standard input.
        unit: a systemd service, read from journald.
        ollama: this machine's Ollama: its service, else the file that its app writes.
    Raises:
        UsageError: none or more than one is named, or the file cannot be read; ProbeError: journald does not answer.
    """
    named = [x for x in (path, unit, ollama or None) if x]
    if len(named) != 1:
        raise UsageError(
            "no log is named" if not named else "more than one log is named",
            why="the doctor reads one at a time",
            do="headwise doctor server.log, --systemd UNIT, --ollama, or - for a pipe",
        )
    if path == "-":
        yield sys.stdin.buffer, "standard input"
        return
    if path is not None:
        with _opened(path) as file:
            yield file, Path(path).name
        return
    if unit is None:
        own = _ollama_file(env, platform)
        if own is not None:
            with own.open("rb") as file:
                yield file, str(own)
            return
        unit = "ollama"
    with _journal(unit) as file:
        yield file, f"journalctl -u {unit}"


def _opened(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read", why=error.strerror or str(error), do="name a log file, or - for a pipe"
        ) from error


def _ollama_file(env: Mapping[str, str], platform: str) -> Path | None:
    """Ollama's own log: on macOS and Windows its app writes a file. Source: ollama docs/troubleshooting.md."""
    home = Path(env.get("LOCALAPPDATA", "")) / "Ollama" if platform == "win32" else Path(env.get("HOME", "~")) / ".ollama/logs"
    file = home / "server.log"
    try:
        return file if file.is_file() else None
    except OSError:
        return None


@contextmanager
def _journal(unit: str) -> Iterator[BinaryIO]:
    if shutil.which("journalctl") is None:
        raise ProbeError(
            f"the log of {unit} cannot be read",
            why="this machine has no journalctl",
            do="headwise doctor FILE, or docker logs NAME 2>&1 | headwise doctor -",
        )
    command = ["journalctl", "--unit", unit, "--no-pager", "--output", "short", "--boot"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process.stdout  # type: ignore[misc]
            said = process.stderr.read(500).decode(errors="replace").strip()
        finally:
            process.kill()
    if said:
        raise ProbeError(
            f"journald says of {unit}: {said.splitlines()[0]}",
            why="its log may be another user's",
            do=f"sudo journalctl -u {unit} | headwise doctor -",
        )
