"""What is counted, in Prometheus's text format, with vLLM's names beside ours so that existing dashboards read it.

Source: vLLM 0.33 vllm/v1/metrics/loggers.py (names and buckets); prometheus.io exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.engine.process import EngineProcess
from headwise.engine.rates import Histogram

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics(engine: EngineProcess, model: str, context: int, slots: int) -> str:
    return "\n".join(_lines(engine, model, context, slots)) + "\n"


def _lines(engine: EngineProcess, model: str, context: int, slots: int) -> Iterator[str]:
    t = engine.totals
    used = min(1.0, engine.held_tokens() / (context * slots))
    plan, measured = engine.facts.get("plan") or {}, engine.facts.get("measured") or {}
    yield from _metric("headwise_up", "gauge", "1 while the model is loaded and its process runs", int(engine.state == "ready"))
    yield from _metric("headwise_engine_restarts_total", "counter", "engine processes started after the first", t.restarts)
    yield from _metric("headwise_engine_stalls_total", "counter", "steps that made no progress and were killed", t.stalls)
    yield from _metric("headwise_cached_tokens_total", "counter", "prompt tokens that were in the cache", t.cached_tokens)
    yield from _metric("headwise_prefill_tokens_total", "counter", "prompt tokens computed, as they are", t.prefill.total)
    yield from _metric("headwise_decode_tokens_total", "counter", "tokens of answers, as they come", t.decode.total)
    yield from _metric("headwise_planned_bytes", "gauge", "memory planned", plan.get("total_bytes", 0))
    yield from _metric("headwise_allocated_bytes", "gauge", "memory measured after loading", measured.get("total_bytes", 0))
    yield from _metric("headwise_kv_planned_bytes", "gauge", "cache planned", (plan.get("kv") or {}).get("total_bytes", 0))
    yield from _metric("headwise_kv_allocated_bytes", "gauge", "cache measured after loading", measured.get("kv_bytes", 0))
    yield "# HELP headwise_requests_total requests that ended, by reason"
    yield "# TYPE headwise_requests_total counter"
    for reason, count in sorted(t.requests.items()):
        yield f'headwise_requests_total{{reason="{reason}"}} {count}'
    named = f'model_name="{_escaped(model)}"'
    labels = f"{{{named}}}"
    yield from _metric("vllm:num_requests_running", "gauge", "requests that hold a slot", engine.running, labels)
    yield from _metric("vllm:num_requests_waiting", "gauge", "requests in the queue", engine.waiting, labels)
    yield from _metric("vllm:kv_cache_usage_perc", "gauge", "cache in use by requests, 0 to 1", used, labels)
    yield from _metric("vllm:prompt_tokens_total", "counter", "prompt tokens of requests that ended", t.prompt_tokens, labels)
    yield from _metric("vllm:generation_tokens_total", "counter", "tokens of answers that ended", t.tokens, labels)
    yield from _metric("vllm:prefix_cache_queries_total", "counter", "tokens looked for in the cache", t.prompt_tokens, labels)
    yield from _metric("vllm:prefix_cache_hits_total", "counter", "tokens that were in the cache", t.cached_tokens, labels)
    yield "# HELP vllm:request_success_total requests that were answered, by reason"
    yield "# TYPE vllm:request_success_total counter"
    for reason in ("stop", "length"):
        yield f'vllm:request_success_total{{{named},finished_reason="{reason}"}} {t.requests[reason]}'
    for name, what, found in (
        ("time_to_first_token", "from arrival to the first token", t.times.first_token),
        ("inter_token_latency", "between two tokens of an answer", t.times.between_tokens),
        ("e2e_request_latency", "from arrival to the end", t.times.whole),
        ("request_queue_time", "in the queue", t.times.queue),
        ("request_prefill_time", "from admission to the first token", t.times.prefill),
        ("request_decode_time", "from the first token to the last", t.times.decode),
    ):
        yield from _histogram(f"vllm:{name}_seconds", what, found, named)


def _metric(name: str, kind: str, help_: str, value: Any, labels: str = "") -> Iterator[str]:
    yield f"# HELP {name} {help_}"
    yield f"# TYPE {name} {kind}"
    yield f"{name}{labels} {value}"


def _histogram(name: str, help_: str, found: Histogram, named: str) -> Iterator[str]:
    yield f"# HELP {name} {help_}"
    yield f"# TYPE {name} histogram"
    below = 0
    for edge, count in zip((*map(float, found.edges), "+Inf"), found.counts, strict=True):
        below += count
        yield f'{name}_bucket{{{named},le="{edge}"}} {below}'
    yield f"{name}_sum{{{named}}} {found.sum}"
    yield f"{name}_count{{{named}}} {below}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
