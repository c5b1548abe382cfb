"""Tools and schemas → a Lark grammar for llguidance, in the syntax that the model was trained to write.

JSON is written with one space after commas and colons, as most models write it; free whitespace would let a small model
write nothing else. Gemma's arguments are not JSON: bare keys in sorted order, as its template prints them, and texts
between `<|"|>` tokens, which no text can contain. What a schema says beyond types, enums, properties, items and lengths
is not enforced in Gemma's syntax (`pattern`, `minimum`, `format`); in JSON llguidance enforces what it knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.text.parse import Dialect

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True, "coerce_one_of": True}
_BARE_KEY = re.compile(r"[A-Za-z_][\w.$-]*")
_QUOTE = '<|"|>'
_MOST_COUNTED = 2000  # characters that a length is enforced for; beyond, a grammar grows too large
_BASE = r"""
gemma_any: gemma_text | GEMMA_NUMBER | "true" | "false" | "null" | gemma_list | gemma_map
gemma_list: "[" (gemma_any ("," gemma_any)*)? "]"
gemma_map: "{" (GEMMA_KEY ":" gemma_any ("," GEMMA_KEY ":" gemma_any)*)? "}"
gemma_text: QUOTE_TOKEN ANYTHING QUOTE_TOKEN
GEMMA_KEY: /[A-Za-z_][A-Za-z0-9_]{0,40}/
GEMMA_NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/
GEMMA_INTEGER: /-?(0|[1-9][0-9]{0,15})/
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolShape:
    """A tool as a grammar sees it: its name for the model, its JSON schema, and for a freeform tool its own Lark grammar."""

    name: str
    parameters: Mapping[str, Any]
    lark: str | None = None


def json_grammar(schema: Mapping[str, Any], dialect: Dialect, token_id: Callable[[str], int | None], *, thinks: bool) -> str | None:
    """A grammar for an answer that is JSON by `schema`, after a thought if the model thinks; None for a dialect without one.

    Args:
        thinks: the answer may begin with a thought between the dialect's marks.
    """
    if dialect.name == "harmony":  # its channels stand around the answer
        return None
    lines = [f"answer: {_json(schema)}"]
    thought = _thought(dialect, token_id) if thinks else ""
    return "\n".join([f"start: {thought} answer", *lines, "ANYTHING: /(.|\\n)*/"])


def tool_grammar(
    tools: Sequence[ToolShape],
    dialect: Dialect,
    token_id: Callable[[str], int | None],
    *,
    required: bool,
    parallel: bool,
    thinks: bool,
    schema: Mapping[str, Any] | None = None,
) -> tuple[str, int | None] | None:
    """A grammar for calls, and the token that triggers it; None where this dialect's calls cannot be held to one.

    Args:
        required: the answer is calls, from its first token on; else a call is held to the grammar once it has begun.
        parallel: with `required`, several calls may follow each other.
        schema: with `required`, the answer is calls, or JSON by it.
    """
    trigger = token_id(dialect.call) if dialect.call else None
    if dialect.name == "harmony" or (trigger is None and not required):
        return None
    rules = _Rules(token_id)
    one = " | ".join(f"tool_{i}" for i in range(len(tools)))
    for i, tool in enumerate(tools):
        rules.lines[f"tool_{i}"] = _tool(tool, dialect, rules)
    lines = [*(f"{name}: {body}" for name, body in rules.lines.items()), "ANYTHING: /(.|\\n)*/"]
    if dialect.name == "gemma4":
        base = _BASE.replace("QUOTE_TOKEN", rules.token(_QUOTE))
        call, end = f'"call:" ({one})', rules.token("<tool_call|>")
        lines.append(base)
    elif dialect.call:
        call, end = f'"\\n{{\\"name\\": \\"" ({one}) "}}\\n"', rules.token(dialect.end or "")
    else:
        call, end = f'"{{\\"name\\": \\"" ({one}) "}}"', ""
    if not required:
        return "\n".join([f"start: {call} {end}", *lines]), trigger
    begin = rules.token(dialect.call) if dialect.call else ""
    thought = _thought(dialect, token_id) if thinks else ""
    more = " call*" if parallel and dialect.call else ""
    if schema is not None:
        lines.append(f"answer: {_json(schema)}")
    what = f"call{more}" if schema is None else f"(answer | call{more})"
    return "\n".join([f"start: {thought} {what}", f"call: {begin} {call} {end}", *lines]), None


def _thought(dialect: Dialect, token_id: Callable[[str], int | None]) -> str:
    """The optional thought before what is wanted; empty for a dialect whose marks are no single tokens."""
    ids = [token_id(mark) for mark in dialect.reasoning or ()]
    return "" if not ids or None in ids else f"(<[{ids[0]}]> ANYTHING <[{ids[1]}]> /\\n{{0,2}}/)?"


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _LAYOUT})


def _tool(tool: ToolShape, dialect: Dialect, rules: _Rules) -> str:
    if dialect.name == "gemma4":
        if tool.lark is not None:
            inner = rules.quoted("%lark {\n" + tool.lark + "\n}")
            return f'{_word(tool.name)} "{{input:" {inner} "}}"'
        return f"{_word(tool.name)} {rules.of(tool.parameters or {'type': 'object'}, tool.parameters)}"
    key = "arguments" if dialect.call else "parameters"
    schema = tool.parameters if tool.parameters.get("type") == "object" else {**tool.parameters, "type": "object"}
    return f"{_word(json.dumps(tool.name)[1:] + ', ' + json.dumps(key) + ': ')} {_json(schema)}"


def _word(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@dataclass(slots=True)
class _Rules:
    """Rules of Gemma's argument syntax, made as schemas ask for them."""

    token_id: Callable[[str], int | None]
    lines: dict[str, str] = field(default_factory=dict[str, str])
    named: dict[str, str] = field(default_factory=dict[str, str])  # a $ref -> its rule
    depth: int = 0

    def token(self, text: str) -> str:
        """A control token, or its letters in a vocabulary without it."""
        found = self.token_id(text)
        return _word(text) if found is None else f"<[{found}]>"

    def quoted(self, body: str) -> str:
        """A text between Gemma's quotes."""
        return f"{self.token(_QUOTE)} {body} {self.token(_QUOTE)}"

    def add(self, body: str) -> str:
        name = f"gemma_{len(self.lines)}"
        self.lines[name] = body
        return name

    def of(self, schema: Any, root: Mapping[str, Any]) -> str:
        """The rule for a value by `schema`; what is not understood is any value."""
        if not isinstance(schema, Mapping) or self.depth > 24:
            return "gemma_any"
        self.depth += 1
        try:
            return self._of(schema, root)
        finally:
            self.depth -= 1

    def _of(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        if isinstance(ref := schema.get("$ref"), str):
            if ref not in self.named:
                self.named[ref] = name = f"gemma_ref_{len(self.named)}"
                self.lines[name] = "gemma_any"
                self.lines[name] = self.of(_followed(ref, root), root)
            return self.named[ref]
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self.add(" | ".join(self.literal(v) for v in values)) if values else "gemma_any"
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(options := schema.get(key), list) and options and (key != "allOf" or len(options) == 1):
                return self.add(" | ".join(self.of(o, root) for o in options))
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            return self.add(" | ".join(self.of({**schema, "type": k}, root) for k in kind))
        match kind:
            case "string":
                return self._text(schema)
            case "integer":
                return "GEMMA_INTEGER"
            case "number":
                return "GEMMA_NUMBER"
            case "boolean":
                return self.add('"true" | "false"')
            case "null":
                return self.add('"null"')
            case "array":
                item = self.of(schema.get("items", {}), root)
                some = f'{item} ("," {item})*'
                return self.add(f'"[" {some} "]"' if schema.get("minItems") else f'"[" ({some})? "]"')
            case "object":
                return self._object(schema, root)
        return self._object(schema, root) if schema.get("properties") else "gemma_any"

    def _text(self, schema: Mapping[str, Any]) -> str:
        most, least = schema.get("maxLength"), schema.get("minLength") or 0
        if not isinstance(most, int) or most > _MOST_COUNTED or not isinstance(least, int) or least > most:
            return "gemma_text"
        terminal = f"TEXT_{len(self.lines)}"
        self.lines[terminal] = f"/(.|\\n){{{least},{most}}}/"
        return self.add(self.quoted(terminal))

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """Members in sorted order: the required ones, and of the others any."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return self.add('"{" "}"') if schema.get("additionalProperties") is False or properties == {} else "gemma_map"
        required = set(schema.get("required") or ())
        first, more = self.add('""'), self.add('""')  # what may follow: before any member is written, and after one
        for key in sorted(properties, key=lambda k: (str(k).lower(), k), reverse=True):
            name = _word(str(key)) if _BARE_KEY.fullmatch(str(key)) else self.quoted(_word(str(key)))
            member = self.add(f'{name} ":" {self.of(properties[key], root)}')
            if key in required:
                first, more = self.add(f"{member} {more}"), self.add(f'"," {member} {more}')
            else:
                first, more = self.add(f"{member} {more} | {first}"), self.add(f'"," {member} {more} | {more}')
        return self.add(f'"{{" {first} "}}"')

    def literal(self, value: Any) -> str:
        """A value as Gemma writes it."""
        if isinstance(value, str):
            return f"({self.quoted(_word(value) if value else '')})"
        if isinstance(value, list):
            return " ".join(['"["', ' "," '.join(map(self.literal, value)), '"]"'])
        if isinstance(value, Mapping):
            return "gemma_map"
        return _word(json.dumps(value))


def _followed(ref: str, root: Mapping[str, Any]) -> Any:
    """What `#/$defs/name` points at; an empty schema where nothing is."""
    found: Any = root
    for part in ref.removeprefix("#").strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or (key and key not in found):
            return {}
        found = found[key] if key else found
    return found
