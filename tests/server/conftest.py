"""A real server on a free port, with the embedded model in its own process, for all tests of this folder."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

ELSEWHERE = {"HF_HUB_CACHE": "nowhere", "OLLAMA_MODELS": "nowhere"}  # not the models of whoever runs the tests


@dataclass
class Live:
    """A running server."""

    url: str
    models: Any
    loop: asyncio.AbstractEventLoop

    @property
    def engine(self) -> Any:
        return self.models.loaded["tiny-hybrid"].engine

    @property
    def asleep(self) -> Any:
        """Models like these, none of them loaded."""
        return type(self.models)(self.models.named, self.models.settings, ELSEWHERE)

    @property
    def model(self) -> Any:
        return self.models.served(self.models.first)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    pytest.importorskip("llguidance")
    from headwise.server.app import create_app, loopback_hosts
    from headwise.server.serve import Options, _socket, models_of
    from headwise.server.slow import TimedProtocol
    from headwise.spec.read import open_model

    settings = {"context": 4096, "slots": 2, "device": "cpu"}
    sources = [(None, open_model(None, env={}))]
    models = models_of(sources, settings, Options(aliases=("other-name",)), ELSEWHERE)
    listening = _socket("127.0.0.1", 0)
    app = create_app(models, body_bytes=300_000, hosts=loopback_hosts("127.0.0.1"))
    server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, log_level="error"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(sockets=[listening]),), daemon=True)
    thread.start()
    while "tiny-hybrid" not in models.loaded:
        assert thread.is_alive()
        time.sleep(0.05)
    yield Live(f"http://127.0.0.1:{listening.getsockname()[1]}", models, loop)
    server.should_exit = True
    thread.join(20)
