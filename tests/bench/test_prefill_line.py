"""The line of prefill over prompt length: every row has its point, labels do not meet, and the table reads the same result."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from headwise.bench.prefill_line import APART, HEIGHT, LEFT, PAGE, TOP, WIDTH, lines, spread, svg

SVG = "{http://www.w3.org/2000/svg}"
DOCS = Path(__file__).parents[2] / "docs"


def result() -> dict[str, Any]:
    """Invented: transformers ends early, the two lines of headwise lie within a hair of each other."""
    rows: list[dict[str, Any]] = []
    for who, weights, rate, n in (
        ("headwise", "bf16", 20_000.0, 9), ("headwise", "q4_k_m", 19_950.0, 9), ("transformers", "bf16", 9_000.0, 3),
        ("llama.cpp", "q4_k_m", 5_000.0, 9),
    ):  # fmt: skip
        for i in range(n):
            seconds = (512 << i) / rate
            row = {"who": who, "weights": weights, "tokens": 512 << i, "prefill_s": seconds, "prefill_tok_s": rate}
            if who == "headwise":
                row |= {"reckoned_s": 0.8 * seconds} | ({"off": 1.04} if i else {})
            rows.append(row)
    return {
        "gpu": "a <card>", "date": "2026-01-01", "commit": "0", "torch": "2", "transformers": "5", "llama_cpp": "0.5.0",
        "model": "m", "chunk": 4096, "matrix_tflops": 800.0, "read_tb_s": 4.0, "rows": rows,
        "stopped": [{"who": "transformers", "weights": "bf16", "tokens": 4096, "why": "out of memory"}],
    }  # fmt: skip


def test_every_row_is_a_point_inside_the_plot_and_longer_prompts_stand_right() -> None:
    drawn = ElementTree.fromstring(svg(result()))
    at = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.iter(f"{SVG}circle")]

    assert len(at) == len(result()["rows"])
    assert all(LEFT < x < LEFT + WIDTH and TOP < y < TOP + HEIGHT for x, y in at)
    start = 0
    for line in lines(result()):
        xs = [x for x, _ in at[start : start + len(line.at)]]
        assert xs == sorted(set(xs))
        start += len(line.at)


def test_labels_of_equal_lines_stand_apart() -> None:
    """Two lines that end at one rate would have one label over the other."""
    drawn = ElementTree.fromstring(svg(result()))
    labels = [t for t in drawn.iter(f"{SVG}text") if float(t.attrib["x"]) > LEFT + WIDTH]

    assert [t.text for t in labels] == ["headwise bf16", "headwise q4_k_m", "llama.cpp q4_k_m", "transformers bf16, ends at 2K"]
    ys = sorted(float(t.attrib["y"]) for t in labels)
    assert all(b - a > APART - 0.2 for a, b in pairwise(ys))
    assert all(float(t.attrib["x"]) + 6.5 * len(t.text or "") < PAGE[0] for t in labels)


def test_the_engines_own_benchmark_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights than the line's, several models, one length: each has a label, and no two lines one style."""
    from headwise.bench import engine
    from headwise.cli import main

    rows = [{"model": m, "who": "headwise", "weights": w, "tokens": n, "prefill_tok_s": 900.0 + n, "decode_tok_s": 1.0}
            for m, w in (("a", "fp8"), ("a", "q4_k_m"), ("b", "fp8")) for n in (512, 4096)]  # fmt: skip
    monkeypatch.setattr(engine, "bench", lambda models, **rest: {"gpu": "card", "date": "2026-01-01", "rows": rows})
    assert main(["bench", "engine", "a", "b", "--svg", str(tmp_path / "e.svg")]) == 0
    drawn = ElementTree.fromstring((tmp_path / "e.svg").read_text())
    words = [t.text for t in drawn.iter(f"{SVG}text")]

    assert words[0] == "Prefill of a, b on one card, 2026-01-01"
    assert words[-3:] == ["a fp8", "a q4_k_m", "b fp8"]
    assert len({p.attrib["class"] for p in drawn.iter(f"{SVG}path") if p.attrib["class"].startswith("line")}) == 3
    assert [(line.style, line.words) for line in lines({"rows": rows[:4]})] == [(1, "headwise q4_k_m"), (0, "headwise fp8")]
    assert "nan" not in svg({"gpu": "card", "date": "2026-01-01", "model": "a", "rows": rows[:1]})


@pytest.mark.parametrize(("wanted", "stand"), [([10.0, 12.0, 60.0], [10.0, 25.0, 60.0]), ([12.0, 10.0], [25.0, 10.0])])
def test_labels_keep_their_order(wanted: list[float], stand: list[float]) -> None:
    assert spread(wanted, 15) == stand


def test_the_table_has_a_row_each_length_and_says_where_a_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefill_line_h200_2026-01-01.json").write_text(json.dumps(result()))
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import make_tables

    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    table = make_tables.prefill_line()

    assert "transformers ends before 4,096 tokens: out of memory." in table
    assert "| 512 | 20,000 | 19,950 | 9,000 | 5,000 | 80% |  | 80% |  |" in table
    assert "| 131,072 | 20,000 | 19,950 |  | 5,000 | 80% | 1.04 | 80% | 1.04 |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
