"""The models that are loaded: on request, side by side where the plans fit, each in a process of its own; gone when idle.

A request names a model, waits here until it may use it, and is counted as its user until it ends. A model in use is never
ended: who needs its memory waits until its requests have ended, and requests that come later wait behind. Of idle models the
least recently used goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from headwise import api
from headwise.engine.process import STALL_S, EngineProcess, Totals
from headwise.engine.request import Event, Finish, Prefill, Request
from headwise.errors import HeadwiseError, PlanError, UsageError
from headwise.hardware.names import device_name
from headwise.hardware.probe import Device, cpu_memory, detect
from headwise.planner.memory import CPU_MARGIN_BYTES, GPU_MARGIN_BYTES, Plan, Room, Target
from headwise.planner.render import gib
from headwise.server.answer import Served, served
from headwise.server.ask import Refusal, bad
from headwise.server.ready import Probe
from headwise.spec.read import Source
from headwise.spec.shelf import Held, find, nearest, shelf
from headwise.text.tokenizer import read_tokenizer

DEFAULT_CONTEXT = 32_768
KEEP_S = 300.0  # Ollama's default
_FOR_EVER_S = 1e9  # 30 years; what is longer has no date to be told by
FAILED_S = 10.0  # a model that could not be loaded is not tried again at once
_SHELF_S = 5.0
_TOKENIZERS = 8  # of models that are not loaded
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_seconds(value: object) -> float:
    """Ollama's keep_alive: seconds, or "10m", "1h30m"; 0 is none, and below 0, or in years, is for ever (math.inf).

    Raises:
        ValueError: it is neither.
    Source: ollama fb307609, api/types.go Duration.UnmarshalJSON.
    """
    if isinstance(value, str):
        text = value.strip()
        sign = -1 if text.startswith("-") else 1
        parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", text.lstrip("+-"))
        if re.fullmatch(r"[+-]?\d+(\.\d+)?", text):
            value = float(text)
        elif parts and "".join(n + unit for n, unit in parts) == text.lstrip("+-"):
            value = sign * sum(float(n) * _UNITS[unit] for n, unit in parts)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{value!r} is no duration: seconds, or a text such as 10m; 0 unloads, -1 keeps")
    return float(value) if 0 <= value < _FOR_EVER_S else math.inf


@dataclass(slots=True, kw_only=True)
class Loaded:
    """A model with a process.

    Args:
        n_bytes: planned, with the margin of its process.
        rooms: what its engine may take, as planned, and less where it sees less memory; none: for it to say.
        keep_s: how long it stays when its last request has ended.
        uses: requests that hold it.
        turn: when its last request ended, as a count.
        expires: when it goes, in seconds since 1970; None while it is used or for ever.
        leaving: its memory is wanted: nobody new may use it.
        ending: its process is being ended.
        probe: of `/ready`.
    """

    held: Held
    context: int
    engine: EngineProcess
    n_bytes: int
    rooms: Sequence[Room]
    keep_s: float
    uses: int = 0
    turn: int = 0
    expires: float | None = None
    leaving: bool = False
    ending: bool = False
    probe: Probe
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.held.name


@dataclass(slots=True, eq=False, kw_only=True)
class _Want:
    """A request that waits for its model."""

    held: Held
    context: int
    keep_s: float | None
    n_bytes: int
    rooms: Sequence[Room]
    granted: asyncio.Future[Loaded]


class NotLoaded(Exception):
    """The model could not be loaded; `error` says why."""

    def __init__(self, error: HeadwiseError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class Resident:
    """What `who_leaves` knows of a loaded model."""

    name: str
    n_bytes: int
    busy: bool
    turn: int


def who_leaves(residents: Sequence[Resident], n_bytes: int, capacity: int) -> list[str] | None:
    """Who has to go so that `n_bytes` more fit into `capacity`: idle before busy, least recently used first; None: no use.

    Nobody goes whose going is not needed in the end.
    """
    if n_bytes > capacity:
        return None
    free = capacity - sum(r.n_bytes for r in residents) - n_bytes
    gone: list[Resident] = []
    for r in sorted(residents, key=lambda r: (r.busy, r.turn)):
        if free >= 0:
            break
        gone.append(r)
        free += r.n_bytes
    for r in sorted(gone, key=lambda r: (r.busy, r.turn), reverse=True):  # a large one may have made the small ones' going vain
        if free >= r.n_bytes:
            gone.remove(r)
            free -= r.n_bytes
    return [r.name for r in gone]


@dataclass(eq=False)
class Models:
    """All models that clients may ask for, and those of them that are loaded. Used from one event loop.

    Args:
        named: given at start, the first is loaded at once and is meant where a request names none.
        settings: as `LLM` takes them, the same for all; without a context, 32,768 or the model's maximum; without slots, those of
            `planner.memory.rooms` that fit beside the other models.
        env: the environment, for the places of Ollama's store.
        max_tokens: of answers whose request sets no limit.
        keep_s: of models whose requests say nothing; None: for ever for those named at start, 5 minutes for others.
        only: serve none but those named.
        on_failed: called when the first model cannot be loaded at the start.
        memory: (total, used) bytes of a device, "cpu" or "cuda:N", under an environment.
    """

    named: Sequence[Held]
    settings: Mapping[str, Any]
    env: Mapping[str, str]
    max_tokens: int | None = None
    keep_s: float | None = None
    only: bool = False
    stall_s: float = STALL_S
    on_failed: Callable[[], None] = lambda: None
    memory: Callable[[str, Mapping[str, str]], tuple[int, int]] = lambda device, env: _memory(device, env)
    loaded: dict[str, Loaded] = field(default_factory=dict[str, Loaded])
    totals: dict[str, Totals] = field(default_factory=dict[str, Totals])
    failed: dict[str, tuple[HeadwiseError, float]] = field(default_factory=dict[str, tuple[HeadwiseError, float]])
    fatal: HeadwiseError | None = None  # why the first model could not be loaded at the start
    devices: dict[str, int | None] = field(default_factory=dict[str, int | None])  # "cpu" or "cuda:N" -> most bytes of it to take
    _shelf: tuple[float, list[Held]] = (-math.inf, [])
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sources: dict[tuple[str, float], Source] = field(default_factory=dict[tuple[str, float], Source])
    _served: dict[tuple[str, float], Served] = field(default_factory=dict[tuple[str, float], Served])
    _queue: list[_Want] = field(default_factory=list[_Want])
    _turns: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    _used: list[int] = field(default_factory=list[int])  # bytes of each device in use when nothing of ours was loaded
    _capacity: int = 0  # bytes for our models and the margins of their processes
    _was_ready: bool = False
    _first: EngineProcess | None = None
    _started: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.devices = _devices(self.settings.get("device"), self.env)

    # --- what there is ---

    @property
    def first(self) -> Held:
        return self.named[0]

    def all(self) -> list[Held]:
        """What clients may ask for, those named at start first; what cannot be run is not among them. Reads directories."""
        if self.only:
            return list(self.named)
        with self._lock:
            since, found = self._shelf
            if time.monotonic() - since > _SHELF_S:
                found = [m for m in shelf(self.env) if m.problem is None]
                self._shelf = (time.monotonic(), found)
        taken = {m.name for m in self.named}
        return [*self.named, *(m for m in found if m.name not in taken)]

    def look_again(self) -> None:
        """Forgets what was seen on disk: something was pulled."""
        self._shelf = (-math.inf, [])

    def find(self, name: str | None) -> Held:
        """The model of a name; no name is the first.

        Raises:
            Refusal: no such model, with the nearest names.
        """
        if not name:
            return self.first
        if found := find(self.named, name):
            return found
        models = self.all()
        if found := find(models, name):
            return found
        near = nearest(models, name) or [m.name for m in models[:3]]
        said = f"the model {name[:120]!r} is not on this machine; the nearest names are {', '.join(near)}"
        raise Refusal(404, "model_not_found", said if not self.only else f"the model {name[:120]!r} is not served here; "
                      f"{', '.join(m.name for m in self.named[:8])} may be asked for", param="model")  # fmt: skip

    def source(self, held: Held) -> Source:
        """Its headers, kept while its files stay as they are. Raises Refusal: it cannot be read."""
        key = (held.name, held.changed)
        if key not in self._sources:
            try:
                self._sources[key] = held.open(self.env, self.settings.get("ignore_keys") or ())
            except HeadwiseError as error:
                raise _unreadable(error) from error
        return self._sources[key]

    def readable(self) -> list[tuple[Held, Source]]:
        """All models whose headers can be read."""
        found = []
        for held in self.all():
            with contextlib.suppress(Refusal):
                found.append((held, self.source(held)))
        return found

    def context(self, held: Held) -> int:
        """Tokens that it was loaded with, or would be."""
        loaded = self.loaded.get(held.name)
        return (
            loaded.context if loaded else self.settings.get("context") or min(self.source(held).spec.max_context, DEFAULT_CONTEXT)
        )

    def served(self, held: Held) -> Served:
        """With its tokenizer, read at the first use. Raises Refusal: it cannot be read."""
        key = (held.name, held.changed)
        if key not in self._served:
            source = self.source(held)
            assert source.path is not None
            try:
                tokenizer = read_tokenizer(source.path if source.gguf is None else source.gguf)
            except HeadwiseError as error:
                raise _unreadable(error) from error
            for old in [k for k in self._served if k[0] not in self.loaded][: max(0, len(self._served) - _TOKENIZERS)]:
                self._served.pop(old, None)
            self._served[key] = served(source, tokenizer, 1, self.max_tokens)
        return replace(self._served[key], context=self.context(held))

    def waiting(self, name: str) -> int:
        """Requests for a model that is not loaded, or not for them."""
        return sum(want.held.name == name for want in self._queue)

    # --- a request's way to its model ---

    async def place(self, held: Held, *, context: int | None = None, keep_s: float | None = None) -> Place:
        """Where a request for a model goes: the model as it will meet it, and an engine that waits for its turn.

        Args:
            context: tokens that it must hold. More than it is loaded with loads it anew; fewer only bound the request.
            keep_s: for which it stays loaded after the request.
        Raises:
            Refusal: the context does not fit, or the model cannot be read; or it failed to load a moment ago.
        """
        model = await asyncio.to_thread(self.served, held)
        if (failure := self.failed.get(held.name)) and time.monotonic() - failure[1] < FAILED_S:
            raise Refusal(503, "server_error", f"the model could not be loaded: {failure[0]}")
        if context is not None and (most := model.source.spec.max_context) < context:
            raise bad(f"num_ctx {context} is more than the {most} tokens that {held.name} can attend to", "options.num_ctx")
        loaded = self.loaded.get(held.name)
        wanted = max(context or 0, model.context)
        if loaded and wanted <= loaded.context:
            n_bytes, rooms = loaded.n_bytes, loaded.rooms
        else:
            plan = await self._plan(held, wanted)
            if plan.fits is False and context is not None and context < wanted:  # the client asks for less than is the default
                wanted, plan = context, await self._plan(held, context)
            if plan.fits is False:
                raise _too_large(held.name, wanted, plan)
            n_bytes, rooms = self._bytes(plan), plan.workload.rooms
        return Place(self, held, replace(model, context=context or wanted), wanted, keep_s, n_bytes, rooms)

    def _bytes(self, plan: Plan) -> int:
        """What a plan takes of its devices, with the margins of its process and what `engine.prefixes` copies."""
        kept = plan.kept_bytes if "cpu" in self.devices else 0
        return plan.total_bytes + kept + sum(s.target.margin_bytes for s in plan.shares)

    async def _plan(self, held: Held, context: int) -> Plan:
        """The plan of a model alone with what others, not our models, hold of the devices now; that bounds all ours from now on.

        Slots that nobody asked for take no room of models that are loaded or were named at start, where the device is one.
        Ours are counted as planned: a cache that was never written to is not in use yet, and will be. Of several devices the sum
        is counted: how ours lie on each is for their engines to plan, which refuse what a single card has no room for.
        """
        totals: list[int] = []
        used: list[int] = []
        for device, limit in self.devices.items():
            total, taken = await asyncio.to_thread(self.memory, device, self.env)
            totals.append(min(total, limit or total))
            used.append(max(0, taken - total + totals[-1]))
        ours = sum(m.n_bytes for m in self.loaded.values())
        if not ours or len(self._used) != len(used):
            self._used = used
        others = self._used if len(used) > 1 else [max(self._used[0], used[0] - ours)]
        self._capacity = sum(totals) - max(sum(others), sum(used) - ours)
        return await asyncio.to_thread(self._roomiest, held, context, totals, others)

    def _roomiest(self, held: Held, context: int, totals: Sequence[int], others: Sequence[int]) -> Plan:
        if self.settings.get("slots") is None and len(others) == 1:
            beside = sum(m.n_bytes for m in self.loaded.values() if m.name != held.name)
            for named in self.named:
                if named.name != held.name and named.name not in self.loaded:
                    with contextlib.suppress(Refusal):
                        beside += self._bytes(self._plan_beside(named, self.context(named), totals, others, slots=1))
            if beside and (plan := self._plan_beside(held, context, totals, [others[0] + beside])).fits:
                return plan
        return self._plan_beside(held, context, totals, others)

    def _plan_beside(
        self, held: Held, context: int, totals: Sequence[int], others: Sequence[int], slots: int | None = None
    ) -> Plan:
        s, cpu = self.settings, "cpu" in self.devices
        targets = [
            Target(
                name=device,
                gpu=None if cpu else _card(device, self.env).gpu,
                total_bytes=total,
                others_bytes=of_others,
                margin_bytes=CPU_MARGIN_BYTES if cpu else GPU_MARGIN_BYTES,
            )
            for device, total, of_others in zip(self.devices, totals, others, strict=True)
        ]
        try:
            kv = api.kv_by_kind(s.get("kv"))
            return api.plan(
                self.source(held),
                context=context,
                kv_global=kv["global"],
                kv_sliding=kv["sliding"],
                kv_layout=s.get("kv_layout"),
                slots=slots or s.get("slots"),
                pool=s.get("pool"),
                ubatch=s.get("chunk"),
                weights=s.get("weights"),
                gpus=() if s.get("device") in (None, "cuda") else list(self.devices),  # those named are used together
                device="cpu" if cpu else None,
                dtype=s.get("dtype"),
                targets=targets,
            )
        except HeadwiseError as error:
            raise bad(error.sentence) from error

    @contextlib.asynccontextmanager
    async def hold(
        self, held: Held, *, context: int, keep_s: float | None, n_bytes: int, rooms: Sequence[Room]
    ) -> AsyncIterator[Loaded]:
        """The loaded model, for as long as the block runs; waits in turn for its memory.

        Raises:
            NotLoaded: it cannot be loaded.
        """
        granted = asyncio.get_running_loop().create_future()
        want = _Want(held=held, context=context, keep_s=keep_s, n_bytes=n_bytes, rooms=rooms, granted=granted)
        self._queue.append(want)
        self._arrange()
        try:
            loaded = await want.granted
        except BaseException:
            if want in self._queue:
                self._queue.remove(want)
                self._arrange()
            elif want.granted.done() and not want.granted.cancelled() and want.granted.exception() is None:
                self._release(want.granted.result())
            raise
        try:
            yield loaded
        finally:
            self._release(loaded)

    def _release(self, loaded: Loaded) -> None:
        loaded.uses -= 1
        loaded.turn = next(self._turns)
        self._rest(loaded)
        self._arrange()

    def _rest(self, loaded: Loaded) -> None:
        """Begins the time after which an idle model goes."""
        if loaded.timer is not None:
            loaded.timer.cancel()
        loaded.timer, loaded.expires = None, None
        if loaded.uses or loaded.ending or loaded.keep_s == math.inf:
            return
        loaded.expires = time.time() + loaded.keep_s
        loaded.timer = asyncio.get_running_loop().call_later(loaded.keep_s, self._unload_idle, loaded)

    def _unload_idle(self, loaded: Loaded) -> None:
        if not loaded.uses:
            self._unload(loaded)

    def _arrange(self) -> None:
        """Lets in, oldest first, who can be; marks who has to go for the first that cannot, and ends those that are idle."""
        for m in self.loaded.values():
            m.leaving = False
        blocked = False
        for want in list(self._queue):
            there = self.loaded.get(want.held.name)
            if there and not (there.leaving or there.ending) and there.engine.state != "failed" and there.context >= want.context:
                self._grant(want, there)
            elif not blocked:
                blocked = not self._make_room(want, there)

    def _make_room(self, want: _Want, there: Loaded | None) -> bool:
        """Starts the model if there is room now; else begins to make room. Whether the want was dealt with."""
        if failure := self.failed.get(want.held.name):
            if time.monotonic() - failure[1] < FAILED_S:
                self._refuse(want, NotLoaded(failure[0]))
                return True
            del self.failed[want.held.name]
        staying = [m for m in self.loaded.values() if not m.ending and m is not there]
        residents = [Resident(m.name, m.n_bytes, m.uses > 0, m.turn) for m in staying]
        names = who_leaves(residents, want.n_bytes, self._capacity)
        if names is None:
            what = f"{want.held.name} with {want.context} tokens does not fit"
            why = f"it needs {gib(want.n_bytes)} with its process; {gib(self._capacity)} are not held by others"
            self._refuse(want, NotLoaded(PlanError(what, why=why, do="a smaller context, or end what else runs")))
            return True
        go = [m for m in staying if m.name in names] + ([there] if there is not None else [])
        if not go and sum(m.n_bytes for m in self.loaded.values()) + want.n_bytes <= self._capacity:
            self._grant(want, self._start(want.held, want.context, want.n_bytes, want.rooms))
            return True
        for m in go:
            m.leaving = True
            self._unload_idle(m)
        return False

    def _refuse(self, want: _Want, error: Exception) -> None:
        self._queue.remove(want)
        if not want.granted.done():
            want.granted.set_exception(error)

    def _grant(self, want: _Want, loaded: Loaded) -> None:
        self._queue.remove(want)
        if want.granted.done():  # its client went away
            return
        loaded.uses += 1
        if want.keep_s is not None:
            loaded.keep_s = want.keep_s
        self._rest(loaded)
        want.granted.set_result(loaded)

    # --- processes ---

    def _start(self, held: Held, context: int, n_bytes: int, rooms: Sequence[Room]) -> Loaded:
        settings = {**self.settings, "context": context} | ({"rooms": rooms} if rooms else {})
        engine = EngineProcess(held.loads, settings, stall_s=self.stall_s)
        engine.totals = self.totals.setdefault(held.name, engine.totals)
        keep_s = self.keep_s if self.keep_s is not None else math.inf if held in self.named else KEEP_S
        probe = Probe(engine, context, self.source(held).spec.vocab_size)
        loaded = Loaded(held=held, context=context, engine=engine, n_bytes=n_bytes, rooms=rooms, keep_s=keep_s, probe=probe)
        self.loaded[held.name] = loaded
        loaded.task = asyncio.create_task(self._run(loaded))
        return loaded

    async def _run(self, loaded: Loaded) -> None:
        engine = loaded.engine
        running = asyncio.create_task(engine.run())
        try:
            if await engine.until_settled() == "ready":
                self._learn(loaded)
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert engine.error is not None
        self.failed[loaded.name] = (engine.error, time.monotonic())
        if self.loaded.get(loaded.name) is loaded:
            del self.loaded[loaded.name]
        self._arrange()
        if not self._was_ready and loaded.held is self.first:
            self.fatal = engine.error
            self.on_failed()

    def _learn(self, loaded: Loaded) -> None:
        """What the engine knows better: whether it runs on the CPU, and the bytes of its own plan."""
        plan, cpu = loaded.engine.facts["plan"], loaded.engine.facts["device"] == "cpu"
        if cpu and "cpu" not in self.devices:
            self.devices = {"cpu": None}
        loaded.n_bytes = plan["total_bytes"] + (plan["kept_bytes"] if cpu else 0) + sum(g["margin_bytes"] for g in plan["gpus"])
        self._was_ready = True
        self.failed.pop(loaded.name, None)
        self._rest(loaded)
        self._arrange()

    def _unload(self, loaded: Loaded) -> None:
        """Ends its process; its bytes count until that is done."""
        if loaded.ending:
            return
        loaded.ending = True
        if loaded.timer is not None:
            loaded.timer.cancel()

        async def end() -> None:
            assert loaded.task is not None
            loaded.task.cancel()
            await asyncio.gather(loaded.task, return_exceptions=True)
            if self.loaded.get(loaded.name) is loaded:
                del self.loaded[loaded.name]
            self._arrange()

        task = asyncio.create_task(end())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def start(self) -> None:
        """Begins to load the first model; whether it fits, its engine says."""
        n_bytes, context = 0, await asyncio.to_thread(self.context, self.first)
        rooms: Sequence[Room] = ()
        with contextlib.suppress(Refusal):
            plan = await self._plan(self.first, context)
            n_bytes, rooms = self._bytes(plan), plan.workload.rooms
        self._first = self._start(self.first, context, n_bytes, rooms).engine
        self._started.set()

    async def first_engine(self) -> EngineProcess:
        """The engine that `start` began."""
        await self._started.wait()
        assert self._first is not None
        return self._first

    async def close(self) -> None:
        """Ends all processes."""
        for loaded in list(self.loaded.values()):
            self._unload(loaded)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def unload(self, held: Held) -> None:
        """Lets a model go as soon as nobody uses it."""
        if loaded := self.loaded.get(held.name):
            loaded.keep_s = 0.0
            self._rest(loaded)


@dataclass(frozen=True, slots=True)
class Place:
    """An engine as `server.answer` takes one: each request waits for the model, uses it, and lets it go.

    Args:
        model: with the context that the request may have.
        context: that the model must be loaded with at least.
        n_bytes: what loading it takes.
        rooms: what its engine may take, see `Loaded`.
    """

    models: Models
    held: Held
    model: Served
    context: int
    keep_s: float | None
    n_bytes: int
    rooms: Sequence[Room]

    def _hold(self) -> contextlib.AbstractAsyncContextManager[Loaded]:
        return self.models.hold(self.held, context=self.context, keep_s=self.keep_s, n_bytes=self.n_bytes, rooms=self.rooms)

    async def ask(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of the engine; the time until the model was there is in `queue_s`."""
        began, queued = time.perf_counter(), None
        try:
            async with self._hold() as loaded, contextlib.aclosing(loaded.engine.ask(request)) as events:
                async for event in events:
                    if isinstance(event, Prefill) and queued is None:
                        queued = time.perf_counter() - began
                    yield event if queued is None or not isinstance(event, Finish) else replace(event, queue_s=queued)
        except NotLoaded as refused:
            yield Finish(request=request.id, reason="error", error=refused.error.parts, retry=True)

    async def load(self) -> None:
        """Loads the model and waits until it is there. Raises Refusal: it cannot be loaded."""
        try:
            async with self._hold() as loaded:
                await loaded.engine.until_settled()
                if loaded.engine.error is not None:
                    raise NotLoaded(loaded.engine.error)
        except NotLoaded as refused:
            raise Refusal(503, "server_error", f"the model could not be loaded: {refused.error}") from refused


def _devices(asked: str | Sequence[str] | None, env: Mapping[str, str]) -> dict[str, int | None]:
    """Where engines may load, with limits, as far as can be said without PyTorch; an engine on the CPU corrects it."""
    if asked is not None and asked != "cuda":
        found: dict[str, int | None] = {}
        for name in [asked] if isinstance(asked, str) else asked:
            with contextlib.suppress(UsageError):  # the engine refuses it
                named = device_name(name)
                found[named.device] = named.limit_bytes
        return found or {"cpu": None}
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "+cpu"
    cards = [] if torch.endswith("+cpu") or sys.platform == "darwin" else [d for d in detect() if d.total_bytes]
    visible = [v for v in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    return {f"cuda:{i}": None for i in range(min(len(cards), len(visible) or len(cards)))} or {"cpu": None}


def _memory(device: str, env: Mapping[str, str]) -> tuple[int, int]:
    """Total and used bytes."""
    if device == "cpu":
        total, available = cpu_memory()
        return total, max(0, total - available)
    card = _card(device, env)
    if card.total_bytes is None or card.used_bytes is None:
        raise Refusal(
            503, "server_error", f"what fits beside the loaded model is unknown: the driver does not say what {card.seen} holds"
        )
    return card.total_bytes, card.used_bytes


def _card(device: str, env: Mapping[str, str]) -> Device:
    """The card behind CUDA's number, which counts the visible ones. Raises Refusal: no tool tells of it."""
    index = int(device.partition(":")[2] or 0)
    visible = [v.strip() for v in env.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(visible) and visible[index].isdigit():
        index = int(visible[index])
    cards = detect()
    if index >= len(cards):
        raise Refusal(503, "server_error", f"what fits beside the loaded model is unknown: no driver's tool tells of {device}")
    return cards[index]


def _unreadable(error: HeadwiseError) -> Refusal:
    return Refusal(400, "model_unreadable", error.sentence, param="model")


def _too_large(name: str, context: int, plan: Plan) -> Refusal:
    do = f"num_ctx {plan.max_context} fits" if plan.max_context else "no context fits: a smaller weight type or model"
    needs = f"weights {gib(plan.weights_bytes)}, KV {gib(plan.kv_bytes)}, compute {gib(plan.compute_bytes)}"
    usable = sum(s.target.usable_bytes for s in plan.shares)
    return bad(
        f"{name} with {context} tokens does not fit: it needs {gib(plan.total_bytes)} ({needs}), and {gib(usable)} are not held by "
        f"others; {do}",
        "options.num_ctx",
    )
