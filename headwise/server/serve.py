"""`headwise serve`: a socket, uvicorn, and the engines' processes, until a signal ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwise.engine.process import STALL_S, EngineProcess
from headwise.errors import UsageError
from headwise.server.answer import prepare
from headwise.server.ask import Ask, Refusal
from headwise.server.models import Models, keep_seconds
from headwise.server.notify import notify, report
from headwise.spec.read import Source
from headwise.spec.shelf import held

HOST, PORT = "127.0.0.1", 7433
OLLAMA_ADDRESS = ("127.0.0.1", 11434)  # where clients look for Ollama when nobody tells them


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to serve.

    Args:
        port: 0 takes a free one.
        ollama_compat: listens on `OLLAMA_ADDRESS` too; the same there as here.
        aliases: further names of the first model.
        keep_alive: Ollama's: for how long a model stays loaded when nobody uses it; None: for ever those that were named, 5
            minutes others.
        only: serve none but the models named.
        max_tokens: of answers whose request sets no limit; None: all that the context holds.
        stall_s: seconds without progress of a step until the engine is restarted.
    """

    host: str = HOST
    port: int = PORT
    ollama_compat: bool = False
    api_key: str | None = None
    aliases: tuple[str, ...] = ()
    keep_alive: str | None = None
    only: bool = False
    max_tokens: int | None = None
    body_bytes: int = 32 * 1024 * 1024
    stall_s: float = STALL_S


def serve(
    sources: Sequence[tuple[str | None, Source]],
    settings: Mapping[str, Any],
    options: Options,
    *,
    env: Mapping[str, str],
    on_ready: Callable[[Sequence[str], EngineProcess], None],
) -> None:
    """Serves until interrupted.

    Args:
        sources: the models named, each with what it was opened by; its engine's process opens it again. The first is loaded
            at once.
        settings: as `LLM` takes them, for all models.
        env: the environment, for the places of Ollama's store.
        on_ready: called with the server's URLs when the first model is loaded, the first time.
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
    models = models_of(sources, settings, options, env)
    models.on_failed = lambda: setattr(server, "should_exit", True)
    try:
        first = models.served(models.first)  # its tokenizer is read, or refused, before the port opens
    except Refusal as refusal:
        raise refusal.__cause__ or refusal from None
    with contextlib.suppress(Refusal):  # reads the template and what compiles grammars: the first client need not wait for that
        prepare(Ask(messages=({"role": "user", "content": "hello"},), schema={}), first)
    listening = sockets_of(options)
    addresses = [s.getsockname()[:2] for s in listening]
    app = create_app(
        models,
        api_key=options.api_key,
        body_bytes=options.body_bytes,
        hosts=loopback_hosts(options.host),
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
            engine = await models.first_engine()
            if await engine.until_settled() == "ready":
                on_ready([f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses], engine)

        tasks = [asyncio.create_task(announce()), asyncio.create_task(report(models, addresses[0], os.environ))]
        await server.serve(sockets=listening)
        for task in tasks:
            task.cancel()

    asyncio.run(run())
    if models.fatal is not None:
        raise models.fatal


def models_of(
    sources: Sequence[tuple[str | None, Source]], settings: Mapping[str, Any], options: Options, env: Mapping[str, str]
) -> Models:
    """The models to serve, none of them loaded.

    Raises:
        UsageError: an option that makes no sense.
    """
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UsageError(
            f"--max-tokens {options.max_tokens} makes no sense", why="an answer has one at least", do="--max-tokens 1024"
        )
    try:
        keep_s = None if options.keep_alive is None else keep_seconds(options.keep_alive)
    except ValueError as error:
        raise UsageError(f"--keep-alive {options.keep_alive} makes no sense", why=str(error), do="--keep-alive 10m") from error
    named = [held(name, source, options.aliases if i == 0 else ()) for i, (name, source) in enumerate(sources)]
    if twice := {m.name for m in named if [n.name for n in named].count(m.name) > 1}:
        raise UsageError(f"two models are called {min(twice)}", why="a request could not say which it means", do="rename one")
    return Models(
        named=named,
        settings=settings,
        env=env,
        max_tokens=options.max_tokens,
        keep_s=keep_s,
        only=options.only,
        stall_s=options.stall_s,
    )


def sockets_of(options: Options) -> list[socket.socket]:
    """What is listened on; the server's own address first.

    Raises:
        UsageError: an address is taken or not of this machine.
    """
    listening = [_socket(options.host, options.port)]
    if options.ollama_compat and not (options.port == OLLAMA_ADDRESS[1] and options.host in ("127.0.0.1", "localhost", "0.0.0.0")):
        try:
            listening.append(_socket(*OLLAMA_ADDRESS, do="systemctl stop ollama, if it is Ollama; or leave out --ollama-compat"))
        except UsageError:
            listening[0].close()
            raise
    return listening


def _socket(host: str, port: int, *, do: str = "--port 0 takes a free port") -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)  # from here on a client waits instead of being refused
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host}:{port} cannot be listened on", why=str(error), do=do) from error
    return listening
