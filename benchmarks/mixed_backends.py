"""Does a model lose when its layers run on different kernels? Speed, and the greedy tokens that flip.

    PYTHONPATH=. python benchmarks/mixed_backends.py [--tokens 3000] [--rounds 5] [OUT.json]

tiny-hybrid (sliding and global layers of different head sizes) with every arrangement of backends for its two kinds of layers that
this device has. Tokens: each arrangement reads the modules of the standard library that training left out, in the device's usual
type, and its likeliest next token at every position is held to the same model in f32; beside that, how many differ from the default
arrangement's. Reading is in chunks, then a share of positions token by token, so that prefill and decode kernels are both counted.
Speed: a prompt of the first module and 128 tokens after it, arrangements in turn, median of the rounds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import time
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from headwise import LLM
from headwise.errors import BackendError

MODULES = ("calendar", "statistics", "ipaddress", "shlex")
ARRANGEMENTS = {
    "cuda": (
        None,
        "headwise-triton",
        "sliding=headwise-hopper,global=headwise-triton",
        "sliding=headwise-triton,global=headwise-hopper",
        "sliding=torch-efficient,global=headwise-hopper",
        "torch-efficient",
    ),
    "cpu": (None, "sliding=flex-attention,global=torch-flash-cpu"),
}
DECODED = 100  # positions of each module that are read token by token
NEW = 128


def best(llm: LLM, ids: list[int]) -> Tensor:
    """The likeliest token after every position: in chunks, and the last ones token by token."""
    head = ids[: -DECODED or None]
    chunks = llm.logits(ids).argmax(-1)
    alone = llm.logits(ids[-2 * DECODED :], chunk=1).argmax(-1)
    return torch.cat((chunks[: len(head)], alone))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = LLM(device=device, dtype="f32", context=args.tokens + NEW + 8, check=False)
    texts = [exact.tokenizer.encode(inspect.getsource(import_module(m)))[: args.tokens] for m in MODULES]
    want = torch.cat([best(exact, ids) for ids in texts])
    del exact
    rows, models, default = [], {}, None
    for arrangement in ARRANGEMENTS[device]:
        name = arrangement or "default"
        try:
            llm = LLM(device=device, backend=arrangement, context=args.tokens + NEW + 8, check=False)
        except BackendError as error:
            rows.append({"backends": name, "refused": str(error)})
            continue
        models[name] = llm
        got = torch.cat([best(llm, ids) for ids in texts])
        default = got if default is None else default
        rows.append({
            "backends": name, "sliding": _backend(llm, "sliding"), "global": _backend(llm, "global"), "positions": len(got),
            "flipped_from_f32": int((got != want).sum()), "flipped_from_default": int((got != default).sum()),
            "prefill_tok_s": [], "decode_tok_s": [],
        })  # fmt: skip
        llm.generate(texts[0], max_tokens=NEW, temperature=0.0, speculate=False)  # compiles, records
        print(name, int((got != want).sum()), flush=True)
    for _ in range(args.rounds):
        for row in rows:
            if "refused" not in row:
                report = models[row["backends"]].generate(texts[0], max_tokens=NEW, temperature=0.0, speculate=False).report
                row["prefill_tok_s"].append(report.prefill_tok_s)
                row["decode_tok_s"].append(report.decode_tok_s)
    for row in rows:
        for key in ("prefill_tok_s", "decode_tok_s"):
            if key in row:
                row[key] = {"median": statistics.median(row[key]), "min": min(row[key]), "max": max(row[key])}
        print(row, flush=True)
    found = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "model": "tiny-hybrid", "modules": MODULES,
        "tokens": args.tokens, "rounds": args.rounds, "rows": rows,
    }  # fmt: skip
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))


def _backend(llm: LLM, kind: str) -> str:
    return next(c.backend.name for layer, c in zip(llm.spec.layers, llm.choices, strict=True) if layer.kind == kind)


if __name__ == "__main__":
    main()
