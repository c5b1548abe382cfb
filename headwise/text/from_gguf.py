"""GGUF metadata (`tokenizer.ggml.*`) → Vocabulary.

Three kinds of vocabulary, by `tokenizer.ggml.model`:
    gpt2     byte-level BPE: listed merges over the GPT-2 byte alphabet; `pre` names the split (splits.py)
    llama    SentencePiece: scores, no merges; the merges are rebuilt from the scores, unknown characters become bytes
    gemma4   listed merges over plain characters with U+2581 for a space; unknown characters become bytes
Source: ggml-org/llama.cpp 00ad355e, src/llama-vocab.cpp (`llama_vocab::impl::load`); transformers 5.23,
tokenization_utils_base.py `generate_merges` (order of the rebuilt merges).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from headwise.errors import SpecError
from headwise.text.splits import split_for
from headwise.text.vocabulary import END_OF_TURN, Vocabulary, end_of_turn_ids, is_guarded, is_hidden

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types
_SPACE = "\u2581"
_PREFIX = "tokenizer.ggml."
_CONVERT_AGAIN = "download the file again, or convert the model again with a current llama.cpp"


def vocabulary_from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """Build the vocabulary that a GGUF header describes.

    Raises:
        SpecError: no vocabulary, an unknown kind or split, or arrays that contradict each other.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None or f"{_PREFIX}tokens" not in metadata:
        raise SpecError(
            "the file holds no tokeniser",
            why=f"{_PREFIX}{'model' if kind is None else 'tokens'} is missing",
            do="use the model's main GGUF file: the first of several parts, not an adapter or a vision projector",
        )
    if kind not in ("gpt2", "llama", "gemma4"):
        raise SpecError(
            f"vocabularies of kind {kind!r} are not read",
            why=f"{_PREFIX}model = {kind!r}; known kinds: gpt2, llama, gemma4",
            do="use the model's safetensors directory with its tokenizer.json",
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_array(metadata, "tokens", str))]
    n = len(tokens)
    types = _array(metadata, "token_type", int, n) if f"{_PREFIX}token_type" in metadata else [_NORMAL] * n
    if kind != "gpt2":
        # SentencePiece matches user-defined symbols before anything else, here in text whose spaces are still spaces.
        tokens = [t.replace(_SPACE, " ") if types[i] == _USER_DEFINED else t for i, t in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}  # of duplicates the later wins, as in tokenizer.json

    # llama.cpp's defaults for SentencePiece files that name no ids: bos 1, eos 2.
    by_default = (1, 2) if kind == "llama" and n > 2 and types[1] == types[2] == _CONTROL else (None, None)
    bos_id = _id(metadata, "bos_token_id", n, by_default[0])
    ends = [_id(metadata, key, n) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    ends[0] = by_default[1] if ends[0] is None else ends[0]
    # Old converters mark some control tokens as normal; what begins or ends a text is one, whatever its mark.
    for i in (bos_id, *ends, *(ids[name] for name in END_OF_TURN if name in ids)):
        if i is not None and types[i] not in (_CONTROL, _USER_DEFINED):
            types[i] = _CONTROL

    rust, add_bos = _BUILDERS[kind](metadata, tokens, types, ids)
    flag = metadata.get(f"{_PREFIX}add_bos_token")
    if flag and bos_id is None:
        raise SpecError(
            "the file wants a beginning-of-sequence token but names none",
            why=f"{_PREFIX}add_bos_token is true and {_PREFIX}bos_token_id is missing",
            do=_CONVERT_AGAIN,
        )

    added = {i: tokens[i] for i in range(n) if types[i] in (_CONTROL, _USER_DEFINED, _UNKNOWN) and ids[tokens[i]] == i}
    special = {i: types[i] != _USER_DEFINED for i in added}
    guarded = {i for i, text in added.items() if is_guarded(text, special=special[i])}
    rust.add_tokens([AddedToken(text, normalized=False, special=i in guarded) for i, text in added.items()])
    return Vocabulary(
        rust=rust,
        size=n,
        bos_id=bos_id,
        eos_ids=end_of_turn_ids({text: i for i, text in added.items()}, (i for i in ends if i is not None)),
        add_bos=bos_id is not None and bool(add_bos if flag is None else flag),
        chat_template=metadata.get("tokenizer.chat_template"),
        hidden=frozenset(i for i, text in added.items() if is_hidden(text, special=special[i])),
        guarded=frozenset(i for i in guarded if types[i] != _UNKNOWN),
        duplicates={i: token for i, token in enumerate(tokens) if ids[token] != i} if len(ids) < n else {},
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    split = split_for(metadata.get(f"{_PREFIX}pre"))
    rust = Tokenizer(_bpe(ids, _listed_merges(metadata), ignore_merges=split.ignore_merges))
    if (normalizer := split.normalizer()) is not None:
        rust.normalizer = normalizer
    rust.pre_tokenizer = split.pre_tokenizer()
    rust.decoder = decoders.ByteLevel()
    return rust, split.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    scores = _array(metadata, "scores", (float, int), len(tokens))
    return _spaced(metadata, tokens, types, ids, _merges_from_scores(tokens, types, scores), prefix=True), True


def _gemma4(metadata: Mapping[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]) -> tuple[Tokenizer, bool]:
    return _spaced(metadata, tokens, types, ids, _listed_merges(metadata), prefix=False), True


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}


def _spaced(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    ids: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    prefix: bool,
) -> Tokenizer:
    """BPE over plain characters, U+2581 for a space, bytes for unknown characters."""
    unk_id = _id(metadata, "unknown_token_id", len(tokens), types.index(_UNKNOWN) if _UNKNOWN in types else None)
    unk_token = None if unk_id is None else tokens[unk_id]
    rust = Tokenizer(_bpe(ids, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=_BYTE in types))
    to_marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    to_text: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(f"{_PREFIX}add_space_prefix", prefix):
        to_marks.insert(0, normalizers.Prepend(_SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    rust.normalizer = normalizers.Sequence(to_marks)
    rust.decoder = decoders.Sequence(to_text)
    return rust


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best-scored token first.

    SentencePiece merges whatever pair makes the best-scored piece, so any two tokens that join to a third are a merge.
    Only ordinary tokens take part: a control or byte token is never spelt by text.
    """
    pieces = {t: i for i, t in enumerate(tokens) if types[i] in (_NORMAL, _UNUSED)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in pieces.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                ranked.append((scores[i], len(left), len(right), left, right))
    ranked.sort(key=itemgetter(0, 1, 2), reverse=True)  # stable: equals stay in the order of the vocabulary
    return [(left, right) for _, _, _, left, right in ranked]


def _listed_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for rank, merge in enumerate(_array(metadata, "merges", str)):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise _damaged(f"merge {rank} is {merge!r}, not two tokens with a space between")
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _bpe(ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(ids, merges, **options)
    except Exception as error:  # the Rust library raises nothing narrower
        raise _damaged(f"the merges do not fit the vocabulary: {error}") from error


def _array(metadata: Mapping[str, Any], key: str, of: type | tuple[type, ...], n: int | None = None) -> list[Any]:
    """The array `key`, checked for its length (where `n` says it) and the type of its elements."""
    stored = metadata.get(f"{_PREFIX}{key}")
    if stored is None:
        raise _damaged(f"{_PREFIX}{key} is missing")
    if not hasattr(stored, "__len__") or isinstance(stored, str):
        raise _damaged(f"{_PREFIX}{key} is {stored!r}, not an array")
    if n is not None and len(stored) != n:
        raise _damaged(f"{_PREFIX}{key} has {len(stored)} entries for {n} tokens")
    values = list(stored.read()) if hasattr(stored, "read") else list(stored)
    if values and not isinstance(values[0], of):  # a GGUF array has one type
        raise _damaged(f"{_PREFIX}{key} holds {type(values[0]).__name__} values")
    return values


def _id(metadata: Mapping[str, Any], key: str, n: int, default: int | None = None) -> int | None:
    value = metadata.get(f"{_PREFIX}{key}")
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < n:
        raise _damaged(f"{_PREFIX}{key} = {value!r}, and there are {n} tokens")
    return value


def _damaged(why: str) -> SpecError:
    return SpecError("the file's tokeniser is damaged", why=why, do=_CONVERT_AGAIN)
