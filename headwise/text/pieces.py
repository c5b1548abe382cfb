"""Token → the bytes it stands for, read off the tokeniser's own decoder.

Text is the bytes of all tokens, joined and read as UTF-8, so that whole and streamed decoding agree by construction.
The one difference from the library: where bytes are not UTF-8, SentencePiece decoders there turn the whole run of byte
tokens into U+FFFD; here, as for byte-level vocabularies, only the broken characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers.decoders import Decoder

from headwise.errors import SpecError

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def byte_level(token: str) -> bytes:
    """Bytes of a byte-level token; an added token with characters outside the alphabet stands for itself."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def pieces_of(decoder: Decoder | None) -> tuple[Callable[[str], bytes], int]:
    """A function token → bytes, and how many spaces at the start of a text are the tokeniser's and not the text's.

    Raises:
        SpecError: a decoder that joins tokens in a way not known here.
    """
    state: dict[str, Any] = {} if decoder is None else json.loads(decoder.__getstate__())
    if state.get("type") == "ByteLevel":
        return byte_level, 0
    replacements: list[tuple[str, str]] = []
    byte_fallback, leading_spaces = False, 0
    for step in state["decoders"] if state.get("type") == "Sequence" else [state]:
        match step:
            case {"type": "ByteLevel"} if not replacements and not byte_fallback:
                return byte_level, leading_spaces
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                replacements.append((pattern, content))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                leading_spaces = start
            case _:
                raise SpecError(
                    "the tokeniser joins tokens in a way headwise does not know",
                    why=f"tokenizer.json: decoder {json.dumps(step) if step else 'is missing'}",
                    do="check that the directory is a text-generation model's; if it is, open an issue with this line",
                )

    def plain(token: str) -> bytes:
        if byte_fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token.encode()

    return plain, leading_spaces
