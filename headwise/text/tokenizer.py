"""Text ↔ token ids, one interface over Hugging Face directories and GGUF files.

The ids come from the `tokenizers` Rust library in both cases: from_hf.py loads one, from_gguf.py builds one. Decoding is
done here (pieces.py), so that a stream of tokens and the whole text agree to the byte.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable
from pathlib import Path

from tokenizers.normalizers import Replace, Sequence

from headwise.errors import UsageError
from headwise.spec.gguf import GgufFile, read_gguf
from headwise.text.from_gguf import vocabulary_from_gguf
from headwise.text.from_hf import vocabulary_from_hf
from headwise.text.pieces import pieces_of
from headwise.text.vocabulary import Vocabulary

SEAM = "\ufdd0"  # no character: Unicode keeps it for a program's own use
_SURROGATE = re.compile("[\ud800-\udfff]")
LONG_TOKEN = 8  # characters: a text of as many a token allowed is looked at in part first


class TooManyTokens(UsageError):
    """A text has more tokens than its reader takes.

    Args:
        n: tokens of its beginning.
    """

    def __init__(self, n: int, most: int) -> None:
        super().__init__(f"the text has more than {n} tokens", why=f"at most {most} are taken", do="shorten it")
        self.n = n


def read_tokenizer(source: Path | GgufFile) -> Tokenizer:
    """The tokeniser of a model: a directory with tokenizer.json, or a GGUF file (its path, or as read).

    Raises:
        SpecError: there is none, it is damaged, or it is of a kind not known here.
    """
    if isinstance(source, Path):
        if source.is_dir():
            return Tokenizer(vocabulary_from_hf(source))
        source = read_gguf(source)
    return Tokenizer(vocabulary_from_gguf(source.metadata))


class Tokenizer:
    """Encodes and decodes. Has no state a caller can see; threads may share one.

    `eos_ids` are all tokens that end a turn, `bos_id` is None where the model has none, `add_bos` is the model's own
    wish, `chat_template` None where the file brings none.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.chat_template = vocabulary.chat_template
        self._rust = vocabulary.rust
        self._hidden = vocabulary.hidden
        self._guarded = vocabulary.guarded
        self._duplicates = vocabulary.duplicates
        self.vocab_size = vocabulary.size
        self._to_bytes, self._leading_spaces = pieces_of(self._rust.decoder)
        self._pieces: dict[int, bytes] = {}
        self._encoding = threading.Lock()  # the library's switch for special tokens is a setting, not an argument

    @property
    def guarded_texts(self) -> tuple[str, ...]:
        """The control tokens and tags that nobody may type, as they are spelt."""
        return tuple(sorted({text for i in self._guarded if (text := self.token(i))}))

    def encode(
        self, text: str, *, add_bos: bool = True, parse_special: bool = False, seams: bool = False, most: int | None = None
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            add_bos: begin with the BOS token if the model wants one; never a second one after a template's own.
            parse_special: False for text from outside: `<|turn>` in it becomes its letters, never the control token.
                True for a rendered chat template.
            seams: `text` holds SEAMs; they are left out, and what holds one inside is no control token.
            most: tokens that the caller takes: a text that has far more is not read to its end, at 160 bytes a character.
        Raises:
            TooManyTokens: the beginning of the text alone has more than `most`.
            UsageError: `text` holds half of a surrogate pair, which no UTF-8 and so no token can express.
        """
        if (broken := _SURROGATE.search(text)) is not None:
            raise UsageError(
                "the text is not valid Unicode",
                why=f"half a surrogate pair, U+{ord(broken[0]):04X}, at character {broken.start()}",
                do="send the pair's two halves together, or U+FFFD in its place: "
                "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')",
            )
        if most is not None and len(text) > (enough := LONG_TOKEN * most):
            begun = len(self.encode(text[:enough], add_bos=add_bos, parse_special=parse_special, seams=seams))
            if begun > most + LONG_TOKEN:  # the cut itself may have made a few
                raise TooManyTokens(begun - LONG_TOKEN, most)
        with self._encoding:
            self._rust.encode_special_tokens = not parse_special
            normalizer = self._rust.normalizer
            try:
                if seams:  # control tokens are found before a text is normalised
                    drop = Replace(SEAM, "")
                    self._rust.normalizer = Sequence([drop] if normalizer is None else [drop, normalizer])
                (encoded,) = self._rust.encode_batch([text], add_special_tokens=False)  # `encode` would hold the GIL
            finally:
                if seams:
                    self._rust.normalizer = normalizer or Sequence([])
        ids = encoded.ids
        if (seams or not parse_special) and not self._guarded.isdisjoint(ids):  # merges of the file's own led to a control token
            spans = zip(ids, encoded.offsets, strict=True)
            typed = [i in self._guarded and (not parse_special or SEAM in text[start:stop]) for i, (start, stop) in spans]
            ids = [part for i, plain in zip(ids, typed, strict=True) for part in (self._spell(i) if plain else (i,))]
        if add_bos and self.add_bos and self.bos_id is not None and not (parse_special and ids[:1] == [self.bos_id]):
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; an id without a token (a model's padding rows)
        is nothing.

        Args:
            skip_special: leave out control tokens. Tags such as `<think>` stay.
        """
        stream = self.stream(skip_special=skip_special)
        return stream.push(*ids) + stream.flush()

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder to feed token by token.

        Args:
            continues: the text goes on after a prompt, so a first token's leading space is text. By default, as in
                `decode`, the one space that some vocabularies put before every text is removed.
        """
        return StreamDecoder(self, skip_special=skip_special, leading_spaces=0 if continues else self._leading_spaces)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty for an id without one.

        Raises:
            ValueError: a negative id.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        text = self._rust.id_to_token(token_id)
        return self._duplicates.get(token_id, "") if text is None else text

    def id(self, token: str) -> int | None:
        """The id of a token spelt as in the vocabulary."""
        return self._rust.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether decoding leaves this token out by default."""
        return token_id in self._hidden

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text; possibly a part of a character."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._to_bytes(self.token(token_id))
        return piece

    def _spell(self, token_id: int) -> list[int]:
        """The token's characters as tokens of their own, or as bytes where the vocabulary has no such character."""
        spelt: list[int] = []
        for character in self.token(token_id):
            names = [character] if self.id(character) is not None else [f"<0x{byte:02X}>" for byte in character.encode()]
            spelt += [i for name in names if (i := self.id(name)) is not None]
        return spelt


class StreamDecoder:
    """Text from tokens as they come: whole characters only, and in all the same text as `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, leading_spaces: int) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._leading_spaces = leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """The text that became certain with these tokens; empty while a character is incomplete."""
        tokenizer = self._tokenizer
        kept = (i for i in ids if not (self._skip_special and tokenizer.is_special(i)))
        return self._trimmed(self._utf8.decode(b"".join(map(tokenizer.token_bytes, kept))))

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never completed. The next push begins a new text's bytes."""
        return self._trimmed(self._utf8.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        while text and self._leading_spaces:
            if text[0] != " ":
                self._leading_spaces = 0
                break
            text, self._leading_spaces = text[1:], self._leading_spaces - 1
        return text
