"""The tiny vocabularies, made once a session."""

from __future__ import annotations

import pytest
from vocabularies import BYTE_LEVEL, SENTENCEPIECE, Pair, byte_level_pair, sentencepiece_pair

from headwise.text.tokenizer import Tokenizer, read_tokenizer


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {pre: byte_level_pair(tmp_path_factory.mktemp(pre), pre) for pre in BYTE_LEVEL}
    make = tmp_path_factory.mktemp
    return made | {
        "llama": sentencepiece_pair(make("llama"), kind="llama", prefix=True),
        "gemma3": sentencepiece_pair(make("gemma3"), kind="llama", prefix=False),
        "gemma4": sentencepiece_pair(make("gemma4"), kind="gemma4", prefix=False),
    }


@pytest.fixture(scope="session", params=[*BYTE_LEVEL, *SENTENCEPIECE])
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def both(pair: Pair) -> tuple[Tokenizer, Tokenizer]:
    return read_tokenizer(pair.directory), read_tokenizer(pair.gguf)
