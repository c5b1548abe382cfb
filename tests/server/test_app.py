"""The server under bad weather: hostile bodies, foreign pages, slow models, clients that leave."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

CHAT = {"model": "tiny-hybrid", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
RESPONSES = {"model": "tiny-hybrid", "input": "hello", "max_output_tokens": 4}
MESSAGES = {"model": "tiny-hybrid", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/api/chat",
         "/api/generate", "/api/show", "/api/pull", "/tokenize", "/detokenize"]  # fmt: skip


def call(live: Any, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(live.url + path, data, named), timeout=60) as answer:
            status, read = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, read = error.code, error.read()
    try:
        return status, json.loads(read)
    except ValueError:
        return status, read.decode()


def events(live: Any, path: str, body: Any) -> Iterator[dict]:
    request = urllib.request.Request(live.url + path, json.dumps({**body, "stream": True}).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            line = line.strip().removeprefix(b"data: ")
            if line.startswith(b"{"):
                yield json.loads(line)


HOSTILE = [
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"messages": 5}', b'{"messages": [5]}', b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "nobody", "content": "x"}]}', b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": 3}]}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"input": {"a": 1}}', b'{"input": [{"type": "message", "role": 7}]}',
    b'{"input": "x", "tools": [5]}',
    b'{"input": "x", "tools": [{"type": "function"}], "tool_choice": {"type": "function", "name": "no"}}',
    b'{"prompt": {"a": 1}}', b'{"prompt": [99999999]}', b'{"prompt": ["a", "b"]}', b'{"prompt": [-1]}',
    b'{"tokens": [-5]}', b'{"tokens": "x"}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}',
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "seed": 1e999, "options": {"seed": 1e999}}',
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "top_k": NaN, "options": {"top_k": -Infinity}}',
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "temperature": 1e-308, "options": {"temperature": 1e-308}}',
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "logit_bias": {"7": 1e999, "8": "nan", "9": 1e308}}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000, "options": {"num_predict": "x"}}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": [1, 2], "logit_bias": {"a": "b"}}',
    b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}, "format": {"type": 5}}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "options": {"num_predict": 2}, "response_format":'
    b' {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}}',
    b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "input": "x", "tools": [{"type": "function", "name": "f", "parameters": {0},'
    b' "function": {"name": "f", "parameters": {0}}}]}'.replace(b"{0}", b'{"a":' * 800 + b"0" + b"}" * 800),
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "keep_alive": 1' + b"0" * 400 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "keep_alive": 1e18}',
]  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
def test_no_body_is_too_strange(live: Any, path: str) -> None:
    """A 500 is a bug, and a hung request a worse one."""
    before = live.engine.totals.restarts
    for body in HOSTILE:
        if body[:2] == b'{"':
            body = b'{"stream": false, "max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}, ' + body[1:]
        status, answer = call(live, path, body)
        assert status in (200, 400, 404), (body[:80], status, answer)
        if status != 200:
            assert "error" in answer, (body[:80], answer)
    assert live.engine.totals.restarts == before  # a body that kills the engine ends other people's answers too
    assert call(live, "/api/ps")[0] == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(live: Any) -> None:
    status, answer = call(live, "/v1/chat/completions", {**CHAT, "pad": "x" * 400_000})

    assert (status, answer["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost:7433"}, 200),
    ],
)
def test_a_page_on_the_web_cannot_use_a_local_model(live: Any, headers: dict[str, str], status: int) -> None:
    """Any page can send a POST to 127.0.0.1, and by DNS rebinding read the answer."""
    assert call(live, "/api/tags", **headers)[0] == status


def test_an_api_key_is_asked_for(live: Any) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    from headwise.server.app import create_app

    client = testclient.TestClient(create_app(live.asleep, api_key="sesame"))

    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer nope"}).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
    assert client.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
    assert client.get("/ready").status_code in (200, 503)
    assert client.post("/v1/messages", json=MESSAGES).json()["error"]["type"] == "authentication_error"


def until_ready(live: Any) -> None:
    for _ in range(600):
        if call(live, "/health")[0] == 200:
            return
        time.sleep(0.1)
    raise AssertionError("the engine does not come back")


def test_health_is_true(live: Any) -> None:
    until_ready(live)
    status, told = call(live, "/health")
    assert (status, told["status"], told["model"]) == (200, "ok", "tiny-hybrid")
    assert told["models"] == [{"model": "tiny-hybrid", "status": "ok", "context": 4096}]
    assert call(live, "/nothing")[0] == 404
    assert call(live, "/v1/chat/completions")[0] == 405


def test_ready_waits_for_a_prompt_of_production_length(live: Any) -> None:
    """A server whose first agent waits for minutes, or fails, was not ready."""
    until_ready(live)
    told = []
    for _ in range(1200):
        status, answer = call(live, "/ready")
        (body,) = answer["models"]
        told.append((status, answer["ready"], body["probe"]["done"]))
        if status == 200:
            break
        time.sleep(0.05)

    assert told[-1] == (200, True, 2048)  # half the context
    assert (body["probe"]["passed"], body["checks"] > 0, body["fused"]) == (True, True, True)
    assert [done for *_, done in told] == sorted(done for *_, done in told)
    ended = live.engine.totals.requests.total()
    assert call(live, "/ready")[0] == 200
    assert live.engine.totals.requests.total() == ended  # once for an engine


def test_the_layer_map_is_told(live: Any) -> None:
    status, told = call(live, "/v1/attention")

    assert status == 200
    assert [layer["kind"] for layer in told["layers"]].count("global") == 2
    assert all(layer["verdict"] == "fused" and layer["refusals"] for layer in told["layers"])  # on a CPU the CUDA rows refuse
    assert all(check["ok"] for check in told["checks"])
    assert told["plan"]["kv"]["total_bytes"] == told["measured"]["kv_bytes"]


def test_metrics_count(live: Any) -> None:
    def value(name: str) -> float:
        (line,) = [x for x in call(live, "/metrics")[1].splitlines() if x.startswith(name + "{")]
        return float(line.split()[-1])

    before = value("vllm:generation_tokens_total"), value("vllm:prompt_tokens_total")
    usage = call(live, "/v1/chat/completions", CHAT)[1]["usage"]

    assert value("vllm:generation_tokens_total") - before[0] == usage["completion_tokens"]
    assert value("vllm:prompt_tokens_total") - before[1] == usage["prompt_tokens"]
    assert value("headwise_planned_bytes") == value("headwise_allocated_bytes") > 0


def test_tokens_go_there_and_back(live: Any) -> None:
    text = "def f(x):\n    return 'ü' <|turn>"
    tokens = call(live, "/tokenize", {"content": text})[1]["tokens"]

    assert call(live, "/detokenize", {"tokens": tokens})[1]["content"] == text
    assert live.model.tokenizer.id("<|turn>") not in tokens  # letters, as a user's text always is
    chat = call(live, "/tokenize", {"messages": CHAT["messages"]})[1]
    assert chat["count"] == call(live, "/v1/chat/completions", CHAT)[1]["usage"]["prompt_tokens"]


def test_an_empty_input_warms_up(live: Any) -> None:
    """LM Studio's clients, and `codex --oss` with them, send one and expect 200."""
    assert call(live, "/v1/responses", {"model": "tiny-hybrid", "input": "", "max_output_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "first"),
    [
        ("/v1/responses", RESPONSES, lambda e: e["type"] == "response.created"),
        ("/v1/chat/completions", CHAT, lambda e: e["choices"][0]["delta"]["role"] == "assistant"),
        ("/v1/messages", MESSAGES, lambda e: e["type"] == "message_start"),
        ("/api/chat", {**CHAT, "options": {"num_predict": 4}}, lambda e: e["done"] is False),
        ("/v1/completions", {"prompt": "x = ", "max_tokens": 3}, lambda e: e["choices"][0]["text"] == ""),
    ],
)
def test_a_client_hears_at_once_and_again_while_it_waits(
    live: Any, path: str, body: dict, first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codex gives a silent stream up after 300 s; comments do not count, data events do."""
    from headwise.server import answer

    monkeypatch.setattr(answer, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(answer, "PROGRESS_S", 0.0)
    release, held = threading.Event(), []
    ask = live.engine.ask

    async def slow(request: Any) -> Any:
        import asyncio

        while not release.is_set():
            await asyncio.sleep(0.01)
        async for event in ask(request):
            yield event

    monkeypatch.setattr(live.engine, "ask", slow)
    started = time.monotonic()
    stream = events(live, path, body)
    held.append(next(stream))
    assert time.monotonic() - started < 2
    assert first(held[0])
    held += [next(stream) for _ in range(4)]  # nothing has been computed yet
    release.set()
    held += list(stream)

    assert len(held) > 5


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES), ("/api/chat", CHAT)],
)
def test_a_client_hears_while_the_prompts_before_its_own_become_tokens(
    live: Any, path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 long prompts at once the last heard nothing for 7 seconds: all had to be encoded first. And what is refused late is
    refused in the stream, as it would have been before it."""
    from headwise.server import app

    prepared, waits = app.prepare, threading.Event()
    monkeypatch.setattr(app, "prepare", lambda *given: (waits.wait(20), prepared(*given))[1])
    until_ready(live)
    began, stream = time.monotonic(), events(live, path, body)
    next(stream)
    heard = time.monotonic() - began
    waits.set()
    rest = list(stream)
    waits.clear()
    long = {"messages": [{"role": "user", "content": "x y " * 4000}], "input": "x y " * 4000}
    refused = events(live, path, {**body, **{k: v for k, v in long.items() if k in body}})
    next(refused)
    waits.set()
    last = json.dumps(list(refused)[-1])

    assert heard < 2
    assert len(rest) > 2
    assert "and the context is 4096" in last
    assert ("context_length_exceeded" in last) == path.startswith("/v1/") or "/messages" in path


def test_progress_is_told_in_tokens(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.server import answer

    monkeypatch.setattr(answer, "PROGRESS_S", 0.0)
    body = {**RESPONSES, "input": "".join(chr(97 + i * i % 26) for i in range(4000))}
    told = [e["prompt_progress"] for e in events(live, "/v1/responses", body) if "prompt_progress" in e]

    assert [p["processed"] for p in told] == sorted(p["processed"] for p in told)
    assert told[-1]["processed"] == told[-1]["total"] > 1024
    assert len(told) > 3


def test_a_client_that_hangs_up_is_no_longer_computed_for(live: Any) -> None:
    """A turn that Codex interrupts must not hold the engine for minutes."""
    never = {"1": -100, "6": -100, "11": -100}
    stream = events(live, "/v1/chat/completions", {**CHAT, "max_tokens": 3000, "logit_bias": never})
    next(stream)
    for _ in range(600):
        if live.engine.running:
            break
        time.sleep(0.05)
    stream.close()
    for _ in range(100):
        if not live.engine.running and not live.engine.waiting:
            return
        time.sleep(0.05)
    raise AssertionError("the request still runs")


def test_many_at_once_all_end(live: Any) -> None:
    """More requests than slots, over all protocols, some of them nonsense."""
    answers: list[tuple[int, Any]] = []
    asked = [("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES), ("/v1/chat/completions", {}),
             ("/api/chat", {**CHAT, "stream": False, "options": {"num_predict": 4}})] * 6  # fmt: skip
    threads = [threading.Thread(target=lambda p=p, b=b: answers.append(call(live, p, b))) for p, b in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted({status for status, _ in answers}) == [200, 400]
    assert len(answers) == len(asked)
    assert live.engine.running == live.engine.waiting == 0


def test_pages_and_slots_are_counted_when_all_is_quiet(live: Any) -> None:
    """A page that a cancelled request keeps is missed days later, by somebody else."""
    until_ready(live)
    stream = events(live, "/v1/chat/completions", {**CHAT, "max_tokens": 300, "logit_bias": {"1": -100, "6": -100, "11": -100}})
    assert sum(1 for _ in zip(stream, range(20), strict=False)) == 20
    assert live.engine.running == 1
    stream.close()
    for _ in range(200):
        pool = call(live, "/v1/state")[1]["models"][0]["pool"]
        if not live.engine.running and pool["slots_used"] == 0:
            break
        time.sleep(0.05)

    assert pool == {"pages": 128, "pages_free": pool["pages_free"], "pages_lost": 0, "slots": 2, "slots_used": 0}
    assert 0 < pool["pages_free"] < 128  # the cache keeps what was computed
    assert "headwise_pages_lost" in call(live, "/metrics")[1]
