"""tiny-hybrid's tokenizer: byte-level BPE with Gemma 4's control, tool and channel tokens.

    python tokenizer.py --corpus DIR --out tokenizer.json      trains it on a fixed sample of DIR/train.jsonl

Text is cut by the `qwen2` pre-tokenizer pattern, which llama.cpp knows by that name: a run of indentation, a line end
with its punctuation, and a word with one leading mark (`.append`, `(self`) are one piece each; digits are single. No
normalisation, so every byte sequence comes back as it was.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import zlib
from collections.abc import Iterator

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 6144
PRE = "qwen2"  # tokenizer.ggml.pre
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>")
USER_DEFINED = ("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
                "<|think|>", "<|channel>", "<channel|>")  # fmt: skip
RESERVED = tuple(f"<unused{i}>" for i in range(32 - len(CONTROL) - len(USER_DEFINED)))  # text starts at id 32
PAD, EOS, BOS, UNK, MASK, TURN, END_OF_TURN = range(7)
CHAT_TEMPLATE = pathlib.Path(__file__).with_name("chat_template.jinja")
TRAIN_EVERY = 6  # one file of six, drawn by checksum, trains the merges


def render_chat(messages: list[dict], tools: list[dict] | None = None, **flags: bool) -> str:
    """The text of a conversation in this model's grammar; flags: add_generation_prompt, enable_thinking."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATE.read_text())
    return template.render(messages=messages, tools=tools, bos_token="<bos>", **flags)


def train(texts: Iterator[str]) -> Tokenizer:
    """A tokenizer of VOCAB_SIZE tokens: CONTROL, USER_DEFINED and RESERVED first, then bytes, then merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, normalized=False, special=True) for t in CONTROL + USER_DEFINED + RESERVED]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24)  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", BOS)])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("tokenizer.json"))
    args = parser.parse_args()
    with open(args.corpus / "train.jsonl") as lines:
        sample = (line for line in lines if zlib.crc32(line[:200].encode()) % TRAIN_EVERY == 0)
        tokenizer = train(json.loads(line)["text"] for line in sample)
    tokenizer.save(str(args.out), pretty=False)
    probe = 'def f(x):\n        return "été", {x: 12345}\n'
    ids = tokenizer.encode(probe).ids
    assert tokenizer.decode(ids) == probe, "the tokenizer must give back every byte"
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens; {len(ids)} for the probe: {tokenizer.encode(probe).tokens}")


if __name__ == "__main__":
    main()
