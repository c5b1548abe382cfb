"""Draws the pictures and the table of the README from the real commands.

    python docs/make_pictures.py

Writes docs/img/*.svg and docs/gemma4-table.md (README.md holds the same table; a test compares them).
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from headwise import api
from headwise.attention.choose import group_layers
from headwise.attention.render import explain_view
from headwise.planner.ceiling import ceiling
from headwise.planner.render import plan_view
from headwise.spec.read import open_model

HERE = Path(__file__).parent
GEMMA = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")


def console(width: int = 100) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")


def save(name: str, command: str, view: object) -> None:
    c = console()
    c.print(Group(Text(f"$ {command}", style="bold"), Text(""), view))  # type: ignore[arg-type]
    (HERE / "img" / f"{name}.svg").write_text(c.export_svg(title="headwise"), encoding="utf-8")


def table() -> str:
    """The Gemma 4 family at Q4_K_M with a bf16 cache: bytes at 32K tokens, and the largest context per card."""
    cards = ("rtx3060:12", "rtx4090", "rtx5090", "h200")
    lines = [
        "| model | weights | KV at 32K | compute | total | " + " | ".join(f"{c} holds" for c in cards) + " |",
        "|---|---|---|---|---|" + "---|" * len(cards),
    ]
    for model in GEMMA:
        p = api.plan(model, context=32_768, kv="bf16", weights="q4_k_m", gpus=["h200"])
        most = [api.plan(model, context=1024, kv="bf16", weights="q4_k_m", gpus=[c]).max_context or 0 for c in cards]
        gib = [f"{n / 2**30:.2f} GiB" for n in (p.weights_bytes, p.kv_bytes, p.compute_bytes, p.total_bytes)]
        lines.append(f"| {model} | {' | '.join(gib)} | {' | '.join(f'{n:,}' if n else '-' for n in most)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (HERE / "img").mkdir(exist_ok=True)
    p = api.plan("gemma-4-31b", context=65_536, weights="q4_k_m", gpus=["rtx4090"])
    limits = [ceiling(p, s.target.gpu) if s.target.gpu else None for s in p.shares]
    save("plan", "headwise plan gemma-4-31b --weights q4_k_m --context 65536 --gpu rtx4090", plan_view(p, limits))
    source = open_model("gemma-4-e2b", env={})
    device, kv, choices = api.explain(source, gpu="rtx4090", kv=None)
    view = explain_view(source.spec, choices, group_layers(source.spec, choices, kv), device.label)
    save("explain", "headwise explain gemma-4-e2b --gpu rtx4090", view)
    (HERE / "gemma4-table.md").write_text(table(), encoding="utf-8")
    try:
        from headwise import LLM
        from headwise.engine.render import report_view
        from headwise.text.demo import demo_prompt
    except ImportError:  # the light install draws what it can
        return
    llm = LLM(device="cpu")
    text = llm.generate(demo_prompt(), max_tokens=96, temperature=0.8, top_p=0.95, seed=7).text
    end = demo_prompt()[-420:]
    save("run", "headwise run", Group(Text(end, style="dim", end=""), Text(text), report_view(llm, 1.3)))


if __name__ == "__main__":
    main()
