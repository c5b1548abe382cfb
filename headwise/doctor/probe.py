"""A running server at production-length prompts: does it answer, how fast, and does the speed stay on its line.

Every prompt is new (random words, so that no prefix cache helps), has the length asked for by the server's own tokenizer or
counts, carries a fact near its beginning and asks for it at its end.

**Slow or stuck.** The limit is on progress, not on time: chunks of the prompt that the server reports, its slots, its metrics,
or a token. A server that tells no progress gets a multiple of the time that shorter prompts predict.

**The line.** With attention fused on a GPU, prefill loses little speed with depth; where a layer's attention runs on the CPU,
each batch takes longer than the one before by the same amount, and the whole is quadratic. A token at depth d costs
b (1 + d / D): D is the depth at which a token costs twice the first one's. By operations it is 3,800 for a 0.6B model and
90,000 for Gemma 4 31B; with the global layers' attention on the CPU the 31B has 330 (ollama #15350: 2.64 s x batch index). A
point is `slow` below what `HEALTHY_DEPTH`, or a D computed from the model's own layers, allows by the factor `TOLERANCE`.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from headwise.doctor.finding import Evidence, Finding, worst_first
from headwise.doctor.servers import Clock, Counts, Server, ask, stream, tokenize, watch
from headwise.errors import ProbeError, UsageError
from headwise.hardware.usage import Usage
from headwise.planner.ceiling import Ceiling, weight_flops
from headwise.spec.layers import ModelSpec

Verdict = Literal["ok", "slow", "stuck", "failed"]
WORST: tuple[Verdict, ...] = ("failed", "stuck", "slow", "ok")
LENGTHS = (512, 2048, 8192, 32_768)
SHORTEST, LONGEST = 64, 16_777_216
N_PREDICT = 32
WARM_UP_WORDS = 96
STALL_S = 60.0  # without progress, where the user names no other limit and nothing suggests a longer one
LIMIT_S = 900.0  # for one prompt, whatever happens
BATCH = 2048  # llama-server's default: it reports progress once in so many tokens
PATIENCE = 10  # times what shorter prompts predict
HEALTHY_DEPTH = 2000
TOLERANCE = 1.5
BUSY_CPU = 50.0  # percent, before the first request
NOISE_S = 0.05  # a point that lost less than this against its line is not called slow
LEAST_EFFICIENCY = 4  # attention may have so many times fewer operations a second than products (hd 512 on an H200: 5)
SMALL_CHUNK = 256  # tokens; the time of fewer is overhead
REPEAT_S = 60.0  # a slow point is measured again if it was shorter: a first shape may have been compiled
CEILING_SHARE = 0.05  # below this part of the card's prefill ceiling something is wrong
WORDS = (
    "apple river stone cloud bread chair light green table house window garden music paper water mountain bridge forest silver "
    "morning winter summer letter number circle square button engine pocket kitchen blanket candle ladder mirror needle orange "
    "pencil rabbit saddle ticket tunnel valley wagon yellow anchor basket copper desert eagle feather glass hammer island jacket "
    "kettle lemon marble nickel ocean pepper quarter ribbon sugar thunder uncle velvet whistle acorn barrel cotton dragon"
).split()
Progress = Callable[[str, int, int, float], None]  # label, prompt tokens done, of, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One length. Speeds are None where nothing was measured."""

    length: int
    prompt_tokens: int | None  # by the server's count; ours of its tokenizer where it gave none
    cached_tokens: int | None  # of them not computed; None where the server does not say
    ttft_s: float | None
    prefill_tok_s: float | None  # of the tokens that were not cached
    decode_tok_s: float | None
    verdict: Verdict
    recalled: bool | None  # the fact at the prompt's beginning was told at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of one prefill: depth before and after, seconds."""

    start: int
    end: int
    seconds: float

    @property
    def depth(self) -> float:
        return (self.start + self.end) / 2

    @property
    def tok_s(self) -> float:
        return (self.end - self.start) / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    server: Server
    points: tuple[Point, ...]
    chunks: tuple[tuple[Chunk, ...], ...]  # of each point
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of its points."""
        for verdict in WORST:
            if any(p.verdict == verdict for p in self.points):
                return verdict
        return "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What does not change between the lengths. Everything that touches the machine is here, so the tests replace it."""

    stall_s: float | None = None
    limit_s: float = LIMIT_S
    spec: ModelSpec | None = None  # of the served model, where known
    ceiling: Callable[[int], Ceiling | None] | None = None  # of the card, for a prompt of so many tokens
    usage: Callable[[], Usage] | None = None  # of the machine that serves
    progress: Progress = lambda *_: None
    clock: Clock = time.monotonic
    tick_s: float = 0.25
    entropy: Callable[[int], bytes] = os.urandom


@dataclass(slots=True)
class _Run:
    """What happened to one prompt."""

    sent: int | None  # tokens, where known before
    code: str
    exact: bool = False  # they are ids
    outcome: Literal["done", "stuck", "slow", "failed"] = "failed"
    why: str = ""
    ttft_s: float | None = None
    seconds: float = 0.0
    silent_s: float = 0.0  # at the end
    processed: int = 0
    text: str = ""
    tokens: int = 0
    last_token_s: float = 0.0
    counts: Counts = field(default_factory=Counts)
    marks: list[tuple[int, float]] = field(default_factory=list)  # prompt tokens done, seconds
    use: list[Usage] = field(default_factory=list)
    source: str = ""  # of progress


def probe(server: Server, lengths: Sequence[int], options: Options = Options()) -> Probe:
    """Every length in turn, shortest first; a length that fails does not end the probe.

    Raises:
        UsageError: a length out of range.
    """
    for n in lengths:
        if not SHORTEST <= n <= LONGEST:
            raise UsageError(f"length {n}", why=f"lengths are {SHORTEST} to {LONGEST:,} tokens", do="--lengths 512,2048,8192")
    lengths = sorted(set(lengths))
    desk = _Desk(server, options, num_ctx(server, max(lengths)))
    findings = [*desk.reload_note()]
    desk.look_around()
    desk.warm_up()
    runs: list[_Run] = []
    points: list[Point] = []
    chunks: list[tuple[Chunk, ...]] = []
    depth = healthy_depth(options.spec)
    for n in lengths:
        run = desk.length(n)
        point, parts = _point(n, run), _chunks(run)
        slow = off_the_line([*points, point], [*chunks, parts], depth)
        if slow and run.outcome == "done" and point.ttft_s is not None and point.ttft_s < REPEAT_S:
            again = desk.length(n)
            if again.outcome == "done" and (again.ttft_s or math.inf) < point.ttft_s:
                run, point, parts = again, _point(n, again), _chunks(again)
                slow = off_the_line([*points, point], [*chunks, parts], depth)
        if slow and point.verdict == "ok":
            point = replace(point, verdict="slow")
        runs.append(run)
        points.append(point)
        chunks.append(parts)
        findings += _findings(server, point, run, parts, slow, options)
    findings += _recall(points) + _no_growth(points)
    findings += desk.findings
    return Probe(server=server, points=tuple(points), chunks=tuple(chunks), findings=worst_first(findings))


def lengths_that_fit(server: Server, lengths: Sequence[int]) -> list[int]:
    """Those of `lengths` that the server's context holds, with room for the answer; all where it does not say."""
    most = server.most_context or server.context
    return [n for n in lengths if most is None or n + N_PREDICT <= most] or list(lengths[:1])


def num_ctx(server: Server, longest: int) -> int | None:
    """The context to ask Ollama for: the one it runs with where that is enough, since another one reloads the model."""
    if server.engine != "ollama":
        return None
    need = -(-(longest + N_PREDICT + 64) // 1024) * 1024
    wanted = max(server.context or 0, need)
    return min(wanted, server.most_context) if server.most_context else wanted


def healthy_depth(spec: ModelSpec | None) -> float:
    """The D (module docstring) that is still healthy: for a known model from its operations, else HEALTHY_DEPTH."""
    if spec is None:
        return HEALTHY_DEPTH
    attention = sum(4 * layer.n_heads * layer.head_dim for layer in spec.layers if layer.window is None)
    return max(500.0, weight_flops(spec) / attention / LEAST_EFFICIENCY) if attention else math.inf


def off_the_line(points: Sequence[Point], chunks: Sequence[Sequence[Chunk]], depth: float) -> str:
    """Why the last point is slow; "" where it is not.

    Two tests, each against the best seen at a smaller depth: the speed of whole prompts, and that of the last third of the
    point's chunks, which shows growth even with a single length.
    """
    last = points[-1]
    if last.prefill_tok_s is None or not last.prompt_tokens:
        return ""
    whole = [(p.prompt_tokens / 2, p.prefill_tok_s) for p in points if p.prompt_tokens and p.prefill_tok_s]
    if why := _below(whole, last.prompt_tokens, depth, "prompts"):
        return why
    mine = chunks[-1]
    if len(mine) < 3:
        return ""
    tail = mine[-max(2, len(mine) // 3) :]
    merged = Chunk(start=tail[0].start, end=tail[-1].end, seconds=sum(c.seconds for c in tail))
    tokens = sum(c.end - c.start for c in tail)
    shallow = [(c.depth, c.tok_s) for run in chunks for c in run if c.end <= tail[0].start]
    return _below([*shallow, (merged.depth, tokens / merged.seconds)], tokens, depth, "chunks")


def _below(samples: Sequence[tuple[float, float]], tokens: int, depth: float, what: str) -> str:
    at, tok_s = samples[-1]
    if len(samples) < 2:
        return ""
    seen = max(((d, r) for d, r in samples[:-1]), key=lambda s: s[1] * _share(s[0], at, depth))
    allowed = seen[1] * _share(seen[0], at, depth)
    if tok_s * TOLERANCE >= allowed or tokens / tok_s - tokens / allowed < NOISE_S:
        return ""
    return (
        f"{tok_s:,.0f} tok/s for {what} at a mean depth of {at:,.0f} tokens, {seen[1]:,.0f} at {seen[0]:,.0f}: "
        f"{seen[1] / tok_s:.1f} times slower where {max(1.0, seen[1] / allowed):.1f} is healthy"
    )


def _share(shallow: float, deep: float, depth: float) -> float:
    return 1.0 if math.isinf(depth) else (depth + shallow) / (depth + deep)


def growth(chunks: Sequence[Chunk]) -> tuple[float, float] | None:
    """Seconds of a token at depth 0, and what each further token of depth adds: Theil and Sen's line, deaf to outliers."""
    if len(chunks) < 3:
        return None
    slopes = [
        (1 / b.tok_s - 1 / a.tok_s) / (b.depth - a.depth)
        for i, a in enumerate(chunks)
        for b in chunks[i + 1 :]
        if b.depth > a.depth
    ]
    if not slopes:
        return None
    slope = statistics.median(slopes)
    return statistics.median(1 / c.tok_s - slope * c.depth for c in chunks), slope


def compared(a: Probe, b: Probe) -> list[dict[str, float | int | None]]:
    """The first server's speed over the second's, per length that both have; above 1 the first is faster."""
    others = {p.length: p for p in b.points}

    def ratio(x: float | None, y: float | None) -> float | None:
        return x / y if x and y else None

    return [
        {
            "length": p.length,
            "ttft": ratio(others[p.length].ttft_s, p.ttft_s),
            "prefill": ratio(p.prefill_tok_s, others[p.length].prefill_tok_s),
            "decode": ratio(p.decode_tok_s, others[p.length].decode_tok_s),
        }
        for p in a.points
        if p.length in others
    ]


# --- the prompts ---


class _Desk:
    """One server, and what is known of it so far: tokens a word, seconds of shorter prompts, where progress is told."""

    def __init__(self, server: Server, options: Options, context: int | None) -> None:
        self.server, self.options, self.num_ctx = server, options, context
        self.random = random.Random(options.entropy(32))
        self.tokens_a_word = 1.4
        self.known: list[tuple[int, float]] = []  # prompt tokens, seconds to the first token
        self.source = ""
        self.findings: list[Finding] = []
        self.alone = True  # no request of ours was left behind, and nobody else's was noted

    def reload_note(self) -> list[Finding]:
        s = self.server
        if self.num_ctx is None or s.context is None or self.num_ctx == s.context:
            return []
        why = f"it runs with {s.context:,} tokens of context; the longest prompt asked for needs {self.num_ctx:,}"
        what = "Ollama reloads the model for this probe"
        return [Finding(id="probe.reload", severity="note", what=what, why=why, cure=f"--lengths up to {s.context - N_PREDICT}")]

    def warm_up(self) -> None:
        """Loads the model, and learns tokens a word and a first speed. Its failure is told by the points that follow."""
        if self.server.engine == "ollama":
            body = {"model": self.server.model, "prompt": "", "stream": False, "options": {"num_ctx": self.num_ctx}}
            try:
                ask(self.server.transport, "/api/generate", body, timeout_s=self.options.limit_s)
            except ProbeError:
                return
        prompt, sent, code = self._words(WARM_UP_WORDS)
        run = self.measure(prompt, sent, code, "warm-up", WARM_UP_WORDS * 2)
        if run.outcome == "failed" and self.server.engine in ("openai", "vllm"):
            self.server = replace(self.server, chat=True)
            if self.measure(prompt, sent, code, "warm-up", WARM_UP_WORDS * 2).outcome == "failed":
                self.server = replace(self.server, chat=False)

    def length(self, n: int) -> _Run:
        """One prompt of `n` tokens."""
        most = self.num_ctx or self.server.context
        if most is not None and n + N_PREDICT > most:
            return _Run(None, "", why=f"the server's context is {most:,} tokens, the prompt and its answer {n + N_PREDICT:,}")
        exact = None if self.server.chat else self._ids(n)
        prompt, sent, code = exact or self._words(max(8, round(n / self.tokens_a_word) - 30))
        before = watch(self.server)
        if before and before.running and self.alone:
            self._note_busy(before.running)
        run = self.measure(prompt, sent, code, f"{n:,} tokens", n)
        self.alone = self.alone and run.outcome == "done"
        after = watch(self.server) if before and before.cached is not None and run.counts.cached_tokens is None else None
        if before and after and before.cached is not None and after.cached is not None:
            cached = max(0, round(after.cached - before.cached))
            run.counts = replace(run.counts, cached_tokens=min(cached, run.counts.prompt_tokens or cached))
        return run

    def _text(self, n_words: int) -> tuple[str, str, str, str]:
        """Beginning, middle, end and the code. The first words differ from every other prompt's: nothing is in a cache."""
        code = str(self.random.randrange(10_000, 100_000))
        first = " ".join(self.random.choices(WORDS, k=8))
        words = " ".join(self.random.choices(WORDS, k=n_words))
        end = "\nQuestion: what is the vault code?\nAnswer: The vault code is"
        return f"{first}. The vault code is {code}. Remember it. Words follow:", f" {words}", end, code

    def _ids(self, n: int) -> tuple[list[int], int, str] | None:
        """A prompt of exactly `n` tokens, by the server's tokenizer; None where it tells none."""
        head, middle, end, code = self._text(n)  # a word is one token or more
        pieces = [tokenize(self.server, text, special=i == 0) for i, text in enumerate((head, middle, end))]
        first, filler, last = pieces
        if first is None or filler is None or last is None:
            return None
        ids = [*first, *filler[: max(0, n - len(first) - len(last))], *last]
        return ids, len(ids), code

    def _words(self, n_words: int) -> tuple[str, None, str]:
        head, middle, end, code = self._text(n_words)
        return head + middle + end, None, code

    def look_around(self) -> None:
        """Whether the machine works for others before the first request."""
        if self.options.usage is None:
            return
        self.options.usage()
        time.sleep(2 * self.options.tick_s)  # what is between two samples counts
        cpu = self.options.usage().cpu
        if cpu is not None and cpu >= BUSY_CPU:
            self._note("the machine is busy", f"its CPU was at {cpu:.0f} % before the first request")

    def _note_busy(self, running: int) -> None:
        self.alone = False
        self._note("the server works for others too", f"requests that were running before ours: {running}")

    def _note(self, what: str, why: str) -> None:
        cure = "probe again when it is idle: these speeds are shared"
        self.findings.append(Finding(id="probe.busy", severity="warning", what=what, why=why, cure=cure))

    # --- one measurement ---

    def _patience(self, n: int, gap_s: float) -> tuple[float, bool]:
        """Seconds without progress that make a prompt stuck; and whether they count from the beginning."""
        o = self.options
        times = [seconds * max(1.0, n / tokens) for tokens, seconds in self.known]
        if not self.source:
            return max(o.stall_s or STALL_S, PATIENCE * (times[-1] if times else 0.0)), True
        if o.stall_s is not None:
            return o.stall_s, False
        batch = max((seconds * max(1.0, min(n, BATCH) / tokens) for tokens, seconds in self.known), default=0.0)
        return max(STALL_S, 4 * gap_s, PATIENCE * batch), False

    def measure(self, prompt: str | list[int], sent: int | None, code: str, label: str, n: int) -> _Run:
        o, run = self.options, _Run(sent, code, isinstance(prompt, list))
        start = last = looked = o.clock()
        gap, mark = 0.0, ()
        o.progress(label, 0, sent or n, 0.0)
        events = stream(
            self.server, prompt, n_predict=N_PREDICT, num_ctx=self.num_ctx, limit_s=o.limit_s, tick_s=o.tick_s, clock=o.clock
        )
        try:
            for event in events:
                now = event.at - start
                forward = False
                if event.kind == "progress":
                    self.source = "prompt_progress"
                    if event.processed > run.processed or not run.marks:
                        forward = True
                        run.processed = event.processed
                        run.marks.append((event.processed, now if event.server_s is None else event.server_s))
                        o.progress(label, event.processed, event.total or n, now)
                elif event.kind == "token":
                    forward = True
                    run.ttft_s = now if run.ttft_s is None else run.ttft_s
                    run.tokens, run.last_token_s = run.tokens + 1, now
                    run.text = (run.text + event.text)[-4096:]
                    if run.tokens > 64 * N_PREDICT:
                        run.why = f"it went on after {run.tokens} tokens, {N_PREDICT} were asked for"
                        break
                elif event.kind == "done":
                    run.counts, run.outcome = event.counts, "done"
                    if run.ttft_s is None:
                        run.outcome, run.why = "failed", "it answered with no token"
                    self._learn(run, prompt)
                    break
                elif event.kind == "tick" and event.at - looked >= min(1.0, 4 * o.tick_s):
                    looked = event.at
                    if run.ttft_s is None and o.usage:
                        run.use.append(o.usage())
                    seen = watch(self.server) if self.source != "prompt_progress" else None
                    if seen:
                        self.source = "/slots" if self.server.engine == "llama.cpp" else "/metrics"
                        forward = bool(mark) and seen.mark != mark
                        mark = seen.mark or mark
                        if seen.processed is not None and seen.processed > run.processed:
                            run.processed = seen.processed
                            o.progress(label, seen.processed, n, now)
                if forward:
                    gap, last = max(gap, event.at - last), event.at
                patience, whole = self._patience(n, gap)
                run.seconds = o.clock() - start
                run.silent_s = run.seconds - (0.0 if whole and run.ttft_s is None else last - start)
                if run.silent_s > patience:
                    run.outcome = "stuck"
                    break
                if run.seconds > o.limit_s:
                    run.outcome = "slow" if self.source or run.tokens else "stuck"
                    break
        except ProbeError as error:
            run.outcome, run.why = "failed", f"{error.what}: {error.why}" if error.why else error.what
        finally:
            events.close()
        run.seconds, run.source = o.clock() - start, self.source
        return run

    def _learn(self, run: _Run, prompt: str | list[int]) -> None:
        tokens = run.counts.prompt_tokens or run.sent
        if isinstance(prompt, str):
            words = len(prompt.split())
            run.sent = round(words * self.tokens_a_word) if self.known else None
            if tokens and 0.5 <= tokens / words <= 8 and tokens > 0.8 * (run.sent or 0):  # one that was cut teaches nothing
                self.tokens_a_word = tokens / words
            tokens = tokens or round(words * self.tokens_a_word)
        if run.ttft_s is not None and tokens:
            self.known.append((tokens, run.ttft_s))


# --- from what happened to what it means ---


def _prefill_s(run: _Run) -> float | None:
    """By the server's clock where that can be true (a server that waited counts less than we do), else by ours."""
    if run.ttft_s is None:
        return None
    told = run.counts.prefill_s
    return told if told is not None and 0.5 * run.ttft_s <= told <= 1.05 * run.ttft_s + 0.05 else run.ttft_s


def _point(length: int, run: _Run) -> Point:
    counts = run.counts
    tokens = counts.prompt_tokens or run.sent
    seconds = _prefill_s(run)
    verdict: Verdict = "ok" if run.outcome == "done" else run.outcome
    rate = None
    if run.outcome == "done" and tokens and seconds:
        new = tokens - (counts.cached_tokens or 0)
        rate = new / seconds if new >= tokens / 10 else None
        if rate is None or _miscounted(run):
            verdict = "failed"
    elif run.marks and run.marks[-1][0] > 0 and run.marks[-1][1] > 0:
        rate = run.marks[-1][0] / run.marks[-1][1]  # as far as it came
    decode = None
    if run.tokens > 1 and run.ttft_s is not None and run.last_token_s > run.ttft_s:
        n = counts.generated if counts.generated and counts.generated <= 64 * N_PREDICT else run.tokens
        decode = (n - 1) / (run.last_token_s - run.ttft_s) if n > 1 else None
    return Point(
        length=length,
        prompt_tokens=tokens,
        cached_tokens=counts.cached_tokens,
        ttft_s=run.ttft_s,
        prefill_tok_s=rate,
        decode_tok_s=decode,
        verdict=verdict,
        recalled=run.code in run.text if run.outcome == "done" else None,
    )


def _miscounted(run: _Run) -> bool:
    """The server counts other tokens than we sent: exact ids, or words at the rate of shorter prompts."""
    told, sent = run.counts.prompt_tokens, run.sent
    return bool(told and sent and abs(told - sent) > 16 + (0.01 if run.exact else 0.2) * sent)


def _chunks(run: _Run) -> tuple[Chunk, ...]:
    """The chunks of a prefill, the small ones at its end left out."""
    pairs = itertools.pairwise(run.marks)
    return tuple(Chunk(start=a, end=b, seconds=t - s) for (a, s), (b, t) in pairs if b - a >= SMALL_CHUNK and t > s)


def _findings(server: Server, point: Point, run: _Run, chunks: Sequence[Chunk], slow: str, options: Options) -> list[Finding]:
    name = f"{point.length:,} tokens"
    request = f"{server.url} {name}"
    found: list[Finding] = []

    def add(id: str, severity: Literal["problem", "warning", "note"], what: str, why: str, cure: str, *texts: str) -> None:
        evidence = tuple(Evidence(request, None, text) for text in texts)
        found.append(Finding(id=f"probe.{id}", severity=severity, what=what, why=why, cure=cure, evidence=evidence))

    if run.outcome == "failed":
        cure = (
            f"a longer context, or --lengths up to {server.context - N_PREDICT}"
            if server.context and "context is" in run.why
            else ""
        )
        add("failed", "problem", f"{name}: no answer", run.why, cure or "look at the server's log at this time")
    elif run.outcome == "stuck":
        if run.tokens:
            told = f"{run.tokens} tokens of the answer had come"
        elif not run.source:
            told = "this API tells no progress; shorter prompts predict less than a tenth of it"
        else:
            told = "its metrics stand still" if run.source == "/metrics" else f"{run.processed:,} prompt tokens were done"
        add(
            "stuck", "problem", f"{name}: stuck", f"no progress for {run.silent_s:.3g} s ({told})",
            "look at GPU and CPU use now: 0 % of both is a deadlock, a busy CPU beside an idle GPU is attention on the CPU",
            f"progress source: {run.source or 'none'}",
        )  # fmt: skip
    elif run.outcome == "slow":
        add(
            "slow", "problem", f"{name}: not done in {run.seconds:.3g} s",
            f"it goes forward, {run.processed:,} prompt tokens so far: slow, not stuck", "--limit SECONDS waits longer",
        )  # fmt: skip
    elif slow:
        seen = [u.cpu for u in run.use if u.cpu is not None] if all(u.gpu is None for u in run.use) else []
        here = [f"no GPU tool answers on this machine; its CPU was at {statistics.median(seen):.0f} %"] if seen else []
        add("slow", "problem", f"{name}: prefill falls off the line", slow, _SLOW_CURE[server.engine], *_growth_text(chunks), *here)
    if _miscounted(run):
        told, sent = run.counts.prompt_tokens or 0, run.sent or 0
        why = f"the server counted {told:,} prompt tokens, {sent:,} were sent"
        cut = "the prompt was cut, or the count is wrong" if told < sent else "the count is wrong"
        cure = {"ollama": "raise num_ctx (OLLAMA_CONTEXT_LENGTH); before June 2026 Ollama left cached tokens out of its count"}
        add("counts", "problem", f"{name}: {cut}", why, cure.get(server.engine, "raise the context"))
    elif run.outcome == "done" and run.counts.prompt_tokens is None:
        add("counts", "note", f"{name}: the server counts no tokens", "lengths and speeds are estimates from words", "")
    if point.cached_tokens and point.prompt_tokens and point.cached_tokens >= 0.1 * point.prompt_tokens:
        add(
            "cached", "warning", f"{name}: taken from a cache",
            f"{point.cached_tokens:,} of {point.prompt_tokens:,} tokens of a prompt that was never sent before",
            "what the server calls cached cannot be; trust none of its counts",
        )  # fmt: skip
    told = run.counts.prefill_s
    if run.ttft_s is not None and told is not None and run.ttft_s > 2 * told + 1:
        why = f"{run.ttft_s:.1f} s to the first token, of which the server counts {told:.1f} s as prefill"
        add("waited", "warning", f"{name}: the prompt waited", why, "see whether other requests run, or the model was loaded anew")
    found += _idle_gpu(name, request, run)
    found += _far_below(name, point, options)
    return found


_SLOW_CURE = {
    "llama.cpp": "headwise doctor on its log; look for `assigned to device CPU`, graph splits above 2, --cache-type-v with -fa on",
    "ollama": "headwise doctor on its log; unset OLLAMA_KV_CACHE_TYPE and OLLAMA_FLASH_ATTENTION, restart, probe again",
    "vllm": "look for preemptions in its log, and at the attention backend it chose",
    "openai": "look at GPU use while it works; ask the server which attention backend it uses",
}


def _growth_text(chunks: Sequence[Chunk]) -> list[str]:
    line = growth(chunks)
    if line is None or line[1] <= 0:
        return []
    batch = statistics.median(c.end - c.start for c in chunks)
    first, more = line[0] * batch + line[1] * batch**2 / 2, line[1] * batch**2
    times = ", ".join(f"{c.seconds:.2f}" for c in chunks[:8])
    return [
        f"batches of {batch:,.0f} tokens: the first takes {first:.2f} s, each further one {more:.2f} s more: linear growth, "
        f"as of attention on the CPU, or not fused",
        f"seconds of the first batches: {times}",
    ]


def _idle_gpu(name: str, request: str, run: _Run) -> list[Finding]:
    gpu = [u.gpu for u in run.use if u.gpu is not None]
    if len(gpu) < 3 or statistics.median(gpu) >= 10:
        return []
    cpu = [u.cpu for u in run.use if u.cpu is not None]
    busy = f", the CPU {statistics.median(cpu):.0f} %" if cpu else ""
    return [
        Finding(
            id="probe.gpu-idle",
            severity="problem",
            what=f"{name}: the GPU was idle during prefill",
            why=f"median use of the busiest GPU {statistics.median(gpu):.0f} %{busy}: attention, or all of it, runs on the CPU",
            cure="headwise doctor on the server's log: which layers, and why",
            evidence=(Evidence(request, None, "GPU use in percent: " + ", ".join(f"{g:.0f}" for g in gpu[:24])),),
        )
    ]


def _far_below(name: str, point: Point, options: Options) -> list[Finding]:
    most = options.ceiling(point.length) if options.ceiling and point.prefill_tok_s and point.verdict != "failed" else None
    if most is None or most.prefill_tok_s is None or not point.prefill_tok_s or point.length < 2048:
        return []
    share = point.prefill_tok_s / most.prefill_tok_s
    if share > 1.2:
        what, why = f"{name}: faster than the card can be", f"{point.prefill_tok_s:,.0f} tok/s, {share:.1f} times its matrix rate"
        return [Finding(id="probe.cached", severity="warning", what=what, why=f"{why}: taken from a cache, or another card")]
    if share >= CEILING_SHARE:
        return []
    return [
        Finding(
            id="probe.ceiling",
            severity="warning",
            what=f"{name}: prefill is far below what the card can do",
            why=f"{point.prefill_tok_s:,.0f} tok/s, {share:.1%} of the {most.prefill_tok_s:,.0f} that its matrix rate allows",
            cure="likely: layers or attention on the CPU, a power or clock limit, a small batch (-ub), another process on the card",
            sure="possible",
        )
    ]


def _no_growth(points: Sequence[Point]) -> list[Finding]:
    """A server that tells of no cache, and takes no longer for a prompt four times as long."""
    done = [(p.prompt_tokens, p.ttft_s, p.length) for p in points if p.ttft_s and p.prompt_tokens and p.verdict == "ok"]
    for n, seconds, length in done:
        shorter = [(t, at) for m, t, at in done if 4 * m <= n]
        if n >= 2000 and shorter and seconds < 1.25 * min(shorter)[0]:
            what = f"{length:,} tokens: no slower than {min(shorter)[1]:,}"
            why = f"{seconds:.3g} s and {min(shorter)[0]:.3g} s to the first token: taken from a cache, or never computed"
            cure = "trust none of these speeds"
            return [Finding(id="probe.cached", severity="warning", what=what, why=why, cure=cure, sure="likely")]
    return []


def _recall(points: Sequence[Point]) -> list[Finding]:
    short = [p for p in points if p.recalled]
    lost = [p for p in points if p.recalled is False and short and p.length > short[0].length]
    if not lost:
        return []
    what = f"the fact at the beginning is forgotten at {', '.join(f'{p.length:,}' for p in lost)} tokens"
    why = f"it was recalled at {', '.join(f'{p.length:,}' for p in short)}; a small model may simply not be able to"
    cure = "a cut prompt, a KV type that is too coarse, or a wrong position scaling (RoPE) look like this: try f16 KV"
    return [Finding(id="probe.recall", severity="warning", what=what, why=why, cure=cure, sure="possible")]


def probe_json(p: Probe, other: Probe | None = None) -> dict[str, Any]:
    """The object of `probe --json`."""
    keys = ("length", "prompt_tokens", "cached_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "verdict", "recalled")

    def one(q: Probe) -> dict[str, Any]:
        s = q.server
        return {
            "server": {"url": s.url, "engine": s.engine, "version": s.version, "context": s.context},
            "model": s.model,
            "points": [{k: _rounded(getattr(point, k)) for k in keys} for point in q.points],
            "verdict": q.verdict,
            "findings": [f.to_json() for f in q.findings],
        }

    if other is None:
        return one(p)
    rows = [{k: _rounded(v) for k, v in row.items()} for row in compared(p, other)]
    return one(p) | {"compare": one(other) | {"ratio": rows}}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
