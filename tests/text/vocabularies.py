"""Tiny vocabularies trained on the spot, each written in the two formats: a Hugging Face directory and a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't care; it's asleep, they'll see.",
    "def plan(model, n_tokens):\n    if n_tokens > 131072:\n        return None\n\treturn kv_bytes * n_tokens\n\n\n",
    "Größenwahn, naïve café, Ελληνικά, Русский текст, 日本語のテキスト、漢字。中文文本。한국어 텍스트",
    "12345 67 8.9e10 0x1F600 😀😃 👩‍💻 a  b    c        d\r\nCRLF\r\n\ttab\t\ttabs 'S 'LL don'T",
    "<|im_start|>user hello <|turn> <turn|> </s> <s> think [INST] | < > <| |>",
] * 3
ODD_TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "a\r\nb\r\n\r\nc",
    "\t\tx\t",
    "x" + " " * 100 + "y" + " " * 33,
    "\n" * 40,
    "😀👩‍💻🇪🇺 ﷽ \u200b\ufeff",
    "日本語テキスト、漢字。中文 한국어",
    "e\u0301 é ẛ̣",
    "\x00\x01\x7f\u2028",
    "1234567890 12,345.678",
    "Don'T WE'LL they'Re HTMLParser camelCase ÉCOLE",
    "trailing space ",
    " leading space",
    "\U0010ffff\ue000",
]


@dataclass(frozen=True)
class Pair:
    """One vocabulary, both ways, and the library's own tokenizer as the oracle."""

    directory: Path
    gguf: Path
    rust: Tokenizer
    composes: bool = False  # the vocabulary's normaliser changes text (NFC), so decoding need not give it back


SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|tool|>"]
ORDINARY = ["<think>", "</think>"]


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A GGUF file with tokenizer.ggml.* fields and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def merges_of(rust: Tokenizer) -> list[str]:
    return [" ".join(merge) for merge in json.loads(rust.to_str())["model"]["merges"]]


def split_merges(rust: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (merge.split(" ") for merge in merges_of(rust))]


def tokens_of(rust: Tokenizer) -> list[str]:
    return [token for token, _ in sorted(rust.get_vocab().items(), key=lambda item: item[1])]


def byte_level_pair(path: Path, pre: str) -> Pair:
    """A byte-level BPE that splits as transformers says a GGUF file with this `pre` does."""
    ignore_merges = pre in ("llama-bpe", "tekken")
    rust = Tokenizer(BPE(ignore_merges=ignore_merges))
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        rust.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre == "exaone":
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("qwen2", "qwen35"):  # as transformers' own tokenizers of these models
        rust.normalizer = normalizers.NFC()
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    rust.add_tokens([AddedToken(token, special=False, normalized=False) for token in ORDINARY])
    tokens = tokens_of(rust)
    types = [CONTROL if t in SPECIAL else USER_DEFINED if t in ORDINARY else NORMAL for t in tokens]
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    hf.save_pretrained(path / "hf")
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges_of(rust),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return Pair(path / "hf", write_gguf(path / "model.gguf", fields), rust, composes=pre.startswith("qwen"))


def sentencepiece_pair(path: Path, *, kind: str, prefix: bool) -> Pair:
    """A BPE over characters with byte fallback: scores for kind "llama", listed merges for kind "gemma4"."""
    rust = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    to_marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *to_marks] if prefix else to_marks)
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^▁\n]+|▁+[^▁\n]*|\n+"), "isolated")  # for training only
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    control = ["<unk>", "<s>", "</s>", "<|turn>", "<turn|>", "<|channel>", "<|tool_response>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=control + bytes_, limit_alphabet=130, show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    vocab, merges = rust.get_vocab(), split_merges(rust)
    tokens = tokens_of(rust)
    if kind == "llama":  # a token may be made in several ways: all of them, the best score first
        scores = {t: 0.0 if t in control or t in bytes_ else -float(i) for i, t in enumerate(tokens)}
        generate = transformers.tokenization_utils_base.generate_merges
        merges = generate(vocab, scores, skip_tokens=[*control, *bytes_])
    rust_again = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust_again.normalizer = rust.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust_again.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    rust_again.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    rust_again.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=rust_again, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    hf.save_pretrained(path / "hf")
    visible = ("<|channel>", "<|tool_response>")  # as the converter marks them for llama.cpp
    fields = {
        "model": kind,
        "tokens": tokens,
        "token_type": [
            UNKNOWN if t == "<unk>" else USER_DEFINED if t in visible else CONTROL if t in control
            else BYTE if t in bytes_ else NORMAL
            for t in tokens
        ],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": prefix,
    }  # fmt: skip
    if kind == "llama":
        fields["scores"] = [0.0 if t in control or t in bytes_ else -float(i) for i, t in enumerate(tokens)]
    else:
        fields["merges"] = [" ".join(merge) for merge in merges]
    return Pair(path / "hf", write_gguf(path / "model.gguf", fields), rust_again)


BYTE_LEVEL = ["gpt-2", "exaone4", "exaone", "qwen2", "qwen35", "llama-bpe", "tekken", "gpt-4o"]
SENTENCEPIECE = ["llama", "gemma3", "gemma4"]
