"""A diagnosis in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from headwise.doctor.diagnose import Diagnosis
from headwise.doctor.finding import Finding

COLOUR = {
    "fused": "green",
    "materialised": "red",
    "offloaded": "red",
    "unproven": "yellow",
    "honoured": "green",
    "ignored": "red",
    "refused": "red",
    "problem": "red",
    "warning": "yellow",
    "note": "cyan",
}
SAYS = {
    "fused": "proven fused on GPU",
    "materialised": "proven not fused: scores are stored",
    "offloaded": "proven not on the GPU: the CPU does it",
    "unproven": "unproven",
}


def view(d: Diagnosis) -> RenderableType:
    return Group(*_parts(d))


def _parts(d: Diagnosis) -> Iterator[RenderableType]:
    head = " ".join(x for x in (d.engine or "no engine found", d.version or "", f"· {d.model}" if d.model else "") if x)
    yield Text(head, style="bold")
    table = Table.grid(padding=(0, 2))
    for v in d.layers:
        name = "layers" if v.kind == "all" else f"{v.kind} layers"
        table.add_row(
            Text(f"{v.count or ''}", justify="right"),
            name,
            Text(SAYS[v.verdict], style=COLOUR[v.verdict]),
            Text(v.proof or "", style="dim"),
        )
    kv = d.kv
    table.add_row("", "KV cache", Text(kv_text(d), style=COLOUR[kv.verdict]), "")
    yield table
    for f in d.findings:
        yield from finding_view(f)
    if not d.findings:
        yield Text("nothing to report", style="green")


def kv_text(d: Diagnosis) -> str:
    kv = d.kv
    words = [kv.verdict]
    if kv.requested and kv.requested != kv.in_use:
        words.append(f"asked for {kv.requested}")
    if kv.in_use:
        words.append(f"in use {kv.in_use}")
    for name, n in (("global", kv.global_bytes), ("sliding", kv.sliding_bytes)):
        if n:
            words.append(f"{name} {n / 2**30:.2f} GiB")
    return ", ".join(words)


def finding_view(f: Finding) -> Iterator[RenderableType]:
    sure = "" if f.sure == "proven" else f" ({f.sure})"
    yield Text.from_markup(f"\n[{COLOUR[f.severity]} bold]{f.severity}[/] [bold]{escape(f.what)}[/]{sure} [dim]{f.id}[/]")
    if f.why:
        yield Text(f"  why   {f.why}")
    if f.cure:
        yield Text(f"  cure  {f.cure}", style="bold")
    for e in f.evidence[:4]:
        where = e.source if e.line is None else f"{e.source}:{e.line}"
        yield Text(f"  {where}  {e.text[:200]}", style="dim")
