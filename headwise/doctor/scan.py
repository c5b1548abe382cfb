"""Lines that say something, out of a log of any size: constant memory, and anything that is not a known line is passed over.

A row names a line by what it says (never by its line number or timestamp, which move with every release): a literal that the
line must hold, found at the speed of `bytes.find`, and a pattern whose named groups are the fact's values.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

CHUNK_BYTES = 2 << 20
LONGEST_LINE = 1 << 16  # a longer "line" is no log line; it is cut
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# journald: "Apr 17 11:17:48 host ollama[256526]: ", with -o short-iso a day and a time zone; compose: "ollama-1  | "
_JOURNAL = re.compile(r"^\S+(?: +\d+ [\d:.]+)? \S+ ([\w.@/-]+\[\d+\]): ")
_COMPOSE = re.compile(r"^([\w.-]+?)\s+\| ")


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of line.

    Args:
        name: of the fact.
        literal: bytes that every such line holds.
        pattern: searched in the line; its named groups become the fact's values.
        opens: the line begins a new "process" (a server starts) or a new "model" (a model is loaded).
    """

    name: str
    literal: bytes
    pattern: re.Pattern[str]
    opens: str | None = None


def row(name: str, literal: str, pattern: str | None = None, *, opens: str | None = None) -> Row:
    return Row(name, literal.encode(), re.compile(re.escape(literal) if pattern is None else pattern), opens)


@dataclass(frozen=True, slots=True)
class Hit:
    """A known line: which, where, whose."""

    row: Row
    match: re.Match[str]
    number: int  # of the line, from 1
    text: str
    stream: str  # the process that journald or compose names, else ""


def scan(file: BinaryIO, rows: Sequence[Row]) -> Iterator[Hit]:
    """Every known line of `file`, in order.

    A line that several rows know gives one hit per row. UTF-16 (a PowerShell redirection) and gzip are recognised.
    """
    by_literal: dict[bytes, list[Row]] = {}
    for r in rows:
        by_literal.setdefault(r.literal, []).append(r)
    before = 0  # lines before this chunk
    for chunk in _chunks(file):
        starts: dict[int, list[Row]] = {}
        for literal, same in by_literal.items():
            at = chunk.find(literal)
            while at >= 0:
                starts.setdefault(chunk.rfind(b"\n", 0, at) + 1, []).extend(same)
                end = chunk.find(b"\n", at)
                if end < 0:
                    break
                at = chunk.find(literal, end)
        number, counted = before + 1, 0
        for start in sorted(starts):
            number += chunk.count(b"\n", counted, start)
            counted = start
            yield from _hits(chunk, start, starts[start], number)
        before += chunk.count(b"\n")


def _hits(chunk: bytes, start: int, rows: Sequence[Row], number: int) -> Iterator[Hit]:
    end = chunk.find(b"\n", start)
    stop = min(len(chunk) if end < 0 else end, start + LONGEST_LINE)
    stream, text = plain(chunk[start:stop].decode("utf-8", errors="replace"))
    for r in rows:
        if match := r.pattern.search(text):
            yield Hit(r, match, number, text, stream)


def plain(line: str) -> tuple[str, str]:
    """(the process it is from, the line as the engine wrote it): without colours, journald's, Docker's and JSON's frames."""
    line = line.rstrip("\r\n")
    if line.startswith("{"):
        try:
            framed = json.loads(line)
        except ValueError:
            framed = None
        if isinstance(framed, dict):
            text = framed.get("log", framed.get("MESSAGE"))
            if isinstance(text, str):
                pid = framed.get("_PID")
                return (f"{framed.get('SYSLOG_IDENTIFIER', '')}[{pid}]" if pid else ""), _ANSI.sub("", text).rstrip("\r\n")
    line = _ANSI.sub("", line)
    if found := _JOURNAL.match(line):
        return found[1], line[found.end() :]
    if found := _COMPOSE.match(line):
        return found[1], line[found.end() :]
    return "", line


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """Pieces of whole lines, in UTF-8."""
    head = file.read(CHUNK_BYTES)
    if head[:2] == b"\x1f\x8b":
        file = io.BufferedReader(gzip.GzipFile(fileobj=io.BufferedReader(_Rest(head, file))))
        head = _read(file)
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(head[:2])
    rest = b""
    while head:
        if encoding:
            if len(head) % 2:
                head += file.read(1)
            head = head.decode(encoding, errors="replace").encode()
        piece = rest + head
        cut = piece.rfind(b"\n") + 1
        if not cut and len(piece) > CHUNK_BYTES:  # no line is this long
            cut = len(piece)
        if cut:
            yield piece[:cut]
        rest = piece[cut:]
        head = _read(file)
    if rest:
        yield rest


def _read(file: BinaryIO) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except (EOFError, gzip.BadGzipFile):  # a rotated file that was cut off: what came before it is read
        return b""


class _Rest(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self.head, self.file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, into: object) -> int:
        view = memoryview(into)  # type: ignore[arg-type]
        piece, self.head = (self.head[: len(view)], self.head[len(view) :]) if self.head else (self.file.read(len(view)), b"")
        view[: len(piece)] = piece
        return len(piece)
