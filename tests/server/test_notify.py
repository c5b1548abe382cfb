"""What a service manager hears: over a real socket, from a server whose engine works, stands still, or dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headwise.server.notify import notify, watchdog_s

ROOT = Path(__file__).parents[2]


class Heard:
    """All lines that came, with the time of each."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            said = self.socket.recv(4096).decode()
            self.lines += [(time.monotonic(), line) for line in said.splitlines()]

    def count(self, line: str, since: float = 0.0) -> int:
        return sum(at > since and said.startswith(line) for at, said in self.lines)

    def until(self, line: str, since: float = 0.0, within_s: float = 60.0) -> None:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if self.count(line, since):
                return
            time.sleep(0.05)
        raise AssertionError(f"{line} was not heard: {self.lines}")


@contextmanager
def serving(heard: Heard, address: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    env = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1500000", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "headwise", "serve", "--port", "0", "--context", "2048", "--device", "cpu", "--json"]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    try:
        heard.until("READY=1")
        assert server.stdout is not None
        yield server, json.loads(server.stdout.readline())["url"]
    finally:
        server.terminate()
        server.wait(20)


def test_a_server_is_fed_while_it_gets_on_and_not_while_it_stands_still(tmp_path: Path) -> None:
    """A watchdog that any running process feeds guards nothing."""
    pytest.importorskip("uvicorn")
    heard = Heard(address := str(tmp_path / "notify"))
    with serving(heard, address, tmp_path) as (server, url):
        assert heard.count("STATUS=loading") == 1
        heard.until("WATCHDOG=1", time.monotonic())  # idle, and answering
        body = {"prompt": "x = ", "max_tokens": 2000, "logit_bias": {"1": -100, "6": -100, "11": -100}, "stream": True}
        stream = urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", json.dumps(body).encode()))
        for _ in range(6):
            stream.readline()
        heard.until("WATCHDOG=1", time.monotonic())  # busy, and getting on
        children = [c for task in Path(f"/proc/{server.pid}/task").iterdir() for c in (task / "children").read_text().split()]
        engine = next(int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text())
        os.kill(engine, signal.SIGSTOP)
        time.sleep(1.0)  # what had come before
        stopped = time.monotonic()
        time.sleep(3.0)
        assert heard.count("WATCHDOG=1", stopped) == 0
        os.kill(engine, signal.SIGCONT)
        heard.until("WATCHDOG=1", time.monotonic())
        stream.close()
    heard.until("STOPPING=1")


def test_a_server_that_hangs_is_not_fed(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    heard = Heard(address := str(tmp_path / "notify"))
    with serving(heard, address, tmp_path) as (server, _):
        heard.until("WATCHDOG=1")
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(0.6)
        stopped = time.monotonic()
        time.sleep(2.0)
        os.kill(server.pid, signal.SIGCONT)
        assert heard.count("WATCHDOG=1", stopped) <= 1  # the one that comes when it goes on


def test_nobody_is_told_where_nobody_listens(tmp_path: Path) -> None:
    assert notify({}, "READY=1") is False
    assert notify({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, "READY=1") is False
    assert notify({"NOTIFY_SOCKET": "relative"}, "READY=1") is False


def test_an_abstract_socket_is_spoken_to() -> None:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind("\0headwise-test-" + str(os.getpid()))
    listening.settimeout(5)

    assert notify({"NOTIFY_SOCKET": f"@headwise-test-{os.getpid()}"}, "READY=1", "STATUS=x")
    assert listening.recv(100) == b"READY=1\nSTATUS=x"


@pytest.mark.parametrize(
    ("env", "seconds"),
    [({"WATCHDOG_USEC": "300000000"}, 300.0), ({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, None), ({"WATCHDOG_USEC": "x"}, None),
     ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 2.0), ({}, None)],
)  # fmt: skip
def test_the_watchdogs_time_is_read(env: dict[str, str], seconds: float | None) -> None:
    assert watchdog_s(env) == seconds
