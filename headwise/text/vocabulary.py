"""What a tokeniser file boils down to, whichever format it came in: the parts from which a Tokenizer is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import tokenizers

# Tokens which end a turn, by name: files often list only one of them as their eos. As llama.cpp's list of
# end-of-generation tokens (src/llama-vocab.cpp, `special_eog_ids`), plus EXAONE's; without `</s>` and `<eos>`, which
# count only where a file names them, because Gemma 4 has `</s>` as a piece of HTML.
END_OF_TURN = frozenset(
    (
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>",
        "<|end_of_text|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "[|endofturn|]",
    )
)  # fmt: skip

_BARS = re.compile(r"<\|[^<>]*>|<[^<>]*\|>")
_TAGS = re.compile(r"</?(think|tool_call|tool_response|tools)>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A Rust tokeniser and the facts that it does not hold.

    `hidden` are the ids which decoding leaves out; `guarded` those which plain text must never become: the hidden
    ones and tags such as `<think>`, which a reader sees but which steer the model.
    """

    rust: tokenizers.Tokenizer
    size: int  # every id is below it
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    chat_template: str | None
    hidden: frozenset[int]
    guarded: frozenset[int]
    duplicates: Mapping[int, str] = field(default_factory=dict[int, str])  # ids whose text a later id owns


def is_hidden(text: str, *, special: bool) -> bool:
    """Whether decoding leaves the added token `text` out.

    A bar-shaped token is a control token whatever its file says: GGUF files mark seven of Gemma 4's as user-defined
    only so that llama.cpp prints them, and Qwen's tokenizer.json calls `<|fim_prefix|>` ordinary.
    """
    return special or _BARS.fullmatch(text) is not None


def is_guarded(text: str, *, special: bool) -> bool:
    """Whether a user who types `text` must get its letters and not the token."""
    return is_hidden(text, special=special) or _TAGS.fullmatch(text) is not None


def end_of_turn_ids(added: Mapping[str, int], declared: Iterable[int]) -> frozenset[int]:
    """The ids that end generation: those a file declares and the well-known names among its added tokens.

    `<|end|>` closes one message, not the turn, where `<|return|>` and `<|call|>` exist (gpt-oss).
    """
    names = END_OF_TURN & added.keys()
    if {"<|return|>", "<|call|>"} <= names:
        names -= {"<|end|>"}
    return frozenset(declared) | {added[name] for name in names}
