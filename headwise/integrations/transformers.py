"""Our attention inside transformers' models: `register()`, then `attn_implementation="headwise"`.

transformers asks for a mask once a step and hands it to every layer. Ours is no mask but a `Sight`: which run of keys each
sequence has and which of its queries are real, so that a kernel needs no mask. What a `Sight` cannot say is refused: there is no
fallback.

Legend: B sequences, H query heads, G KV heads, R = H / G, T queries of a sequence, S slots of its keys, D values of a head.
Source    transformers 5.17 and 5.23: masking_utils.py (the arguments of a mask function), cache_utils.py (which keys a layer's
          cache hands over), integrations/sdpa_attention.py (what an attention function gets and gives).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as remember
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.attention import own_kernels, torch_fused
from headwise.attention.capability import BACKENDS, Need
from headwise.attention.choose import Choice, choose
from headwise.attention.reference import visible
from headwise.engine.devices import device_kind
from headwise.errors import BackendError, UsageError
from headwise.kernels.stored import Sequences, Slots, Stored

NAME = "headwise"
OLDEST = (5, 17)  # of transformers, tried
QUERIES = 256  # of a windowed layer under one mask, where the operator needs a mask; more where the window is larger
ELSEWHERE = 'attn_implementation="sdpa" runs it, or "eager"'
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def register() -> None:
    """Makes `attn_implementation="headwise"` known to transformers; again is harmless.

    Raises:
        UsageError: transformers is older than what this was written for.
    """
    if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise UsageError(
            f"transformers {transformers.__version__} is too old",
            why=f"its mask functions take other arguments than those of {needed}",
            do=f"pip install 'transformers>={needed}'",
        )
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sight)


class Row(NamedTuple):
    """One sequence: queries [begin, end) are real and are the last of the keys in slots [first, stop)."""

    first: int
    stop: int
    begin: int
    end: int


class Layout(NamedTuple):
    """What a launch is told: `rows`, the real queries among all, None where all are."""

    seqs: Sequences
    slots: Slots
    rows: Tensor | None


@dataclass(frozen=True)
class Sight:
    """Which keys the queries of one step see, in place of a mask: everything before them, or `window` keys, themselves included.

    transformers treats it as a mask of four axes where it prepares one ahead (static caches) and where a layer needs the last
    queries only (Gemma 4's layers without keys of their own).
    """

    n_queries: int
    n_slots: int
    window: int | None
    rows: tuple[Row, ...]
    layouts: dict[tuple[int, torch.device], Layout] = field(default_factory=dict, compare=False, repr=False)

    ndim = 4

    def contiguous(self) -> Sight:
        return self

    def __getitem__(self, key: tuple[slice, slice, slice, slice]) -> Sight:
        """The last queries: `sight[:, :, -n:, :]`."""
        cut = range(self.n_queries)[key[2]]
        if [*key[:2], *key[3:]] != [slice(None)] * 3 or cut.step != 1 or cut.stop != self.n_queries:
            raise TypeError(f"the last queries of a step can be taken, not {key}")
        n = cut.start
        rows = tuple(r._replace(begin=max(0, r.begin - n), end=max(0, r.end - n)) for r in self.rows)
        return Sight(self.n_queries - n, self.n_slots, self.window, rows)

    def layout(self, parts: int, device: torch.device) -> Layout:
        """The same for a kernel, `parts` sequences for each: its KV heads apart, or 1. Made once a step."""
        if (parts, device) not in self.layouts:
            self.layouts[parts, device] = self._layout(parts, device)
        return self.layouts[parts, device]

    def _layout(self, parts: int, device: torch.device) -> Layout:
        def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        rows = [r for r in self.rows for _ in range(parts)]
        counts = [r.end - r.begin for r in rows]
        lengths = [r.stop - r.first for r in rows]
        starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        seqs = Sequences(ints(starts), ints(lengths), max(counts), max(lengths))
        real = None
        if starts[-1] < len(rows) * self.n_queries:
            at = [i * self.n_queries + t for i, r in enumerate(rows) for t in range(r.begin, r.end)]
            real = ints(at, torch.int64)
        return Layout(seqs, Slots(ints([i * self.n_slots + r.first for i, r in enumerate(rows)])), real)


def sight(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Sight | None = None,
    **_: object,
) -> Sight:
    """The mask function: what `sdpa_mask` makes a mask of. With padding its extent is read from the device, once a step.

    Raises:
        BackendError: the mask is not causal, with or without a window, over sequences without holes.
    """
    if isinstance(attention_mask, Sight):  # made ahead by `generate`
        return attention_mask
    window = window_of(mask_function)
    past = int(q_offset)
    stop = past + q_length - kv_offset
    if not q_length <= stop <= kv_length:
        refuse(
            f"{q_length} queries at position {past} with keys from position {kv_offset}",
            f"their own keys end in slot {stop} of {kv_length}",
        )
    if attention_mask is None:
        return Sight(q_length, kv_length, window, (Row(0, stop, 0, q_length),) * batch_size)
    if attention_mask.ndim != 2:
        refuse(f"a mask of {attention_mask.ndim} axes", "padding is told by two: sequences by positions")
    seen = attention_mask[:, kv_offset : kv_offset + stop].bool()
    if seen.shape[1] == stop and bool(seen.all()):
        return Sight(q_length, kv_length, window, (Row(0, stop, 0, q_length),) * batch_size)
    count = seen.sum(1)
    first = seen.int().argmax(1)  # of the first True
    last = seen.shape[1] - seen.int().flip(1).argmax(1)
    extents = torch.stack((first, last, count), 1).tolist()
    rows = tuple(_row(first, last, count, stop - q_length, q_length) for first, last, count in extents)
    return Sight(q_length, kv_length, window, rows)


def _row(first: int, last: int, count: int, past: int, n_queries: int) -> Row:
    """One sequence whose keys in slots [first, last) are no padding; `count` of them, queries from slot `past` on."""
    if not count:
        return Row(0, 0, 0, 0)
    if count != last - first:
        refuse(
            f"a sequence with {last - first - count} masked tokens between others",
            "a kernel sees one run of keys; tokens that follow padding on the right make a hole",
            'pad on the left: tokenizer.padding_side = "left"',
        )
    begin, end = max(0, first - past), max(0, last - past)
    return Row(first, last, begin, min(n_queries, end)) if begin < end else Row(0, 0, 0, 0)


def window_of(mask_function: Callable[..., Any]) -> int | None:
    """The window of transformers' sliding causal mask, None of its causal one; by identity, since functions do not compare.

    Raises:
        BackendError: any other mask.
    """
    if mask_function is causal_mask_function:
        return None
    model = sliding_window_causal_mask_function(1)
    parts = _held(mask_function) if _code(mask_function) is _code(model) else ()
    if len(parts) != 2 or parts[1] is not causal_mask_function or _code(parts[0]) is not _code(_held(model)[0]):
        refuse(
            f"a mask of another kind ({getattr(mask_function, '__qualname__', mask_function)})",
            "it is neither causal nor a causal window: images or packed sequences in the input, or attention both ways",
            f"without images, one sequence a row; {ELSEWHERE}",
        )
    return int(_held(parts[0]))


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _held(function: Any) -> Any:
    """The one value that a mask function was made with."""
    return function.__closure__[0].cell_contents


def refuse(what: str, why: str, do: str = ELSEWHERE) -> NoReturn:
    raise BackendError(f'attn_implementation="{NAME}" does not run {what}', why=why, do=do)


@torch.compiler.disable
def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sight | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: (B, H, T, D) over (B, G, S, D) -> (B, T, H, D), zeros where a query is padding.

    Raises:
        BackendError: anything that no fused backend runs, with the reason.
    """
    seen = _checked(module, query, key, value, attention_mask, dropout, is_causal, sliding_window, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    choice = chosen(query.device, query.dtype, query.shape[-1], seen.window, softcap, s_aux is not None)
    if not choice.fused:
        refuse(
            f"{type(module).__name__} on {device_kind(query.device).label}",
            "; ".join(f"{r.backend}: {r.reason}" for r in choice.refusals),
        )
    if choice.backend.reads == "slots":
        out = _by_kernels(choice.backend.name, query, key, value, seen, scale, softcap, s_aux)
    else:
        out = _by_operator(choice.backend.name, query, key, value, seen, scale, s_aux)
    return out, None


def _checked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, seen: Sight | None, dropout: float, is_causal: bool | None,
    window: int | None, others: dict[str, Any],
) -> Sight:  # fmt: skip
    """Everything that would be silently wrong is refused here."""
    if not isinstance(seen, Sight):
        refuse(
            f"{type(module).__name__} with {'no mask' if seen is None else 'a mask of its own'}",
            "which keys a query sees is told by the model's causal mask only; encoders and prepared masks have none",
            'for a model with an image or audio part attn_implementation={"text_config": "headwise"}; ' + ELSEWHERE,
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        refuse(f"{type(module).__name__}", "its queries see keys after them")
    if dropout:
        refuse(f"dropout {dropout:g}", "it computes for use, not for training", "model.eval()")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        refuse("with gradients", "its kernels have no backward pass", "call the model under torch.inference_mode()")
    given = {name for name in ("position_bias", "cache", "cu_seq_lens_q", "block_table") if others.get(name) is not None}
    given |= {name for name in ("output_attentions",) if others.get(name)}
    if given:
        refuse(f"with {', '.join(sorted(given))}", "it has no such thing")
    if window is not None and window != seen.window:
        refuse(f"window {window}", f"the model's mask says {'no window' if seen.window is None else f'window {seen.window}'}")
    B, H, T, D = query.shape
    if (B, T, key.shape[2]) != (len(seen.rows), seen.n_queries, seen.n_slots):
        refuse(
            f"{B} sequences of {T} queries and {key.shape[2]} keys",
            f"their mask is of {len(seen.rows)}, {seen.n_queries} and {seen.n_slots}",
        )
    if key.shape != value.shape or key.shape[-1] != D or H % key.shape[1]:
        refuse(f"queries {tuple(query.shape)} over keys {tuple(key.shape)} and values {tuple(value.shape)}", "sizes differ")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in NAMES:
        refuse(
            f"queries in {query.dtype}, keys in {key.dtype}, values in {value.dtype}", f"one of {', '.join(NAMES.values())} for all"
        )
    return seen


@remember
def chosen(
    device: torch.device, dtype: torch.dtype, head_dim: int, window: int | None, softcap: float | None, sinks: bool
) -> Choice:
    kind, name = device_kind(device), NAMES[dtype]
    need = Need(
        head_dim=head_dim, key_dim=head_dim, window=window, kv=name, dtype=name, softcap=softcap, sinks=sinks, api=kind.api,
        capability=kind.capability, triton=kind.triton,
    )  # fmt: skip
    return choose(need, BACKENDS)


def _by_kernels(
    backend: str, query: Tensor, key: Tensor, value: Tensor, seen: Sight, scale: float, softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """Our kernels. A KV head and its queries go as a sequence of their own, so that a cache (B, G, S, D) is read as it lies.

    Learned sinks are numbered by head, so with them heads stay together and keys and values are copied, token by token.
    """
    B, H, T, D = query.shape
    G = key.shape[1]
    apart = sinks_H is None
    layout = seen.layout(G if apart else 1, query.device)
    if apart:
        q = query.reshape(B, G, H // G, T, D).transpose(2, 3).reshape(-1, H // G, D).contiguous()
        k, v = (Stored(x.contiguous().view(-1, 1, D)) for x in (key, value))
    else:
        q = query.transpose(1, 2).reshape(-1, H, D).contiguous()
        k, v = (Stored(x.transpose(1, 2).reshape(-1, G, D).contiguous()) for x in (key, value))
    n = q.shape[0]
    if layout.rows is not None:
        q = q.index_select(0, layout.rows)
    out = torch.empty_like(q)
    if q.shape[0]:
        own_kernels.launch(
            backend, q, k, v, out, layout.seqs, layout.slots, scale=scale, window=seen.window, softcap=softcap,
            sinks_H=None if sinks_H is None else sinks_H.float(), overlap=False,
            partial=own_kernels.partial_scratch(q, k, layout.seqs),
        )  # fmt: skip
    if layout.rows is not None:
        out = out.new_zeros(n, *out.shape[1:]).index_copy_(0, layout.rows, out)
    if not apart:
        return out.view(B, T, H, D)
    return out.view(B, G, T, H // G, D).transpose(1, 2).reshape(B, T, H, D)


def _by_operator(
    backend: str, query: Tensor, key: Tensor, value: Tensor, seen: Sight, scale: float, sinks_H: Tensor | None
) -> Tensor:
    """PyTorch's fused operators, sequence by sequence, as `torch_fused` calls them."""
    B, H, T, D = query.shape
    operator = torch_fused.OPERATORS[backend]
    out = query.new_zeros(B, T, H, D)
    for b, (first, stop, begin, end) in enumerate(seen.rows):
        past = stop - first - (end - begin)
        step = max(1, end - begin) if seen.window is None else max(QUERIES, seen.window)
        for t in range(begin, end, step):
            part = slice(t, min(end, t + step))
            at = past + t - begin
            q_HTD, k_GSD, v_GSD = query[b, :, part], key[b, :, first:stop], value[b, :, first:stop]
            _block(operator, q_HTD, k_GSD, v_GSD, at, seen.window, scale, sinks_H, out[b, part])
    return out


def _block(
    operator: torch_fused.Operator, q_HTD: Tensor, k_GSD: Tensor, v_GSD: Tensor, at: int, window: int | None, scale: float,
    sinks_H: Tensor | None, out_THD: Tensor,
) -> None:  # fmt: skip
    """Queries at positions `at` and on, of keys at positions from 0: history and own tokens, or a window under its mask."""
    n = q_HTD.shape[1]
    lo = 0 if window is None else max(0, at - window + 1)
    runs: list[tuple[int, int, Tensor | None, bool]] = [(lo, at + n, None, False)]
    if n > 1 and window is None:
        runs = [(at, at + n, None, True)]
        if at:
            runs.insert(0, (0, at, None, False))
    elif n > 1:
        q_pos, k_pos = torch.arange(at, at + n, device=q_HTD.device), torch.arange(lo, at + n, device=q_HTD.device)
        mask = torch.zeros(n, at + n - lo, dtype=q_HTD.dtype, device=q_HTD.device)
        runs = [(lo, at + n, mask.masked_fill_(~visible(q_pos, k_pos, window), float("-inf")), False)]
    total_TH: Tensor | None = None
    for start, stop, mask, causal in runs:
        part_HTD, lse_HT = operator(q_HTD, k_GSD[:, start:stop], v_GSD[:, start:stop], mask, causal, scale)
        if total_TH is None:
            out_THD.copy_(part_HTD.transpose(0, 1))
            total_TH = lse_HT.t()
        else:
            total_TH = torch_fused.merge(out_THD, total_TH, part_HTD.transpose(0, 1), lse_HT.t())
    if sinks_H is not None and total_TH is not None:
        out_THD.mul_(torch.sigmoid(total_TH - sinks_H[None, :])[..., None])
