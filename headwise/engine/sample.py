"""Logits to a token. Order of the filters, as in transformers: temperature, top-k, top-p, min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.engine.request import Sampling


def best_of(logits_TV: Tensor) -> list[int]:
    """The token of the largest logit in each row; on a GPU the host waits here."""
    if logits_TV.device.type == "cpu" and logits_TV.dtype == torch.float32:
        return logits_TV.numpy().argmax(-1).tolist()  # vectorised: 20 us for 262,144 logits, where PyTorch takes 630
    return logits_TV.argmax(-1).tolist()


class Sampler:
    """Draws tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()  # on the CPU everywhere, so that a seed means the same on every device
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

        self._counts: dict[int, int] = {}

    def token(self, logits_V: Tensor, allowed_V: Tensor | None = None, best: int | None = None) -> int:
        """The next token.

        Args:
            allowed_V: True where a grammar lets a token pass.
            best: the token of the largest logit, where it is known.
        """
        s = self.sampling
        logits = self._biased(logits_V, allowed_V)
        greedy = s.temperature == 0.0
        if greedy and best is not None and logits is logits_V:
            token = best
        else:
            token = int(logits.argmax()) if greedy else self._drawn(logits.float().cpu())
        if s.presence_penalty or s.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _biased(self, logits_V: Tensor, allowed_V: Tensor | None) -> Tensor:
        """The logits with biases, penalties and the grammar's mask; the given ones where there is none of these."""
        s = self.sampling
        if not s.logit_bias and not self._counts and allowed_V is None:
            return logits_V
        logits = logits_V.float().cpu()  # a copy wherever the decoder's own buffer would be written
        logits = logits.clone() if logits.data_ptr() == logits_V.data_ptr() else logits
        for token, bias in s.logit_bias.items():
            if 0 <= token < logits.numel():
                logits[token] += bias
        for token, count in self._counts.items():
            logits[token] -= s.presence_penalty + s.frequency_penalty * count
        return logits if allowed_V is None else logits.masked_fill_(~allowed_V, float("-inf"))

    def _drawn(self, logits: Tensor) -> int:
        """A token by chance. The largest logit is subtracted first: divided by a temperature near 0 it would be infinite."""
        s = self.sampling
        logits = (logits - logits.max()) / max(s.temperature, 1e-30)  # below about 1e-38 it is 0 in fp32
        if s.top_k and s.top_k < logits.numel():
            kept, index = logits.topk(s.top_k)
        else:
            kept, index = logits.sort(descending=True)
        chances = kept.softmax(-1)
        if s.top_p < 1.0:
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= s.top_p, 0.0)  # the first always stays
        if s.min_p:
            chances = chances.masked_fill(chances < s.min_p * chances[0], 0.0)
        return int(index[torch.multinomial(chances, 1, generator=self.generator)])
