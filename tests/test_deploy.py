"""deploy/: what can be checked without a service manager, an image builder or a Grafana."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headwise.engine.process import Totals
from headwise.options import BY_NAME
from headwise.server.metrics import metrics
from headwise.server.models import Models
from headwise.spec.read import open_model
from headwise.spec.shelf import held

DEPLOY = Path(__file__).parents[1] / "deploy"


def told(totals: dict[str, Totals]) -> str:
    """What /metrics says of models with these totals."""
    return metrics(Models([held(None, open_model(None, env={}))], {"device": "cpu"}, {}, totals=totals))


def exported() -> set[str]:
    """The names of all samples that /metrics has, read by Prometheus's own parser."""
    parser = pytest.importorskip("prometheus_client.parser")
    totals = Totals()
    totals.requests["stop"] += 1
    families = list(parser.text_string_to_metric_families(told({'a "model"\n': totals})))
    assert {f.type for f in families} == {"gauge", "counter", "histogram"}
    return {sample.name for family in families for sample in family.samples}


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported() -> None:
    """A panel that is empty for ever looks like a quiet server."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    named = {name for q in queries for name in re.findall(r"\b(?:headwise_|vllm:)\w+", q)}

    assert len(queries) > 20
    assert all(re.search(r"headwise_|vllm:", q) for q in queries)
    assert named <= exported()
    panels = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in dashboard["panels"]]
    for i, (x, y, w, h) in enumerate(panels):
        assert x + w <= 24
        assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in panels[:i])


def test_a_histogram_counts_as_prometheus_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    totals = Totals()
    for seconds in (0.3, 0.31, 1e6):
        totals.times.queue.observe(seconds)
    families = parser.text_string_to_metric_families(told({"m": totals, "other": Totals()}))
    (family,) = [f for f in families if f.name == "vllm:request_queue_time_seconds"]
    mine = [s for s in family.samples if s.labels["model_name"] == "m"]
    found = {s.labels.get("le", s.name.rsplit("_", 1)[1]): s.value for s in mine}

    assert [found[k] for k in ("0.3", "0.5", "7680.0", "+Inf", "count")] == [1, 2, 2, 3, 3]
    assert found["sum"] == pytest.approx(1e6 + 0.61)


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml", "headwise.service"])
def test_variables_are_options(name: str) -> None:
    """A variable that nothing reads is a setting that its owner believes in."""
    known = {o.variable for o in BY_NAME.values()} | {"HEADWISE_CONFIG", "HEADWISE_MODELS"}  # the last is compose's own
    assert set(re.findall(r"HEADWISE_\w+", (DEPLOY / name).read_text())) <= known


def test_the_image_runs_as_nobody_in_particular_and_says_how_it_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    compose = (DEPLOY / "compose.yaml").read_text()
    last = text[text.rindex("FROM ") :]

    assert re.search(r"^USER (?!0\b|root)\d+", last, re.MULTILINE)
    assert "HEALTHCHECK" in last and "/health" in last
    assert re.findall(r'- "([\d.]+):7433:7433"', compose) == ["127.0.0.1"]
    if hadolint := shutil.which("hadolint"):
        done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_unit_is_one(tmp_path: Path) -> None:
    if (systemd := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not here")
    unit = tmp_path / "headwise.service"
    text = (DEPLOY / "headwise.service").read_text()
    unit.write_text(text.replace("/usr/local/bin/headwise", sys.executable))
    done = subprocess.run([systemd, "verify", unit], capture_output=True, text=True)

    assert (done.returncode, [line for line in done.stderr.splitlines() if "headwise" in line]) == (0, [])
    stall, watchdog = BY_NAME["stall_seconds"].default, re.findall(r"^WatchdogSec=(\d+)", text, re.MULTILINE)
    assert isinstance(stall, float) and 2 * stall < int(watchdog[0])  # the engine's own watchdog comes first


def test_only_answers_are_timed() -> None:
    """Times of requests that failed would make a broken server look fast."""
    from headwise.engine.request import Finish

    times = Totals().times
    times.finished(Finish(request=1, reason="error", prefill_s=0.001))
    times.finished(Finish(request=2, reason="length", queue_s=1.0, prefill_s=2.0, decode_s=4.0))

    assert (times.first_token.sum, times.whole.sum, sum(times.whole.counts)) == (3.0, 7.0, 1)
