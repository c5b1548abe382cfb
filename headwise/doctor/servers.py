"""A model server of another make: what it is, what it holds, and one completion of it as a stream of events.

Four APIs: llama-server's own, Ollama's, vLLM's, and what every OpenAI-compatible server has. All bytes come through one
`Transport`, so tests need no network; a server's answer is never trusted: every number is checked, a line has at most
`LONGEST_LINE` bytes, an answer at most `LONGEST_ANSWER`, and whatever is wrong with it is a ProbeError.

Sources: llama.cpp 0c1e570 tools/server/README.md (`/completion` with `return_progress`, `/slots`, `/props`, `/tokenize`);
Ollama docs/api.md and api/types.go (`/api/generate`, durations in ns); vLLM 0.33.0 (`/tokenize`, `/metrics`, `max_model_len`).
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import math
import queue
import re
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from headwise.errors import ProbeError, UsageError

Engine = Literal["llama.cpp", "ollama", "vllm", "openai"]
ENGINES: tuple[Engine, ...] = ("llama.cpp", "ollama", "vllm", "openai")
LONGEST_LINE = 2**20
LONGEST_ANSWER = 2**26
ASK_S = 10.0  # for a question that needs no model
BROKEN = (OSError, http.client.HTTPException, ValueError)  # all that http.client raises on what a server may send


class Exchange(Protocol):
    """One request and its answer. `stop` may come from another thread, and ends a wait in `open` and `readline`."""

    def open(self) -> tuple[int, str]: ...  # sends; status and reason
    def readline(self, limit: int) -> bytes: ...  # b"" at the end
    def stop(self) -> None: ...
    def close(self) -> None: ...


Transport = Callable[[str, str, bytes | None, float], Exchange]  # method, path, body, seconds that one wait may last
Clock = Callable[[], float]


# --- the transport ---


@dataclass(frozen=True, slots=True)
class Http:
    """The transport of a URL. `shown` is the URL without a password."""

    shown: str
    host: str
    port: int
    tls: bool
    prefix: str
    key: str | None = None

    def __call__(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Exchange:
        return _Http(self, method, path, body, timeout_s)

    @property
    def local(self) -> bool:
        """Whether the server runs on this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def http_at(url: str, *, key: str | None = None) -> Http:
    """The transport for "host:port", "http://host:port" or "https://host/prefix".

    Raises:
        UsageError: it is no such URL.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL", why=str(error), do="http://127.0.0.1:8080") from None
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
        raise UsageError(f"{url!r} is no URL of a server", why="http or https, and a host", do="http://127.0.0.1:8080")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    if not re.fullmatch(r"[!-~]*", prefix) or (key is not None and not re.fullmatch(r"[!-~]+", key)):
        raise UsageError("the URL's path or the key has a character that no header may have", do="letters, digits and signs")
    tls = parts.scheme == "https"
    port = (443 if tls else 80) if port is None else port
    where = f"[{host}]" if ":" in host else host
    return Http(f"{parts.scheme}://{where}:{port}{prefix}", host, port, tls, prefix, key)


class _Http:
    def __init__(self, at: Http, method: str, path: str, body: bytes | None, timeout_s: float) -> None:
        make = http.client.HTTPSConnection if at.tls else http.client.HTTPConnection
        self._connection = make(at.host, at.port, timeout=min(timeout_s, ASK_S))
        self._timeout_s = timeout_s
        self._request = (method, at.prefix + path, body, _headers(at.key))
        self._answer: http.client.HTTPResponse | None = None
        self._socket: socket.socket | None = None

    def open(self) -> tuple[int, str]:
        method, path, body, headers = self._request
        self._connection.connect()
        self._socket = self._connection.sock  # the connection forgets it when the answer begins
        if self._socket:
            self._socket.settimeout(self._timeout_s)
        self._connection.request(method, path, body, headers)
        self._answer = self._connection.getresponse()
        return self._answer.status, self._answer.reason

    def readline(self, limit: int) -> bytes:
        return self._answer.readline(limit) if self._answer else b""

    def stop(self) -> None:
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in it; close alone would not

    def close(self) -> None:
        self._connection.close()
        if self._answer:
            self._answer.close()


def _headers(key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


def ask(transport: Transport, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = ASK_S) -> Any:
    """The JSON at `path`: GET without a body, POST with one. None where a GET finds no such page, or no JSON there.

    Raises:
        ProbeError: no connection, no answer within `timeout_s` of silence, another status, or too long an answer.
    """
    sent = None if body is None else json.dumps(body).encode()
    try:
        status, reason, said = _read(transport, "GET" if body is None else "POST", path, sent, timeout_s)
    except BROKEN as error:
        raise _no_answer(transport, path, error) from error
    if status != 200:
        if body is None and status not in (401, 403, 503):
            return None
        raise _refused(path, status, reason, said)
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        if body is None:
            return None  # a page for people: another kind of server
        raise ProbeError(f"{path} answered what is no JSON", why=_short(said), do="check the server's log") from error


def _read(transport: Transport, method: str, path: str, body: bytes | None, timeout_s: float) -> tuple[int, str, bytes]:
    """Status, reason and the whole answer. One that drips is ended: every byte would reset the time limit of a socket."""
    exchange = transport(method, path, body, timeout_s)
    watchdog = threading.Timer(2 * timeout_s, exchange.stop)
    watchdog.daemon = True
    watchdog.start()
    pieces, length = [], 0
    try:
        status, reason = exchange.open()
        while piece := exchange.readline(LONGEST_LINE):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_ANSWER:
                raise OSError(f"no end after {length:,} bytes")
        return status, reason, b"".join(pieces)
    finally:
        watchdog.cancel()
        exchange.close()


def _no_answer(transport: Transport, path: str, error: Exception) -> ProbeError:
    where = transport.shown if isinstance(transport, Http) else ""
    what = str(error) or type(error).__name__
    return ProbeError(f"{where}{path} gave no answer", why=what[:300], do="check that the server runs at this URL")


def _refused(path: str, status: int, reason: str, said: bytes) -> ProbeError:
    do = "check the server's log"
    if status in (401, 403):
        do = "name the environment variable that holds the key: --api-key-env VAR"
    elif status == 503:
        do = "wait until the model is loaded, then again"
    return ProbeError(f"{path} answered {status}", why=_error_text(said) or reason[:300], do=do)


def _error_text(said: bytes) -> str:
    """A server's own words: the message of an error object, or the beginning of whatever it is."""
    try:
        error = _map(json.loads(said)).get("error")
        return str(_map(error).get("message") or error)[:300] if error else _short(said)
    except (ValueError, RecursionError):
        return _short(said)


def _short(said: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in said[:300].decode(errors="replace")).strip()


# --- what it says about itself ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    engine: Engine
    version: str  # "" where it does not say
    model: str  # what its API calls the model; "" where it has one only and does not say
    context: int | None  # tokens of prompt and answer of one request; None where it does not say
    transport: Transport
    path: str = ""  # the model's file, where the server says
    most_context: int | None = None  # what the model was trained for, where a request may ask for more context
    chat: bool = False  # /v1/completions is not there: only chat

    @property
    def url(self) -> str:
        return self.transport.shown if isinstance(self.transport, Http) else ""

    @property
    def label(self) -> str:
        name = {"llama.cpp": "llama-server", "ollama": "Ollama", "vllm": "vLLM", "openai": "OpenAI-compatible server"}[self.engine]
        return f"{name} {self.version}".strip()


def identify(transport: Transport, *, engine: Engine | None = None, model: str | None = None) -> Server:
    """Which server answers, its version, model and context.

    Args:
        engine: ask as this one only; otherwise the first that answers, in the order of ENGINES.
        model: the model to use where there are several.
    Raises:
        ProbeError: nothing answers, nothing that is known, or there is no such model.
    """
    for name in (engine,) if engine else ENGINES:
        if found := _IDENTIFY[name](transport, model):
            return found
    wanted = {"llama.cpp": "/props", "ollama": "/api/version", "vllm": "/version and /v1/models", "openai": "/v1/models"}
    raise ProbeError(
        "no engine that is known answers" + (f" at {transport.shown}" if isinstance(transport, Http) else ""),
        why=f"asked for {wanted[engine] if engine else ', '.join(wanted.values())}",
        do="check the URL" + (", or leave --engine out" if engine else ""),
    )


def _llama(transport: Transport, model: str | None) -> Server | None:
    props = _map(ask(transport, "/props"))
    settings = _map(props.get("default_generation_settings"))
    if "default_generation_settings" not in props:
        return None
    path = _text(props.get("model_path"))
    name = model or re.split(r"[\\/]", _text(props.get("model_alias")) or path)[-1]
    version = _text(props.get("build_info"))
    return Server(
        engine="llama.cpp", version=version, model=name, context=_count(settings.get("n_ctx")), transport=transport, path=path
    )


def _ollama(transport: Transport, model: str | None) -> Server | None:
    version = _text(_map(ask(transport, "/api/version")).get("version"))
    if not version:
        return None
    running, pulled = (_list(_map(ask(transport, p)).get("models")) for p in ("/api/ps", "/api/tags"))
    names = [name for m in (*running, *pulled) if (name := _text(_map(m).get("name")))]
    if not names:
        raise ProbeError("Ollama has no model", why="none is running or pulled", do="ollama run MODEL, then again")
    found = next((n for n in names if model in (None, n, n.removesuffix(":latest"))), None)
    if found is None:
        raise ProbeError(f"Ollama has no model {model!r}", why=f"it has {', '.join(names[:8])}", do=f"ollama pull {model}")
    context = next((_count(_map(m).get("context_length")) for m in running if _map(m).get("name") == found), None)
    try:
        facts = _map(_map(ask(transport, "/api/show", {"model": found})).get("model_info"))
    except ProbeError:
        facts = {}  # it is for the largest context only
    most = next((_count(v) for k, v in facts.items() if k.endswith(".context_length")), None)
    return Server(engine="ollama", version=version, model=found, context=context, transport=transport, most_context=most)


def _vllm(transport: Transport, model: str | None) -> Server | None:
    version = _map(ask(transport, "/version")).get("version")
    found = _openai(transport, model) if isinstance(version, str) else None
    return replace(found, engine="vllm", version=_text(version)) if found else None


def _openai(transport: Transport, model: str | None) -> Server | None:
    listed = [m for m in map(_map, _list(_map(ask(transport, "/v1/models")).get("data"))) if _text(m.get("id"))]
    if not listed:
        return None
    chosen = next((m for m in listed if model in (None, m["id"])), None)
    if chosen is None:
        raise ProbeError(
            f"the server has no model {model!r}",
            why=f"it has {', '.join(_text(m['id']) for m in listed[:8])}",
            do="--model one of them",
        )
    context = next((n for k in ("max_model_len", "context_length", "max_context_length") if (n := _count(chosen.get(k)))), None)
    return Server(engine="openai", version="", model=_text(chosen["id"]), context=context, transport=transport)


_IDENTIFY: dict[Engine, Callable[[Transport, str | None], Server | None]] = {
    "llama.cpp": _llama,
    "ollama": _ollama,
    "vllm": _vllm,
    "openai": _openai,
}


def tokenize(server: Server, text: str, *, special: bool) -> list[int] | None:
    """The ids of `text`, with the model's own first token where `special`; None where the server does not tell them."""
    if server.engine == "llama.cpp":
        path, body = "/tokenize", {"content": text, "add_special": special}
    elif server.engine == "vllm":
        path, body = "/tokenize", {"model": server.model, "prompt": text, "add_special_tokens": special}
    else:
        return None
    try:
        ids = _list(_map(ask(server.transport, path, body)).get("tokens"))
    except ProbeError:
        return None
    counted = [n for i in ids if (n := _count(i)) is not None]
    return counted if counted and len(counted) == len(ids) else None


@dataclass(frozen=True, slots=True)
class Watch:
    """A second look at a server that is silent. `mark` changes whenever it has done something."""

    mark: tuple[float, ...]
    processed: int | None  # prompt tokens of the request in work
    running: int  # requests in work
    cached: float | None = None  # tokens ever taken from a prefix cache


METRICS = re.compile(
    rb"^vllm:(prompt_tokens|generation_tokens|iteration_tokens|prefix_cache_hits|kv_cache_usage_perc|gpu_cache_usage_perc"
    rb"|num_requests_running)(?:_total)?(?:_sum)?(?:\{[^}]*\})? +([0-9.eE+-]+)$",
    re.MULTILINE,
)


def watch(server: Server, *, timeout_s: float = 1.0) -> Watch | None:
    """llama-server's `/slots` or vLLM's `/metrics`; None where there is none, or it does not answer now."""
    if server.engine == "llama.cpp":
        try:
            slots = [_map(s) for s in _list(ask(server.transport, "/slots", timeout_s=timeout_s))]
        except ProbeError:
            return None  # it answers between batches only
        busy = [s for s in slots if s.get("is_processing") is True]
        done = [n for s in busy if (n := _count(s.get("n_prompt_tokens_processed"))) is not None]
        decoded = [n for s in busy for t in _list(s.get("next_token")) if (n := _count(_map(t).get("n_decoded"))) is not None]
        return Watch((*done, *decoded), max(done, default=None), len(busy)) if slots else None
    if server.engine == "vllm":
        try:
            text = _read(server.transport, "GET", "/metrics", None, timeout_s)[2]
        except BROKEN:
            return None
        seen: dict[bytes, float] = {}
        for name, value in METRICS.findall(text):
            try:
                seen[name] = seen.get(name, 0.0) + float(value)
            except ValueError:
                continue
        running = seen.pop(b"num_requests_running", 0.0)
        mark = tuple(seen[k] for k in sorted(seen))
        return Watch(mark, None, int(running) if 0 <= running < 2**31 else 0, seen.get(b"prefix_cache_hits")) if mark else None
    return None


# --- one completion ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a server says at the end; None for what it does not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated: int | None = None
    prefill_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`at`: when its line came. `tick`: nothing came for a while. `open`: the first byte. `done` ends the stream."""

    at: float
    kind: Literal["tick", "open", "progress", "token", "done"]
    text: str = ""
    processed: int = 0  # prompt tokens, those from the cache included
    total: int = 0
    cached: int = 0
    server_s: float | None = None  # by the server's clock, since it began on the prompt
    counts: Counts = Counts()


def stream(
    server: Server,
    prompt: str | list[int],
    *,
    n_predict: int,
    num_ctx: int | None = None,
    limit_s: float,
    tick_s: float,
    clock: Clock,
) -> Generator[Event]:
    """One greedy completion as it comes. Closing the iterator ends the request.

    Args:
        prompt: text, or ids (llama-server and vLLM).
        num_ctx: Ollama's context for this request.
        limit_s: the longest silence of the connection.
        tick_s: after so long without a line a `tick` is given, so that the caller may look at other things.
    Raises:
        ProbeError: refused, cut before its end, an error in the stream, or what no such server sends.
    """
    path, body = _request(server, prompt, n_predict, num_ctx)
    exchange = server.transport("POST", path, json.dumps(body).encode(), limit_s)
    parse = {"llama.cpp": _llama_line, "ollama": _ollama_line}.get(server.engine, _openai_line)
    state: dict[str, Any] = {}
    first = True
    lines = _lines(exchange, path, tick_s=tick_s, clock=clock)
    try:
        for at, line in lines:
            if line is None:
                yield Event(at=at, kind="tick")
                continue
            if first:
                yield Event(at=at, kind="open")
                first = False
            for event in parse(at, line, state):
                yield event
                if event.kind == "done":
                    return
        counted = state.get("counts")
        if state.get("finished"):  # a server that forgets the [DONE] mark
            yield Event(at=clock(), kind="done", counts=counted or Counts())
            return
        raise ProbeError(
            f"{path}: the stream was cut",
            why="the connection closed before the last message",
            do="look for a crash in the server's log",
        )
    finally:
        lines.close()


def _request(server: Server, prompt: str | list[int], n: int, num_ctx: int | None) -> tuple[str, dict[str, Any]]:
    if server.engine == "llama.cpp":
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "stream": True, "return_progress": True}
        return "/completion", body | {"cache_prompt": False, "ignore_eos": True, "model": server.model}
    if server.engine == "ollama":
        options = {"temperature": 0, "num_predict": n} | ({"num_ctx": num_ctx} if num_ctx else {})
        return "/api/generate", {"model": server.model, "prompt": prompt, "raw": True, "stream": True, "options": options}
    body = {"model": server.model, "max_tokens": n, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if server.engine == "vllm":
        body |= {"ignore_eos": True}
    if server.chat:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", body | {"prompt": prompt}


def _lines(exchange: Exchange, path: str, *, tick_s: float, clock: Clock) -> Generator[tuple[float, bytes | None]]:
    """The lines of an answer with the time each came, None after `tick_s` of silence.

    A thread reads, because a read that ran into its time limit cannot be taken up again; and because a line's time must not
    depend on what the caller does meanwhile.
    """
    arrived: queue.SimpleQueue[tuple[float, bytes | ProbeError]] = queue.SimpleQueue()

    def read() -> None:
        try:
            status, reason = exchange.open()
            if status != 200:
                arrived.put((clock(), _refused(path, status, reason, exchange.readline(4096) + exchange.readline(4096))))
                return
            total = 0
            while line := exchange.readline(LONGEST_LINE):
                total += len(line)
                if len(line) >= LONGEST_LINE or total > LONGEST_ANSWER:
                    why = f"a line or an answer has a limit, {LONGEST_LINE:,} and {LONGEST_ANSWER:,} bytes"
                    arrived.put((clock(), ProbeError(f"{path} sends too much", why=why, do="check the server's log")))
                    return
                arrived.put((clock(), line))
            arrived.put((clock(), b""))
        except BROKEN as error:
            what = str(error) or type(error).__name__
            arrived.put((clock(), ProbeError(f"{path}: the connection failed", why=what[:300], do="check the server's log")))
        finally:
            exchange.close()

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                at, line = arrived.get(timeout=tick_s)
            except queue.Empty:
                yield clock(), None
                continue
            if isinstance(line, ProbeError):
                raise line
            if not line:
                return
            yield at, line
    finally:
        exchange.stop()


def _object(line: bytes, *, sse: bool) -> dict[str, Any] | None:
    """The object of a line of an event stream or of JSON lines; None for what carries none."""
    line = line.strip()
    if sse:
        if line.startswith(b"error:"):  # llama-server until 2025
            line = b'{"error":' + line.removeprefix(b"error:") + b"}"
        elif not line.startswith(b"data:") and re.match(rb":|event:|id:|retry:|$", line):
            return None
        line = line.removeprefix(b"data:").strip()
    if not line or line == b"[DONE]":
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProbeError("the stream has a line that is no JSON", why=_short(line), do="check the server's log") from error
    if not isinstance(value, dict):
        raise ProbeError("the stream has a message that is no object", why=_short(line), do="check the server's log")
    found = cast("dict[str, Any]", value)
    if error := found.get("error"):
        why = str(_map(error).get("message") or error)
        raise ProbeError("the server broke off with an error", why=_short(why.encode()), do="check the server's log")
    return found


def _llama_line(at: float, line: bytes, state: dict[str, Any]) -> Iterator[Event]:
    found = _object(line, sse=True)
    if found is None:
        return
    if progress := _map(found.get("prompt_progress")):
        processed, total, cached = (_count(progress.get(k)) or 0 for k in ("processed", "total", "cache"))
        ms = _duration(progress.get("time_ms"))
        yield Event(
            at=at, kind="progress", processed=processed, total=total, cached=cached, server_s=None if ms is None else ms / 1e3
        )
    elif text := _text(found.get("content")):
        yield Event(at=at, kind="token", text=text)
    if found.get("stop") is True:
        timings = _map(found.get("timings"))
        prefill = _duration(timings.get("prompt_ms"))
        cached, new = (_count(timings.get(k)) for k in ("cache_n", "prompt_n"))
        total = _count(found.get("tokens_evaluated"))
        counts = Counts(
            prompt_tokens=total if total or new is None else new + (cached or 0),
            cached_tokens=cached,
            generated=_count(timings.get("predicted_n")) or _count(found.get("tokens_predicted")),
            prefill_s=None if prefill is None else prefill / 1e3,
        )
        yield Event(at=at, kind="done", counts=counts)


def _ollama_line(at: float, line: bytes, state: dict[str, Any]) -> Iterator[Event]:
    found = _object(line, sse=False)
    if found is None:
        return
    if text := _text(found.get("response")) or _text(found.get("thinking")):
        yield Event(at=at, kind="token", text=text)
    if found.get("done") is True:
        prefill = _duration(found.get("prompt_eval_duration"))
        counts = Counts(
            prompt_tokens=_count(found.get("prompt_eval_count")),
            generated=_count(found.get("eval_count")),
            prefill_s=None if prefill is None else prefill / 1e9,
        )
        yield Event(at=at, kind="done", counts=counts)


def _openai_line(at: float, line: bytes, state: dict[str, Any]) -> Iterator[Event]:
    found = _object(line, sse=True)
    if found is None:
        if line.strip().removeprefix(b"data:").strip() == b"[DONE]":
            yield Event(at=at, kind="done", counts=state.get("counts") or Counts())
        return
    if usage := _map(found.get("usage")):
        state["counts"] = Counts(
            prompt_tokens=_count(usage.get("prompt_tokens")),
            cached_tokens=_count(_map(usage.get("prompt_tokens_details")).get("cached_tokens")),
            generated=_count(usage.get("completion_tokens")),
        )
    for choice in map(_map, _list(found.get("choices"))[:1]):
        said = _map(choice.get("delta")) or choice
        text = next((t for k in ("text", "content", "reasoning", "reasoning_content") if (t := _text(said.get(k)))), "")
        if text:
            yield Event(at=at, kind="token", text=text)
        state["finished"] = state.get("finished") or choice.get("finish_reason") is not None


# --- what a server may send in place of what it should ---


def _map(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _duration(value: Any) -> float | None:
    number = float(value) if isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 2**63 else math.nan
    return number if math.isfinite(number) and number >= 0 else None
