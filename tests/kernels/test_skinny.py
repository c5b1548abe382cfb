"""Products on the tensor cores: what can be known of them without a card. Their results are checked by benchmarks/skinny.py."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels.quant_cases import BLOCK
from programs import program

TYPES = tuple(BLOCK)


def floats(word: int, bf16: bool) -> tuple[float, float]:
    if bf16:
        return tuple(struct.unpack("f", struct.pack("I", (word >> s & 0xFFFF) << 16))[0] for s in (0, 16))  # type: ignore[return-value]
    return struct.unpack("ee", struct.pack("I", word))


def word(lo: float, hi: float, bf16: bool) -> int:
    t = torch.tensor([lo, hi], dtype=torch.float64).to(torch.bfloat16 if bf16 else torch.float16)
    return int(t.view(torch.int32)) & 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    both = a | b << 32
    return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


def run(asm: Any, given: dict[str, int], bf16: bool) -> dict[str, int]:
    """The few instructions of `asm` in Python; a pair of halves that is moved out keeps the name of its first."""
    held = dict(given)

    def value(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else held[name]

    def fma(a: int, b: int, c: int) -> int:
        return word(*(x * y + z for x, y, z in zip(*(floats(w, bf16) for w in (a, b, c)), strict=True)), bf16)

    ops: dict[str, Callable[..., int]] = {
        "and": lambda a, b: a & b, "shr": lambda a, b: a >> b, "mov": lambda a: a, "prmt": prmt, "fma": fma,
        "cvt": lambda *_: held["cvt"],
    }  # fmt: skip
    for line in re.sub(r"\{(\$\d), \$\d\}", r"\1", asm).strip("{} \n").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            op, rest = line.split(maxsplit=1)
            to, *sources = (x.strip(" {}") for x in rest.split(","))
            held[to] = ops[op.split(".")[0]](*[value(x) for x in sources])
    return held


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_instructions_make_floats_of_stored_integers(name: str, bf16: bool) -> None:
    """A wrong constant, mask or order of bytes: every weight of a type would be off, with no card here to say so."""
    from headwise.kernels import skinny as S
    from headwise.kernels.tiled import LAYOUTS

    kind = int(LAYOUTS[name].kind.value)
    offset = {"q6_k": 32, "q5_0": 16, "q4_0": 8, "mxfp4": 12, "q8_0": 128}.get(name, 0)
    most = {"q5_k": 31, "q5_0": 31, "q6_k": 63, "q8_0": 255, "mxfp4": 24}.get(name, 15)
    direct = bf16 and name in ("q4_k", "q4_0")
    minimum, step, unit = (0.75 if name in ("q4_k", "q5_k") else 0.0), 0.046875, 2.0**-40 if bf16 else 1.0
    scale = step * (2.0**93 if bf16 else 1.0)
    g = torch.Generator().manual_seed(3)
    for half in (0, 1):
        given = {"$2": 0, "cvt": word(scale, scale, bf16)}
        s, m = (run(S._scaled_asm(kind, bf16), given, bf16)[k] for k in ("$0", "$1"))
        if minimum:
            m = word(-minimum * unit, -minimum * unit, bf16)
        if direct and half:
            s = word(scale / 16, scale / 16, bf16)
        for _ in range(20):
            fields = torch.randint(0, most + 1, (4,), generator=g).tolist()
            other = torch.randint(0, 16, (4,), generator=g).tolist() if direct else [0] * 4
            raw = sum(((f << 4 | o) if half else (f | o << 4)) << 8 * b for b, (f, o) in enumerate(zip(fields, other, strict=True)))
            packed = raw if direct else sum(f << 8 * b for b, f in enumerate(fields))
            held = run(S._to_floats(kind, bf16, half), {"$4": packed, "$5": s, "$6": m}, bf16)
            got = [floats(held[r], bf16)[e] / unit for r, e in (("$0", 0), ("$2", 0), ("$0", 1), ("$2", 1))]
            want = [(f - offset) * step - minimum for f in fields]
            assert torch.tensor(got).sub(torch.tensor(want)).abs().max() <= 2.0**-7 * max(abs(most * step), 1.0), (half, fields)
            assert minimum or got == [float(torch.tensor(w, dtype=torch.bfloat16 if bf16 else torch.float16)) for w in want]


def test_activations_are_arranged_as_words_of_weights_are_taken_apart() -> None:
    """Products would be of the wrong pairs; and rows or groups that are padded must be zeros, since they are multiplied too."""
    found = program("kernels.skinny_cases", interpret=True)[0]
    assert len(found) == 24
    assert all(found.values()), found


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return program("kernels.compile_skinny")


def test_no_launch_spills_or_wants_more_shared_memory_than_its_card_has(compiled: list[dict[str, Any]]) -> None:
    assert {r["type"] for r in compiled} == set(TYPES)
    assert {r["card"] for r in compiled} == {80, 86, 89, 90}
    assert not [r for r in compiled if r["spill_bytes"] >= 64 or r["shared_bytes"] > r["shared_limit"]]


def test_shared_memory_is_what_the_choice_of_a_launch_reckons_with(compiled: list[dict[str, Any]]) -> None:
    assert not [r for r in compiled if r["shared_bytes"] != r["said_bytes"]]


def test_a_step_is_all_products_of_its_tile_and_nothing_else(compiled: list[dict[str, Any]]) -> None:
    """Eight words of four groups each, 32 values of K; copies are of 16 bytes, but for mxfp4's exponents."""
    assert not [r for r in compiled if r["products"] != r["wanted"] or not r["copies"]]


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q8_0"])
@pytest.mark.parametrize("K", [256, 5376, 21504])
def test_programs_of_a_row_share_all_of_it(name: str, K: int) -> None:
    from headwise.kernels import skinny as S
    from headwise.kernels.split import H200

    for T in (1, 16, 33, 64):
        for N in (8, 5376, 262144):
            c = S.config_for(name, T, N, K, H200)
            share = -(-K // (256 * c.splits))
            assert share * c.splits * 256 >= K
            assert (c.splits - 1) * share * 256 < K  # none has nothing to do
            assert S.shared_bytes(name, S.padded(T), c) <= H200.most


def test_experts_fit_the_shared_memory_of_every_card() -> None:
    """A tile of 32 pairs over 128 rows of q8_0 is a kilobyte more than a consumer card's program may have."""
    from headwise.kernels import skinny as S
    from headwise.kernels.split import H200, Card
    from headwise.kernels.tiled import LAYOUTS

    small = Card(128, 100 << 10, 99 << 10)
    for name in LAYOUTS:
        for tile in S.OF_EXPERTS:
            c = S.config_of_experts(name, tile, small)
            assert S.shared_bytes(name, tile, c) <= small.most and c.rows % (16 * c.warps) == 0
            assert S.config_of_experts(name, tile, H200) == S.OF_EXPERTS[tile]
    assert S.shared_bytes("q8_0", 32, S.OF_EXPERTS[32]) == (100 << 10) > small.most


def test_consumer_cards_take_fewer_rows() -> None:
    from headwise.kernels import skinny as S
    from headwise.kernels.split import H200, Card

    assert S.most_rows(H200) == 64
    assert S.most_rows(Card(128, 100 << 10, 99 << 10)) == 32


def wrong(name: str) -> tuple[dict[str, Any], str]:
    from headwise.kernels.arrange import Arranged
    from headwise.kernels.skinny import Config
    from headwise.weights.retile import empty

    two, f16 = Config(splits=2), torch.float16
    return {
        "K": ({"x": Arranged(torch.zeros(8 * 512, dtype=f16), (1, 512))}, "(1, 512) by a matrix of (8, 256)"),
        "N": ({"out_TN": torch.zeros(1, 9, dtype=f16)}, "(8, 256) into (1, 9)"),
        "dtype": ({"out_TN": torch.zeros(1, 8)}, "torch.float16 into torch.float32"),
        "planes": ({"w": empty("q4_k", (8, 512), "cpu")._replace(K=256, low=torch.zeros(1, 2048, dtype=torch.uint8)[:, ::2])},
                   "planes of strides (2048, 2)"),
        "rows": ({"config": Config(rows=40)}, "40 rows by 4 warps"),
        "scratch": ({"config": two, "scratch": torch.zeros(5)}, "2 splits need scratch of 16 fp32 values"),
        "done": ({"config": two, "scratch": torch.zeros(16)}, "2 splits need 1 int32 zeros, got None"),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["K", "N", "dtype", "planes", "rows", "scratch", "done"])
def test_misuse_is_refused_before_launch_with_both_numbers(name: str) -> None:
    from headwise.kernels.arrange import Arranged
    from headwise.kernels.skinny import Config, skinny
    from headwise.weights.retile import empty

    changes, message = wrong(name)
    f16 = torch.float16
    a = {"x": Arranged(torch.zeros(8 * 256, dtype=f16), (1, 256)), "w": empty("q4_k", (8, 256), "cpu"),
         "out_TN": torch.zeros(1, 8, dtype=f16), "config": Config()} | changes  # fmt: skip
    with pytest.raises(ValueError, match="skinny") as caught:
        skinny(**a)
    assert message in str(caught.value)


def test_arranging_refuses_what_has_no_room() -> None:
    from headwise.kernels.arrange import arrange

    half = torch.float16
    with pytest.raises(ValueError, match=r"\(65, 64\) activations, not 1 to 64 rows"):
        arrange(torch.zeros(65, 64, dtype=half), torch.zeros(9, dtype=half))
    with pytest.raises(ValueError, match=r"9 torch\.float16, not 2048"):
        arrange(torch.zeros(1, 64, dtype=half), torch.zeros(9, dtype=half))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 of strides \(64, 1\) into torch\.float16"):
        arrange(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(2048, dtype=half))
