"""From the start of the process to the first token, with empty caches and with those that a first start has left; host memory.

    python benchmarks/start.py [MODEL] [--device cpu|cuda] [--context N] [--starts 3] [--out OUT.json]

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
llm = LLM(sys.argv[1] or None, device=sys.argv[2], context=int(sys.argv[3]))
told["ready"] = time.time()
next(iter(llm.stream(list(range(5, 13)), max_tokens=2)))
told["first_token"] = time.time()
told["device"] = llm.where
told["allocated_bytes"] = llm.runner.allocated_bytes
told["planned_bytes"] = llm.plan.total_bytes
print(json.dumps(told))
"""


def held_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def start(model: str, device: str, context: int, caches: Path) -> dict[str, Any]:
    """One start; seconds since before the process began."""
    env = os.environ | {
        "XDG_CACHE_HOME": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
    }
    peak, begin = 0, time.time()
    child = subprocess.Popen([sys.executable, "-c", CHILD, model, device, str(context)], env=env, stdout=subprocess.PIPE, text=True)
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
        "planned_bytes": told["planned_bytes"], "allocated_bytes": told["allocated_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="", help="a file or directory; default the embedded model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": about.commit(),
        "torch": torch.__version__, "headwise": headwise.__version__, "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "model": Path(args.model).name or "tiny-hybrid", "device": args.device, "context": args.context, "rows": [],
    }  # fmt: skip
    for _ in range(args.starts):
        with tempfile.TemporaryDirectory() as caches:
            for kind in ("cold", "warm"):
                row = {"caches": kind} | start(args.model, args.device, args.context, Path(caches))
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
    result["machine"] = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
