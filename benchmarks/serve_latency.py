"""What a served model makes its clients wait for, over HTTP, beside llama-server on the same file where that is at hand.

    python benchmarks/serve_latency.py [--llama-server PATH] [--rounds 5] [--seconds 10] [--quick] [--only turns,...] [OUT.json]

turns       the first token of a conversation's second turn, and of its first, with 16K tokens
prefill     tokens per second of a stream while a prompt of 32K tokens comes in, and alone
tokens      time between two tokens of one stream, and of the same tokens in a process without a server
streams     sixteen streams: the slowest and the median
first       the first event of a new request beside 0, 16, 64 and 200 others, and of so many that come at once

The embedded model on the CPU. Arrivals are the kernel's, so no client's own delay counts. Rivals take turns, round after round;
before they are timed, the server's tokens are compared with the library's. `--quick`: a sixteenth of the lengths.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import served
from served import PATHS, Answer, Exchange, Server, Violation, ask, body, post

NEVER = {"1": -100, "6": -100, "11": -100}  # the model's end tokens: an answer is as long as it may be
MODULES = ("argparse", "tarfile", "typing", "inspect", "doctest", "mailbox", "turtle")
OTHERS = (0, 16, 64, 200)
PROBED = ("responses", "chat", "messages", "ollama")


def texts(tokenizer: Any, n_tokens: int, seed: int) -> str:
    """So many tokens of this Python's standard library, beginning with a number that no other text begins with."""
    source = "".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)
    ids = tokenizer.encode(f"{seed} {source}", add_bos=False)
    return tokenizer.decode((ids * (1 + n_tokens // len(ids)))[:n_tokens])


def ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    return {"median_ms": ms(statistics.median(values)), "least_ms": ms(min(values)), "most_ms": ms(max(values)), "n": len(values)}


@contextlib.contextmanager
def llama_server(binary: str, slots: int, context: int) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [binary, "-m", served.model_file(), "--port", str(port), "-c", str(context * slots), "-np", str(slots)]
    server = Server([*words, "--threads", str(multiprocessing.cpu_count())], url=f"http://127.0.0.1:{port}")
    try:
        yield server
    finally:
        server.stop()


def turns(rivals: dict[str, Server], tokenizer: Any, n_tokens: int, rounds: int) -> dict[str, Any]:
    first: dict[str, list[Answer]] = {who: [] for who in rivals}
    second: dict[str, list[Answer]] = {who: [] for who in rivals}
    for i in range(rounds):
        for who, server in rivals.items():
            talk = [{"role": "user", "content": texts(tokenizer, n_tokens, i) + "\n\nWhat is this?"}]
            one = ask(server.address, "chat", body("chat", talk, max_tokens=48, stream=True, temperature=0))
            talk += [{"role": "assistant", "content": one.text}, {"role": "user", "content": "And what is missing?"}]
            two = ask(server.address, "chat", body("chat", talk, max_tokens=16, stream=True, temperature=0))
            first[who].append(one)
            second[who].append(two)
            print(f"turns, {who}: {one.first_token_s:.3f} s, then {two.first_token_s:.3f} s", file=sys.stderr, flush=True)
    return {
        who: {
            "prompt_tokens": first[who][0].prompt_tokens,
            "turn_1": spread([a.first_token_s for a in first[who]]),
            "turn_2": spread([a.first_token_s for a in second[who]]),
            "turn_2_prompt_tokens": second[who][0].prompt_tokens,
            "turn_2_cached_tokens": min(a.cached_tokens for a in second[who]),
            "ratio": round(statistics.median(ratios(first[who], second[who])), 4),
        }
        for who in rivals
    }


def ratios(first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
    return [b.first_token_s / a.first_token_s for a, b in zip(first, second, strict=True)]


def beside_prefill(rivals: dict[str, Server], tokenizer: Any, n_tokens: int, rounds: int) -> dict[str, Any]:
    """Of a stream that began before: frames in the middle of the time alone and in the time of the prefill."""
    found: dict[str, list[dict[str, float]]] = {who: [] for who in rivals}
    for i in range(rounds):
        for who, server in rivals.items():
            arrivals: list[float] = []
            asked = body("chat", f"Count to {i}.", max_tokens=6000, stream=True, temperature=0.7, seed=i) | {"logit_bias": NEVER}
            exchange = Exchange(server.address, post(PATHS["chat"], asked))

            thread = threading.Thread(target=follow, args=(exchange, arrivals), daemon=True)
            thread.start()
            while len(arrivals) < 20:
                time.sleep(0.05)
            time.sleep(3.0)
            large = body("chat", texts(tokenizer, n_tokens, 100 + i), max_tokens=1, stream=True, temperature=0)
            other = ask(server.address, "chat", large)
            came = other.arrivals[0] if other.arrivals else time.time()
            alone = [at for at in arrivals if at < other.sent][20:]
            during = [at for at in arrivals if other.sent <= at <= came]
            exchange.socket.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            exchange.close()
            row = {
                "prompt_tokens": other.prompt_tokens,
                "prefill_s": round(came - other.sent, 2),
                "alone_tok_s": round((len(alone) - 1) / (alone[-1] - alone[0]), 1),
                "during_tok_s": round(len(during) / (came - other.sent), 1),
                "longest_gap_ms": ms(max((b - a for a, b in itertools.pairwise(during)), default=math.nan)),
            }
            found[who].append(row)
            print(f"prefill, {who}: {row}", file=sys.stderr, flush=True)
    return {who: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for who, rows in found.items()}


def follow(exchange: Exchange, arrivals: list[float]) -> None:
    """Appends the arrival of each frame with text as it comes, until the connection is shut."""
    with contextlib.suppress(OSError, Violation):
        exchange.head()
        for at, frame in exchange.frames():
            if frame != "[DONE]" and frame["choices"] and frame["choices"][0]["delta"].get("content"):
                arrivals.append(at)


def tokens(rivals: dict[str, Server], llm: Any, n: int, rounds: int) -> dict[str, Any]:
    """Between two tokens of one stream; `library`: the same model, prompt and tokens in this process."""
    from headwise.text.demo import demo_prompt

    prompt = demo_prompt()[:2000]
    ids = llm.tokenize(prompt)
    asked = body("completions", prompt, max_tokens=n, stream=True, temperature=0)
    steps: dict[str, list[float]] = {"library": [], **{who: [] for who in rivals}}
    cpu = dict.fromkeys(("library", "server", "engine"), 0.0)  # seconds of a core, with the prompt's
    ours = rivals["headwise"]

    def used() -> dict[str, float]:
        return {"library": time.process_time(), "server": served.cpu_s(ours.pid), "engine": served.cpu_s(ours.engine())}

    for i in range(rounds + 1):
        before = used()
        said, times = decode(llm, ids, n)
        cpu["library"] += (used()["library"] - before["library"]) if i else 0.0
        if i:
            steps["library"] += times
        for who, server in rivals.items():
            before = used()
            answer = ask(server.address, "completions", asked)
            if who == "headwise" and i:
                cpu |= {key: cpu[key] + used()[key] - before[key] for key in ("server", "engine")}
            if who == "headwise" and not llm.tokenizer.decode(said).startswith(answer.text):
                raise SystemExit(f"refusing to time: the server says {answer.text!r}, the library {llm.tokenizer.decode(said)!r}")
            if i:  # the first is to warm up
                steps[who] += [b - a for a, b in itertools.pairwise(answer.arrivals)]
    out: dict[str, Any] = {who: spread(found) for who, found in steps.items()}
    for who in rivals:
        print(f"tokens, {who}: {out[who]}, library {out['library']}", file=sys.stderr, flush=True)
    out["cpu_ms"] = {who: ms(seconds / (rounds * n)) for who, seconds in cpu.items()}
    out["overhead_ms"] = round(out["headwise"]["median_ms"] - out["library"]["median_ms"], 2)
    return out


def decode(llm: Any, ids: list[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the seconds of each after the first."""
    runner = llm.runner
    runner.reset()
    said, times = [int(runner.logits(runner.prefill(ids))[0].argmax())], []
    for _ in range(n - 1):
        start = time.perf_counter()
        said.append(int(runner.logits(runner.step([said[-1]]))[0].argmax()))
        times.append(time.perf_counter() - start)
    return said, times


def streams(server: Server, tokenizer: Any, n_streams: int, n: int) -> dict[str, Any]:
    """All at once; a stream's rate is between its first and its last token."""
    answers: list[Answer] = []
    prompts = [texts(tokenizer, 100 + 10 * i, 200 + i) for i in range(n_streams)]

    def one(i: int) -> None:
        asked = body("chat", prompts[i], max_tokens=n, stream=True, temperature=0.7, seed=i)
        answers.append(ask(server.address, "chat", asked | {"logit_bias": NEVER, "user": str(i)}))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates = sorted(len(a.arrivals[1:]) / (a.arrivals[-1] - a.arrivals[0]) for a in answers)
    median = statistics.median(rates)
    out = {"streams": n_streams, "tokens": n, "slowest_tok_s": round(rates[0], 2), "median_tok_s": round(median, 2)}
    out |= {"fastest_tok_s": round(rates[-1], 2), "slowest_of_median": round(rates[0] / median, 3)}
    print(f"streams: {out}", file=sys.stderr, flush=True)
    return out


def others(address: tuple[str, int], n: int, going: Event, leave: Event, firsts: Any) -> None:
    """`n` clients in a process of their own, all beginning at one moment, each asking again and again."""
    threading.stack_size(512 * 1024)
    from headwise.text.demo import demo_prompt

    text, burst = demo_prompt(), []

    def client(number: int) -> None:
        draw = random.Random(number)
        going.wait()
        first = True
        while not leave.is_set():
            length, protocol = draw.choice((100, 400, 1500, 6000)), draw.choice(PROBED)
            start = draw.randrange(len(text) - length)
            asked = body(protocol, text[start : start + length], max_tokens=draw.choice((8, 32, 64)), stream=True, temperature=1.0)
            with Exchange(address, post(PATHS[protocol], asked)) as exchange:
                if exchange.head() != 200:
                    raise SystemExit("a request of the load was refused")
                for at, _ in exchange.frames():
                    if first:
                        burst.append(at - exchange.sent)
                        first = False
                    if leave.is_set():
                        break

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    leave.wait()
    firsts.put(sorted(burst))


def first_events(server: Server, seconds: float) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    rows = []
    for n in OTHERS:
        going, leave, firsts = context.Event(), context.Event(), context.Queue()
        process = context.Process(target=others, args=(server.address, n, going, leave, firsts), daemon=True)
        process.start()
        time.sleep(1.5)
        going.set()
        time.sleep(3.0 if n else 0.0)
        waits, until, i = [], time.time() + seconds, 0
        while time.time() < until:
            protocol = PROBED[i % len(PROBED)]
            i += 1
            with Exchange(server.address, post(PATHS[protocol], body(protocol, f"{i} is", max_tokens=8, stream=True))) as exchange:
                if exchange.head() != 200:
                    raise SystemExit("a request was refused")
                at, _ = next(exchange.frames())
                waits.append(at - exchange.sent)
            time.sleep(0.1)
        leave.set()
        burst = firsts.get(timeout=60)
        process.join(10)
        process.kill()
        row = {"beside": n, **spread(waits), "p99_ms": ms(sorted(waits)[int(0.99 * (len(waits) - 1))])}
        row |= {"at_once_median_ms": ms(statistics.median(burst)), "at_once_most_ms": ms(max(burst))} if burst else {}
        rows.append(row)
        print(f"first events: {row}", file=sys.stderr, flush=True)
        quiet(server)
    return rows


def quiet(server: Server) -> None:
    """Waits until nothing runs."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = server.gauges()
        if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
            return
        time.sleep(0.2)
    raise SystemExit("requests whose clients went away still run")


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the numbers must be, and are."""
    rows: list[tuple[str, float, float]] = []
    if found := result.get("turns"):
        rows.append(("first token of turn 2, of turn 1's", found["headwise"]["ratio"], 0.1))
    if found := result.get("tokens"):
        rows.append(("server's overhead per token, ms", found["overhead_ms"], 1.0))
    if found := result.get("streams"):
        rows.append(("median stream over the slowest", round(1 / found["slowest_of_median"], 3), 2.0))
    rows.append(("first event of a server's first request, ms", result["first_request_ms"], 100.0))
    for row in result.get("first", []):
        rows.append((f"first event beside {row['beside']} others, ms", row["most_ms"], 100.0))
    return [{"what": what, "value": value, "at_most": most, "met": value <= most} for what, value, most in rows]


def table(result: dict[str, Any]) -> str:
    lines = []
    for who, found in result.get("turns", {}).items():
        lines.append(
            f"turns    {who:13} {found['prompt_tokens']} tokens: {found['turn_1']['median_ms']:.0f} ms, turn 2 "
            f"{found['turn_2']['median_ms']:.0f} ms ({found['ratio']:.1%}), {found['turn_2_cached_tokens']} of "
            f"{found['turn_2_prompt_tokens']} cached"
        )
    for who, found in result.get("prefill", {}).items():
        lines.append(
            f"prefill  {who:13} {found['prompt_tokens']:.0f} tokens in {found['prefill_s']} s: {found['during_tok_s']} tok/s "
            f"beside it, {found['alone_tok_s']} alone, longest gap {found['longest_gap_ms']} ms"
        )
    for who, found in result.get("tokens", {}).items():
        if who == "cpu_ms":
            lines.append(f"tokens   a core's ms per token, with the prompt's: {found}")
        elif isinstance(found, dict):
            lines.append(f"tokens   {who:13} {found['median_ms']} ms between two")
    if found := result.get("streams"):
        lines.append(f"streams  {found}")
    lines += [f"first    {row}" for row in result.get("first", [])]
    for row in result["targets"]:
        lines.append(f"{'met   ' if row['met'] else 'MISSED'}   {row['what']}: {row['value']} (at most {row['at_most']})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load for `first`")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="turns,prefill,tokens,streams,first")
    args = parser.parse_args()
    only, part = args.only.split(","), 16 if args.quick else 1
    from headwise import LLM

    result = served.about()
    if args.llama_server:
        said = subprocess.run([args.llama_server, "--version"], capture_output=True, text=True)
        result["llama_server"] = (said.stdout + said.stderr).split("\n")[0].removeprefix("version: ")
    llm = LLM(device="cpu", context=4096, check=False)

    newest: list[float] = []  # seconds to the first event of a server's first request

    def rivals(slots: int, context: int, *words: str) -> contextlib.AbstractContextManager[dict[str, Server]]:
        @contextlib.contextmanager
        def both() -> Iterator[dict[str, Server]]:
            with contextlib.ExitStack() as stack:
                size = ["--context", str(context), "--slots", str(slots), *words]
                found = {"headwise": stack.enter_context(served.serving(*size))}
                if args.llama_server:
                    found["llama-server"] = stack.enter_context(llama_server(args.llama_server, slots, context))
                for who, server in found.items():
                    answer = ask(server.address, "chat", body("chat", "hello", max_tokens=8, stream=True))
                    if who == "headwise":
                        newest.append(answer.first_frame - answer.sent)
                yield found

        return both()

    with rivals(2, 36_864) as found:
        if "turns" in only:
            result["turns"] = turns(found, llm.tokenizer, 16_384 // part, args.rounds)
        if "prefill" in only:
            result["prefill"] = beside_prefill(found, llm.tokenizer, 32_768 // part, max(1, args.rounds // 2))
    if "tokens" in only:
        with rivals(1, 4096, "--no-speculate") as found:
            result["tokens"] = tokens(found, llm, 128, args.rounds)
    with served.serving("--context", "4096", "--slots", "16") as server:
        if "streams" in only:
            result["streams"] = streams(server, llm.tokenizer, 16, max(64, 256 // part))
        if "first" in only:
            result["first"] = first_events(server, args.seconds)
    result["first_request_ms"] = ms(max(newest))
    result["targets"] = targets(result)
    print(table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["met"] for row in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
