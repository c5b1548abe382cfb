"""The engine's process: loads the model by its plan, then runs rounds between messages. Ends when its parent does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from headwise.errors import HeadwiseError


def main(connection: Connection, beat: Any, model: str | None, settings: Mapping[str, Any]) -> None:
    """Sends ("loading", what, done, total), then ("ready", facts) or ("refused", class name, what, why, do), then events.

    Args:
        beat: four shared integers, written before each layer: a count, the layer, the step's first position, its tokens.
        model, settings: as `LLM` takes them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which ends this
    from headwise.engine.engine import Engine
    from headwise.engine.llm import LLM

    send = connection.send
    try:
        llm = LLM(model, **settings, progress=lambda *said: send(("loading", *said)))
        engine = Engine(llm, send)
    except HeadwiseError as error:
        send(("refused", type(error).__name__, error.what, error.why, error.do))
        return
    watched = [partial(_beating, beat, i, attend) for i, attend in enumerate(llm.runner.decoder.attends)]
    llm.runner.decoder.attends = watched
    try:
        send(("ready", facts(llm, [k.copies for k in engine.kept])))
        while True:
            while connection.poll(0 if engine.busy else None):
                what, value = connection.recv()
                if what == "submit":
                    engine.submit(value)
                elif what == "cancel":
                    engine.cancel(value)
            engine.round()
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
        return allocated_bytes([c for slot in llm.runner.slots for i, c in slot.items() if llm.spec.layers[i].kind == kind])

    return {
        **explain_json(llm.spec, llm.choices),
        "device": str(llm.device),
        "fused": all(c.fused for c in llm.choices),
        "checks": [asdict(c) for c in llm.checks],
        "plan": plan_json(llm.plan) | {"kept_bytes": llm.plan.kv_sliding_bytes if kept else 0},
        "measured": {
            "weights_bytes": allocated_bytes(llm.runner.weights),
            "kv_global_bytes": cache_bytes("global"),
            "kv_sliding_bytes": cache_bytes("sliding"),
            "kv_bytes": allocated_bytes(llm.runner.slots),
            "total_bytes": llm.runner.allocated_bytes,
            "kept_bytes": allocated_bytes(kept),
        },
    }
