"""From a URL to a probe: the server is identified, and what is known of its model and cards is put beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from headwise import api
from headwise.doctor.probe import LENGTHS, LIMIT_S, Options, Probe, Progress, lengths_that_fit, probe
from headwise.doctor.servers import Engine, Http, Server, http_at, identify
from headwise.errors import HeadwiseError, UsageError
from headwise.hardware.gpus import find_gpu
from headwise.hardware.usage import usage_sampler
from headwise.planner.ceiling import Ceiling, ceiling
from headwise.spec import catalogue
from headwise.spec.read import Source, open_model


def visit(
    url: str,
    *,
    lengths: Sequence[int] | None = None,
    engine: Engine | None = None,
    model: str | None = None,
    compare: str | None = None,
    stall_s: float | None = None,
    limit_s: float | None = None,
    model_source: str | None = None,
    gpus: Sequence[str] = (),
    api_key_env: str | None = None,
    progress: Progress = lambda *_: None,
) -> tuple[Probe, Probe | None]:
    """A running server at `lengths` (default: those of LENGTHS that its context holds), and a second one at the same.

    Args:
        model_source: the served model, to compare with its ceilings; default what the server's names lead to on this machine.
        gpus: the server's cards; default this machine's, where the server is local.
        api_key_env: the key goes to a second server only if it has the first one's host.
    Raises:
        ProbeError: a server does not answer, or is of no kind that is known. UsageError: an argument makes no sense.
    """
    if any(n is not None and not 0 < n < 1e9 for n in (stall_s, limit_s)):
        raise UsageError("a limit must be positive", why=f"--stall {stall_s}, --limit {limit_s}", do="--stall 60 --limit 900")
    for name in gpus:
        find_gpu(name)
    key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not key:
        raise UsageError(f"{api_key_env} is not set", why="--api-key-env names it", do=f"export {api_key_env}=...")
    transport = http_at(url, key=key)
    others = None if compare is None else http_at(compare)
    if others and key and (others.host, others.tls) == (transport.host, transport.tls):
        others = http_at(compare or "", key=key)
    server = identify(transport, engine=engine, model=model)
    second = None if others is None else identify(others, engine=engine, model=model)
    if lengths is None:
        lengths = lengths_that_fit(second, lengths_that_fit(server, LENGTHS)) if second else lengths_that_fit(server, LENGTHS)
    source = _served(server, transport, model_source)

    def options(at: Http) -> Options:
        return Options(
            stall_s=stall_s,
            limit_s=limit_s or LIMIT_S,
            spec=source.spec if source else None,
            ceiling=_ceilings(source, gpus) if source and (gpus or at.local) else None,
            usage=usage_sampler() if at.local else None,
            progress=progress,
        )

    first = probe(server, lengths, options(transport))
    return first, probe(second, lengths, options(others)) if second and others else None


def _served(server: Server, transport: Http, named: str | None) -> Source | None:
    """The model that a server holds, where it was named or its files lie on this machine; a catalogue name always."""
    if named:
        return open_model(named, env=os.environ)
    guesses = []
    if transport.local:
        guesses = [server.path] if server.path else [f"ollama:{server.model}"] if server.engine == "ollama" else []
    for guess in (*guesses, catalogue.find(server.model)):
        try:
            if guess:
                return open_model(guess, env=os.environ)
        except HeadwiseError:
            continue  # a guess, not the user's word
    return None


def _ceilings(source: Source, gpus: Sequence[str]) -> Callable[[int], Ceiling | None]:
    """Prompt tokens -> the ceiling of the fastest card; None where no card is known."""

    def at(n: int) -> Ceiling | None:
        try:
            p = api.plan(source, context=min(n, source.spec.max_context), gpus=gpus)
            found = [ceiling(p, s.target.gpu) for s in p.shares if s.target.gpu]
        except HeadwiseError:
            return None
        return max(found, key=lambda c: c.prefill_tok_s or 0.0, default=None)

    return at
