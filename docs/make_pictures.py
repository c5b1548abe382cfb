"""Draws the pictures and the table of the README: the real commands run, and what they print is kept.

    python docs/make_pictures.py [NAME ...]

Writes docs/img/*.svg and docs/gemma4-table.md (README.md holds the same table; a test compares them). Nothing is typed in:
each picture is the output of the command on its first line, run in a process of its own, or drawn from the newest result.
Lines that are left out of a long prompt are marked.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from headwise import api
from headwise.bench import prefill_line, roofline

HERE = Path(__file__).parent
WIDTH = 110
GEMMA = ("gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
CARDS = ("rtx3060:12", "rtx4090", "rtx5090", "h200")
PICTURES = {
    "plan": "headwise plan gemma-4-31b --weights q4_k_m --context 65536 --gpu rtx4090",
    "explain": "headwise explain gemma-4-31b --gpu rtx4090",
    "run": "headwise run",
}
RESULTS = HERE.parent / "benchmarks/results"
DIM, RESET = "\x1b[2m", "\x1b[0m"
PROMPT_LINES = 12  # of the prompt's end that `run` shows


def record(command: str) -> str:
    """What a terminal would be sent by `command`; its exit code must be 0."""
    env = os.environ | {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    argv = [sys.executable, "-m", *command.split()]
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=True).stdout


def shorten(sent: str) -> str:
    """Leaves out the head of the prompt that `run` repeats: a first line, then dim lines up to what the model wrote."""
    lines = sent.splitlines()
    end = next((i for i, line in enumerate(lines) if i and line and not line.startswith(DIM)), len(lines))
    out = end - 1 - PROMPT_LINES
    return "\n".join([lines[0], f"{DIM}[{out} lines left out]{RESET}", *lines[end - PROMPT_LINES :]] if out > 0 else lines)


def draw(name: str, command: str) -> None:
    """docs/img/NAME.svg. The empty last line is no decoration: the drawing cuts descenders of the last one."""
    sent = record(command)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}\n", style="bold"))
    console.print(Text.from_ansi((shorten(sent) if command == "headwise run" else sent).rstrip()))
    console.print()
    (HERE / "img" / f"{name}.svg").write_text(console.export_svg(title="headwise", unique_id=name), encoding="utf-8")


def drawn() -> dict[str, str]:
    """The pictures of measurements, each of its newest result; those without one are left out."""
    makers = {"attention-roofline": ("attention_h200", roofline.svg), "prefill-line": ("prefill_line_h200", prefill_line.svg)}
    found = {name: (sorted(RESULTS.glob(f"{result}_*.json")), svg) for name, (result, svg) in makers.items()}
    return {name: svg(json.loads(files[-1].read_text())) for name, (files, svg) in found.items() if files}


def table() -> str:
    """The Gemma 4 family at Q4_K_M with a bf16 cache: bytes at 32K tokens in steps of 512, and the largest context per card."""
    lines = [
        "| model | weights | KV at 32K | compute | total | " + " | ".join(f"{c} holds" for c in CARDS) + " |",
        "|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for model in GEMMA:
        p = api.plan(model, context=32_768, ubatch=512, kv="bf16", weights="q4_k_m", gpus=["h200"])
        most = [api.plan(model, context=1024, kv="bf16", weights="q4_k_m", gpus=[c]).max_context or 0 for c in CARDS]
        gib = [f"{n / 2**30:.2f} GiB" for n in (p.weights_bytes, p.kv_bytes, p.compute_bytes, p.total_bytes)]
        lines.append(f"| {model} | {' | '.join(gib)} | {' | '.join(f'{n:,}' if n else '-' for n in most)} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    (HERE / "img").mkdir(exist_ok=True)
    for name in names or PICTURES:
        draw(name, PICTURES[name])
    for name, picture in drawn().items():
        (HERE / f"img/{name}.svg").write_text(picture, encoding="utf-8")
    (HERE / "gemma4-table.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
