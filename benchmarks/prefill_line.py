"""Prefill tok/s against prompt length, 512 to 131,072 tokens: headwise, transformers and llama.cpp on one card, in one run.

    PYTHONPATH=.:tests python benchmarks/prefill_line.py OUT.json [MODEL] [--llama-cpp DIR]

Random weights of the model's true shape, made on the card: headwise in bf16 and q4_k_m with chunks of 4,096, transformers (sdpa)
in bf16, llama.cpp in q4_k_m with flash attention and micro-batches of 4,096 from the library in DIR (benchmarks/llamacpp.py).
First the answers: headwise's first layers against fp32, llama.cpp's logits of those layers against headwise's. Of each length the
fastest of three prompts after one unmeasured, above 16K of two; and decode behind 512 and 31,744 tokens. A line ends where a prompt
would take over a minute, the memory is spent, or the run's time is.

Beside each row of headwise what arithmetic says: products and attention at the measured rate of products, and in q4_k_m the
expansion of each matrix once a chunk at the measured bandwidth. `off` is the measured time over that of half the length, divided
by the same of the arithmetic: 1 is a line without a cliff.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import about
import torch
from engine import built

from headwise.bench.attention import ceilings
from headwise.bench.engine import DECODED, allowed, bound, check, in_bf16, measure, runner_for
from headwise.engine.devices import device_kind
from headwise.errors import HeadwiseError, UsageError
from headwise.planner.memory import Plan
from headwise.spec import catalogue
from headwise.spec.ggml import by_name, n_bytes
from headwise.spec.kv import KVFormat, kv_format
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import weight_tensors

LENGTHS = tuple(512 << i for i in range(9))
CHUNK = 4096
DECODED_BEHIND = (512, 31744)
WARM = 16384  # the longest prompt that is run once unmeasured
LONGEST_S, THEIRS_S, SPENT_S = 60.0, 260.0, 540.0  # one prompt; until transformers ends; the whole run
FORMATS: dict[Kind, KVFormat] = {"global": kv_format("bf16"), "sliding": kv_format("bf16")}


class Line:
    """The result so far, on disk after every row."""

    def __init__(self, out: Path, head: Mapping[str, Any]) -> None:
        self.out, self.began = out, time.perf_counter()
        self.result: dict[str, Any] = {**head, "rows": [], "stopped": [], "decode": []}

    def stop(self, who: str, weights: str, tokens: int, why: object) -> None:
        self.result["stopped"].append({"who": who, "weights": weights, "tokens": tokens, "why": str(why).splitlines()[0]})
        print(f"{who} {weights} stops before {tokens:,} tokens: {self.result['stopped'][-1]['why']}", flush=True)
        self.write()

    def write(self) -> None:
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def decoded(self, who: str, weights: str, tokens: int, seconds: float) -> None:
        """A token behind so many others, greedy, one at a time through the host."""
        self.result["decode"].append({"who": who, "weights": weights, "tokens": tokens, "decode_tok_s": 1 / seconds})
        print(f"{who} {weights} behind {tokens:,} tokens: {1 / seconds:.1f} tok/s", flush=True)
        self.write()

    def measure(
        self, who: str, weights: str, vocabulary: int, prefill: Callable[[list[int]], object],
        reckon: Callable[[int], float] | None = None, until: float = SPENT_S,
    ) -> None:  # fmt: skip
        """A row for each length. `prefill` returns once its last token's answer is on the host; `reckon` gives seconds."""
        took: list[float] = []
        for tokens in LENGTHS:
            ids = torch.randint(3, vocabulary, (tokens,)).tolist()
            rounds = 3 if tokens <= WARM else 2
            guess = took[-1] * max(2.0, took[-1] / took[-2]) if len(took) > 1 else 0.0
            if guess > LONGEST_S:
                return self.stop(who, weights, tokens, f"a prompt would take {guess:.0f} s, over {LONGEST_S:.0f}")
            if time.perf_counter() - self.began + rounds * guess > until:
                return self.stop(who, weights, tokens, f"{rounds} prompts of {guess:.0f} s end after its {until:.0f} s of the run")
            times = []
            try:
                for i in range(rounds + (tokens <= WARM)):
                    start = time.perf_counter()
                    prefill(ids)
                    if i or tokens > WARM:
                        times.append(time.perf_counter() - start)
            except RuntimeError as error:  # out of memory is one
                return self.stop(who, weights, tokens, f"{type(error).__name__}: {error}")
            took.append(min(times))
            row = {"who": who, "weights": weights, "tokens": tokens, "prefill_s": took[-1], "slowest_s": max(times),
                   "prefill_tok_s": tokens / took[-1]}  # fmt: skip
            if reckon:
                row["reckoned_s"] = reckon(tokens)
                if len(took) > 1:
                    row["off"] = (took[-1] / took[-2]) / (row["reckoned_s"] / reckon(tokens // 2))
            self.result["rows"].append(row)
            self.write()
            off = f"  off {row['off']:.2f}" if "off" in row else ""
            print(f"{time.perf_counter() - self.began:5.0f} s  {who:<13}{weights:<7}{tokens:>8,} tokens {row['prefill_s']:>8.3f} s "
                  f"{row['prefill_tok_s']:>9,.0f} tok/s{off}", flush=True)  # fmt: skip
        return None


def reckoned(p: Plan, tokens: int, ceiling: tuple[float, float]) -> float:
    """Seconds of a prompt at the card's measured rates; a quantised matrix is read, written as bf16 once a chunk."""
    matrices = [t for t in weight_tensors(p.spec) if t.role != "vector" and t.name != "embed" and p.resident[t.name] != "bf16"]
    expanded = sum(n_bytes(by_name(p.resident[t.name]), t.n_elements) + 2 * t.n_elements for t in matrices)
    return allowed(p, tokens, ceiling)[0] + math.ceil(tokens / CHUNK) * expanded / (ceiling[1] * 1e12)


def freed() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def ours(line: Line, spec: ModelSpec, weights: str, device: torch.device, ceiling: tuple[float, float]) -> Plan:
    kind = device_kind(device)
    error = max(check(spec, weights, FORMATS, kind, device))
    if not error < bound(spec, weights):
        raise RuntimeError(f"{spec.name} in {weights} is wrong: relative error {error:.1e} of the hidden states; nothing is timed")
    line.result["errors"][weights] = error
    freed()
    runner, _, p = runner_for(spec, context=max(LENGTHS) + 8, chunk=CHUNK, device=device, **in_bf16(spec, weights, device))

    def prefill(ids: list[int]) -> int:
        runner.reset()
        return int(runner.logits(runner.prefill(ids))[0].argmax())

    line.measure("headwise", weights, spec.vocab_size, prefill, lambda n: reckoned(p, n, ceiling))
    for tokens in DECODED_BEHIND:
        line.decoded("headwise", weights, tokens, measure(runner, torch.randint(3, spec.vocab_size, (tokens,)).tolist(), 1)[1])
    return p


def theirs(line: Line, spec: ModelSpec, device: torch.device) -> None:
    model = built(spec.name)

    @torch.inference_mode()
    def prefill(ids: list[int]) -> int:
        out = model(torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    line.measure("transformers", "bf16", spec.vocab_size, prefill, until=THEIRS_S)


def llama_cpp(line: Line, spec: ModelSpec, p: Plan, folder: Path, device: torch.device) -> None:
    import llamacpp

    try:
        engine, error = llamacpp.opened(folder, spec, p, device, context=max(LENGTHS) + 256, ubatch=CHUNK)
    except llamacpp.Wrong as wrong:
        line.stop("llama.cpp", "q4_k_m", LENGTHS[0], wrong)
        return
    line.result["errors"]["llama.cpp"] = error
    for tokens in DECODED_BEHIND:
        engine.prefill(torch.randint(3, spec.vocab_size, (tokens,)).tolist())
        line.decoded("llama.cpp", "q4_k_m", tokens, engine.decode(DECODED))
    line.measure("llama.cpp", "q4_k_m", spec.vocab_size, lambda ids: engine.prefill(ids))
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?", default="gemma-4-12b")
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="holds libllama*.so and libggml*.so; default: without llama.cpp"
    )
    args = parser.parse_args()
    spec = catalogue.spec(args.model)
    if args.llama_cpp and not list(args.llama_cpp.glob("libllama*.so")):
        raise UsageError(f"{args.llama_cpp} holds no llama.cpp", why="no libllama*.so is in it", do="--llama-cpp DIR of a build")
    if not torch.cuda.is_available():
        raise UsageError("nothing to measure", why="PyTorch sees no NVIDIA card", do="run it on the machine with the card")
    device = torch.device("cuda")
    ceiling = ceilings(device)
    line = Line(args.out, about.card("transformers") | {
        "llama_cpp": "0.5.0" if args.llama_cpp else None, "model": spec.name, "chunk": CHUNK, "matrix_tflops": ceiling[0],
        "read_tb_s": ceiling[1], "errors": {},
    })  # fmt: skip
    print(f"{line.result['gpu']}: bf16 products {ceiling[0]:.0f} TFLOP/s, reads {ceiling[1]:.2f} TB/s", flush=True)
    ours(line, spec, "bf16", device, ceiling)
    freed()
    p = ours(line, spec, "q4_k_m", device, ceiling)
    freed()
    theirs(line, spec, device)
    freed()
    if args.llama_cpp:  # last: where it fails its library ends the process
        llama_cpp(line, spec, p, args.llama_cpp, device)


if __name__ == "__main__":
    try:
        main()
    except HeadwiseError as error:
        raise SystemExit(str(error)) from None
