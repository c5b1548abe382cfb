"""GGUF files written byte by byte, right or wrong on purpose."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(code: int, v: Any) -> bytes:
    """`v` as a metadata value; an array is (element code, [elements])."""
    if code == STRING:
        return string(v)
    if code == ARRAY:
        element, items = v
        return struct.pack("<IQ", element, len(items)) + b"".join(value(element, i) for i in items)
    return struct.pack("<" + _LETTERS[code], v)


def tensor(name: str, dims: Sequence[int], code: int, offset: int) -> bytes:
    """One row of the tensor table; `dims` innermost first, as in the file."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def gguf_bytes(
    keys: Mapping[str, tuple[int, Any]] | Sequence[tuple[str, tuple[int, Any]]] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    items = list(keys.items()) if isinstance(keys, Mapping) else list(keys)
    n_keys = len(items) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    out = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)
    out += b"".join(string(k) + struct.pack("<I", code) + value(code, v) for k, (code, v) in items)
    out += b"".join(tensors)
    return out + b"\0" * (-len(out) % alignment) + data


def small_model() -> bytes:
    """A valid file with every value type, arrays of several, and tensors of three types."""
    keys: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, "llama"),
        "general.alignment": (U32, 32),
        "a.u8": (U8, 200), "a.i8": (I8, -7), "a.u16": (U16, 65535), "a.i16": (I16, -300), "a.u32": (U32, 2**32 - 1),
        "a.i32": (I32, -(2**31)), "a.f32": (F32, 0.5), "a.bool": (BOOL, True), "a.u64": (U64, 2**64 - 1),
        "a.i64": (I64, -(2**63)), "a.f64": (F64, 1e300),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, ["<s>", "", "é", "▁the"])),
        "tokenizer.ggml.scores": (ARRAY, (F32, [0.0, -1.0, -2.5])),
        "llama.pattern": (ARRAY, (BOOL, [True, False, True])),
        "empty": (ARRAY, (I32, [])),
    }  # fmt: skip
    tensors = [
        tensor("token_embd.weight", (64, 3), 8, 0),  # q8_0: 3 rows of 2 blocks of 34 bytes = 204
        tensor("output_norm.weight", (5,), 0, 224),
        tensor("blk.0.attn_q.weight", (256, 1), 12, 256),
    ]
    return gguf_bytes(keys, tensors, bytes(256 + 144))
