"""Prefill tok/s over prompt length, both logarithmic, a line each engine and model: of a result of `headwise bench engine`, or of
benchmarks/prefill_line.py, which has other engines too.

Pure: `svg` makes the same text of the same result; it needs no card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil, floor, log2, log10
from typing import Any, NamedTuple

from headwise.bench.roofline import opening, text

LEFT, TOP, WIDTH, HEIGHT = 70, 44, 560, 340  # of the plot, in pixels
PAGE = (830, 434)
APART = 15  # between two labels
R = 3.5  # of a marker
STYLE = """text{font:11px system-ui,sans-serif;fill:#1f2328}.t{font-size:14px;font-weight:600}.b{font-weight:600}
.page{fill:#fff}.grid{stroke:#d8dee4;stroke-width:1}.axis{stroke:#59636e;stroke-width:1;fill:none}
.line{stroke-width:2;fill:none}.c0{stroke:#0969da}.c1{stroke:#0969da;stroke-dasharray:6 4}.c2{stroke:#bc4c00}.c3{stroke:#59636e}
.p0{fill:#0969da}.p1{fill:#fff;stroke:#0969da;stroke-width:1.5}.p2{fill:#bc4c00}.p3{fill:#59636e}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.grid{stroke:#30363d}.axis{stroke:#9198a1}
.c0,.c1{stroke:#4493f8}.c2{stroke:#f0883e}.c3{stroke:#9198a1}.p0{fill:#4493f8}.p1{fill:#0d1117;stroke:#4493f8}.p2{fill:#f0883e}
.p3{fill:#9198a1}}"""
LINES = (
    ("headwise", "bf16"),
    ("headwise", "q4_k_m"),
    ("llama.cpp", "q4_k_m"),
    ("transformers", "bf16"),
)  # as the styles number them


class Line(NamedTuple):
    """`at` has (tokens, tok/s) in order."""

    style: int
    words: str
    at: list[tuple[int, float]]
    ours: bool


def lines(result: Mapping[str, Any]) -> list[Line]:
    """Of each engine and weights, and of each model where there are several; those of LINES first, in that order."""
    models = {r.get("model") for r in result["rows"]}  # a run of several has one engine
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for r in result["rows"]:
        words = f"{r['model'] if len(models) > 1 else r['who']} {r['weights']}"
        found.setdefault((words, r["who"], r["weights"]), []).append((r["tokens"], r["prefill_tok_s"]))
    known = {line: i for i, line in enumerate(LINES)} if len(models) == 1 else {}
    order = sorted(found, key=lambda key: known.get(key[1:], len(LINES)))
    taken = {known.get(key[1:]) for key in order}
    free = cycle([i for i in range(len(LINES)) if i not in taken] or range(len(LINES)))
    styles = [known[key[1:]] if key[1:] in known else next(free) for key in order]
    return [Line(style, key[0], sorted(found[key]), key[1] == "headwise") for style, key in zip(styles, order, strict=True)]


def spread(wanted: Sequence[float], apart: float) -> list[float]:
    """Where labels stand that want to stand at `wanted`: in the same order, `apart` or more, pushed down no further."""
    out = dict.fromkeys(range(len(wanted)), 0.0)
    last = float("-inf")
    for i in sorted(out, key=lambda i: wanted[i]):
        last = out[i] = max(wanted[i], last + apart)
    return list(out.values())


def svg(result: Mapping[str, Any]) -> str:
    """The picture of a result; light and dark by the reader's preference."""
    found = lines(result)
    tokens = sorted({n for line in found for n, _ in line.at})
    rates = [rate for line in found for _, rate in line.at]
    low, high = log10(min(rates)) - 0.1, log10(max(rates)) + 0.1

    def x(n: int) -> float:
        return LEFT + WIDTH * (log2(n / tokens[0]) + 0.3) / (log2(tokens[-1] / tokens[0]) + 0.6)

    def y(rate: float) -> float:
        return TOP + HEIGHT * (high - log10(rate)) / (high - low)

    out = [
        *opening(PAGE, STYLE, f"Prefill of {result['model']} over prompt length on {result['gpu']}"),
        text(LEFT, 24, f"Prefill of {result['model']} on one {result['gpu']}, {result['date']}", "t"),
    ]
    for power in range(floor(low), ceil(high) + 1):
        for rate in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            if low <= log10(rate) <= high:
                out.append(f'<path class="grid" d="M{LEFT} {y(rate):.1f}H{LEFT + WIDTH}"/>')
                out.append(text(LEFT - 8, y(rate) + 4, f"{rate:,.0f}", anchor="end"))
    for n in tokens:
        out.append(f'<path class="grid" d="M{x(n):.1f} {TOP}V{TOP + HEIGHT}"/>')
        out.append(text(x(n), TOP + HEIGHT + 17, f"{n // 1024}K" if n % 1024 == 0 else str(n), anchor="middle"))
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}"/>')
    out.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "tokens of the prompt", anchor="middle"))
    middle = TOP + HEIGHT / 2
    out.append(text(14, middle, "prefill, tok/s", anchor="middle", more=f' transform="rotate(-90 14 {middle:.0f})"'))
    stand = spread([y(line.at[-1][1]) for line in found], APART)
    for (i, words, at, ours), label in zip(found, stand, strict=True):
        out.append(f'<path class="line c{i}" d="M{"L".join(f"{x(n):.1f} {y(rate):.1f}" for n, rate in at)}"/>')
        out += [f'<circle class="p{i}" cx="{x(n):.1f}" cy="{y(rate):.1f}" r="{R}"/>' for n, rate in at]
        ends = at[-1][0] < tokens[-1]
        words += f", ends at {at[-1][0] // 1024}K" if ends else ""
        left = LEFT + WIDTH + 6
        if abs(label - y(at[-1][1])) > 4 or ends:  # from the last point to its label
            out.append(f'<path class="grid" d="M{x(at[-1][0]) + R + 1:.1f} {y(at[-1][1]):.1f}L{left - 2} {label:.1f}"/>')
        out.append(text(left, label + 4, words, "b" if ours else ""))
    return "\n".join([*out, "</svg>", ""])
