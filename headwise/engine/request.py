"""What passes between the server and the engine: a request goes in, events come out. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from headwise.errors import UsageError
from headwise.text.grammar import Grammar


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1.0 and min_p 0.0 filter nothing; the same seed gives the same tokens.

    The penalties count generated tokens only, as OpenAI's do; `logit_bias` is added by token id.

    Raises:
        UsageError: a value that makes no sense.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max-tokens", self.max_tokens, 1, 2**31),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top-p", self.top_p, 1e-9, 1.0),
            ("top-k", self.top_k, 0, 2**31),
            ("min-p", self.min_p, 0.0, 1.0),
            ("presence-penalty", self.presence_penalty, -10.0, 10.0),
            ("frequency-penalty", self.frequency_penalty, -10.0, 10.0),
            ("seed", self.seed or 0, 0, 2**63 - 1),
        ):
            if not least <= value <= most:
                raise UsageError(
                    f"--{name} {value} makes no sense",
                    why=f"it must lie from {least} to {most}",
                    do=f"--{name} {most if name == 'top-p' else least:g}",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One continuation of `prompt`.

    Args:
        client: requests of different clients take turns.
        top_logprobs: log-probabilities of each token and of so many of the best; None computes none.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    client: str = ""
    grammar: Grammar | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """`done` of `total` prompt tokens are in the cache, `cached` of them since an earlier request."""

    request: int
    done: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer; log-probabilities (nats) are of the model's own distribution, before temperature."""

    request: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The last event of a request. Seconds are wall time of its own steps and of those it waited for between them.

    Args:
        tokens: of the answer, `end` included: the end token that the model said, of which no event tells.
        drafted, accepted: tokens that were tried ahead of their turn, and those of them that were kept.
        error: what, why, do; where the reason is "error".
        retry: the same request may succeed if it is sent again (the engine was at fault, not the request).
    """

    request: int
    reason: Reason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    end: int | None = None
    drafted: int = 0
    accepted: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    error: tuple[str, str, str] | None = None
    retry: bool = False


Event = Prefill | Token | Finish
