"""`GET /v1/state`: what the engine does now; what it was loaded as is at `/v1/attention`."""

from __future__ import annotations

from typing import Any

from headwise.engine.process import EngineProcess
from headwise.engine.rates import KEPT_S
from headwise.server.answer import Served


def health(engine: EngineProcess, model: Served) -> dict[str, Any]:
    """The state in a word, and what loads or what went wrong."""
    body: dict[str, Any] = {
        "status": "ok" if engine.state == "ready" else "loading" if engine.state == "loading" else "error",
        "model": model.name,
    }
    if engine.error is not None:
        body["error"] = {"what": engine.error.what, "why": engine.error.why, "do": engine.error.do}
    if engine.state == "loading" and engine.loading is not None:
        what, done, of = engine.loading
        body["loading"] = {"what": what, "done": done, "of": of}
    return body


def state(engine: EngineProcess, model: Served) -> dict[str, Any]:
    """Requests with their progress, the layer that runs, counters, and tokens of each of the last seconds, oldest first."""
    t = engine.totals
    return {
        **health(engine, model),
        "context": model.context,
        "requests": engine.requests(),
        "at": engine.at(),
        "restarts": t.restarts,
        "stalls": t.stalls,
        "ended": dict(t.requests),
        "prefill_tokens": t.prefill.total,
        "decode_tokens": t.decode.total,
        "cached_tokens": t.cached_tokens,
        "rates": {"seconds": KEPT_S, "prefill": t.prefill.recent(), "decode": t.decode.recent()},
    }
