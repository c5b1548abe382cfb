"""Several models: who may be asked for, who is loaded, who has to go, and that nobody in use is ended."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.conftest import ELSEWHERE

from headwise.engine.process import EngineProcess
from headwise.engine.request import Event, Finish, Prefill, Request, Sampling, Token
from headwise.errors import ProbeError
from headwise.hardware.gpus import find_gpu
from headwise.hardware.probe import Device
from headwise.planner.memory import CPU_MARGIN_BYTES, GPU_MARGIN_BYTES, SERVE_SLOTS
from headwise.server import models as models_module
from headwise.server.ask import Refusal
from headwise.server.metrics import metrics
from headwise.server.models import Models, Place, Resident, keep_seconds, who_leaves
from headwise.server.state import health, ready, state
from headwise.spec.read import open_model
from headwise.spec.shelf import held

EMBEDDED = Path(str(open_model(None, env={}).path))
PROMPT = (2, *range(100, 140))
GIB = 2**30


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0.0), ("0", 0.0), ("0s", 0.0), (300, 300.0), ("5m", 300.0), ("1h30m", 5400.0), ("1.5h", 5400.0), ("250ms", 0.25),
     (-1, math.inf), ("-1", math.inf), ("-1m", math.inf), (0.5, 0.5), (1e18, math.inf),
     (10**400, math.inf), ("9999999h", math.inf)],
)  # fmt: skip
def test_a_keep_alive_is_what_it_is_to_ollama(value: object, seconds: float) -> None:
    assert keep_seconds(value) == seconds


@pytest.mark.parametrize("value", ["", "soon", "5 m", "m", "5x", True, None, [], math.nan, "1m2"])
def test_a_keep_alive_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="no duration"):
        keep_seconds(value)


RESIDENTS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=5)


@given(sizes=RESIDENTS, n_bytes=st.integers(1, 12), capacity=st.integers(0, 30))
def test_who_leaves_makes_room_and_nobody_leaves_in_vain(sizes: list[tuple[int, bool]], n_bytes: int, capacity: int) -> None:
    """A busy model sent away where idle ones were enough, or an idle one whose going was not needed."""
    residents = [Resident(str(i), size, busy, i) for i, (size, busy) in enumerate(sizes)]
    gone = who_leaves(residents, n_bytes, capacity)
    if gone is None:
        assert n_bytes > capacity
        return
    left = sum(r.n_bytes for r in residents if r.name not in gone)

    assert left + n_bytes <= capacity
    for r in residents:
        assert r.name not in gone or left + r.n_bytes + n_bytes > capacity  # each of them had to
    idle_bytes = sum(r.n_bytes for r in residents if r.busy)
    if idle_bytes + n_bytes <= capacity:  # all idle ones gone is enough
        assert not any(r.busy for r in residents if r.name in gone)


def test_the_least_recently_used_goes_first() -> None:
    same = [Resident("old", 4, False, 1), Resident("new", 4, False, 2), Resident("busy", 4, True, 0)]

    assert who_leaves(same, 4, 16) == []
    assert who_leaves(same, 4, 12) == ["old"]
    assert who_leaves(same, 4, 8) == ["old", "new"]
    assert who_leaves(same, 4, 4) == ["old", "new", "busy"]


# --- with engines that only pretend, for the order of things ---


class Pretended(EngineProcess):
    """Loads in no time and answers with tokens until `stop` is set."""

    started: list[str | None] = []  # noqa: RUF012
    broken: set[str | None] = set()  # noqa: RUF012

    async def run(self) -> None:
        Pretended.started.append(self.model)
        await asyncio.sleep(0.01)
        if self.model in Pretended.broken:
            self.error = ProbeError("it does not load", why="a test", do="nothing")
            self._set("failed")
            return
        plan = {"total_bytes": GIB, "kept_bytes": 0, "kv": {"total_bytes": 1}, "gpus": [{"margin_bytes": CPU_MARGIN_BYTES}]}
        self.facts = {"device": "cpu", "plan": plan, "measured": {"total_bytes": GIB}, "checks": [], "fused": True}
        self._set("ready")
        try:
            await asyncio.Event().wait()
        finally:
            self._set("stopped")

    async def ask(self, request: Request) -> AsyncGenerator[Event, None]:
        await self.until_settled()
        if self.state != "ready":
            yield Finish(request=1, reason="error", error=("gone", "", ""), retry=True)
            return
        yield Prefill(1, 3, 3, 0)
        for i in range(request.sampling.max_tokens):
            await asyncio.sleep(0.01)
            assert self.state == "ready", "ended while it was used"
            yield Token(1, i)
        yield Finish(request=1, reason="length", tokens=request.sampling.max_tokens)


@asynccontextmanager
async def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, **how: Any) -> AsyncIterator[Models]:
    """Models a, b and c of one GiB each (and half one for the process), and room for so many."""
    monkeypatch.setattr(models_module, "EngineProcess", Pretended)
    sizes = {64: GIB, 128: 5 * GIB // 2}  # by context
    monkeypatch.setattr(Models, "_bytes", lambda self, plan: sizes[plan.workload.context] + CPU_MARGIN_BYTES)
    Pretended.started, Pretended.broken = [], set()
    named = []
    for name in "abc":
        path = tmp_path / f"{name}.gguf"
        path.symlink_to(EMBEDDED)
        named.append(held(str(path), open_model(path, env={})))
    memory = lambda *_: (int(room * 1.5 * GIB) + GIB, GIB)  # noqa: E731
    models = Models(named, {"device": "cpu", "context": 64}, ELSEWHERE, memory=memory, **how)
    await models.start()
    try:
        yield models
    finally:
        await models.close()


async def answer(models: Models, name: str, tokens: int = 3, **how: Any) -> list[Event]:
    place = await models.place(models.find(name), **how)
    request = Request(id=0, prompt=PROMPT, sampling=Sampling(max_tokens=tokens))
    return [e async for e in place.ask(request)]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def in_the_way(models: Models) -> tuple[asyncio.Task[list[Event]], asyncio.Task[list[Event]]]:
    """A long answer of a, and a request for b that waits for its room."""
    slow = asyncio.create_task(answer(models, "a", 60))
    await until(lambda: models.loaded["a"].uses == 1)
    other = asyncio.create_task(answer(models, "b"))
    await until(lambda: models.waiting("b") == 1)
    return slow, other


def names(models: Models) -> list[str]:
    return sorted(models.loaded)


def test_models_stay_side_by_side_where_they_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=2) as models:
            assert names(models) == ["a"]  # the first, at the start
            await answer(models, "b")
            assert names(models) == ["a", "b"]
            await answer(models, "a")
            await answer(models, "c")
            assert names(models) == ["a", "c"]  # b was used before a
            assert len(Pretended.started) == 3

    run(test)


def test_a_model_in_use_answers_to_its_end_before_it_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ollama's rule too; a killed answer costs its client minutes."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1) as models:
            slow, other = await in_the_way(models)
            late = asyncio.create_task(answer(models, "a"))  # comes later than b, and waits behind it
            await asyncio.sleep(0.05)
            assert names(models) == ["a"]
            assert models.waiting("a") == 1
            ended = []
            for task, name in ((slow, "slow"), (other, "other"), (late, "late")):
                task.add_done_callback(lambda _, name=name: ended.append(name))
            for task in (slow, other, late):
                assert isinstance((await task)[-1], Finish)
                assert (await task)[-1].reason == "length"  # type: ignore[union-attr]
            assert ended == ["slow", "other", "late"]

    run(test)


def test_a_small_model_does_not_overtake_a_large_one_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where small ones always fit beside what runs, a large one would never come."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=2) as models:
            slow = asyncio.create_task(answer(models, "a", 40))
            await until(lambda: models.loaded["a"].uses == 1)
            large = asyncio.create_task(answer(models, "b", context=128))
            await until(lambda: models.waiting("b") == 1)
            small = asyncio.create_task(answer(models, "c"))
            await until(lambda: models.waiting("c") == 1)
            await slow
            assert not large.done()
            assert not small.done()
            await large
            assert not small.done()
            await small

    run(test)


def test_who_gives_up_waiting_sends_nobody_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1) as models:
            slow, other = await in_the_way(models)
            other.cancel()
            await slow
            await answer(models, "a")
            assert models.waiting("b") == 0
            assert Pretended.started == [models.find("a").loads]

    run(test)


def test_every_request_ends_whoever_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A forgotten user keeps a model for ever; a forgotten wish blocks all that come later."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1) as models:
            tasks = []
            for i, name in zip(range(60), itertools.cycle("abcab"), strict=False):
                tasks.append(asyncio.create_task(answer(models, name, 1 + i % 4, keep_s=(None, 0.0, 60.0)[i % 3])))
                await asyncio.sleep(0.003)
                if i % 4 == 3:
                    tasks[i * 7 % len(tasks)].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            for events in done:
                assert isinstance(events, asyncio.CancelledError) or (isinstance(events, list) and events[-1].reason == "length")
            assert all(m.uses == 0 for m in models.loaded.values())
            assert not models._queue

    run(test)


def test_an_idle_model_goes_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=3, keep_s=60.0) as models:
            await answer(models, "b", keep_s=0.2)
            (a, b) = models.loaded["a"], models.loaded["b"]
            assert a.expires is not None
            assert b.expires is not None
            assert 50 < a.expires - b.expires < 61
            again = asyncio.create_task(answer(models, "b", 40))  # in use for longer than that
            await asyncio.sleep(0.35)
            assert b.expires is None
            await again
            await until(lambda: names(models) == ["a"])
            await answer(models, "c", keep_s=math.inf)
            assert models.loaded["c"].expires is None
            models.unload(models.find("c"))
            await until(lambda: names(models) == ["a"])
            assert health(models)["status"] == "ok"
            models.unload(models.find("a"))
            await until(lambda: not models.loaded)
            assert health(models)["status"] == "idle"
            await answer(models, "a")
            assert names(models) == ["a"]

    run(test)


def test_a_named_model_stays_and_a_guest_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=3) as models:
            await answer(models, "tiny-hybrid")
            assert models.loaded["a"].keep_s == math.inf
            assert models.loaded["tiny-hybrid"].keep_s == 300.0

    run(test)


def test_a_larger_context_loads_anew_and_a_smaller_one_bounds_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=2) as models:
            a = models.find("a")
            small = await models.place(a, context=32)
            assert (small.model.context, small.context) == (32, 64)
            await answer(models, "a", context=32)
            assert len(Pretended.started) == 1
            await answer(models, "a", context=128)
            assert models.loaded["a"].context == 128
            assert len(Pretended.started) == 2
            await answer(models, "a")  # whatever it is loaded with
            assert len(Pretended.started) == 2

    run(test)


def test_a_model_that_does_not_load_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1) as models:
            Pretended.broken = {models.find("b").loads}
            await until(lambda: models.loaded["a"].engine.state == "ready")
            finish = (await answer(models, "b"))[-1]
            assert isinstance(finish, Finish)
            assert finish.reason == "error"
            with pytest.raises(Refusal, match="could not be loaded: it does not load") as refused:
                await answer(models, "b")  # not tried again at once
            assert refused.value.status == 503
            assert health(models)["status"] == "error"
            assert (await answer(models, "a"))[-1].reason == "length"  # type: ignore[union-attr]
            assert health(models)["status"] == "ok"
            assert health(models)["error"]["model"] == "b"

    run(test)


def test_the_server_tells_of_each_loaded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=2) as models:
            await answer(models, "b")
            a, b = models.loaded["a"], models.loaded["b"]
            assert not ready(models)["ready"]  # the probes have just begun
            await until(lambda: all(m["ready"] for m in ready(models)["models"]))
            assert [(s["model"], s["status"]) for s in map(state, (a, b))] == [("a", "ok"), ("b", "ok")]
            up = [line for line in metrics(models).splitlines() if line.startswith("headwise_up{")]
            assert up == ['headwise_up{model_name="a"} 1', 'headwise_up{model_name="b"} 1']
            models.unload(b.held)
            await until(lambda: names(models) == ["a"])
            assert 'headwise_up{model_name="b"} 0' in metrics(models)

    run(test)


def test_a_further_model_that_loads_is_no_reason_to_send_a_ready_one_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A load balancer took the server out for the minutes in which a second model was read from disk."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=2) as models:
            assert not ready(models)["ready"]  # the first is loading
            await until(lambda: ready(models)["ready"])
            slow = asyncio.Event()

            async def load_slowly(engine: Pretended) -> None:
                await slow.wait()
                await Pretended.run(engine)

            monkeypatch.setattr(models_module, "EngineProcess", type("Slow", (Pretended,), {"run": load_slowly}))
            asked = asyncio.create_task(answer(models, "b"))
            await until(lambda: "b" in models.loaded)
            told = ready(models)
            assert (told["ready"], [(m["model"], m["ready"], m["coming"]) for m in told["models"]]) == (
                True, [("a", True, False), ("b", False, True)],
            )  # fmt: skip
            assert (health(models)["status"], health(models)["models"][1]["status"]) == ("ok", "loading")
            slow.set()
            await asked
            await until(lambda: all(m["ready"] for m in ready(models)["models"]))
            models.loaded["b"].engine.state = "loading"  # it died, and is started again
            assert not ready(models)["ready"]
            models.loaded["b"].engine.state = "ready"
            models.loaded["b"].probe.passed, models.loaded["b"].probe.error = False, "a step made no progress"
            assert not ready(models)["ready"]

    run(test)


def test_a_model_that_is_let_go_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For as long as its process took to end, /health said error and a supervisor would have restarted the server."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1) as models:
            await until(lambda: models.loaded["a"].engine.state == "ready")
            models._unload(models.loaded["a"])
            models.loaded["a"].engine.state = "stopped"
            assert (health(models)["status"], [m["status"] for m in health(models)["models"]]) == ("idle", ["unloading"])

    run(test)


def test_a_first_model_that_nobody_uses_goes_after_it_was_loaded_and_not_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A load longer than --keep-alive would never end in READY=1."""

    async def test() -> None:
        async with pretended(monkeypatch, tmp_path, room=1, keep_s=0.0) as models:
            assert await (await models.first_engine()).until_settled() == "ready"
            await until(lambda: not models.loaded)

    run(test)


# --- devices ---


@pytest.mark.parametrize(
    ("asked", "visible", "found"),
    [(None, "", {"cuda:0": None, "cuda:1": None}), ("cuda", "1", {"cuda:0": None}), ("cpu", "", {"cpu": None}),
     (["cuda:0:12", "cuda:1:512MiB"], "", {"cuda:0": 12 * GIB, "cuda:1": GIB // 2}), (["cpu:1GiB"], "", {"cpu": GIB})],
)  # fmt: skip
def test_models_may_lie_where_the_engine_would_put_them(
    monkeypatch: pytest.MonkeyPatch, asked: Any, visible: str, found: dict[str, int | None]
) -> None:
    _with_cuda(monkeypatch)
    monkeypatch.setattr(models_module, "detect", lambda: [_card(), _card()])

    assert Models([held(None, open_model(None, env={}))], {"device": asked}, {"CUDA_VISIBLE_DEVICES": visible}).devices == found


def _with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this PyTorch were CUDA's, and no other package another: what is installed is remembered for all tests to come."""
    version = models_module.metadata.version
    told = {"torch": "2.13.0+cu130"}
    monkeypatch.setattr(models_module.metadata, "version", lambda name: told.get(name) or version(name))


def _card() -> Device:
    return Device(
        index=0, gpu=find_gpu("rtx3090"), seen="NVIDIA GeForce RTX 3090", total_bytes=24 * GIB, used_bytes=0, driver="580.65"
    )


def test_several_cards_hold_what_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned for the first card alone, such a model is refused although its engine would take both."""
    _with_cuda(monkeypatch)
    monkeypatch.setattr(models_module, "detect", lambda: [_card(), _card()])
    models = Models([held(None, open_model(None, env={}))], {"slots": 1, "chunk": 512}, {}, memory=lambda *_: (room, GIB // 4))
    room = 24 * GIB
    small = asyncio.run(models._plan(models.first, 2048))
    assert (small.fits, len(small.shares), models._capacity) == (True, 1, 2 * (room - GIB // 4))
    assert models._bytes(small) == small.total_bytes + GPU_MARGIN_BYTES
    room = GIB // 4 + GPU_MARGIN_BYTES + small.total_bytes * 3 // 4
    split = asyncio.run(models._plan(models.first, 2048))

    assert (split.fits, len(split.shares)) == (True, 2)
    assert models._bytes(split) == split.total_bytes + 2 * GPU_MARGIN_BYTES


def test_slots_that_nobody_asked_for_take_no_room_of_named_models(tmp_path: Path) -> None:
    """A first model with four slots sent the second away that had stayed beside it."""
    path = tmp_path / "second.gguf"
    path.symlink_to(EMBEDDED)
    named = [held(None, open_model(None, env={})), held(str(path), open_model(path, env={}))]
    settings = {"device": "cpu", "context": 32_768}
    roomy = Models(named, settings, ELSEWHERE, memory=lambda *_: (64 * GIB, 0))
    most = asyncio.run(roomy._plan(roomy.first, 32_768))
    one = roomy._plan_beside(roomy.first, 32_768, [64 * GIB], [0], slots=1)
    room = roomy._bytes(most) + roomy._bytes(one) - 1
    models = Models(named, settings, ELSEWHERE, memory=lambda *_: (room, 0))
    alone = Models(named[:1], settings, ELSEWHERE, memory=lambda *_: (room, 0))
    beside = asyncio.run(models._plan(models.first, 32_768))

    assert most.workload.slots == SERVE_SLOTS
    assert asyncio.run(alone._plan(models.first, 32_768)).workload == most.workload
    assert roomy._bytes(beside) + roomy._bytes(one) <= room < roomy._bytes(most) + roomy._bytes(one)
    assert beside.workload.rooms[0] == (beside.workload.slots, beside.workload.pool, 512)
    assert len(one.workload.rooms) == 1


# --- names ---


def test_a_name_that_is_not_here_is_refused_with_the_nearest(tmp_path: Path) -> None:
    models = Models([held(None, open_model(None, env={}), ("other-name",))], {"device": "cpu"}, ELSEWHERE)

    assert models.find(None).name == models.find("").name == "tiny-hybrid"
    for name in ("other-name", "Other-Name:latest", "tiny-hybrid:latest", "TINY-HYBRID"):
        assert models.find(name).name == "tiny-hybrid"
    for name in ("tiny-hybird", "../../etc/passwd", "/etc/passwd", str(EMBEDDED), "hf:tiny/hybrid", "tiny-hybrid:2"):
        with pytest.raises(Refusal, match=r"is not on this machine; the nearest names are .*tiny-hybrid") as refused:
            models.find(name)
        assert refused.value.status == 404


def test_only_serves_none_but_those_named(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED, path := tmp_path / "mine.gguf")
    named = [held(str(path), open_model(path, env={}))]

    assert Models(named, {"device": "cpu"}, ELSEWHERE).find("tiny-hybrid").origin == "embedded"
    assert Models(named, {"device": "cpu"}, ELSEWHERE, only=True).find(str(path)).name == "mine"
    with pytest.raises(Refusal, match="not served here; mine may be asked for"):
        Models(named, {"device": "cpu"}, ELSEWHERE, only=True).find("tiny-hybrid")


# --- with real engines ---


def test_two_real_models_take_turns_in_the_memory_of_one(tmp_path: Path) -> None:
    """Planned bytes are what decides, and what is freed is free for the next."""

    async def test() -> None:
        path = tmp_path / "second.gguf"
        path.symlink_to(EMBEDDED)
        named = [held(None, open_model(None, env={})), held(str(path), open_model(path, env={}))]
        settings = {"device": "cpu", "context": 2048, "check": False}
        total = [0]
        models = Models(named, settings, dict(os.environ) | ELSEWHERE, memory=lambda *_: (total[0], 0))
        total[0] = models._bytes(await models._plan(models.first, 2048)) * 17 // 16
        await models.start()
        try:
            first = await answer(models, "tiny-hybrid")
            assert isinstance(first[-1], Finish)
            (loaded,) = models.loaded.values()
            assert models._bytes(await models._plan(models.first, 2048)) == loaded.n_bytes  # the engine's own plan
            second = await answer(models, "second")
            assert [e.token for e in second if isinstance(e, Token)] == [e.token for e in first if isinstance(e, Token)]
            assert names(models) == ["second"]
            place = await models.place(models.first)
            assert isinstance(place, Place)
            with suppress(TimeoutError):  # a client that leaves while the model is loaded
                await asyncio.wait_for(answer(models, "tiny-hybrid"), 0.3)
            assert isinstance((await answer(models, "second"))[-1], Finish)
            with pytest.raises(Refusal, match=r"does not fit: it needs .* num_ctx \d+ fits"):
                await answer(models, "second", context=65_536)
        finally:
            await models.close()
        assert not models.loaded

    run(test)
