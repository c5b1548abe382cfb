"""What the loaded models do now, for `/health`, `/ready` and `/v1/state`; what each was loaded as is at `/v1/attention`."""

from __future__ import annotations

from typing import Any

from headwise.engine.rates import KEPT_S
from headwise.server.models import Loaded, Models


def health(models: Models) -> dict[str, Any]:
    """`status`: ok, idle (nothing is loaded; a request loads), loading, or error; of the whole, and of each loaded model.

    A model that goes is `unloading`, and no error.
    """
    each = [_health(m) for m in models.loaded.values()]
    states = {m["status"] for m in each} - {"unloading"}
    body: dict[str, Any] = {"model": models.first.name, "models": each}
    if "ok" in states or not states:
        status = "ok" if states else "idle"
    else:
        status = "loading" if "loading" in states else "error"
    for name, (error, _) in models.failed.items():
        body["error"] = {"model": name, **error.to_json()}
        status = "error" if status == "idle" else status
    return {"status": status, **body}


def _health(loaded: Loaded) -> dict[str, Any]:
    """The state in a word, and what loads or what went wrong."""
    engine = loaded.engine
    body: dict[str, Any] = {
        "model": loaded.name,
        "status": "unloading" if loaded.ending else {"ready": "ok", "loading": "loading"}.get(engine.state, "error"),
        "context": loaded.context,
    }
    if engine.error is not None:
        body["error"] = engine.error.to_json()
    if engine.state == "loading" and engine.loading is not None:
        what, done, of = engine.loading
        body["loading"] = {"what": what, "done": done, "of": of}
    return body


def ready(models: Models) -> dict[str, Any]:
    """Whether requests can be sent: idle, as a request loads, or a model is ready and none has broken.

    A model that loads or is probed for the first time beside a ready one is no reason to send nobody: `coming`.
    """
    each = [_ready(m) for m in models.loaded.values() if not m.ending]
    fine = all(m["ready"] or m["coming"] for m in each) and (any(m["ready"] for m in each) or not (each or models.failed))
    return {"ready": fine, "models": each}


def _ready(loaded: Loaded) -> dict[str, Any]:
    """Whether every self-check passed and the probe was answered; asking begins the probe."""
    engine, probe = loaded.engine, loaded.probe.look()
    checks = engine.facts.get("checks") or []
    up = engine.state == "ready" and all(c["ok"] for c in checks)
    first_load = engine.state == "loading" and not engine.facts
    return {
        "model": loaded.name,
        "ready": up and probe["passed"],
        "coming": first_load or (up and not probe["passed"] and probe["error"] is None),
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
