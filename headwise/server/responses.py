"""OpenAI's Responses: a body → Ask, happenings → events with sequence numbers, or one response object.

Stateless: nothing is stored, the whole history comes with each request. Tools in a namespace have flat names for the model
(`namespace.name`) and their own on the wire. Thoughts are given as summary text, the form that Codex 0.169 shows.
Sources: openai-python 3.52 types/responses; Codex CLI 0.169.0, requests recorded against a scripted server.
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
    custom_grammar,
    custom_input,
    items,
    mapping,
    merged,
    new_id,
    number,
    text,
    thinking_of,
)  # fmt: skip
from headwise.server.chat import choice_of, error, failure, progress, schema_of
from headwise.server.stream import SSE, sse

MEDIA_TYPE = SSE
__all__ = ["MEDIA_TYPE", "Responses", "error", "parse", "whole"]


def parse(body: Mapping[str, Any]) -> Ask:
    """`POST /v1/responses`. Tools and items of a kind not known here are left out, never refused."""
    if body.get("previous_response_id"):
        raise bad("responses are not stored here: send the whole conversation as input", "previous_response_id")
    tools = tuple(_tools(items(body, "tools")))
    messages = list(_messages(body))
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, Mapping) else None
    form = body.get("text")
    form = form if isinstance(form, Mapping) else {}
    logprobs = number(body, "top_logprobs", 0, 20, whole=True)
    return Ask(
        model=text(body, "model"),
        messages=merged(messages),
        tools=tools,
        choice=choice_of(body.get("tool_choice"), tools),
        parallel=body.get("parallel_tool_calls") is not False,
        sampling=common_sampling(body, "max_output_tokens"),
        schema=schema_of(form.get("format")),
        thinking=thinking_of(effort),
        effort=effort,
        logprobs=logprobs if logprobs or "message.output_text.logprobs" in (body.get("include") or ()) else None,
        stream=bool(body.get("stream")),
        client=str(body.get("prompt_cache_key") or body.get("user") or ""),
        wire={
            "instructions": text(body, "instructions"),
            "tools": [dict(t) for t in items(body, "tools")],
            "tool_choice": body.get("tool_choice") or "auto",
            "text": dict(form) or {"format": {"type": "text"}},
            "reasoning": {"effort": effort, "summary": reasoning.get("summary") if isinstance(reasoning, Mapping) else None},
            "metadata": body.get("metadata") or {},
            "max_output_tokens": body.get("max_output_tokens"),
            "temperature": body.get("temperature"),
            "top_p": body.get("top_p"),
        },
    )


def _tools(found: Iterable[Any], namespace: str | None = None) -> Iterator[Tool]:
    for tool in found:
        tool = mapping(tool, "tools")
        kind, name = tool.get("type"), tool.get("name")
        if kind == "namespace" and isinstance(name, str) and namespace is None:
            yield from _tools(items(tool, "tools"), name)
        if kind not in ("function", "custom") or not isinstance(name, str) or not name:
            continue
        parameters = tool.get("parameters")
        yield Tool(
            name=f"{namespace}.{name}" if namespace else name,
            wire=name,
            namespace=namespace,
            description=str(tool.get("description") or ""),
            parameters=parameters if isinstance(parameters, Mapping) else {},
            custom=kind == "custom",
            lark=custom_grammar(tool.get("format")) if kind == "custom" else None,
            strict=tool.get("strict") is True,
        )


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The conversation; what the model said in several items becomes one message."""
    if instructions := text(body, "instructions"):
        yield {"role": "system", "content": instructions}
    given = body.get("input", "")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    said: dict[str, Any] | None = None
    for item in items(body, "input"):
        item = mapping(item, "input")
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            if said:
                yield said
                said = None
            role = item.get("role")
            if role not in ("system", "developer", "user"):
                raise bad(f"a message has the role {role!r}", "input")
            yield {"role": role, "content": content_text(item.get("content"), "input")}
        elif kind in ("function_call_output", "custom_tool_call_output"):
            if said:
                yield said
                said = None
            output = item.get("output")
            content = content_text(output, "output") if isinstance(output, str | list) else json.dumps(output)
            yield {"role": "tool", "content": content, "tool_call_id": str(item.get("call_id", ""))}
        elif kind in ("message", "reasoning", "function_call", "custom_tool_call"):
            said = said or {"role": "assistant", "content": ""}
            _add(said, kind, item)
    if said:
        yield said


def _add(said: dict[str, Any], kind: str, item: Mapping[str, Any]) -> None:
    if kind == "message":
        said["content"] += content_text(item.get("content"), "input")
    elif kind == "reasoning":
        thought = content_text(item.get("content"), "input") or content_text(item.get("summary"), "input")
        if thought:
            said["reasoning_content"] = said.get("reasoning_content", "") + thought
    else:
        name = str(item.get("name", ""))
        name = f"{item['namespace']}.{name}" if item.get("namespace") else name
        custom = kind == "custom_tool_call"
        arguments = {"input": str(item.get("input", ""))} if custom else arguments_of(item.get("arguments"))
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": {"name": name, "arguments": arguments}}
        said.setdefault("tool_calls", []).append(call)


def _usage(u: Usage) -> dict[str, Any]:
    return {
        "input_tokens": u.prompt_tokens,
        "input_tokens_details": {"cached_tokens": u.cached_tokens},
        "output_tokens": u.tokens,
        "output_tokens_details": {"reasoning_tokens": u.reasoning_tokens},
        "total_tokens": u.prompt_tokens + u.tokens,
    }


class Responses:
    """Happenings → events. An item is open while its text grows, and is closed by what comes after it."""

    def __init__(self, ask: Ask, opening: Opening) -> None:
        self.ask, self.opening = ask, opening
        self.sequence = 0
        self.item: dict[str, Any] | None = None  # the open one, as it will be when it is done
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(opening.created),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": opening.model,
            "output": [],
            "parallel_tool_calls": ask.parallel,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **ask.wire,
        }

    def start(self) -> list[bytes]:
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def frames(self, happening: Happening) -> list[bytes]:
        match happening:
            case Waiting():
                return [self._event("response.in_progress", response=self.response, prompt_progress=progress(happening))]
            case Text(_, said, logprobs):
                out = [] if self._is_open("message") else self._open_message()
                assert self.item is not None
                part = self.item["content"][0]
                part["text"] += said
                shown = [
                    {"token": p.text, "bytes": list(p.data), "logprob": p.logprob,
                     "top_logprobs": [{"token": t, "bytes": list(d), "logprob": x} for _, t, d, x in p.top]}
                    for p in logprobs
                ]  # fmt: skip
                part["logprobs"] += shown
                return [*out, self._of_part("response.output_text.delta", delta=said, logprobs=shown)]
            case Thought(_, said):
                out = [] if self._is_open("reasoning") else self._open_reasoning()
                assert self.item is not None
                self.item["summary"][0]["text"] += said
                return [*out, self._of_summary("response.reasoning_summary_text.delta", delta=said)]
            case ToolCall():
                return [*self._close(), *self._call(happening)]
            case Done(_, reason, usage):
                cut = reason == "length"
                out = self._close("incomplete" if cut else "completed")
                self.response |= {"status": "incomplete" if cut else "completed", "usage": _usage(usage)}
                if cut:
                    self.response["incomplete_details"] = {"reason": "max_output_tokens"}
                else:
                    self.response["completed_at"] = int(self.opening.created)
                return [*out, self._event(f"response.{self.response['status']}", response=self.response)]
            case Failed(message, retry, code):
                self.item = None
                code = "server_error" if retry else code if code == "context_length_exceeded" else "invalid_prompt"
                self.response |= {"status": "failed", "error": {"code": code, "message": message}}
                return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return sse(event, kind)

    def _is_open(self, kind: str) -> bool:
        return self.item is not None and self.item["type"] == kind

    @property
    def _at(self) -> dict[str, Any]:
        assert self.item is not None
        return {"item_id": self.item["id"], "output_index": len(self.response["output"])}

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, **self._at, content_index=0, **fields)

    def _of_summary(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, **self._at, summary_index=0, **fields)

    def _added(self, shown: dict[str, Any]) -> bytes:
        return self._event("response.output_item.added", output_index=len(self.response["output"]), item=shown)

    def _open_message(self) -> list[bytes]:
        out = self._close()
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.item = {"id": new_id("msg_"), "type": "message", "status": "completed", "role": "assistant", "content": [part]}
        added = self._added({**self.item, "status": "in_progress", "content": []})
        return [*out, added, self._of_part("response.content_part.added", part=dict(part, logprobs=[]))]

    def _open_reasoning(self) -> list[bytes]:
        out = self._close()
        part = {"type": "summary_text", "text": ""}
        self.item = {"id": new_id("rs_"), "type": "reasoning", "summary": [part], "encrypted_content": None}
        added = self._added({**self.item, "summary": []})
        return [*out, added, self._of_summary("response.reasoning_summary_part.added", part=dict(part))]

    def _close(self, status: str = "completed") -> list[bytes]:
        """Ends the open item, where there is one."""
        if self.item is None:
            return []
        if self.item["type"] == "message":
            part = self.item["content"][0]
            self.item["status"] = status
            out = [
                self._of_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._of_part("response.content_part.done", part=part),
            ]
        else:
            part = self.item["summary"][0]
            out = [
                self._of_summary("response.reasoning_summary_text.done", text=part["text"]),
                self._of_summary("response.reasoning_summary_part.done", part=part),
            ]
        return [*out, *self._done()]

    def _done(self) -> list[bytes]:
        event = self._event("response.output_item.done", output_index=len(self.response["output"]), item=self.item)
        self.response["output"].append(self.item)
        self.item = None
        return [event]

    def _call(self, call: ToolCall) -> list[bytes]:
        tool = self.ask.tool(call.name)
        if tool is not None and tool.custom:
            said = custom_input(call.arguments)
            self.item = {"id": new_id("ctc_"), "type": "custom_tool_call", "call_id": call.id, "name": tool.wire, "input": said}
            key, events = "input", "response.custom_tool_call_input"
        else:
            said = call.arguments
            self.item = {"id": new_id("fc_"), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": said}
            if tool is not None:
                self.item["name"] = tool.wire
            key, events = "arguments", "response.function_call_arguments"
        if tool is not None and tool.namespace:
            self.item["namespace"] = tool.namespace
        self.item["status"] = "completed"
        name = {"name": self.item["name"]} if key == "arguments" else {}
        return [
            self._added({**self.item, key: "", "status": "in_progress"}),
            self._event(f"{events}.delta", **self._at, delta=said),
            self._event(f"{events}.done", **self._at, **{key: said}, **name),
            *self._done(),
        ]


def whole(ask: Ask, opening: Opening, happened: Iterable[Happening]) -> dict[str, Any]:
    """One response object. Raises Refusal where the request failed."""
    stream = Responses(ask, opening)
    for happening in happened:
        if isinstance(happening, Failed):
            raise failure(happening)
        stream.frames(happening)
    return stream.response
