"""Telling systemd how it goes: READY=1 when the model is loaded, WATCHDOG=1 for as long as the server gets on.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

from headwise.engine.process import EngineProcess
from headwise.server.models import Models

LOADING_S = 120  # for how long a start that gets on is given more time


def notify(env: Mapping[str, str], *lines: str) -> bool:
    """Sends lines such as READY=1; whether a service manager takes them."""
    address = env.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)
        return True
    return False


def watchdog_s(env: Mapping[str, str]) -> float | None:
    """Seconds within which systemd wants to hear of this process; None where it does not."""
    usec, pid = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


async def answers(address: tuple[str, int], within_s: float = 5.0) -> bool:
    """Whether the server answers a request over its own socket. It may say that the model is still loading."""
    host, port = address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    f"GET /health HTTP/1.1\r\nHost: {f'[{host}]' if ':' in host else host}\r\nConnection: close\r\n\r\n".encode()
                )
                return (await reader.readline()).startswith((b"HTTP/1.1 200", b"HTTP/1.1 503"))
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return False


async def report(models: Models, address: tuple[str, int], env: Mapping[str, str]) -> None:
    """Runs until cancelled; returns at once where nobody listens, and where the first model cannot be loaded.

    A server that has work is fed only while each engine that has some gets on, one that has none only while it answers. Slow is
    not stuck.
    """
    if not notify(env, "STATUS=loading the model"):
        return
    patience = watchdog_s(env)
    every = min(patience / 3, 20.0) if patience else 5.0
    first = await models.first_engine()
    before, ready = _pulses(models), False
    while ready or first.state not in ("failed", "stopped"):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every):
                await (asyncio.sleep(every) if ready else first.until_settled())
        now = _pulses(models)
        if first.state == "ready" and not ready:
            ready = notify(env, "READY=1", "STATUS=serving")
        stuck = any(pulse == before.get(engine) and not _idle(engine) for engine, pulse in now.items())
        if not ready and now != before:
            notify(env, f"EXTEND_TIMEOUT_USEC={LOADING_S * 1_000_000}")
        elif ready and patience and not stuck and await answers(address):
            notify(env, "WATCHDOG=1", f"STATUS={_words(models)}")
        before = now


def _pulses(models: Models) -> dict[EngineProcess, tuple[object, ...]]:
    """Of each engine that is not being ended."""
    return {m.engine: m.engine.pulse() for m in models.loaded.values() if not m.ending}


def _idle(engine: EngineProcess) -> bool:
    return engine.state == "ready" and not engine.running and not engine.waiting


def _words(models: Models) -> str:
    each = [
        f"{name}: {e.state}, {e.running} running, {e.waiting} waiting, {e.totals.requests.total()} ended"
        for name, e in ((m.name, m.engine) for m in models.loaded.values())
    ]
    return "; ".join(each) or "no model is loaded"
