"""A server under load and faults: does every request end, does nothing leak, does no answer depend on the others?

    python benchmarks/serve_load.py [--requests 200] [--seconds 300] [--kills 3] [--shared] [--seed 0] [OUT.json]

`--requests` clients at once ask a `headwise serve` of the embedded model for `--seconds`, each one thing after the other: answers
by all protocols, streamed and whole, of prompts from a line to more than the context; some leave in mid-stream, in prefill or
before a whole answer, read slowly, send bodies and bytes that nobody should, or headers a letter at a time. Meanwhile the engine's
process is killed `--kills` times while it streams. Then all ends, and it is counted: pages, slots, requests, descriptors, memory.
Some prompts are answered alone before, and again among all this, token for token (with --shared, which shares steps, they are
not compared).

Exit status 1: something happened that never must; the result lists it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import served
from served import PATHS, Answer, Exchange, Server, Violation, ask, body, post, read

from headwise.text.demo import demo_prompt

CONTEXT, SLOTS, POOL, MAX_BODY = 4096, 8, 16_384, 1  # tokens, sequences, tokens, MiB
SILENCE_S = 10.0  # longest wait of a stream for an event
CUT_OFF_S = 45.0  # most time for headers or a body that do not come
SHOWN_S = 5.0
PATIENCE_S = 600.0  # for what still runs at the end
FLAT = 0.05  # of its memory that a process may grow by in what is left of the time when the last engine is warm
FLAT_BYTES = 8 * 2**20
FLAT_AFTER_S = 60.0  # shorter runs are all warming up
PROTOCOLS = tuple(PATHS)
DIED = ("the engine's process died", "the engine does not run")
TEXT = demo_prompt()
HEADS = (TEXT[:2500], TEXT[4000:4900])  # what many prompts begin with
FIXED = [(TEXT[i * 700 : i * 700 + n], protocol) for i, n in enumerate((60, 400, 1500, 3600)) for protocol in PROTOCOLS]


def said(more: str) -> bytes:
    """A short request by every protocol at once, and what else is in its body."""
    short = '"max_tokens": 2, "max_output_tokens": 2, "stream": false'
    return f'{{"messages": [{{"role": "user", "content": "x"}}], "input": "x", "prompt": "x", {short}, {more}}}'.encode()


def held_to(schema: str) -> bytes:
    """With an answer held to a schema, in every protocol's words."""
    named = f'{{"type": "json_schema", "name": "s", "schema": {schema}}}'
    return said(
        f'"response_format": {{"type": "json_schema", "json_schema": {named}}}, "text": {{"format": {named}}}, "format": {schema}, '
        f'"output_config": {{"format": {named}}}, "options": {{"num_predict": 2}}'
    )


def nested(depth: int, before: str = '{"a":', after: str = "}") -> str:
    return before * depth + "{}" + after * depth


def tool(schema: str) -> bytes:
    function = f'"name": "f", "parameters": {schema}'
    one = f'{{"type": "function", "function": {{{function}}}, {function}, "input_schema": {schema}}}'
    return said(f'"tools": [{one}], "options": {{"num_predict": 2}}')


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "cut off": b'{"messages": [{"role": "user", "con',
    "no object": b"[1, 2]",
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe\x80"}]}',
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud83d"}], "input": "\\udc00", "prompt": "\\ud800", '
    b'"stream": false, "max_tokens": 2, "max_output_tokens": 2, "options": {"num_predict": 2}}',
    "zeros": b"\x00" * 500,
    "wrong types": b'{"messages": {"role": 1}, "input": 5, "prompt": {"a": []}, "tools": 7, "options": [1]}',
    "wrong roles": b'{"messages": [{"role": ["user"], "content": "x"}], "input": [{"role": {}, "content": 3}]}',
    "huge whole number": said(f'"seed": {"9" * 300}, "top_k": {"9" * 4000}, "options": {{"seed": {"9" * 4000}}}'),
    "too many digits": said(f'"seed": {"9" * 9000}'),
    "huge float": said('"temperature": 1e400, "top_p": -1e400, "options": {"temperature": 1e400}'),
    "not a number": said('"temperature": NaN, "top_k": Infinity, "options": {"top_k": NaN}'),
    "keeps for ever": said(f'"keep_alive": {"9" * 400}, "options": {{"num_predict": 2}}'),
    "keeps for long": said('"keep_alive": 1e18, "options": {"num_predict": 2}'),
    "keeps for long, in words": said(f'"keep_alive": "{"9" * 400}h", "options": {{"num_predict": 2}}'),
    "context too large": said('"options": {"num_ctx": 2000000000, "num_predict": 2}'),
    "many choices": said('"n": 1000000000, "options": {"num_predict": "x"}, "max_output_tokens": -1'),
    "deep list": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": said(f'"metadata": {nested(20_000)}, "options": {nested(20_000)}'),
    **{f"tools {depth} deep": tool(nested(depth)) for depth in (60, 300, 900)},
    **{f"a tool's arguments {depth} deep": tool(nested(depth, '{"type":"object","properties":{"a":', "}}")) for depth in (60, 400)},
    **{f"a schema {depth} deep": held_to(nested(depth)) for depth in (60, 300, 900)},
    **{f"objects {depth} deep": held_to(nested(depth, '{"type":"object","properties":{"a":', "}}")) for depth in (60, 400)},
    "a schema of itself": held_to('{"$ref": "#"}'),
    "an endless schema": held_to('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}'),
    "a pattern that explodes": held_to('{"type": "string", "pattern": "^((a|b)*a(a|b){1,200}){1,200}$"}'),
    "a long list": held_to('{"type": "array", "items": {"type": "integer"}, "minItems": 100000000, "maxItems": 100000001}'),
    "too long": said('"options": {"num_predict": 2}').replace(b'"x"', b'"' + b"word " * 60_000 + b'"'),
    "too large": b'{"prompt": "' + b"x" * (MAX_BODY * 2**20 + 100_000) + b'"}',
}
NOISE: dict[str, bytes] = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "no HTTP": b"hello\r\n\r\n",
    "bad length": b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 7\r\n\r\n{}",
    "bad chunk": b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "large headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "no host": b"POST /v1/responses HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
}


class Load:
    """The clients, what they saw, and the faults beside them."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server, self.args = server, args
        self.address = server.address
        self.until = 0.0
        self.lock = threading.Lock()
        self.outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.violations: list[str] = []
        self.gaps: list[float] = []
        self.kills: list[dict[str, float]] = []
        self.samples: list[tuple[float, int, int, int | None]] = []  # seconds, bytes of server and engine, the engine's pid
        self.alone: dict[int, Answer] = {}
        self.busy: dict[int, str] = {}
        self.fixed_prompts = FIXED[: max(len(PROTOCOLS), args.requests)]
        self.shown = 0.0

    # --- what a client may do; each gives its outcome in a few words ---

    def answer(self, draw: random.Random) -> str:
        """An answer by any protocol, of any length."""
        protocol, stream = draw.choice(PROTOCOLS), draw.random() < 0.6
        asked = body(
            protocol, self.prompt(draw), max_tokens=draw.choice((1, 4, 12, 12, 32, 64)), stream=stream,
            temperature=draw.choice((0.0, 0.7, 1.5)), seed=draw.randrange(2**40),
        )  # fmt: skip
        if protocol == "chat" and draw.random() < 0.2:
            asked["n"] = 3
        with self.exchange(protocol, asked) as exchange:
            return self.judged(read(protocol, exchange), stream)

    def same(self, draw: random.Random) -> str:
        """One of the fixed prompts; token for token as alone."""
        i = draw.randrange(len(self.fixed_prompts))
        stream = draw.random() < 0.5
        got = self.fixed(i, stream)
        if got.error is not None or self.args.shared:
            return self.judged(got, stream)
        want = self.alone[i]
        if (got.text, got.n_tokens) != (want.text, want.n_tokens) or (got.tokens and want.tokens and got.tokens != want.tokens):
            raise Violation(f"prompt {i} by {FIXED[i][1]}, stream {stream}: {got.text!r}, alone {want.text!r}")
        return self.judged(got, stream)

    def fixed(self, i: int, stream: bool) -> Answer:
        prompt, protocol = FIXED[i]
        asked = body(protocol, prompt, max_tokens=20, stream=stream, temperature=0)
        return ask(self.address, protocol, asked | ({"logprobs": True} if protocol == "chat" else {}))

    def leave(self, draw: random.Random) -> str:
        """Goes away: in the queue or in prefill, in mid-stream, or before a whole answer; by the book or without a word."""
        protocol, how = draw.choice(PROTOCOLS), draw.choice(("early", "in mid-stream", "before a whole answer"))
        prompt = self.prompt(draw) if how != "early" else draw.choice(HEADS) + TEXT[: draw.randrange(4000, 8000)]
        asked = body(protocol, prompt, max_tokens=400, stream=how != "before a whole answer", temperature=1.0)
        with self.exchange(protocol, asked) as exchange:
            if how == "before a whole answer":
                time.sleep(draw.random() * 2)
            elif exchange.head() == 200:
                wanted = 1 if how == "early" else draw.randrange(3, 20)
                collections.deque(itertools.islice(exchange.frames(), wanted), 0)
            exchange.close(reset=draw.random() < 0.5)
        return f"left {how}"

    def slow(self, draw: random.Random) -> str:
        """Reads a few hundred bytes at a time."""
        asked = body("chat", self.prompt(draw, most=600), max_tokens=24, stream=True, temperature=1.0)
        asked |= {"logprobs": True, "top_logprobs": 5}
        with Exchange(self.address, post(PATHS["chat"], asked), buffer=2048) as exchange:
            exchange.pause = 0.05
            return self.judged(read("chat", exchange), False)

    def hostile(self, draw: random.Random) -> str:
        """A body that is none, or asks for what there is not."""
        name, protocol = draw.choice(list(HOSTILE)), draw.choice(PROTOCOLS)
        try:
            with self.exchange(protocol, HOSTILE[name]) as exchange:
                answer = read(protocol, exchange)
        except OSError:
            if name == "too large":
                return "refused while it was sent"
            raise
        except Violation as wrong:
            raise Violation(f"{name} by {protocol}: {wrong}") from None
        if answer.status not in (200, 400, 404, 413) and not self.died(answer):
            raise Violation(f"{name} by {protocol}: {answer.status} {answer.error}")
        return f"{answer.status}" if answer.error is None or not self.died(answer) else "the engine was killed"

    def noise(self, draw: random.Random) -> str:
        """Bytes that are no request."""
        name = draw.choice(list(NOISE))
        with Exchange(self.address, NOISE[name]) as exchange:
            exchange.socket.settimeout(CUT_OFF_S)
            try:
                status = exchange.head()
            except (Violation, ConnectionError):
                return "closed"
        if not 400 <= status < 500:
            raise Violation(f"{name}: {status}")
        return str(status)

    def loris(self, draw: random.Random) -> str:
        """Headers a letter at a time, or a body that stops coming."""
        sent = b'POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"messages": '
        headers, since = draw.random() < 0.5, time.monotonic()
        with Exchange(self.address, sent[:3] if headers else sent) as exchange:
            for letter in sent[3:60] if headers else b"":
                if time.monotonic() - since > CUT_OFF_S:
                    raise Violation("a client may send its headers for ever")
                with contextlib.suppress(OSError):
                    exchange.socket.settimeout(0.7)
                    exchange.socket.sendall(bytes([letter]))
                    exchange._more()
                if exchange.buffer:
                    break
            exchange.socket.settimeout(CUT_OFF_S)
            try:
                status = exchange.head()
            except ConnectionError:
                return "closed"
            except TimeoutError:
                raise Violation("a client may send its body for ever") from None
        if status != 408:
            raise Violation(f"a slow client: {status}")
        return "408"

    ACTS: tuple[tuple[int, Callable[..., str]], ...] = (
        (45, answer), (22, same), (14, leave), (4, slow), (10, hostile), (4, noise), (1, loris),
    )  # fmt: skip

    # --- helpers of these ---

    def exchange(self, protocol: str, asked: Any) -> Exchange:
        return Exchange(self.address, post(PATHS[protocol], asked))

    def prompt(self, draw: random.Random, most: int = 14_000) -> str:
        (n,) = draw.choices(*zip((30, 20), (120, 20), (400, 25), (1000, 20), (3000, 10), (9000, 3), (14_000, 2), strict=True))
        n = min(n, most)
        start = draw.randrange(max(1, len(TEXT) - n))
        return (draw.choice(HEADS) if draw.random() < 0.3 else "") + TEXT[start : start + n] + str(draw.randrange(10**6))

    def died(self, answer: Answer) -> bool:
        return bool(self.kills) and answer.error is not None and any(word in answer.error for word in DIED)

    def judged(self, answer: Answer, stream: bool) -> str:
        if stream and answer.status == 200:
            with self.lock:
                self.gaps.append(answer.gap)
            if answer.gap > SILENCE_S:
                raise Violation(f"a stream heard nothing for {answer.gap:.1f} s")
        if answer.error is None:
            return "answered"
        if self.died(answer):
            return "the engine was killed"
        if answer.status == 400 and f"the context is {CONTEXT}" in answer.error:
            return "too long, refused"
        raise Violation(f"{answer.status}: {answer.error}")

    # --- the clients, and what happens beside them ---

    def client(self, number: int) -> None:
        draw = random.Random(self.args.seed * 100_003 + number)
        acts = [act for _, act in self.ACTS]
        weights = [weight for weight, _ in self.ACTS]
        time.sleep(draw.random() * min(2.0, self.args.seconds / 10))
        while (left := self.until - time.time()) > 0:
            (act,) = draw.choices(acts, weights)
            if act.__name__ == "loris" and left < CUT_OFF_S:
                continue
            self.busy[number] = act.__name__
            try:
                outcome = act(self, draw)
            except (Violation, OSError) as wrong:
                outcome = "VIOLATION"
                with self.lock:
                    self.violations.append(f"{act.__name__}: {wrong or type(wrong).__name__}")
            with self.lock:
                self.outcomes[act.__name__][outcome] += 1
        self.busy.pop(number, None)

    def streams(self) -> int:
        """Requests that are being answered now."""
        with contextlib.suppress(OSError, ValueError, LookupError):
            models = self.server.get("/v1/state")["models"]
            return sum(r["stage"] == "decode" for m in models for r in m["requests"])
        return 0

    def kill(self, at: float) -> None:
        """Kills the engine in mid-stream, and waits until its successor is there."""
        time.sleep(max(0.0, at - time.time()))
        while self.streams() == 0 or (pid := self.server.engine()) is None:
            if time.time() > self.until:
                return
            time.sleep(0.05)
        began = time.time()
        row = {"at_s": began - self.until + self.args.seconds}
        self.kills.append(row)
        os.kill(pid, signal.SIGKILL)
        while self.server.engine() in (pid, None) or not self.server.answers("/health"):
            if time.time() - began > served.STARTS_S:
                self.violations.append("the engine did not come back")
                return
            time.sleep(0.05)
        row["back_s"] = time.time() - began

    def beside(self) -> None:
        """Kills in the first 40 % of the time; samples memory and shows what is going on."""
        start = time.time()
        for i in range(self.args.kills):
            at = start + self.args.seconds * 0.4 * (i + 0.7) / self.args.kills
            threading.Thread(target=self.kill, args=(at,), daemon=True).start()
        while (now := time.time()) < self.until:
            engine = self.server.engine()
            self.samples.append((now - start, served.rss(self.server.pid), served.rss(engine), engine))
            self.show()
            time.sleep(min(1.0, self.args.seconds / 40))

    def show(self) -> None:
        now = time.time()
        if now - self.shown < SHOWN_S:
            return
        self.shown = now
        done = sum(sum(found.values()) for found in self.outcomes.values())
        _, server, engine, _ = self.samples[-1]
        print(
            f"{now - self.until + self.args.seconds:5.0f} s  {done} ended, {len(self.busy)} under way, {len(self.kills)} kills, "
            f"{len(self.violations)} violations; MiB: server {server / 2**20:.0f}, engine {engine / 2**20:.0f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        print(f"{len(self.fixed_prompts)} prompts alone", file=sys.stderr, flush=True)
        for i in range(len(self.fixed_prompts)):
            self.alone[i] = self.fixed(i, stream=False)
            if self.alone[i].error is not None:
                raise SystemExit(f"a prompt alone: {self.alone[i].error}")
        files = descriptors(self.server.pid)
        self.until = time.time() + self.args.seconds
        clients = [threading.Thread(target=self.client, args=(i,), daemon=True) for i in range(self.args.requests)]
        for client in clients:
            client.start()
        self.beside()
        quiet = self.quiet(clients)
        for i in range(len(self.fixed_prompts)):
            again = self.fixed(i, stream=True)
            if not self.args.shared and (again.text, again.n_tokens) != (self.alone[i].text, self.alone[i].n_tokens):
                self.violations.append(f"afterwards, prompt {i}: {again.text!r} {again.error}, before {self.alone[i].text!r}")
        return {
            "requests": self.args.requests,
            "seconds": self.args.seconds,
            "deterministic": not self.args.shared,
            "seed": self.args.seed,
            "context": CONTEXT,
            "slots": SLOTS,
            "pool_tokens": POOL,
            "ended": sum(sum(c.values()) for c in self.outcomes.values()),
            "outcomes": {act: dict(found.most_common()) for act, found in sorted(self.outcomes.items())},
            "compared": 0 if self.args.shared else self.outcomes["same"]["answered"],
            "longest_silence_s": round(max(self.gaps, default=0.0), 2),
            "kills": [{k: round(v, 2) for k, v in row.items()} for row in self.kills],
            "quiet": quiet | {"descriptors_before": files, "descriptors_after": descriptors(self.server.pid)},
            "memory": self.memory(),
            "violations": self.violations,
        }

    def quiet(self, clients: list[threading.Thread]) -> dict[str, Any]:
        """Waits until nothing runs; what is not given back then is lost."""
        ended = time.time()
        while self.busy and time.time() < ended + PATIENCE_S:
            self.show()
            next((c for c in clients if c.is_alive()), clients[0]).join(SHOWN_S)
        for act in self.busy.values():
            self.violations.append(f"{act}: neither answer nor error {PATIENCE_S:g} s after the end")
        last = time.time() - ended
        found: dict[str, float] = {}
        for _ in range(50):
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                found = self.server.gauges()
                if found["headwise_up"] and found["headwise_pages"] and not found["headwise_slots_used"]:
                    break
        names = ("headwise_pages", "headwise_pages_free", "headwise_pages_lost", "headwise_slots", "headwise_slots_used",
                 "vllm:num_requests_running", "vllm:num_requests_waiting", "headwise_engine_restarts_total",
                 "headwise_engine_stalls_total")  # fmt: skip
        counts = {name.removeprefix("headwise_").removeprefix("vllm:"): int(found.get(name, -1)) for name in names}
        users = sum(m["requests"] for m in self.server.get("/api/ps")["models"])
        for name, value in (counts | {"requests_at_the_model": users}).items():
            if name in ("pages_lost", "slots_used", "num_requests_running", "num_requests_waiting", "requests_at_the_model",
                        "engine_stalls_total") and value:  # fmt: skip
                self.violations.append(f"after all: {name} is {value}")
        if counts["engine_restarts_total"] != len(self.kills):
            self.violations.append(f"{counts['engine_restarts_total']} restarts for {len(self.kills)} kills")
        return {"last_ended_s": round(last, 1)} | counts | {"requests_at_the_model": users}

    def memory(self) -> dict[str, Any]:
        """MiB of both processes when the last engine is warm; a straight line through them must be flat."""
        out: dict[str, Any] = {}
        last = self.kills[-1] if self.kills else {"at_s": 0.0}
        after = max(self.args.seconds / 2, last["at_s"] + last.get("back_s", 0.0) + self.args.seconds / 10)
        steady = [s for s in self.samples if s[0] > after and s[3] == self.samples[-1][3]]
        for who, values in (("server", [s[1] for s in steady]), ("engine", [s[2] for s in steady])):
            if len(values) < 10:
                continue
            line = statistics.linear_regression([s[0] for s in steady], values)
            grown = line.slope * (steady[-1][0] - steady[0][0])
            of = statistics.median(values)
            out[who] = {"median_mib": round(of / 2**20, 1), "grown_mib": round(grown / 2**20, 2),
                        "mib_an_hour": round(line.slope * 3600 / 2**20, 1)}  # fmt: skip
            if self.args.seconds >= FLAT_AFTER_S and grown > max(FLAT * of, FLAT_BYTES):
                self.violations.append(f"the {who} grew by {grown / 2**20:.1f} MiB in {steady[-1][0] - steady[0][0]:.0f} s")
        step = max(1, len(self.samples) // 60)
        out["samples"] = [[round(t, 1), round(s / 2**20, 1), round(e / 2**20, 1)] for t, s, e, _ in self.samples[::step]]
        return out


def descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':10} outcome"]
    for act, found in result["outcomes"].items():
        lines.append(f"{act:10} " + ", ".join(f"{n} {outcome}" for outcome, n in found.items()))
    lines.append(f"kills      {result['kills']}")
    lines.append(f"silence    at most {result['longest_silence_s']} s in a stream; {result['compared']} answers compared")
    lines.append(f"quiet      {result['quiet']}")
    lines += [f"{who:10} {result['memory'][who]}" for who in ("server", "engine") if who in result["memory"]]
    lines += [f"VIOLATION  {said[:300]}" for said in result["violations"][:40]]
    lines.append(f"{len(result['violations'])} violations")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--shared", action="store_true", help="steps shared, drafts: without --deterministic")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    threading.stack_size(512 * 1024)
    words = ["--context", CONTEXT, "--slots", SLOTS, "--pool", POOL, "--max-body", MAX_BODY]
    about = served.about()
    with served.serving(*map(str, words), *([] if args.shared else ["--deterministic"])) as server:
        result = about | Load(server, args).run()
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
