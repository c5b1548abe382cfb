"""Plans for people: the only place where bytes become GiB."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwise.planner.ceiling import Ceiling
from headwise.planner.memory import Plan, Share, StagePlan
from headwise.planner.rank import Fit
from headwise.planner.rivals import RivalPlan
from headwise.spec.kv import turned_pairs

COLOURS = {
    "weights": "blue",
    "KV global": "magenta",
    "KV sliding": "cyan",
    "compute": "yellow",
    "others": "red",
    "margin": "bright_black",
}


def gib(n: int) -> str:
    """Three digits that matter: 10.8 GiB, 512 MiB, 3.2 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}" if n < 100 * size else f"{n / size:.0f} {unit}"
    return f"{n} B"


def bar(parts: Sequence[tuple[str, int]], total: int, *, width: int = 60) -> Text:
    """One cell per `total / width` bytes, coloured by part; what is left is free."""
    text = Text()
    done = cells = 0
    for name, n in parts:
        done += n
        upto = min(width, round(done * width / total)) if total else 0
        if n and upto == cells and cells < width:
            upto += 1  # a part that is there is seen
        text.append("█" * (upto - cells), style=COLOURS[name])
        cells = max(cells, upto)
    text.append("░" * (width - cells), style="bright_black")
    return text


def legend(parts: Sequence[tuple[str, int]]) -> Text:
    text = Text()
    for name, n in parts:
        if n:
            text.append("█ ", style=COLOURS[name]).append(f"{name} {gib(n)}  ")
    text.rstrip()
    return text


def layer_range(layers: Sequence[int]) -> str:
    if not layers:
        return "no layers"
    return f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def parts_of(plan: Plan | StagePlan) -> list[tuple[str, int]]:
    return [
        ("weights", plan.weights_bytes),
        ("KV global", plan.kv_global_bytes),
        ("KV sliding", plan.kv_sliding_bytes),
        ("compute", plan.compute_bytes),
    ]


def plan_view(plan: Plan, ceilings: Sequence[Ceiling | None] = (), served: Plan | None = None) -> RenderableType:
    """A plan; with `served`, the plan of `serve` where nobody says how many slots, a word on that."""
    w = plan.workload
    head = Text(f"{plan.spec.name}: {w.context:,} tokens", style="bold")
    if w.slots > 1:
        head.append(f" x {w.slots} slots")
    kv = (
        w.kv["global"].name
        if w.kv["global"] == w.kv["sliding"]
        else f"{w.kv['global'].name} global, {w.kv['sliding'].name} sliding"
    )
    if any(turned_pairs(layer) for layer in plan.spec.layers):
        kv += ", V alone where K = V"
    head.append(f", KV {kv}, prefill in steps of {w.chunk:,}", style="dim")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    for name, n in (*parts_of(plan), ("total", plan.total_bytes)):
        table.add_row(name, gib(n), f"{n:,} B", style="bold" if name == "total" else None)
    rows: list[RenderableType] = [head, table]
    for i, share in enumerate(plan.shares):
        rows.append(_share_view(plan, share, ceilings[i] if i < len(ceilings) else None))
    if plan.shares:
        verdict = Text("fits" if plan.fits else "does not fit", style="bold green" if plan.fits else "bold red")
        most = plan.max_context or 0
        verdict.append(
            f"; the largest context that fits is {most:,} of the model's {plan.spec.max_context:,}", style="default not bold"
        )
        rows.append(verdict)
    else:
        rows.append(Text("no GPU given and none detected: --gpu NAME[:GiB] says whether it fits", style="dim"))
    if served or w.slots > 1:
        rows.append(_served_view(served or plan))
    rows += [Text(f"note: {note}", style="dim") for note in (*plan.notes, *(served.notes[:1] if served else ()))]
    return Group(*rows)


def _served_view(p: Plan) -> Text:
    """What `serve` takes, and the copies of rings beside the plan."""
    w = p.workload
    head = f"\n`headwise serve` with {w.slots} slot{'s' * (w.slots > 1)}"
    pages = f": {gib(p.total_bytes)}, pages for {w.pool_tokens:,} tokens in all, steps of {w.chunk:,}"
    copies = f"; beside it {gib(p.kept_bytes)} of host memory for copies of rings, from which the next turn goes on"
    return Text.assemble((head, "bold"), pages, copies if p.kept_bytes else "")


def _share_view(plan: Plan, share: Share, ceiling: Ceiling | None) -> RenderableType:
    t = share.target
    lines: list[RenderableType] = []
    state = Text("fits" if share.fits else "too large", style="green" if share.fits else "red")
    held = f"  {layer_range(share.layers)}  {gib(share.planned_bytes)} of {gib(t.usable_bytes)} usable  "
    lines.append(Text.assemble(("\n" + t.name, "bold"), held, state))
    parts = [("others", t.others_bytes), *parts_of(share.stage), ("margin", t.margin_bytes)]
    lines += [bar(parts, t.total_bytes), legend(parts)]
    if ceiling and len(plan.shares) == 1 and share.fits:
        speed = f"at most {ceiling.decode_tok_s:,.0f} tok/s decode"
        if ceiling.prefill_tok_s:
            speed += f" and {ceiling.prefill_tok_s:,.0f} tok/s prefill"
        lines.append(Text(f"{speed}: what the card's bandwidth and matrix rate allow", style="dim"))
    return Group(*lines)


def rival_view(model: str, context: int, plan: RivalPlan, fits: bool | None, most: int | None) -> RenderableType:
    rows: list[RenderableType] = [Text(f"{model} in {plan.engine} {plan.version}: {context:,} tokens", style="bold")]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for label, n, why in plan.items:
        table.add_row(label, gib(n), why)
    table.add_row("total", gib(plan.total_bytes), f"{plan.total_bytes:,} B", style="bold")
    rows.append(table)
    if plan.own_estimate_bytes is not None:
        rows.append(Text(f"its own estimate: {gib(plan.own_estimate_bytes)}. {plan.own_estimate_note}"))
    elif plan.own_estimate_note:
        rows.append(Text(f"its own estimate: {plan.own_estimate_note}"))
    rows += [Text(f"note: {note}", style="dim") for note in (*plan.kv.notes, *plan.notes)]
    if fits is not None:
        rows.append(Text(f"{'fits' if fits else 'does not fit'}; the largest context that fits is {most or 0:,}", style="bold"))
    return Group(*rows)


def rank_view(fits: Sequence[Fit], names: Sequence[str]) -> RenderableType:
    table = Table(title=f"What fits {' + '.join(names)}", box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("model", "weights", "KV"):
        table.add_column(name)
    table.add_column("size", justify="right")
    table.add_column("largest context", justify="right")
    for f in fits:
        table.add_row(f.model, f.weights, f.kv, gib(f.weights_bytes), f"{f.max_context:,}")
    return table
