"""What is counted, in Prometheus's text format, with vLLM's names beside ours so that existing dashboards read it.

Every model that was loaded since the start has its lines, labelled `model_name`; counters go on when it is loaded again.
Source: vLLM 0.33 vllm/v1/metrics/loggers.py (names and buckets); prometheus.io exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headwise.engine.process import Totals
from headwise.engine.rates import Histogram, Times
from headwise.server.models import Loaded, Models

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Row = tuple[str, str, str, Callable[[Totals, Loaded | None], Any]]  # name, type, help, value


def _fact(loaded: Loaded | None, *path: str) -> Any:
    value: Any = None if loaded is None else loaded.engine.facts
    for key in path:
        value = (value or {}).get(key)
    return value or 0


def _pool(loaded: Loaded | None, what: str) -> int:
    return 0 if loaded is None else loaded.engine.pool.get(what, 0)


def _used(loaded: Loaded | None) -> float:
    pool = _fact(loaded, "plan", "pool_tokens")
    return min(1.0, loaded.engine.held_tokens() / pool) if loaded and pool else 0.0


ROWS: tuple[Row, ...] = (
    ("headwise_up", "gauge", "1 while the model is loaded and its process runs",
     lambda _, m: int(m is not None and m.engine.state == "ready")),
    ("headwise_engine_restarts_total", "counter", "engine processes started after the first", lambda t, _: t.restarts),
    ("headwise_engine_stalls_total", "counter", "steps that made no progress and were killed", lambda t, _: t.stalls),
    ("headwise_cached_tokens_total", "counter", "prompt tokens that were in the cache", lambda t, _: t.cached_tokens),
    ("headwise_prefill_tokens_total", "counter", "prompt tokens computed, as they are", lambda t, _: t.prefill.total),
    ("headwise_decode_tokens_total", "counter", "tokens of answers, as they come", lambda t, _: t.decode.total),
    ("headwise_planned_bytes", "gauge", "memory planned", lambda _, m: _fact(m, "plan", "total_bytes")),
    ("headwise_allocated_bytes", "gauge", "memory measured after loading", lambda _, m: _fact(m, "measured", "total_bytes")),
    ("headwise_kv_planned_bytes", "gauge", "cache planned", lambda _, m: _fact(m, "plan", "kv", "total_bytes")),
    ("headwise_kv_allocated_bytes", "gauge", "cache measured after loading", lambda _, m: _fact(m, "measured", "kv_bytes")),
    ("headwise_pages", "gauge", "pages of global layers", lambda _, m: _pool(m, "pages")),
    ("headwise_pages_free", "gauge", "pages that hold nothing", lambda _, m: _pool(m, "pages_free")),
    ("headwise_pages_lost", "gauge", "pages whose owners are not known; not 0 is a bug", lambda _, m: _pool(m, "pages_lost")),
    ("headwise_slots", "gauge", "sequences at once, each with its rings", lambda _, m: _pool(m, "slots")),
    ("headwise_slots_used", "gauge", "slots that requests hold", lambda _, m: _pool(m, "slots_used")),
    ("vllm:num_requests_running", "gauge", "requests that hold a slot", lambda _, m: m.engine.running if m else 0),
    ("vllm:num_requests_waiting", "gauge", "requests in the queue, or whose model is not loaded yet",
     lambda _, m: m.engine.waiting if m else 0),
    ("vllm:kv_cache_usage_perc", "gauge", "cache in use by requests, 0 to 1", lambda _, m: _used(m)),
    ("vllm:prompt_tokens_total", "counter", "prompt tokens of requests that ended", lambda t, _: t.prompt_tokens),
    ("vllm:generation_tokens_total", "counter", "tokens of answers that ended", lambda t, _: t.tokens),
    ("vllm:spec_decode_num_draft_tokens_total", "counter", "draft tokens tried", lambda t, _: t.drafted),
    ("vllm:spec_decode_num_accepted_tokens_total", "counter", "draft tokens kept", lambda t, _: t.accepted),
    ("vllm:prefix_cache_queries_total", "counter", "tokens looked for in the cache", lambda t, _: t.prompt_tokens),
    ("vllm:prefix_cache_hits_total", "counter", "tokens that were in the cache", lambda t, _: t.cached_tokens),
)  # fmt: skip
TIMES: tuple[tuple[str, str, Callable[[Times], Histogram]], ...] = (
    ("time_to_first_token", "from arrival to the first token", lambda t: t.first_token),
    ("inter_token_latency", "between two tokens of an answer", lambda t: t.between_tokens),
    ("e2e_request_latency", "from arrival to the end", lambda t: t.whole),
    ("request_queue_time", "in the queue", lambda t: t.queue),
    ("request_prefill_time", "from admission to the first token", lambda t: t.prefill),
    ("request_decode_time", "from the first token to the last", lambda t: t.decode),
)


def metrics(models: Models) -> str:
    return "\n".join(_lines(models)) + "\n"


def _lines(models: Models) -> Iterator[str]:
    known = [(name, f'model_name="{_escaped(name)}"', t, models.loaded.get(name)) for name, t in models.totals.items()]
    for metric, kind, help_, value in ROWS:
        yield from _head(metric, kind, help_)
        for name, label, totals, loaded in known:
            more = models.waiting(name) if metric == "vllm:num_requests_waiting" else 0
            yield f"{metric}{{{label}}} {value(totals, loaded) + more}"
    yield from _head("headwise_requests_total", "counter", "requests that ended, by reason")
    for _, label, totals, _ in known:
        for reason, count in sorted(totals.requests.items()):
            yield f'headwise_requests_total{{{label},reason="{reason}"}} {count}'
    yield from _head("vllm:request_success_total", "counter", "requests that were answered, by reason")
    for _, label, totals, _ in known:
        for reason in ("stop", "length"):
            yield f'vllm:request_success_total{{{label},finished_reason="{reason}"}} {totals.requests[reason]}'
    for name, help_, of in TIMES:
        yield from _head(f"vllm:{name}_seconds", "histogram", help_)
        for _, label, totals, _ in known:
            yield from _buckets(f"vllm:{name}_seconds", of(totals.times), label)


def _head(name: str, kind: str, help_: str) -> Iterator[str]:
    yield f"# HELP {name} {help_}"
    yield f"# TYPE {name} {kind}"


def _buckets(name: str, found: Histogram, label: str) -> Iterator[str]:
    below = 0
    for edge, count in zip((*map(float, found.edges), "+Inf"), found.counts, strict=True):
        below += count
        yield f'{name}_bucket{{{label},le="{edge}"}} {below}'
    yield f"{name}_sum{{{label}}} {found.sum}"
    yield f"{name}_count{{{label}}} {below}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
