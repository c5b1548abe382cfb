"""Rows of libraries that a user may have: what they claim is refused beyond its edges, and each adapter's call says what it means.

flash-attn and FlashInfer need a card, so a module with their functions' signatures stands in for them and computes the formula
from the arguments as their documentation defines them. FlexAttention is the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from headwise.attention import optional
from headwise.attention.capability import BACKENDS, PACKAGES, DeviceKind, Need
from headwise.attention.choose import Choice, LayerGroup, choose
from headwise.attention.verify import check_group
from headwise.errors import BackendError
from headwise.spec.layers import LayerSpec, MlpSpec

ROWS = {b.name: b for b in BACKENDS}
NEED = Need(
    head_dim=128, key_dim=128, window=None, kv="bf16", dtype="bf16", softcap=None, sinks=False, api="cuda", capability=(9, 0),
    triton=(3, 6), packages=frozenset(PACKAGES),
)  # fmt: skip


def layer(head_dim: int, window: int | None, *, softcap: float | None = None, sinks: bool = False) -> LayerSpec:
    return LayerSpec(
        index=0, n_heads=6, n_kv_heads=2, head_dim=head_dim, window=window, kv_source=None, k_eq_v=False, rope=None, sinks=sinks,
        softcap=softcap, scale=1.0, mlp=MlpSpec(width=1, activation="silu"),
    )  # fmt: skip


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Causal, aligned at the end, `left` keys before a query's own (negative: all); out (T, H, D) and ln-sum-exp (H, T)."""
    group = q.shape[1] // k.shape[1]
    s = torch.einsum("thd,shd->hts", q.double(), k.repeat_interleave(group, 1).double()) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], torch.arange(k.shape[0])[None]
    s = s.masked_fill((j > i) | ((j < i - left) if left >= 0 else False), float("-inf"))
    out = torch.einsum("hts,shd->thd", s.softmax(-1), v.repeat_interleave(group, 1).double())
    return out.to(q.dtype), s.logsumexp(-1).float()


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float = 0.0, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    assert causal and return_attn_probs and window_size[1] == 0
    out, lse = formula(q[0], k[0], v[0], softmax_scale, window_size[0], softcap)
    return out[None], lse[None], None


def flash_attn_4_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float = 0.0, causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None), softcap: float = 0.0, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert return_lse and causal != (window_size == (window_size[0], 0))  # one of them says where a query's keys end
    left = -1 if window_size[0] is None else window_size[0]
    out, lse = formula(q[0], k[0], v[0], softmax_scale, left, softcap)
    return out[None], lse[None]


def flash_attn_4_forward(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, softcap: float | None, window_size_left: int | None,
    window_size_right: int | None, out: Tensor,
) -> None:  # fmt: skip
    assert causal == (window_size_right is None) == (window_size_left is None)
    left = -1 if window_size_left is None else window_size_left
    out.copy_(formula(q[0], k[0], v[0], softmax_scale, left, softcap or 0.0)[0][None])


def single_prefill_with_kv_cache(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float = 0.0, window_left: int = -1,
    logits_soft_cap: float = 0.0, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert causal and return_lse
    out, lse = formula(q, k, v, sm_scale, window_left, logits_soft_cap)
    return out, lse.t() * 1.4426950408889634


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function, call in (
        ("flash_attn", "flash_attn_func", flash_attn_func),
        ("flash_attn.cute", "flash_attn_func", flash_attn_4_func),
        ("flash_attn.cute.interface", "_flash_attn_fwd", flash_attn_4_forward),
        ("flashinfer", "single_prefill_with_kv_cache", single_prefill_with_kv_cache),
    ):
        module = ModuleType(name)
        setattr(module, function, call)
        monkeypatch.setitem(sys.modules, name, module)


def errors(name: str, example: LayerSpec, dtype: torch.dtype, kv: str) -> list[float]:
    group = LayerGroup((0,), example, kv, Choice(ROWS[name], ()))
    checks = check_group(group, partial(optional.attend, name), chunk=64, dtype=dtype, device=torch.device("cpu"))
    assert {c.phase for c in checks} == {"prefill", "decode"}
    return [c.error for c in checks if c.ok or print(c)]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-4", "flashinfer"])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (70, None, False), (70, None, True), (None, 5.0, True), (1, 5.0, False)]
)
def test_an_adapter_s_call_means_the_layer(name: str, window: int | None, softcap: float | None, sinks: bool) -> None:
    """Through the real cache, past a wrap of the ring: alignment, window, softcap, the base of the log-sum-exp, sinks."""
    found = errors(name, layer(64, window, softcap=softcap, sinks=sinks), torch.float16, "f16")

    assert len(found) == 2 * (4 if window is None else len({max(7, window - 1), max(7, window), window + 8, window + 512, 0}))
    assert max(found) < 2e-3


def test_flex_attention_is_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length taken for a constant compiles it anew for each prompt. What is traced is run by operators: the trace is the test."""
    traced = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(optional, "_flex", optional._flex.__wrapped__)
    assert max(errors("flex-attention", layer(64, 70), torch.float32, "f32")) < 1e-5
    assert len(traced) == 2  # of a chunk, and of one token


@pytest.mark.parametrize(("head_dim", "window"), [(16, 70), (256, None)])
def test_flex_attention_runs_at_the_edges_it_claims(head_dim: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "_flex", lambda: flex_attention)
    found = errors("flex-attention", layer(head_dim, window), torch.float32, "f32")

    assert len(found) >= 8
    assert max(found) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash-attn", {"packages": frozenset()}, "flash-attn is not installed"),
        ("flash-attn", {"head_dim": 264, "key_dim": 264}, "head_dim 264 not in 8..256, multiples of 8"),
        ("flash-attn", {"capability": (7, 5)}, "compute capability 7.5, needs at least 8.0"),
        ("flash-attn", {"kv": "q8_0"}, "KV type q8_0 not in f16, bf16"),
        ("flash-attn", {"kv": "f16"}, "KV type f16, reads floats of the activations' type bf16 only"),
        ("flash-attn", {"dtype": "f32"}, "activations in f32, takes f16, bf16"),
        ("flash-attn", {"key_dim": 160}, "one tensor for K and V"),
        ("flash-attn-4", {"packages": frozenset({"flash-attn"})}, "flash-attn-4 is not installed"),
        ("flash-attn-4", {"head_dim": 512, "key_dim": 512}, "head_dim 512 not in 8..256"),
        ("flash-attn-4", {"capability": (8, 9)}, "compute capability 8.9, needs at least 9.0"),
        ("flash-attn-4", {"capability": (10, 0)}, "compute capability 10.0, made for at most 9.0"),
        ("flashinfer", {"head_dim": 96, "key_dim": 96}, "head_dim 96 not in 64, 128, 256"),
        ("flashinfer", {"api": "rocm"}, "runs on cuda, not on rocm"),
        ("flex-attention", {"head_dim": 512, "key_dim": 512}, "head_dim 512 not in 16, 32, 64, 128, 256"),
        ("flex-attention", {"sinks": True}, "learned sinks: it takes none"),
        ("flex-attention", {"softcap": 20.0}, "softcap 20: it has none"),
        ("flex-attention", {"kv": "fp8"}, "KV type fp8 not in f32, f16, bf16"),
        ("torch-cudnn", {"window": 128}, "window 128: it takes no window"),
        ("torch-cudnn", {"softcap": 20.0}, "softcap 20: it has none"),
        ("torch-cudnn", {"capability": (8, 9)}, "compute capability 8.9, needs at least 9.0"),
        ("headwise-triton-rocm", {"api": "rocm", "head_dim": 256, "key_dim": 256}, "head_dim 256 not in 64, 128"),
        ("headwise-triton-rocm", {}, "runs on rocm, not on cuda"),
    ],
)
def test_a_named_row_refuses_beyond_its_edges(name: str, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(BackendError) as caught:
        choose(replace(NEED, **changes), forced=name)  # type: ignore[arg-type]
    assert f"{name}: {reason}" in caught.value.why


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flash-attn", {"head_dim": 8, "key_dim": 8, "window": 128, "sinks": True, "softcap": 20.0, "capability": (8, 0)}),
        ("flash-attn", {"head_dim": 256, "key_dim": 256, "kv": "f16", "dtype": "f16", "capability": (12, 0)}),
        ("flash-attn-4", {"head_dim": 256, "key_dim": 256, "window": 4096}),
        ("flashinfer", {"head_dim": 64, "key_dim": 64, "softcap": 20.0}),
        ("flex-attention", {"api": "cpu", "capability": None, "dtype": "f32", "kv": "f32"}),
        ("torch-cudnn", {"head_dim": 256, "key_dim": 256, "kv": "q4_0"}),
        ("headwise-triton-rocm", {"api": "rocm", "capability": (11, 0), "kv": "q4_0", "window": 128, "softcap": 20.0}),
    ],
)
def test_a_named_row_is_taken_at_its_edges_and_never_by_itself(name: str, changes: dict[str, object]) -> None:
    need = replace(NEED, **changes)  # type: ignore[arg-type]

    assert choose(need, forced=name).backend is ROWS[name]
    by_itself = choose(need)
    assert not by_itself.backend.by_name
    assert f"not {name}: only when named: {ROWS[name].by_name}" in str(by_itself)


def test_a_device_knows_what_is_installed() -> None:
    """Rows ask for these distributions and no others; none of them is a dependency, so CI has none."""
    assert {b.package for b in BACKENDS if b.package} == set(PACKAGES)
    assert DeviceKind("cuda", (9, 0)).packages <= set(PACKAGES)
