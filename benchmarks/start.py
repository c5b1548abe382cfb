"""From the start of the process to the first token, with empty caches and with those that a first start has left; host memory.

    python benchmarks/start.py [MODEL] [--device cpu|cuda] [--context N] [--kv TYPE] [--starts 3] [--out OUT.json]

MODEL is a file or a directory, or `random:NAME:WEIGHTS`: a GGUF of a catalogue model's true shape with random weights, made first
on the card and kept in memory (tests/ on the path).

Each start is a process of its own, which imports, plans, checks its kernels, loads and says one token after a short prompt. Cold:
the directories of compiled kernels and of self-checks are new ones. The file itself may lie in the page cache, as it does after a
download. Host memory is what is not backed by a file (RssAnon and RssShmem), looked at every few milliseconds from outside; on the
CPU the weights and the cache are part of it, so what the model holds there is told beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import about
import torch

import headwise

POLL_S = 0.004
LIMIT_S = 1800.0
CHILD = """
import json, sys, time
told = {}
from headwise import LLM
told["imported"] = time.time()
llm = LLM(sys.argv[1] or None, device=sys.argv[2], context=int(sys.argv[3]), kv=sys.argv[4] or None)
told["ready"] = time.time()
next(iter(llm.stream(list(range(5, 13)), max_tokens=2)))
told["first_token"] = time.time()
told["device"] = llm.where
told["allocated_bytes"] = llm.runner.allocated_bytes
told["planned_bytes"], told["peak_bytes"] = llm.plan.total_bytes, llm.runner.peak_bytes
if llm.device.type == "cuda":
    import torch
    free, total = torch.cuda.mem_get_info(llm.device)
    told["device_used_bytes"] = total - free
print(json.dumps(told))
"""


def held_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def random_file(name: str, weights: str, folder: Path) -> Path:
    """A GGUF of the model's true shape."""
    import llamacpp

    from headwise.bench.engine import in_bf16, plan_for
    from headwise.engine.devices import Seat
    from headwise.spec import catalogue

    spec, device = catalogue.spec(name), torch.device("cuda")
    _, p, _ = plan_for(spec, context=512, chunk=512, seats=[Seat(device)], **in_bf16(spec, weights, device))
    file = folder / f"{name}-{weights}.gguf"
    print(f"made {file.name} in {llamacpp.write(file, spec, p, device):.0f} s", flush=True)
    torch.cuda.empty_cache()
    return file


def start(model: str, device: str, context: int, kv: str, caches: Path) -> dict[str, Any]:
    """One start; seconds since before the process began."""
    env = os.environ | {
        "XDG_CACHE_HOME": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }
    peak, begin = 0, time.time()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, model, device, str(context), kv], env=env, stdout=subprocess.PIPE, text=True
    )
    while child.poll() is None:
        peak = max(peak, held_bytes(child.pid))
        if time.time() - begin > LIMIT_S:
            child.kill()
            raise SystemExit(f"no first token within {LIMIT_S:g} s")
        time.sleep(POLL_S)
    assert child.stdout is not None
    said = child.stdout.read().splitlines()
    if child.returncode or not said:
        raise SystemExit(f"the start failed with {child.returncode}")
    told = json.loads(said[-1])
    on_host = told["allocated_bytes"] if told["device"].startswith("cpu") else 0
    return {
        **{f"{what}_s": told[what] - begin for what in ("imported", "ready", "first_token")},
        "peak_host_bytes": peak, "model_on_host_bytes": on_host, "beside_model_bytes": peak - on_host,
        **{k: told[k] for k in ("planned_bytes", "allocated_bytes", "peak_bytes", "device_used_bytes") if k in told},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="", help="a file or directory; default the embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--kv", default="", help="type of the cache; default that of the activations")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": about.commit(),
        "torch": torch.__version__, "headwise": headwise.__version__, "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "model": Path(args.model).name or "tiny-hybrid", "device": args.device, "context": args.context, "kv": args.kv, "rows": [],
    }  # fmt: skip
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as made:
        _, name, weights = args.model.split(":") if args.model.startswith("random:") else ("", "", "")
        model = str(random_file(name, weights, Path(made))) if name else args.model
        for _ in range(args.starts):
            with tempfile.TemporaryDirectory() as caches:
                for kind in ("cold", "warm"):
                    row = {"caches": kind} | start(model, args.device, args.context, args.kv, Path(caches))
                    result["rows"].append(row)
                    print(json.dumps(row), flush=True)
    result["machine"] = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
