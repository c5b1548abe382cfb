"""The tensor types of ggml: how many values share a block, and how many bytes a block takes.

Source: llama.cpp ggml/include/ggml.h `enum ggml_type` and ggml-common.h `block_*`; gguf-py 0.19 GGML_QUANT_SIZES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One tensor type: `block` consecutive values of a row in `block_bytes` bytes."""

    code: int
    name: str
    block: int
    block_bytes: int

    @property
    def quantised(self) -> bool:
        return self.block > 1


GGML_TYPES: Mapping[int, GgmlType] = {
    t.code: t
    for t in (
        GgmlType(0, "f32", 1, 4),
        GgmlType(1, "f16", 1, 2),
        GgmlType(2, "q4_0", 32, 18),
        GgmlType(3, "q4_1", 32, 20),
        # Once Q4_2. Ollama's first gpt-oss files store MXFP4 under this code, as the raw stream of the checkpoint: the
        # same 17 bytes per 32 values, in another nibble order. Source: ollama ml/backend/ggml/ggml.go, `Kind == 4`.
        GgmlType(4, "mxfp4_raw", 32, 17),
        GgmlType(6, "q5_0", 32, 22),
        GgmlType(7, "q5_1", 32, 24),
        GgmlType(8, "q8_0", 32, 34),
        GgmlType(9, "q8_1", 32, 40),
        GgmlType(10, "q2_k", 256, 84),
        GgmlType(11, "q3_k", 256, 110),
        GgmlType(12, "q4_k", 256, 144),
        GgmlType(13, "q5_k", 256, 176),
        GgmlType(14, "q6_k", 256, 210),
        GgmlType(15, "q8_k", 256, 292),
        GgmlType(16, "iq2_xxs", 256, 66),
        GgmlType(17, "iq2_xs", 256, 74),
        GgmlType(18, "iq3_xxs", 256, 98),
        GgmlType(19, "iq1_s", 256, 50),
        GgmlType(20, "iq4_nl", 32, 18),
        GgmlType(21, "iq3_s", 256, 110),
        GgmlType(22, "iq2_s", 256, 82),
        GgmlType(23, "iq4_xs", 256, 136),
        GgmlType(24, "i8", 1, 1),
        GgmlType(25, "i16", 1, 2),
        GgmlType(26, "i32", 1, 4),
        GgmlType(27, "i64", 1, 8),
        GgmlType(28, "f64", 1, 8),
        GgmlType(29, "iq1_m", 256, 56),
        GgmlType(30, "bf16", 1, 2),
        GgmlType(34, "tq1_0", 256, 54),
        GgmlType(35, "tq2_0", 256, 66),
        GgmlType(39, "mxfp4", 32, 17),
        GgmlType(40, "nvfp4", 64, 36),
        GgmlType(41, "q1_0", 128, 18),
        GgmlType(42, "q2_0", 64, 18),  # newer than gguf-py 0.19
    )
}
_BY_NAME = {t.name: t for t in GGML_TYPES.values()}


def by_name(name: str) -> GgmlType:
    """The type called `name` in either case; raises KeyError."""
    return _BY_NAME[name.lower()]


def n_bytes(kind: GgmlType, n_elements: int) -> int:
    """Bytes of `n_elements` consecutive values; raises ValueError if they are not whole blocks."""
    blocks, rest = divmod(n_elements, kind.block)
    if rest or n_elements < 0:
        raise ValueError(f"{kind.name}: {n_elements} values are not whole blocks of {kind.block}")
    return blocks * kind.block_bytes
