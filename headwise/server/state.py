"""What the loaded models do now, for `/health`, `/ready` and `/v1/state`; what each was loaded as is at `/v1/attention`."""

from __future__ import annotations

from typing import Any

from headwise.engine.rates import KEPT_S
from headwise.errors import HeadwiseError
from headwise.server.models import Loaded, Models


def health(models: Models) -> dict[str, Any]:
    """`status`: ok, idle (nothing is loaded; a request loads), loading, or error; of the whole, and of each loaded model."""
    each = [_health(m) for m in models.loaded.values()]
    states = {m["status"] for m in each}
    body: dict[str, Any] = {"model": models.first.name, "models": each}
    if "ok" in states or not states:
        status = "ok" if states else "idle"
    else:
        status = "loading" if "loading" in states else "error"
    for name, (error, _) in models.failed.items():
        body["error"] = {"model": name, **_words(error)}
        status = "error" if status == "idle" else status
    return {"status": status, **body}


def _health(loaded: Loaded) -> dict[str, Any]:
    """The state in a word, and what loads or what went wrong."""
    engine = loaded.engine
    body: dict[str, Any] = {
        "model": loaded.name,
        "status": {"ready": "ok", "loading": "loading"}.get(engine.state, "error"),
        "context": loaded.context,
    }
    if engine.error is not None:
        body["error"] = _words(engine.error)
    if engine.state == "loading" and engine.loading is not None:
        what, done, of = engine.loading
        body["loading"] = {"what": what, "done": done, "of": of}
    return body


def _words(error: HeadwiseError) -> dict[str, Any]:
    return {"what": error.what, "why": error.why, "do": error.do}


def ready(loaded: Loaded) -> dict[str, Any]:
    """Whether every self-check passed and the probe was answered; asking begins the probe."""
    engine, probe = loaded.engine, loaded.probe.look()
    checks = engine.facts.get("checks") or []
    return {
        "model": loaded.name,
        "ready": engine.state == "ready" and all(c["ok"] for c in checks) and probe["passed"],
        "state": engine.state,
        "checks": len(checks),
        "fused": engine.facts.get("fused"),
        "probe": probe,
    }


def state(loaded: Loaded) -> dict[str, Any]:
    """Requests with their progress, the layer that runs, counters, and tokens of each of the last seconds, oldest first."""
    engine, t = loaded.engine, loaded.engine.totals
    return {
        **_health(loaded),
        "requests": engine.requests(),
        "at": engine.at(),
        "pool": engine.pool,
        "restarts": t.restarts,
        "stalls": t.stalls,
        "ended": dict(t.requests),
        "prefill_tokens": t.prefill.total,
        "decode_tokens": t.decode.total,
        "cached_tokens": t.cached_tokens,
        "rates": {"seconds": KEPT_S, "prefill": t.prefill.recent(), "decode": t.decode.recent()},
    }
