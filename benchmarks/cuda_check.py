"""Does `run` on CUDA compute what transformers computes, and is the plan the allocation there too?

    PYTHONPATH=.:tests python benchmarks/cuda_check.py [OUT.json [PART ...]]

For every family's tiny checkpoint: logits in fp32 against transformers on the CPU (whole prompt, odd chunks, token by
token), planned against allocated bytes. The embedded model in bf16 and with each KV type: self-check, planned,
allocated and peak bytes, prefill and decode speed. Prompts of many lengths behind one another, replayed from CUDA graphs,
against the same as ordinary steps: logits, and what the graphs take of the card. PART: families, embedded, prompts.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise import LLM
from headwise.bench.engine import bound, first_layers, in_bf16, runner_for, unrecorded
from headwise.cache.pages import extents, pages_for
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.runner import Runner
from headwise.spec import catalogue
from headwise.text.demo import demo_prompt

# Both sides of every border: drafts, a filling, a chunk that is recorded; together past a ring of 1,024 + 2,048 + 8.
LENGTHS = (1, 2, 8, 9, 63, 64, 65, 100, 128, 200, 257, 500, 512, 700, 961, 1024, 1100)
CHUNK = 2048
MODELS = (
    ("gemma-4-12b", "bf16"), ("gemma-4-12b", "q4_k_m"), ("gemma-4-12b", "fp8"), ("gemma-4-26b-a4b", "q4_k_m"),
    ("gemma-4-e2b", "bf16"), ("gpt-oss-20b", "bf16"),
)  # fmt: skip


def families() -> list[dict[str, object]]:
    import tiny

    rows: list[dict[str, object]] = []
    torch.manual_seed(0)
    ids = torch.randint(1, 320, (83,)).tolist()
    for name in tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny.save(name, Path(folder))
            want = tiny.logits(name, ids)
            try:
                llm = LLM(Path(folder), context=128, chunk=96, device="cuda", dtype="f32")
                errors = {c: float((llm.logits(ids, chunk=c) - want).abs().max()) for c in (83, 7, 31, 1)}
                report = llm.report()
                rows.append(
                    {"family": name, "max_abs_error": errors, "planned": report.planned_bytes, "allocated": report.allocated_bytes}
                )
            except Exception as error:  # a table of what failed is the point of this script
                rows.append({"family": name, "error": f"{type(error).__name__}: {error}"})
        print(rows[-1], flush=True)
    return rows


def embedded() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for dtype, kv in (("bf16", "bf16"), ("bf16", "q8_0"), ("bf16", "q4_0"), ("bf16", "fp8"), ("f16", "f16")):
        try:
            start = time.perf_counter()
            llm = LLM(device="cuda", dtype=dtype, kv=kv)
            ready = time.perf_counter() - start
            llm.generate(demo_prompt(), max_tokens=4)  # first launches load kernels
            result = llm.generate(demo_prompt(), max_tokens=65, speculate=False)
            r = result.report
            rows.append(
                {
                    "compute": llm.plan.compute_bytes,
                    "dtype": dtype, "kv": kv, "ready_s": ready, "checks": len(llm.checks),
                    "worst_error": max(c.error for c in llm.checks),
                    "planned": r.planned_bytes, "allocated": r.allocated_bytes, "peak": r.peak_bytes,
                    "prefill_tok_s": r.prefill_tok_s, "decode_tok_s": r.decode_tok_s, "text": result.text[:160],
                }
            )  # fmt: skip
        except Exception as error:
            rows.append({"dtype": dtype, "kv": kv, "error": f"{type(error).__name__}: {error}"})
        print(rows[-1], flush=True)
        llm = None
        torch.cuda.empty_cache()
    return rows


def walk(runner: Runner, place: Place, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The logits after each of some prompts, one behind the other in one sequence."""
    rows, at = [], 0
    for n in lengths:
        x = runner.run([Run(place, at, ids[at : at + n])])
        rows.append(runner.logits(x)[0].float().cpu())
        at += n
    return torch.stack(rows)


def held() -> dict[str, int]:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(), "by_driver": total - free}


def prompts() -> list[dict[str, object]]:
    """Every length is seen, recorded and replayed, with other tokens at other positions, in rings that wrap and in pages apart."""
    rows: list[dict[str, object]] = []
    device = torch.device("cuda")
    for name, scheme in MODELS:
        spec = catalogue.spec(name)
        spec = spec if spec.layers[-1].kv_source is not None else first_layers(spec)  # layers that share a cache are the last
        context = sum(LENGTHS) + 1
        torch.cuda.empty_cache()
        runner, _, p = runner_for(spec, context=context, chunk=CHUNK, device=device, **in_bf16(spec, scheme, device))
        places = {"alone": Place(), "pages apart": Place(0, extents([*range(pages_for(context))][::-1]))}
        texts = [torch.randint(3, spec.vocab_size, (context,)).tolist() for _ in range(2)]
        orders = (LENGTHS, LENGTHS[::-1])
        with unrecorded(runner):
            want = {(w, i): walk(runner, place, texts[i], orders[i]) for w, place in places.items() for i in (0, 1)}
        before, chunks = held(), runner.stages[0].chunks
        assert chunks is not None, f"no step of {name} in {scheme} is recorded here"
        errors: dict[str, float] = {}
        first: dict[tuple[str, int], Tensor] = {}
        same = True
        for turn in ("seen", "recorded", "replayed"):
            for (w, i), logits in want.items():
                got = walk(runner, places[w], texts[i], orders[i])
                apart = (got.double() - logits.double()).norm(dim=-1) / logits.double().norm(dim=-1)
                errors[f"{turn}, {w}, {i}"] = float(apart.median() if any(x.mlp.moe for x in spec.layers) else apart.max())
                same &= turn == "seen" or torch.equal(got, first[w, i])
                first.setdefault((w, i), got)
        after, planned = held(), p.total_bytes
        row = {
            "model": name, "weights": scheme, "layers": len(spec.layers), "tokens": context - 1, "relative_errors": errors,
            "right": max(errors.values()) < bound(spec, scheme), "replays_are_alike": same, "graphs": len(chunks.graphs),
            "grown_bytes": {k: after[k] - before[k] for k in before}, "planned": planned, "allocated": runner.allocated_bytes,
            "peak": runner.peak_bytes,
        }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
        del runner, chunks
        gc.collect()
    return rows


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    out: dict[str, Any] = about.card() | {"python": platform.python_version()}
    for part in (families, embedded, prompts):
        if part.__name__ in (sys.argv[2:] or part.__name__):
            out[part.__name__] = part()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
