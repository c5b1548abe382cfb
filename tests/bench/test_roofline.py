"""The roofline is a function of a result: points where arithmetic puts them, numbers that cover nothing, valid XML."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from headwise.bench.attention import Shape
from headwise.bench.roofline import Box, R, axes_for, obstacles, place, points, svg, work
from headwise.cli import main

RESULT = json.loads(max((Path(__file__).parents[2] / "benchmarks/results").glob("attention_h200_*.json")).read_text())
SVG = "{http://www.w3.org/2000/svg}"
GLOBAL = Shape(name="g", head_dim=512, heads=32, kv_heads=4, one=True, length=1000, decode=True)


@pytest.mark.parametrize(
    ("shape", "operations", "n_bytes"),
    [
        (GLOBAL, 4 * 32 * 512 * 1000, 1000 * 4 * 640 * 2),
        (Shape(name="q", head_dim=512, heads=32, kv_heads=4, one=True, length=1000, decode=True, kv="q8_0"),
         4 * 32 * 512 * 1000, 1000 * 4 * 680),
        (Shape(name="s", head_dim=256, heads=32, kv_heads=16, window=100, length=1000, decode=True),
         4 * 32 * 256 * 100, 100 * 16 * 2 * 256 * 2),
        (Shape(name="p", head_dim=256, heads=32, kv_heads=16, window=100, length=1000),
         4 * 32 * 256 * (100 * 101 // 2 + 900 * 100), 1000 * 16 * 2 * 256 * 2 + 2 * 1000 * 32 * 256 * 2),
    ],
)  # fmt: skip
def test_work_is_counted_by_hand(shape: Shape, operations: int, n_bytes: int) -> None:
    """A window that limits the bytes of a prefill too would put it right of its true place."""
    assert work(shape) == (operations, n_bytes)


def test_the_distance_to_the_roof_is_the_fraction_of_the_table() -> None:
    """The two are computed apart: a point over the wrong byte count would stand at the wrong height."""
    _, found = points(RESULT)

    for p, row in zip(found, RESULT["rows"], strict=True):
        roof = min(RESULT["matrix_tflops"], p.intensity * RESULT["read_tb_s"])
        assert p.tflops / roof == pytest.approx(row["fraction"], rel=1e-6)


def crowded(n: int) -> dict[str, Any]:
    """`n` shapes within a hair of each other, in the middle of the roof's slope."""
    row = next(r for r in RESULT["rows"] if r["shape"]["decode"] and r["who"].startswith("headwise"))
    rows = [row | {"us": row["us"] * (1 + i / 1000), "shape": row["shape"] | {"length": 131072 + i}} for i in range(n)]
    return RESULT | {"rows": rows}


@pytest.mark.parametrize("result", [RESULT, crowded(12), crowded(1)], ids=["h200", "crowded", "one"])
def test_numbers_cover_no_marker_and_no_number(result: dict[str, Any]) -> None:
    shapes, found = points(result)
    axes = axes_for(found, result["matrix_tflops"], result["read_tb_s"])
    avoid = obstacles(axes, result["matrix_tflops"], result["read_tb_s"])
    boxes = [box for _, box in place(found, axes, avoid)]
    at = [(axes.x(p.intensity), axes.y(p.tflops)) for p in found]
    markers = [Box(x - R, y - R, x + R, y + R) for x, y in at]

    assert len(boxes) == len(shapes)
    assert not any(a.meets(b) for a, b in combinations(boxes, 2))
    assert not any(a.meets(b) for a in boxes for b in [*markers, *avoid])


def test_every_row_has_its_marker_and_every_shape_its_line() -> None:
    root = ElementTree.fromstring(svg(RESULT))
    ours = [r for r in RESULT["rows"] if r["who"].startswith("headwise")]
    rivals = {r["who"] for r in RESULT["rows"]} - {r["who"] for r in ours}
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]

    assert len(list(root.iter(f"{SVG}circle"))) == len(ours) + 1  # and the legend's
    assert sum(p.get("class") == "rival" for p in root.iter(f"{SVG}path")) == len(RESULT["rows"]) - len(ours) + len(rivals)
    for row in ours:
        assert any(t.endswith(f", {row['fraction']:.0%}") for t in texts)
    assert {"headwise", *rivals} <= set(texts)
    assert all(float(t.get("y", 0)) < float(root.get("height", 0)) for t in root.iter(f"{SVG}text"))  # rows were cut off once


def test_a_name_with_signs_of_markup_is_text() -> None:
    root = ElementTree.fromstring(svg(RESULT | {"gpu": "A <&> B"}))

    assert any("A <&> B" in (t.text or "") for t in root.iter(f"{SVG}text"))


def test_a_picture_without_a_place_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("headwise.bench.attention.bench", lambda **_: RESULT)

    assert main(["bench", "attention", "--svg", str(tmp_path / "r.svg")]) == 0
    assert (tmp_path / "r.svg").read_text() == svg(RESULT)
    monkeypatch.setattr("headwise.bench.attention.bench", lambda **_: pytest.fail("measured"))
    assert main(["bench", "attention", "--svg", str(tmp_path / "missing/r.svg")]) == 2
    assert "does not exist" in capsys.readouterr().err
