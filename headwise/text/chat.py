"""A chat → token ids: the model's template around messages whose text never becomes a control token.

Who types `<turn|>` gets its letters. transformers (5.23, `apply_chat_template`) and llama.cpp encode the rendered text as
one, so that a user, or a web page that a tool returns, can end its turn and speak as the system. Here a seam is put into
such spots before rendering, and falls out again when the text is encoded. Messages without them give transformers' ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwise.text.template import render_chat
from headwise.text.tokenizer import SEAM, Tokenizer

# Words of the operator and of the model itself: Gemma 4 thinks where a system message says <|think|>, and templates look
# for <think> in what the model wrote.
_TRUSTED = ("system", "developer", "assistant", "model")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    extra: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> list[int]:
    """The prompt for `messages`.

    Args:
        messages, tools, extra: as `render_chat` takes them.
        template: in place of the model's own.
        most: as `Tokenizer.encode` takes it.
    Raises:
        SpecError, UsageError: as `render_chat`.
    """
    part = parter(tokenizer.guarded_texts)
    safe = [m if m.get("role") in _TRUSTED else {k: v if k == "role" else part(v) for k, v in m.items()} for m in messages]
    rendered = render_chat(
        template or tokenizer.chat_template,
        safe,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        bos_token=None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
        eos_token=tokenizer.token(min(tokenizer.eos_ids)) if tokenizer.eos_ids else None,
        extra=extra or {},
    )
    return tokenizer.encode(rendered, parse_special=True, seams=safe != list(messages), most=most)


@functools.lru_cache(maxsize=8)
def parter(tokens: tuple[str, ...]) -> Callable[[Any], Any]:
    """A function that puts a seam after the first character of each of `tokens` in the strings of a JSON value.

    Also at the end of a string that a following one could complete: templates join the parts of a message.
    """
    if not tokens:
        return lambda value: value
    firsts = "".join(re.escape(c) for c in sorted({t[0] for t in tokens}))
    starts = re.compile(rf"(?=[{firsts}])(?=(?:{'|'.join(map(re.escape, tokens))}))(.)", re.DOTALL)
    beginnings = tuple({t[:n] for t in tokens for n in range(1, len(t))})

    def part(value: Any) -> Any:
        if isinstance(value, str):
            parted = starts.sub(rf"\1{SEAM}", value)
            return parted + SEAM if parted.endswith(beginnings) else parted
        if isinstance(value, Mapping):
            return {part(k): part(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [part(v) for v in value]
        return value

    return part
