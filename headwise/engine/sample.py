"""Logits to a token. Order of the filters, as in transformers and llama.cpp: temperature, top-k, top-p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1.0 filter nothing; the same seed gives the same tokens.

    Raises:
        UsageError: a value that makes no sense.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max-tokens", self.max_tokens, 1, 2**31),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top-p", self.top_p, 1e-9, 1.0),
            ("top-k", self.top_k, 0, 2**31),
            ("seed", self.seed or 0, 0, 2**63 - 1),
        ):
            if not least <= value <= most:
                raise UsageError(
                    f"--{name} {value} makes no sense",
                    why=f"it must lie from {least} to {most}",
                    do=f"--{name} {most if name == 'top-p' else least:g}",
                )


class Sampler:
    """Draws tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()  # on the CPU everywhere, so that a seed means the same on every device
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def token(self, logits_V: Tensor) -> int:
        s = self.sampling
        if s.temperature == 0.0:
            return int(logits_V.argmax())
        logits = logits_V.float().cpu() / s.temperature
        if s.top_k and s.top_k < logits.numel():
            kept, index = logits.topk(s.top_k)
        else:
            kept, index = logits.sort(descending=True)
        chances = kept.softmax(-1)
        if s.top_p < 1.0:
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= s.top_p, 0.0)  # the first always stays
        return int(index[torch.multinomial(chances, 1, generator=self.generator)])
