"""Decode with drafts against without (`engine.draft`): where text repeats it should pay, where it does not it should cost nothing.

    python benchmarks/speculation.py [--device cpu|cuda] [--model PATH] [--tokens 256] [--rounds 5] [OUT.json]

Four texts. **edit**: a function, the request to write it again with one name changed, and what the model answers, greedily.
**edit, right**: the same with the answer that was asked for, said token by token whatever the model prefers: what a better model
would say; the model still computes every token. **repeats**: a prompt that repeats itself, and the model's own greedy answer.
**prose**: English of `pydoc_data.topics`, said likewise, which repeats no more than English does.

With and without take turns; the ratio is the median of the rounds. Where both said the model's own words, they must be the same
tokens before anything is timed (in bf16 they may part at a tie: `equal` says after how many). `reckoned` has the same ratio without
a clock, from fixed costs of steps.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import about
import torch

import headwise
from headwise import LLM
from headwise.engine.draft import SIZES, Drafts, propose
from headwise.engine.llm import Report, Result
from headwise.engine.sample import Sampler

CONTEXT = 4096
COSTS = (1.25, 1.45, 1.8)  # of steps of 2, 4 and 8 tokens over one of one, about what idle cores have


@contextmanager
def saying(tokens: Sequence[int]) -> Iterator[None]:
    """What is inside says `tokens`, whatever the logits are; with none, what the model says."""
    if not tokens:
        yield
        return
    drawn, plain, left = Sampler.token, Sampler.plain, iter(tokens)
    Sampler.token = lambda self, logits_V, allowed_V=None, drawn=None: next(left)  # type: ignore[method-assign]
    Sampler.plain = property(lambda self: False)  # type: ignore[method-assign,assignment]  # no step goes on from what the model says
    try:
        yield
    finally:
        Sampler.token, Sampler.plain = drawn, plain  # type: ignore[method-assign]


def texts(llm: LLM, n: int) -> dict[str, tuple[list[int], list[int]]]:
    """Of each case the prompt's tokens, and those that are said in place of the model's own."""
    code = inspect.getsource(statistics.variance) + "\n\n" + inspect.getsource(statistics.pvariance)
    asked = f"{code}\n\n# The same, with `data` renamed to `values`:\n\n"
    right = code.replace("data", "values")
    prose = llm.tokenize(" ".join(topics[name] for name in ("objects", "naming", "execmodel", "attribute-access")))
    short = "def area(width, height):\n    return width * height\n\n\n"
    return {
        "edit": (llm.tokenize(asked), []),
        "edit, right": (llm.tokenize(asked), llm.tokenizer.encode(right, add_bos=False)[:n]),
        "repeats": (llm.tokenize(short * 8), []),
        "prose": (prose[:800], prose[800 : 800 + n]),
    }


def reckoned(prompt: list[int], answer: list[int]) -> float:
    """Tokens of `answer` in the time of one, were steps to cost what COSTS says: no clock, so the same on a busy machine."""
    drafts, said, cost = Drafts(), [*prompt, answer[0]], 0.0
    while (left := answer[len(said) - len(prompt) :]) != []:
        draft = list(propose([(drafts, said)], len(left) - 1, COSTS)[0])
        accepted = next((i for i, (a, b) in enumerate(zip(draft, left, strict=False)) if a != b), len(draft))
        if draft:
            drafts.verified(len(draft), accepted)
        said += left[: accepted + 1]
        cost += COSTS[SIZES.index(len(draft))] if draft else 1.0
    return (len(answer) - 1) / cost


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(llm: LLM, prompt: list[int], said: list[int], n: int, rounds: int) -> dict[str, Any]:
    def once(speculate: bool) -> Result:
        with saying(said):
            return llm.generate(prompt, max_tokens=len(said) or n, speculate=speculate)

    off, on = once(False), once(True)  # compiles and records; measures what steps cost
    on = once(True)
    equal = next((i for i, (a, b) in enumerate(zip(off.tokens, on.tokens, strict=False)) if a != b), len(off.tokens))
    if llm.plan.workload.dtype == "f32" and off.tokens != on.tokens:
        raise SystemExit(f"refusing to time: the answers part after {equal} tokens")
    speeds: dict[bool, list[float]] = {False: [], True: []}
    reports: list[Report] = []
    for i in range(rounds):
        for speculate in (False, True) if i % 2 else (True, False):
            report = once(speculate).report
            speeds[speculate].append(report.decode_tok_s or 0.0)
            reports += [report] if speculate else []
    return {
        "prompt_tokens": len(prompt), "tokens": len(off.tokens), "equal": equal,
        "off_tok_s": spread(speeds[False]), "on_tok_s": spread(speeds[True]),
        "ratio": statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True)),
        "reckoned": reckoned(prompt, off.tokens),
        "drafted": round(statistics.median(r.drafted for r in reports)),
        "accepted": round(statistics.median(r.accepted for r in reports)),
        "step_costs": [None if c == float("inf") else c for c in llm.costs.of(1)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("out", nargs="?", type=Path)
    args = parser.parse_args()
    llm = LLM(args.model, device=args.device, context=CONTEXT, check=False)
    on_gpu = llm.device.type == "cuda"
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": about.commit(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "headwise": headwise.__version__, "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "model": llm.spec.name, "dtype": llm.plan.workload.dtype, "rounds": args.rounds, "cases": [],
    }  # fmt: skip
    for name, (prompt, said) in texts(llm, args.tokens).items():
        row = {"case": name} | measure(llm, prompt, said, args.tokens, args.rounds)
        result["cases"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
