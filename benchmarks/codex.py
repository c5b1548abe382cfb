"""The Codex CLI against `headwise serve` with the embedded model: every way in which Codex asks, and what came of it.

    npm install @openai/codex
    python benchmarks/codex.py node_modules/.bin/codex [OUT.json] [--attempts 20] [--context 32768]

Starts a server, writes Codex's settings by `headwise codex-config`, and runs `codex exec --json`, without a network: an answer, a
loop of tool calls, an answer held to a schema, `--oss` with both local providers, and a conversation that is resumed and then
compacted. A case passes when Codex ends its turn with no error item and a usage that can be true (a later request of a session
finds the earlier ones in the cache), and when what the case is about was seen. tiny-hybrid is asked as it was taught, but says what
it likes: where an answer runs into `--max-tokens`, or no tool is called, the case is tried again, at most `--attempts` times, and
every attempt is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from served import Server, about, serving

SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": ["bug", "feature", "question"]}},
    "required": ["label"],
    "additionalProperties": False,
}
# As in tiny-hybrid's training (tools/tiny_hybrid/corpus.py): a function to explain, a tool's description and its arguments.
EXPLAIN = "What does this function do?\n\n```python\ndef {name}(a, b):\n    return a {sign} b\n```"
CALL = "Runs a command in a PTY, returning output or a session ID for ongoing interaction. Use cmd = 'cat notes.txt'."
LIMIT_S = 600  # of one turn
OURS = "model metadata"  # Codex says of a model that it does not know that it has none: an item, and no error of the server


class Codex:
    """One CODEX_HOME and one folder to work in; `metrics` of the server are read around every turn."""

    def __init__(self, program: Path, folder: Path, server: Server, context: int) -> None:
        self.program, self.server = program, server
        self.home, self.work = folder / "home", folder / "work"
        self.work.mkdir()
        (self.work / "notes.txt").write_text("milk\n")
        words = ["codex-config", "--port", str(server.address[1]), "--context", str(context), "--write", str(self.home)]
        subprocess.run([sys.executable, "-m", "headwise", *words], check=True, capture_output=True)

    def turn(self, *words: str, **env: str) -> dict[str, Any]:
        """The events of one `codex exec --json` that matter, its seconds, and the requests that the server had of it."""
        before, start = self.requests(), time.perf_counter()
        command = [str(self.program), "exec", "--skip-git-repo-check", "--json", *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=self.work, timeout=LIMIT_S,
                env=os.environ | {"CODEX_HOME": str(self.home)} | env,
            )  # fmt: skip
            lines, code = done.stdout.splitlines(), done.returncode
        except subprocess.TimeoutExpired as late:
            lines, code = str(late.stdout or b"", "utf-8", "replace").splitlines(), -1
        events = [json.loads(line) for line in lines if line.startswith("{")]
        items = [e["item"] for e in events if e["type"] == "item.completed"]
        errors = [e.get("message") or e["error"]["message"] for e in events if e["type"] in ("error", "turn.failed")]
        errors += [i["message"] for i in items if i["type"] == "error" and OURS not in i["message"].lower()]
        usages = [e["usage"] for e in events if e["type"] == "turn.completed"]
        return {
            "exit": code,
            "seconds": round(time.perf_counter() - start, 1),
            "requests": self.requests() - before,
            "items": [i["type"] for i in items],
            "errors": sorted(set(errors)),
            "usage": usages[-1] if usages else None,
            "thread": next((e["thread_id"] for e in events if e["type"] == "thread.started"), None),
            "said": next((i["text"] for i in reversed(items) if i["type"] == "agent_message"), ""),
        }

    def requests(self) -> int:
        lines = self.server.get("/metrics").splitlines()
        return round(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:request_success_total")))


def ended(turn: dict[str, Any]) -> bool:
    usage = turn["usage"]
    true = usage and usage["output_tokens"] > 0 and 0 <= usage["cached_input_tokens"] <= usage["input_tokens"]
    return turn["exit"] == 0 and not turn["errors"] and bool(true)


def answer(codex: Codex) -> tuple[bool, dict[str, Any]]:
    turn = codex.turn(EXPLAIN.format(name="add", sign="+"))
    return ended(turn) and "agent_message" in turn["items"], turn


def tools(codex: Codex) -> tuple[bool, dict[str, Any]]:
    """A request more than the first: Codex ran the call and sent its output."""
    turn = codex.turn(CALL, "--sandbox", "read-only")
    usage = turn["usage"]
    return ended(turn) and turn["requests"] > 1 and usage["cached_input_tokens"] > 0.4 * usage["input_tokens"], turn


def schema(codex: Codex) -> tuple[bool, dict[str, Any]]:
    path = codex.work / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    turn = codex.turn("Classify: the app crashes when I click save", "--output-schema", str(path))
    try:
        valid = json.loads(turn["said"])["label"] in SCHEMA["properties"]["label"]["enum"]
    except (ValueError, KeyError, TypeError):
        valid = False
    return ended(turn) and valid, turn


def oss(provider: str) -> Callable[[Codex], tuple[bool, dict[str, Any]]]:
    def run(codex: Codex) -> tuple[bool, dict[str, Any]]:
        words = ("--oss", "--local-provider", provider, "-m", "tiny-hybrid", EXPLAIN.format(name="add", sign="+"))
        turn = codex.turn(*words, CODEX_OSS_BASE_URL=f"{codex.server.url}/v1")
        return ended(turn), turn

    return run


def compacted(codex: Codex) -> tuple[bool, dict[str, Any]]:
    """Three turns of one session, the last with a limit that the history is past: Codex asks for a summary first."""
    first = codex.turn(EXPLAIN.format(name="add", sign="+"))
    if not ended(first):
        return False, first
    second = codex.turn("resume", first["thread"], EXPLAIN.format(name="subtract", sign="-"))
    if not ended(second):
        return False, second
    read, cached = (second["usage"][key] - first["usage"][key] for key in ("input_tokens", "cached_input_tokens"))  # of the session
    found = cached / read
    past = read // max(1, second["requests"]) // 2
    ask = EXPLAIN.format(name="multiply", sign="*")
    third = codex.turn("resume", "-c", f"model_auto_compact_token_limit={past}", first["thread"], ask)
    third |= {"resumed_cached": round(found, 3)}
    return ended(third) and third["requests"] > 1 and found > 0.9, third


CASES: dict[str, Callable[[Codex], tuple[bool, dict[str, Any]]]] = {
    "an answer": answer,
    "a loop of tool calls": tools,
    "--output-schema": schema,
    "--oss, ollama": oss("ollama"),
    "--oss, lmstudio": oss("lmstudio"),
    "resumed, then compacted": compacted,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codex", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--attempts", type=int, default=20)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--max-tokens", type=int, default=1500, help="where an answer that does not end is cut, and the turn fails")
    args = parser.parse_args()
    program = args.codex.absolute()
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    cases: dict[str, Any] = {}
    with serving("--context", str(args.context), "--max-tokens", str(args.max_tokens)) as server:
        for name, case in CASES.items():
            tried: list[dict[str, Any]] = []
            passed = False
            while not passed and len(tried) < args.attempts:
                with tempfile.TemporaryDirectory() as folder:
                    passed, turn = case(Codex(program, Path(folder), server, args.context))
                tried.append({k: v for k, v in turn.items() if k != "thread"} | {"said": turn["said"][:200]})
                print(f"{name}: {'passed' if passed else 'not yet'} in {turn['seconds']} s; {turn['errors']}", file=sys.stderr)
            cases[name] = {"passed": passed, "attempts": tried}
    result = about() | {"codex": version, "context": args.context, "cases": cases}
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text if not args.out else "\n".join(f"{name}: {'passed' if c['passed'] else 'FAILED'}" for name, c in cases.items()))
    return 0 if all(c["passed"] for c in cases.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
