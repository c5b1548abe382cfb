"""Which of our kernels runs a launch: a wrong turn reads bytes as other values, or leaves a card's own kernel unused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headwise.attention import own_kernels
from headwise.kernels import attend, attend_hopper, attend_packed, decode_hopper, decode_packed
from headwise.kernels.stored import Sequences, Slots, Stored

KINDS = {"bf16": (torch.bfloat16, 1), "f16": (torch.float16, 1), "fp8": (torch.float8_e4m3fn, 1), "q8_0": (torch.int8, 1),
         "q4_0": (torch.uint8, 2)}  # fmt: skip
KERNELS = (
    (attend, "attend"), (attend_hopper, "attend_one512"), (attend_hopper, "attend_pair512"), (attend_hopper, "attend_two"),
    (attend_packed, "attend_packed"), (attend_packed, "attend_packed_two"), (decode_hopper, "attend_decode"),
    (decode_packed, "attend_packed"),
)  # fmt: skip
BYTES = ("fp8", "q8_0", "q4_0")
PLAIN = "attend.attend"


def stored(width: int, kv: str) -> Stored:
    kind, packed = KINDS[kv]
    scales = torch.zeros(64, 2, width // 32, dtype=torch.float16) if kv[0] == "q" else None
    return Stored(torch.zeros(64, 2, width // packed, dtype=kind), scales)


def ran(
    monkeypatch: pytest.MonkeyPatch, D: int, kv: str = "bf16", *, tail: int = 0, queries: int = 40, window: int | None = None,
    sinks: bool = False, softcap: float | None = None, backend: str = "headwise-hopper",
) -> str:  # fmt: skip
    """Eight query heads over two KV heads in bf16; a tail of rotated values: one tensor."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., None]:
        return lambda *args, **options: calls.append(name)

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recorded(f"{module.__name__.rsplit('.', 1)[1]}.{name}"))
    k = stored(D + tail, kv)
    ints: Callable[..., Any] = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    own_kernels.launch(
        backend, torch.zeros(queries, 8, D + tail, dtype=torch.bfloat16), k, None if tail else stored(D, kv),
        torch.zeros(queries, 8, D, dtype=torch.bfloat16), Sequences(ints(0, queries), ints(50), queries, 50), Slots(ints(0)),
        scale=1.0, window=window, softcap=softcap, sinks_H=torch.zeros(8) if sinks else None,
    )  # fmt: skip
    assert len(calls) == 1
    return calls[0]


@pytest.mark.parametrize("kv", ["bf16", *BYTES])
@pytest.mark.parametrize(("window", "sinks"), [(None, False), (16, True)])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_prefill_below_512_on_hopper(monkeypatch: pytest.MonkeyPatch, D: int, window: int | None, sinks: bool, kv: str) -> None:
    own = "attend_hopper.attend_two" if kv == "bf16" else "attend_packed.attend_packed_two"
    assert ran(monkeypatch, D, kv, window=window, sinks=sinks) == own


@pytest.mark.parametrize("kv", ["bf16", *BYTES])
@pytest.mark.parametrize("tail", [0, 128])
def test_prefill_at_512_on_hopper(monkeypatch: pytest.MonkeyPatch, tail: int, kv: str) -> None:
    of_floats = "attend_hopper.attend_one512" if tail else "attend_hopper.attend_pair512"
    assert ran(monkeypatch, 512, kv, tail=tail) == (of_floats if kv == "bf16" else "attend_packed.attend_packed")
    assert ran(monkeypatch, 512, kv, tail=tail, window=16) == PLAIN
    assert ran(monkeypatch, 512, kv, tail=tail, sinks=True) == PLAIN


def test_few_rows_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ran(monkeypatch, D, queries=2) for D in (64, 128, 256)] == ["decode_hopper.attend_decode"] * 3
    assert ran(monkeypatch, 512, tail=128, queries=2) == "decode_hopper.attend_decode"
    assert ran(monkeypatch, 512, queries=2) == PLAIN  # two tiles of both do not fit shared memory
    for kv in BYTES:
        assert [ran(monkeypatch, D, kv, queries=2) for D in (128, 256, 512)] == ["decode_packed.attend_packed"] * 3
        assert ran(monkeypatch, 64, kv, queries=2) == PLAIN
        assert ran(monkeypatch, 512, kv, tail=128, queries=8) == PLAIN  # 32 rows of 512: its sums do not fit the registers


def test_others_are_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks `attend_mma` itself."""
    assert ran(monkeypatch, 256, "f16") == PLAIN  # floats, but not the activations'
    for kv in ("bf16", *BYTES):
        for queries in (2, 40):
            assert ran(monkeypatch, 256, kv, queries=queries, backend="headwise-triton") == PLAIN
            assert ran(monkeypatch, 256, kv, queries=queries, backend="headwise-triton", softcap=30.0) == PLAIN
