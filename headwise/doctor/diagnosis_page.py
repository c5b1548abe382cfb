"""A diagnosis as one self-contained page: layer map, memory of each device, findings."""

from __future__ import annotations

from collections.abc import Iterator

from headwise.doctor.diagnose import Diagnosis
from headwise.doctor.page import Bar, Cell, page, probe_page
from headwise.doctor.probe import Probe
from headwise.doctor.report import SAYS, kv_text


def html(d: Diagnosis) -> str:
    """The page; one tag says the worst of it."""
    verdict = "something is wrong" if d.wrong else "unproven" if any(v.verdict == "unproven" for v in d.layers) else "fused"
    subtitle = f"{d.engine or 'no engine'} {d.version or ''} · KV cache {kv_text(d)}"
    return page(f"headwise doctor: {d.model or 'a model'}", verdict, subtitle=subtitle, findings=d.findings, layers=list(_cells(d)),
                memory=list(_bars(d)))  # fmt: skip


def probe_html(first: Probe, second: Probe | None, d: Diagnosis | None) -> str:
    """A probe's page; with what is known of the server's layers and memory, where it runs here and its log could be read."""
    if d is None:
        return probe_page(first, second)
    probes = [first, second] if second else [first]
    where = " and ".join(f"{q.server.label} {q.server.url}".strip() for q in probes)
    findings = [*(f for q in probes for f in q.findings), *d.findings]
    title = f"headwise probe: {first.server.model or first.server.label}"
    layers, memory = list(_cells(d)), list(_bars(d))
    return page(title, first.verdict, subtitle=where, probes=probes, findings=findings, layers=layers, memory=memory)


def _cells(d: Diagnosis) -> Iterator[Cell]:
    """One per layer: in the model's order where that is known, else kind by kind."""
    if d.spec is None:
        for v in d.layers:
            for _ in range(min(v.count or 0, 512)):
                yield Cell(f"{v.kind}: {SAYS[v.verdict]}", v.verdict, 1.0)
        return
    tallest = max(x.head_dim for x in d.spec.layers)
    left = {v: v.count or 0 for v in d.layers}
    for layer in d.spec.layers:
        mine = [v for v in d.layers if v.kind in (layer.kind, "all") and left[v] > 0] or [d.layers[-1]]
        left[mine[0]] -= 1
        yield Cell(f"layer {layer.index}, {layer.kind}, {layer.head_dim}: {SAYS[mine[0].verdict]}", mine[0].verdict,
                   layer.head_dim / tallest)  # fmt: skip


def _bars(d: Diagnosis) -> Iterator[Bar]:
    for device, parts in d.memory:
        yield Bar(device, parts, sum(n for _, n in parts))
