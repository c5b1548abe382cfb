"""Attention libraries that a user may have installed, behind one adapter; each is imported when it is first called.

All of them attend queries to the keys before them, aligned at the end, with a window where they are given one. So a step is one
call over what it sees, in order of position: a view of a global layer, a copy of a ring. flash-attn-4 writes into the result that
it is given, and needs no memory for it; the others' result is copied, and the plan has room for one.

Legend: T queries, S keys, H query heads, G KV heads, D values per head. Layout of every call: tokens x heads x values.
Source    flash-attention 2.8 and 4.0.0b36 (flash_attn_func; cute/interface.py _flash_attn_fwd, which has `out`), FlashInfer 0.7.2
          (single_prefill_with_kv_cache: log2-sum-exp), torch.nn.attention.flex_attention.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache as remember
from importlib import import_module
from math import log
from typing import Any

import torch
from torch import Tensor

from headwise.attention.verify import default_cache_file
from headwise.cache.storage import LayerCache, Scratch, Span, Values

Call = Callable[[Tensor, Tensor, Tensor, float, int | None, float | None], tuple[Tensor, Tensor | None]]
"""(q_THD, k_SGD, v_SGD, scale, window, softcap) -> out_THD, logsumexp_HT (None: its row takes no sinks)."""


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    out, lse, _ = flash_attn_func(
        q[None], k[None], v[None], softmax_scale=scale, causal=True, window_size=(-1 if window is None else window - 1, 0),
        softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out[0], lse[0]


def keep_compiled(env: MutableMapping[str, str]) -> None:
    """flash-attn-4 compiles at the first call, for seconds: what it made is kept beside the self-check's results.

    Its variables, which it reads when it is imported, stay as the user has set them; a folder that cannot be written is not named.
    Source: flash-attn-4 4.0.0b36 flash_attn/cute/cache_utils.py; its own default is a folder under /tmp.
    """
    folder = default_cache_file(env).with_name("flash-attn-4")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        env.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
        env.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def _cute(module: str = "") -> Any:
    """flash-attn-4's, or one of its modules."""
    if "flash_attn.cute" not in sys.modules:
        keep_compiled(os.environ)
    return import_module(f"flash_attn.cute{module}")


def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    return by_flash_attn_4(_cute().flash_attn_func, q, k, v, scale, window, softcap)


def by_flash_attn_4(
    call: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Args: call: `flash_attn_func` of flash-attn-4 or of a branch of it."""
    out, lse = call(
        q[None], k[None], v[None], softmax_scale=scale, causal=window is None,
        window_size=(None, None) if window is None else (window - 1, 0), softcap=softcap or 0.0, return_lse=True,
    )  # fmt: skip
    return out[0], lse[0]


def _flash_attn_4_into(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, out: Tensor
) -> None:
    _cute(".interface")._flash_attn_fwd(
        q[None], k[None], v[None], softmax_scale=scale, causal=window is None, softcap=softcap,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0, out=out[None],
    )  # fmt: skip


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    from flashinfer import single_prefill_with_kv_cache  # type: ignore[import-not-found]

    out, lse2_TH = single_prefill_with_kv_cache(
        q, k, v, causal=True, sm_scale=scale, window_left=-1 if window is None else window - 1, logits_soft_cap=softcap or 0.0,
        return_lse=True,
    )  # fmt: skip
    return out, lse2_TH.t() * log(2)


@remember
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, None]:
    S, T = k.shape[0], q.shape[0]
    if softcap is not None:
        raise ValueError("flex-attention has no softcap")
    past, seen = (torch.tensor([n], device=q.device) for n in (S - T, window or S))  # no constants

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = i + past[b]
        return torch.where((j <= at) & (j > at - seen[b]), s, float("-inf"))

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _flex()(q, k, v, score_mod=score, scale=scale, enable_gqa=True)[0].transpose(0, 1), None


CALLS: dict[str, Call] = {
    "flash-attn": _flash_attn,
    "flash-attn-4": _flash_attn_4,
    "flashinfer": _flashinfer,
    "flex-attention": _flex_attention,
}

INTO: dict[str, Callable[[Tensor, Tensor, Tensor, float, int | None, float | None, Tensor], None]] = {
    "flash-attn-4": _flash_attn_4_into,
}
"""Where a library has one, the call that writes into its last argument, for layers without sinks."""


def attend(
    backend: str,
    q_THD: Tensor,
    cache: LayerCache,
    span: Span,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    scratch: Scratch,
    out_THD: Tensor,
) -> None:
    """As `torch_fused.attend`, over two tensors in the activations' type."""
    if cache.v is None:
        raise ValueError(f"{backend} takes a tensor each for K and V")
    runs = cache.seen(span)
    k, v = (_in_order(values, runs) for values in (cache.k, cache.v))
    if sinks_H is None and backend in INTO:
        INTO[backend](q_THD, k, v, scale, cache.window, softcap, out_THD)
        return
    out, lse_HT = CALLS[backend](q_THD, k, v, scale, cache.window, softcap)
    out_THD.copy_(out)
    if sinks_H is not None:  # the sink joins the denominator only
        if lse_HT is None:
            raise ValueError(f"{backend} takes no sinks")
        out_THD.mul_(torch.sigmoid(lse_HT.t() - sinks_H[None, :])[..., None])


def _in_order(values: Values, runs: Sequence[tuple[int, int, int]]) -> Tensor:
    """Runs of slots one after another, (S, G, D)."""
    parts = [values.data_SGD[slot : slot + n] for slot, _, n in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
