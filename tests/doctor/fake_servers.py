"""Model servers of four APIs that answer fast, slowly, wrongly or never, on 127.0.0.1."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fake:
    """A server that makes one token of each word. All times are of the whole server: it works on one prompt at a time."""

    engine: str = "llama.cpp"
    token_s: float = 4e-6  # at depth 0
    growth_s: float = 0.0  # what each token of depth adds
    start_s: float = 0.0  # what each request costs
    chunk: int = 256
    stuck_from: int | None = None  # prompts of at least so many tokens hang after half of them
    stuck_decode: bool = False
    cut_from: int | None = None  # the connection ends after half of the prompt
    cut_decode: bool = False
    fail_from: int | None = None  # 500
    keeps: int | None = None  # longer prompts lose their beginning
    count: float = 1.0  # of what it should count
    cached: float = 0.0  # part of the prompt it calls cached
    lie_s: float | None = None  # what it says of its prefill time
    context: int | None = 100_000
    silent: bool = False  # tells no progress
    pings: bool = False  # sends what carries nothing while it is stuck
    chat_only: bool = False
    running: int = 0  # other people's requests
    n_answer: int | None = None
    forgets: bool = False
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    working: dict[str, float] = field(default_factory=lambda: {"processed": 0, "busy": 0, "prompt_total": 0})
    over: threading.Event = field(default_factory=threading.Event)

    def ids(self, text: str) -> list[int]:
        return [self.words.setdefault(w, len(self.words) + 1) for w in text.split()]

    def text(self, ids: list[int]) -> str:
        names = {i: w for w, i in self.words.items()}
        return " ".join(names[i] for i in ids)

    def pages(self) -> dict[str, Any]:
        model = {"id": "fake-model", "owned_by": self.engine}
        if self.engine == "llama.cpp":
            settings = {"n_ctx": self.context}
            slot = {"id": 0, "is_processing": bool(self.working["busy"]) or self.running > 0}
            slot |= {"n_prompt_tokens_processed": int(self.working["processed"])}
            props = {"default_generation_settings": settings, "build_info": "b9999", "model_path": "/models/fake.gguf"}
            return {"/props": props, "/slots": [slot], "/v1/models": {"data": [model]}}
        if self.engine == "ollama":
            entry = {"name": "fake:latest", "context_length": self.context}
            return {"/api/version": {"version": "0.33.0"}, "/api/ps": {"models": [entry]}, "/api/tags": {"models": [entry]}}
        if self.engine == "vllm":
            if self.silent:
                return {"/version": {"version": "0.33.0"}, "/v1/models": {"data": [model | {"max_model_len": self.context}]}}
            metrics = (
                "# HELP vllm:kv_cache_usage_perc x\n"
                f'vllm:kv_cache_usage_perc{{engine="0"}} {self.working["processed"] / 1e6}\n'
                f'vllm:num_requests_running{{engine="0"}} {self.running}.0\n'
                f'vllm:prompt_tokens_total{{engine="0"}} {self.working["prompt_total"]}\n'
            )
            listed = {"data": [model | {"max_model_len": self.context}]}
            return {"/version": {"version": "0.33.0"}, "/v1/models": listed, "/metrics": metrics.encode()}
        return {"/v1/models": {"data": [model]}}

    def door(self) -> str:
        return {"llama.cpp": "/completion", "ollama": "/api/generate"}.get(
            self.engine, "/v1/chat/completions" if self.chat_only else "/v1/completions"
        )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, answer: Any, status: int = 200) -> None:
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(404 if answer is None else status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def allowed(self) -> bool:
        if self.fake.key and self.headers["Authorization"] != f"Bearer {self.fake.key}":
            self.reply({"error": {"message": "Invalid API Key"}}, 401)
            return False
        return True

    def do_GET(self) -> None:
        if self.allowed():
            self.reply(self.fake.pages().get(self.path))

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path == "/tokenize" and fake.engine in ("llama.cpp", "vllm"):
            self.reply({"tokens": fake.ids(body.get("content", body.get("prompt")))})
        elif self.path == "/api/show" and fake.engine == "ollama":
            self.reply({"model_info": {"fake.context_length": 131_072}})
        elif self.path != fake.door():
            self.reply(None)
        elif fake.engine == "ollama" and not body["prompt"]:
            self.reply({"done": True, "done_reason": "load"})
        else:
            self.completion(body)

    def completion(self, body: dict[str, Any]) -> None:
        fake = self.fake
        fake.bodies.append(body)
        prompt = body["messages"][0]["content"] if fake.chat_only else body["prompt"]
        ids = fake.ids(prompt) if isinstance(prompt, str) else prompt
        if fake.fail_from is not None and len(ids) >= fake.fail_from:
            self.reply({"error": {"message": "CUDA error: out of memory"}}, 500)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.complete(ids, body)
        except OSError:
            pass  # the client went away
        finally:
            fake.working["busy"] = 0
            self.close_connection = True

    def line(self, value: Any) -> None:
        raw = json.dumps(value).encode() if not isinstance(value, bytes) else value
        raw = raw + b"\n" if self.fake.engine == "ollama" else b"data: " + raw + b"\n\n"
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()

    def hang(self) -> None:
        while not self.fake.over.wait(0.02):
            if self.fake.pings:
                self.wfile.write(b"7\r\n: ping\n\r\n")

    def complete(self, ids: list[int], body: dict[str, Any]) -> None:
        fake = self.fake
        if fake.keeps and len(ids) > fake.keeps:
            ids = ids[-fake.keeps :]
        fake.working.update(busy=1, processed=0)
        time.sleep(fake.start_s)
        start, done, total = time.monotonic(), int(fake.cached * len(ids)), len(ids)
        progress = {"total": total, "cache": done, "processed": done, "time_ms": 0}
        shows = fake.engine == "llama.cpp" and not fake.silent
        if shows:
            self.line({"content": "", "stop": False, "prompt_progress": progress})
        while done < total:
            n = min(fake.chunk, total - done)
            if fake.stuck_from is not None and total >= fake.stuck_from and done >= total // 2:
                self.hang()
                return
            if fake.cut_from is not None and total >= fake.cut_from and done >= total // 2:
                return
            time.sleep(n * (fake.token_s + fake.growth_s * (done + n / 2)))
            done += n
            fake.working["processed"] = done
            if shows:
                ms = 1e3 * (time.monotonic() - start)
                self.line({"content": "", "stop": False, "prompt_progress": progress | {"processed": done, "time_ms": ms}})
        prefill_s = fake.lie_s or time.monotonic() - start
        fake.working["prompt_total"] += total
        words = fake.text(ids).split()
        code = words[words.index("code") + 2].rstrip(".") if words.count("code") > 1 and not fake.forgets else "unknown"
        n = min(body.get("n_predict") or body.get("max_tokens") or body["options"]["num_predict"], 1 << 16)
        n = n if fake.n_answer is None else fake.n_answer
        for i in range(n):
            if i == 2 and fake.stuck_decode:
                self.hang()
                return
            if i == 2 and fake.cut_decode:
                return
            self.token(f" {code}." if i == 0 else " and")
        self.last(round(total * fake.count), int(fake.cached * total), n, prefill_s)
        self.wfile.write(b"0\r\n\r\n")

    def token(self, text: str) -> None:
        fake = self.fake
        if fake.engine == "llama.cpp":
            self.line({"content": text, "stop": False})
        elif fake.engine == "ollama":
            self.line({"response": text, "done": False})
        elif fake.chat_only:
            self.line({"choices": [{"delta": {"content": text}, "finish_reason": None}]})
        else:
            self.line({"choices": [{"text": text, "finish_reason": None}]})

    def last(self, total: int, cached: int, n: int, prefill_s: float) -> None:
        fake = self.fake
        if fake.engine == "llama.cpp":
            timings = {"cache_n": cached, "prompt_n": total - cached, "prompt_ms": 1e3 * prefill_s}
            self.line({"content": "", "stop": True, "tokens_evaluated": total, "timings": timings | {"predicted_n": n}})
        elif fake.engine == "ollama":
            counts = {
                "prompt_eval_count": total,
                "prompt_eval_duration": int(1e9 * prefill_s),
                "eval_count": n,
                "eval_duration": 1000,
            }
            self.line({"response": "", "done": True, "done_reason": "length"} | counts)
        else:
            self.line({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            usage = {"prompt_tokens": total, "completion_tokens": n, "prompt_tokens_details": {"cached_tokens": cached}}
            self.line({"choices": [], "usage": usage})
            self.line(b"[DONE]")


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        fake.over.set()
        server.shutdown()
        server.server_close()
