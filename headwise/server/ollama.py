"""Ollama's own API: chat, generate, tags, show, ps, version; lines of JSON.

Source: ollama/ollama fb307609, server/routes.go and api/types.go. Options not listed in `_sampling`, but `num_ctx`, change
nothing here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from headwise import __version__
from headwise.server.answer import Served
from headwise.server.ask import (
    Ask,
    Done,
    Failed,
    Happening,
    Opening,
    Refusal,
    Text,
    Thought,
    ToolCall,
    Usage,
    Waiting,
    arguments_of,
    bad,
    content_text,
    items,
    mapping,
    merged,
    number,
    stops,
    text,
)  # fmt: skip
from headwise.server.chat import failure, tool_of
from headwise.server.models import Loaded, keep_seconds
from headwise.server.stream import NDJSON, line
from headwise.spec.read import Source
from headwise.spec.shelf import Held

MEDIA_TYPE = NDJSON
COMPATIBLE = "0.13.4"  # what Codex 0.169 asks of `codex --oss` at least
_EFFORTS = ("low", "medium", "high", "max")


def error(refusal: Refusal) -> dict[str, Any]:
    return {"error": refusal.message}


def parse_chat(body: Mapping[str, Any]) -> Ask:
    """`POST /api/chat`. Without messages it is a request to load the model: see `is_load`."""
    messages = [_message(mapping(m, "messages")) for m in items(body, "messages")]
    tools = tuple(tool for t in items(body, "tools") if (tool := tool_of(mapping(t, "tools"))))
    return _ask(body, messages=merged(messages), tools=tools)


def parse_generate(body: Mapping[str, Any]) -> Ask:
    """`POST /api/generate`: one user message, or with `raw` a text to continue."""
    prompt = text(body, "prompt") or ""
    for key in ("images", "suffix"):
        if body.get(key):
            raise bad(f"{key} is not supported: headwise reads text only and continues at the end", key)
    if body.get("raw"):
        return _ask(body, prompt=prompt, wire={"generate": True})
    system = text(body, "system")
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    return _ask(body, messages=merged(messages), wire={"generate": True})


def is_load(body: Mapping[str, Any]) -> bool:
    """Whether a body asks for no answer but for the model to be loaded or unloaded."""
    return not body.get("messages") and not body.get("prompt")


def parse_load(body: Mapping[str, Any]) -> Ask:
    """A body without a prompt: the model, its context, and for how long it stays."""
    return _ask(body)


def loaded(model: str, reason: str, *, chat: bool) -> dict[str, Any]:
    """The answer to a request without a prompt; `reason`: load or unload."""
    empty: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    return {"model": model, "created_at": _now(), **empty, "done": True, "done_reason": reason}


def _ask(body: Mapping[str, Any], **what: Any) -> Ask:
    think = body.get("think")
    options = body.get("options")
    options = mapping(options, "options") if options is not None else {}
    form = body.get("format")
    logprobs = number(body, "top_logprobs", 0, 20, whole=True)
    try:
        keep_s = None if body.get("keep_alive") in (None, "") else keep_seconds(body["keep_alive"])
    except ValueError as error:
        raise bad(f"keep_alive {error}", "keep_alive") from error
    return Ask(
        model=text(body, "model"),
        sampling=_sampling(options),
        schema={"type": "object"} if form == "json" else form if isinstance(form, Mapping) and form else None,
        stop=stops(options.get("stop")),
        thinking=think if isinstance(think, bool) else True if think in _EFFORTS else None,
        effort=think if isinstance(think, str) and think in _EFFORTS else None,
        logprobs=(logprobs or 0) if body.get("logprobs") else None,
        stream=body.get("stream") is not False,
        context=number(options, "num_ctx", 0, 2**31, whole=True) or None,
        keep_s=keep_s,
        **what,
    )


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    most = number(options, "num_predict", -(2**31), 2**31, whole=True)
    found = {
        "temperature": number(options, "temperature", 0.0, 100.0),
        "top_p": number(options, "top_p", 0.0, 1.0),
        "top_k": number(options, "top_k", -1, 2**31, whole=True),
        "min_p": number(options, "min_p", 0.0, 1.0),
        "seed": number(options, "seed", -(2**63), 2**63 - 1, whole=True),
        "presence_penalty": number(options, "presence_penalty", -10.0, 10.0),
        "frequency_penalty": number(options, "frequency_penalty", -10.0, 10.0),
        "max_tokens": most if most and most > 0 else None,
    }
    return {k: v for k, v in found.items() if v is not None}


def _message(m: Mapping[str, Any]) -> dict[str, Any]:
    role = m.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise bad(f"a message has the role {role!r}", "messages")
    if m.get("images"):
        raise Refusal(400, "unsupported_content", "a message holds images; headwise reads text only", param="messages")
    out: dict[str, Any] = {"role": role, "content": content_text(m.get("content"), "messages")}
    if isinstance(m.get("thinking"), str):
        out["reasoning_content"] = m["thinking"]
    calls = [mapping(mapping(c, "tool_calls").get("function"), "tool_calls") for c in items(m, "tool_calls")]
    if calls:
        out["tool_calls"] = [
            {"id": str(whole_.get("id", "")), "type": "function",
             "function": {"name": str(c.get("name", "")), "arguments": arguments_of(c.get("arguments"))}}
            for whole_, c in zip(items(m, "tool_calls"), calls, strict=True)
        ]  # fmt: skip
    if isinstance(m.get("tool_name"), str):
        out["name"] = m["tool_name"]
    if isinstance(m.get("tool_call_id"), str):
        out["tool_call_id"] = m["tool_call_id"]
    return out


class Lines:
    """Happenings → lines, of chat or of generate."""

    def __init__(self, ask: Ask, opening: Opening) -> None:
        self.opening, self.chat = opening, not ask.wire.get("generate")
        self.calls = 0

    def start(self) -> list[bytes]:
        return [line(self._said())]

    def frames(self, happening: Happening) -> list[bytes]:
        match happening:
            case Waiting():
                return [line(self._said())]
            case Text(_, said, logprobs):
                more = {"logprobs": _logprobs(logprobs)} if logprobs else {}
                return [line(self._said(said) | more)]
            case Thought(_, said):
                return [line(self._said(thinking=said))]
            case ToolCall():
                call = self._call(happening)
                return [line(self._said(tool_calls=[call]))]
            case Done(_, reason, usage):
                return [line(self._said() | ended(reason, usage))]
            case Failed(message):
                return [line({"error": message})]

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments = arguments_of(call.arguments)
        self.calls += 1
        arguments = arguments if isinstance(arguments, Mapping) else {}
        return {"id": call.id, "function": {"index": self.calls - 1, "name": call.name, "arguments": arguments}}

    def _said(self, said: str = "", **more: Any) -> dict[str, Any]:
        head = {"model": self.opening.model, "created_at": _now()}
        if self.chat:
            return {**head, "message": {"role": "assistant", "content": said, **more}, "done": False}
        return {**head, "response": said, **more, "done": False}

    def whole(self, happened: Iterable[Happening]) -> dict[str, Any]:
        """One object. Raises Refusal where the request failed."""
        all_ = list(happened)
        for h in all_:
            if isinstance(h, Failed):
                raise failure(h)
        more: dict[str, Any] = {}
        if thought := "".join(h.text for h in all_ if isinstance(h, Thought)):
            more["thinking"] = thought
        if calls := [self._call(h) for h in all_ if isinstance(h, ToolCall)]:
            more["tool_calls"] = calls
        out = self._said("".join(h.text for h in all_ if isinstance(h, Text)), **more)
        if logprobs := [p for h in all_ if isinstance(h, Text) for p in h.logprobs]:
            out["logprobs"] = _logprobs(logprobs)
        done = next(h for h in all_ if isinstance(h, Done))
        return out | ended(done.reason, done.usage)


def whole(ask: Ask, opening: Opening, happened: Iterable[Happening]) -> dict[str, Any]:
    """One object. Raises Refusal where the request failed."""
    return Lines(ask, opening).whole(happened)


def _logprobs(found: Iterable[Any]) -> list[dict[str, Any]]:
    def one(spelt: str, data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": spelt, "logprob": logprob, "bytes": list(data)}

    return [one(p.text, p.data, p.logprob) | {"top_logprobs": [one(t, d, x) for _, t, d, x in p.top]} for p in found]


def ended(reason: str, u: Usage) -> dict[str, Any]:
    """The last line's fields; durations in nanoseconds. prompt_eval_count is the whole prompt, cached or not."""
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": int((u.queue_s + u.prefill_s + u.decode_s) * 1e9),
        "load_duration": int(u.queue_s * 1e9),
        "prompt_eval_count": u.prompt_tokens,
        "prompt_eval_duration": int(u.prefill_s * 1e9),
        "eval_count": u.tokens,
        "eval_duration": int(u.decode_s * 1e9),
    }


def version() -> dict[str, Any]:
    return {"version": COMPATIBLE, "headwise": __version__}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _details(source: Source) -> dict[str, Any]:
    metadata = {} if source.gguf is None else source.gguf.metadata
    family = source.spec.family
    return {
        "parent_model": "",
        "format": "safetensors" if source.gguf is None else "gguf",
        "family": family,
        "families": [family],
        "parameter_size": str(metadata.get("general.size_label", "")),
        "quantization_level": "",
    }


def _entry(held: Held, source: Source) -> dict[str, Any]:
    """`digest` names the file by path, size and time: nobody reads 20 GB to list a model."""
    digest = hashlib.sha256(f"{held.path} {held.n_bytes} {held.changed}".encode()).hexdigest()
    return {
        "name": held.name,
        "model": held.name,
        "modified_at": _time(held.changed),
        "size": held.n_bytes,
        "digest": digest,
        "details": _details(source),
    }


def tags(models: Iterable[tuple[Held, Source]]) -> dict[str, Any]:
    return {"models": [_entry(held, source) for held, source in models]}


def ps(models: Iterable[tuple[Loaded, Source]]) -> dict[str, Any]:
    """The loaded models; one that is still loading is not there yet. `size` is planned; `size_vram` what of it is a card's."""
    found = []
    for m, source in models:
        if m.engine.state != "ready":
            continue
        planned = m.engine.facts["plan"]["total_bytes"]
        entry = _entry(m.held, source)
        entry.pop("modified_at")
        found.append(
            entry
            | {
                "expires_at": "9999-12-31T23:59:59Z" if m.expires is None else _time(m.expires),
                "size": planned,
                "size_vram": 0 if m.engine.facts["device"] == "cpu" else planned,
                "context_length": m.context,
                "requests": m.uses,
            }
        )
    return {"models": found}


def show(held: Held, model: Served) -> dict[str, Any]:
    template = model.tokenizer.chat_template
    spec = model.source.spec
    can = ["completion", *(["tools"] if template and "tools" in template else []), *(["thinking"] if model.thinks else [])]
    return {
        "modelfile": f"FROM {model.name}",
        "parameters": "\n".join(f"{k} {json.dumps(v)}" for k, v in model.suggested.items()),
        "template": template or "",
        "details": _details(model.source),
        "model_info": {
            "general.architecture": spec.family,
            "general.basename": model.name,
            f"{spec.family}.context_length": spec.max_context,
            f"{spec.family}.block_count": len(spec.layers),
            f"{spec.family}.embedding_length": spec.hidden,
            "headwise.context": model.context,
        },
        "capabilities": can,
        "modified_at": _time(held.changed),
    }
