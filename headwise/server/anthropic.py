"""Anthropic's messages: a body → Ask, happenings → events or one message; count_tokens.

Unknown betas, cache_control, context_management and server tools are ignored. `signature` of a thought is empty: nothing
here signs. Source: anthropic-python 2.11 types; Claude Code 2.1.197, requests recorded against a scripted server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from headwise.server.ask import (
    Ask,
    Done,
    Failed,
    Happening,
    Opening,
    Refusal,
    Text,
    Thought,
    Tool,
    ToolCall,
    Usage,
    Waiting,
    arguments_of,
    bad,
    common_sampling,
    content_text,
    items,
    mapping,
    merged,
    new_id,
    stops,
    text,
)  # fmt: skip
from headwise.server.chat import choice_of, failure, schema_of
from headwise.server.stream import SSE, sse

MEDIA_TYPE = SSE
_STOP = {"stop": "end_turn", "length": "max_tokens", "calls": "tool_use"}
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
           413: "request_too_large", 503: "overloaded_error"}  # fmt: skip


def error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error. What is too long says so in the words that clients look for."""
    message = refusal.message
    if refusal.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": _ERRORS.get(refusal.status, "api_error"), "message": message}}


def parse(body: Mapping[str, Any]) -> Ask:
    """`POST /v1/messages`."""
    messages: list[dict[str, Any]] = []
    if system := content_text(body.get("system"), "system"):
        messages.append({"role": "system", "content": system})
    for message in items(body, "messages"):
        messages += _messages(mapping(message, "messages"))
    if not any(m["role"] != "system" for m in messages):
        raise bad("messages is empty", "messages")
    tools = tuple(_tools(items(body, "tools")))
    choice = body.get("tool_choice")
    choice = choice if isinstance(choice, Mapping) else {}
    thinking = body.get("thinking")
    kind = thinking.get("type") if isinstance(thinking, Mapping) else None
    config = body.get("output_config")
    config = config if isinstance(config, Mapping) else {}
    user = body.get("metadata")
    return Ask(
        model=text(body, "model"),
        messages=merged(messages),
        tools=tools,
        choice=choice_of(choice if choice.get("type") == "tool" else choice.get("type"), tools),
        parallel=choice.get("disable_parallel_tool_use") is not True,
        sampling=common_sampling(body, "max_tokens"),
        schema=schema_of(config.get("format") or body.get("output_format")),
        stop=stops(body.get("stop_sequences")),
        thinking={"enabled": True, "disabled": False, "adaptive": True}.get(str(kind)),
        effort=config.get("effort") if isinstance(config.get("effort"), str) else None,
        stream=bool(body.get("stream")),
        client=str(user.get("user_id") or "") if isinstance(user, Mapping) else "",
    )


def _tools(found: Iterable[Any]) -> Iterator[Tool]:
    """The client's own tools; server tools have a type and no schema, and are left out."""
    for tool in found:
        tool = mapping(tool, "tools")
        name, schema = tool.get("name"), tool.get("input_schema")
        if tool.get("type") in (None, "custom") and isinstance(name, str) and name:
            parameters = schema if isinstance(schema, Mapping) else {}
            description, strict = str(tool.get("description") or ""), tool.get("strict") is True
            yield Tool(name=name, wire=name, description=description, parameters=parameters, strict=strict)


def _messages(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A message of blocks as the template's messages: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad(f"a message has the role {role!r}", "messages")
    if not isinstance(content, list):
        yield {"role": role, "content": content_text(content, "messages")}
        return
    blocks = [mapping(b, "content") for b in content]
    for block in blocks:
        if block.get("type") == "tool_result":
            found = block.get("content")
            result = content_text(found, "tool_result")
            if block.get("is_error"):
                result = f"error: {result}"
            yield {"role": "tool", "content": result, "tool_call_id": str(block.get("tool_use_id", ""))}
    rest = [b for b in blocks if b.get("type") not in ("tool_result", "tool_use", "thinking", "redacted_thinking")]
    out: dict[str, Any] = {"role": role, "content": content_text(rest, "messages")}
    if thought := "".join(str(b.get("thinking", "")) for b in blocks if b.get("type") == "thinking"):
        out["reasoning_content"] = thought
    calls = [
        {"id": str(b.get("id", "")), "type": "function",
         "function": {"name": str(b.get("name", "")), "arguments": arguments_of(b.get("input"))}}
        for b in blocks
        if b.get("type") == "tool_use"
    ]  # fmt: skip
    if calls:
        out["tool_calls"] = calls
    if rest or calls or thought or not any(b.get("type") == "tool_result" for b in blocks):
        yield out


def _usage(u: Usage) -> dict[str, Any]:
    """Anthropic's input_tokens do not count what was read from the cache."""
    return {
        "input_tokens": u.prompt_tokens - u.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": u.cached_tokens,
        "output_tokens": u.tokens,
    }


class Messages:
    """Happenings → events. One content block is open at a time."""

    def __init__(self, ask: Ask, opening: Opening) -> None:
        self.opening = opening
        self.message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": opening.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens=opening.prompt_tokens)),
        }
        self.open: str | None = None

    def start(self) -> list[bytes]:
        return [sse({"type": "message_start", "message": self.message}, "message_start"), sse({"type": "ping"}, "ping")]

    def frames(self, happening: Happening) -> list[bytes]:
        match happening:
            case Waiting():
                return [sse({"type": "ping"}, "ping")]
            case Text(_, said):
                out = self._to("text", {"type": "text", "text": ""})
                self.message["content"][-1]["text"] += said
                return [*out, self._delta({"type": "text_delta", "text": said})]
            case Thought(_, said):
                out = self._to("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self.message["content"][-1]["thinking"] += said
                return [*out, self._delta({"type": "thinking_delta", "thinking": said})]
            case ToolCall(_, id_, name, arguments):
                out = self._close()
                out += self._to("tool_use", {"type": "tool_use", "id": id_, "name": name, "input": {}})
                self.message["content"][-1]["input"] = _object(arguments)
                return [*out, self._delta({"type": "input_json_delta", "partial_json": arguments}), *self._close()]
            case Done(_, reason, usage, stop):
                ended = {"stop_reason": "stop_sequence" if stop else _STOP[reason], "stop_sequence": stop}
                self.message |= {**ended, "usage": _usage(usage)}
                delta = {"type": "message_delta", "delta": ended, "usage": _usage(usage)}
                return [*self._close(), sse(delta, "message_delta"), sse({"type": "message_stop"}, "message_stop")]
            case Failed():
                return [sse(error(failure(happening)), "error")]

    def _to(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Opens a block of this kind, if it is not the open one."""
        if self.open == kind:
            return []
        out = self._close()
        self.message["content"].append(dict(block))
        self.open = kind
        index = len(self.message["content"]) - 1
        return [*out, sse({"type": "content_block_start", "index": index, "content_block": block}, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        index = len(self.message["content"]) - 1
        return sse({"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta")

    def _close(self) -> list[bytes]:
        if self.open is None:
            return []
        out = [self._delta({"type": "signature_delta", "signature": ""})] if self.open == "thinking" else []
        self.open = None
        index = len(self.message["content"]) - 1
        return [*out, sse({"type": "content_block_stop", "index": index}, "content_block_stop")]


def _object(arguments: str) -> Any:
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def whole(ask: Ask, opening: Opening, happened: Iterable[Happening]) -> dict[str, Any]:
    """One message. Raises Refusal where the request failed."""
    stream = Messages(ask, opening)
    for happening in happened:
        if isinstance(happening, Failed):
            raise failure(happening)
        stream.frames(happening)
    return stream.message
