"""`headwise serve`: a socket, uvicorn, and the engine's process, until a signal ends them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from headwise.engine.process import STALL_S, EngineProcess
from headwise.errors import UsageError
from headwise.server.answer import Served, served
from headwise.server.notify import notify, report
from headwise.spec.read import Source
from headwise.text.tokenizer import read_tokenizer

HOST, PORT = "127.0.0.1", 7433
DEFAULT_CONTEXT = 32_768


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to serve.

    Args:
        port: 0 takes a free one.
        aliases: further names that clients may ask for.
        max_tokens: of answers whose request sets no limit; None: all that the context holds.
        stall_s: seconds without progress of a step until the engine is restarted.
    """

    host: str = HOST
    port: int = PORT
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    max_tokens: int | None = None
    body_bytes: int = 32 * 1024 * 1024
    stall_s: float = STALL_S


def serve(
    name: str | None,
    source: Source,
    settings: Mapping[str, Any],
    options: Options,
    *,
    on_ready: Callable[[str, EngineProcess], None],
) -> None:
    """Serves until interrupted.

    Args:
        name: what `source` was opened by; the engine's process opens it again.
        settings: as `LLM` takes them.
        on_ready: called with the URL when the model is loaded, the first time.
    Raises:
        HeadwiseError: the port is taken, the model cannot be loaded, or the server's packages are not installed.
    """
    try:
        import uvicorn

        from headwise.server.app import create_app, loopback_hosts
        from headwise.server.slow import TimedProtocol
    except ImportError as error:
        raise UsageError(
            "the server cannot start", why=f"{error.name} is not installed", do="pip install 'headwise[serve]'"
        ) from error
    model = model_of(source, settings, options)
    engine = EngineProcess(name, {**settings, "context": model.context}, stall_s=options.stall_s)
    listening = _socket(options.host, options.port)
    host, port = listening.getsockname()[:2]
    app = create_app(
        model,
        engine,
        api_key=options.api_key,
        body_bytes=options.body_bytes,
        hosts=loopback_hosts(options.host),
        on_failed=lambda: setattr(server, "should_exit", True),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            notify(os.environ, "STOPPING=1")  # after `serve` is too late: uvicorn raises the signal again
            await super().shutdown(sockets)

    server = Server(
        uvicorn.Config(
            app, http=TimedProtocol, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
        )
    )

    async def run() -> None:
        async def announce() -> None:
            if await engine.until_settled() == "ready":
                on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}", engine)

        tasks = [asyncio.create_task(announce()), asyncio.create_task(report(engine, (host, port), os.environ))]
        await server.serve(sockets=[listening])
        for task in tasks:
            task.cancel()

    asyncio.run(run())
    if engine.error is not None:
        raise engine.error


def model_of(source: Source, settings: Mapping[str, Any], options: Options) -> Served:
    """The served model; without a context in `settings`, DEFAULT_CONTEXT or the model's maximum."""
    assert source.path is not None
    context = settings.get("context") or min(source.spec.max_context, DEFAULT_CONTEXT)
    tokenizer = read_tokenizer(source.path if source.gguf is None else source.gguf)
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(
            f"--max-tokens {options.max_tokens} makes no sense", why="an answer has one at least", do="--max-tokens 1024"
        )
    return served(source, tokenizer, context, options.aliases, options.max_tokens)


def _socket(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)  # from here on a client waits instead of being refused
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host}:{port} cannot be listened on", why=str(error), do="--port 0 takes a free port") from error
    return listening
