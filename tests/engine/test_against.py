"""Comparing with a running server: three APIs, agreement, ties, real differences, and servers that fail."""

from __future__ import annotations

import functools
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from rich.console import Console

from headwise import LLM
from headwise.engine import against
from headwise.errors import ProbeError


@functools.cache
def llm() -> LLM:
    return LLM(device="cpu", context=600, check=False)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "N_TOKENS", 4)
    monkeypatch.setattr(against, "PROMPTS", {k: v[:300] for k, v in against.PROMPTS.items() if k != "many languages"})


def honest(ids: list[int], shift: float = 0.0) -> list[tuple[int, dict[int, float]]]:
    """What a server with the same model answers; `shift` spoils its log-probabilities."""
    steps: list[tuple[int, dict[int, float]]] = []
    ids = list(ids)
    for _ in range(4):
        logprobs = llm().logits(ids)[-1].log_softmax(-1)
        top = logprobs.topk(3)
        steps.append((int(top.indices[0]), {int(i): float(p) + shift for p, i in zip(top.values, top.indices, strict=True)}))
        ids.append(steps[-1][0])
    return steps


class Fake:
    """One server; `kind` says whose API it speaks, `answer` what it computes."""

    def __init__(self, kind: str, answer: Any = honest) -> None:
        self.kind, self.answer = kind, answer

    def get(self, path: str) -> Any:
        return {
            ("llama", "/props"): {"default_generation_settings": {}, "build_info": "b9999"},
            ("ollama", "/api/version"): {"version": "0.33.0"},
            ("ollama", "/api/ps"): {"models": [{"name": "tiny"}]},
            ("vllm", "/v1/models"): {"data": [{"id": "tiny"}]},
            ("vllm", "/version"): {"version": "0.33.0"},
        }.get((self.kind, path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/api/show":
            return {}
        tokenizer = llm().tokenizer
        ids = body["prompt"] if isinstance(body["prompt"], list) else tokenizer.encode(body["prompt"])
        steps = self.answer(ids)
        if self.kind == "llama":
            return {
                "tokens": [t for t, _ in steps],
                "completion_probabilities": [
                    {"id": t, "top_logprobs": [{"id": i, "logprob": p} for i, p in c.items()]} for t, c in steps
                ],
            }
        if self.kind == "vllm":
            tops = [{f"token_id:{i}": p for i, p in c.items()} for _, c in steps]
            return {"choices": [{"logprobs": {"tokens": [f"token_id:{t}" for t, _ in steps], "top_logprobs": tops}}]}
        return {"logprobs": [{"token": tokenizer.token_bytes(t).decode(), "logprob": 0.0, "top_logprobs": []} for t, _ in steps]}


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def reply(self, answer: Any) -> None:
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.reply(fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(fake.post(self.path, body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def compared(fake: Fake) -> tuple[int, str]:
    out = io.StringIO()
    with served(fake) as url:
        code = against.compare(llm(), url, as_json=False, console=Console(file=out, width=120))
    return code, out.getvalue()


def rows_of(fake: Fake) -> list[dict[str, Any]]:
    printed = io.StringIO()
    with served(fake) as url, redirect_stdout(printed):
        against.compare(llm(), url, as_json=True, console=Console(file=io.StringIO()))
    return json.loads(printed.getvalue())["prompts"]


@pytest.mark.parametrize(("kind", "name"), [("llama", "llama-server b9999"), ("vllm", "vllm 0.33.0")])
def test_the_same_model_agrees(kind: str, name: str) -> None:
    code, text = compared(Fake(kind))

    assert code == 0
    assert f"against {name}: agrees" in text
    assert "4/4" in text


def test_ollamas_tokens_are_compared_by_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without candidates there is nothing to measure, so that alone is no agreement."""
    code, text = compared(Fake("ollama"))

    assert code == 1
    assert "4/4" in text


def test_other_log_probabilities_differ() -> None:
    code, text = compared(Fake("llama", lambda ids: honest(ids, shift=0.3)))

    assert code == 1
    assert "DIFFERS" in text


def test_another_token_is_a_difference_and_a_tie_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def second(ids: list[int]) -> list[tuple[int, dict[int, float]]]:
        (_, candidates) = honest(ids)[0]
        other = sorted(candidates, key=lambda i: -candidates[i])[1]
        return [(other, candidates), *honest([*ids, other])[:3]]

    assert compared(Fake("llama", second))[0] == 1
    monkeypatch.setattr(against, "TIE", 50.0)
    assert compared(Fake("llama", second))[0] == 0


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (Fake("nothing"), "no engine that is known"),
        (Fake("llama", lambda ids: []), "completion_probabilities"),
        (Fake("llama", lambda ids: [(10**6, {})]), "1000000"),
    ],
)
def test_servers_that_cannot_be_compared_are_explained(fake: Fake, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        compared(fake)


def test_no_server_is_an_error_at_once() -> None:
    with pytest.raises(ProbeError, match="gave no answer"):
        against.compare(llm(), "127.0.0.1:1", as_json=False, console=Console(file=io.StringIO()))


def test_json_has_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Fake("llama")) as url:
        against.compare(llm(), url, as_json=True, console=Console(file=io.StringIO()))
    answer = json.loads(capsys.readouterr().out)

    assert answer.keys() == {"model", "engine", "version", "agrees", "prompts"}
    assert answer["prompts"][0].keys() >= {"prompt", "tokens", "equal", "ties", "mean_difference", "max_difference", "agrees"}
    assert torch.isfinite(torch.tensor([p["max_difference"] for p in answer["prompts"]])).all()


def test_a_llama_server_that_leaves_out_half_characters_is_compared_at_the_right_positions() -> None:
    """llama-server b1-0c1e570 gave 22 steps for 32 tokens of Cyrillic and Arabic; every later position was off."""

    class Silent(Fake):
        def post(self, path: str, body: dict[str, Any]) -> Any:
            answer = super().post(path, body)
            del answer["completion_probabilities"][1]
            return answer

    rows = rows_of(Silent("llama"))

    assert all(r["agrees"] and r["equal"] == r["tokens"] == 4 for r in rows)


def test_prompts_are_cut_to_the_servers_context() -> None:
    """A server with 4,096 tokens refused the long prompt, and with it the comparison."""
    asked: list[int] = []

    class Small(Fake):
        def get(self, path: str) -> Any:
            return {"default_generation_settings": {"n_ctx": 40}} if path == "/props" else None

        def post(self, path: str, body: dict[str, Any]) -> Any:
            asked.append(len(body["prompt"]))
            return super().post(path, body)

    rows_of(Small("llama"))

    assert max(asked) == 40 - 4 - 1
