"""What a client may not do: be slow for ever, leave its path, be another page, or bring a template."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from server.test_app import CHAT, call, until_ready

from headwise.errors import UsageError
from headwise.server import serve


def address(live: Any) -> tuple[str, int]:
    parts = urlsplit(live.url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port


def raw(live: Any, sent: bytes) -> tuple[bytes, float]:
    """What comes back until the server closes, and after how long."""
    started, got = time.monotonic(), b""
    with socket.create_connection(address(live), timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        while piece := connection.recv(4096):
            got += piece
    return got, time.monotonic() - started


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.server import app, slow

    monkeypatch.setattr(slow, "HEADER_S", 1.0)
    monkeypatch.setattr(app, "BODY_S", 1.0)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_do_not_come_to_an_end_are_cut_off(live: Any, first: bytes) -> None:
    """A thousand connections that send a letter a minute are all that a server without a limit can hold. Also after an answer."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    with socket.create_connection(address(live), timeout=10) as connection:
        if first:
            connection.sendall(first)
            assert connection.recv(4096).startswith(b"HTTP/1.1")
        started, got = time.monotonic(), b""
        connection.settimeout(0.2)
        for letter in head + b"x" * 40:
            try:
                connection.sendall(bytes([letter]))
                got += connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if b"408" in got:
                break
        assert b"HTTP/1.1 408" in got
        assert 0.8 < time.monotonic() - started < 4


@pytest.mark.usefixtures("hurried")
def test_a_body_that_stops_coming_is_refused(live: Any) -> None:
    sent = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 500\r\n\r\n{"messages": '
    got, seconds = raw(live, sent)

    assert b" 408 " in got.split(b"\r\n")[0]
    assert b"no byte of the body came" in got
    assert seconds < 5


@pytest.mark.usefixtures("hurried")
def test_an_answer_may_take_longer_than_any_header(live: Any) -> None:
    """The limit is on what a client sends, not on what it waits for."""
    until_ready(live)
    never = {"1": -100, "6": -100, "11": -100}
    status, answer = call(live, "/v1/chat/completions", {**CHAT, "max_tokens": 300, "logit_bias": never})

    assert (status, answer["usage"]["completion_tokens"]) == (200, 300)


def test_headers_that_are_too_large_are_refused(live: Any) -> None:
    got, _ = raw(live, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n")

    assert got.startswith(b"HTTP/1.1 400")


def test_a_body_without_a_length_is_limited_too(live: Any) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 20_000

    connection = http.client.HTTPConnection(*address(live), timeout=20)
    try:
        connection.request("POST", "/tokenize", body=chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all was sent


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2fsecret",
             "/page.html", "/static/app.py", "//etc/passwd", "/v1/models/{{7*7}}", "/..%5c..%5cwindows", "/%00"],
)  # fmt: skip
def test_no_path_leads_to_a_file(live: Any, path: str) -> None:
    connection = http.client.HTTPConnection(*address(live), timeout=20)
    connection.putrequest("GET", path, skip_host=False)  # as it is, not made tidy
    connection.endheaders()
    answer = connection.getresponse()
    said = answer.read()

    assert answer.status == 404, said
    assert b"root:" not in said and b"49" not in said


def test_a_name_of_a_model_is_a_name_and_no_path(live: Any) -> None:
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "ollama:../../x",
        "hf:a/../../b",
        "tiny-hybrid/../x",
        "\x00",
        "{{7*7}}",
        "http://127.0.0.1:1/x",
    ):
        assert call(live, "/v1/chat/completions", {**CHAT, "model": name})[0] == 404, name
        assert call(live, "/api/show", {"model": name})[0] == 404, name
        assert call(live, "/api/pull", {"model": name, "stream": False})[0] == 400, name


def test_a_request_brings_no_template(live: Any) -> None:
    """A template is a program; a client's must not run here, nor may a message be taken for one."""
    until_ready(live)
    said = "{{ 7 * 7 }}{% for x in range(3) %}x{% endfor %}"
    plain = call(live, "/tokenize", {"messages": [{"role": "user", "content": said}]})[1]["tokens"]
    brought = {"messages": [{"role": "user", "content": said}], "chat_template": "{{ 7 * 7 }}",
               "chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}", "messages": [], "bos_token": "x"}}  # fmt: skip

    assert said in live.model.tokenizer.decode(plain, skip_special=False)
    assert call(live, "/tokenize", brought)[1]["tokens"] == plain


def test_no_other_page_is_told_that_it_may(live: Any) -> None:
    """CORS is off: no answer allows another origin, and a preflight is refused."""
    for method, origin in (
        ("OPTIONS", "https://evil.example"),
        ("OPTIONS", "http://localhost:3000"),
        ("GET", "http://localhost:3000"),
    ):
        connection = http.client.HTTPConnection(*address(live), timeout=20)
        connection.request(method, "/v1/models", headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
        answer = connection.getresponse()
        answer.read()

        assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
        assert answer.status == (200 if method == "GET" else 403 if "evil" in origin else 405)


def test_the_page_runs_its_own_script_only(live: Any) -> None:
    connection = http.client.HTTPConnection(*address(live), timeout=20)
    connection.request("GET", "/", headers={"Accept": "text/html"})
    answer = connection.getresponse()
    html = answer.read().decode()
    policy = answer.getheader("content-security-policy") or ""

    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "'sha256-" in policy.split("script-src")[1].split(";")[0]
    assert answer.getheader("x-content-type-options") == "nosniff"
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html and " src=" not in html
    assert call(live, "/") == (200, "headwise is running")  # Claude Code and Ollama's clients only look whether somebody is here


def test_only_four_paths_are_open_without_the_key(live: Any) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    from headwise.server.app import create_app

    client = testclient.TestClient(create_app(live.asleep, api_key="sesame"))
    described = call(live, "/openapi.json")[1]["paths"]
    answers = {
        (p, m): client.request(m, p.replace("{name}", "x"), json={}).status_code for p, item in described.items() for m in item
    }

    assert {path for (path, _), status in answers.items() if status != 401} == {"/", "/health", "/ready", "/metrics"}
    assert client.get("/openapi.json").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer sesame\u00e9".encode()}).status_code == 401


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_ollamas_address_is_listened_on_beside_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "OLLAMA_ADDRESS", ollamas := ("127.0.0.1", free_port()))
    both = serve.sockets_of(serve.Options(port=0, ollama_compat=True))
    try:
        assert both[1].getsockname() == ollamas
        for listening in both:
            socket.create_connection(listening.getsockname(), timeout=5).close()
    finally:
        for listening in both:
            listening.close()
    (own,) = serve.sockets_of(serve.Options(port=ollamas[1], ollama_compat=True))  # the same one
    own.close()


def test_an_address_that_ollama_holds_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """And our own port is free again: who starts a second time meets no other error."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(serve, "OLLAMA_ADDRESS", taken.getsockname())
        with pytest.raises(UsageError, match="cannot be listened on") as refused:
            serve.sockets_of(serve.Options(port=port, ollama_compat=True))

    assert "systemctl stop ollama" in refused.value.do
    socket.create_server(("127.0.0.1", port)).close()


def test_the_first_client_does_not_wait_for_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was compiled for the first request, whose first event took 200 ms and the next one's 10."""
    from headwise.spec.read import open_model

    prepared: list[str] = []

    def no_port(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "prepare", lambda ask, model: prepared.append(model.name))
    monkeypatch.setattr(serve, "sockets_of", no_port)
    with pytest.raises(KeyboardInterrupt):
        serve.serve([(None, open_model(None, env={}))], {}, serve.Options(), env={}, on_ready=lambda url, engine: None)

    assert prepared == ["tiny-hybrid"]
