"""Logits to tokens. Order of the filters, as in transformers: temperature, top-k, top-p, min-p.

A row is drawn where its logits lie, by one number of [0, 1) from its request's own generator: the first token, in the order of the
vocabulary, at which the sum of the kept chances passes that share of all. Of equal logits at the edge of top-k or top-p the first
are kept. So a seed means the same on every device, up to rounding; the host waits for tokens and not for logits. `kernels.draw`
does it in up to three launches; what stands here is the same in PyTorch's operators, which that is tested against.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.engine.request import Sampling
from headwise.model.ops import plain_softcap

ROWS = 4  # drawn at a time by PyTorch: with filters a row of 262,144 logits takes 8 MB on the way, which no plan counts
COLDEST = 1e-30  # temperatures below are 0 in fp32, or make sums of it infinite; the best token alone has a chance long before
BELOW_ONE = 1 - 2**-24  # the largest fp32 below 1


class Draw(NamedTuple):
    """What a row of logits is drawn by.

    Args:
        u: of [0, 1).
    """

    sampling: Sampling
    u: float = 0.0


class Room(NamedTuple):
    """What `kernels.draw` works in, of the arena."""

    words: Tensor
    done: Tensor


def tokens(logits_WV: Tensor, draws: Sequence[Draw], cap: float | None = None, room: Room | None = None) -> Tensor:
    """The token of each row, (W,), on the logits' device. No row's token depends on another's.

    Args:
        cap: of the logits, which have not been capped, and are afterwards: cap * tanh(logits / cap).
        room: our kernel draws.
    """
    if room is not None:
        return _by_kernel(logits_WV, draws, cap, room)
    if cap is not None:
        plain_softcap(logits_WV, cap)
    kinds = [_kind(d.sampling) for d in draws]
    if len(set(kinds)) < 2:
        return _of_kind(kinds[0] if kinds else "greedy", logits_WV, draws)
    out = torch.empty(len(draws), dtype=torch.int64, device=logits_WV.device)
    for kind in dict.fromkeys(kinds):
        of = [i for i, k in enumerate(kinds) if k == kind]
        at = torch.tensor(of, pin_memory=out.is_cuda).to(out.device, non_blocking=True)  # a list would be waited for
        out.index_copy_(0, at, _of_kind(kind, logits_WV.index_select(0, at), [draws[i] for i in of]))
    return out


def _by_kernel(logits_WV: Tensor, draws: Sequence[Draw], cap: float | None, room: Room) -> Tensor:
    from headwise.kernels.draw import draw

    V, warm = logits_WV.shape[1], [d.sampling for d in draws if d.sampling.temperature > 0.0]
    ranked = any(0 < s.top_k < V or s.top_p < 1.0 for s in warm)
    return draw(logits_WV, _numbers(logits_WV, draws) if warm else None, ranked=ranked, cap=cap, words=room.words, done=room.done)


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
    temperature, u, *_ = _numbers(logits_WV, draws).split(1, -1)
    return _picked(_weights(logits_WV, temperature), u)


def _filtered(logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    V = logits_WV.shape[1]
    most = max(min(d.sampling.top_k or V, V) for d in draws)
    temperature, u, top_k, top_p, min_p = _numbers(logits_WV, draws).split(1, -1)
    index = _best_first(logits_WV, most)
    weights = _weights(logits_WV.gather(-1, index), temperature)
    weights = weights.masked_fill(torch.arange(most, device=weights.device) >= top_k, 0.0)
    sums = weights.cumsum(-1)
    weights = weights.masked_fill((sums - weights >= top_p * sums[:, -1:]) & (top_p < 1.0), 0.0)  # the first always stays
    weights = weights.masked_fill(weights < min_p, 0.0)
    if most == V:
        return _picked(torch.zeros_like(weights).scatter(-1, index, weights), u)
    index, order = index.sort()
    return index.gather(-1, _picked(weights.gather(-1, order), u)[:, None])[:, 0]


def _best_first(logits_WV: Tensor, most: int) -> Tensor:
    """The tokens of the largest logits, of equal ones the first of them first: logit and token are one integer, for `topk` leaves
    open which of equal ones it gives."""
    V = logits_WV.shape[1]
    bits = (logits_WV.float() + 0.0).view(torch.int32)  # -0 is 0
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long().bitwise_left_shift_(32)
    keys |= torch.arange(V - 1, -1, -1, device=keys.device)
    return V - 1 - ((keys.topk(most) if most < V else keys.sort(descending=True))[0] & 0xFFFFFFFF)


_TOKENS = {"free": _free, "filtered": _filtered}


def _numbers(logits_WV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Of each row temperature, u, top-k, top-p and min-p, (W, 5), where the logits are."""
    V = logits_WV.shape[1]
    rows = [(s.temperature and max(s.temperature, COLDEST), u, min(s.top_k or V, V), s.top_p, s.min_p) for s, u in draws]
    return torch.tensor(rows, pin_memory=logits_WV.is_cuda).to(logits_WV.device, non_blocking=True)


def _weights(logits_WV: Tensor, temperature_W1: Tensor) -> Tensor:
    """Chances in those of the likeliest: divided by a temperature near 0 the largest logit itself would be infinite."""
    x = logits_WV.float()
    return ((x - x.amax(-1, keepdim=True)) / temperature_W1).exp()


def _picked(weights_WV: Tensor, u_W1: Tensor) -> Tensor:
    """Sums made side by side need not grow: the whole is the largest at a token with a chance, so that one always passes."""
    sums = weights_WV.cumsum(-1).masked_fill(weights_WV <= 0.0, 0.0)
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
