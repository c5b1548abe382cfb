"""What the benchmarks of `headwise serve` share: a server of their own, a client that sees when bytes arrived, the protocols.

Times are seconds since 1970. An arrival is the kernel's (SO_TIMESTAMPNS, Linux), so a client that is late itself blames nobody, as
long as it reads before the next bytes come; elsewhere it is when the client read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from about import commit

import headwise

MODEL = "tiny-hybrid"
PATHS = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "ollama": "/api/chat",
    "completions": "/v1/completions",
    "generate": "/api/generate",
}
STARTS_S = 180.0
SILENCE_S = 600.0  # longest wait for a byte of anything
_TIMESTAMP = getattr(socket, "SO_TIMESTAMPNS", 35) if sys.platform == "linux" else None


class Violation(Exception):
    """What a server must never do."""


def about() -> dict[str, Any]:
    """Date, commit, versions and machine of a result."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "headwise": headwise.__version__,
        "torch": metadata.version("torch"),
        "uvicorn": metadata.version("uvicorn"),
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_before": round(os.getloadavg()[0], 2),
    }


def model_file() -> str:
    return str(resources.files("headwise").joinpath(f"data/{MODEL}.gguf"))


class Server:
    """A server's process and its address; `engine` is the process of its model."""

    def __init__(self, words: Sequence[str], url: str | None = None, ready: str = "/health") -> None:
        """Starts it; without `url` it says its own in a line of JSON."""
        out, err = (subprocess.PIPE, None) if url is None else (subprocess.DEVNULL, subprocess.DEVNULL)
        self.process = subprocess.Popen(words, stdout=out, stderr=err, text=True)
        if url is None:
            assert self.process.stdout is not None
            told, _, _ = select.select([self.process.stdout], [], [], STARTS_S)
            said = self.process.stdout.readline() if told else ""
            if not said:
                self.stop()
                raise SystemExit(f"{' '.join(words)} did not start")
            url = json.loads(said)["url"]
        self.url = str(url)
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self.address: tuple[str, int] = (str(parts.hostname), parts.port)
        until = time.monotonic() + STARTS_S
        while not self.answers(ready):
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise SystemExit(f"{' '.join(words)} did not start")
            time.sleep(0.1)

    def answers(self, path: str) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return answer.status == 200
        return False

    @property
    def pid(self) -> int:
        return self.process.pid

    def engine(self) -> int | None:
        """The process id of the loaded model; None where there is none."""
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
        return None

    def get(self, path: str) -> Any:
        """JSON, or text where it is none. Raises OSError."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            said = answer.read().decode()
        try:
            return json.loads(said)
        except ValueError:
            return said

    def gauges(self) -> dict[str, float]:
        """Every sample of `/metrics` of the one model, by name without labels."""
        lines = (line.rpartition(" ") for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return {name.split("{")[0]: float(value) for name, _, value in lines if "le=" not in name}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def serving(*words: str) -> Iterator[Server]:
    """`headwise serve` on a free port, on the CPU."""
    server = Server([sys.executable, "-m", "headwise", "serve", "--port", "0", "--device", "cpu", "--only", "--json", *words])
    try:
        yield server
    finally:
        server.stop()


def rss(pid: int | None) -> int:
    """Bytes of a process in memory that no file backs; 0 where it is gone."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int | None) -> float:
    """Seconds of a core that a process has used."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Exchange:
    """One request on a connection of its own, and what comes back.

    Args:
        sent: the request as bytes; `post` makes one of a body.
        buffer: bytes that the kernel may hold for a slow reader.
    """

    def __init__(self, address: tuple[str, int], sent: bytes, *, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        if _TIMESTAMP is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, _TIMESTAMP, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(SILENCE_S)
        self.socket.connect(address)
        self.buffer, self.at, self.pause = b"", 0.0, 0.0
        self.sent = time.time()
        self.socket.sendall(sent)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _more(self) -> bool:
        """Reads once; False at the end. `at` is when it arrived."""
        if self.pause:
            time.sleep(self.pause)
        data, control, _, _ = self.socket.recvmsg(512 if self.pause else 65536, 64)
        self.at = time.time()
        for _, _, stamp in control:
            seconds, nanoseconds = struct.unpack("qq", stamp[:16])
            self.at = seconds + nanoseconds * 1e-9
        self.buffer += data
        return bool(data)

    def _line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            if not self._more():
                raise Violation(f"the connection ended in {self.buffer[:80]!r}")
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def head(self) -> int:
        """The status."""
        version, _, rest = self._line().partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise Violation(f"an answer begins with {version[:40]!r}")
        self.headers: dict[str, str] = {}
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.lower()] = value.strip()
        return int(rest[:3])

    def pieces(self) -> Iterator[tuple[float, bytes]]:
        """The body as it comes: arrival, bytes. Raises Violation: it was cut off."""
        if self.headers.get("transfer-encoding") != "chunked":
            left = int(self.headers.get("content-length", 0))
            while left > 0:
                if not self.buffer and not self._more():
                    raise Violation(f"the body ended {left} bytes early")
                piece, self.buffer = self.buffer[:left], self.buffer[left:]
                left -= len(piece)
                yield self.at, piece
            return
        while size := int(self._line(), 16):
            while len(self.buffer) < size + 2:
                if not self._more():
                    raise Violation("the stream was cut off")
            piece, self.buffer = self.buffer[:size], self.buffer[size + 2 :]
            yield self.at, piece
        self._line()

    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces())

    def frames(self) -> Iterator[tuple[float, Any]]:
        """Server-sent events or lines: arrival, JSON; the text "[DONE]" for that."""
        rest = b""
        for at, piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                line = line.strip().removeprefix(b"data: ")
                if line == b"[DONE]":
                    yield at, "[DONE]"
                elif line.startswith(b"{"):
                    yield at, json.loads(line)


def post(path: str, body: bytes | Mapping[str, Any], *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json",
             f"Content-Length: {len(data)}", *headers]  # fmt: skip
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def body(
    protocol: str, messages: Sequence[Mapping[str, str]] | str, *, max_tokens: int, stream: bool, **more: Any
) -> dict[str, Any]:
    """A request of a protocol; a text is one user's message, or what is to be continued. `more`: temperature, seed."""
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    out: dict[str, Any] = {"model": MODEL, "stream": stream}
    if protocol in ("ollama", "generate"):
        out["options"] = {"num_predict": max_tokens, **more}
        return out | ({"messages": said} if protocol == "ollama" else {"prompt": said[-1]["content"]})
    if protocol == "responses":
        return out | more | {"input": said, "max_output_tokens": max_tokens}
    if protocol == "completions":
        return out | more | {"prompt": said[-1]["content"], "max_tokens": max_tokens}
    return out | more | {"messages": said, "max_tokens": max_tokens}


@dataclass(slots=True)
class Answer:
    """What came back.

    Args:
        error: the words of an error in its protocol's shape.
        arrivals: of the frames with text; `gap`: longest wait for a frame of any kind.
        tokens: of a chat completion with logprobs, as text.
    """

    status: int
    text: str = ""
    n_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    sent: float = 0.0
    first_frame: float = 0.0
    arrivals: list[float] = field(default_factory=list[float])
    gap: float = 0.0
    tokens: list[str] = field(default_factory=list[str])

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent


def error_of(protocol: str, said: Any) -> str | None:
    """The words of an error in the protocol's shape; None where it has another."""
    error = said.get("error") if isinstance(said, dict) else None
    if protocol in ("ollama", "generate"):
        return error if isinstance(error, str) and set(said) == {"error"} else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not isinstance(error.get("type"), str):
        return None
    if protocol == "messages":
        return error["message"] if said.get("type") == "error" else None
    return error["message"] if "code" in error and "param" in error else None


def read(protocol: str, exchange: Exchange) -> Answer:
    """The whole answer, or its error. Raises Violation: it has another shape or does not come to its end."""
    status = exchange.head()
    answer = Answer(status, sent=exchange.sent)
    kind = exchange.headers.get("content-type", "")
    if status != 200 or kind.startswith("application/json"):
        said = exchange.body()
        try:
            parsed = json.loads(said)
        except ValueError:
            raise Violation(f"{status} with {said[:120]!r}") from None
        if status != 200:
            answer.error = error_of(protocol, parsed)
            if answer.error is None:
                raise Violation(f"{status} with an error in another shape: {said[:200]!r}")
            return answer
        try:
            _whole(protocol, parsed, answer)
        except (KeyError, IndexError, TypeError) as wrong:
            raise Violation(f"an answer in another shape ({wrong!r}): {said[:200]!r}") from None
        return answer
    ended, before, n = "", exchange.sent, 0
    for at, frame in exchange.frames():
        answer.first_frame = answer.first_frame or at
        answer.gap, before = max(answer.gap, at - before), at
        if ended and not (ended == "stop" and protocol in ("chat", "completions")):
            raise Violation(f"a frame after the end: {str(frame)[:200]}")
        try:
            text, ended = _frame(protocol, frame, answer, n) if frame != "[DONE]" else ("", "done")
        except (KeyError, IndexError, TypeError) as wrong:
            raise Violation(f"a frame in another shape ({wrong!r}): {str(frame)[:200]}") from None
        n += 1
        if text:
            answer.text += text
            answer.arrivals.append(at)
    if ended not in ("done", "error"):
        raise Violation(f"the stream ended without its last event, after {n} frames")
    return answer


def _frame(protocol: str, frame: Any, answer: Answer, n: int) -> tuple[str, str]:
    """A frame's text, and "stop", "done" or "error" where it is one of the last."""
    if protocol == "responses":
        if frame["sequence_number"] != n:
            raise Violation(f"sequence number {frame['sequence_number']} of frame {n}")
        kind = frame["type"]
        if kind == "response.failed":
            answer.error = frame["response"]["error"]["message"]
            return "", "error"
        if kind in ("response.completed", "response.incomplete"):
            _whole(protocol, frame["response"], done := Answer(200))
            if done.text != answer.text:
                raise Violation(f"the deltas are {answer.text[:80]!r} and the response {done.text[:80]!r}")
            answer.n_tokens, answer.prompt_tokens, answer.cached_tokens = done.n_tokens, done.prompt_tokens, done.cached_tokens
            return "", "done"
        return frame["delta"] if kind == "response.output_text.delta" else "", ""
    if "error" in frame:
        answer.error = error_of(protocol, frame)
        if answer.error is None:
            raise Violation(f"an error in another shape: {frame}")
        return "", "error"
    if protocol == "messages":
        if frame["type"] == "message_delta":
            usage = frame["usage"]
            answer.n_tokens, answer.cached_tokens = usage["output_tokens"], usage["cache_read_input_tokens"]
            answer.prompt_tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
        return frame.get("delta", {}).get("text", ""), "done" if frame["type"] == "message_stop" else ""
    if protocol in ("ollama", "generate"):
        if frame["done"]:
            answer.n_tokens, answer.prompt_tokens = frame["eval_count"], frame["prompt_eval_count"]
        return frame["message"]["content"] if protocol == "ollama" else frame["response"], "done" if frame["done"] else ""
    if not frame["choices"]:
        return "", "stop"
    choice = frame["choices"][0]
    if choice["finish_reason"] and "timings" in frame:
        answer.n_tokens, answer.cached_tokens = frame["timings"]["predicted_n"], frame["timings"]["cache_n"]
        answer.prompt_tokens = frame["timings"]["prompt_n"] + answer.cached_tokens
    if choice.get("logprobs") and protocol == "chat":
        answer.tokens += [t["token"] for t in choice["logprobs"]["content"]]
    text = choice["text"] if protocol == "completions" else choice["delta"].get("content")
    return text or "", "stop" if choice["finish_reason"] else ""


def _whole(protocol: str, said: Any, answer: Answer) -> None:
    if protocol in ("ollama", "generate"):
        answer.text = said["message"]["content"] if protocol == "ollama" else said["response"]
        answer.n_tokens, answer.prompt_tokens = said["eval_count"], said["prompt_eval_count"]
        return
    usage = said["usage"]
    if protocol in ("chat", "completions"):
        choice = said["choices"][0]
        answer.text = (choice["message"]["content"] if protocol == "chat" else choice["text"]) or ""
        answer.n_tokens, answer.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        if protocol == "chat" and choice.get("logprobs"):
            answer.tokens = [t["token"] for t in choice["logprobs"]["content"]]
        return
    if protocol == "responses":
        messages = [item for item in said["output"] if item["type"] == "message"]
        answer.text = "".join(part["text"] for item in messages for part in item["content"])
        answer.cached_tokens = usage["input_tokens_details"]["cached_tokens"]
        answer.prompt_tokens = usage["input_tokens"]
    else:
        answer.text = "".join(block.get("text", "") for block in said["content"])
        answer.cached_tokens = usage["cache_read_input_tokens"]
        answer.prompt_tokens = usage["input_tokens"] + answer.cached_tokens
    answer.n_tokens = usage["output_tokens"]


def ask(address: tuple[str, int], protocol: str, asked: Mapping[str, Any]) -> Answer:
    with Exchange(address, post(PATHS[protocol], asked)) as exchange:
        return read(protocol, exchange)
