"""`headwise probe` from the command line to exit code, JSON, report and terminal, against fake servers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from doctor.fake_servers import Fake, served

from headwise.cli import main
from headwise.doctor.finding import Evidence, Finding
from headwise.doctor.page import Bar, Cell, page, probe_page
from headwise.doctor.probe import Options, probe
from headwise.doctor.servers import http_at, identify

pytestmark = pytest.mark.usefixtures("busy_machine")
POINT = {"length", "prompt_tokens", "cached_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "verdict", "recalled"}
DOCS = Path(__file__).parents[2] / "docs"


def run(capsys: pytest.CaptureFixture[str], url: str, *flags: str) -> tuple[int, str]:
    code = main(["probe", url, "--stall", "0.5", *flags])
    return code, capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], fake: Fake, *flags: str) -> tuple[int, dict[str, Any]]:
    with served(fake) as url:
        code, out = run(capsys, url, "--json", "--lengths", "128,2048", *flags)
    return code, json.loads(out)


def test_json_has_the_keys_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = run_json(capsys, Fake())

    assert code == 0
    assert answer.keys() == {"server", "model", "points", "verdict", "findings"}
    assert [p.keys() for p in answer["points"]] == [POINT, POINT]
    assert (answer["model"], answer["server"]["engine"], answer["verdict"]) == ("fake.gguf", "llama.cpp", "ok")


@pytest.mark.parametrize(
    ("fake", "verdict", "plain", "gate"),
    [
        (Fake(), "ok", 0, 0),
        (Fake(token_s=2e-4, chunk=1024), "ok", 0, 0),
        (Fake(growth_s=2.5e-7), "slow", 0, 1),
        (Fake(stuck_from=2000), "stuck", 1, 1),
        (Fake(fail_from=2000), "failed", 1, 1),
        (Fake(cached=0.99), "failed", 1, 1),
    ],
)
def test_the_exit_code_is_the_gate(capsys: pytest.CaptureFixture[str], fake: Fake, verdict: str, plain: int, gate: int) -> None:
    """A gate that lets a stuck server through sends users to it."""
    assert run_json(capsys, fake)[0] == plain
    fake.over.clear()
    code, answer = run_json(capsys, fake, "--gate")
    assert (answer["verdict"], code) == (verdict, gate)


def test_two_servers_are_compared_per_length(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Fake(token_s=1e-4, chunk=4096)) as fast, served(Fake("vllm", token_s=3e-4, chunk=4096)) as slow:
        code, out = run(capsys, fast, "--json", "--lengths", "512,2048", "--compare", slow)
    compare = json.loads(out)["compare"]

    assert code == 0
    assert compare.keys() == {"server", "model", "points", "verdict", "findings", "ratio"}
    assert [r["length"] for r in compare["ratio"]] == [512, 2048]
    assert 2 < compare["ratio"][1]["prefill"] < 4.5
    assert 2 < compare["ratio"][1]["ttft"] < 4.5


def test_the_page_of_json_promises_these_keys(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(DOCS.parent / "tests" / "house"))
    try:
        from test_json import printed, promised
    finally:
        sys.path.pop(0)
    with served(Fake(growth_s=2.5e-7)) as one, served(Fake(growth_s=2.5e-7)) as other:
        _, out = run(capsys, one, "--json", "--lengths", "128,2048", "--compare", other)

    bare = {"findings[].evidence", "compare.findings[].evidence"}  # a finding may have none
    assert set(printed(json.loads(out))) - bare == promised("probe a server")


def test_lengths_that_do_not_fit_are_left_out_unless_named(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Fake(context=4096)) as url:
        code, out = run(capsys, url, "--json")
        assert [p["length"] for p in json.loads(out)["points"]] == [512, 2048]
        assert code == 0
        code, out = run(capsys, url, "--json", "--lengths", "512,8192")
        assert [p["verdict"] for p in json.loads(out)["points"]] == ["ok", "failed"]
        assert code == 1


@pytest.mark.parametrize(
    "flags",
    [("--lengths", "512,x"), ("--lengths", "5"), ("--stall", "-1"), ("--api-key-env", "NOT_SET_ANYWHERE"), ("--engine", "exllama"),
     ("--model-source", "nosuch-model"), ("--gpu", "nosuch-card", "--model-source", "gemma-4-e2b")],
)  # fmt: skip
def test_what_makes_no_sense_is_usage(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    with served(Fake()) as url:
        assert main(["probe", url, *flags]) == 2


def test_no_server_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "127.0.0.1:1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out).keys() == {"error"}


def test_the_key_of_one_host_goes_to_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that was meant for one server in the log of another is a leak."""
    monkeypatch.setenv("A_KEY", "s3cret")
    with served(Fake("openai", key="s3cret")) as ours, served(Fake("openai", key="s3cret")) as theirs:
        assert run(capsys, ours, "--lengths", "128", "--api-key-env", "A_KEY")[0] == 0
        assert main(["probe", ours, "--api-key-env", "A_KEY", "--compare", theirs.replace("127.0.0.1", "localhost")]) == 1


def test_the_model_source_sets_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Losing 60 % at 4K is healthy in a 0.6B model, and a fault in a 31B one."""
    growing = {"token_s": 5e-5, "growth_s": 5e-5 / 900, "chunk": 4096}
    with served(Fake(**growing)) as url:
        assert main(["probe", url, "--gate", "--lengths", "512,4096", "--model-source", "qwen3-0.6b"]) == 0
    with served(Fake(**growing)) as url:
        assert main(["probe", url, "--gate", "--lengths", "512,4096", "--model-source", "gemma-4-31b"]) == 1


def test_the_terminal_shows_table_curve_and_findings(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Fake(stuck_from=2000)) as url:
        _, out = run(capsys, url, "--lengths", "128,512,2048")

    assert "llama-server b9999, fake.gguf" in out
    assert out.count("█") > 8
    assert "2,048 tokens: stuck" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_report_is_one_file_without_script_or_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Fake()) as url, served(Fake(stuck_from=2000)) as other:
        run(capsys, url, "--lengths", "128,2048", "--compare", other, "--html", str(tmp_path / "r.html"))
        assert main(["probe", url, "--lengths", "128", "--html", str(tmp_path / "no" / "r.html")]) == 2
    text = (tmp_path / "r.html").read_text()

    assert text.startswith("<!doctype html>") and text.count("<svg") == 1
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|href=|url\(|@import", text)


def test_nothing_that_a_server_says_is_markup() -> None:
    """A model's name is a stranger's text in a file that people open."""
    evil = '<script>alert(1)</script>" onload="x'
    finding = Finding(id=evil, severity="note", what=evil, why=evil, cure=evil, evidence=(Evidence(evil, 1, evil),))
    with served(Fake(context=None)) as url:
        p = probe(identify(http_at(url), model=evil), (128,), Options(stall_s=0.3))
    pages = [
        probe_page(p),
        page(evil, evil, subtitle=evil, findings=[finding], layers=[Cell(evil, evil, 1)], memory=[Bar(evil, [(evil, 1)], 2)]),
    ]

    for text in pages:
        assert "<script>" not in text
        assert '" onload' not in text


def test_a_point_that_was_not_measured_is_on_the_curve_by_its_word() -> None:
    with served(Fake("ollama", stuck_from=500)) as url:
        p = probe(identify(http_at(url)), (128, 600), Options(stall_s=0.2))

    assert p.points[1].ttft_s is None
    assert re.search("<text[^>]*>stuck</text>", probe_page(p))
