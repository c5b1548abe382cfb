"""The description is of this server, and what follows it is never answered with a fault of ours."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from server.test_app import call

schemathesis = pytest.importorskip("schemathesis")
SMALL = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 1}


@pytest.fixture(scope="module")
def api(live: Any) -> Any:
    return schemathesis.openapi.from_url(live.url + "/openapi.json")


def test_requests_made_from_the_description_are_answered_or_refused(live: Any, api: Any) -> None:
    """Every status, type and body that comes back is one that the description names; a 5xx is a bug."""
    assert any(call(live, "/ready")[0] == 200 or time.sleep(0.05) for _ in range(1200))  # its probe is through
    named = schemathesis.checks.CHECKS.get_one
    checks = [
        schemathesis.checks.not_a_server_error,
        *(named(f"{what}_conformance") for what in ("status_code", "content_type", "response_schema")),
    ]
    seen: Counter[int] = Counter()
    for found in api.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                case.body = little(case.path, case.body)
                response = case.call(timeout=60)
                seen[response.status_code] += 1
                case.validate_response(response, checks=checks)

            with contextlib.suppress(Unsatisfiable):  # a route without parameters takes nothing wrong
                ask()

    assert seen[200] > 40 and seen[400] > 20, seen
    assert live.engine.running == live.engine.waiting == 0


def little(path: str, body: Any) -> Any:
    """The same body, asking for two tokens of the model as it is loaded."""
    if not isinstance(body, dict):
        return body
    unlimited = (0, 0.0, None)
    body = {k: SMALL[k] if k in SMALL and (v in unlimited or (type(v) in (int, float) and v > 0)) else v for k, v in body.items()}
    if not path.startswith("/api/"):
        return {"max_output_tokens" if path.endswith("responses") else "max_tokens": 2} | body
    if "keep_alive" in body:
        body = {**body, "keep_alive": -1}
    options = body.get("options") or {}
    return body | {"options": {**options, "num_predict": 2, "num_ctx": None}} if isinstance(options, dict) else body


def test_every_route_is_described(live: Any) -> None:
    """A route added without its body's schema."""
    from headwise.server.app import PROTOCOLS
    from headwise.server.openapi import BODIES

    described = call(live, "/openapi.json")[1]
    operations = {(path, method): op for path, item in described["paths"].items() for method, op in item.items()}

    assert set(PROTOCOLS) <= set(BODIES) <= {path for path, _ in operations}
    for (path, method), operation in operations.items():
        refused = operation["summary"].startswith("Refused")
        assert len(operation["summary"].split()) > 1 or refused, path
        assert ("requestBody" in operation) == (method == "post" and not refused), path
    assert len({op["operationId"] for op in operations.values()}) == len(operations)
    assert call(live, "/nothing")[0] == 404
