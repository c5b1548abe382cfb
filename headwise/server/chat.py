"""OpenAI's chat completions and completions: a body → Ask, happenings → chunks or one object.

Beside OpenAI's fields the answers carry `reasoning` and `reasoning_content` (both spellings are in use), llama.cpp's
`prompt_progress` and `timings`, and the settings `top_k`, `min_p` and `chat_template_kwargs.enable_thinking`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headwise.server.ask import (
    Ask,
    Done,
    Failed,
    Happening,
    Logprob,
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
    custom_grammar,
    custom_input,
    items,
    mapping,
    merged,
    new_id,
    number,
    stops,
    text,
    thinking_of,
)  # fmt: skip
from headwise.server.stream import SSE, SSE_END, sse

MEDIA_TYPE = SSE
MOST_CHOICES = 16
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FINISH = {"stop": "stop", "length": "length", "calls": "tool_calls"}


def error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    code = None if refusal.code == "invalid_request_error" else refusal.code
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": code}}


def parse(body: Mapping[str, Any]) -> Ask:
    """`POST /v1/chat/completions`. Unknown keys are ignored, as OpenAI's clients send new ones every month."""
    messages = [_message(mapping(m, "messages")) for m in items(body, "messages")]
    if not messages:
        raise bad("messages is empty", "messages")
    tools = tuple(tool for t in items(body, "tools") if (tool := tool_of(mapping(t, "tools"))))
    template = body.get("chat_template_kwargs")
    switch = template.get("enable_thinking") if isinstance(template, Mapping) else None
    effort = body.get("reasoning_effort")
    logprobs = number(body, "top_logprobs", 0, 20, whole=True) if body.get("logprobs") else None
    return Ask(
        model=text(body, "model"),
        messages=merged(messages),
        tools=tools,
        choice=choice_of(body.get("tool_choice"), tools),
        parallel=body.get("parallel_tool_calls") is not False,
        sampling=common_sampling(body, "max_completion_tokens", "max_tokens") | _bias(body),
        schema=schema_of(body.get("response_format")),
        stop=stops(body.get("stop")),
        n=number(body, "n", 1, MOST_CHOICES, whole=True) or 1,
        logprobs=(logprobs or 0) if body.get("logprobs") else None,
        thinking=switch if isinstance(switch, bool) else thinking_of(effort),
        effort=effort,
        stream=bool(body.get("stream")),
        client=str(body.get("prompt_cache_key") or body.get("user") or ""),
        wire={"usage": bool(_options(body).get("include_usage"))},
    )


def parse_completion(body: Mapping[str, Any]) -> Ask:
    """`POST /v1/completions`: one prompt, a text or token ids."""
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise bad("prompt must be one text, or one list of token ids", "prompt")
    for key in ("suffix", "echo"):
        if body.get(key):
            raise bad(f"{key} is not supported", key)
    return Ask(
        model=text(body, "model"),
        prompt=prompt,
        sampling={"max_tokens": 16} | common_sampling(body, "max_tokens") | _bias(body),
        schema=schema_of(body.get("response_format")),
        stop=stops(body.get("stop")),
        n=number(body, "n", 1, MOST_CHOICES, whole=True) or 1,
        logprobs=number(body, "logprobs", 0, 20, whole=True),
        stream=bool(body.get("stream")),
        client=str(body.get("prompt_cache_key") or body.get("user") or ""),
        wire={"usage": bool(_options(body).get("include_usage")), "ids": bool(body.get("return_tokens_as_token_ids"))},
    )


def _options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    found = body.get("stream_options")
    return found if isinstance(found, Mapping) else {}


def _bias(body: Mapping[str, Any]) -> dict[str, Any]:
    found = body.get("logit_bias") or {}
    try:
        biases = {int(k): float(v) for k, v in mapping(found, "logit_bias").items()} if found else {}
    except (TypeError, ValueError, OverflowError) as fault:
        raise bad("logit_bias must map token ids to numbers", "logit_bias") from fault
    if not all(-100.0 <= bias <= 100.0 for bias in biases.values()):  # also of what is no number: an infinite logit has no chance
        raise bad("a bias of logit_bias must lie from -100 to 100", "logit_bias")
    return {"logit_bias": biases} if biases else {}


def _message(m: Mapping[str, Any]) -> dict[str, Any]:
    role = m.get("role")
    if role not in _ROLES:
        raise bad(f"a message has the role {role!r}; known are {', '.join(_ROLES)}", "messages")
    out: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": content_text(m.get("content"), "messages")}
    if role == "assistant":
        thought = m.get("reasoning_content") or m.get("reasoning") or m.get("thinking")
        if isinstance(thought, str):
            out["reasoning_content"] = thought
        calls = [mapping(c, "tool_calls") for c in items(m, "tool_calls")]
        if calls:
            out["tool_calls"] = [_earlier_call(c) for c in calls]
    for key in ("tool_call_id", "name"):
        if isinstance(m.get(key), str):
            out[key] = m[key]
    return out


def _earlier_call(call: Mapping[str, Any]) -> dict[str, Any]:
    custom = call.get("custom")
    inner = mapping(call.get("function") or custom or {}, "tool_calls")
    arguments = {"input": str(inner.get("input", ""))} if custom else arguments_of(inner.get("arguments"))
    return {
        "id": str(call.get("id", "")),
        "type": "function",
        "function": {"name": str(inner.get("name", "")), "arguments": arguments},
    }


def tool_of(tool: Mapping[str, Any]) -> Tool | None:
    """A function or a custom tool; other kinds run on OpenAI's servers and are left out."""
    kind = tool.get("type", "function")
    if kind not in ("function", "custom"):
        return None
    f = mapping(tool.get(kind, tool), "tools")
    name = f.get("name")
    if not isinstance(name, str) or not name:
        raise bad("a tool has no name", "tools")
    parameters = f.get("parameters")
    return Tool(
        name=name,
        wire=name,
        description=str(f.get("description") or ""),
        parameters=parameters if isinstance(parameters, Mapping) else {},
        custom=kind == "custom",
        lark=custom_grammar(f.get("format")) if kind == "custom" else None,
        strict=f.get("strict") is True,
    )


def choice_of(value: Any, tools: Iterable[Tool]) -> str:
    """auto, none, required, or the flat name of the tool that is named."""
    if isinstance(value, Mapping):
        inner = next((value[k] for k in ("function", "custom") if isinstance(value.get(k), Mapping)), value)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        found = next((t.name for t in tools if name in (t.name, t.wire)), None)
        if value.get("type") in ("function", "custom", "tool") and found is None:
            raise bad(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
        return found or "auto"
    return {"none": "none", "required": "required", "any": "required"}.get(str(value), "auto")


def schema_of(value: Any) -> Mapping[str, Any] | None:
    """The JSON schema of `response_format` or `text.format`; json_object is any object."""
    if not isinstance(value, Mapping):
        return None
    if value.get("type") == "json_object":
        return {"type": "object"}
    if value.get("type") != "json_schema":
        return None
    inner = value.get("json_schema") if isinstance(value.get("json_schema"), Mapping) else value
    return mapping(inner.get("schema") if isinstance(inner, Mapping) else None, "schema")


def usage_json(usages: Iterable[Usage]) -> dict[str, Any]:
    """The prompt counts once, whatever the number of choices."""
    all_ = list(usages)
    prompt, tokens = max((u.prompt_tokens for u in all_), default=0), sum(u.tokens for u in all_)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": min((u.cached_tokens for u in all_), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in all_)},
    }


def timings(u: Usage) -> dict[str, Any]:
    """As llama-server's; milliseconds, and tokens per second without the first token's prefill."""
    fresh = u.prompt_tokens - u.cached_tokens
    return {
        "cache_n": u.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": u.prefill_s * 1e3,
        "prompt_per_second": fresh / u.prefill_s if u.prefill_s else None,
        "predicted_n": u.tokens,
        "predicted_ms": u.decode_s * 1e3,
        "predicted_per_second": (u.tokens - 1) / u.decode_s if u.decode_s and u.tokens > 1 else None,
        "queue_ms": u.queue_s * 1e3,
    }


def progress(w: Waiting) -> dict[str, Any]:
    """As llama-server's `prompt_progress`, with the stage."""
    return {"stage": w.stage, "total": w.total, "cache": w.cached, "processed": w.done}


def _chat_logprobs(found: Iterable[Logprob]) -> dict[str, Any] | None:
    def one(spelt: str, data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": spelt, "bytes": list(data), "logprob": logprob}

    content = [one(p.text, p.data, p.logprob) | {"top_logprobs": [one(t, d, x) for _, t, d, x in p.top]} for p in found]
    return {"content": content, "refusal": None} if content else None


class Chat:
    """Happenings → chunks of a chat completion."""

    def __init__(self, ask: Ask, opening: Opening) -> None:
        self.ask, self.opening, self.id = ask, opening, new_id("chatcmpl-")
        self.usages: list[Usage] = []
        self.calls: dict[int, int] = {}

    def start(self) -> list[bytes]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.ask.n)]

    def frames(self, happening: Happening) -> list[bytes]:
        match happening:
            case Waiting(choice):
                return [self._chunk(choice, {}, prompt_progress=progress(happening))]
            case Text(choice, said, logprobs):
                return [self._chunk(choice, {"content": said}, logprobs=logprobs)]
            case Thought(choice, said):
                return [self._chunk(choice, {"reasoning": said, "reasoning_content": said})]
            case ToolCall(choice, id_, name, arguments):
                index = self.calls[choice] = self.calls.get(choice, -1) + 1
                kind, key, said = _said_to(self.ask, name, arguments)
                head = {"index": index, "id": id_, "type": kind, kind: {"name": name, key: ""}}
                rest = {"index": index, kind: {key: said}}
                return [self._chunk(choice, {"tool_calls": [part]}) for part in (head, rest)]
            case Done(choice, reason, usage):
                self.usages.append(usage)
                out = [self._chunk(choice, {}, finish=_FINISH[reason], timings=timings(usage))]
                if len(self.usages) == self.ask.n:
                    if self.ask.wire.get("usage"):
                        out.append(sse(self._frame() | {"choices": [], "usage": usage_json(self.usages)}))
                    out.append(SSE_END)
                return out
            case Failed():
                return [sse(error(failure(happening)))]

    def _frame(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": int(self.opening.created),
            "model": self.opening.model,
            "system_fingerprint": None,
        }

    def _chunk(
        self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Iterable[Logprob] = (), **more: Any
    ) -> bytes:
        shown = {"index": choice, "delta": delta, "logprobs": _chat_logprobs(logprobs), "finish_reason": finish}
        return sse(self._frame() | {"choices": [shown]} | more)


def _said_to(ask: Ask, name: str, arguments: str) -> tuple[str, str, str]:
    """The kind of the tool that is called, the key of what it is given, and that."""
    tool = ask.tool(name)
    custom = tool is not None and tool.custom
    return ("custom", "input", custom_input(arguments)) if custom else ("function", "arguments", arguments)


def failure(failed: Failed) -> Refusal:
    return Refusal(503 if failed.retry else 400, "server_error" if failed.retry else failed.code, failed.message)


def whole(ask: Ask, opening: Opening, happened: Iterable[Happening]) -> dict[str, Any]:
    """One chat completion. Raises Refusal where the request failed."""
    choices = []
    all_ = list(happened)
    _raise_failed(all_)
    dones = [h for h in all_ if isinstance(h, Done)]
    for i in range(ask.n):
        mine = [h for h in all_ if not isinstance(h, Failed) and h.choice == i]
        said_to = ((h, *_said_to(ask, h.name, h.arguments)) for h in mine if isinstance(h, ToolCall))
        calls = [{"id": h.id, "type": kind, kind: {"name": h.name, key: given}} for h, kind, key, given in said_to]
        said = "".join(h.text for h in mine if isinstance(h, Text))
        thought = "".join(h.text for h in mine if isinstance(h, Thought))
        message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None, "refusal": None}
        if thought:
            message |= {"reasoning": thought, "reasoning_content": thought}
        if calls:
            message["tool_calls"] = calls
        reason = next(d.reason for d in dones if d.choice == i)
        logprobs = _chat_logprobs(p for h in mine if isinstance(h, Text) for p in h.logprobs)
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": _FINISH[reason]})
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(opening.created),
        "model": opening.model,
        "system_fingerprint": None,
        "choices": choices,
        "usage": usage_json(d.usage for d in dones),
        "timings": timings(dones[0].usage),
    }


def _raise_failed(happened: Iterable[Happening]) -> None:
    failed = next((h for h in happened if isinstance(h, Failed)), None)
    if failed is not None:
        raise failure(failed)


def _old_logprobs(found: Iterable[Logprob], offset: int, *, ids: bool) -> dict[str, Any] | None:
    """The completions protocol's lists. Source: vLLM 0.33 for `token_id:N` names."""
    all_ = list(found)
    if not all_:
        return None

    def name(id_: int, spelt: str) -> str:
        return f"token_id:{id_}" if ids else spelt

    offsets = []
    for p in all_:
        offsets.append(offset)
        offset += len(p.text)
    return {
        "tokens": [name(p.id, p.text) for p in all_],
        "token_logprobs": [p.logprob for p in all_],
        "top_logprobs": [{name(i, t): x for i, t, _, x in p.top} for p in all_],
        "text_offset": offsets,
    }


class Completion:
    """Happenings → chunks of a completion."""

    def __init__(self, ask: Ask, opening: Opening) -> None:
        self.ask, self.opening, self.id = ask, opening, new_id("cmpl-")
        self.usages: list[Usage] = []
        self.offset: dict[int, int] = {}

    def start(self) -> list[bytes]:
        return [self._chunk(i, "") for i in range(self.ask.n)]

    def frames(self, happening: Happening) -> list[bytes]:
        match happening:
            case Waiting(choice):
                return [self._chunk(choice, "", prompt_progress=progress(happening))]
            case Text(choice, said, logprobs):
                offset = self.offset.get(choice, 0)
                self.offset[choice] = offset + len(said)
                return [self._chunk(choice, said, logprobs=_old_logprobs(logprobs, offset, ids=bool(self.ask.wire.get("ids"))))]
            case Done(choice, reason, usage):
                self.usages.append(usage)
                out = [self._chunk(choice, "", finish="length" if reason == "length" else "stop", timings=timings(usage))]
                if len(self.usages) == self.ask.n:
                    if self.ask.wire.get("usage"):
                        out.append(sse(self._frame() | {"choices": [], "usage": usage_json(self.usages)}))
                    out.append(SSE_END)
                return out
            case Failed():
                return [sse(error(failure(happening)))]
        return []  # a continued text has neither thoughts nor calls

    def _frame(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": int(self.opening.created), "model": self.opening.model}

    def _chunk(self, choice: int, said: str, finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        return sse(
            self._frame() | {"choices": [{"index": choice, "text": said, "logprobs": logprobs, "finish_reason": finish}]} | more
        )


def whole_completion(ask: Ask, opening: Opening, happened: Iterable[Happening]) -> dict[str, Any]:
    """One completion. Raises Refusal where the request failed."""
    all_ = list(happened)
    _raise_failed(all_)
    dones = [h for h in all_ if isinstance(h, Done)]
    choices = []
    for i in range(ask.n):
        texts = [h for h in all_ if isinstance(h, Text) and h.choice == i]
        reason = next(d.reason for d in dones if d.choice == i)
        logprobs = _old_logprobs((p for h in texts for p in h.logprobs), 0, ids=bool(ask.wire.get("ids")))
        finish = "length" if reason == "length" else "stop"
        choices.append({"index": i, "text": "".join(h.text for h in texts), "logprobs": logprobs, "finish_reason": finish})
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(opening.created),
        "model": opening.model,
        "choices": choices,
        "usage": usage_json(d.usage for d in dones),
        "timings": timings(dones[0].usage),
    }
