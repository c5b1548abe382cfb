"""Several sequences at once: answers as if alone, and tokens per second of 1 to 64 of them.

    python benchmarks/streams.py OUT.json [--models gemma-4-31b:q4_k_m,...] [--streams 1,4,16]

First the embedded model: requests that share steps and scattered pages, with drafts, against each alone. Then models of true shape
with random weights: 512-token prompts and 64-token answers, all streams together, one step of all answers at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import about
import torch

import headwise
from headwise import LLM
from headwise.bench.engine import in_bf16, runner_for, step_ahead
from headwise.cache.pages import pages_for
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.engine import Engine
from headwise.engine.request import Event, Finish, Request, Sampling, Token
from headwise.spec import catalogue

PROMPT, ANSWER = 512, 64
TIE = 0.25  # between two logits in bf16 that another number of rows may exchange


def answers(speculate: bool) -> dict[str, Any]:
    """Requests of the embedded model together; how many of their tokens are those of the sequence alone, up to a tie."""
    llm = LLM(context=1500, slots=6, chunk=256, device="cuda", check=False)
    alone = LLM(context=1500, chunk=256, device="cuda", check=False)
    events: list[Event] = []
    engine = Engine(llm, events.append, speculate=speculate)
    draw = random.Random(1)
    prompts = [[2, *(draw.randrange(40, 6000) for _ in range(n))] for n in (700, 3, 130, 64, 900, 300, 65, 20)]
    prompts += [llm.tokenize("def add(a, b):\n    return a + b\n\n" * 12), [*prompts[0], 77, 78]]
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=i, prompt=tuple(prompt), sampling=Sampling(max_tokens=48), client=str(i)))
    steps = 0
    start = time.perf_counter()
    while engine.busy:
        engine.round()
        steps += 1
    seconds = time.perf_counter() - start
    wrong = compared = 0
    for i, prompt in enumerate(prompts):
        said = [e.token for e in events if isinstance(e, Token) and e.request == i]
        alone.runner.reset()
        x = alone.runner.prefill(prompt)
        for token in said:
            row = alone.runner.logits(x)[0].float()
            compared += 1
            if float(row.max() - row[token]) > TIE:
                wrong += 1
                break
            x = alone.runner.step([token])
    finished = sum(isinstance(e, Finish) and e.reason in ("stop", "length") for e in events)
    tokens = sum(isinstance(e, Token) for e in events)
    return {
        "speculate": speculate, "requests": len(prompts), "finished": finished, "tokens": tokens,
        "compared": compared, "wrong": wrong,
        "rounds": steps, "tok_s": tokens / seconds, "planned": llm.plan.total_bytes, "allocated": llm.runner.allocated_bytes,
    }  # fmt: skip


def streams(model: str, weights: str, counts: list[int]) -> list[dict[str, Any]]:
    spec, device = catalogue.spec(model), torch.device("cuda")
    context = PROMPT + ANSWER + 64
    runner, _, p = runner_for(spec, context=context, chunk=2048, slots=max(counts), device=device, **in_bf16(spec, weights, device))
    pages = pages_for(context)
    rows = []
    for n in counts:
        prompts = [torch.randint(3, spec.vocab_size, (PROMPT,)).tolist() for _ in range(n)]
        places = [Place(i, ((i * pages, pages),)) for i in range(n)]
        together = max(1, runner.chunk // PROMPT)
        best, tokens = float("inf"), list[int]()
        for _ in range(2):
            torch.cuda.synchronize()
            start, tokens = time.perf_counter(), []
            for i in range(0, n, together):
                runs = [Run(places[j], 0, prompts[j]) for j in range(i, min(i + together, n))]
                tokens += runner.logits(runner.run(runs)).argmax(-1).tolist()
            best = min(best, time.perf_counter() - start)
        steps = []
        with runner.on_stream():
            drawn, at = torch.tensor(tokens, device="cuda"), time.perf_counter()
            for i in range(ANSWER):
                drawn = step_ahead(runner, places, drawn, PROMPT + i)
                start, at = at, time.perf_counter()
                if i >= 4:
                    steps.append(at - start)
        step = statistics.median(steps)
        rows.append({
            "model": model, "weights": weights, "streams": n, "prefill_tok_s": n * PROMPT / best, "decode_tok_s": n / step,
            "step_ms": step * 1e3, "planned": p.total_bytes, "allocated": runner.allocated_bytes, "peak": runner.peak_bytes,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="gemma-4-31b:q4_k_m")
    parser.add_argument("--streams", default="1,4,16,64")
    args = parser.parse_args()
    result: dict[str, Any] = about.card() | {"headwise": headwise.__version__, "rows": []}
    result["answers"] = [answers(False), answers(True)]
    print(json.dumps(result["answers"], indent=1), flush=True)
    for told in args.models.split(","):
        model, weights = told.split(":")
        result["rows"] += streams(model, weights, [int(n) for n in args.streams.split(",")])
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
