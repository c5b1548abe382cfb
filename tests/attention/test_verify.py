"""The self-check finds broken kernels, and remembers good ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load

from headwise.attention import torch_fused
from headwise.cache.storage import LayerCache
from headwise.errors import BackendError


def spoiled(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    good = torch_fused.OPERATORS["torch-flash-cpu"]

    def operator(*args: object) -> object:
        out, lse = good(*args)  # type: ignore[arg-type]
        return change(out.clone()), lse

    return operator


@pytest.mark.parametrize("name", ["gemma4-31b", "gpt-oss", "qwen3"])
@pytest.mark.parametrize("kv", ["f32", "f16", "fp8"])
def test_good_backends_pass_at_every_length(name: str, kv: str) -> None:
    checks = load(name, kv=kv).check()

    assert all(c.ok for c in checks)
    assert {c.phase for c in checks} == {"prefill", "decode"}
    assert max(c.length for c in checks if c.window or name == "qwen3") > 64 + 13 + 8  # past a wrap of the ring


@pytest.mark.parametrize("kv", ["f32", "f16", "q4_0"])
def test_v_alone_is_checked_as_it_is_run(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key rotated as the one before it passed where only the stored values were compared."""
    llm = load("gemma4-31b", kv=kv, kv_layout="v")
    assert all(c.ok for c in llm.check())
    good = LayerCache.turned

    def late(self: LayerCache, start: int, stop: int, position: int, *rest: object) -> object:
        return good(self, start, stop, position - 1, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerCache, "turned", late)
    with pytest.raises(BackendError, match="torch-flash-cpu gives wrong results"):
        llm.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out * 1.001,
        lambda out: out.roll(1, 0),
        lambda out: out.index_fill_(-1, torch.tensor(3), float("nan")),
        lambda out: out.zero_(),
    ],
)
def test_a_broken_kernel_stops_the_start(change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 % off, heads exchanged, one dim not finite, nothing written."""
    monkeypatch.setitem(torch_fused.OPERATORS, "torch-flash-cpu", spoiled(change))
    with pytest.raises(BackendError, match="torch-flash-cpu gives wrong results"):
        load("gemma4-31b").check()


def test_a_window_that_is_one_key_too_wide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest error of all: off by one at the window's edge."""
    from headwise.cache.storage import LayerCache, Span

    good = LayerCache.segments

    def wide(self: LayerCache, span: Span) -> object:
        if self.window is not None and span.n == 1:
            self.window += 1
            try:
                return good(self, span)
            finally:
                self.window -= 1
        return good(self, span)

    monkeypatch.setattr(LayerCache, "segments", wide)
    with pytest.raises(BackendError, match="decode at"):
        load("gemma3").check()


def test_passed_checks_are_kept_and_read_back(tmp_path: Path) -> None:
    llm, file = load("gemma3"), tmp_path / "sub" / "checks.json"
    first = llm.check(cache_file=file)
    assert not llm.checks_cached

    assert llm.check(cache_file=file) == first
    assert llm.checks_cached


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_a_damaged_record_only_costs_a_new_check(tmp_path: Path, content: str) -> None:
    file = tmp_path / "checks.json"
    file.write_text(content)
    llm = load("gemma3")
    llm.check(cache_file=file)

    assert not llm.checks_cached
    assert json.loads(file.read_text())


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    warnings: list[str] = []
    load("gemma3").check(cache_file=tmp_path / "checks.json", on_warning=warnings.append)

    assert len(warnings) == 1
    assert "No space left" in warnings[0]
