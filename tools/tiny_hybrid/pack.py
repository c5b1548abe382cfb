"""Turns the corpus into token streams: DIR/*.jsonl -> DIR/train.u16 and DIR/heldout/PACKAGE.u16.

    python pack.py --data DIR --tokenizer tokenizer.json

Files of a folder follow each other in path order with <eos> between them, so what is far away in a training sequence is
related to what is near. <bos> opens every package and every second-level folder. The standard library and the
conversations are written REPEATS times: the first is the style the model is shown with, the second is small.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import multiprocessing.pool
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from tokenizer import BOS, EOS, render_chat
from tokenizers import Tokenizer

REPEATS = {"python-stdlib": 3, "chat": 3}
BATCH = 256  # files handed to a process at a time


def _encode(tokenizer_path: str, lines: list[str]) -> list[tuple[str, str, np.ndarray]]:
    """(package, folder, ids) of each file; runs in a process of the pool."""
    tokenizer = _tokenizer(tokenizer_path)
    tokenizer.encode_special_tokens = True
    files = map(json.loads, lines)
    return [(d["package"], "/".join(d["path"].split("/")[:-1][:2]),
             np.array(tokenizer.encode(d["text"], add_special_tokens=False).ids, np.uint16)) for d in files]  # fmt: skip


_tokenizer = functools.cache(Tokenizer.from_file)


def encode_files(pool: multiprocessing.pool.Pool, tokenizer_path: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The stream of each package of a jsonl. Control tokens spelt out in source stay plain text."""
    with open(path) as handle:
        lines = list(handle)
    batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
    streams, group = collections.defaultdict(list), None
    for batch in pool.imap(functools.partial(_encode, tokenizer_path), batches):
        for package, folder, ids in batch:
            head = [BOS] if (package, folder) != group else []
            group = package, folder
            streams[package] += [np.array(head, np.uint16), ids, np.array([EOS], np.uint16)]
    return {package: np.concatenate(parts) for package, parts in streams.items()}


def encode_chats(tokenizer: Tokenizer, lines: Iterator[str]) -> np.ndarray:
    samples = (json.loads(line) for line in lines)
    texts = [render_chat(s["messages"], s["tools"]) for s in samples]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # the template writes <bos> itself
    return np.concatenate([np.array(e.ids, np.uint16) for e in encoded])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", default=str(pathlib.Path(__file__).with_name("tokenizer.json")))
    args = parser.parse_args()
    with multiprocessing.Pool() as pool:
        train = encode_files(pool, args.tokenizer, args.data / "train.jsonl")
        held_out = encode_files(pool, args.tokenizer, args.data / "heldout.jsonl")
    with open(args.data / "chat.jsonl") as lines:
        train["chat"] = encode_chats(Tokenizer.from_file(args.tokenizer), lines)
    parts = [ids for name, ids in train.items() for _ in range(REPEATS.get(name, 1))]
    np.concatenate(parts).tofile(args.data / "train.u16")

    (args.data / "heldout").mkdir(exist_ok=True)
    for package, ids in held_out.items():
        ids.tofile(args.data / "heldout" / f"{re.sub(r'[^a-z0-9-]', '_', package.lower())}.u16")
    once, total = sum(map(len, train.values())), sum(map(len, parts))
    print(f"{once / 1e6:.1f} M tokens ({len(train['chat']) / 1e6:.1f} M of chat), {total / 1e6:.1f} M with repeats")


if __name__ == "__main__":
    main()
