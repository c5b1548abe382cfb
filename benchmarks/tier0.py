"""Small jobs for a local model: classify, route, summarise, each answer held to a schema; latency, and how many were valid.

    headwise serve --context 16384 --max-tokens 400
    python benchmarks/tier0.py [--url http://127.0.0.1:7433] [--rounds 3] [--codex codex] [OUT.json]

By chat completions with `response_format` of type json_schema, every job with every text and another seed each round; and, with
--codex, by `codex exec --output-schema`, every text once. Answers are checked by jsonschema_rs (pip install jsonschema_rs), which
shares no code with the server. Whether an answer is right is not measured here: the embedded model is not made for these jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs

import headwise

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": (
        "Classify this report of a user.",
        {
            "type": "object",
            "properties": {
                "label": {"type": "string", "enum": ["bug", "feature", "question", "security"]},
                "severity": {"type": "string", "enum": ["low", "medium", "high"]},
            },
            "required": ["label", "severity"],
            "additionalProperties": False,
        },
    ),
    "route": (
        "Say who should do this task: the small model on this machine, the large one, or a person.",
        {
            "type": "object",
            "properties": {
                "to": {"type": "string", "enum": ["small", "large", "person"]},
                "reason": {"type": "string", "maxLength": 100},
            },
            "required": ["to", "reason"],
            "additionalProperties": False,
        },
    ),
    "summarise": (
        "Summarise this text: a title, and one to three points.",
        {
            "type": "object",
            "properties": {
                "title": {"type": "string", "maxLength": 60},
                "points": {"type": "array", "items": {"type": "string", "maxLength": 80}, "minItems": 1, "maxItems": 3},
            },
            "required": ["title", "points"],
            "additionalProperties": False,
        },
    ),
}
TEXTS = (
    "The app crashes when I click Save twice. It began with version 2.3.",
    "Please add a dark theme; the white background hurts at night.",
    "How do I change the port of the server?",
    "Anyone who knows the URL can read the invoices of other customers.",
    "Rename the function parse_date to read_date in all files and run the tests.",
    "We moved the nightly job from cron to systemd timers. It failed twice since: once because the disk was full, once because the "
    "network came up late. The unit now waits for network-online.target, and old archives are deleted after 30 days.",
)


def ask(url: str, model: str, job: str, text: str, seed: int) -> tuple[float, str, dict[str, int]]:
    """Seconds, the answer, and its usage."""
    instruction, schema = JOBS[job]
    body = {
        "model": model,
        "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": text}],
        "response_format": {"type": "json_schema", "json_schema": {"name": job, "strict": True, "schema": schema}},
        "max_tokens": 200,
        "seed": seed,
    }
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:
        said = json.load(answer)
    return time.perf_counter() - start, said["choices"][0]["message"]["content"], said["usage"]


def ask_codex(codex: str, home: Path, job: str, text: str) -> tuple[float, str, str]:
    """Seconds, the last message of `codex exec --output-schema`, and what went wrong."""
    instruction, schema = JOBS[job]
    schema_file, last = home / f"{job}.json", home / "last.txt"
    schema_file.write_text(json.dumps(schema))
    last.unlink(missing_ok=True)
    words = [
        codex,
        "exec",
        "--skip-git-repo-check",
        "--output-schema",
        str(schema_file),
        "-o",
        str(last),
        f"{instruction}\n\n{text}",
    ]
    env = os.environ | {"CODEX_HOME": str(home)}
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=home, env=env, timeout=600)
    seconds = time.perf_counter() - start
    said = last.read_text() if last.exists() else ""
    return seconds, said, "" if done.returncode == 0 else (done.stderr or done.stdout)[-500:]


def valid(job: str, said: str) -> bool:
    try:
        return jsonschema_rs.validator_for(JOBS[job][1]).is_valid(json.loads(said))
    except ValueError:
        return False


def by_chat(url: str, model: str, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for job in JOBS:
        seconds, tokens, prompt, good, example = [], [], [], 0, ""
        for seed in range(rounds):
            for text in TEXTS:
                s, said, usage = ask(url, model, job, text, seed)
                seconds.append(s)
                tokens.append(usage["completion_tokens"])
                prompt.append(usage["prompt_tokens"])
                good += valid(job, said)
                example = example or said
        found[job] = _row(seconds, good) | {
            "prompt_tokens": statistics.median(prompt),
            "tokens": statistics.median(tokens),
            "example": example,
        }
        print(f"chat {job}: {good} of {len(seconds)} valid, median {found[job]['median_s']} s", file=sys.stderr)
    return found


def by_codex(url: str, model: str, codex: str, context: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        port = str(urlsplit(url).port)
        words = ["codex-config", "--model", model, "--port", port, "--context", str(context), "--write", folder]
        subprocess.run([sys.executable, "-m", "headwise", *words], check=True, capture_output=True)
        for job in JOBS:
            seconds, good, example, errors = [], 0, "", []
            for text in TEXTS:
                s, said, wrong = ask_codex(codex, home, job, text)
                seconds.append(s)
                good += not wrong and valid(job, said)
                example = example or said
                errors += [wrong] if wrong else []
            found[job] = _row(seconds, good) | {"example": example} | ({"errors": errors} if errors else {})
            print(f"codex {job}: {good} of {len(seconds)} valid, median {found[job]['median_s']} s {errors}", file=sys.stderr)
    return found


def _row(seconds: list[float], good: int) -> dict[str, Any]:
    return {
        "answers": len(seconds),
        "valid": good,
        "median_s": round(statistics.median(seconds), 2),
        "least_s": round(min(seconds), 2),
        "most_s": round(max(seconds), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:7433")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codex", help="the codex to run; without it, chat alone")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models", timeout=30) as answer:
        first = json.load(answer)["data"][0]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "headwise": headwise.__version__,
        "torch": metadata.version("torch"),
        "llguidance": metadata.version("llguidance"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shared",
        "model": first["id"],
        "context": first["max_model_len"],
        "chat": by_chat(args.url, first["id"], args.rounds),
    }
    if args.codex:
        version = subprocess.run([args.codex, "--version"], capture_output=True, text=True).stdout.split()[-1:]
        answers = by_codex(args.url, first["id"], args.codex, first["max_model_len"])
        result["codex"] = {"version": "".join(version)} | answers
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    rows = [row for way in ("chat", "codex") for row in result.get(way, {}).values() if isinstance(row, dict)]
    return 0 if all(row["valid"] == row["answers"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
