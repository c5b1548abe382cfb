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


async def report(engine: EngineProcess, address: tuple[str, int], env: Mapping[str, str]) -> None:
    """Runs until cancelled; returns at once where nobody listens.

    A server that has work is fed only while the engine gets on, one that has none only while it answers. Slow is not stuck.
    """
    if not notify(env, "STATUS=loading the model"):
        return
    patience = watchdog_s(env)
    every = min(patience / 3, 20.0) if patience else 5.0
    before, ready = engine.pulse(), False
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every):
                await (asyncio.sleep(every) if ready else engine.until_settled())
        now = engine.pulse()
        if engine.state == "ready" and not ready:
            ready = notify(env, "READY=1", "STATUS=serving")
        idle = engine.state == "ready" and not engine.running and not engine.waiting
        if not ready and now != before:
            notify(env, f"EXTEND_TIMEOUT_USEC={LOADING_S * 1_000_000}")
        elif ready and patience and (now != before or idle) and await answers(address):
            notify(env, "WATCHDOG=1", f"STATUS={_words(engine)}")
        before = now
        if engine.state in ("failed", "stopped"):
            return


def _words(engine: EngineProcess) -> str:
    return f"{engine.state}; {engine.running} running, {engine.waiting} waiting, {engine.totals.requests.total()} ended"
