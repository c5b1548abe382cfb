"""Who is timed beside our attention: libraries by the limits they declare, and only those whose answer is the formula's.

The libraries need a card; functions with their arguments' meaning stand in for them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from headwise.attention.capability import DeviceKind
from headwise.bench import attention as bench
from headwise.bench.attention import Shape, formula, libraries, taken
from headwise.bench.roofline import _marker

SLIDING = Shape(name="sliding", head_dim=128, heads=6, kv_heads=2, window=5, length=33)
CAUSAL = replace(SLIDING, window=None)
LARGE = replace(CAUSAL, head_dim=512)
HOPPER = DeviceKind("cuda", (9, 0), packages=frozenset({"flash-attn-4", "flashinfer-python"}))


def tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(shape.length, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return q, k, v


def ffpa_attn_func(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, forward_backend: str,
) -> Tensor:  # fmt: skip
    """(1, heads, tokens, head_dim), as scaled_dot_product_attention."""
    assert forward_backend in ("triton", "cutedsl")
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ffpa_attn")
    module.ffpa_attn_func = ffpa_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ffpa_attn", module)
    monkeypatch.setattr(bench, "here", lambda package: package == "ffpa-attn")

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: None) -> tuple[Tensor, None]:
        shape = replace(CAUSAL, head_dim=q.shape[-1], window=window, length=len(q))
        return formula(q, k, v, shape, scale).float(), None

    for name in ("flash-attn-4", "flashinfer"):
        monkeypatch.setitem(bench.CALLS, name, call)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None), softcap: float = 0.0, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(1, tokens, heads, head_dim); vLLM's branch, as its interface.py has it: a window goes without `causal`."""
    left, right = window_size
    assert causal or right == 0
    shape = replace(CAUSAL, head_dim=q.shape[-1], window=None if left is None else left + 1, length=q.shape[1])
    return formula(q[0], k[0], v[0], shape, softmax_scale or 1.0).float()[None], q.new_zeros(1)


@pytest.mark.parametrize("shape", [SLIDING, CAUSAL, LARGE], ids=lambda s: f"{s.head_dim} {s.window}")
def test_the_branch_in_vllm_is_timed_where_it_is_installed(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head_dim of 512 is the rival that the row of flash-attn-4 refuses."""
    cute = ModuleType("vllm.vllm_flash_attn.cute")
    cute.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    for module in (ModuleType("vllm"), ModuleType("vllm.vllm_flash_attn"), cute):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(bench, "here", lambda package: package == "vllm")
    q, k, v = tensors(shape)
    want = formula(q[-16:], k, v, shape, 0.1)

    calls, errors, refused = taken(libraries(q, [(k, v)], shape, 0.1, replace(HOPPER, packages=frozenset())), want)
    assert (list(calls), refused) == (["vLLM's flash-attn-4"], {})
    assert max(errors.values()) < 1e-5 and not refused
    assert not [*libraries(q, [(k, v)], shape, 0.1, DeviceKind("cuda", (8, 0)))]


@pytest.mark.parametrize(
    ("shape", "kind", "names"),
    [
        (SLIDING, HOPPER, ["flash-attn-4", "flashinfer"]),
        (CAUSAL, HOPPER, ["flash-attn-4", "flashinfer"]),
        (LARGE, HOPPER, ["ffpa-attn triton", "ffpa-attn cutedsl"]),
        (replace(LARGE, window=5), HOPPER, []),
        (CAUSAL, replace(HOPPER, capability=(8, 0)), ["flashinfer"]),  # flash-attn-4's row begins at Hopper
        (CAUSAL, replace(HOPPER, packages=frozenset()), []),
    ],
)
def test_a_library_is_asked_for_what_it_declares(shape: Shape, kind: DeviceKind, names: list[str]) -> None:
    q, k, v = tensors(shape)
    want = formula(q[-16:], k, v, shape, 0.1)

    calls, errors, refused = taken(libraries(q, [(k, v)], shape, 0.1, kind), want)

    assert list(calls) == names
    assert all(error < 1e-5 for error in errors.values())
    assert not refused


def single_decode_with_kv_cache(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float, use_tensor_cores: bool) -> Tensor:
    """FlashInfer's: (heads, head_dim) over (tokens, heads, head_dim)."""
    return formula(q[None], k, v, replace(LARGE, length=len(k)), sm_scale).float()[0]


def test_a_decode_is_of_one_query_over_the_cache_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival that reads the same cache at each launch finds it in the second-level cache; a mask from the start sees one key."""
    module = ModuleType("flashinfer")
    module.single_decode_with_kv_cache = single_decode_with_kv_cache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(bench, "here", lambda package: package in ("flashinfer-python", "ffpa-attn"))
    shape = replace(LARGE, decode=True)
    caches = [tensors(shape)[1:], tuple(x.flip(0) * 1.5 for x in tensors(shape)[1:])]
    q = tensors(shape)[0][:1]
    theirs = dict(libraries(q, caches, shape, 0.1, HOPPER))  # type: ignore[arg-type]
    operators = bench.operators(q, caches, shape, 0.1)  # type: ignore[arg-type]
    theirs |= {name: call for name, call in operators if name == "torch flash"}

    assert list(theirs) == ["flashinfer", "flashinfer tensor cores", "ffpa-attn triton", "ffpa-attn cutedsl", "torch flash"]
    for i, kv in enumerate(caches):
        want = formula(q, *kv, shape, 0.1)
        assert all(bench.relative(call(i), want) < 1e-5 for call in theirs.values())


def test_a_rival_that_is_wrong_or_fails_is_reported_and_the_others_go_on() -> None:
    """A wrong answer that is timed, or a library's error that ends the bench."""
    want = torch.ones(16, 2, 4, dtype=torch.float64)

    def fails(i: int) -> Tensor:
        raise AssertionError("head_dim 512\nnot here")

    theirs = [("fails", fails), ("wrong", lambda i: torch.ones(20, 2, 4) * 1.1), ("right", lambda i: torch.ones(20, 2, 4))]
    calls, errors, refused = taken(theirs, want)

    assert list(calls) == ["right"]
    assert errors == {"right": 0.0}
    assert refused == {"fails": "head_dim 512", "wrong": "wrong: relative error 1.0e-01"}


def test_queries_that_see_all_keys_are_not_the_causal_ones() -> None:
    """The check sees a mask that is missing: the last queries see nearly all keys, but not all."""
    q, k, v = tensors(CAUSAL)
    want = formula(q[-16:], k, v, CAUSAL, 0.1)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), scale=0.1, enable_gqa=True
    )

    assert not taken([("full", lambda i: full[0].transpose(0, 1))], want)[0]


def test_a_refusal_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[2] / "docs"
    found = json.loads(max((docs.parent / "benchmarks/results").glob("attention_h200_*.json")).read_text())
    shape = found["rows"][0]["shape"]
    found |= {"refused": [{"shape": shape, "who": "a library", "why": "a | b"}], "libraries": {"a library": "1.2"}}
    (tmp_path / "attention_h200_2026-01-01.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "path", [str(docs), *sys.path])
    import make_tables

    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    table = make_tables.attention().splitlines()

    assert " a library 1.2." in table[0]
    assert table[-1].endswith("| a library |  | refused: a / b |  |")
    assert table[-1].count("|") == table[2].count("|")


def test_each_rival_has_a_marker_of_its_own() -> None:
    """Four forms went round: the fifth rival stood for the first."""
    names = [f"rival {i}" for i in range(12)]

    assert len({_marker(who, names, 0, 0) for who in names}) == len(names)
