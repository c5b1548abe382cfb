"""The command line: documented keys, exit codes, no torch where none is needed, errors without tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import folder

from headwise.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "gemma-4-31b", "--context", "4096", "--gpu", "rtx4090", "--weights", "q4_k_m", "--json")
    p = json.loads(out)

    assert code == 0
    assert p.keys() >= {
        "model",
        "engine",
        "context",
        "slots",
        "kv",
        "weights_bytes",
        "compute_bytes",
        "total_bytes",
        "fits",
        "max_context",
        "gpus",
    }
    assert p["kv"].keys() == {"format", "global_bytes", "sliding_bytes", "total_bytes"}
    assert p["kv"]["format"] == {"global": "bf16", "sliding": "bf16"}
    assert p["gpus"][0].keys() >= {"name", "usable_bytes", "planned_bytes", "layers"}
    assert p["gpus"][0]["layers"] == list(range(60))
    assert p["fits"] is True


def test_a_plan_that_does_not_fit_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "gemma-4-31b", "--gpu", "gtx1080", "--json")

    assert code == 1
    assert json.loads(out)["fits"] is False


def test_without_a_card_fits_is_null(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.api.detect", tuple)
    code, out, _ = run(capsys, "plan", "gemma4:26b", "--json")

    assert code == 0
    assert json.loads(out)["fits"] is None
    assert json.loads(out)["gpus"] == []


def test_llama_cpp_plans_to_the_mib(capsys: pytest.CaptureFixture[str]) -> None:
    """2560 + 1200 MiB: the figure its server logs for Gemma 4 31B at 32,768 tokens, f16, one slot."""
    code, out, _ = run(capsys, "plan", "gemma-4-31b", "--engine", "llama.cpp", "--kv", "f16", "--context", "32768", "--json")
    kv = json.loads(out)["kv"]

    assert code == 0
    assert (kv["global_bytes"], kv["sliding_bytes"]) == (2560 * 2**20, 1200 * 2**20)


def test_explain_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "gemma-4-e2b", "--gpu", "rtx4090", "--json")
    layers = json.loads(out)["layers"]

    assert code == 0
    assert len(layers) == 35
    assert layers[4].keys() >= {"index", "kind", "head_dim", "window", "kv_source", "k_eq_v", "backend", "refusals"}
    assert (layers[4]["kind"], layers[4]["head_dim"], layers[4]["window"], layers[4]["kv_source"]) == ("global", 512, None, None)
    assert layers[34]["kv_source"] == 14
    assert {"backend": "flash-attn-2", "reason": "head_dim 512 not in 8..256, multiples of 8"} in layers[4]["refusals"]


def test_a_card_without_a_backend_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", "gemma-4-e2b", "--gpu", "rx7900xtx")

    assert code == 1
    assert "0/35 layers fused" in out


@pytest.mark.parametrize("verb", ["run", "verify", "explain"])
@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("global=headwise-triton", 1, "headwise-triton: runs on cuda, not on cpu"),
        ("reference", 1, "reference is forced"),
        ("sliding=cudnn", 2, "one of: headwise-hopper, headwise-triton"),
        ("local=reference", 2, "a layer is global or sliding"),
    ],
)
def test_a_backend_that_cannot_be_forced_is_refused(
    capsys: pytest.CaptureFixture[str], verb: str, asked: str, code: int, words: str
) -> None:
    got, out, err = run(capsys, verb, "--backend", asked, *(("--gpu", "cpu") if verb == "explain" else ("--device", "cpu")))

    assert got == code
    assert words in " ".join((out + err).split())


def test_verify_checks_the_forced_backend(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "verify", "--device", "cpu", "--ubatch", "64", "--backend", "sliding=reference", "--allow-fallback", "--json"
    )

    assert code == 0
    assert {c["window"]: c["backend"] for c in json.loads(out)["checks"]} == {256: "reference", None: "torch-flash-cpu"}


def test_run_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "run", "-p", "import os\n", "--max-tokens", "3", "--json", "--device", "cpu", "--context", "512", "--no-check"
    )
    answer = json.loads(out)

    assert code == 0
    assert answer.keys() >= {"text", "tokens", "report"}
    report = answer["report"]
    assert report.keys() >= {
        "layers", "layers_fused", "backends", "planned_bytes", "allocated_bytes", "peak_bytes", "prefill_tokens",
        "prefill_tok_s", "decode_tok_s",
    }  # fmt: skip
    assert report["planned_bytes"] == report["allocated_bytes"]
    assert report["layers_fused"] == report["layers"] == 10
    assert report["backends"][0].keys() == {"layers", "backend", "prefill", "head_dim", "window", "kv"}
    assert all(isinstance(t, int) for t in answer["tokens"])


@pytest.mark.parametrize("context", ["512", "100"])  # 100: less than a chunk
def test_the_plan_of_the_cpu_is_what_run_allocates(capsys: pytest.CaptureFixture[str], context: str) -> None:
    """One arithmetic: the number told before is the number counted after."""
    _, planned, _ = run(capsys, "plan", "tiny-hybrid", "--device", "cpu", "--context", context, "--json")
    _, ran, _ = run(capsys, "run", "-p", "x", "--max-tokens", "1", "--json", "--device", "cpu", "--context", context, "--no-check")

    assert json.loads(planned)["total_bytes"] == json.loads(ran)["report"]["allocated_bytes"]
    assert json.loads(planned)["ubatch"] == min(512, int(context))  # no step is longer than the context


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("run", "nosuch-model"), 2, "no model 'nosuch-model'"),
        (("run", "./missing.gguf"), 2, "does not exist"),
        (("run", "gemma-4-31b"), 2, "holds no weights"),
        (("run", "ollama:nothing-here"), 2, "nothing-here"),
        (("run", "-p", "a", "--file", "b"), 2, "two prompts"),
        (("run", "--file", "/nonexistent/prompt.txt"), 2, "cannot be read"),
        (("run", "-p", "x", "--device", "cpu", "--context", "70000"), 1, "65536"),
        (("run", "-p", "x" * 3000, "--device", "cpu", "--context", "64"), 1, "the prompt has"),
        (("run", "-p", "x", "--kv", "q3_x"), 2, "unknown KV type"),
        (("run", "-p", "x", "--dtype", "q8_0"), 2, "unknown dtype"),
        (("run", "-p", "x", "--device", "cpu", "--weights", "fp8"), 2, "--weights fp8 has no effect on the CPU"),
        (("plan", "gemma-4-31b", "--dtype", "q8_0"), 2, "unknown dtype"),
        (("plan", "gemma-4-31b", "--ubatch", "0"), 2, "--ubatch 0 makes no sense"),
        (("plan", "gemma-4-31b", "--context", "9223372036854775808"), 2, "makes no sense"),
        (("plan", "gemma-4-31b", "--gpu", "rtx9999"), 2, "rtx9999"),
        (("plan", "gemma-4-31b", "--context", "99999999"), 1, "262144"),
        (("plan", "gemma-4-31b", "--weights", "q1"), 2, "unknown weight type"),
        (("plan", "gemma-4-31b", "--engine", "lmdeploy"), 2, "lmdeploy"),
        (("plan", "--nonsense"), 2, "nonsense"),
        (("bench", "engine", "--svg", "missing/engine.svg"), 2, "missing/engine.svg cannot be written"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_mistakes_are_explained(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, words: str) -> None:
    got, _, err = run(capsys, *argv)

    assert got == code
    assert words in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--seed", "9" * 26), 2, "--seed"),
        (("--max-tokens", "0"), 2, "--max-tokens 1"),
        (("--temperature", "nan"), 2, "--temperature"),
        (("--top-p", "0"), 2, "--top-p"),
        (("--context", "5"), 1, "the prompt has"),
    ],
)
def test_a_request_is_refused_before_the_weights_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, words: str
) -> None:
    """`--top-p 2` came back as an error after a load of minutes, and a seed of 26 digits as a traceback."""
    monkeypatch.setattr("headwise.engine.llm.load_weights", lambda *a, **k: pytest.fail("the weights are loaded"))
    got, out, err = run(capsys, "run", "-p", "import os, sys, time", "--device", "cpu", "--no-check", *options)

    assert (got, out) == (code, "")
    assert words in err


def test_verify_reads_no_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking the kernels for a model of 17 GiB took the minutes and the memory of loading it."""
    monkeypatch.setattr("headwise.engine.llm.load_weights", lambda *a, **k: pytest.fail("the weights are loaded"))
    code, out, _ = run(capsys, "verify", "--device", "cpu", "--context", "600", "--json")

    assert code == 0
    assert all(check["ok"] for check in json.loads(out)["checks"])


def test_a_command_in_an_error_is_not_broken_over_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Advice is made to be pasted; a pipe is 80 columns wide for rich, and the path of this file is longer."""
    path = f"/{'x' * 100}/model.gguf"
    _, _, err = run(capsys, "run", path)

    assert any(path in line for line in err.splitlines())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF\x03\0\0\0" + b"\xff" * 16,
        b"PK\x03\x04 a zip",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
    ],
)
def test_damaged_files_are_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    code, _, err = run(capsys, "run", str(file), "-p", "x")

    assert code == 2
    assert "Traceback" not in err


def test_a_directory_without_a_tokenizer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "run", str(folder("llama")), "-p", "x", "--device", "cpu")

    assert code == 2
    assert "tokenizer" in err


@pytest.mark.parametrize("argv", [("plan", "nosuch-model", "--json"), ("plan", "--json", "--context", "many"), ("--json",)])
def test_errors_are_json_too(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    """A program that misspells an option got nothing on standard output."""
    code, out, _ = run(capsys, *argv)

    assert code == 2
    assert json.loads(out)["error"].keys() == {"what", "why", "do"}


def test_an_engines_version_that_nobody_read_is_noted_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    """People saw "the rules of 0.19.0 are used"; programs did not."""
    _, out, _ = run(capsys, "plan", "gemma-4-31b", "--engine", "vllm@0.0.1", "--json")

    assert any("the rules of 0.19.0 are used" in note for note in json.loads(out)["notes"])


def test_a_card_without_bf16_is_planned_as_it_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` named a bf16 cache on Turing, where `run` and `explain` use f16."""
    _, planned, _ = run(capsys, "plan", "gemma-4-e2b", "--gpu", "rtx2080ti", "--json")
    _, explained, _ = run(capsys, "explain", "gemma-4-e2b", "--gpu", "rtx2080ti")

    assert json.loads(planned)["kv"]["format"] == {"global": "f16", "sliding": "f16"}
    assert json.loads(planned)["dtype"] == "f16"
    assert "KV f16" in explained


def headwise(*argv: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "headwise", *argv], stderr=subprocess.PIPE, timeout=120, **more)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    """A pipe of other bytes was a traceback, or half a surrogate pair, by the locale."""
    done = headwise("run", "-", input=b"caf\xff", env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})

    assert done.returncode == 2
    assert b"standard input cannot be read" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
@pytest.mark.parametrize(
    "argv", [("plan", "tiny-hybrid"), ("plan", "tiny-hybrid", "--json"), ("run", "-p", "x", "--max-tokens", "2")]
)
def test_a_full_disk_under_standard_output_is_said(argv: tuple[str, ...]) -> None:
    """It ended in a traceback, or in Python's own exit code 120 when the last buffer was lost."""
    with open("/dev/full", "wb") as full:
        done = headwise(*argv, stdout=full)

    assert done.returncode == 1
    assert b"standard output cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`headwise explain ... | head` closes the pipe."""
    read, write = os.pipe()
    os.close(read)
    done = headwise("explain", "gemma-4-31b", "--gpu", "rtx4090", stdout=write)
    os.close(write)

    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_block_characters_is_served() -> None:
    """Windows pipes are cp1252; the layer map was a UnicodeEncodeError there."""
    done = headwise(
        "explain", "tiny-hybrid", "--gpu", "cpu", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "cp1252"}
    )

    assert done.returncode == 0
    assert b"10/10 layers fused" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT of this kind")
def test_ctrl_c_ends_a_generation_with_its_report() -> None:
    """Exit code 130, the text so far, the report, and no traceback."""
    argv = ["run", "-p", "import os\n", "--max-tokens", "60000", "--temperature", "1", "--device", "cpu", "--no-check"]
    command = [sys.executable, "-m", "headwise", *argv]
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert process.stdout
        assert process.stdout.read(1)  # it generates
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "10/10 layers fused" in err
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "gemma-4-31b", "--gpu", "rtx4090", "--json"],
        ["plan", "tiny-hybrid", "--json"],
        ["plan", "gemma-4-31b", "--engine", "ollama", "--json"],
        ["explain", "gpt-oss-20b", "--gpu", "h200"],
        ["explain", "gemma-4-31b", "--engine", "vllm@0.19.0", "--gpu", "rtx3090"],
    ],
)
def test_planning_and_explaining_need_no_torch(argv: list[str]) -> None:
    """In under a second (of the processor) and 150 MB, with torch, numpy, tokenizers and transformers made unimportable."""
    code = f"""
import sys, time
for name in ("torch", "numpy", "transformers", "tokenizers", "gguf", "jinja2", "huggingface_hub"):
    sys.modules[name] = None
start = time.process_time()
from headwise.cli import main
status = main({argv!r})
took = time.process_time() - start
assert status in (0, 1), status
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("took", took, peak.split()[1], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    took, kib = done.stderr.split("took ")[1].split()
    assert float(took) < 1.0
    assert int(kib) < 150 * 1024
