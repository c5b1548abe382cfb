"""One model over two uneven cards, of 12 and 24 GiB, beside the larger one alone.

    PYTHONPATH=.:tests python benchmarks/several_gpus.py OUT.json [PART ...]

Gemma 4's shapes with random weights: the logits of two cards against one; planned, allocated and peak bytes of each card, and what
PyTorch and the driver say of them; prefill and decode speed. The embedded model through `headwise run --gpu`, and tiny ones of
each kind (K = V in one tensor, shared caches with per-layer embeddings, experts). Needs two NVIDIA cards of any size.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import about
import torch
from torch import Tensor

from headwise import LLM, api
from headwise.attention.capability import DeviceKind
from headwise.bench.engine import measure, runner_for
from headwise.engine.devices import Seat, device_kind, keep_limit
from headwise.engine.runner import Runner
from headwise.planner.memory import Plan
from headwise.planner.quantise import weight_types
from headwise.spec import catalogue
from headwise.spec.kv import kv_format
from headwise.spec.layers import ModelSpec

GIB = 2**30
LIMITS = (12 * GIB, 24 * GIB)
FAMILIES = ("gemma4-31b", "gemma4-e2b", "gemma4-26b-a4b", "gpt-oss", "qwen3")
MODELS = (("gemma-4-31b", "q4_k_m"), ("gemma-4-e2b", "bf16"))
CONTEXT, CHUNK, LENGTHS = 20_480, 512, (512, 4096, 16_384)
CHECKED, DECODED = 1300, 4  # tokens of the prompt whose logits are compared, past a window, and tokens after it


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def families(cards: Sequence[str]) -> list[dict[str, Any]]:
    """Every tiny checkpoint in fp32 and, where its heads have kernels, bf16: two cards against one."""
    import tiny

    ids = torch.randint(1, 320, (83,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny.save(name, Path(folder))
            for dtype in ("f32", "bf16"):
                common: dict[str, Any] = {"context": 128, "chunk": 32, "dtype": dtype, "check": False}
                one, two = (LLM(Path(folder), device=d, **common) for d in (cards[0], cards))
                errors = {c: relative(two.logits(ids, chunk=c), one.logits(ids, chunk=c)) for c in (32, 7, 1)}
                same = all(d.planned_bytes == d.allocated_bytes for d in two.report().devices)
                layers = [len(d.layers) for d in two.report().devices]
                rows.append(
                    {"family": name, "dtype": dtype, "relative_error": errors, "layers": layers, "planned_is_allocated": same}
                )
        print(rows[-1], flush=True)
    return rows


def held(runner: Runner, p: Plan) -> dict[str, Any]:
    """Of each card: bytes planned, counted from live tensors, at the peak, by PyTorch, and by the driver with all processes."""
    cards = []
    for stage, planned in zip(runner.stages, p.stages, strict=True):
        row: dict[str, Any] = {
            "device": str(stage.device), "layers": [stage.layers.start, stage.layers.stop - 1], "planned": planned.total_bytes,
            "allocated": stage.allocated_bytes, "peak": stage.peak_bytes,
        }  # fmt: skip
        if stage.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(stage.device)
            row |= {
                "by_pytorch": torch.cuda.memory_allocated(stage.device) - stage.before_bytes,
                "reserved": torch.cuda.memory_reserved(stage.device), "by_driver": total - free,
            }  # fmt: skip
        cards.append(row)
    return {"cards": cards, "planned_is_allocated": all(c["planned"] == c["allocated"] for c in cards)}


def answers(runner: Runner, ids: Sequence[int]) -> Tensor:
    """Logits after a prompt in chunks and after each of a few tokens, recorded steps among them."""
    runner.reset()
    rows = [runner.logits(runner.prefill(ids[:CHECKED], chunk=min(CHUNK, CHECKED)))[0].float().cpu().clone()]
    for token in ids[CHECKED : CHECKED + DECODED]:
        rows.append(runner.logits(runner.step([token]))[0].float().cpu().clone())
    return torch.stack(rows)


def model(
    spec: ModelSpec, scheme: str, seats: Sequence[Seat], kind: DeviceKind, *, kv: str = "bf16", dtype: str = "bf16",
    context: int = CONTEXT, lengths: Sequence[int] = LENGTHS,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    fmt = kv_format(kv)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, spec.vocab_size, (max(*lengths, CHECKED + DECODED),), generator=generator).tolist()
    common: dict[str, Any] = {
        "context": context, "chunk": CHUNK, "kv": {"global": fmt, "sliding": fmt}, "dtype": dtype,
        "stored": weight_types(spec, scheme), "kind": kind, "device": seats[0].device,
    }  # fmt: skip
    logits: dict[str, Tensor] = {}
    for who, some in (("one card", seats[1:]), ("two cards", seats)):  # one: the larger
        start = time.perf_counter()
        runner, choices, p = runner_for(spec, seats=some, **common)
        ready = time.perf_counter() - start
        logits[who] = answers(runner, ids)
        speed = []
        for length in lengths if seats[0].device.type == "cuda" else ():
            prefill_s, decode_s = measure(runner, ids[:length], 3)
            speed.append({"tokens": length, "prefill_tok_s": length / prefill_s, "decode_tok_s": 1 / decode_s})
        row = {
            "model": spec.name, "weights": scheme, "who": who, "ready_s": ready, "speed": speed,
            "backends": sorted({c.backend.name for c in choices}), **held(runner, p),
        }  # fmt: skip
        if who == "two cards":
            names = ["rtx3060:12", "rtx4090:24"]
            named = api.plan(spec.name, context=context, ubatch=CHUNK, kv=kv, weights=scheme, gpus=names) if kv == "bf16" else p
            row |= {
                "relative_error": relative(logits[who], logits["one card"]),
                "same_best": bool((logits[who].argmax(-1) == logits["one card"].argmax(-1)).all()),
                "plan_of_names_is_this_plan": named.stages == p.stages,
            }
        rows.append(row)
        print(row, flush=True)
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def embedded(cards: Sequence[str]) -> dict[str, Any]:
    """`headwise run` in its own process, on one card and over two with limits."""
    found: dict[str, Any] = {}
    for gpus in cards:
        argv = [sys.executable, "-m", "headwise", "run", "--gpu", gpus, "--context", "2048", "--max-tokens", "48", "--json"]
        done = subprocess.run([*argv, "-p", "import os\n\n\ndef main("], capture_output=True, text=True, timeout=120)
        found[gpus] = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:] or done.stdout[-2000:]}
        print(gpus, str(found[gpus])[:1500], flush=True)
    tokens = [answer.get("tokens") for answer in found.values()]
    return found | {"same_tokens": tokens[0] is not None and all(t == tokens[0] for t in tokens)}


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    seats = [Seat(torch.device("cuda", i), limit) for i, limit in enumerate(LIMITS)]
    commit = about.commit()
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "peer_access": torch.cuda.can_device_access_peer(0, 1), "limits": LIMITS, "commit": {},
    }  # fmt: skip
    to, wanted = Path(sys.argv[1]), sys.argv[2:]
    if to.exists():  # other parts of an earlier run
        out = json.loads(to.read_text()) | {"date": out["date"]}
    for seat in seats:
        keep_limit(seat)
    kind = device_kind(seats[0].device)
    (large, q4), (small, floats) = MODELS
    parts: dict[str, Callable[[], object]] = {
        large: lambda: model(catalogue.spec(large), q4, seats, kind),
        "embedded": lambda: embedded(["0", "0:12GiB,1:24GiB"]),
        small: lambda: model(catalogue.spec(small), floats, seats, kind),
        "families": lambda: families(["cuda:0:12GiB", "cuda:1:24GiB"]),
    }
    for name, part in parts.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        out["commit"][name] = os.environ.get("COMMIT", commit)
        try:
            out[name] = part()
        except Exception as error:  # the other parts are still worth having
            out[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, out[name], flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        to.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
