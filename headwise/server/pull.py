"""`POST /api/pull`: a model from the Hub, told in Ollama's lines. A client that goes away ends it; files that came whole are kept.

Source: ollama/ollama fb307609, server/download.go and api/types.go ProgressResponse.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from headwise.errors import HeadwiseError
from headwise.server.ask import Refusal
from headwise.server.models import Models
from headwise.server.stream import line
from headwise.spec import hub
from headwise.spec.shelf import hub_name

HEARTBEAT_S = 8.0


class _Stopped(Exception):
    """The client went away."""


async def pulling(models: Models, name: str) -> AsyncIterator[bytes]:
    """Lines until `success` or `error`; of a model that is here already, `success` at once."""
    if not name:
        yield line({"error": "model must name what to pull"})
        return
    try:
        found = await asyncio.to_thread(models.find, name)
    except Refusal as refusal:
        repository = None if models.only else hub_name(name)
        if repository is None:
            do = "" if models.only else "; headwise pulls from the Hub, as hf:ORG/NAME or hf:ORG/NAME:TYPE"
            yield line({"error": refusal.message + do})
            return
    else:
        yield line({"status": "success", "model": found.name})
        return
    loop, said, stop = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](), threading.Event()

    def tell(file: str, done: int, of: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress = {"status": f"pulling {file}", "digest": file, "total": of, "completed": done}
        loop.call_soon_threadsafe(said.put_nowait, progress)

    def work() -> dict[str, Any]:
        try:
            hub.fetch(repository, weights=True, progress=tell)
        except _Stopped:
            return {}
        except HeadwiseError as error:
            return {"error": error.sentence}
        return {"status": "success"}

    yield line({"status": "pulling manifest"})
    task = asyncio.create_task(asyncio.to_thread(work))
    latest: dict[str, Any] = {"status": "pulling manifest"}
    try:
        while not task.done() or not said.empty():
            getting = asyncio.create_task(said.get())
            await asyncio.wait({getting, task}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                latest = getting.result()
            else:
                getting.cancel()
                if task.done():
                    continue
            yield line(latest)
        models.look_again()
        yield line(task.result())
    finally:
        stop.set()
