"""What is counted, in Prometheus's text format, with vLLM's names beside ours so that existing dashboards read it.

Source: vLLM 0.33 vllm/v1/metrics/loggers.py (names); prometheus.io exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from headwise.engine.process import EngineProcess

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
    yield from _metric("headwise_planned_bytes", "gauge", "memory planned", plan.get("total_bytes", 0))
    yield from _metric("headwise_allocated_bytes", "gauge", "memory measured after loading", measured.get("total_bytes", 0))
    yield from _metric("headwise_kv_planned_bytes", "gauge", "cache planned", (plan.get("kv") or {}).get("total_bytes", 0))
    yield from _metric("headwise_kv_allocated_bytes", "gauge", "cache measured after loading", measured.get("kv_bytes", 0))
    yield "# HELP headwise_requests_total requests that ended, by reason"
    yield "# TYPE headwise_requests_total counter"
    for reason, count in sorted(t.requests.items()):
        yield f'headwise_requests_total{{reason="{reason}"}} {count}'
    labels = f'{{model_name="{_escaped(model)}"}}'
    yield from _metric("vllm:num_requests_running", "gauge", "requests that hold a slot", engine.running, labels)
    yield from _metric("vllm:num_requests_waiting", "gauge", "requests in the queue", engine.waiting, labels)
    yield from _metric("vllm:kv_cache_usage_perc", "gauge", "cache in use by requests, 0 to 1", used, labels)
    yield from _metric("vllm:prompt_tokens_total", "counter", "prompt tokens of requests that ended", t.prompt_tokens, labels)
    yield from _metric("vllm:generation_tokens_total", "counter", "tokens of answers that ended", t.tokens, labels)


def _metric(name: str, kind: str, help_: str, value: Any, labels: str = "") -> Iterator[str]:
    yield f"# HELP {name} {help_}"
    yield f"# TYPE {name} {kind}"
    yield f"{name}{labels} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
