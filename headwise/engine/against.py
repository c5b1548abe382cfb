"""`headwise verify MODEL --against URL`: the same model here and in a running server, token by token.

The server continues fixed prompts greedily and gives log-probabilities; this engine then scores the server's own tokens, so
that every position is compared, also after a difference. A position agrees when our best token is the server's, or when we
hold the two within `TIE` nats (rounding decides such a step). Token ids are sent and compared where the API takes them
(llama-server, vLLM and other OpenAI-compatible servers); Ollama takes text, and its tokens are compared by their bytes.
Sources: llama-server README (`/completion`, n_probs, return_tokens); vLLM 0.33 `/v1/completions` return_tokens_as_token_ids;
Ollama `/api/generate` with raw and logprobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from headwise import __version__
from headwise.doctor.servers import Engine, Server, ask, http_at, identify
from headwise.errors import ProbeError

if TYPE_CHECKING:
    from headwise.engine.llm import LLM

N_TOKENS = 32
TOP = 5
TIE = 0.05  # nats between two tokens that rounding may exchange
MEAN_DIFFERENCE = 0.05  # nats, over the server's candidates; equal weights stay far below
TIMEOUT_S = 300.0  # for one prompt; a server that computes answers in time, one that is stuck is an error
PROMPTS = {
    "english": "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is",
    "python": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "many languages": "Water, eau, agua, Wasser, вода, 水, مياه: the word for water in",
    "long": "\n".join(f"Line {i}: the number after {i} is {i + 1}." for i in range(300)) + "\nLine 300:",
}
NAMES = {"llama.cpp": "llama-server", "openai": "OpenAI-compatible server"}
Step = tuple[str | int, dict[str | int, float]]  # the server's token and its candidates' log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt. `equal` counts positions with the same best token, `ties` those that differ within TIE."""

    prompt: str
    prompt_tokens: int
    tokens: int
    equal: int
    ties: int
    mean_difference: float  # of log-probabilities, nats, over the server's candidates
    max_difference: float

    @property
    def agrees(self) -> bool:
        return self.tokens > 0 and self.equal + self.ties == self.tokens and self.mean_difference < MEAN_DIFFERENCE


def compare(llm: LLM, url: str, *, as_json: bool, console: Console) -> int:
    """Prints the comparison; 0 where every prompt agrees, 1 where one does not.

    Raises:
        ProbeError: the server cannot be reached, is of an unknown kind, or answers without tokens or log-probabilities.
    """
    server = identify(http_at(url))
    engine, room = NAMES.get(server.engine, server.engine), server.context
    version = f"{server.version} ({server.model})" if server.engine == "ollama" else server.version
    steps_of = _ASK[server.engine]
    rows = []
    for name, text in PROMPTS.items():
        ids = llm.tokenizer.encode(text)
        ids = ids[: max(1, min(room or llm.plan.workload.context, llm.plan.workload.context) - N_TOKENS - 1)]
        steps = steps_of(server, ids, llm.tokenizer.decode(ids))
        if not steps:
            raise ProbeError(
                f"{engine} answered the prompt {name!r} with no tokens", why="nothing can be compared", do="check its log"
            )
        rows.append(_compare(llm, name, ids, steps))
        if not as_json:
            console.print(f"  {name} ...", style="dim", highlight=False)
    agrees = all(r.agrees for r in rows)
    if as_json:
        print(
            json.dumps(
                {
                    "model": llm.spec.name,
                    "engine": engine,
                    "version": version,
                    "agrees": agrees,
                    "prompts": [asdict(r) | {"agrees": r.agrees} for r in rows],
                }
            )
        )
    else:
        console.print(report(llm, f"{engine} {version}".strip(), rows, agrees), markup=False, highlight=False)
    return 0 if agrees else 1


def report(llm: LLM, server: str, rows: list[Comparison], agrees: bool) -> str:
    """A block of plain text to paste into an issue."""
    w = llm.plan.workload
    lines = [
        f"headwise {__version__} against {server}: {'agrees' if agrees else 'DIFFERS'}",
        f"model {llm.spec.name}; {llm.where}, {w.dtype}, KV {w.kv['global'].name}/{w.kv['sliding'].name}",
        f"{'prompt':<15} {'tokens':>6} {'equal':>7} {'ties':>5} {'mean |d| nats':>14} {'max |d|':>8}",
    ]
    lines += [
        f"{r.prompt:<15} {r.prompt_tokens:>6} {r.equal:>3}/{r.tokens:<3} {r.ties:>5} "
        f"{r.mean_difference:>14.4f} {r.max_difference:>8.4f}"
        for r in rows
    ]
    return "\n".join(lines)


def _compare(llm: LLM, name: str, ids: list[int], steps: list[Step]) -> Comparison:
    tokens = [_id(llm, token) for token, _ in steps]
    logprobs = llm.logits(ids + tokens[:-1])[len(ids) - 1 :].log_softmax(-1)
    equal = ties = 0
    differences: list[float] = []
    for ours, token, (_, candidates) in zip(logprobs, tokens, steps, strict=True):
        best = int(ours.argmax())
        equal += best == token
        ties += best != token and float(ours[best] - ours[token]) < TIE
        differences += [abs(float(ours[_id(llm, c)]) - theirs) for c, theirs in candidates.items()]
    d = torch.tensor(differences or [float("inf")])
    return Comparison(
        prompt=name,
        prompt_tokens=len(ids),
        tokens=len(tokens),
        equal=equal,
        ties=ties,
        mean_difference=float(d.mean()),
        max_difference=float(d.max()),
    )


def _id(llm: LLM, token: str | int) -> int:
    """Our id of a server's token; text tokens go through the tokenizer, which must make one token of them."""
    if isinstance(token, int):
        if not 0 <= token < llm.spec.vocab_size:
            raise ProbeError(
                f"the server speaks of token {token}", why=f"this model has {llm.spec.vocab_size}", do="load the same model"
            )
        return token
    found = llm.tokenizer.encode(token, add_bos=False, parse_special=True)
    if len(found) != 1:
        raise ProbeError(
            f"the server's token {token!r} is {len(found)} tokens here",
            why="the two do not have the same vocabulary, or the token is part of a character",
            do="load the same model; llama-server and vLLM compare by token id",
        )
    return found[0]


def _asked(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = ask(server.transport, path, body, timeout_s=TIMEOUT_S)
    return answer if isinstance(answer, dict) else {}


def _missing(what: str) -> ProbeError:
    return ProbeError(
        f"the server's answer has no {what}", why="the comparison needs it", do="a newer version of the server gives it"
    )


def _llama_server(server: Server, ids: list[int], _: str) -> list[Step]:
    body = {"prompt": ids, "n_predict": N_TOKENS, "temperature": 0, "n_probs": TOP, "return_tokens": True, "cache_prompt": False}
    answer = _asked(server, "/completion", body)
    steps = answer.get("completion_probabilities")
    if not steps:
        raise _missing("completion_probabilities")
    out: list[Step] = []
    rest = iter(steps)
    step = next(rest)
    for token in answer.get("tokens") or [s["id"] for s in steps]:  # a token that ends amid a character has no step of its own
        if step is not None and step["id"] == token:
            out.append((token, {c["id"]: c["logprob"] for c in step.get("top_logprobs", [])}))
            step = next(rest, None)
        else:
            out.append((token, {}))
    return out


def _openai(server: Server, ids: list[int], _: str) -> list[Step]:
    body = {
        "model": server.model,
        "prompt": ids,
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    choices = _asked(server, "/v1/completions", body).get("choices") or [{}]
    found = choices[0].get("logprobs")
    if not found or not found.get("tokens"):
        raise _missing("logprobs")

    def key(token: str) -> str | int:
        return int(token.removeprefix("token_id:")) if token.startswith("token_id:") else token

    tops = found.get("top_logprobs") or [{}] * len(found["tokens"])
    return [(key(t), {key(c): p for c, p in (top or {}).items()}) for t, top in zip(found["tokens"], tops, strict=True)]


def _ollama(server: Server, _: list[int], text: str) -> list[Step]:
    options = {"temperature": 0, "num_predict": N_TOKENS}
    body = {
        "model": server.model,
        "prompt": text,
        "raw": True,
        "stream": False,
        "options": options,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    steps = _asked(server, "/api/generate", body).get("logprobs")
    if not steps:
        raise _missing("logprobs")
    return [(s["token"], {c["token"]: c["logprob"] for c in s.get("top_logprobs", [])}) for s in steps]


_ASK: dict[Engine, Callable[[Server, list[int], str], list[Step]]] = {
    "llama.cpp": _llama_server,
    "ollama": _ollama,
    "vllm": _openai,
    "openai": _openai,
}
