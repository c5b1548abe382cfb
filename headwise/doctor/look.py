"""Where the logs of this machine's engines are, and which engines run here: processes, ports, environments; read-only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from headwise.doctor.diagnose import Diagnosis, diagnose, of_load
from headwise.doctor.facts import Engine, Fact, Load
from headwise.doctor.finding import Evidence, Finding, worst_first
from headwise.doctor.rules import settings
from headwise.doctor.servers import Http, Server, Transport, http_at, identify
from headwise.doctor.verdicts import flags
from headwise.errors import HeadwiseError, ProbeError, UsageError
from headwise.hardware.gpus import Gpu
from headwise.spec.layers import ModelSpec


@contextmanager
def log_of(
    path: str | None, *, unit: str | None = None, ollama: bool = False, env: Mapping[str, str], platform: str = sys.platform
) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a log and what to call it.

    Args:
        path: a file; "-" is standard input.
        unit: a systemd service, read from journald.
        ollama: this machine's Ollama: its service, else the file that its app writes.
    Raises:
        UsageError: none or more than one is named, or the file cannot be read; ProbeError: journald does not answer.
    """
    named = [x for x in (path, unit, ollama or None) if x]
    if len(named) != 1:
        raise UsageError(
            "no log is named" if not named else "more than one log is named",
            why="the doctor reads one at a time",
            do="headwise doctor server.log, --systemd UNIT, --ollama, or - for a pipe",
        )
    if path == "-":
        yield sys.stdin.buffer, "standard input"
        return
    if path is not None:
        with _opened(path) as file:
            yield file, Path(path).name
        return
    if unit is None:
        own = _ollama_file(env, platform)
        if own is not None:
            with own.open("rb") as file:
                yield file, str(own)
            return
        unit = "ollama"
    with _journal(unit) as file:
        yield file, f"journalctl -u {unit}"


def _opened(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read", why=error.strerror or str(error), do="name a log file, or - for a pipe"
        ) from error


def _ollama_file(env: Mapping[str, str], platform: str) -> Path | None:
    """Ollama's own log: on macOS and Windows its app writes a file. Source: ollama docs/troubleshooting.md."""
    home = Path(env.get("LOCALAPPDATA", "")) / "Ollama" if platform == "win32" else Path(env.get("HOME", "~")) / ".ollama/logs"
    file = home / "server.log"
    try:
        return file if file.is_file() else None
    except OSError:
        return None


@contextmanager
def _journal(unit: str) -> Iterator[BinaryIO]:
    if shutil.which("journalctl") is None:
        raise ProbeError(
            f"the log of {unit} cannot be read",
            why="this machine has no journalctl",
            do="headwise doctor FILE, or docker logs NAME 2>&1 | headwise doctor -",
        )
    command = ["journalctl", "--unit", unit, "--no-pager", "--output", "short", "--boot"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process.stdout  # type: ignore[misc]
            said = process.stderr.read(500).decode(errors="replace").strip()
        finally:
            process.kill()
    if said:
        raise ProbeError(
            f"journald says of {unit}: {said.splitlines()[0]}",
            why="its log may be another user's",
            do=f"sudo journalctl -u {unit} | headwise doctor -",
        )


# --- what runs here -------------------------------------------------------------------------------------------------------

PORTS = (11434, 8080, 8000, 1234, 30000)  # Ollama, llama-server, vLLM, LM Studio, SGLang
# Variables that change attention, cache or memory of an engine; others are nobody's business.
TELLING = re.compile(r"(OLLAMA_|LLAMA_ARG_|GGML_|VLLM_|HSA_|HIP_|ROCR_|AMD_SERIALIZE|CUDA_VISIBLE|CUDA_LAUNCH)[A-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class Process:
    """An engine that runs here, as far as this user may look."""

    pid: int
    engine: Engine
    argv: tuple[str, ...]
    env: Mapping[str, str]  # telling variables only; {} where it may not be read
    log: Path | None  # what its output goes to, where that is a file

    @property
    def name(self) -> str:
        return f"process {self.pid}"


def processes(proc: Path = Path("/proc")) -> list[Process]:
    """The engines among this machine's processes; () where there is no /proc."""
    out = []
    for folder in sorted(proc.glob("[0-9]*"), key=lambda p: int(p.name)):
        argv = tuple(_words(folder / "cmdline"))
        engine = _engine_of(argv)
        if engine is not None:
            env = dict(pair.split("=", 1) for pair in _words(folder / "environ") if "=" in pair)
            telling = {k: v for k, v in env.items() if TELLING.fullmatch(k)}
            out.append(Process(int(folder.name), engine, argv, telling, _output(folder)))
    return out


def _words(file: Path) -> list[str]:
    try:
        return [w for w in file.read_bytes().decode(errors="replace").split("\0") if w]
    except OSError:  # another user's, or gone
        return []


def _engine_of(argv: Sequence[str]) -> Engine | None:
    """By the program that runs; a shell or an editor that names one in its arguments is none."""
    if not argv:
        return None
    program = Path(argv[0]).name.lower().removesuffix(".exe")
    if program in ("llama-server", "llama-cli", "llama-run"):
        return "llama.cpp"
    if program == "ollama":
        return "ollama" if argv[1:2] and argv[1] in ("serve", "runner") else None
    script = Path(argv[1]).name if program.startswith("python") and len(argv) > 1 else program
    if (script == "vllm" and "serve" in argv) or "vllm.entrypoints" in " ".join(argv[:4]):
        return "vllm"
    return None


def _output(folder: Path) -> Path | None:
    for fd in ("2", "1"):
        try:
            target = Path(os.readlink(folder / "fd" / fd))
            if target.is_file():
                return target
        except OSError:
            continue
    return None


def of_process(p: Process, env: Mapping[str, str], *, model: ModelSpec | None = None, gpus: Sequence[Gpu] = ()) -> Diagnosis:
    """From its log, where its output goes to a file that may be read; else from its command line and environment alone."""
    more = [*_environment(p, env)]
    if p.log is not None:
        with contextlib.suppress(OSError), p.log.open("rb") as file:
            found = diagnose(file, str(p.log), model=model, env=env, gpus=gpus)
            if found.engine is not None:
                return replace(found, findings=worst_first((*found.findings, *more)))
    load = Load(p.name, "vllm" if p.engine == "vllm" else "ggml")
    for fact in requests_of(p.engine, p.argv, Evidence(p.name, None, " ".join(p.argv)[:400])):
        load.add(fact)
    return of_load(load, model=model, env=env, more=more, gpus=gpus)


def requests_of(engine: Engine, argv: Sequence[str], where: Evidence) -> Iterator[Fact]:
    """What a command line asks for: no proof of anything but that flash attention is off."""
    given = flags(" ".join(argv))
    yield Fact("command" if engine != "vllm" else "vl_command", {"command": " ".join(argv)}, where)
    if engine == "ollama":
        yield Fact("ol_running", {}, where)
    asked = (given.get("fa") or given.get("flash-attn") or "").lower()
    if engine == "llama.cpp" and asked in ("off", "0", "disabled", "false"):
        yield Fact("fa_request", {"value": "disabled"}, where)
    if engine == "llama.cpp" and "swa-full" in given:
        yield Fact("swa_full", {}, where)
    if engine == "llama.cpp" and (slots := given.get("np") or given.get("parallel") or "").isdigit():
        yield Fact("setting", {"key": "n_seq_max", "value": int(slots)}, where)
    if engine == "vllm" and (kv := given.get("kv-cache-dtype")):
        yield Fact("vl_kv_request", {"type": kv}, where)


def _environment(p: Process, shell: Mapping[str, str]) -> Iterator[Finding]:
    """What differs between the service's environment and this shell's, and what of it slows or does nothing."""
    shown = Evidence(f"environment of {p.name}", None, " ".join(f"{k}={v}" for k, v in sorted(p.env.items()))[:400])
    yield from settings(dict(p.env), (shown,), p.engine)
    mine = {k: v for k, v in shell.items() if TELLING.fullmatch(k)}
    if not p.env and not mine:
        return
    prefix = {"ollama": "OLLAMA_", "llama.cpp": "LLAMA_ARG_", "vllm": "VLLM_"}[p.engine]
    other = sorted(k for k in mine if k.startswith(prefix) and p.env.get(k) != mine[k])
    if other:
        here = ", ".join(f"{k}={mine[k]}" for k in other)
        there = ", ".join(f"{k}={p.env[k]}" if k in p.env else f"{k} not set" for k in other)
        yield Finding(
            id="environment-differs",
            severity="warning",
            what=f"the service does not have this shell's {', '.join(other)}",
            why=f"here {here}; in {p.name}: {there}",
            cure="systemctl edit ollama, then systemctl restart ollama" if p.engine == "ollama" else "restart it from this shell",
            evidence=(shown,),
        )


def of_server(server: Server, env: Mapping[str, str], *, model: ModelSpec | None = None, gpus: Sequence[Gpu] = ()) -> Diagnosis:
    """What a live server says of itself: which model and context, and nothing about attention."""
    engine: Engine = "vllm" if server.engine == "openai" else server.engine
    load = Load("ollama" if engine == "ollama" else "server", "vllm" if engine == "vllm" else "ggml")
    said = Evidence(f"{server.url or 'the server'}", None, f"{server.label}, {server.model}, {server.context} tokens")
    if engine == "vllm":
        load.add(Fact("vl_engine", {"version": server.version, "model": server.model}, said))
    else:
        load.add(Fact("version" if engine == "ollama" else "build", {"version": server.version, "commit": server.version}, said))
        load.add(Fact("model_file", {"path": server.path or server.model}, said))
    if server.context and engine == "llama.cpp":
        load.add(Fact("slots", {"slots": 1, "context": server.context}, said))
    found = of_load(load, model=model, env=env, gpus=gpus)
    return replace(found, model=server.model or found.model, version=server.version or found.version)


def around(
    env: Mapping[str, str], *, proc: Path = Path("/proc"), at: Callable[[str], Transport] = http_at, ports: Sequence[int] = PORTS
) -> list[Diagnosis]:
    """Every engine that is found: by its process, else by its port.

    Raises:
        ProbeError: there is none.
    """
    running = processes(proc)
    found = [of_process(p, env) for p in running]
    seen = {p.engine for p in running}
    for port in ports:
        with contextlib.suppress(HeadwiseError):
            server = identify(at(f"http://127.0.0.1:{port}"))
            if server.engine not in seen:
                found.append(of_server(server, env))
                seen.add("vllm" if server.engine == "openai" else server.engine)
    if not found:
        raise ProbeError(
            "no engine runs here",
            why=f"no process of llama-server, Ollama or vLLM, and nothing answers at the ports {', '.join(map(str, ports))}",
            do="headwise doctor FILE, --url URL, or journalctl -u UNIT | headwise doctor -",
        )
    return sorted(found, key=lambda d: not d.wrong)


def at_url(
    url: str, env: Mapping[str, str], *, key: str | None = None, model: ModelSpec | None = None, gpus: Sequence[Gpu] = ()
) -> Diagnosis:
    """The server at `url`; where it runs here and its log can be found, that log is read too.

    Args:
        model, gpus: as `diagnose` takes them.
    """
    server = identify(http_at(url, key=key))
    return beside(server, env, model=model, gpus=gpus) or of_server(server, env, model=model, gpus=gpus)


def beside(server: Server, env: Mapping[str, str], *, model: ModelSpec | None = None, gpus: Sequence[Gpu] = ()) -> Diagnosis | None:
    """The diagnosis of a server's own process, where it is one of this machine's."""
    transport = server.transport
    if not isinstance(transport, Http) or not transport.local:
        return None
    running = [p for p in processes() if p.engine == server.engine]
    port = str(transport.port)
    mine = [p for p in running if port in p.argv or f"--port={port}" in p.argv] or (running if len(running) == 1 else [])
    return of_process(mine[0], env, model=model, gpus=gpus) if mine else None
