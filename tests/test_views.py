"""What people look at: the views say what the numbers say, at the width of a terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from checkpoints import load
from rich.console import Console

from headwise import api
from headwise.attention.choose import group_layers
from headwise.attention.render import colours, engine_view, explain_view
from headwise.cli import main
from headwise.engine.render import checks_view, report_view
from headwise.planner.ceiling import ceiling
from headwise.planner.memory import Target, Workload
from headwise.planner.memory import plan as plan_memory
from headwise.planner.quantise import weight_types
from headwise.planner.render import bar, gib, plan_view
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS, laid_out
from headwise.spec.read import open_model


def shown(view: object) -> str:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**20, "5.0 MiB"), (2**30, "1.0 GiB"), (150 * 2**30, "150 GiB")],
)
def test_bytes_are_said_with_three_digits(n: int, text: str) -> None:
    assert gib(n) == text


def test_a_bar_is_as_wide_as_asked_and_shows_small_parts() -> None:
    text = bar([("weights", 10**9), ("compute", 1)], 2 * 10**9, width=40)

    assert len(text.plain) == 40
    assert text.plain.count("█") == 21  # half, and one cell for the part that is there


def test_a_plan_shows_its_lines_and_its_verdict() -> None:
    p = api.plan("gemma-4-31b", context=65_536, weights="q4_k_m", gpus=["rtx4090"])
    text = shown(plan_view(p, [ceiling(p, s.target.gpu) for s in p.shares if s.target.gpu]))

    assert f"{p.total_bytes:,} B" in text
    assert "fits; the largest context" in text
    assert "tok/s decode" in text


def test_a_plan_over_two_cards_shows_what_each_holds() -> None:
    fmt = KV_FORMATS["bf16"]
    spec = catalogue.spec("gemma-4-31b")
    w = Workload(context=32_768, slots=2, kv={"global": fmt, "sliding": KV_FORMATS["q8_0"]}, dtype="bf16")
    targets = [Target(name="small", gpu=None, total_bytes=2**33), Target(name="large", gpu=None, total_bytes=2**34)]
    text = shown(plan_view(plan_memory(spec, weight_types(spec, "q4_k_m"), w, targets)))

    assert "small" in text
    assert "large" in text
    assert "x 2 slots" in text
    assert "bf16 global, q8_0 sliding" in text
    assert text.count("█ weights") == text.count("█ compute") == 2


def test_an_explanation_has_a_cell_per_layer_and_every_refusal() -> None:
    source = open_model("gemma-4-e2b", env={})
    device, kv, choices = api.explain(source, gpu="rtx4090", kv=None)
    text = shown(explain_view(source.spec, choices, group_layers(source.spec, choices, kv), device.label))

    assert "35/35 layers fused" in text
    assert sum(text.split("shares a cache")[0].count(c) for c in "▄█•") - 3 == 35  # three more in the key below
    assert "not flash-attn-2: head_dim 512 not in 8..256" in text


def test_v_alone_is_said_where_it_is_planned_and_explained() -> None:
    """Figures that another layout measured are not shown for it."""
    source = open_model("gemma-4-31b", env={})
    source = replace(source, spec=laid_out(source.spec, "v"))
    device, kv, choices = api.explain(source, gpu="h200", kv=None)
    text = shown(explain_view(source.spec, choices, group_layers(source.spec, choices, kv), device.label))
    alone, stored = (api.plan("gemma-4-31b", gpus=["h200"], context=4096, kv_layout=x) for x in ("v", "v+rotated"))

    assert "V alone for K and V, KV bf16\n  headwise-hopper\n" in text
    assert "measured" not in text
    assert alone.kv_global_bytes * 640 == stored.kv_global_bytes * 512
    assert "KV bf16, V alone where K = V" in shown(plan_view(alone))


def test_red_is_kept_for_layers_that_are_not_fused() -> None:
    assert colours(["a", "b", "a", "c"], [True, False, True, True]) == {"a": "green", "b": "red", "c": "cyan"}


def test_another_engine_is_explained_with_its_source() -> None:
    source = open_model("gemma-4-31b", env={})
    card, answer = api.explain_rival("ollama@0.20.2", source, gpu="rtx4090", kv=None)
    text = shown(engine_view(source.spec, "ollama@0.20.2", card.label, answer))

    assert "60 layers" in text or "/60" in text
    assert "source:" in text


def test_a_report_says_fused_planned_and_speed() -> None:
    llm = load("gemma4-31b")
    llm.check()
    llm.generate([5, 6, 7, 8], max_tokens=3)
    llm.skipped = {"vision": 355, "audio": 2}
    text = shown(report_view(llm, 1.5))

    assert "6/6 layers fused" in text
    assert "planned = allocated" in text
    assert "ready in 1.5 s" in text
    assert "self-checks" in text
    assert "not read: 355 x vision; 2 x audio" in text
    assert shown(checks_view(llm.checks)).count(" ok") == len(llm.checks)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["plan", "gemma-4-31b", "--gpu", "rtx4090", "--weights", "q4_k_m"], 0, "fits"),
        (["plan", "gemma-4-31b", "--gpu", "h200", "--weights", "q4_k_m", "--engine", "ollama@0.20.2"], 0, "own estimate"),
        (["plan", "--gpu", "rtx3060:12"], 0, "gemma-4-12b"),
        (["plan", "--gpu", "rtx3060:12", "--json"], 0, '"fits"'),
        (["plan", "tiny-hybrid", "--device", "cpu"], 0, "cpu"),
        (["explain", "tiny-hybrid", "--gpu", "cpu"], 0, "torch-flash-cpu"),
        (["explain", "gemma-4-31b", "--engine", "vllm", "--gpu", "rtx3090", "--json"], 0, "TRITON_ATTN"),
        (["verify", "tiny-hybrid", "--device", "cpu", "--context", "600"], 0, "torch-flash-cpu"),
        (["verify", "tiny-hybrid", "--device", "cpu", "--context", "600", "--json"], 0, '"checks"'),
        (["run", "-p", "import os", "--max-tokens", "2", "--device", "cpu", "--no-check"], 0, ""),
        (["run", "--chat", "-p", "hello", "--max-tokens", "2", "--device", "cpu", "--no-check"], 0, ""),
    ],
)
def test_every_verb_prints_for_people(argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    assert words in capsys.readouterr().out


def test_the_prompt_comes_from_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def add(a, b):")))

    assert main(["run", "-", "--max-tokens", "1", "--device", "cpu", "--no-check", "--json"]) == 0
    assert '"prefill_tokens": 7' in capsys.readouterr().out


def test_a_plan_says_what_serve_takes_and_what_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    """`run` has one sequence; who reads its plan and starts a server met other numbers there."""
    asked = ["plan", "gemma-4-31b", "--gpu", "rtx5090", "--weights", "q4_k_m", "--context", "32768"]
    main(asked)
    text = " ".join(capsys.readouterr().out.split())
    main([*asked, "--json"])
    by_default = json.loads(capsys.readouterr().out)["serve"]
    main([*asked, "--slots", "4", "--json"])
    said = json.loads(capsys.readouterr().out)

    assert "`headwise serve` with 4 slots" in text
    assert "4 slots by default: agents make parallel calls" in text
    assert by_default["total_bytes"] == said["total_bytes"]
    assert by_default["kept_bytes"] == said["kept_bytes"] == 5 * 50 * (1024 + 512 + 8) * 16 * (256 + 256) * 2
    assert said["serve"] is None
