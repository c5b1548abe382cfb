"""What a decode step of one sequence costs the host beside the model, in microseconds: the fastest of many.

    python benchmarks/host.py [--against CHECKOUT] [--rounds 5] [OUT.json]

The decoder is replaced by nothing, on the CPU, so that what is left is Python: telling the device where tokens lie (`fill`), views
of that (`step`), a whole `Runner.run` with its logits, and a round of the engine. Both ways: operators, which take a sequence at a
time, and kernels, whose numbers lie on the device (a GPU pays launches and copies beside this). `--against` runs the same in
another checkout, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise import LLM
from headwise.attention.capability import DeviceKind
from headwise.attention.choose import choose_layers
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.engine import Engine
from headwise.engine.request import Request, Sampling
from headwise.engine.runner import Runner
from headwise.engine.stage import Stage
from headwise.model.heads import Step
from headwise.planner.memory import Workload, plan
from headwise.spec.kv import kv_format

CONTEXT, DEPTH, TIMES = 4096, 1000, 2500


def with_kernels(llm: LLM) -> Runner:
    """A runner on the CPU that tells kernels everything and has none."""
    kv = {"global": kv_format("bf16"), "sliding": kv_format("bf16")}
    choices = choose_layers(llm.spec, kv=kv, dtype="bf16", device=DeviceKind("cuda", (8, 0), "a card"))  # type: ignore[arg-type]
    reads = frozenset(c.backend.reads for c in choices)
    p = plan(llm.spec, llm.plan.stored, Workload(context=CONTEXT, chunk=512, kv=kv, dtype="bf16", reads=reads))  # type: ignore[arg-type]
    return Runner(p, [Stage(p, 0, choices, llm.runner.stages[0].weights, torch.device("cpu"))])


def hollow(runner: Runner) -> Runner:
    """`runner` without a model: a step leaves its hidden states as they are, logits stand still."""
    stage = runner.stages[-1]
    vocab = runner.spec.vocab_size

    def forward(step: Step, caches: object) -> Tensor:
        return stage.arena.take("x", step.n if step.tail is None else step.tail.step.n, runner.spec.hidden)

    stage.decoder.forward = forward  # type: ignore[method-assign]
    stage.decoder.logits = lambda x, arena, out=None: arena.take("logits", x.shape[0], vocab)  # type: ignore[method-assign]
    stage.arena.take("logits", runner.rows, vocab).zero_()
    return runner


def fastest(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    best = float("inf")
    for _ in range(TIMES):
        start = time.perf_counter_ns()
        call()
        best = min(best, time.perf_counter_ns() - start)
    return best / 1e3


def of(llm: LLM, runner: Runner) -> dict[str, float]:
    steps, runs = hollow(runner).stages[0].steps, [Run(Place(0, ((0, DEPTH // 64 + 1),)), DEPTH, [5])]
    out = {
        "fill": fastest(lambda: steps.fill(runs)),
        "step": fastest(lambda: steps.step(runs)),
        "run": fastest(lambda: runner.logits(runner.run(runs))),
    }
    llm.runner, llm.plan = runner, runner.plan
    engine = Engine(llm, lambda event: None, speculate=False)
    engine.stop = frozenset()
    engine.submit(Request(id=0, prompt=tuple(range(3, DEPTH)), sampling=Sampling(max_tokens=CONTEXT)))
    while not engine.running or not engine.running[0].answers:
        engine.round()
    return out | {"round": fastest(engine.round)}


def measure() -> dict[str, dict[str, float]]:
    llm = LLM(device="cpu", context=CONTEXT, check=False)
    operators = llm.runner
    return {"kernels": of(llm, with_kernels(llm)), "operators": of(llm, operators)}


def elsewhere(checkout: Path) -> dict[str, dict[str, float]]:
    env = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, __file__, "--once"], env=env, cwd=checkout, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("out", nargs="?", type=Path)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(measure()))
        return
    here = Path(__file__).parents[1]
    checkouts = [p for p in (args.against, here) if p is not None]
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        rounds.append({"here" if p == here else "against": elsewhere(p.resolve()) for p in checkouts})
    who = rounds[0].keys()
    table = {
        w: {way: {what: min(r[w][way][what] for r in rounds) for what in rounds[0][w][way]} for way in rounds[0][w]} for w in who
    }
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": about.commit(here),
        "against": about.commit(args.against) if args.against else None,
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "us": table,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
