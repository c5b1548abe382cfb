"""Model text → reasoning, tool calls and content, as it streams.

Nothing is lost: the `raw` texts of all parts, joined, are the text that was pushed. What looks like a call and cannot be
read comes out as content. A dialect is data: marks that move between channels, and how a call's text is read.
Sources: ai.google.dev/gemma/docs/core/prompt-formatting-gemma4; llama.cpp common/parsers/gemma4.cpp (stray channel marks);
Qwen3's, EXAONE 4's and Llama 3's own templates; openai/harmony docs/format.md.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Channel = Literal["content", "reasoning", "call", "mark", "header"]
_HUGE = 200_000  # characters of a JSON answer that is held back until it is known to be no call
_HEADER = re.compile(r"[\w .:=/<|>-]{0,256}")  # what may stand before `<|message|>`; other text is content


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; `arguments` is JSON text, as clients want it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one channel: `text` to show, `raw` as the model wrote it. A mark has no text; calls have `calls`."""

    channel: Channel
    text: str
    raw: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one kind of model writes.

    Args:
        marks: channel -> {mark: the channel after it}; in that channel, the mark is not shown.
        read: a call's text between its marks -> calls, or None where it cannot be read.
        inside: whether the beginning of a call's text ends within a text of its own, where a mark is none.
        bare: without marks, a whole answer that is JSON with a name is a call.
        call, end: the marks around a call.
        reasoning: the marks around a thought, and what else a thought begins with.
        header: the words before a message -> its channel, where messages have some.
    """

    name: str
    marks: dict[str, dict[str, Channel]]
    read: Callable[[str], tuple[Call, ...] | None]
    inside: Callable[[str], bool]
    bare: bool = False
    call: str | None = None
    end: str | None = None
    reasoning: tuple[str, str] | None = None
    header: Callable[[str], Channel] | None = None

    def speaks(self, token: str) -> bool:
        """Whether a control token is part of what is read here; others, such as a second <bos>, say nothing."""
        return token in _INSIDE or any(token in mark for marks in self.marks.values() for mark in marks)


def read_json(text: str) -> tuple[Call, ...] | None:
    """`{"name": ..., "arguments" or "parameters": {...}}`, or a list of them, or several one after another."""
    decoder, at, calls = json.JSONDecoder(), 0, list[Call]()
    text = text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return None
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None:
                return None
            calls.append(call)
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
    return tuple(calls) or None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    name = inner.get("name")
    arguments = next((inner[k] for k in ("arguments", "parameters") if k in inner), {})
    if not isinstance(name, str) or not name or not isinstance(arguments, dict | str):
        return None
    return Call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def inside_json(text: str) -> bool:
    """Whether a JSON value that begins like this is in the middle of a string."""
    found = text.count('"') - text.count(r"\"") if r"\\" not in text else sum(m[0] == '"' for m in _QUOTES.finditer(text))
    return found % 2 == 1


_QUOTES = re.compile(r'\\.|"', re.DOTALL)


def read_gemma4(text: str) -> tuple[Call, ...] | None:
    """`call:NAME{key:<|"|>text<|"|>,n:42,list:[...],object:{...}}`; words that are no literal are taken as text."""
    match = re.match(r"\s*call:\s*([^\s{}]+)\s*(?=\{)", text)
    if match is None:
        return None
    try:
        value, at = _gemma4_value(text, match.end(), 0)
    except (ValueError, IndexError):
        return None
    if text[at:].strip() or not isinstance(value, dict):
        return None
    return (Call(match[1], json.dumps(value, ensure_ascii=False)),)


_QUOTE = '<|"|>'
_INSIDE = (_QUOTE, "<|message|>", "<|constrain|>")  # control tokens within a call
_WORDS = {"true": True, "false": False, "null": None, "None": None, "nil": None, "True": True, "False": False}
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


def _gemma4_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends. Raises ValueError or IndexError where there is none."""
    if depth > 64:
        raise ValueError("nested too deeply")
    at = _space(text, at)
    if text.startswith(_QUOTE, at):
        stop = text.index(_QUOTE, at + len(_QUOTE))
        return text[at + len(_QUOTE) : stop], stop + len(_QUOTE)
    if text[at] == '"':
        return json.JSONDecoder().raw_decode(text, at)
    if text[at] == "[":
        items: list[Any] = []
        at = _space(text, at + 1)
        while text[at] != "]":
            item, at = _gemma4_value(text, at, depth + 1)
            items.append(item)
            at = _after(text, at, "]")
        return items, at + 1
    if text[at] == "{":
        found: dict[str, Any] = {}
        at = _space(text, at + 1)
        while text[at] != "}":
            if text.startswith((_QUOTE, '"'), at):
                key, at = _gemma4_value(text, at, depth + 1)
                at = _space(text, at)
            else:
                stop = text.index(":", at)
                key, at = text[at:stop].strip(), stop
            if text[at] != ":":
                raise ValueError("a key without a value")
            found[key], at = _gemma4_value(text, at + 1, depth + 1)
            at = _after(text, at, "}")
        return found, at + 1
    match = re.compile(r"[^,}\]]+").match(text, at)
    if match is None:
        raise ValueError("a value is missing")
    word = match[0].strip()
    if word in _WORDS:
        return _WORDS[word], match.end()
    return json.loads(word) if _NUMBER.fullmatch(word) and not re.match(r"-?0\d", word) else word, match.end()


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _after(text: str, at: int, close: str) -> int:
    """Past a comma, or at the closing bracket."""
    at = _space(text, at)
    if text[at] == ",":
        return _space(text, at + 1)
    if text[at] != close:
        raise ValueError(f"neither a comma nor {close}")
    return at


_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_PEOPLE = ("assistant", "user", "all")


def header_of_harmony(header: str) -> Channel:
    """The channel of `ROLE to=TOOL<|channel|>CHANNEL to=TOOL <|constrain|>TYPE`, where TOOL stands in one of two places or none."""
    match = _RECIPIENT.search(header)
    if match is not None and match[1] not in _PEOPLE:
        return "call"
    return "reasoning" if re.search(r"<\|channel\|>\s*analysis\b", header) else "content"


def read_harmony(text: str) -> tuple[Call, ...] | None:
    """`HEADER<|message|>ARGUMENTS`, where the header names the tool."""
    header, _, arguments = text.partition("<|message|>")
    match = _RECIPIENT.search(header)
    if match is None:
        return None
    arguments = arguments.strip()
    try:
        json.loads(arguments or "{}")
    except ValueError:
        return None
    return (Call(match[1], arguments or "{}"),)


_TAGS: dict[str, dict[str, Channel]] = {
    "content": {
        "<think>\n": "reasoning", "<think>": "reasoning", "<tool_call>": "call", "</think>": "content", "<|im_end|>": "content",
    },
    "reasoning": {
        **{f"{before}</think>{after}": "content" for before in ("", "\n") for after in ("", "\n", "\n\n")},
        "<tool_call>": "call",
    },
    "call": {"</tool_call>": "content", "</tool_call>\n": "content"},
}  # fmt: skip
_ENDS: dict[str, Channel] = {"<|end|>": "content", "<|return|>": "content", "<|call|>": "content", "<|start|>": "header"}
DIALECTS = {
    "gemma4": Dialect(
        name="gemma4",
        marks={
            "content": {
                "<|channel>thought\n": "reasoning", "<|channel>": "content", "<channel|>": "content", "<|tool_call>": "call",
                "<turn|>": "content", "<|tool_response>": "content",
            },
            "reasoning": {
                "\n<channel|>": "content", "<channel|>": "content", "<|tool_call>": "call", "<turn|>": "content",
                "<|channel>thought\n": "reasoning",
            },
            "call": {"<tool_call|>": "content"},
        },
        read=read_gemma4,
        inside=lambda text: text.count(_QUOTE) % 2 == 1,
        call="<|tool_call>",
        end="<tool_call|>",
        reasoning=("<|channel>thought\n", "<channel|>"),
    ),
    "tags": Dialect(
        name="tags",
        marks=_TAGS,
        read=read_json,
        inside=inside_json,
        call="<tool_call>",
        end="</tool_call>",
        reasoning=("<think>", "</think>"),
    ),
    "harmony": Dialect(
        name="harmony",
        marks={
            "content": {**_ENDS, "<|channel|>": "header", "<|message|>": "content"},
            "reasoning": {**_ENDS, "<|channel|>": "header"},
            "call": _ENDS,
            "header": {**_ENDS, "<|message|>": "content"},
        },
        read=read_harmony,
        inside=lambda text: inside_json(text.partition("<|message|>")[2]),
        reasoning=("<|channel|>analysis<|message|>", "<|end|>"),
        header=header_of_harmony,
    ),
    "llama3": Dialect(
        name="llama3",
        marks={"content": {"<|python_tag|>": "call", "<|eom_id|>": "content"}, "call": {"<|eom_id|>": "content"}},
        read=read_json,
        inside=inside_json,
        bare=True,
        call="<|python_tag|>",
    ),
    "json": Dialect(name="json", marks={"content": {}}, read=read_json, inside=inside_json, bare=True),
}  # fmt: skip


def dialect_of(template: str | None) -> Dialect:
    """The dialect that a chat template speaks, by the tokens it writes."""
    text = template or ""
    for mark, name in (
        ("<|tool_call>", "gemma4"),
        ("<|channel|>", "harmony"),
        ("<tool_call>", "tags"),
        ("<think>", "tags"),
        ("<|python_tag|>", "llama3"),
        ("<|start_header_id|>", "llama3"),
    ):
        if mark in text:
            return DIALECTS[name]
    return DIALECTS["json"]


@functools.lru_cache(maxsize=64)
def _search(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first mark, of several there the longest."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")


def _begins(text: str, marks: Iterable[str]) -> bool:
    return any(m.startswith(text) for m in marks)


@dataclass(slots=True)
class Parser:
    """Feeds on text, control tokens spelt out; gives parts.

    Args:
        tools: the request has tools; without any, what looks like a call is content.
        channel: where the prompt has left the model: "reasoning" after a template that opens a thought, "header" after one that
            opens a message.
        schema: content is JSON, so what a text in it holds is no mark.
        names: of the tools; an answer without marks is a call only to one of them. None: to any.
    """

    dialect: Dialect
    tools: bool = True
    channel: Channel = "content"
    names: Collection[str] | None = None
    schema: bool = False
    _text: str = ""
    _said: str = ""  # content so far, where it is JSON
    _opened: str = ""  # the mark that began a call
    _scanned: int = 0  # no mark begins before this character of a call's text
    _fresh: bool = True  # no content has been given out yet
    _headed: bool = False  # a mark has begun a header; before, what a header lacks is text

    def push(self, text: str) -> list[Part]:
        """The parts that became certain."""
        self._text += text
        return list(self._parts(final=False))

    def flush(self) -> list[Part]:
        """The rest, at the end of the answer."""
        return list(self._parts(final=True))

    def _parts(self, *, final: bool) -> Iterator[Part]:
        while self._text:
            if self.channel == "content" and self.dialect.bare and self.tools and self._fresh:
                part = self._bare(final)
                if part is not None:
                    self._text, self._fresh = "", False
                    yield part
                    return
                if self._fresh:
                    return
            found, mark = self._next_mark(final)
            if self.channel == "call":
                if mark is None:
                    if final:
                        text, self._text = self._text, ""
                        self.channel = "content"
                        yield self._read(text, "")
                    return
                text, self._text = self._text[:found], self._text[found + len(mark) :]
                self.channel = self.dialect.marks["call"][mark]
                yield self._read(text, mark)
                continue
            if self.channel == "header":
                header = self._text[:found]
                if (words := _HEADER.match(header)) is not None and words.end() < len(header):
                    header, self._text = self._text[: words.end() + 1], self._text[words.end() + 1 :]
                    self.channel, self._fresh = "content", False
                    yield Part("content", header, header)
                    continue
                if mark is None:
                    if final:
                        self._text = ""
                        yield Part("mark", "", header) if self._headed or "<|" in header else Part("content", header, header)
                    return
                self._text = self._text[found + len(mark) :]
                self.channel = self.dialect.marks["header"][mark]
                if mark == "<|message|>" and self.dialect.header is not None:
                    self.channel = self.dialect.header(header)
                if self.channel == "call":
                    self._opened = header + mark
                else:
                    yield Part("mark", "", header + mark)
                continue
            if found:
                text, self._text = self._text[:found], self._text[found:]
                self._fresh = self._fresh and not text.strip()
                if self.schema and self.channel == "content":
                    self._said += text
                yield Part(self.channel, text, text)
            if mark is None:
                return
            self.channel = self.dialect.marks[self.channel][mark]
            if self.channel == "header":
                self._headed = True
                if mark not in self.dialect.marks["header"]:  # it is the header's first word
                    continue
            self._text = self._text[len(mark) :]
            if self.channel == "call":
                self._opened = mark
            else:
                yield Part("mark", "", mark)
        if final and self.channel == "call":  # the text ended with the mark
            self.channel = "content"
            yield self._read("", "")

    def _next_mark(self, final: bool) -> tuple[int, str | None]:
        """How much text is certain, and the mark that follows it; None where none does yet.

        In a call a mark within a text counts only where the answer ends there and cannot be read otherwise.
        """
        marks, text, at = self.dialect.marks.get(self.channel, {}), self._text, 0 if final else self._scanned
        skipped: tuple[int, str] | None = None
        while (match := _search(tuple(marks)).search(text, at)) is not None:
            start = match.start()
            if not final and any(m != match[0] and m.startswith(text[start:]) for m in marks):
                return start, None  # a longer mark may still come of it
            if self.channel == "call" and self.dialect.inside(self._before + text[:start]):
                skipped = skipped or (start, match[0])
                at = start + 1
                continue
            if self.channel == "content" and self.schema and inside_json(self._said + text[:start]):
                at = start + 1
                continue
            self._scanned = 0
            return start, match[0]
        if final and skipped and self._calls(text) is None:
            return skipped
        longest = max(map(len, marks), default=1)
        certain = len(text)
        if not final:
            certain = next((i for i in range(max(at, certain - longest), certain) if _begins(text[i:], marks)), certain)
        self._scanned = certain if self.channel == "call" else 0
        return certain, None

    @property
    def _before(self) -> str:
        """What belongs to a call's text of the words that began it."""
        return self._opened if self.dialect.header is not None else ""

    def _calls(self, text: str) -> tuple[Call, ...] | None:
        return self.dialect.read(self._before + text) if self.tools else None

    def _read(self, text: str, mark: str) -> Part:
        calls = self._calls(text)
        raw, self._opened = self._opened + text + mark, ""
        return Part("content", raw, raw) if calls is None else Part("call", "", raw, calls)

    def _bare(self, final: bool) -> Part | None:
        """A whole answer in JSON as a call; None while it is not known, or, with `_fresh` unset, where it is none."""
        start = self._text.lstrip()
        if (start and start[0] not in "{[`<") or len(self._text) > _HUGE or start.startswith("<"):
            self._fresh = False
            return None
        if not final:
            return None
        body = re.sub(r"^```(?:json|tool_call)?\s*\n(.*?)\n?```\s*$", r"\1", start, flags=re.DOTALL)
        calls = self.dialect.read(body)
        if calls is None or (self.names is not None and not all(c.name in self.names for c in calls)):
            self._fresh = False
            return None
        return Part("call", "", self._text, calls)
