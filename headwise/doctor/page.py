"""One self-contained HTML report, fit to attach to an issue: no script, no request, light and dark.

Everything that a server or a log said is escaped; nothing in the page is taken from them unescaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from headwise import __version__
from headwise.doctor.finding import Finding
from headwise.doctor.probe import Probe, compared
from headwise.doctor.probe_view import cells
from headwise.planner.render import gib

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 64, 24, 16, 44
CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5c6675; --line: #d9dee6; --paper: #ffffff; --soft: #f4f6f9;
  --ok: #1a7f4b; --slow: #a86400; --bad: #c0322b; --one: #2563c9; --two: #a8429a; --three: #0f8a8a; --four: #a07400; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --dim: #9aa5b5; --line: #343c49; --paper: #14181f; --soft: #1c222b;
  --ok: #4cc38a; --slow: #e5a443; --bad: #f2736b; --one: #6ea8ff; --two: #de83d2; --three: #45c2c2; --four: #d9b44a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 820px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 22px; line-height: 1.3; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 8px; }
p { margin: 4px 0; } .dim { color: var(--dim); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 500; }
.tag { display: inline-block; padding: 0 9px; border: 1px solid; border-radius: 10px; font-size: 13px; font-weight: 600; }
.ok { color: var(--ok); } .slow, .warning { color: var(--slow); } .note { color: var(--dim); }
.stuck, .failed, .problem { color: var(--bad); }
section.finding { border: 1px solid var(--line); border-left: 4px solid; border-radius: 6px; padding: 10px 14px; margin: 10px 0; }
section.finding.problem { border-left-color: var(--bad); } section.finding.warning { border-left-color: var(--slow); }
section.finding > * { color: var(--ink); } section.finding > .tag { color: inherit; }
section.finding p, section.finding pre { overflow-wrap: anywhere; }
pre { background: var(--soft); border-radius: 4px; padding: 8px 10px; margin: 8px 0 0; white-space: pre-wrap; font-size: 13px; }
code { font-size: 13px; color: var(--dim); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.cells { display: flex; flex-wrap: wrap; gap: 3px; align-items: flex-end; }
.cells span { width: 16px; border-radius: 2px; background: currentColor; }
.bar { display: flex; height: 22px; border-radius: 4px; overflow: hidden; background: var(--line); margin: 6px 0; }
.bar i { background: currentColor; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; background: currentColor; }
"""
COLOURS = ("--one", "--two", "--three", "--four", "--slow", "--bad")


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer of the map: `tall` is its head size over the largest, `verdict` its colour."""

    title: str
    verdict: str  # fused, materialised, offloaded, unproven
    tall: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A device, or a plan beside a measurement: labelled bytes out of `total`."""

    name: str
    parts: Sequence[tuple[str, int]]
    total: int


def page(
    title: str,
    verdict: str,
    *,
    subtitle: str = "",
    probes: Sequence[Probe] = (),
    findings: Sequence[Finding] = (),
    layers: Sequence[Cell] = (),
    memory: Sequence[Bar] = (),
) -> str:
    """The report. Parts that are not given are not on the page."""
    parts = [
        f'<h1>{escape(title)} <span class="tag {_word(verdict)}">{escape(verdict)}</span></h1>',
        f'<p class="dim">{escape(subtitle)}</p>' if subtitle else "",
        _map(layers) if layers else "",
        "".join(["<h2>Memory</h2>", *map(_bar, memory)]) if memory else "",
        f"<h2>Prefill, tokens per second</h2>{curve(probes)}" if any(p.points for p in probes) else "",
        *[_table(p) for p in probes],
        _ratios(probes[0], probes[1]) if len(probes) == 2 else "",
        "".join(["<h2>Findings</h2>", *map(_finding, findings)]) if findings else "<h2>Findings</h2><p>None.</p>",
        f'<p class="dim">headwise {escape(__version__)}</p>',
    ]
    body = "\n".join(p for p in parts if p)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def probe_page(p: Probe, other: Probe | None = None) -> str:
    """The report of a probe, or of two compared."""
    probes = [p, other] if other else [p]
    where = " and ".join(f"{q.server.label} {q.server.url}".strip() for q in probes)
    findings = [f for q in probes for f in q.findings]
    return page(f"headwise probe: {p.server.model or p.server.label}", p.verdict, subtitle=where, probes=probes, findings=findings)


def curve(probes: Sequence[Probe]) -> str:
    """Tokens per second over the prompt's length, both axes logarithmic where the values differ enough."""
    lines = [[(q.length, q.prefill_tok_s, q.verdict) for q in p.points if q.prefill_tok_s] for p in probes]
    lengths = sorted({q.length for p in probes for q in p.points})
    speeds = [s for line in lines for _, s, _ in line]
    if not speeds:
        return '<p class="dim">No length was measured.</p>'
    ticks = _ticks(min(speeds), max(speeds))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    first, last = math.log(lengths[0]), math.log(lengths[-1])

    def x(n: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((math.log(n) - first) / (last - first) if last > first else 0.5)

    def y(s: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (math.log(s) - low) / (high - low))

    shown = []
    for tick in ticks:
        shown.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="var(--line)"/>')
        shown.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for n in lengths:
        shown.append(f'<text x="{x(n):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{n:,}</text>')
    shown.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">tokens of the prompt</text>')
    for i, (p, line) in enumerate(zip(probes, lines, strict=True)):
        colour = f"var({COLOURS[i % len(COLOURS)]})"
        path = " ".join(f"{x(n):.1f},{y(s):.1f}" for n, s, _ in line)
        shown.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for n, s, verdict in line:
            fill = colour if verdict == "ok" else "var(--slow)" if verdict == "slow" else "var(--bad)"
            what = escape(f"{p.server.label}: {s:,.0f} tok/s at {n:,} tokens, {verdict}")
            shown.append(f'<circle cx="{x(n):.1f}" cy="{y(s):.1f}" r="4.5" fill="{fill}"><title>{what}</title></circle>')
    unmeasured = {q.length: q.verdict for p in probes for q in p.points if not q.prefill_tok_s}
    for n, verdict in unmeasured.items():
        at = f'x="{x(n):.1f}" y="{HEIGHT - BOTTOM - 8}"'
        shown.append(f'<text {at} text-anchor="middle" style="fill: var(--bad)">{escape(verdict)}</text>')
    keys = ""
    if len(probes) > 1:
        keys = "<p>" + " &nbsp; ".join(_key(i, f"{p.server.label} {p.server.url}") for i, p in enumerate(probes)) + "</p>"
    label = escape(", ".join(f"{s:,.0f} tok/s at {n:,}" for line in lines for n, s, _ in line))
    return f'{keys}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(shown)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; the first below, the last above."""
    steps = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for m in (1, 2, 5)]
    below = max(s for s in steps if s <= low)
    above = min(s for s in steps if s >= high and s > below)
    found = [s for s in steps if below <= s <= above]
    return found if len(found) <= 7 else [s for s in found if s in (below, above) or f"{s:e}".startswith("1.0")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _word(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and (c.isalnum() or c == "-"))


def _table(p: Probe) -> str:
    names = ("length", "counted", "cached", "first token", "prefill tok/s", "decode tok/s", "verdict", "recalled")
    head = "".join(f"<th>{n}</th>" for n in names)
    rows = []
    for q in p.points:
        shown = [escape(c) for c in cells(q)]
        shown[6] = f'<span class="{_word(q.verdict)}">{shown[6]}</span>'
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in shown) + "</tr>")
    name = escape(f"{p.server.label}, {p.server.model}".rstrip(", "))
    verdict = f'<span class="tag {_word(p.verdict)}">{escape(p.verdict)}</span>'
    return f'<h2>{name} {verdict}</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _ratios(a: Probe, b: Probe) -> str:
    rows = []
    for row in compared(a, b):
        shown = ["-" if (v := row[k]) is None else f"{v:.2f}" for k in ("ttft", "prefill", "decode")]
        rows.append(f"<tr><td>{row['length']:,}</td>" + "".join(f"<td>{c}</td>" for c in shown) + "</tr>")
    head = "".join(f"<th>{n}</th>" for n in ("length", "first token", "prefill", "decode"))
    return f'<h2>First over second (above 1: faster)</h2><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _finding(f: Finding) -> str:
    evidence = "\n".join(f"{e.source if e.line is None else f'{e.source}:{e.line}'}: {e.text}" for e in f.evidence)
    return (
        f'<section class="finding {_word(f.severity)}"><span class="tag">{escape(f.severity)}</span> <b>{escape(f.what)}</b> '
        f"<code>{escape(f.id)}</code><p>{escape(f.why)}</p>"
        + (f"<p><b>Do:</b> {escape(f.cure)}</p>" if f.cure else "")
        + (f"<pre>{escape(evidence)}</pre>" if evidence else "")
        + "</section>"
    )


VERDICT_COLOURS = {"fused": "--ok", "materialised": "--slow", "offloaded": "--bad", "unproven": "--dim"}


def _map(layers: Sequence[Cell]) -> str:
    cells = "".join(
        f'<span title="{escape(c.title)}" style="height: {8 + 28 * min(1.0, max(0.0, c.tall)):.0f}px; '
        f'color: var({VERDICT_COLOURS.get(c.verdict, "--dim")})"></span>'
        for c in layers
    )
    seen = [v for v in VERDICT_COLOURS if any(c.verdict == v for c in layers)]
    keys = " &nbsp; ".join(f'<span class="key" style="color: var({VERDICT_COLOURS[v]})"></span> {v}' for v in seen)
    return f'<h2>Layers</h2><div class="cells">{cells}</div><p class="dim">{keys}; height: head size</p>'


def _bar(bar: Bar) -> str:
    total = max(bar.total, sum(n for _, n in bar.parts), 1)
    parts = "".join(
        f'<i style="width: {100 * n / total:.2f}%; color: var({COLOURS[i % len(COLOURS)]})" title="{escape(name)}"></i>'
        for i, (name, n) in enumerate(bar.parts)
    )
    keys = " &nbsp; ".join(_key(i, f"{name} {gib(n)}") for i, (name, n) in enumerate(bar.parts))
    used = gib(sum(n for _, n in bar.parts))
    head = f'<p><b>{escape(bar.name)}</b> <span class="dim">{used} of {gib(bar.total)}</span></p>'
    return f'{head}<div class="bar">{parts}</div><p>{keys}</p>'


def _key(i: int, text: str) -> str:
    return f'<span class="key" style="color: var({COLOURS[i % len(COLOURS)]})"></span> {escape(text)}'
