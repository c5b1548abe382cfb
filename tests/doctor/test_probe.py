"""The probe against servers of four APIs that are well, slow, stuck, cut, broken or lying."""

from __future__ import annotations

import time
from typing import Any

import pytest
from doctor.fake_servers import Fake, served

from headwise.doctor.probe import Chunk, Options, Point, Probe, growth, healthy_depth, off_the_line, probe
from headwise.doctor.servers import ENGINES, Http, Server, Watch, http_at, identify
from headwise.errors import ProbeError, UsageError
from headwise.hardware.usage import Usage
from headwise.planner.ceiling import Ceiling
from headwise.spec.catalogue import specs

LENGTHS = (128, 512, 2048)
pytestmark = pytest.mark.usefixtures("busy_machine")
every_engine = pytest.mark.parametrize("engine", ENGINES)


def probed(fake: Fake, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Probe:
    with served(fake) as url:
        return probe(identify(http_at(url)), lengths, Options(**{"stall_s": 0.4, "tick_s": 0.02, "limit_s": 10.0} | options))


def verdicts(p: Probe) -> list[str]:
    return [q.verdict for q in p.points]


def ids(p: Probe) -> set[str]:
    return {f.id for f in p.findings if f.severity != "note"}


@every_engine
def test_a_healthy_server_is_ok(engine: Any) -> None:
    p = probed(Fake(engine))

    assert (p.verdict, verdicts(p), ids(p)) == ("ok", ["ok"] * 3, set())
    assert all(q.recalled and q.ttft_s and q.prefill_tok_s and q.decode_tok_s for q in p.points)
    assert [abs(q.prompt_tokens - q.length) <= 4 for q in p.points if q.prompt_tokens] == [True] * 3


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_prompt_has_exactly_the_length_that_was_asked_for(engine: Any) -> None:
    """Words times a guess is 20 % off on another vocabulary; these servers have a tokenizer to ask."""
    fake = Fake(engine)

    p = probed(fake, (65, 100, 257))

    assert [q.prompt_tokens for q in p.points] == [65, 100, 257]
    assert [len(b["prompt"]) for b in fake.bodies[1:]] == [65, 100, 257]


@every_engine
def test_no_two_prompts_begin_alike(engine: Any) -> None:
    """A prefix cache answers a prompt that was sent before in no time, and the probe would measure the cache."""
    fake = Fake(engine)
    probed(fake, (512, 513, 514, 515))

    prompts = [b.get("prompt") or b["messages"][0]["content"] for b in fake.bodies]
    begins = [p.split() if isinstance(p, str) else fake.text(p).split() for p in prompts]
    assert len({tuple(b[:8]) for b in begins}) == len(begins) == 5


@every_engine
def test_slow_but_steady_is_ok(engine: Any) -> None:
    """A limit on time kills a healthy prefill at 93 %: this prompt takes longer than the stall, at one speed."""
    p = probed(Fake(engine, token_s=2.2e-4, chunk=700), stall_s=0.35)

    assert verdicts(p) == ["ok"] * 3
    assert p.points[2].ttft_s and p.points[2].ttft_s > 0.4


@every_engine
def test_a_server_that_hangs_within_a_prompt_is_stuck(engine: Any) -> None:
    start = time.monotonic()
    p = probed(Fake(engine, stuck_from=2000))

    assert verdicts(p) == ["ok", "ok", "stuck"]
    assert (p.verdict, ids(p)) == ("stuck", {"probe.stuck"})
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("engine", ["llama.cpp", "openai"])
def test_pings_are_no_progress(engine: Any) -> None:
    """A proxy that sends a comment each second keeps a stuck request alive for ever."""
    assert verdicts(probed(Fake(engine, stuck_from=2000, pings=True))) == ["ok", "ok", "stuck"]


@every_engine
def test_a_server_that_hangs_within_its_answer_is_stuck(engine: Any) -> None:
    p = probed(Fake(engine, stuck_decode=True), (128,))

    assert verdicts(p) == ["stuck"]
    assert p.points[0].ttft_s


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama"])
def test_batches_that_take_ever_longer_are_slow(engine: Any) -> None:
    """Attention on the CPU: each batch takes longer than the one before by the same amount (ollama #15350)."""
    p = probed(Fake(engine, growth_s=2.5e-7), (512, 2048))

    assert (p.verdict, p.points[1].verdict) == ("slow", "slow")
    assert "probe.slow" in ids(p)


def test_growth_shows_with_a_single_length_where_chunks_are_told() -> None:
    p = probed(Fake(growth_s=2.5e-7), (2048,))

    assert verdicts(p) == ["slow"]
    evidence = next(f for f in p.findings if f.id == "probe.slow").evidence
    assert "linear growth" in evidence[0].text


@every_engine
@pytest.mark.parametrize("how", [{"cut_from": 2000}, {"cut_decode": True}])
def test_a_cut_stream_has_failed(engine: Any, how: dict[str, Any]) -> None:
    """The first half of an answer looks like a whole one to a reader that waits for the end of the connection."""
    p = probed(Fake(engine, **how))

    assert p.points[2].verdict == "failed"
    assert any("cut" in f.why or "connection" in f.why for f in p.findings)


@every_engine
def test_an_error_is_told_in_the_servers_words(engine: Any) -> None:
    p = probed(Fake(engine, fail_from=2000))

    assert verdicts(p) == ["ok", "ok", "failed"]
    assert any("500" in f.why and "CUDA error: out of memory" in f.why for f in p.findings)


@every_engine
def test_a_prompt_that_loses_its_beginning_has_failed(engine: Any) -> None:
    """Ollama cuts a prompt at num_ctx and answers as if nothing had happened."""
    p = probed(Fake(engine, keeps=1000))

    assert verdicts(p) == ["ok", "ok", "failed"]
    assert p.points[2].recalled is False
    assert {"probe.counts", "probe.recall"} <= ids(p)


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("count", [0.5, 2.0])
def test_wrong_counts_fail(engine: Any, count: float) -> None:
    """Twice the tokens in the count is twice the speed in the table."""
    assert verdicts(probed(Fake(engine, count=count))) == ["failed"] * 3


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "openai"])
def test_a_prompt_from_a_cache_was_not_measured(engine: Any) -> None:
    p = probed(Fake(engine, cached=0.97))

    assert verdicts(p) == ["failed"] * 3
    assert [q.prefill_tok_s for q in p.points] == [None] * 3
    assert "probe.cached" in ids(p)


def test_a_cache_that_the_api_does_not_tell_of_shows_in_the_times() -> None:
    assert "probe.cached" in ids(probed(Fake("ollama", cached=0.999, start_s=0.2), (512, 2048)))


def test_a_cache_of_a_part_counts_only_what_was_computed() -> None:
    half = probed(Fake(token_s=1e-4, cached=0.5), (2048,)).points[0]

    assert half.verdict == "ok"
    assert half.prefill_tok_s and 2e3 < half.prefill_tok_s <= 1e4  # the whole of it: 2e4; a busy machine only takes longer


def test_a_server_that_lies_about_its_time_is_measured_by_ours() -> None:
    p = probed(Fake(token_s=1e-4, lie_s=1e-6), (2048,))

    assert p.points[0].prefill_tok_s and p.points[0].prefill_tok_s <= 1e4


def test_slots_are_a_second_source_of_progress() -> None:
    """A server of 2024 has no return_progress; its slots tell how far it is."""
    slow = Fake(silent=True, token_s=2e-4, chunk=700)

    assert verdicts(probed(slow, (128, 2048), stall_s=0.35)) == ["ok", "ok"]
    assert verdicts(probed(Fake(silent=True, stuck_from=2000), (128, 2048))) == ["ok", "stuck"]


def test_a_server_without_progress_gets_a_multiple_of_what_shorter_prompts_predict() -> None:
    """20 times the length, 20 times the stall: not stuck."""
    p = probed(Fake("ollama", token_s=2e-4), (128, 2048), stall_s=0.05)

    assert verdicts(p) == ["ok", "ok"]


def test_the_limit_holds_whatever_happens_and_tells_slow_from_stuck() -> None:
    p = probed(Fake(token_s=5e-4), (256, 4096), limit_s=0.7, stall_s=0.6)

    assert verdicts(p) == ["ok", "slow"]
    assert p.points[1].prefill_tok_s and 200 < p.points[1].prefill_tok_s <= 2000
    assert p.points[1].ttft_s is None


@every_engine
def test_a_prompt_beyond_the_context_is_not_sent(engine: Any) -> None:
    fake = Fake(engine, context=1024)
    p = probed(fake, (128, 200_000) if engine == "ollama" else (128, 2048))

    if engine == "openai":  # it does not say
        assert verdicts(p) == ["ok", "ok"]
    else:
        assert verdicts(p) == ["ok", "failed"]
        assert len(fake.bodies) == 2  # the warm-up and the first


def test_ollama_keeps_its_context_where_that_is_enough() -> None:
    """Another num_ctx reloads the model: the probe would measure another server than the user's."""
    enough, small = Fake("ollama", context=4096), Fake("ollama", context=1024)

    assert ids(probed(enough, (128, 2048))) == set()
    assert {b["options"]["num_ctx"] for b in enough.bodies} == {4096}
    assert any(f.id == "probe.reload" for f in probed(small, (128, 2048)).findings)
    assert {b["options"]["num_ctx"] for b in small.bodies} == {3072}


def test_a_server_with_chat_only_is_asked_there() -> None:
    fake = Fake("openai", chat_only=True)

    assert verdicts(probed(fake)) == ["ok"] * 3
    assert all("messages" in b for b in fake.bodies)


@every_engine
def test_an_answer_without_a_token_has_failed(engine: Any) -> None:
    assert verdicts(probed(Fake(engine, n_answer=0), (128,))) == ["failed"]


def test_an_answer_without_end_is_left() -> None:
    assert verdicts(probed(Fake(n_answer=100_000), (128,))) == ["failed"]


def test_other_peoples_requests_are_noted() -> None:
    assert "probe.busy" in ids(probed(Fake("vllm", running=3)))


def test_the_key_is_sent_and_a_missing_one_is_named() -> None:
    fake = Fake("openai", key="s3cret")
    with served(fake) as url:
        with pytest.raises(ProbeError, match="401") as caught:
            identify(http_at(url))
        server = identify(http_at(url, key="s3cret"))
        assert probe(server, (128,), Options(stall_s=0.4)).verdict == "ok"
    assert "--api-key-env" in caught.value.do


def test_an_idle_gpu_beside_a_busy_cpu_is_a_problem() -> None:
    p = probed(Fake(token_s=4e-4), (2048,), usage=lambda: Usage(0.0, 97.0))
    busy = probed(Fake(token_s=4e-4), (2048,), usage=lambda: Usage(93.0, 12.0))

    found = next(f for f in p.findings if f.id == "probe.gpu-idle")
    assert "0 %" in found.why and "97 %" in found.why
    assert ids(busy) == set()


def test_a_machine_that_is_busy_beforehand_is_noted() -> None:
    """Two cores shared with another build gave a third of the speed, and looked like a fault of the server."""
    assert "probe.busy" in ids(probed(Fake(), (128,), usage=lambda: Usage(None, 80.0)))
    assert ids(probed(Fake(), (128,), usage=lambda: Usage(None, 20.0))) == set()


def test_a_speed_far_below_the_ceiling_is_flagged() -> None:
    fake = Fake(token_s=1e-4)  # 10,000 tok/s

    assert "probe.ceiling" in ids(probed(fake, (2048,), ceiling=lambda _: Ceiling(100, 1e6)))
    assert ids(probed(fake, (2048,), ceiling=lambda _: Ceiling(100, 2e4))) == set()
    assert "probe.cached" in ids(probed(fake, (2048,), ceiling=lambda _: Ceiling(100, 2e3)))


@pytest.mark.parametrize("n", [0, 63, -5, 10**9])
def test_a_length_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(UsageError):
        probed(Fake(), (n,))


def test_an_engine_that_is_not_there_is_named() -> None:
    with served(Fake("openai")) as url:
        with pytest.raises(ProbeError, match="no engine"):
            identify(http_at(url), engine="llama.cpp")
        with pytest.raises(ProbeError, match="no model 'other'"):
            identify(http_at(url), model="other")
    with pytest.raises(ProbeError, match="no answer"):
        identify(http_at(url))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a b", "http://x:99999", "http://[::1", "http://x/a\r\nHost: y"])
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError):
        http_at(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [("localhost:8080", "http://localhost:8080"), ("http://u:p@h/x/", "http://h:80/x"), ("https://h/v1", "https://h:443"),
     ("[::1]:99", "http://[::1]:99")],
)  # fmt: skip
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert http_at(url).shown == shown


# --- the line, by arithmetic ---


def line(b: float, depth: float, lengths: tuple[int, ...] = (512, 2048, 8192, 32_768)) -> list[Point]:
    """Points of a server whose token at depth d takes b (1 + d / depth) seconds: t = b (n + n^2 / (2 depth))."""
    return [timed(n, b * (n + n * n / (2 * depth))) for n in lengths]


def timed(n: int, seconds: float) -> Point:
    rate = n / seconds
    return Point(
        length=n, prompt_tokens=n, cached_tokens=0, ttft_s=seconds, prefill_tok_s=rate, decode_tok_s=1, verdict="ok", recalled=True
    )


def judged(points: list[Point], depth: float = 2000) -> list[bool]:
    return [bool(off_the_line(points[: i + 1], [()] * (i + 1), depth)) for i in range(len(points))]


@pytest.mark.parametrize("depth", [1300, 4000, 100_000])
def test_fused_attention_stays_on_the_line(depth: float) -> None:
    """A 0.6B model loses most of its speed at 32K with the best of kernels: its attention outgrows its products."""
    assert judged(line(1e-4, depth)) == [False] * 4


def test_attention_on_the_cpu_falls_off_it() -> None:
    """Gemma 4 31B in ollama #15350: batches of 512 take 0.4 s + 2.64 s x index."""
    assert judged(line((0.4 + 1.32) / 512, 333)) == [False, True, True, True]


def test_a_cliff_falls_off_it() -> None:
    """A cache that spills to system memory at 32K: the shorter lengths are as fast as ever."""
    points = line(1e-4, 20_000)
    points[3] = timed(32_768, 60)

    assert judged(points) == [False, False, False, True]


def test_a_known_model_is_held_to_its_own_line() -> None:
    """Losing half at 8K is the arithmetic of Qwen3 0.6B and a fault in Gemma 4 31B."""
    small, large = healthy_depth(specs()["qwen3-0.6b"]), healthy_depth(specs()["gemma-4-31b"])
    points = line(1e-4, 2500)

    assert not any(judged(points, small))
    assert judged(points, large)[2]


def test_the_growth_of_chunks_is_recovered_in_spite_of_an_outlier() -> None:
    """2.64 s more for each batch of 512: what #15350's log shows."""
    times = [0.4 + 2.64 * (i + 1) for i in range(8)]
    times[3] *= 3
    chunks = [Chunk(start=512 * i, end=512 * (i + 1), seconds=t) for i, t in enumerate(times)]

    found = growth(chunks)

    assert found is not None
    assert found[1] * 512 * 512 == pytest.approx(2.64, rel=0.02)


def test_a_watch_and_a_server_need_no_network() -> None:
    server = Server(engine="openai", version="", model="m", context=None, transport=Http("", "127.0.0.1", 1, False, ""))

    assert server.label == "OpenAI-compatible server"
    assert Watch((), None, 0).mark == ()
