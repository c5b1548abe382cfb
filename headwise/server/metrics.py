"""What is counted, in Prometheus's text format, with vLLM's names beside ours so that existing dashboards read it.

Every model that was loaded since the start has its lines, labelled `model_name`; counters go on when it is loaded again.
Source: vLLM 0.33 vllm/v1/metrics/loggers.py (names); prometheus.io exposition format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from headwise.engine.process import Totals
from headwise.server.models import Loaded, Models

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Row = tuple[str, str, str, Callable[[Totals, Loaded | None], Any]]  # name, type, help, value


def _fact(loaded: Loaded | None, *path: str) -> Any:
    value: Any = None if loaded is None else loaded.engine.facts
    for key in path:
        value = (value or {}).get(key)
    return value or 0


def _used(loaded: Loaded | None) -> float:
    if loaded is None:
        return 0.0
    return min(1.0, loaded.engine.held_tokens() / (loaded.context * loaded.engine.settings.get("slots", 1)))


ROWS: tuple[Row, ...] = (
    ("headwise_up", "gauge", "1 while the model is loaded and its process runs",
     lambda _, m: int(m is not None and m.engine.state == "ready")),
    ("headwise_engine_restarts_total", "counter", "engine processes started after the first", lambda t, _: t.restarts),
    ("headwise_engine_stalls_total", "counter", "steps that made no progress and were killed", lambda t, _: t.stalls),
    ("headwise_cached_tokens_total", "counter", "prompt tokens that were in the cache", lambda t, _: t.cached_tokens),
    ("headwise_planned_bytes", "gauge", "memory planned", lambda _, m: _fact(m, "plan", "total_bytes")),
    ("headwise_allocated_bytes", "gauge", "memory measured after loading", lambda _, m: _fact(m, "measured", "total_bytes")),
    ("headwise_kv_planned_bytes", "gauge", "cache planned", lambda _, m: _fact(m, "plan", "kv", "total_bytes")),
    ("headwise_kv_allocated_bytes", "gauge", "cache measured after loading", lambda _, m: _fact(m, "measured", "kv_bytes")),
    ("vllm:num_requests_running", "gauge", "requests that hold a slot", lambda _, m: m.engine.running if m else 0),
    ("vllm:num_requests_waiting", "gauge", "requests in the queue, or whose model is not loaded yet",
     lambda _, m: m.engine.waiting if m else 0),
    ("vllm:kv_cache_usage_perc", "gauge", "cache in use by requests, 0 to 1", lambda _, m: _used(m)),
    ("vllm:prompt_tokens_total", "counter", "prompt tokens of requests that ended", lambda t, _: t.prompt_tokens),
    ("vllm:generation_tokens_total", "counter", "tokens of answers that ended", lambda t, _: t.tokens),
)  # fmt: skip


def metrics(models: Models) -> str:
    return "\n".join(_lines(models)) + "\n"


def _lines(models: Models) -> Iterator[str]:
    known = {name: (totals, models.loaded.get(name)) for name, totals in models.totals.items()}
    for name, kind, help_, value in ROWS:
        yield from _head(name, kind, help_)
        for model, (totals, loaded) in known.items():
            more = models.waiting(model) if name == "vllm:num_requests_waiting" else 0
            yield f'{name}{{model_name="{_escaped(model)}"}} {value(totals, loaded) + more}'
    yield from _head("headwise_requests_total", "counter", "requests that ended, by reason")
    for model, (totals, _) in known.items():
        for reason, count in sorted(totals.requests.items()):
            yield f'headwise_requests_total{{model_name="{_escaped(model)}",reason="{reason}"}} {count}'


def _head(name: str, kind: str, help_: str) -> Iterator[str]:
    yield f"# HELP {name} {help_}"
    yield f"# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
