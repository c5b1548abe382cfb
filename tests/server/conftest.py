"""A real server on a free port, with the embedded model in its own process, for all tests of this folder."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class Live:
    """A running server."""

    url: str
    engine: Any
    model: Any
    loop: asyncio.AbstractEventLoop


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    pytest.importorskip("llguidance")
    from headwise.engine.process import EngineProcess
    from headwise.server.app import create_app, loopback_hosts
    from headwise.server.serve import Options, _socket, model_of
    from headwise.server.slow import TimedProtocol
    from headwise.spec.read import open_model

    settings = {"context": 4096, "slots": 2, "device": "cpu"}
    model = model_of(open_model(None, env=os.environ), settings, Options(aliases=("other-name",)))
    engine = EngineProcess(None, settings)
    listening = _socket("127.0.0.1", 0)
    app = create_app(model, engine, body_bytes=300_000, hosts=loopback_hosts("127.0.0.1"))
    server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, log_level="error"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[listening]),), daemon=True)
    thread.start()
    yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", engine, model, loop)
    server.should_exit = True
    thread.join(20)
