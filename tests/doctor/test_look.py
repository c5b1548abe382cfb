"""What runs here: processes, their logs and environments, servers that answer; a made-up /proc and made-up servers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.cli import main
from headwise.doctor import look
from headwise.doctor.diagnosis_page import html
from headwise.doctor.servers import Exchange, Transport
from headwise.errors import ProbeError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.spec import catalogue

LOGS = Path(__file__).parent / "logs"


def process(proc: Path, pid: int, *argv: str, env: dict[str, str] | None = None, log: Path | None = None) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "cmdline").write_bytes("\0".join(argv).encode() + b"\0")
    (folder / "environ").write_bytes("\0".join(f"{k}={v}" for k, v in (env or {}).items()).encode() + b"\0")
    if log is not None:
        os.symlink(log, folder / "fd" / "2")


class Answer(Exchange):
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body

    def open(self) -> tuple[int, str]:
        return self.status, ""

    def readline(self, limit: int) -> bytes:
        body, self.body = self.body, b""
        return body

    def stop(self) -> None: ...

    def close(self) -> None: ...


def server(pages: dict[str, object]) -> Callable[[str], Transport]:
    def at(url: str) -> Transport:
        if not url.endswith(":8080"):
            raise ProbeError(f"{url} gave no answer")
        return lambda method, path, body, timeout_s: (
            Answer(200, json.dumps(pages[path]).encode()) if path in pages else Answer(404, b"")
        )

    return at


def nobody(url: str) -> Transport:
    raise ProbeError(f"{url} gave no answer")


def test_engines_are_told_by_the_program_that_runs(tmp_path: Path) -> None:
    """An editor with ollama.md open is no Ollama; `ollama run` is a client."""
    process(tmp_path, 10, "vim", "llama-server.md")
    process(tmp_path, 11, "/usr/local/bin/ollama", "serve", env={"OLLAMA_FLASH_ATTENTION": "1", "SECRET": "x"})
    process(tmp_path, 12, "ollama", "run", "gemma4")
    process(tmp_path, 13, "/usr/local/bin/llama-server", "-m", "a.gguf", "-fa", "off")
    process(tmp_path, 14, "python3", "/usr/bin/vllm", "serve", "google/gemma-4-31B-it", "--kv-cache-dtype", "fp8")
    process(tmp_path, 15, "bash", "-c", "llama-server -m a.gguf")
    (tmp_path / "self").mkdir()

    found = look.processes(tmp_path)

    assert [(p.pid, p.engine) for p in found] == [(11, "ollama"), (13, "llama.cpp"), (14, "vllm")]
    assert found[0].env == {"OLLAMA_FLASH_ATTENTION": "1"}


def test_a_flag_that_turns_it_off_is_proof_and_one_that_turns_it_on_is_none(tmp_path: Path) -> None:
    process(tmp_path, 1, "llama-server", "-m", "a.gguf", "-fa", "off")
    process(tmp_path, 2, "llama-server", "-m", "a.gguf", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0")
    off, on = (look.of_process(p, {}) for p in look.processes(tmp_path))

    assert [v.verdict for v in off.layers] == ["materialised"] and off.wrong
    assert [v.verdict for v in on.layers] == ["unproven"] and not on.wrong
    assert (on.kv.requested, on.kv.verdict) == ("q8_0", "unproven")
    assert on.layers[0].evidence == () or on.layers[0].evidence[0].source == "process 2"


def test_the_log_that_a_process_writes_is_read(tmp_path: Path) -> None:
    process(tmp_path, 1, "llama-server", "-m", "a.gguf", log=LOGS / "llamacpp_cpu_fa_off.txt")
    (d,) = look.around({}, proc=tmp_path, at=nobody)

    assert {v.verdict for v in d.layers} == {"materialised"}
    assert d.layers[0].evidence[0].line == 161


def test_the_environment_of_the_service_stands_against_the_shells(tmp_path: Path) -> None:
    """export in a terminal changes nothing in a service."""
    process(tmp_path, 1, "ollama", "serve", env={"OLLAMA_KV_CACHE_TYPE": "f16", "CUDA_LAUNCH_BLOCKING": "1"})
    shell = {"OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_KV_CACHE_TYPE": "q8_0", "HOME": "/home/me"}
    (d,) = look.around(shell, proc=tmp_path, at=nobody)
    found = {f.id: f for f in d.findings}

    assert d.engine == "ollama"
    assert "OLLAMA_FLASH_ATTENTION not set" in found["environment-differs"].why
    assert "OLLAMA_KV_CACHE_TYPE=f16" in found["environment-differs"].why
    assert found["setting-that-slows"].severity == "problem"
    same = look.of_process(look.processes(tmp_path)[0], {"OLLAMA_KV_CACHE_TYPE": "f16"})
    assert "environment-differs" not in {f.id for f in same.findings}


def test_a_server_that_answers_is_found_by_its_port(tmp_path: Path) -> None:
    pages = {
        "/props": {"default_generation_settings": {"n_ctx": 4096}, "model_path": "/m/gemma-4-31b.gguf", "build_info": "b9999-abc"}
    }
    (d,) = look.around({}, proc=tmp_path, at=server(pages))

    assert (d.engine, d.version, d.model) == ("llama.cpp", "b9999-abc", "gemma-4-31b.gguf")
    assert [(v.kind, v.count, v.verdict) for v in d.layers] == [("sliding", 50, "unproven"), ("global", 10, "unproven")]
    assert {"log-too-quiet", "context-in-use"} <= {f.id for f in d.findings}


def test_the_model_and_card_that_are_named_are_those_of_a_server_at_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """--url passed --model and --gpu over in silence: the verdicts were those of whatever the server's file name led to."""
    pages = {"/props": {"default_generation_settings": {"n_ctx": 4096}, "model_path": "/m/mine.gguf", "build_info": "b9999-abc"}}
    monkeypatch.setattr(look, "http_at", lambda *_, **__: server(pages)("http://127.0.0.1:8080"))
    d = look.at_url("http://127.0.0.1:1", {}, model=catalogue.spec("gemma-4-31b"), gpus=[find_gpu("rtx4090")])

    assert [(v.kind, v.count) for v in d.layers] == [("sliding", 50), ("global", 10)]
    assert [g.name for g in d.gpus] == ["rtx4090"]
    assert main(["doctor", "--gpu", "rtx4090"]) == 2  # of which of the servers here?


def test_nothing_here_is_an_error_with_a_way_on(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no engine runs here"):
        look.around({}, proc=tmp_path, at=nobody)
    with pytest.raises(UsageError, match="no URL"):
        look.at_url("http://[", {})


def test_a_page_shows_layers_memory_and_findings(tmp_path: Path) -> None:
    log = LOGS / "llamacpp_cpu_healthy.txt"
    out = tmp_path / "report.html"

    assert main(["doctor", str(log), "--html", str(out)]) == 1
    text = out.read_text()
    assert "no-gpu" in text and "KV cache" in text
    assert "<script" not in text
    with log.open("rb") as file:
        d = look.diagnose(file, "<b>log</b>")
    assert "<b>log" not in html(d)
    assert len(re.findall("layer|sliding: |global: ", text)) >= 10
