"""The engine as the server sees it: a process that is started, watched, replaced when it dies, and asked for answers.

The watchdog looks at progress, never at wall time: a step that passes layer after layer may take as long as it likes; one
that passes none for `stall_s` seconds is killed, and its requests are told where it stood.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from headwise import errors
from headwise.engine.rates import Rate, Times
from headwise.engine.request import Event, Finish, Prefill, Request, Token
from headwise.engine.worker import main
from headwise.errors import HeadwiseError, ProbeError

STALL_S = 120.0
START_ATTEMPTS = 3  # starts in a row that died before the model was ready
State = Literal["loading", "ready", "failed", "stopped"]


@dataclass(slots=True)
class _Live:
    """A request without its last event."""

    request: Request
    events: asyncio.Queue[Event]
    admitted: bool = False
    last: Prefill | None = None
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    token_at: float | None = None  # when its last token came


@dataclass(slots=True)
class Totals:
    """Counters since the server started."""

    requests: Counter[str] = field(default_factory=Counter[str])  # by finish reason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    restarts: int = 0
    stalls: int = 0
    prefill: Rate = field(default_factory=Rate)  # tokens of prompts computed, as they are
    decode: Rate = field(default_factory=Rate)  # tokens of answers, as they come
    times: Times = field(default_factory=Times)


class EngineProcess:
    """Owns the worker. All methods are called from one event loop.

    Args:
        model, settings: as `LLM` takes them; the worker reads the model again.
        stall_s: seconds without any progress of a running step after which the worker is replaced.
    """

    def __init__(self, model: str | None, settings: Mapping[str, Any], *, stall_s: float = STALL_S) -> None:
        self.model, self.settings, self.stall_s = model, dict(settings), stall_s
        self.state: State = "loading"
        self.facts: dict[str, Any] = {}
        self.pool: dict[str, int] = {}  # pages and slots, as `engine.prefixes` counts them
        self.loading: tuple[str, int, int] | None = None
        self.error: HeadwiseError | None = None
        self.totals = Totals()
        self.pid: int | None = None
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count(1)
        self._outbox: queue.SimpleQueue[tuple[str, object] | None] | None = None
        self._beat: Any = None
        self._stalled_at = ""
        self._told = time.monotonic()  # when the engine last told of a step
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        return sum(not live.admitted for live in self._live.values())

    @property
    def running(self) -> int:
        return sum(live.admitted for live in self._live.values())

    def held_tokens(self) -> int:
        """Tokens in the slots of running requests."""
        return sum((live.last.done if live.last else 0) + live.tokens for live in self._live.values())

    def requests(self) -> list[dict[str, Any]]:
        """The requests without their last event, oldest first: stage, tokens so far, and seconds since they came."""
        now = time.monotonic()
        return [
            {
                "id": id_,
                "stage": "decode" if live.tokens else "prefill" if live.admitted else "queue",
                "prompt_tokens": len(live.request.prompt),
                "prompt_done": live.last.done if live.last else 0,
                "cached_tokens": live.last.cached if live.last else 0,
                "tokens": live.tokens,
                "max_tokens": live.request.sampling.max_tokens,
                "age_s": round(now - live.since, 1),
            }
            for id_, live in self._live.items()
        ]

    def at(self) -> dict[str, int] | None:
        """The layer that was begun last, of how many so far, and its step's positions; None while nothing runs."""
        if self._beat is None or not self.running:
            return None
        count, layer, start, n = self._beat
        return {"layer": layer, "start": start, "tokens": n, "layers_begun": count}

    def pulse(self) -> tuple[object, ...]:
        """Changes with every step forward: of loading, of a layer, of a prompt, of an answer."""
        t = self.totals
        return (self.state, self.loading, tuple(self._beat or ()), t.restarts, t.prefill.total, t.decode.total, t.requests.total())

    async def run(self) -> None:
        """Keeps a worker running until cancelled, or until it cannot be started; then `error` says why."""
        failures = 0
        try:
            while True:
                was_ready = await self._one_worker()
                if self.error is not None:
                    break
                failures = 0 if was_ready else failures + 1
                if failures >= START_ATTEMPTS:
                    self.error = ProbeError(
                        "the engine's process died while it loaded the model",
                        why=f"{failures} times in a row",
                        do="headwise verify MODEL, and look at the machine's log for a process killed for its memory",
                    )
                    break
                self.totals.restarts += 1
                await asyncio.sleep(min(0.1 * 2**failures, 5.0))
            self._set("failed")
            self._fail_all("the engine cannot be started", str(self.error), "headwise run MODEL shows the same error", all_=True)
        finally:
            if self.state != "failed":
                self._set("stopped")
            self._fail_all("the server is stopping", "", "send the request again", all_=True)

    async def until_settled(self) -> State:
        """Waits until the model is loaded or cannot be."""
        while self.state == "loading":
            await self._changed.wait()
        return self.state

    async def ask(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request, given an id here, the last one a Finish; leaving early cancels it."""
        request = replace(request, id=next(self._ids))
        if self.state in ("failed", "stopped"):
            why = str(self.error or "the server is stopping")
            yield Finish(request=request.id, reason="error", error=("the engine does not run", why, ""), retry=True)
            return
        live = self._live[request.id] = _Live(request, asyncio.Queue())
        if self.state == "ready":
            self._send("submit", request)
        try:
            while True:
                event = await live.events.get()
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            if self._live.pop(request.id, None) is not None:
                self._send("cancel", request.id)
                self.totals.requests["cancelled"] += 1

    async def _one_worker(self) -> bool:
        """Starts a worker, serves until it dies; whether it had loaded its model."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        beat = context.RawArray("q", 4)
        process = context.Process(target=main, args=(theirs, beat, self.model, self.settings), daemon=True, name="headwise-engine")
        await asyncio.to_thread(process.start)
        theirs.close()
        outbox = queue.SimpleQueue[tuple[str, object] | None]()
        self.pid, self._outbox, self._beat, self._stalled_at = process.pid, outbox, beat, ""
        loop = asyncio.get_running_loop()
        dead = asyncio.Event()

        def read() -> None:
            with contextlib.suppress(EOFError, OSError, RuntimeError):  # RuntimeError: the loop is closed
                while True:
                    loop.call_soon_threadsafe(self._receive, ours.recv())
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(dead.set)

        def write() -> None:  # not on the loop: the pipe is full while the engine is in a long step
            with contextlib.suppress(OSError):  # it has just died: the reader notices
                while (message := outbox.get()) is not None:
                    ours.send(message)

        threading.Thread(target=read, name="headwise-engine-reader", daemon=True).start()
        threading.Thread(target=write, name="headwise-engine-writer", daemon=True).start()
        watchdog = asyncio.create_task(self._watch(process))
        try:
            await dead.wait()
        finally:
            watchdog.cancel()
            process.kill()
            self._outbox = None
            outbox.put(None)
            await asyncio.shield(asyncio.to_thread(process.join, 10))
            ours.close()
        was_ready, self.pool = self.state == "ready", {}
        if self.error is None:
            self._set("loading")
            what = "a step of the engine made no progress" if self._stalled_at else "the engine's process died"
            why = self._stalled_at or f"exit status {process.exitcode}"
            self._fail_all(what, why, "send the request again; the engine is being restarted", all_=False)
        return was_ready

    async def _watch(self, process: Any) -> None:
        """Kills the worker when a running request's step stands still."""
        seen, since = None, time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self.stall_s / 4))
            now = (tuple(self._beat), tuple((live.last, live.tokens) for live in self._live.values()))
            if now != seen or not self.running:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.stall_s:
                self._stalled_at = self._where()
                self.totals.stalls += 1
                process.kill()
                return

    def _where(self) -> str:
        _, layer, start, n = self._beat
        known = self.facts.get("layers") or []
        words = f"{known[layer]['kind']}, {known[layer]['backend']}" if layer < len(known) else "unknown"
        return f"layer {layer} ({words}) at positions {start}..{start + n - 1}; no progress for {self.stall_s:g} s"

    def _receive(self, message: Any) -> None:
        if isinstance(message, tuple):
            match message:
                case ("loading", *said):
                    self.loading = (said[0], said[1], said[2])
                case ("ready", facts):
                    self.facts = facts
                    self._set("ready")
                    for live in self._live.values():
                        self._send("submit", live.request)
                case ("pool", counts):
                    self.pool = counts
                case ("refused", name, what, why, do):
                    self.error = getattr(errors, name)(what, why=why, do=do)
                case _:
                    raise ValueError(f"the worker said {message[0]!r}")
            return
        live = self._live.get(message.request)
        if live is None:  # its client went away
            return
        match message:
            case Prefill():
                computed = message.done - (live.last.done if live.last else message.done)
                live.admitted, live.last = True, message
                self.totals.prefill.add(computed, self._since_told())
            case Token():
                live.tokens += 1
                self.totals.decode.add(1, self._since_told())
                if live.token_at is not None:
                    self.totals.times.between_tokens.observe(self._told - live.token_at)
                live.token_at = self._told
            case Finish():
                del self._live[message.request]
                self._count(message)
        live.events.put_nowait(message)

    def _since_told(self) -> float:
        before, self._told = self._told, time.monotonic()
        return self._told - before

    def _count(self, finish: Finish) -> None:
        self.totals.requests[finish.reason] += 1
        self.totals.prompt_tokens += finish.prompt_tokens
        self.totals.cached_tokens += finish.cached_tokens
        self.totals.tokens += finish.tokens
        self.totals.drafted += finish.drafted
        self.totals.accepted += finish.accepted
        self.totals.times.finished(finish)

    def _fail_all(self, what: str, why: str, do: str, *, all_: bool) -> None:
        """Ends the requests that had begun, or all; those that wait are given to the next worker."""
        for id_, live in list(self._live.items()):
            if all_ or live.admitted:
                del self._live[id_]
                finish = Finish(request=id_, reason="error", error=(what, why, do), retry=True)
                self._count(finish)
                live.events.put_nowait(finish)

    def _send(self, what: str, value: object) -> None:
        if self._outbox is not None:
            self._outbox.put((what, value))

    def _set(self, state: State) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()
