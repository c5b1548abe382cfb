"""What `headwise ps` and `headwise stop` ask of a running server."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from headwise.errors import ProbeError, UsageError

WAIT_S = 30.0
_ENDING_S = 10.0  # for a process to end


def loaded(url: str, key: str | None) -> list[dict[str, Any]]:
    """The loaded models, as `/api/ps` says them.

    Raises:
        ProbeError: nobody answers there, or somebody else does; UsageError: `url` is none.
    """
    answer = _ask(url, key, "/api/ps")
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("name"), str) for m in models):
        raise ProbeError(f"{url} is no headwise", why="its /api/ps says no list of models", do="--url of a headwise serve")
    return models


def unload(url: str, key: str | None, model: str) -> dict[str, Any]:
    """Asks for a model to go when nobody uses it; {"model", "requests" that still use it}.

    Raises:
        ProbeError: nobody answers there, or the model is unknown or not loaded.
    """
    before = {m["name"]: m for m in loaded(url, key)}
    said = _ask(url, key, "/api/generate", {"model": model, "keep_alive": 0})
    name = str(said.get("model", model))
    if name not in before:
        raise ProbeError(f"{name} is not loaded", why=f"loaded: {', '.join(before) or 'none'}", do="headwise ps")
    until = time.monotonic() + _ENDING_S
    while (there := {m["name"]: m for m in loaded(url, key)}.get(name)) and not there.get("requests") and time.monotonic() < until:
        time.sleep(0.1)
    return {"model": name, "requests": there.get("requests", 0) if there else 0}


def _ask(url: str, key: str | None, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    where = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    try:
        request = urllib.request.Request(where + path, data, headers)
        if request.type not in ("http", "https"):
            raise ValueError(f"{request.type} is not http")
    except ValueError as error:
        raise UsageError(f"{url!r} is no URL", why=str(error), do="--url http://127.0.0.1:7433") from error
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.loads(answer.read(2**24))
    except urllib.error.HTTPError as error:
        try:
            said = json.loads(error.read(2**20))["error"]
        except (ValueError, KeyError, TypeError):
            said = f"HTTP {error.code}"
        raise ProbeError(f"{where} refused", why=said if isinstance(said, str) else str(said.get("message", said))) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = str(getattr(error, "reason", error))
        raise ProbeError(f"no server answers at {where}", why=why, do="headwise serve, or --url where it runs") from error
