"""Draws the loss curve of the model card and prints its tables as Markdown.

python card.py --logs stage1.jsonl stage2.jsonl --results results.json --corpus corpus.json --svg loss.svg
"""

from __future__ import annotations

import argparse
import json
import pathlib

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 56, 44, 24, 16  # pixels
LOW, HIGH = 1.0, 3.0  # nats a token; the first ones, 9.3 after 20 steps, leave the picture
INK, GRID, TRAIN, HELD_OUT, LONG_FILL = "#444", "#ddd", "#3b6fb6", "#c2571a", "#f1eee6"


def loss_curve(logs: list[list[dict]]) -> str:
    """An SVG of training and held-out loss over tokens, the stages one after the other, 32K phases shaded."""
    rows, offset = [], 0
    for log in logs:
        rows += [row | {"tokens": row["tokens"] + offset} for row in log]
        offset = rows[-1]["tokens"]

    def x(tokens: float) -> float:
        return LEFT + tokens / offset * (WIDTH - LEFT - RIGHT)

    def y(nats: float) -> float:
        return TOP + (HIGH - min(nats, HIGH)) / (HIGH - LOW) * (HEIGHT - TOP - BOTTOM)

    def line(key: str, colour: str, width: float) -> str:
        points = " ".join(f"{x(r['tokens']):.1f},{y(r[key]):.1f}" for r in rows if key in r)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{points}"/>'

    def text(at_x: float, at_y: float, what: str, anchor: str = "middle", colour: str = INK) -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}">{what}</text>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
             "<title>Loss of tiny-hybrid over training tokens</title>",
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip
    for before, row in zip([{"tokens": 0}, *rows], rows, strict=False):
        if row["length"] > 4096:
            width = x(row["tokens"]) - x(before["tokens"]) + 0.3
            parts.append(f'<rect x="{x(before["tokens"]):.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}" '
                         f'fill="{LONG_FILL}"/>')  # fmt: skip
    for tenth in range(int(LOW * 10), int(HIGH * 10) + 1, 5):
        nats = tenth / 10
        parts.append(f'<path d="M{LEFT} {y(nats):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y(nats) + 4, f"{nats:.1f}", "end"))
    for millions in range(0, int(offset / 1e6) + 1, 100):
        parts.append(text(x(millions * 1e6), HEIGHT - BOTTOM + 18, str(millions)))
    parts += [line("train_nats", TRAIN, 1.2), line("held_out_nats", HELD_OUT, 2.2),
              text((LEFT + WIDTH) / 2, HEIGHT - 8, "million tokens (shaded: sequences of 32,768, else 4,096)"),
              text(WIDTH - RIGHT, TOP + 14, "training, mean of 20 steps", "end", TRAIN),
              text(WIDTH - RIGHT, TOP + 30, "held-out packages", "end", HELD_OUT),
              text(LEFT, TOP - 8, "nats a token", "start"), "</svg>"]  # fmt: skip
    return "\n".join(parts) + "\n"


def tables(results: dict, corpus: dict) -> str:
    lines = ["| held-out package | bits a byte | nats a token | bytes a token | tokens scored |", "|---|---|---|---|---|"]
    for name, r in results["held_out"].items():
        lines.append(f"| {name} | {r['bits_per_byte']:.3f} | {r['nats_per_token']:.3f} | {r['bytes_per_token']:.2f} "
                     f"| {r['tokens']:,} |")  # fmt: skip
    columns = list(next(iter(results["context_use"].values()))["bits_per_byte"])
    lines += ["", f"| input | {' | '.join(columns)} | gain of the distant part |", "|---" * (len(columns) + 2) + "|"]
    for n_tokens, use in results["context_use"].items():
        gain, bits = use["gain_of_distant_part"], use["bits_per_byte"]
        lines.append(f"| {int(n_tokens):,} | " + " | ".join(f"{bits[c]:.3f}" for c in columns) + f" | {gain['mean']:.3f} ± "
                     f"{gain['standard_error']:.3f}, {gain['documents_helped']} of {use['documents']} helped |")  # fmt: skip
    lines += ["", "| position | bits a byte |", "|---|---|"]
    lines += [f"| {where} | {bits:.3f} |" for where, bits in results["bits_per_byte_by_position"].items()]
    lines += ["", "| package | version | licence | role | files | MB |", "|---|---|---|---|---|---|"]
    for name, p in sorted(corpus.items(), key=lambda item: (item[1]["role"], item[0].lower())):
        lines.append(f"| {name} | {p['version']} | {p['licence']} | {p['role']} | {p['files']:,} | {p['bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--svg", type=pathlib.Path, required=True)
    args = parser.parse_args()
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in args.logs]
    args.svg.write_text(loss_curve(logs))
    print(tables(json.loads(args.results.read_text()), json.loads(args.corpus.read_text())))


if __name__ == "__main__":
    main()
