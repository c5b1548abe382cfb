"""The roofline of a `bench attention` result: arithmetic intensity against rate, both logarithmic, under the measured ceilings.

Work      useful operations: 4 * heads * head_dim for each query and each key it sees.
Bytes     what the cache holds of those keys, once; in a prefill the queries and the results too.
Pure      `svg` makes the same text of the same result; it needs no card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import product
from math import atan, ceil, degrees, floor, log10
from typing import Any, NamedTuple

from headwise.bench.attention import Shape, cache_bytes, pairs

LEFT, TOP, WIDTH, HEIGHT = 62, 44, 560, 430  # of the plot, in pixels
LEGEND, ROW = 636, 18
PAGE = (1070, 524)
R = 4.5  # of a marker
FONT = 11
BF16_BYTES = 2
STYLE = """text{font:11px system-ui,sans-serif;fill:#1f2328}.t{font-size:14px;font-weight:600}.b{font-weight:600}
.page{fill:#fff}.grid{stroke:#d8dee4;stroke-width:1}.axis{stroke:#59636e;stroke-width:1;fill:none}
.roof{stroke:#1f2328;stroke-width:2;fill:none}.lead{stroke:#59636e;stroke-width:.7}
.ours{fill:#0969da}.rival{fill:none;stroke:#bc4c00;stroke-width:1.5}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.grid{stroke:#30363d}.axis,.lead{stroke:#9198a1}
.roof{stroke:#e6edf3}.ours{fill:#4493f8}.rival{stroke:#f0883e}}"""


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def within(self, other: Box) -> bool:
        return other.left < self.left and self.right < other.right and other.top < self.top and self.bottom < other.bottom


class Point(NamedTuple):
    """One row: operations a byte, TFLOP/s, and the number of its shape."""

    shape: int
    who: str
    ours: bool
    intensity: float
    tflops: float


class Axes(NamedTuple):
    """What the plot spans, in powers of ten."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, intensity: float) -> float:
        return LEFT + WIDTH * (log10(intensity) - self.x0) / (self.x1 - self.x0)

    def y(self, tflops: float) -> float:
        return TOP + HEIGHT * (self.y1 - log10(tflops)) / (self.y1 - self.y0)


def work(shape: Shape) -> tuple[int, int]:
    """Useful operations and bytes of one launch."""
    if shape.decode:
        keys = min(shape.length, shape.window or shape.length)
        return 4 * shape.heads * shape.head_dim * keys, cache_bytes(shape)
    rows = shape.length * shape.heads * shape.head_dim
    n_bytes = cache_bytes(replace(shape, window=None)) + 2 * rows * BF16_BYTES
    return 4 * shape.heads * shape.head_dim * pairs(shape.length, shape.window), n_bytes


def points(result: Mapping[str, Any]) -> tuple[list[Shape], list[Point]]:
    """The shapes in order of first appearance, and a point for each row."""
    shapes: list[Shape] = []
    out = []
    for row in result["rows"]:
        shape = Shape(**row["shape"])
        if shape not in shapes:
            shapes.append(shape)
        ours = row["who"].startswith("headwise")
        operations, n_bytes = work(shape if ours or not shape.decode else replace(shape, one=False))  # others have two tensors
        out.append(Point(shapes.index(shape) + 1, row["who"], ours, operations / n_bytes, operations / row["us"] / 1e6))
    return shapes, out


def axes_for(found: Sequence[Point], matrix_tflops: float, read_tb_s: float) -> Axes:
    """Around all points and the ridge, with room of a sixth of a decade and more."""
    xs = [log10(matrix_tflops / read_tb_s), *(log10(p.intensity) for p in found)]
    ys = [log10(matrix_tflops), *(log10(p.tflops) for p in found)]
    return Axes(min(xs) - 0.2, max(xs) + 0.2, min(ys) - 0.2, max(ys) + 0.17)


def obstacles(axes: Axes, matrix_tflops: float, read_tb_s: float) -> list[Box]:
    """The roof's slope, in small boxes, and the words on its flat part: numbers keep off them."""
    y = axes.y(matrix_tflops)
    out = [Box(LEFT + WIDTH - 210, y - 20, LEFT + WIDTH, y + 2)]
    step = 0.02
    power = axes.x0
    while power < log10(matrix_tflops / read_tb_s):
        x, y = axes.x(10**power), axes.y(10**power * read_tb_s)
        out.append(Box(x - 2, y - 2, x + 2, y + 2))
        power += step
    return out


def place(found: Sequence[Point], axes: Axes, avoid: Sequence[Box] = ()) -> list[tuple[Point, Box]]:
    """Where the number of each of our points stands: the nearest place that meets no marker and no other number."""
    at = [(p, axes.x(p.intensity), axes.y(p.tflops)) for p in found]
    taken = [*avoid, *(Box(x - R, y - R, x + R, y + R) for _, x, y in at)]
    plot = Box(LEFT, TOP, LEFT + WIDTH, TOP + HEIGHT)
    steps = sorted(product(range(-60, 61, 4), repeat=2), key=lambda o: (o[0] ** 2 + o[1] ** 2, -o[0], o[1]))
    out = []
    for p, x, y in (a for a in at if a[0].ours):
        width = 6.5 * len(str(p.shape)) + 6
        boxes = [Box(x + dx - width / 2, y + dy - FONT / 2, x + dx + width / 2, y + dy + FONT / 2) for dx, dy in steps]
        free = (box for box in boxes if box.within(plot) and not any(box.meets(other) for other in taken))
        taken.append(next(free, boxes[0]))
        out.append((p, taken[-1]))
    return out


def svg(result: Mapping[str, Any]) -> str:
    """The picture of a result, as `bench attention --json` prints it; light and dark by the reader's preference."""
    shapes, found = points(result)
    matrix, read = result["matrix_tflops"], result["read_tb_s"]
    axes = axes_for(found, matrix, read)
    title, heading = f"Roofline of attention on {result['gpu']}", f"Attention on one {result['gpu']}, {result['date']}"
    rivals = list(dict.fromkeys(p.who for p in found if not p.ours))
    legend, bottom = _legend(shapes, found, rivals, result["rows"])
    lines = [
        *opening((PAGE[0], max(PAGE[1], ceil(bottom))), STYLE, title),
        text(LEFT, 24, heading, "t"),
        *_grid(axes),
        *_roof(axes, matrix, read),
    ]
    for p, box in place(found, axes, obstacles(axes, matrix, read)):
        x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        px, py = axes.x(p.intensity), axes.y(p.tflops)
        if abs(x - px) + abs(y - py) > 20:
            lines.append(f'<path class="lead" d="M{px:.1f} {py:.1f}L{x:.1f} {y:.1f}"/>')
        lines.append(text(x, box.bottom - 2, str(p.shape), "b", "middle"))
    lines += [_marker(p.who, rivals, axes.x(p.intensity), axes.y(p.tflops)) for p in sorted(found, key=lambda p: not p.ours)]
    lines += legend
    return "\n".join([*lines, "</svg>", ""])


def opening(page: tuple[int, int], style: str, title: str) -> list[str]:
    """A picture's first lines: its size, what a reader of its source is told, its styles, its ground."""
    width, height = page
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start", more: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _grid(axes: Axes) -> list[str]:
    out = []
    for power in range(ceil(axes.x0), floor(axes.x1) + 1):
        x = axes.x(10**power)
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{TOP + HEIGHT}"/>')
        out.append(text(x, TOP + HEIGHT + 17, f"{10**power:,}", anchor="middle"))
    for power in range(ceil(axes.y0), floor(axes.y1) + 1):
        y = axes.y(10**power)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + WIDTH}"/>')
        out.append(text(LEFT - 8, y + 4, f"{10**power:,}", anchor="end"))
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}"/>')
    out.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, "useful operations a byte (FLOP/B)", anchor="middle"))
    x, y = 16, TOP + HEIGHT / 2
    out.append(text(x, y, "TFLOP/s", anchor="middle", more=f' transform="rotate(-90 {x} {y:.0f})"'))
    return out


def _roof(axes: Axes, matrix: float, read: float) -> list[str]:
    ridge = matrix / read
    low = max(10**axes.x0, 10**axes.y0 / read)
    x0, y0, x1, y1 = axes.x(low), axes.y(low * read), axes.x(ridge), axes.y(matrix)
    x, y = x0 + 0.7 * (x1 - x0), y0 + 0.7 * (y1 - y0)
    turn = f' transform="rotate({degrees(atan((y1 - y0) / (x1 - x0))):.1f} {x:.1f} {y:.1f})"'
    return [
        f'<path class="roof" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}H{LEFT + WIDTH}"/>',
        text(LEFT + WIDTH - 4, y1 - 7, f"bf16 products {matrix:.0f} TFLOP/s", anchor="end"),
        text(x, y - 7, f"reads {read:.2f} TB/s", anchor="middle", more=turn),
    ]


def _marker(who: str, rivals: Sequence[str], x: float, y: float) -> str:
    """Ours a disc; rivals hollow, each its own form."""
    if who not in rivals:
        return f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="{R}"/>'
    forms = (
        "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z", "M0 -5.5L5.5 0L0 5.5L-5.5 0Z", "M-5 -4H5L0 5Z", "M0 -5V5M-5 0H5", "M-4 -4L4 4M-4 4L4 -4",
        "M-5 3A5 5 0 0 1 5 3Z", "M-2 -5H2V5H-2Z", "M-5 -2H5V2H-5Z",
        "M-5 -4L5 4V-4L-5 4Z", "M-4 -5H4L-4 5H4Z", "M-5 -3A5 5 0 0 0 5 -3Z",
    )  # fmt: skip
    form = forms[rivals.index(who) % len(forms)]
    return f'<path class="rival" transform="translate({x:.1f} {y:.1f})" d="{form}"/>'


def _legend(
    shapes: Sequence[Shape], found: Sequence[Point], rivals: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], float]:
    """Its lines, and how far down they go."""
    out, y = [], TOP + 6
    ours = {p.shape: row for p, row in zip(found, rows, strict=True) if p.ours}
    for phase in ("prefill", "decode"):
        chosen = [(i, s) for i, s in enumerate(shapes, 1) if s.decode == (phase == "decode") and i in ours]
        if not chosen:
            continue
        out.append(text(LEGEND, y, f"{phase}, ours", "b"))
        for number, shape in chosen:
            y += ROW
            row = ours[number]
            rate = f"{row['tb_s']:.2f} TB/s" if shape.decode else f"{row['tflops']:.0f} TFLOP/s"
            out.append(text(LEGEND + 16, y, str(number), "b", "end"))
            out.append(text(LEGEND + 24, y, words(shape)))
            out.append(text(PAGE[0] - 12, y, f"{rate}, {row['fraction']:.0%}", anchor="end"))
        y += ROW + 10
    for who in ("headwise", *rivals):
        out.append(_marker(who, rivals, LEGEND + 12, y - 4))
        out.append(text(LEGEND + 24, y, who))
        y += ROW
    return out, y


def words(shape: Shape) -> str:
    size = f"{shape.length // 1024}K" if shape.length % 1024 == 0 else f"{shape.length:,}"
    parts = [shape.name if shape.name.endswith(f" {shape.head_dim}") else f"{shape.name} {shape.head_dim}"]
    parts += [f"window {shape.window}"] if shape.window else []
    return ", ".join([*parts, size, *([shape.kv] if shape.kv != "bf16" else [])])
