"""Does `run` on CUDA compute what transformers computes, and is the plan the allocation there too?

    PYTHONPATH=.:tests python benchmarks/cuda_check.py [OUT.json]

For every family's tiny checkpoint: logits in fp32 against transformers on the CPU (whole prompt, odd chunks, token by
token), planned against allocated bytes. Then the embedded model in bf16 and with each KV type: self-check, planned,
allocated and peak bytes, prefill and decode speed.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import about
import tiny
import torch

from headwise import LLM
from headwise.text.demo import demo_prompt


def families() -> list[dict[str, object]]:
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


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    commit = about.commit()
    out = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
        "date": time.strftime("%Y-%m-%d"), "families": families(), "embedded": embedded(),
    }  # fmt: skip
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
