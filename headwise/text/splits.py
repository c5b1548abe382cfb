"""How byte-level vocabularies cut text into words before merging: `tokenizer.ggml.pre` → a pre-tokeniser.

A GGUF file names the split; the patterns live in the runtimes. Source: ggml-org/llama.cpp 00ad355e,
src/llama-vocab.cpp, where each case quotes the pattern of the model's own tokenizer.json; those originals are used here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from headwise.errors import SpecError


@dataclass(frozen=True, slots=True)
class Split:
    """One way to cut: patterns applied in order, each on the pieces of the one before."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole, though no merges lead to it
    add_bos: bool = False  # where the file does not say
    nfc: bool = False  # the model's tokenizer.json composes characters first; llama.cpp does not

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_FAMILIES: tuple[tuple[tuple[str, ...], Split], ...] = (
    (("gpt-2", "phi-2", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling", "a.x-4.0", "mellum",
      "modern-bert", "gigachat"), Split((_GPT2,))),
    (("exaone", "starcoder", "refact", "command-r", "smollm", "codeshell", "minerva-7b", "mellum2"),
     Split((r"\p{N}", _GPT2))),
    (("exaone-moe",), Split((_EXAONE_MOE,))),
    (("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
     Split((_LLAMA3,), ignore_merges=True, add_bos=True)),
    (("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Split((_LLAMA3,))),
    (("qwen2",), Split((_QWEN2,), nfc=True)),
    (("qwen35",), Split((_QWEN35,), nfc=True)),
    (("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
     Split((_QWEN2,))),
    (("tekken",), Split((_TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Split((_GPT4O,))),
    (("default",), Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
)  # fmt: skip

SPLITS = {name: split for names, split in _FAMILIES for name in names}


def split_for(name: object) -> Split:
    """The split a GGUF file names in `tokenizer.ggml.pre`.

    Raises:
        SpecError: no name or one not in SPLITS. llama.cpp runs on with a default and a warning; a wrong split gives
            other ids than the model was trained on, and nothing downstream can notice.
    """
    if isinstance(name, str) and name in SPLITS:
        return SPLITS[name]
    what = "the file does not say how its vocabulary splits text" if name is None else f"unknown pre-tokeniser {name!r}"
    raise SpecError(
        what,
        why="tokenizer.ggml.pre must name a split whose pattern is known; a guess would feed the model wrong ids",
        do="convert the model again with a current llama.cpp, or run `gguf-new-metadata --pre-tokenizer NAME IN OUT` "
        f"with the right one of: {', '.join(sorted(SPLITS))}",
    )
