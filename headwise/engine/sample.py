"""Logits to tokens. Order of the filters, as in transformers: temperature, top-k, top-p, min-p.

A row is drawn where its logits lie, by one number of [0, 1) from its request's own generator: the first token at which the sum of
the chances, in the order of the vocabulary or where there are filters from the likeliest down, passes that share of all. So a
seed means the same on every device, up to rounding; the host waits for tokens and not for logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.engine.request import Sampling

ROWS = 4  # drawn at a time: with filters a row of 262,144 logits takes 8 MB on the way, which no plan counts
BELOW_ONE = 1 - 2**-24  # the largest fp32 below 1


class Draw(NamedTuple):
    """What a row of logits is drawn by.

    Args:
        u: of [0, 1).
    """

    sampling: Sampling
    u: float = 0.0


def tokens(logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The token of each row, (W,), on the logits' device. Rows of one kind go together: no row's order depends on another's."""
    kinds = [_kind(d.sampling) for d in draws]
    if len(set(kinds)) < 2:
        return _of_kind(kinds[0] if kinds else "greedy", logits_WV, draws)
    out = torch.empty(len(draws), dtype=torch.int64, device=logits_WV.device)
    for kind in dict.fromkeys(kinds):
        of = [i for i, k in enumerate(kinds) if k == kind]
        at = torch.tensor(of, pin_memory=out.is_cuda).to(out.device, non_blocking=True)  # a list would be waited for
        out.index_copy_(0, at, _of_kind(kind, logits_WV.index_select(0, at), [draws[i] for i in of]))
    return out


def _of_kind(kind: str, logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    if kind == "greedy":
        return _best(logits_WV)
    some = [_TOKENS[kind](logits_WV[i : i + ROWS], draws[i : i + ROWS]) for i in range(0, len(draws), ROWS)]
    return some[0] if len(some) == 1 else torch.cat(some)


def _kind(s: Sampling) -> str:
    if s.temperature == 0.0:
        return "greedy"
    return "filtered" if s.top_k or s.top_p < 1.0 or s.min_p else "free"


def _best(logits_WV: Tensor) -> Tensor:
    if logits_WV.device.type == "cpu" and logits_WV.dtype == torch.float32:
        return torch.from_numpy(logits_WV.numpy().argmax(-1))  # vectorised: 20 us for 262,144 logits, where PyTorch takes 630
    return logits_WV.argmax(-1)


def _free(logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    temperature, u = _told(logits_WV, [(d.sampling.temperature, d.u) for d in draws])
    return _picked(_scaled(logits_WV, temperature).softmax(-1), u)


def _filtered(logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    V, every = logits_WV.shape[1], [d.sampling for d in draws]
    most = max(min(s.top_k or V, V) for s in every)
    numbers = [(s.temperature, d.u, s.top_k or V, s.top_p, s.min_p) for d, s in zip(draws, every, strict=True)]
    temperature, u, top_k, top_p, min_p = _told(logits_WV, numbers)
    x = _scaled(logits_WV, temperature)
    x, index = x.topk(most) if most < V else x.sort(descending=True)
    chances = x.masked_fill(torch.arange(most, device=x.device) >= top_k, float("-inf")).softmax(-1)
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill((before >= top_p) & (top_p < 1.0), 0.0)  # the first always stays
    chances = chances.masked_fill(chances < min_p * chances[:, :1], 0.0)
    return index.gather(-1, _picked(chances, u)[:, None])[:, 0]


_TOKENS = {"free": _free, "filtered": _filtered}


def _told(like: Tensor, numbers: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """Columns of a few numbers a row, where the logits are."""
    return torch.tensor(numbers, pin_memory=like.is_cuda).to(like.device, non_blocking=True).split(1, -1)


def _scaled(logits_WV: Tensor, temperature_W1: Tensor) -> Tensor:
    """The largest logit is subtracted first: divided by a temperature near 0 it would be infinite."""
    x = logits_WV.float()
    return (x - x.amax(-1, keepdim=True)) / temperature_W1.clamp(min=1e-30)


def _picked(chances_WN: Tensor, u_W1: Tensor) -> Tensor:
    """Sums made side by side need not grow: the whole is the largest at a token with a chance, so that one always passes."""
    sums = chances_WN.cumsum(-1).masked_fill(chances_WN <= 0.0, 0.0)
    return (sums > u_W1.clamp(max=BELOW_ONE) * sums.amax(-1, keepdim=True)).int().argmax(-1)


class Arriving:
    """Tokens of a device on their way to the host, which may launch more before it waits for them.

    A step without any is waited for too: what is told of a prompt is done then, and nobody queues behind all its chunks.
    """

    def __init__(self, drawn_W: Tensor) -> None:
        self._landed = None
        self._host = drawn_W
        if drawn_W.is_cuda:
            self._host = torch.empty(drawn_W.shape, dtype=drawn_W.dtype, pin_memory=True).copy_(drawn_W, non_blocking=True)
            self._landed = torch.cuda.Event()
            self._landed.record(torch.cuda.current_stream(drawn_W.device))

    def wait(self) -> list[int]:
        if self._landed is not None:
            self._landed.synchronize()
        return self._host.tolist()


class Sampler:
    """Draws tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = Random(sampling.seed)
        self._ready: deque[float] = deque()  # numbers of the next tokens
        self._counts: dict[int, int] = {}

    @property
    def plain(self) -> bool:
        """Whether tokens depend on their logits alone: no biases, no penalties."""
        s = self.sampling
        return not (s.logit_bias or s.presence_penalty or s.frequency_penalty)

    def draws(self, n: int, after: int = 0) -> list[Draw]:
        """What the next `n` tokens are drawn by, or those behind `after` of them."""
        if self.sampling.temperature == 0.0:
            return [Draw(self.sampling)] * n
        self._ready += [self._random.random() for _ in range(after + n - len(self._ready))]
        return [Draw(self.sampling, self._ready[i]) for i in range(after, after + n)]

    def token(self, logits_V: Tensor, allowed_V: Tensor | None = None, drawn: int | None = None) -> int:
        """The next token.

        Args:
            allowed_V: True where a grammar lets a token pass.
            drawn: what `tokens` drew, without regard to biases, penalties or a grammar.
        """
        s, logits = self.sampling, self._biased(logits_V, allowed_V)
        if drawn is None or logits is not logits_V:
            drawn = int(tokens(logits[None], self.draws(1)))
        if self._ready:
            self._ready.popleft()
        if s.presence_penalty or s.frequency_penalty:
            self._counts[drawn] = self._counts.get(drawn, 0) + 1
        return drawn

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
