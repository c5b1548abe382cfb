"""The routes: a request's body to a parser, its answer from a renderer. The only file that imports the web framework.

Nothing is asked of the client but JSON. A browser page of another origin is refused, as is a foreign Host header on a
loopback address: a page that you visit must not speak to your model.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headwise.server import anthropic, chat, metrics, ollama, openapi, page, pull, responses
from headwise.server.answer import HEARTBEAT_S, Prepared, Served, happenings, prepare, prompt_ids
from headwise.server.ask import Ask, Failed, Happening, Opening, Refusal, Waiting, bad
from headwise.server.models import Models, Place
from headwise.server.state import health, ready, state
from headwise.spec.shelf import Held

BODY_BYTES = 32 * 1024 * 1024
SOON_S = 0.05  # a stream's first event waits for no more
BODY_S = 30.0  # without a byte of a body that is not complete
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_OPEN = ("/health", "/ready", "/metrics", "/")  # without an API key


@dataclass(frozen=True, slots=True)
class Protocol:
    """One route that answers: its two pure functions, and its errors."""

    parse: Callable[[Mapping[str, Any]], Ask]
    stream: Callable[[Ask, Opening], Any]  # with start() and frames(happening), both lists of bytes
    whole: Callable[[Ask, Opening, list[Happening]], dict[str, Any]]
    error: Callable[[Refusal], dict[str, Any]]
    media_type: str


PROTOCOLS = {
    "/v1/chat/completions": Protocol(chat.parse, chat.Chat, chat.whole, chat.error, chat.MEDIA_TYPE),
    "/v1/completions": Protocol(chat.parse_completion, chat.Completion, chat.whole_completion, chat.error, chat.MEDIA_TYPE),
    "/v1/responses": Protocol(responses.parse, responses.Responses, responses.whole, chat.error, responses.MEDIA_TYPE),
    "/v1/messages": Protocol(anthropic.parse, anthropic.Messages, anthropic.whole, anthropic.error, anthropic.MEDIA_TYPE),
    "/api/chat": Protocol(ollama.parse_chat, ollama.Lines, ollama.whole, ollama.error, ollama.MEDIA_TYPE),
    "/api/generate": Protocol(ollama.parse_generate, ollama.Lines, ollama.whole, ollama.error, ollama.MEDIA_TYPE),
}


def create_app(
    models: Models,
    *,
    api_key: str | None = None,
    body_bytes: int = BODY_BYTES,
    hosts: frozenset[str] | None = None,
) -> ASGIApp:
    """The server's application; it runs the engines of loaded models for as long as it lives itself.

    Args:
        hosts: the only Host headers to answer, without ports; None answers all.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await models.start()
        yield
        await models.close()

    rooms = _Rooms(models)
    routes = [Route(path, rooms.answer(p), methods=["POST"]) for path, p in PROTOCOLS.items()]
    for path in ("/chat/completions", "/completions", "/responses", "/messages"):  # a base URL without /v1
        routes.append(Route(path, rooms.answer(PROTOCOLS[f"/v1{path}"]), methods=["POST"]))
    routes += [
        Route("/", _root, methods=["GET", "HEAD"]),
        Route("/health", rooms.health),
        Route("/ready", rooms.ready),
        Route("/metrics", rooms.metrics),
        Route("/v1/models", rooms.all_models),
        Route("/v1/models/{name:path}", rooms.one_model),
        Route("/v1/attention", rooms.attention),
        Route("/v1/state", rooms.state),
        Route("/v1/messages/count_tokens", rooms.count_tokens, methods=["POST"]),
        Route("/tokenize", rooms.tokenize, methods=["POST"]),
        Route("/detokenize", rooms.detokenize, methods=["POST"]),
        Route("/api/version", lambda _: JSONResponse(ollama.version()), methods=["GET", "HEAD"], name="Ollama's version"),
        Route("/api/tags", rooms.tags, methods=["GET", "HEAD"]),
        Route("/api/ps", rooms.ps),
        Route("/api/show", rooms.show, methods=["POST"]),
        Route("/api/pull", rooms.pull, methods=["POST"]),
        *(Route(f"/api/{verb}", rooms.not_here, methods=["POST", "DELETE"]) for verb in ("create", "copy", "delete", "push")),
        Route("/openapi.json", rooms.openapi),
    ]
    for path in ("/v1/embeddings", "/embeddings", "/api/embed", "/api/embeddings"):
        routes.append(Route(path, rooms.no_embeddings, methods=["POST"]))
    handlers = {Refusal: _refused, HTTPException: _http_error, RecursionError: _too_deep}
    return _Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), api_key, body_bytes, hosts)  # type: ignore[arg-type]


def loopback_hosts(host: str) -> frozenset[str] | None:
    """The Host headers to answer on an address: on a loopback address its own names only."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return frozenset(_LOCAL | {host}) if local else None


def _root(request: Request) -> Response:
    """The page for browsers; a word for clients that only look whether somebody is here."""
    if "text/html" in request.headers.get("accept", ""):
        return Response(page.html(), media_type=page.MEDIA_TYPE, headers=page.headers())
    return PlainTextResponse("headwise is running", headers={"Vary": "Accept"})


def _error_of(path: str) -> Callable[[Refusal], dict[str, Any]]:
    if path.startswith("/api/"):
        return ollama.error
    return anthropic.error if "/messages" in path else chat.error


def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    headers = {"Retry-After": "2"} if refusal.status == 503 else None
    return JSONResponse(_error_of(request.url.path)(refusal), refusal.status, headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        _error_of(request.url.path)(Refusal(error.status_code, "invalid_request_error", error.detail)), error.status_code
    )


def _too_deep(request: Request, _: Exception) -> Response:
    return _refused(request, bad("the body is nested too deeply"))


async def _body(request: Request) -> Mapping[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    return body


class _Rooms:
    """The handlers, around the models."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._encoders = ThreadPoolExecutor(2, "headwise-encoder")  # of their own: long prompts must not delay a look at a name

    async def _model(self, name: object) -> Served:
        """A model by name, as it would meet a request. Raises Refusal: there is none."""
        return await asyncio.to_thread(lambda: self.models.served(self.models.find(str(name or ""))))

    async def _place(self, ask: Ask) -> Place:
        held = await asyncio.to_thread(self.models.find, ask.model)
        return await self.models.place(held, context=ask.context, keep_s=ask.keep_s)

    def answer(self, protocol: Protocol) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            """An answer, whole or as it comes."""
            body = await _body(request)
            if protocol.media_type == ollama.MEDIA_TYPE and ollama.is_load(body):
                return await self._load(body, chat=request.url.path.endswith("chat"))
            ask = protocol.parse(body)
            if not ask.client:
                ask = replace(ask, client=_client(request))
            held = await asyncio.to_thread(self.models.find, ask.model)
            work = asyncio.create_task(self._prepared(held, ask))
            if ask.stream:
                await asyncio.wait({work}, timeout=SOON_S)  # a refusal that comes soon has a status of its own
                n_tokens = work.result()[1].prompt_tokens if work.done() else 0
                return StreamingResponse(
                    self._stream(protocol, ask, Opening(held.name, n_tokens), work),
                    media_type=protocol.media_type,
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                )
            place, prepared = await work
            happened = await self._collected(request, prepared, place)
            return JSONResponse(protocol.whole(ask, Opening(held.name, prepared.prompt_tokens), happened))

        return handle

    async def _load(self, body: Mapping[str, Any], *, chat: bool) -> Response:
        """Ollama's request without a prompt: loads a model, or lets it go."""
        ask = ollama.parse_load(body)
        if ask.keep_s == 0.0:
            held = await asyncio.to_thread(self.models.find, ask.model)
            self.models.unload(held)
            return JSONResponse(ollama.loaded(held.name, "unload", chat=chat))
        place = await self._place(ask)
        await place.load()
        return JSONResponse(ollama.loaded(place.held.name, "load", chat=chat))

    async def _prepared(self, held: Held, ask: Ask) -> tuple[Place, Prepared]:
        place = await self.models.place(held, context=ask.context, keep_s=ask.keep_s)
        return place, await asyncio.get_running_loop().run_in_executor(self._encoders, prepare, ask, place.model)

    async def _stream(
        self, protocol: Protocol, ask: Ask, opening: Opening, work: asyncio.Task[tuple[Place, Prepared]]
    ) -> AsyncIterator[bytes]:
        """The client hears at once, also while hundreds of prompts before its own become tokens."""
        renderer = protocol.stream(ask, opening)
        yield b"".join(renderer.start())
        try:
            while not (await asyncio.wait({work}, timeout=HEARTBEAT_S))[0]:
                yield b"".join(renderer.frames(Waiting(0, "queue", 0, 0, 0)))
            place, prepared = work.result()
        except Refusal as refusal:
            yield b"".join(renderer.frames(Failed(refusal.message, refusal.status >= 500, refusal.code)))
            return
        finally:
            work.cancel()
        async with contextlib.aclosing(happenings(prepared, place.model, place)) as stream:
            async for happening in stream:
                yield b"".join(renderer.frames(happening))

    async def _collected(self, request: Request, prepared: Prepared, place: Place) -> list[Happening]:
        """All happenings; a client that goes away cancels them."""

        async def collect() -> list[Happening]:
            async with contextlib.aclosing(happenings(prepared, place.model, place)) as stream:
                return [h async for h in stream if not isinstance(h, Waiting)]

        work, gone = asyncio.create_task(collect()), asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def health(self, _: Request) -> Response:
        """200 when a model is loaded and its engine runs, or none is loaded and a request would load one."""
        body = health(self.models)
        return JSONResponse(body, 200 if body["status"] in ("ok", "idle") else 503)

    async def state(self, _: Request) -> Response:
        """Of each loaded model, requests with their progress, and tokens of each of the last seconds."""
        return JSONResponse({"models": [state(m) for m in self.models.loaded.values()]}, headers={"Cache-Control": "no-store"})

    async def ready(self, _: Request) -> Response:
        """Of each loaded model, every self-check of every backend in use passed, and a prompt of production length was answered.

        Idle is ready: a request loads. So is a server with a ready model while a further one loads.
        """
        body = ready(self.models)
        return JSONResponse(body, 200 if body["ready"] else 503)

    async def metrics(self, _: Request) -> Response:
        """Prometheus's text format."""
        return Response(metrics.metrics(self.models), media_type=metrics.MEDIA_TYPE)

    async def openapi(self, request: Request) -> Response:
        """This description."""
        streams = {"/api/pull": ollama.MEDIA_TYPE} | {path: p.media_type for path, p in PROTOCOLS.items()}
        names = [m["id"] for m in await asyncio.to_thread(self._listed)]
        return JSONResponse(openapi.describe(request.app.routes, names, streams))

    def _listed(self) -> list[dict[str, Any]]:
        """Every name that a request may give."""
        return [
            {
                "id": name,
                "object": "model",
                "created": int(held.changed),
                "owned_by": "headwise",
                "max_model_len": self.models.context(held),
                "meta": {
                    "family": source.spec.family,
                    "n_ctx_train": source.spec.max_context,
                    "loaded": held.name in self.models.loaded,
                },
            }
            for held, source in self.models.readable()
            for name in (held.name, *held.aliases)
        ]

    async def all_models(self, _: Request) -> Response:
        """The names that requests may give."""
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(self._listed)})

    async def one_model(self, request: Request) -> Response:
        """One of them."""
        held = await asyncio.to_thread(self.models.find, request.path_params["name"])
        found = [m for m in await asyncio.to_thread(self._listed) if m["id"] == held.name]
        if not found:
            self.models.source(held)  # raises with what is wrong with it
        return JSONResponse(found[0] | {"id": request.path_params["name"]})

    async def attention(self, request: Request) -> Response:
        """The layer map with each choice and its refusals, the self-checks, and bytes of KV planned and measured.

        Of `?model=NAME`; without one, of the first model where it is loaded, else of the one used last.
        """
        ready = {m.name: m for m in self.models.loaded.values() if m.engine.state == "ready"}
        name = request.query_params.get("model")
        held = await asyncio.to_thread(self.models.find, name)
        if not name and held.name not in ready and ready:
            held = max(ready.values(), key=lambda m: m.turn).held
        if held.name not in ready:
            raise Refusal(503, "server_error", f"{held.name} is not loaded")
        return JSONResponse(ready[held.name].engine.facts | {"model": held.name, "loaded": list(ready)})

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens a request's prompt has."""
        ask = anthropic.parse({"max_tokens": 1, **await _body(request)})
        model = await self._model(ask.model)
        return JSONResponse({"input_tokens": len(await asyncio.to_thread(prompt_ids, ask, model))})

    async def tokenize(self, request: Request) -> Response:
        """As llama-server (`content`) and as vLLM (`prompt` or `messages`)."""
        body = await _body(request)
        model = await self._model(body.get("model"))
        if isinstance(body.get("messages"), list):
            ids = await asyncio.to_thread(prompt_ids, chat.parse(body), model)
        else:
            said = body.get("content", body.get("prompt"))
            if not isinstance(said, str):
                raise bad("content must be a text", "content")
            bos = body.get("add_special", body.get("add_special_tokens", "prompt" in body)) is True
            ids = await asyncio.to_thread(model.tokenizer.encode, said, add_bos=bos)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await _body(request)
        model, ids = await self._model(body.get("model")), body.get("tokens")
        size = model.tokenizer.vocab_size
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise bad(f"tokens must be a list of ids below {size}", "tokens")
        said = model.tokenizer.decode(ids, skip_special=False)
        return JSONResponse({"content": said, "prompt": said})

    async def tags(self, _: Request) -> Response:
        """The models that requests may name, as Ollama lists them."""
        return JSONResponse(ollama.tags(await asyncio.to_thread(self.models.readable)))

    async def ps(self, _: Request) -> Response:
        """What is loaded, as Ollama tells it."""
        return JSONResponse(ollama.ps([(m, self.models.source(m.held)) for m in self.models.loaded.values()]))

    async def show(self, request: Request) -> Response:
        """One model, as Ollama tells it."""
        body = await _body(request)
        held = await asyncio.to_thread(self.models.find, str(body.get("model") or body.get("name") or ""))
        return JSONResponse(ollama.show(held, await asyncio.to_thread(self.models.served, held)))

    async def pull(self, request: Request) -> Response:
        """A model of the Hub comes here, told in Ollama's lines; success at once for one that is here."""
        body = await _body(request)
        name = str(body.get("model") or body.get("name") or "")
        lines = pull.pulling(self.models, name)
        if body.get("stream") is not False:
            return StreamingResponse(lines, media_type=ollama.MEDIA_TYPE)
        last = [json.loads(said) async for said in lines][-1]
        if "error" in last:
            raise bad(last["error"], "model")
        return JSONResponse(last)

    async def no_embeddings(self, _: Request) -> Response:
        """Refused: no model that runs here was trained to make embeddings."""
        raise bad("no model here makes embeddings: all were trained to continue text; ask an embedding model's server")

    async def not_here(self, request: Request) -> Response:
        """Refused."""
        raise bad(f"{request.url.path} is not supported: headwise serves models as they are on disk")


def _client(request: Request) -> str:
    for header in ("session-id", "x-claude-code-session-id", "x-session-id"):
        if value := request.headers.get(header):
            return value[:200]
    return "" if request.client is None else request.client.host


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Before any route: host and origin, the API key, and the size of the body."""

    def __init__(self, app: ASGIApp, api_key: str | None, body_bytes: int, hosts: frozenset[str] | None) -> None:
        self.app, self.api_key, self.body_bytes, self.hosts = app, api_key, body_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self._check(request)
        except Refusal as refusal:
            await _refused(request, refusal)(scope, receive, send)
            return
        read, begun, whole = 0, False, False

        async def limited() -> Message:
            nonlocal read, whole
            try:
                message = await asyncio.wait_for(receive(), None if whole else BODY_S)
            except TimeoutError:
                raise Refusal(408, "request_timeout", f"no byte of the body came for {BODY_S:g} seconds") from None
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise Refusal(413, "request_too_large", f"the body is larger than {self.body_bytes} bytes")
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, limited, watched)
        except ClientDisconnect:
            return
        except Refusal as refusal:  # raised while a framework's own code was reading
            if begun:
                raise
            await _refused(request, refusal)(scope, receive, send)

    def _check(self, request: Request) -> None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self.hosts is not None and host not in self.hosts:
            raise Refusal(403, "forbidden", f"this server answers on {', '.join(sorted(self.hosts))}, not as {host!r}")
        origin = request.headers.get("origin")
        if origin and (urlsplit(origin).hostname or "") not in _LOCAL | {host}:
            raise Refusal(403, "forbidden", f"pages of {origin} may not use this server")
        if self.api_key and request.url.path not in _OPEN:
            given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                raise Refusal(401, "invalid_api_key", "the API key is missing or wrong")
        if int(request.headers.get("content-length") or 0) > self.body_bytes:
            raise Refusal(413, "request_too_large", f"the body is larger than {self.body_bytes} bytes")
