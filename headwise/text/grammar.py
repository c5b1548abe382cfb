"""Tools and schemas → Lark grammars for llguidance, in the syntax that the model was trained to write.

JSON is written with at most one space after commas and colons, as models write it; free whitespace would let a small model
write nothing else. Gemma's arguments are not JSON: bare keys in sorted order, as its template prints them, and texts
between `<|"|>` tokens, which no text can contain. What a schema says beyond types, enums, properties, items and lengths
is not enforced in Gemma's syntax (`pattern`, `minimum`, `format`); in JSON llguidance enforces what it knows.

A freeform tool's text stands as it is between Gemma's quotes, but escaped within a JSON string elsewhere, where its own
grammar cannot be nested: the grammar around it then has a token of no vocabulary, and `Grammar.texts` what holds there.

Thoughts are free but for the marks that would end them, spelt out: who reads the answer reads text.
Sources: llguidance 1.9 docs/syntax.md; openai/harmony docs/format.md; the templates of Gemma 4, Qwen3, EXAONE 4, Llama 3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwise.text.parse import Dialect
from headwise.text.tokenizer import Tokenizer

MOST_TEXTS = 128  # freeform tools with grammars in one request
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": True, "coerce_one_of": True}
_BARE_KEY = re.compile(r"[A-Za-z_][\w.$-]*")
_CONTROL = re.compile(r"(<[^<>\s]+>)")
_QUOTE = '<|"|>'
_MOST_COUNTED = 2000  # characters that a length is enforced for; beyond, a grammar grows too large
_GEMMA = r"""
gemma_any: gemma_text | GEMMA_NUMBER | "true" | "false" | "null" | gemma_list | gemma_map
gemma_list: "[" (gemma_any ("," gemma_any)*)? "]"
gemma_map: "{" (GEMMA_KEY ":" gemma_any ("," GEMMA_KEY ":" gemma_any)*)? "}"
GEMMA_KEY: /[A-Za-z_][A-Za-z0-9_]{0,40}/
GEMMA_NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/
GEMMA_INTEGER: /-?(0|[1-9][0-9]{0,15})/
"""
# An answer is held as a call once it begins like one; `other` is the shortest beginning that is none.
_BARE = r"""
other[lazy]: OTHER
OTHER: /(.|\n)+/ & ~/\s*(\{\s*("(n(a(m(e("\s*(:\s*)?)?)?)?)?)?)?)?/ & ~/\s*\{\s*"name"\s*:\s*"(.|\n)*/
NAME: /\s{0,9}\{\s{0,9}"name"\s{0,9}:\s{0,9}/
"""
_JSON = r"""
KEY_END: /: ?/
ITEM_END: /, ?/
LINE_END: /\n?/
SPACE: /\n{0,2}/
ANYTHING: /(.|\n)*/
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolShape:
    """A tool as a grammar sees it: its name for the model, its JSON schema, and for a freeform tool its own Lark grammar."""

    name: str
    parameters: Mapping[str, Any]
    lark: str | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """llguidance grammars (Lark) that an answer follows.

    Args:
        lark: from the first token to the end, if there is neither a trigger nor an opening.
        trigger: `lark` holds from this token on, until it is complete; again at the next.
        opening: a grammar that holds from the first token until it is complete; what follows is free but for the trigger.
        texts: grammars of texts that stand within a JSON string, escaped: the i-th where a grammar above has the token of id
            vocabulary size + i, which no model writes.
        thought_end: how a thought ends where that is no single token.
    """

    lark: str
    trigger: int | None = None
    opening: str | None = None
    texts: tuple[str, ...] = ()
    thought_end: str | None = None


def answer_grammar(
    dialect: Dialect,
    tokenizer: Tokenizer,
    *,
    tools: Sequence[ToolShape] = (),
    schema: Mapping[str, Any] | None = None,
    required: bool = False,
    parallel: bool = True,
    thinks: bool = False,
    opened: bool = False,
) -> Grammar | None:
    """The grammar of an answer; None where nothing is asked of it, or this vocabulary has no token that begins a call.

    Args:
        tools: that may be called.
        schema: the answer is JSON by it, or a call.
        required: the answer is calls. Else, and without a schema, a call is held to the grammar once it has begun.
        parallel: several calls may follow each other, where the dialect has that: harmony and JSON without marks have one.
        thinks: the answer may begin with a thought.
        opened: the prompt has begun a thought.
    """
    if not tools and schema is None:
        return None
    rules = _Rules(tokenizer, dialect)
    for i, tool in enumerate(tools):
        rules.lines[f"tool_{i}"] = rules.tool(tool)
    call = " | ".join(f"tool_{i}" for i in range(len(tools)))
    strict = required or schema is not None
    if dialect.name == "harmony":
        return _messages(rules, call, schema=None if required else schema, strict=strict, thinks=thinks)
    begin, end = rules.spelt(dialect.call or ""), rules.spelt(dialect.end or "")
    if dialect.name == "gemma4":
        body = f'"call:" ({call}) {end}'
        rules.fixed.append(_GEMMA)
        rules.lines["gemma_text"] = rules.quoted(rules.free(_QUOTE))
    else:
        body = f'"{{" "\\"name\\"" KEY_END ({call}) "}}"'
        if not dialect.bare:
            body = f"LINE_END {body} LINE_END {end}"
    if strict:
        answers = []
        if tools:
            answers.append(body if dialect.bare else f"{begin} {body}{f' (LINE_END {begin} {body})*' if parallel else ''}")
        if schema is not None and not required:
            answers.append(rules.json(schema))
        thought = rules.thought(opened=opened) if thinks or opened else ""
        return rules.grammar(f"start: {thought} ({' | '.join(answers)})")
    stop = "" if parallel and not dialect.bare else rules.stop(tokenizer.eos_ids)
    trigger = tokenizer.id(dialect.call) if dialect.call else None
    if dialect.bare:
        rules.fixed.append(_BARE)
        after = f'NAME ({call}) "}}" {stop}'
        marked = f"| {begin} {body} {stop}" if trigger is not None else ""
        return rules.grammar(f"start: {body} {stop}", trigger=trigger, opening=f"start: other ANYTHING | {after} {marked}")
    if trigger is None:
        rules.lines["before"] = rules.until(dialect.call or "")
        again = f"(before {body})*" if parallel else f"(before {body} {stop})?"
        return rules.grammar(f"start: {again} ANYTHING")
    return rules.grammar(f"start: {body} {stop}", trigger=trigger)


def _messages(rules: _Rules, call: str, *, schema: Mapping[str, Any] | None, strict: bool, thinks: bool) -> Grammar | None:
    """Harmony: an answer is messages, each with a header that says its channel and whom it calls; a call ends the answer."""
    channel, message, start = (rules.spelt(mark) for mark in ("<|channel|>", "<|message|>", "<|start|>"))
    if not strict:
        trigger = rules.tokenizer.id("<|start|>")
        rules.lines["message"] = f'{channel} ("analysis" | "commentary" | "final") {message} | ({call}) {rules.spelt("<|call|>")}'
        made = rules.grammar('start: "assistant" message', trigger=trigger, opening="start: message")
        return None if trigger is None else made
    answers = [call] if call else []
    if schema is not None:
        answers.append(f'{channel} "final" (" "? {rules.spelt("<|constrain|>")} "json")? {message} {rules.json(schema)}')
    thought = f'({rules.thought(opened=True, begun=True)} {start} "assistant")*' if thinks else ""
    return rules.grammar(f"start: {thought} ({' | '.join(answers)})")


def _word(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@dataclass(slots=True)
class _Rules:
    """The rules of one grammar, made as tools and schemas ask for them."""

    tokenizer: Tokenizer
    dialect: Dialect
    lines: dict[str, str] = field(default_factory=dict[str, str])
    fixed: list[str] = field(default_factory=lambda: [_JSON])
    texts: list[str] = field(default_factory=list[str])
    named: dict[tuple[int, str], str] = field(default_factory=dict[tuple[int, str], str])  # a tool's schema, a $ref -> its rule
    thought_end: str | None = None
    depth: int = 0

    def grammar(self, start: str, *, trigger: int | None = None, opening: str | None = None) -> Grammar:
        rest = [*(f"{name}: {body}" for name, body in self.lines.items()), *self.fixed]
        whole = "\n".join([start, *rest])
        return Grammar(whole, trigger, opening and "\n".join([opening, *rest]), tuple(self.texts), self.thought_end)

    def spelt(self, text: str) -> str:
        """A text of the dialect: its marks as control tokens, or as letters in a vocabulary without them."""
        parts = [(part, self.tokenizer.id(part)) for part in _CONTROL.split(text) if part]
        return " ".join(_word(part) if found is None else f"<[{found}]>" for part, found in parts)

    def stop(self, ids: Iterable[int]) -> str:
        """Nothing but the end of the answer."""
        return f"<[{','.join(map(str, sorted(ids)))}]>" if ids else ""

    def free(self, *marks: str, chars: str = "*") -> str:
        """A terminal: any text in which none of the marks is spelt out."""
        name = f"FREE_{len(self.lines)}"
        spelt = "|".join(re.escape(m).replace("/", r"\/").replace('\\"', '"') for m in sorted(marks))
        self.lines[name] = f"/(.|\\n){chars}/ & ~/(.|\\n)*({spelt})(.|\\n)*/"
        return name

    def until(self, mark: str, *others: str) -> str:
        """A rule: any text, and then the mark."""
        name = f"until_{len(self.lines)}"
        if self.tokenizer.id(mark) is not None:
            self.lines[name] = f"{self.free(mark, *others)} {self.spelt(mark)}"
        else:
            body = self.free(*others) if others else "ANYTHING"
            self.lines[f"{name}[suffix={_word(mark)}]"] = body
        return name

    def thought(self, *, opened: bool, begun: bool = False) -> str:
        """A thought; an optional one unless the prompt, or the grammar around it, has opened it (`begun`: its mark is to come)."""
        if self.dialect.reasoning is None:
            return ""
        mark, close = self.dialect.reasoning
        inside = {m.strip() for m in self.dialect.marks["reasoning"]} - {close}
        end = self.until(close, *inside)
        if self.tokenizer.id(close) is None:
            self.thought_end = close
        if begun:
            return f"{self.spelt(mark)} {end}"
        return f"{end} SPACE" if opened else f"({self.spelt(mark)} {end} SPACE)?"

    def json(self, schema: Mapping[str, Any]) -> str:
        return "%json " + json.dumps({**schema, "x-guidance": _LAYOUT})

    def tool(self, tool: ToolShape) -> str:
        """A call of one tool, from its name on; in harmony from the message's header on."""
        if self.dialect.name == "gemma4":
            if tool.lark is not None:
                inner = self.quoted("%lark {\n" + tool.lark + "\n}")
                return f'{_word(tool.name)} "{{input:" {inner} "}}"'
            return f"{_word(tool.name)} {self.of(tool.parameters or {'type': 'object'}, tool.parameters)}"
        if tool.lark is not None:
            text = f"<[{self.tokenizer.vocab_size + len(self.texts)}]>"
            self.texts.append(tool.lark)
            arguments = f'"{{" "\\"input\\"" KEY_END "\\"" {text} "\\"" "}}"'
        else:
            object_ = tool.parameters if tool.parameters.get("type") == "object" else {**tool.parameters, "type": "object"}
            arguments = self.json(object_)
        if self.dialect.name == "harmony":
            to, channel, typed = f" to=functions.{tool.name}", self.spelt("<|channel|>"), self.spelt("<|constrain|>")
            form = f'(" "? {typed} "json" | " json" | " code")?'  # gpt-oss writes all of them
            header = f'({channel} {_word("commentary" + to)} | {_word(to)} {channel} "commentary") {form}'
            return f"{header} {self.spelt('<|message|>')} {arguments}"
        name = _word(json.dumps(tool.name, ensure_ascii=False))
        key = "parameters" if self.dialect.bare else "arguments"
        return f"{name} ITEM_END {_word(json.dumps(key))} KEY_END {arguments}"

    def quoted(self, body: str) -> str:
        """A text between Gemma's quotes."""
        return f"{self.spelt(_QUOTE)} {body} {self.spelt(_QUOTE)}"

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
            which = (id(root), ref)
            if which not in self.named:
                self.named[which] = name = f"gemma_ref_{len(self.named)}"
                self.lines[name] = "gemma_any"
                self.lines[name] = self.of(_followed(ref, root), root)
            return self.named[which]
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
                return self._array(self.of(schema.get("items", {}), root), schema)
            case "object":
                return self._object(schema, root)
        return self._object(schema, root) if schema.get("properties") else "gemma_any"

    def _array(self, item: str, schema: Mapping[str, Any]) -> str:
        least, most = _counts(schema, "minItems", "maxItems") or (0, None)
        if most == 0:
            return self.add('"[" "]"')
        some = f'{item} ("," {item}){_times(max(0, least - 1), None if most is None else most - 1)}'
        return self.add(f'"[" {some} "]"' if least else f'"[" ({some})? "]"')

    def _text(self, schema: Mapping[str, Any]) -> str:
        counts = _counts(schema, "minLength", "maxLength")
        return self.add(self.quoted(self.free(_QUOTE, chars=_times(*counts)))) if counts else "gemma_text"

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """Members in sorted order: the required ones, and of the others any."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return self.add('"{" "}"') if schema.get("additionalProperties") is False or properties == {} else "gemma_map"
        required = set(schema.get("required") or ())
        first, more = self.add('""'), self.add('""')  # what may follow: before any member is written, and after one
        for key in sorted(properties, key=lambda k: (str(k).lower(), k), reverse=True):
            member = self.add(f'{self.key(str(key))} ":" {self.of(properties[key], root)}')
            if key in required:
                first, more = self.add(f"{member} {more}"), self.add(f'"," {member} {more}')
            else:
                first, more = self.add(f"{member} {more} | {first}"), self.add(f'"," {member} {more} | {more}')
        return self.add(f'"{{" {first} "}}"')

    def key(self, key: str) -> str:
        return _word(key) if _BARE_KEY.fullmatch(key) else self.quoted(_word(key))

    def literal(self, value: Any) -> str:
        """A value as Gemma writes it."""
        if isinstance(value, str):
            return f"({self.quoted(_word(value) if value else '')})"
        if isinstance(value, list):
            return " ".join(['"["', ' "," '.join(map(self.literal, value)), '"]"'])
        if isinstance(value, Mapping):
            return " ".join(['"{"', ' "," '.join(f'{self.key(k)} ":" {self.literal(value[k])}' for k in sorted(value)), '"}"'])
        return _word(json.dumps(value))


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _counts(schema: Mapping[str, Any], least_key: str, most_key: str) -> tuple[int, int | None] | None:
    """Least and most of a length; None where the schema says nothing that a grammar can count."""
    least, most = schema.get(least_key) or 0, schema.get(most_key)
    if not isinstance(least, int) or not 0 <= least <= _MOST_COUNTED:
        return None
    if not isinstance(most, int) or not least <= most <= _MOST_COUNTED:
        return (least, None) if least else None
    return least, most


def _followed(ref: str, root: Mapping[str, Any]) -> Any:
    """What `#/$defs/name` points at; an empty schema where nothing is."""
    found: Any = root
    for part in ref.removeprefix("#").strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or (key and key not in found):
            return {}
        found = found[key] if key else found
    return found
