"""The last condition of `/ready`: a prompt of production length went through the engine.

It runs when `/ready` is asked for the first time after a load, so that who never asks never pays; beside other requests it is one
more of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from headwise.engine.process import EngineProcess
from headwise.engine.request import Finish, Prefill, Request, Sampling

LENGTH = 8192  # an agent's first prompt; less where half the context is less


class Probe:
    """One prompt for each engine process.

    Args:
        context: tokens that the engine was planned for.
        vocab_size: of the model; the prompt goes through all of its tokens.
    """

    def __init__(self, engine: EngineProcess, context: int, vocab_size: int) -> None:
        self.engine, self.tokens, self.vocab_size = engine, max(1, min(LENGTH, context // 2)), vocab_size
        self.done = 0
        self.passed = False
        self.seconds: float | None = None
        self.error: str | None = None
        self._of: int | None = None  # the engine process, by its number of restarts
        self._task: asyncio.Task[None] | None = None

    def look(self) -> dict[str, Any]:
        """How far it is; begins it where this engine has not been probed."""
        process = self.engine.totals.restarts
        if self.engine.state == "ready" and self._of != process:
            self._of, self.done, self.passed, self.seconds, self.error = process, 0, False, None, None
            self._task = asyncio.create_task(self._run())
        return {"tokens": self.tokens, "done": self.done, "passed": self.passed, "seconds": self.seconds, "error": self.error}

    async def _run(self) -> None:
        started = time.monotonic()
        prompt = tuple(i * 7919 % self.vocab_size for i in range(self.tokens))
        request = Request(id=0, prompt=prompt, sampling=Sampling(max_tokens=1), client="probe of /ready")
        async with contextlib.aclosing(self.engine.ask(request)) as events:
            async for event in events:
                if isinstance(event, Prefill):
                    self.done = event.done
                elif isinstance(event, Finish):
                    self.passed = event.reason in ("stop", "length")
                    self.seconds = round(time.monotonic() - started, 3)
                    self.error = None if event.error is None else ": ".join(part for part in event.error[:2] if part)
