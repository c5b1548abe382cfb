"""Does the doctor tell a healthy llama-server from a broken one? Misconfigurations of a live server, truth against verdict.

    python benchmarks/doctor_matrix.py LLAMA_SERVER RPC_SERVER [OUT.json]

Each case starts llama-server on the embedded model twice with the same settings: once with GGML_SCHED_DEBUG=2 and -v, whose dump
of every attention node's device is the truth (read here, not by the doctor), and once with -lv 4 (or the default), whose log is
all that the doctor sees. There is no GPU here: the device is llama.cpp's RPC backend, which offloads layers as a card does. A
card without a kernel is that backend with `supports_op` returning false for FLASH_ATTN_EXT of a head size (NO_FA_HEAD) or a KV
type (NO_FA_TYPE), a patch of five lines.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from importlib import resources
from pathlib import Path

import about

from headwise.doctor.diagnose import diagnose
from headwise.spec.read import open_model

RPC, PORT = 50_199, 18_199
WAIT_S = 60


@dataclass(frozen=True)
class Case:
    name: str
    args: str
    env: dict[str, str] = field(default_factory=dict)
    gpu: bool = True
    quiet: bool = False


NO_512, NO_256 = {"NO_FA_HEAD": "512"}, {"NO_FA_HEAD": "256"}
CASES = (
    Case("healthy", "-ngl 99"),
    Case("healthy, -fa on", "-ngl 99 -fa on"),
    Case("healthy, q8_0 cache", "-ngl 99 -ctk q8_0 -ctv q8_0"),
    Case("healthy, q8_0 K alone", "-ngl 99 -ctk q8_0"),
    Case("healthy, one slot", "-ngl 99 -np 1 -fa on"),
    Case("healthy, 8 slots of their own", "-ngl 99 -np 8 -c 8192"),
    Case("healthy, small batches", "-ngl 99 -ub 128 -fa on"),
    Case("healthy, log of the default verbosity", "-ngl 99", quiet=True),
    Case("--swa-full", "-ngl 99 --swa-full"),
    Case("no kernel at 512, -fa auto", "-ngl 99", NO_512),
    Case("no kernel at 512, -fa on", "-ngl 99 -fa on", NO_512),
    Case("no kernel at 512, q8_0 cache (the probe is skipped)", "-ngl 99 -ctk q8_0 -ctv q8_0", NO_512),
    Case("no kernel at 512, log of the default verbosity", "-ngl 99 -fa on", NO_512, quiet=True),
    Case("no kernel at 256, -fa on", "-ngl 99 -fa on", NO_256),
    Case("no kernel at 256, -fa auto", "-ngl 99", NO_256),
    Case("no kernel for iq4_nl", "-ngl 99 -ctk iq4_nl -ctv iq4_nl", {"NO_FA_TYPE": "iq4_nl"}),
    Case("no kernel for q4_0, -fa on", "-ngl 99 -fa on -ctk q4_0 -ctv q4_0", {"NO_FA_TYPE": "q4_0"}),
    Case("flash attention off", "-ngl 99 -fa off"),
    Case("flash attention off, q8_0 K", "-ngl 99 -fa off -ctk q8_0"),
    Case("flash attention off, q8_0 V (refused)", "-ngl 99 -fa off -ctk q8_0 -ctv q8_0"),
    Case("6 of 11 layers on the GPU", "-ngl 6"),
    Case("6 of 11 layers on the GPU, -fa on", "-ngl 6 -fa on"),
    Case("no layer on the GPU", "-ngl 0"),
    Case("cache in host memory", "-ngl 99 -nkvo"),
    Case("cache in host memory, -fa on", "-ngl 99 -nkvo -fa on"),
    Case("no GPU backend", "", gpu=False),
    Case("no GPU backend, -fa off", "-fa off", gpu=False),
    Case("no GPU backend, -ngl 99", "-ngl 99", gpu=False),
    Case("no GPU backend, --swa-full, 8 slots", "--swa-full -np 8", gpu=False),
)


def log(server: str, case: Case, *, truth: bool) -> bytes:
    """What the server prints until it answers, or ends."""
    loud = ["-v"] if truth else [] if case.quiet else ["-lv", "4"]
    argv = [server, "-m", str(resources.files("headwise").joinpath("data/tiny-hybrid.gguf")), "--port", str(PORT), "-t", "1", *loud]
    argv += ([] if "-c " in case.args else ["-c", "4096"]) + (["--rpc", f"127.0.0.1:{RPC}"] if case.gpu else []) + case.args.split()
    env = os.environ | case.env | ({"GGML_SCHED_DEBUG": "2"} if truth else {})
    with open("server.log", "w+b") as out:
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + WAIT_S
        while process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
        process.terminate()
        process.wait(20)
        out.seek(0)
        return out.read()


def truth(dump: bytes, sliding: list[bool]) -> dict[str, str] | None:
    """The worst of each kind of layer: materialised, then offloaded, then fused; None where no graph was made.

    A probe's graph comes first: the last device of a node counts, and a softmax in any graph means that there is no fused one.
    """
    device: dict[int, str] = {}
    softmax: set[int] = set()
    for line in dump.decode(errors="replace").splitlines():
        if found := re.search(r"node #\s*\d+ \(FLASH_ATTN\):\s+\S+ \(.*?\) \[\s*(\w+)", line):
            layer = re.search(r"Qcur_pos-(\d+)", line) or re.search(r"cache_k_l(\d+)", line)
            if layer:
                device[int(layer[1])] = found[1]
        elif found := re.search(r"node #\s*\d+ \(\s*SOFT_MAX\):\s+kq_soft_max-(\d+)", line):
            softmax.add(int(found[1]))
    if not device and not softmax:
        return None
    verdict: dict[str, str] = {}
    for kind in ("sliding", "global"):
        mine = [i for i, s in enumerate(sliding) if s == (kind == "sliding")]
        off = sum(device.get(i, "").startswith("CPU") for i in mine)
        verdict[kind] = "materialised" if softmax & set(mine) else "fused" if not off else (
            "offloaded" if off == len(mine) else f"offloaded ({off} of {len(mine)})")  # fmt: skip
    return verdict


def said(text: bytes) -> tuple[dict[str, str], str, list[str]]:
    """The doctor's verdict of each kind, of the KV type, and the checks that it found."""
    d = diagnose(io.BytesIO(text), "server.log")
    out: dict[str, str] = {}
    for kind in ("sliding", "global"):
        mine = [v for v in d.layers if v.kind in (kind, "all")]
        verdicts = {v.verdict for v in mine}
        if verdicts == {"fused", "offloaded"}:
            off = sum(v.count or 0 for v in mine if v.verdict == "offloaded")
            out[kind] = f"offloaded ({off} of {sum(v.count or 0 for v in mine)})"
        else:
            out[kind] = "/".join(sorted(verdicts))
    return out, d.kv.verdict, sorted(f.id for f in d.findings if f.severity != "note")


def main(server: str, rpc: str, out: str | None) -> int:
    spec = open_model(None, env=os.environ).spec
    sliding = [x.kind == "sliding" for x in spec.layers]
    remote = subprocess.Popen([rpc, "-p", str(RPC), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, matrix = [], Counter[tuple[str, str]]()
    try:
        time.sleep(1)
        for case in CASES:
            want = truth(log(server, case, truth=True), sliding)
            verdict, kv, found = said(log(server, case, truth=False))
            for kind in ("sliding", "global"):
                matrix[(want or {}).get(kind, "no graph").split(" (")[0], verdict[kind].split(" (")[0]] += 1
            seen = {"truth": want, "verdict": verdict, "kv": kv, "checks": found}
            rows.append({"case": case.name, "args": case.args, "env": case.env} | seen)
            print(f"{case.name:<52} {want}  {verdict}  {kv}  {' '.join(found)}", flush=True)
    finally:
        remote.kill()
        Path("server.log").unlink(missing_ok=True)
    false_fused = sum(n for (want, got), n in matrix.items() if got == "fused" and want != "fused")
    version = subprocess.run([server, "--version"], capture_output=True, text=True).stderr.splitlines()[:1]
    commit = about.commit()
    result = {"date": str(date.today()), "commit": commit, "server": version, "false_fused": false_fused, "cases": rows,
              "matrix": [{"truth": a, "verdict": b, "n": n} for (a, b), n in sorted(matrix.items())]}  # fmt: skip
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("false_fused", "matrix")}))
    return 1 if false_fused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
