"""What every protocol asks for, and what is answered: the values between parsing and rendering.

A parser turns a body into an Ask or raises Refusal; a renderer turns Happenings into its protocol's frames.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headwise.text.grammar import ToolShape


class Refusal(Exception):
    """A request that cannot be served: HTTP status, a code that clients know, and a sentence."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param


def bad(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, "invalid_request_error", message, param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that may be called.

    Args:
        name: for the model, flat: `namespace.name` where it lies in a namespace.
        wire: its own name; `namespace`: of the Responses protocol.
        custom: freeform, its one argument is a text; `lark` its grammar, where it has one.
        strict: the client counts on arguments by its schema.
    """

    name: str
    wire: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    namespace: str | None = None
    custom: bool = False
    lark: str | None = None
    strict: bool = False

    def shape(self) -> ToolShape:
        return ToolShape(name=self.name, parameters=self.schema, lark=self.lark)

    @property
    def schema(self) -> Mapping[str, Any]:
        if self.custom:
            return {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return self.parameters

    def for_template(self) -> dict[str, Any]:
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": dict(self.schema)},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, whatever protocol it came in.

    Args:
        messages: for the chat template: role, content (text), reasoning_content, tool_calls, tool_call_id.
        prompt: in place of messages, a text or token ids to continue.
        choice: auto, none, required, or a tool's flat name.
        sampling: max_tokens, temperature, ... as given; what is absent takes the model's own suggestion.
        schema: the answer is JSON that follows it.
        thinking: None leaves it to the template.
        client: requests of one client wait for each other, those of several take turns.
        context: tokens of prompt and answer that the model must hold; None: as many as it was, or will be, loaded with.
        keep_s: seconds for which the model stays loaded after this request; None: not said.
        wire: what the renderer must repeat or know.
    """

    model: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    parallel: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schema: Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    thinking: bool | None = None
    effort: str | None = None
    stream: bool = False
    client: str = ""
    context: int | None = None
    keep_s: float | None = None
    wire: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def tool(self, name: str) -> Tool | None:
        return next((t for t in self.tools if t.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token of the answer: its text, its bytes, its log-probability, and the best ones there."""

    id: int
    text: str
    data: bytes
    logprob: float
    top: tuple[tuple[int, str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing to show yet: in the queue, or `done` of `total` prompt tokens computed."""

    choice: int
    stage: Literal["queue", "prefill", "decode"]
    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Text:
    choice: int
    text: str
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Thought:
    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    choice: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end of one choice. `stop` is the stop text that ended it, where one did."""

    choice: int
    reason: Literal["stop", "length", "calls"]
    usage: Usage
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of the request by an error. `retry`: the engine was at fault. `code`: as of a `Refusal`."""

    message: str
    retry: bool
    code: str = "invalid_request_error"


Happening = Waiting | Text | Thought | ToolCall | Done | Failed


@dataclass(frozen=True, slots=True)
class Opening:
    """What a renderer knows at the start."""

    model: str
    prompt_tokens: int
    created: float = field(default_factory=time.time)


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"


# How values are taken out of a body: a wrong type is the client's error, never ours.


def number(body: Mapping[str, Any], key: str, least: float, most: float, *, whole: bool = False) -> Any:
    """A number or None. Raises Refusal where it is something else or out of range."""
    value = body.get(key)
    if value is None:
        return None
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and not math.isfinite(value))
    if wrong or (whole and value != int(value)):
        raise bad(f"{key} must be {'an integer' if whole else 'a number'}, not {json.dumps(value)[:60]}", key)
    if not least <= value <= most:
        raise bad(f"{key} is {value}; it must lie from {least:g} to {most:g}", key)
    return int(value) if whole else float(value)


def text(body: Mapping[str, Any], key: str) -> str | None:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise bad(f"{key} must be a text", key)
    return value


def items(body: Mapping[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad(f"{key} must be a list", key)
    return value


def mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise bad(f"{key} must be an object", key)
    return value


def stops(value: Any) -> tuple[str, ...]:
    """Stop texts: one, or a list."""
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise bad("stop must be a text or a list of texts", "stop")
    return tuple(s for s in found if s)


def common_sampling(body: Mapping[str, Any], *max_keys: str) -> dict[str, Any]:
    """The settings that OpenAI's protocols and their extensions share; absent ones are left out."""
    found = {
        "temperature": number(body, "temperature", 0.0, 100.0),
        "top_p": number(body, "top_p", 0.0, 1.0),
        "top_k": number(body, "top_k", -1, 2**31, whole=True),
        "min_p": number(body, "min_p", 0.0, 1.0),
        "seed": number(body, "seed", -(2**63), 2**63 - 1, whole=True),
        "presence_penalty": number(body, "presence_penalty", -2.0, 2.0),
        "frequency_penalty": number(body, "frequency_penalty", -2.0, 2.0),
    }
    for key in max_keys:
        found["max_tokens"] = found.get("max_tokens") or number(body, key, 0, 2**31, whole=True)
    return {k: v for k, v in found.items() if v is not None}


def content_text(value: Any, where: str = "content") -> str:
    """The text of a message's content: a text, nothing, or parts of which the texts are joined.

    Raises:
        Refusal: a picture, a sound or a file, which no model here can read yet.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(f"{where} must be a text or a list of parts", where)
    out: list[str] = []
    for part in value:
        if isinstance(part, str):
            out.append(part)
            continue
        kind = mapping(part, where).get("type", "text")
        if isinstance(found := part.get("text", part.get("refusal")), str):
            out.append(found)
        elif "image" in str(kind) or "audio" in str(kind) or "file" in str(kind) or kind in ("document", "video"):
            raise Refusal(400, "unsupported_content", f"{where} holds a part of type {kind}; headwise reads text only", param=where)
    return "".join(out)


def arguments_of(value: Any) -> Any:
    """Arguments of an earlier call for the template: an object where they are one, else as they came."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.strip() else {}
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    return value if isinstance(value, Mapping) else {}


def custom_input(arguments: str) -> str:
    """The one text of a call to a custom tool."""
    said = arguments_of(arguments)
    return str(said.get("input", "")) if isinstance(said, Mapping) else str(said)


def custom_grammar(form: Any) -> str | None:
    """The Lark grammar of a custom tool's `format`: as it is given, or of its regular expression; None where any text will do."""
    if not isinstance(form, Mapping):
        return None
    inner = form.get("grammar")
    form = inner if isinstance(inner, Mapping) else form
    definition = form.get("definition")
    if not isinstance(definition, str):
        return None
    if form.get("syntax") == "regex":
        body = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", definition).replace("\n", "\\n")
        return f"start: /{body}/"
    return definition if form.get("syntax") == "lark" else None


def thinking_of(effort: Any) -> bool | None:
    """OpenAI's efforts: none and minimal think not; the others do; absent, the template decides."""
    if effort is None:
        return None
    if not isinstance(effort, str):
        raise bad("reasoning effort must be a text", "reasoning_effort")
    return effort not in ("none", "minimal", "off")


def merged(messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """`developer` becomes `system`, and the system messages at the start become one: templates have one system turn."""
    out: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        message = {**message, "role": role}
        if role == "system" and len(out) == 1 and out[0]["role"] == "system":
            out[0]["content"] = "\n\n".join(t for t in (out[0]["content"], message["content"]) if t)
        else:
            out.append(message)
    return tuple(out)
