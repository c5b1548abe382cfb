"""`GET /openapi.json`: what the routes take and give, made of the routes themselves, their docstrings and the bodies below.

Bodies name what is read; all else that clients send is passed over, as the protocols want it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.routing import BaseRoute, Route

from headwise import __version__
from headwise.server.chat import MOST_CHOICES

Schema = dict[str, Any]
JSON = "application/json"
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def _number(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _one(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _body(required: Sequence[str] = (), /, **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _content(*kinds: str) -> Schema:
    """A text, or parts of it."""
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": _one(*kinds), "text": TEXT}}
    return {"oneOf": [TEXT, _list(part)]}


COUNT = _whole(1, 2**31 - 1)
STOP: Schema = {"oneOf": [TEXT, _list(TEXT)]}
SAMPLING = {
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "seed": _whole(0, 2**53),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
}
OPENAI = {"stream": FLAG, "stream_options": _body(include_usage=FLAG), "user": TEXT, "prompt_cache_key": TEXT}
FUNCTION = _body(("name",), name={"type": "string", "minLength": 1}, description=TEXT, parameters=OBJECT)
MESSAGE = _body(("role", "content"), role=_one("system", "developer", "user", "assistant"), content=_content("text"))
FORMAT = _body(("type",), type=_one("text", "json_object"))
BIAS: Schema = {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,5}$"}, "additionalProperties": _number(-100, 100)}
OLLAMA_OPTIONS = _body(num_predict=_whole(-2, 2**31 - 1), num_ctx=COUNT, stop=_list(TEXT), **SAMPLING)
OLLAMA = {
    "stream": FLAG,
    "options": OLLAMA_OPTIONS,
    "think": FLAG,
    "format": _one("json"),
    "keep_alive": {"type": ["string", "integer"]},
}
EFFORT = _one("none", "minimal", "low", "medium", "high", "xhigh")
ANTHROPIC_MESSAGE = _body(("role", "content"), role=_one("user", "assistant"), content=_content("text"))

CHAT = _body(
    ("messages",),
    messages=_list(MESSAGE, 1),
    tools=_list(_body(("type", "function"), type=_one("function"), function=FUNCTION)),
    tool_choice=_one("auto", "none"),
    parallel_tool_calls=FLAG,
    response_format=FORMAT,
    max_tokens=COUNT,
    max_completion_tokens=COUNT,
    stop=STOP,
    n=_whole(1, MOST_CHOICES),
    logprobs=FLAG,
    top_logprobs=_whole(0, 20),
    logit_bias=BIAS,
    reasoning_effort=EFFORT,
    chat_template_kwargs=_body(enable_thinking=FLAG),
    **SAMPLING,
    **OPENAI,
)
COMPLETION = _body(
    ("prompt",),
    prompt={"oneOf": [TEXT, _list(_whole(0, 1000), 1)]},
    max_tokens=COUNT,
    stop=STOP,
    n=_whole(1, MOST_CHOICES),
    logprobs=_whole(0, 20),
    logit_bias=BIAS,
    **SAMPLING,
    **OPENAI,
)
RESPONSES = _body(
    ("input",),
    input={
        "oneOf": [
            TEXT,
            _list({**MESSAGE, "properties": {**MESSAGE["properties"], "content": _content("input_text", "output_text")}}),
        ]
    },
    instructions=TEXT,
    tools=_list(
        {**FUNCTION, "required": ["type", "name"], "properties": {**FUNCTION["properties"], "type": _one("function", "custom")}}
    ),
    tool_choice=_one("auto", "none"),
    parallel_tool_calls=FLAG,
    reasoning=_body(effort=EFFORT),
    max_output_tokens=COUNT,
    **{k: SAMPLING[k] for k in ("temperature", "top_p")},
    **OPENAI,
)
MESSAGES = _body(
    ("messages", "max_tokens"),
    messages=_list(ANTHROPIC_MESSAGE, 1),
    system=_content("text"),
    max_tokens=COUNT,
    tools=_list(_body(("name", "input_schema"), name={"type": "string", "minLength": 1}, description=TEXT, input_schema=OBJECT)),
    stop_sequences=_list(TEXT),
    stream=FLAG,
    **{k: SAMPLING[k] for k in ("temperature", "top_p", "top_k")},
)
COUNT_TOKENS = {**MESSAGES, "required": ["messages"]}
BODIES: dict[str, Schema] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/api/chat": _body(("messages",), messages=_list(MESSAGE, 1), **OLLAMA),
    "/api/generate": _body(("prompt",), prompt=TEXT, system=TEXT, raw=FLAG, **OLLAMA),
    "/api/show": _body(),
    "/api/pull": _body(model=TEXT, stream=FLAG),
    "/tokenize": _body(("content",), content=TEXT, add_special=FLAG),
    "/detokenize": _body(("tokens",), tokens=_list(_whole(0, 1000))),
}
MODELLESS = ("/tokenize", "/detokenize")
_ERROR = {"description": "refused: what is wrong, and with what", "content": {JSON: {"schema": _body(("error",), error={})}}}
_STATES = ("/health", "/ready", "/v1/attention")  # 503 is an answer there


def describe(routes: Iterable[BaseRoute], models: Sequence[str], media_types: Mapping[str, str]) -> Schema:
    """An OpenAPI 3.1 description.

    Args:
        models: the names that a request may give.
        media_types: path -> type of its stream, where it streams.
    """
    paths: dict[str, Schema] = {}
    for route in routes:
        if not isinstance(route, Route):
            continue
        path = re.sub(r":path\}", "}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, method, models, media_types)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "headwise",
            "version": __version__,
            "description": "OpenAI's, Anthropic's and Ollama's protocols on one server.",
        },
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(route: Route, path: str, method: str, models: Sequence[str], media_types: Mapping[str, str]) -> Schema:
    known = path if path in BODIES else f"/v1{path}"
    types = ["text/plain", "text/html"] if path == "/" else ["text/plain"] if path == "/metrics" else [JSON]
    if known in media_types:
        types.append(media_types[known])
    answers: Schema = {
        "200": {"description": "answered", "content": {kind: {} for kind in types}},
        "4XX": _ERROR,
    }
    if path in _STATES or known in BODIES:
        answers["503"] = {"description": "the model is not loaded, or its engine failed: ask again", "content": {JSON: {}}}
    operation: Schema = {
        "summary": _summary(route),
        "operationId": f"{method.lower()}{re.sub(r'[^a-z0-9]+', '_', path)}",
        "responses": answers,
    }
    if names := re.findall(r"\{(\w+)\}", path):
        schema = _one(*models)
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": schema} for n in names]
    if method == "POST" and known in BODIES:
        body = BODIES[known]
        if path not in MODELLESS:
            body = {**body, "properties": {"model": _one(*models), **body["properties"]}}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    return operation


def _summary(route: Route) -> str:
    return (inspect.getdoc(route.endpoint) or route.name).splitlines()[0]
