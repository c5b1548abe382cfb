"""A Hugging Face model directory → Vocabulary.

Reads tokenizer.json (the vocabulary) and, where they exist, tokenizer_config.json, special_tokens_map.json,
generation_config.json, config.json (ids and flags), chat_template.jinja and chat_template.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from headwise.errors import SpecError
from headwise.text.vocabulary import Vocabulary, end_of_turn_ids, is_guarded, is_hidden

_DOWNLOAD = "download the model directory again: `hf download OWNER/MODEL --local-dir DIR`"


def vocabulary_from_hf(directory: Path) -> Vocabulary:
    """Build the vocabulary of a model directory.

    Raises:
        SpecError: no tokenizer.json, damaged JSON, or ids that are not in the vocabulary.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        found = sorted(p.name for p in directory.glob("*token*")) if directory.is_dir() else []
        raise SpecError(
            f"{directory} holds no tokeniser",
            why=f"tokenizer.json is missing; there is {', '.join(found)}" if found else "tokenizer.json is missing",
            do=f"python -c \"from transformers import AutoTokenizer as T; T.from_pretrained('{directory}')"
            f".save_pretrained('{directory}')\""
            if found
            else _DOWNLOAD,
        )
    try:
        rust = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing narrower
        raise SpecError(f"{path} is damaged", why=str(error), do=_DOWNLOAD) from error
    rust.no_truncation()  # saved training settings: a server must not cut a prompt or fill it up
    rust.no_padding()

    config = _json(directory / "tokenizer_config.json")
    _add_declared(rust, config, path)
    tokens_map = _json(directory / "special_tokens_map.json")
    bos_id, eos_id = (_named_id(rust, key, config.get(key) or tokens_map.get(key)) for key in ("bos_token", "eos_token"))
    size = max([rust.get_vocab_size(), *(i + 1 for i in rust.get_added_tokens_decoder())])
    generation = directory / "generation_config.json"
    ends = _eos_ids(generation if generation.is_file() else directory / "config.json", size)
    flag = config.get("add_bos_token")
    if flag and bos_id is None:
        raise SpecError(
            f"{directory} wants a beginning-of-sequence token but names none",
            why="tokenizer_config.json: add_bos_token is true, bos_token is missing",
            do=_DOWNLOAD,
        )

    added = rust.get_added_tokens_decoder()
    guarded = {i for i, token in added.items() if is_guarded(token.content, special=token.special)}
    hidden = frozenset(i for i, token in added.items() if is_hidden(token.content, special=token.special))
    # The library can leave special tokens unmatched in plain text; what a file calls ordinary but must be guarded
    # becomes special to it. What decoding hides was settled above and does not change.
    rust.add_special_tokens([_as_special(added[i]) for i in sorted(guarded) if not added[i].special])
    unk_token: str | None = getattr(rust.model, "unk_token", None)
    return Vocabulary(
        rust=rust,
        size=size,
        bos_id=bos_id,
        eos_ids=end_of_turn_ids({token.content: i for i, token in added.items()}, ends if eos_id is None else {*ends, eos_id}),
        add_bos=bos_id is not None and (rust.encode("").ids[:1] == [bos_id] if flag is None else bool(flag)),
        chat_template=_chat_template(directory, config),
        hidden=hidden,
        guarded=frozenset(i for i in guarded if added[i].content != unk_token),
    )


def _add_declared(rust: Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Add tokens that only tokenizer_config.json knows, and mark as special what it alone calls special."""
    declared = config.get("added_tokens_decoder")
    if declared is None:
        return
    known = rust.get_added_tokens_decoder()
    for token_id, token in _declared_tokens(declared, path.with_name("tokenizer_config.json")):
        if token_id not in known or (token.special and not known[token_id].special):
            (rust.add_special_tokens if token.special else rust.add_tokens)([token])
        if rust.token_to_id(token.content) != token_id:
            raise SpecError(
                f"{path} and its tokenizer_config.json disagree",
                why=f"{token.content!r} is token {rust.token_to_id(token.content)} in one and {token_id} in the other",
                do=_DOWNLOAD,
            )


def _declared_tokens(declared: Any, path: Path) -> list[tuple[int, AddedToken]]:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return sorted(
            (
                (int(key), AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in flags}))
                for key, entry in declared.items()
            ),
            key=itemgetter(0),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(f"{path} is damaged", why=f"added_tokens_decoder: {type(error).__name__} {error}", do=_DOWNLOAD) from error


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _named_id(rust: Tokenizer, key: str, value: object) -> int | None:
    """The id of a token given as text or as {"content": text}."""
    text = cast("dict[str, object]", value).get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    token_id = rust.token_to_id(text) if isinstance(text, str) else None
    if token_id is None:
        raise SpecError(
            f"{key} {text!r} is not in the vocabulary",
            why="tokenizer_config.json or special_tokens_map.json names it, tokenizer.json does not hold it",
            do=_DOWNLOAD,
        )
    return token_id


def _eos_ids(path: Path, size: int) -> set[int]:
    declared = _json(path)
    text_config = declared.get("text_config")
    value = declared.get("eos_token_id")
    if value is None and isinstance(text_config, dict):
        value = cast("dict[str, Any]", text_config).get("eos_token_id")
    ids = [] if value is None else cast("list[Any]", value) if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or not 0 <= i < size:
            raise SpecError(f"{path} is damaged", why=f"eos_token_id is {value!r}, and there are {size} tokens", do=_DOWNLOAD)
    return set(ids)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The default template: chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"{path} is damaged", why=str(error), do=_DOWNLOAD) from error
    template = _json(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # [{"name": "default", "template": …}, {"name": "tool_use", …}]
        named = {entry.get("name"): entry.get("template") for entry in cast("list[dict[str, Any]]", template)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise SpecError(f"{path} is damaged", why=str(error), do=_DOWNLOAD) from error
    if not isinstance(content, dict):
        raise SpecError(f"{path} is damaged", why=f"it holds a {type(content).__name__}, not an object", do=_DOWNLOAD)
    return cast("dict[str, Any]", content)
