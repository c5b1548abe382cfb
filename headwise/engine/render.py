"""What a run reports at its end, and what the self-check found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.attention.render import kind_words, layer_map
from headwise.attention.verify import Check
from headwise.planner.render import bar, layer_range, legend, parts_of

if TYPE_CHECKING:
    from headwise.engine.llm import LLM


def report_view(llm: LLM, ready_s: float) -> RenderableType:
    r, p = llm.report(), llm.plan
    whole = r.layers_fused == r.layers
    rows: list[RenderableType] = [
        Text.assemble(
            (f"\n{r.layers_fused}/{r.layers} layers fused", "bold green" if whole else "bold red"),
            f"  {llm.spec.name} on {llm.where}",
        ),
        layer_map(llm.spec, [c.backend.name for c in llm.choices], [c.fused for c in llm.choices]),
    ]
    for g in r.backends:
        rows.append(Text(f"     {len(g.layers)} x {g.choice.names}: {kind_words(g.example)}, KV {g.kv}", style="dim"))
    same = all(d.planned_bytes == d.allocated_bytes for d in r.devices)
    rows.append(
        Text.assemble(
            ("planned = allocated" if same else "planned and allocated differ", "bold green" if same else "bold red"),
            f"  {r.planned_bytes:,} B planned, {r.allocated_bytes:,} B allocated, {r.peak_bytes:,} B at the peak",
        )
    )
    if len(r.devices) > 1:
        for d in r.devices:
            text = f"     {layer_range(d.layers)} on {d.device}: "
            text += f"{d.planned_bytes:,} B planned, {d.allocated_bytes:,} B allocated, {d.peak_bytes:,} B at the peak"
            rows.append(Text(text, style="dim" if d.planned_bytes == d.allocated_bytes else "bold red"))
    rows += [bar(parts_of(p), p.total_bytes), legend(parts_of(p))]
    if llm.skipped:
        rows.append(Text("not read: " + "; ".join(f"{n} x {why}" for why, n in llm.skipped.items()), style="dim"))
    if llm.checks:
        worst = max(c.error for c in llm.checks)
        when = "checked before on this machine" if llm.checks_cached else "checked now"
        rows.append(
            Text(f"{len(llm.checks)} self-checks against the reference, worst relative error {worst:.1e}, {when}", style="dim")
        )
    speed = f"ready in {ready_s:.1f} s; prefill {r.prefill_tokens:,} tokens"
    if r.prefill_tok_s:
        speed += f" at {r.prefill_tok_s:,.0f} tok/s"
    if r.decode_tok_s:
        speed += f"; decode {r.decode_tokens + 1} tokens at {r.decode_tok_s:,.1f} tok/s"
    if r.drafted:
        speed += f"; {r.accepted:,} of {r.drafted:,} drafts accepted"
    rows.append(Text(speed))
    return Group(*rows)


def checks_view(checks: Sequence[Check]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("backend", "head", "window", "KV", "phase"):
        table.add_column(name, no_wrap=True)
    for name in ("keys", "error", "corr.", "KV error", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for c in checks:
        table.add_row(
            c.backend, str(c.head_dim), str(c.window or "-"), c.kv, c.phase, f"{c.length:,}", f"{c.error:.1e}",
            f"{c.correlation:.5f}", f"{c.store_error:.1e}", Text("ok", style="green") if c.ok else Text("WRONG", style="bold red"),
        )  # fmt: skip
    note = "error: ||out - reference|| / ||reference||, fp64; KV error: what the KV type itself loses"
    return Group(table, Text(note, style="dim"))
