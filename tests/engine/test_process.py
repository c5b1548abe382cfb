"""The engine's process is killed, stopped and left: requests end in an answer or a clean error, and the next one is served."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from headwise.engine.process import EngineProcess
from headwise.engine.request import Event, Finish, Request, Sampling, Token
from headwise.errors import PlanError

PROMPT = (2, *range(100, 164))


@asynccontextmanager
async def started(stall_s: float = 60.0, **settings: object) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(None, {"context": 2048, "device": "cpu", "check": False, **settings}, stall_s=stall_s)
    task = asyncio.create_task(engine.run())
    try:
        await asyncio.wait_for(engine.until_settled(), 60)
        yield engine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ask(engine: EngineProcess, max_tokens: int = 5, prompt: tuple[int, ...] = PROMPT) -> asyncio.Task[list[Event]]:
    never = {1: -100.0, 6: -100.0, 11: -100.0}  # the model's end tokens

    async def all_events() -> list[Event]:
        sampling = Sampling(max_tokens=max_tokens, logit_bias=never)
        return [e async for e in engine.ask(Request(id=0, prompt=prompt, sampling=sampling))]

    return asyncio.create_task(all_events())


async def until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came true")


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def test_a_killed_engine_fails_what_ran_and_serves_what_waited() -> None:
    """A crash of the engine that hangs every client, or loses the queue."""

    async def test() -> None:
        async with started() as engine:
            first = engine.pid
            runs = ask(engine, 1500)
            await until(lambda: engine.held_tokens() > len(PROMPT))
            waits = ask(engine)
            await until(lambda: engine.waiting == 1)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)

            finish = (await runs)[-1]
            assert isinstance(finish, Finish)
            assert (finish.reason, finish.retry) == ("error", True)
            assert finish.error is not None
            assert "died" in finish.error[0]
            assert engine.state == "loading"  # /health tells the truth meanwhile
            answered = (await waits)[-1]
            assert isinstance(answered, Finish)
            assert (answered.reason, answered.tokens) == ("length", 5)
            assert engine.pid != first
            assert engine.totals.restarts == 1

    run(test)


def test_a_step_that_stands_still_is_reported_and_replaced() -> None:
    """SIGSTOP is a step that never ends: no exception, no exit, only silence."""

    async def test() -> None:
        async with started(stall_s=1.0) as engine:
            stands = ask(engine, 1500)
            await until(lambda: engine.held_tokens() > len(PROMPT))
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)

            finish = (await stands)[-1]
            assert isinstance(finish, Finish)
            assert finish.error is not None
            assert "no progress" in finish.error[0]
            assert "layer" in finish.error[1]
            assert "torch" in finish.error[1]  # the backend it stood in
            assert engine.totals.stalls == 1
            assert isinstance((await ask(engine))[-1], Finish)

    run(test)


def test_progress_is_no_stall() -> None:
    """A watchdog on wall time kills long answers of slow machines."""

    async def test() -> None:
        async with started(stall_s=0.5) as engine:
            finish = (await ask(engine, 800))[-1]  # some seconds
            assert isinstance(finish, Finish)
            assert finish.reason == "length"
            assert engine.totals.stalls == 0

    run(test)


def test_a_client_that_leaves_frees_the_engine() -> None:
    async def test() -> None:
        async with started() as engine:
            request = Request(id=0, prompt=PROMPT, sampling=Sampling(max_tokens=1900))
            async for event in (events := engine.ask(request)):
                if isinstance(event, Token):
                    break
            await events.aclose()
            finish = (await asyncio.wait_for(ask(engine), 5))[-1]
            assert isinstance(finish, Finish)
            assert finish.queue_s < 2
            assert engine.totals.requests["cancelled"] == 1
            assert engine.running == engine.waiting == 0

    run(test)


def test_a_model_that_does_not_fit_says_so() -> None:
    async def test() -> None:
        async with started(context=65_536, slots=1_000_000) as engine:
            assert engine.state == "failed"
            assert isinstance(engine.error, PlanError)
            assert "does not fit" in engine.error.what
            assert engine.error.do
            finish = (await ask(engine))[-1]
            assert isinstance(finish, Finish)
            assert finish.reason == "error"

    run(test)


def test_it_says_what_it_loaded() -> None:
    async def test() -> None:
        async with started(slots=2) as engine:
            facts = engine.facts
            assert facts["fused"]
            assert facts["plan"]["kv"]["total_bytes"] == facts["measured"]["kv_bytes"]
            assert facts["plan"]["total_bytes"] == facts["measured"]["total_bytes"]
            assert len(facts["layers"]) == 10

    run(test)


def test_a_served_model_runs_over_several_devices() -> None:
    """The watchdog's layers are counted through the stages, and the facts say what each device was planned and got."""

    async def test() -> None:
        async with started(device=["cpu", "cpu"], slots=2) as engine:
            answered = (await asyncio.gather(ask(engine), ask(engine, prompt=PROMPT[:9])))[0]
            assert isinstance(answered[-1], Finish)
            assert answered[-1].tokens == 5
            assert engine.facts["device"] == "cpu + cpu"
            planned = [gpu["planned_bytes"] for gpu in engine.facts["plan"]["gpus"]]
            assert [d["allocated_bytes"] for d in engine.facts["measured"]["devices"]] == planned
            assert len(planned) == 2
            assert engine._beat[1] == 9  # the last layer that was entered

    run(test)


def test_a_full_pipe_stops_nobody() -> None:
    """Long prompts for an engine that stands still: the server blocked in its pipe, and so did the watchdog that had to free it."""

    async def test() -> None:
        async with started(stall_s=1.0) as engine:
            runs = ask(engine, 1500)
            await until(lambda: engine.held_tokens() > len(PROMPT))
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)
            wait = [ask(engine, prompt=tuple(range(30, 2030))) for _ in range(150)]
            await until(lambda: engine.waiting == len(wait))
            finish = (await runs)[-1]
            assert isinstance(finish, Finish)
            assert finish.error is not None
            assert "no progress" in finish.error[1]
            for task in wait:
                task.cancel()
            await asyncio.gather(*wait, return_exceptions=True)
            await until(lambda: engine.state == "ready")
            answered = (await ask(engine))[-1]
            assert isinstance(answered, Finish)
            assert answered.reason == "length"

    run(test)
