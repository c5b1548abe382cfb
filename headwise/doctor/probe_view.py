"""A probe on a terminal: the line that moves while it runs, the table and curve after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from headwise.doctor.probe import Point, Probe, compared
from headwise.doctor.probe import Progress as Report
from headwise.doctor.report import finding_view

STYLES = {"ok": "green", "slow": "yellow", "stuck": "red", "failed": "red"}
BAR = 32


@contextmanager
def live(console: Console, *, enabled: bool) -> Iterator[Report]:
    """One line: the prompt in work, its tokens done, the speed so far. Nothing where that is no terminal."""
    with Progress(
        TextColumn("{task.description:>14}"), BarColumn(BAR), TextColumn("{task.completed:>9,.0f} / {task.total:,.0f} tokens"),
        TextColumn("{task.fields[speed]}"), TextColumn("{task.elapsed:,.0f} s", style="dim"),
        console=console, transient=True, disable=not (enabled and console.is_terminal),
    ) as bars:  # fmt: skip
        task = bars.add_task("", total=None, speed="")

        def show(label: str, done: int, total: int, seconds: float) -> None:
            if not done:
                bars.reset(task)
            speed = f"{done / seconds:,.0f} tok/s" if done and seconds > 0 else ""
            bars.update(task, description=label, completed=done, total=total, speed=speed)

        yield show


def probe_view(p: Probe, other: Probe | None = None) -> RenderableType:
    shown = [_server_view(p)]
    if other:
        shown += [Text(), _server_view(other), Text(), _compare_view(p, other)]
    return Group(*shown)


def _server_view(p: Probe) -> RenderableType:
    head = Text(f"{p.server.label}, {p.server.model or 'its model'}", style="bold")
    if p.server.context:
        head.append(f", context {p.server.context:,}", style="not bold dim")
    head.append("  ").append(p.verdict, style=STYLES[p.verdict])
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("length", "counted", "cached", "first token", "prefill", "decode tok/s"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("recalled")
    for q in p.points:
        table.add_row(*cells(q)[:6], Text(q.verdict, style=STYLES[q.verdict]), cells(q)[7])
    most = max((q.prefill_tok_s or 0.0 for q in p.points), default=0.0)
    curve = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("right", "left"):
        curve.add_column(justify=justify, style="dim")
    for q in p.points:
        curve.add_row(f"{q.length:,}", _bar(q, most).append(f" {cells(q)[4]}", style="dim"))
    return Group(head, table, Text("\nprefill tok/s", style="dim"), curve, *[line for f in p.findings for line in finding_view(f)])


def cells(q: Point) -> list[str]:
    """A point as words, one for each column: "-" where nothing was measured."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return [
        f"{q.length:,}", number(q.prompt_tokens), number(q.cached_tokens), number(q.ttft_s) + (" s" if q.ttft_s else ""),
        number(q.prefill_tok_s), number(q.decode_tok_s), q.verdict, {True: "yes", False: "no", None: "-"}[q.recalled],
    ]  # fmt: skip


def _bar(q: Point, most: float) -> Text:
    n = max(1, round(BAR * q.prefill_tok_s / most)) if q.prefill_tok_s and most else 0
    return Text("█" * n, style=STYLES[q.verdict])


def _compare_view(a: Probe, b: Probe) -> RenderableType:
    table = Table(
        box=None, pad_edge=False, header_style="dim", title_justify="left", title="first server over second (above 1: faster)"
    )
    for name in ("length", "first token", "prefill", "decode"):
        table.add_column(name, justify="right")
    table.add_column("prefill, both")
    most = max((q.prefill_tok_s or 0.0 for p in (a, b) for q in p.points), default=0.0)
    ours, theirs = ({q.length: q for q in p.points} for p in (a, b))
    for row in compared(a, b):
        n = int(row["length"] or 0)
        ratios = ["-" if (v := row[k]) is None else f"{v:.2f}" for k in ("ttft", "prefill", "decode")]
        table.add_row(f"{n:,}", *ratios, Text("\n").join([_bar(ours[n], most), _bar(theirs[n], most)]))
    return table
