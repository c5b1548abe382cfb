"""Whatever a server sends, the answer is a verdict or a ProbeError: never a traceback, never a wait without end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headwise.doctor.page import probe_page
from headwise.doctor.probe import Options, Probe, probe, probe_json
from headwise.doctor.probe_view import probe_view
from headwise.doctor.servers import ENGINES, LONGEST_LINE, Engine, Server, ask, http_at, identify, stream, watch
from headwise.errors import ProbeError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LIMITS = Options(stall_s=0.1, limit_s=0.5, tick_s=0.02)
engines = st.sampled_from(ENGINES)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=4))
keys = st.sampled_from(
    "prompt_progress total cache processed time_ms content stop timings cache_n prompt_n prompt_ms predicted_n tokens_evaluated "
    "response done prompt_eval_count prompt_eval_duration eval_count thinking choices text delta finish_reason usage prompt_tokens "
    "completion_tokens prompt_tokens_details cached_tokens error message default_generation_settings n_ctx model_path models name "
    "version data id max_model_len tokens model_info is_processing n_prompt_tokens_processed next_token n_decoded".split()
)
values = st.recursive(numbers, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=5), max_leaves=12)
messages = st.dictionaries(keys, values, max_size=5).map(lambda v: json.dumps(v).encode())
rubbish = st.one_of(st.binary(max_size=80), messages.map(lambda m: m[: len(m) // 2]), st.just(b"[DONE]"), st.just(b"[" * 100_000))
lines = st.tuples(st.sampled_from([b"data: ", b"", b"event: ", b": "]), st.one_of(messages, rubbish)).map(b"".join)
bodies = st.lists(lines, max_size=8).map(b"\n".join)


class Canned:
    """The same bytes for every request."""

    def __init__(self, body: bytes, status: int = 200) -> None:
        self.file, self.status = BytesIO(body), status

    def open(self) -> tuple[int, str]:
        return self.status, "reason"

    def readline(self, limit: int) -> bytes:
        return self.file.readline(limit)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def shown(p: Probe) -> None:
    """Everything that is made of a probe can be made of this one."""
    assert p.verdict in ("ok", "slow", "stuck", "failed")
    assert json.loads(json.dumps(probe_json(p), allow_nan=False))
    assert probe_page(p).endswith("</html>\n")
    assert probe_view(p)


def server_of(engine: Engine, body: bytes, status: int = 200) -> Server:
    transport = lambda *_: Canned(body, status)  # noqa: E731
    return Server(engine=engine, version="", model="m", context=None, transport=transport)


@QUICK
@given(engines, bodies, st.sampled_from([200, 200, 200, 404, 500]))
@example("llama.cpp", b'data: {"stop": true, "timings": {"prompt_ms": 1e400}, "tokens_evaluated": 9}\n', 200)
@example("ollama", b'{"done": true, "prompt_eval_count": -5, "response": "x"}\n', 200)
@example("openai", b'data: {"choices": [null, 7], "usage": [1]}\ndata: [DONE]\n', 200)
def test_any_answer_gives_a_verdict(engine: Engine, body: bytes, status: int) -> None:
    shown(probe(server_of(engine, body, status), (64,), LIMITS))


@QUICK
@given(st.one_of(bodies, values.map(lambda v: json.dumps(v).encode())))
def test_any_introduction_is_a_server_or_an_error(body: bytes) -> None:
    try:
        server = identify(lambda *_: Canned(body))
    except ProbeError:
        return
    watch(server)
    assert server.context is None or server.context >= 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_line_without_end_is_left(engine: Engine) -> None:
    """A reader of lines would keep the whole of it in memory."""
    body = b"data: " + b"x" * (2 * LONGEST_LINE)
    with pytest.raises(ProbeError, match="too much"):
        list(stream(server_of(engine, body), "p", n_predict=1, limit_s=1, tick_s=1, clock=time.monotonic))


@contextmanager
def raw(answer: bytes, *, drip: bool = False) -> Iterator[str]:
    """A server that sends these bytes whatever is asked, and goes; or sends them one by one for ever."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                client, _ = listener.accept()
                with client:
                    client.settimeout(1)
                    client.recv(65536)
                    client.sendall(answer)
                    while drip and not over.wait(0.01):
                        client.sendall(b"x")
            except OSError:
                continue

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 999 \r\n\r\n", b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"\xff\xfe\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    ]
)  # fmt: skip
chunks = st.one_of(
    bodies, st.binary(max_size=40), bodies.map(lambda b: f"{len(b):x}\r\n".encode() + b + b"\r\n0\r\n\r\n"), st.just(b"zz\r\nabc"),
    st.just(b"ffffffffffff\r\nabc"), st.just(b"-5\r\nabc\r\n"), bodies.map(lambda b: f"{len(b) + 9:x}\r\n".encode() + b),
)  # fmt: skip


@settings(QUICK, max_examples=40)
@given(engines, heads, chunks)
def test_any_bytes_on_the_wire_give_a_verdict(engine: Engine, head: bytes, body: bytes) -> None:
    with raw(head + body) as url:
        server = Server(engine=engine, version="", model="m", context=None, transport=http_at(url))
        shown(probe(server, (64,), LIMITS))
        with suppress(ProbeError):
            identify(http_at(url))


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_bytes_that_drip_for_ever_are_stuck_or_failed(head: bytes) -> None:
    """Each byte resets the time limit of a socket."""
    start = time.monotonic()
    with raw(head, drip=True) as url:
        server = Server(engine="openai", version="", model="m", context=None, transport=http_at(url))
        assert probe(server, (64,), LIMITS).verdict in ("stuck", "failed")
        with suppress(ProbeError):
            ask(http_at(url), "/v1/models", timeout_s=0.2)
    assert time.monotonic() - start < 5
