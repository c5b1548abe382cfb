"""The engine's process: loads the model by its plan, then runs rounds between messages. Ends when its parent does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from headwise.errors import HeadwiseError

ENGINE_SETTINGS = ("deterministic", "speculate")  # of which `LLM` takes the first as well
TOLD_S = 1.0  # pages and slots are told no more often while requests run


def main(connection: Connection, beat: Any, model: str | None, settings: Mapping[str, Any]) -> None:
    """Sends ("loading", what, done, total), then ("ready", facts) or ("refused", class name, what, why, do), then events,
    and ("pool", counts) when all requests have ended and now and then before.

    Args:
        beat: four shared integers, written before each layer: a count, the layer, the step's first position, its tokens.
        model, settings: as `LLM` takes them, and `ENGINE_SETTINGS` as `Engine` does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which ends this
    from headwise.engine.engine import Engine
    from headwise.engine.llm import LLM

    send = connection.send
    try:
        how = {k: v for k, v in settings.items() if k != "speculate"}
        llm = LLM(model, **how, progress=lambda *said: send(("loading", *said)))
        engine = Engine(llm, send, **{k: settings[k] for k in ENGINE_SETTINGS if k in settings})
    except HeadwiseError as error:
        send(("refused", type(error).__name__, *error.parts))
        return
    for stage in llm.runner.stages:
        decoder = stage.decoder
        decoder.attends = [partial(_beating, beat, i, attend) for i, attend in zip(stage.layers, decoder.attends, strict=True)]
    try:
        send(("ready", facts(llm, [k.copies for k in engine.prefixes.kept])))
        send(("pool", engine.prefixes.counts()))
        told = time.monotonic()
        while True:
            while connection.poll(0 if engine.busy else None):
                what, value = connection.recv()
                if what == "submit":
                    engine.submit(value)
                elif what == "cancel":
                    engine.cancel(value)
            engine.round()
            if not engine.busy or time.monotonic() - told > TOLD_S:
                send(("pool", engine.prefixes.counts()))
                told = time.monotonic()
    except (EOFError, OSError):  # the server is gone
        return


def _beating(beat: Any, layer: int, attend: Callable[..., None], q: Any, cache: Any, span: Any, **rest: Any) -> None:
    beat[0], beat[1], beat[2], beat[3] = beat[0] + 1, layer, span.start, span.n
    attend(q, cache, span, **rest)


def facts(llm: Any, kept: Any) -> dict[str, Any]:
    """What the server tells of the loaded model: layers and choices, self-checks, the plan, and bytes measured now.

    `kept_bytes` is host memory beside the plan of `run`: a copy of the rings, or nothing where the host has no room.
    """
    from headwise.api import explain_json, plan_json
    from headwise.engine.measure import allocated_bytes

    def cache_bytes(kind: str) -> int:
        return allocated_bytes([c for i, c in llm.runner.caches.items() if llm.spec.layers[i].kind == kind])

    return {
        **explain_json(llm.spec, llm.choices),
        "device": llm.where,
        "fused": all(c.fused for c in llm.choices),
        "checks": [asdict(c) for c in llm.checks],
        "plan": plan_json(llm.plan) | {"kept_bytes": len(kept) * llm.plan.copy_bytes},
        "measured": {
            "weights_bytes": allocated_bytes([s.weights for s in llm.runner.stages]),
            "kv_global_bytes": cache_bytes("global"),
            "kv_sliding_bytes": cache_bytes("sliding"),
            "kv_bytes": allocated_bytes(llm.runner.caches),
            "total_bytes": llm.runner.allocated_bytes,
            "devices": [{"device": str(s.device), "allocated_bytes": s.allocated_bytes} for s in llm.runner.stages],
            "kept_bytes": allocated_bytes(kept),
        },
    }
