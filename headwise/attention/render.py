"""The layer map: one cell per layer, colour = backend, height = head size; then the choice and every refusal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from headwise.attention.choose import Choice, LayerGroup
from headwise.attention.engines import EngineExplanation
from headwise.attention.measured import mix_figures
from headwise.spec.kv import turned_pairs
from headwise.spec.layers import LayerSpec, ModelSpec

_PALETTE = ("green", "cyan", "blue", "magenta")


def colours(names: Sequence[str], fused: Sequence[bool]) -> dict[str, str]:
    """Fused backends in cool colours, everything else red."""
    out: dict[str, str] = {}
    for name, good in zip(names, fused, strict=True):
        if name not in out:
            out[name] = _PALETTE[sum(c != "red" for c in out.values()) % len(_PALETTE)] if good else "red"
    return out


def layer_map(spec: ModelSpec, names: Sequence[str], fused: Sequence[bool], *, width: int = 64) -> RenderableType:
    """Tall cells are the larger head size, a dot marks a layer that reads another's cache."""
    colour = colours(names, fused)
    tallest = max(layer.head_dim for layer in spec.layers)
    rows: list[RenderableType] = []
    for start in range(0, len(spec.layers), width):
        text = Text().append(f"{start:>4} ", style="dim")
        for layer in spec.layers[start : start + width]:
            text.append(_glyph(layer, tallest), style=colour[names[layer.index]])
        rows.append(text)
    return Group(*rows)


def _glyph(layer: LayerSpec, tallest: int) -> str:
    if layer.kv_source is not None:
        return "•"
    return "█" if layer.head_dim == tallest and layer.window is None else "▄"


def kind_words(layer: LayerSpec) -> str:
    words = [layer.kind, f"head_dim {layer.head_dim}", f"{layer.n_heads} query / {layer.n_kv_heads} KV heads"]
    words.append(f"window {layer.window}, ring" if layer.window else "pages")
    if layer.k_eq_v:
        words.append("V alone for K and V" if turned_pairs(layer) else "one tensor for K and V")
    if layer.kv_source is not None:
        words.append(f"reads the cache of layer {layer.kv_source}")
    return ", ".join(words)


def explain_view(spec: ModelSpec, choices: Sequence[Choice], groups: Sequence[LayerGroup], device: str) -> RenderableType:
    names = [c.backend.name for c in choices]
    fused = [c.fused for c in choices]
    n = sum(fused)
    head = Text.assemble(
        (f"{spec.name} on {device}: ", "bold"), (f"{n}/{len(fused)} layers fused", "bold green" if n == len(fused) else "bold red")
    )
    rows: list[RenderableType] = [
        head,
        layer_map(spec, names, fused),
        Text("     █ global  ▄ sliding  • shares a cache", style="dim"),
    ]
    colour = colours(names, fused)
    for group in groups:
        rows.append(Text(f"\n{len(group.layers)} x {kind_words(group.example)}, KV {group.kv}", style="bold"))
        rows.append(Text(f"  {group.choice.backend.name}", style=colour[group.choice.backend.name]))
        rows += [Text(f"    {line}", style="dim") for line in group.choice.lines]
    if figures := mix_figures(spec, choices):
        rows.append(Text(f"\nmeasured: {figures}", style="dim"))
    return Group(*rows)


def engine_view(spec: ModelSpec, engine: str, card: str, answer: EngineExplanation) -> RenderableType:
    """What another engine would do; the groups are the layers for which it does the same."""
    names = [c.backend for c in answer.choices]
    fused = [c.verdict == "fused" for c in answer.choices]
    head = Text.assemble(
        (f"{spec.name} in {engine} on {card}: ", "bold"),
        (f"{sum(fused)}/{len(fused)} layers fused", "bold green" if all(fused) else "bold red"),
    )
    rows: list[RenderableType] = [head, layer_map(spec, names, fused)]
    seen: dict[tuple[object, ...], list[int]] = {}
    for layer, choice in zip(spec.layers, answer.choices, strict=True):
        seen.setdefault((layer.kind, layer.head_dim, choice), []).append(layer.index)
    colour = colours(names, fused)
    for indexes in seen.values():
        choice = answer.choices[indexes[0]]
        rows.append(Text(f"\n{len(indexes)} x {kind_words(spec.layers[indexes[0]])}", style="bold"))
        rows.append(Text(f"  {choice.backend}: {choice.verdict}", style=colour[choice.backend]))
        rows.append(Text(f"    {choice.why}"))
        rows.append(Text(f"    source: {choice.source}", style="dim"))
        rows += [Text(f"    note: {note}", style="dim") for note in choice.notes]
    rows += [Text(f"note: {note}", style="dim") for note in answer.notes]
    return Group(*rows)
