"""Measures tiny-hybrid from its GGUF, in float32 with Q8_0 undone.

    python evaluate.py --gguf FILE --data DIR --out results.json     figures of the model card (a GPU: a minute)
    python evaluate.py --gguf FILE --data DIR --check                agreement with transformers, on the CPU
    python evaluate.py --gguf FILE --data DIR --samples              continuations of held-out files, on the CPU

DIR holds what pack.py wrote. Losses are in bits a byte of UTF-8 text; control tokens are not scored.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import statistics

import numpy as np
import torch
from export import read_state
from model import Config, TinyHybrid
from tokenizer import BOS, render_chat
from tokenizers import Tokenizer
from torch import Tensor

WINDOW_TOKENS = 4096  # of the bits-a-byte figures
MAX_TOKENS = 600_000  # a held-out package
SCORED = 256  # last tokens of an input in the context figures
LOCAL = 2560  # tokens kept when the distant part goes: more than 8 sliding layers can pass on (8 * 255 + 256)
NEAR = 512  # scored tokens and one window
DOCUMENTS = 32
PROMPT_TOKENS = 3000
PROMPTS = (  # (package, file, text the prompt ends with)
    ("stdlib-heldout", "calendar.py", "def weekday(year, month, day):\n"),
    ("stdlib-heldout", "calendar.py", "    def formatmonth(self, theyear, themonth, w=0, l=0):\n"),
    ("stdlib-heldout", "statistics.py", "def median_low(data):\n"),
    ("stdlib-heldout", "shlex.py", "def quote(s):\n"),
    ("tornado", "tornado/web.py", "    def set_cookie(\n"),
    ("networkx", "networkx/algorithms/centrality/betweenness.py", "def _accumulate_basic(betweenness, S, P, sigma, s):\n"),
)


class Scorer:
    """Nats and bytes of each token of an id sequence, <bos> put before it."""

    def __init__(self, gguf: pathlib.Path, tokenizer: Tokenizer, device: str) -> None:
        self.model = TinyHybrid(Config()).to(device).eval()
        self.model.load_state_dict(read_state(gguf))
        self.device = device
        size = tokenizer.get_vocab_size()
        lengths = [0 if i < 32 else len(tokenizer.id_to_token(i)) for i in range(size)]  # a mark is a byte
        self.n_bytes = torch.tensor(lengths, device=device)

    @torch.no_grad()
    def __call__(self, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """(nats, bytes) [B, last] of the last `last` tokens of ids [B, S]; unscored tokens have no bytes and no nats."""
        inputs = ids.roll(1, 1)
        inputs[:, 0] = BOS
        hidden = self.model.hidden(inputs)[:, -last:]
        targets = ids[:, -last:]
        nats = torch.cat([
            torch.nn.functional.cross_entropy(self.model.logits(h).transpose(1, 2), t, reduction="none")
            for h, t in zip(hidden.split(2048, 1), targets.split(2048, 1), strict=True)
        ], 1)  # fmt: skip
        n_bytes = self.n_bytes[targets]
        return torch.where(n_bytes > 0, nats, 0.0), n_bytes


def bits_per_byte(score: Scorer, stream: np.ndarray) -> dict:
    """Over consecutive windows, each starting afresh: what a 4K context gives on average over its positions."""
    n_windows = min(len(stream), MAX_TOKENS) // WINDOW_TOKENS
    rows = torch.from_numpy(stream[: n_windows * WINDOW_TOKENS].astype(np.int64)).view(n_windows, WINDOW_TOKENS)
    nats = n_bytes = 0.0
    for batch in rows.split(8):
        part, size = score(batch.to(score.device), WINDOW_TOKENS)
        nats, n_bytes = nats + part.double().sum().item(), n_bytes + size.sum().item()
    n_tokens = n_windows * WINDOW_TOKENS
    return {"bits_per_byte": nats / n_bytes / math.log(2), "nats_per_token": nats / n_tokens,
            "bytes_per_token": n_bytes / n_tokens, "tokens": n_tokens}  # fmt: skip


def context_use(score: Scorer, streams: dict[str, np.ndarray], n_tokens: int) -> dict:
    """The same last tokens after the whole input, after its near parts only, and after another package's distant part."""
    # documents end at even steps through the packages long enough; `other` is the next such package
    names = [name for name in sorted(streams) if len(streams[name]) > 2 * n_tokens]
    totals = {"all": [], "distant part of another package": [], f"last {LOCAL} only": [], f"last {NEAR} only": []}
    for d in range(DOCUMENTS):
        name, other = names[d % len(names)], names[(d + 1) % len(names)]
        ends = np.linspace(n_tokens, len(streams[name]), DOCUMENTS // len(names) + 2).astype(int)
        whole = streams[name][ends[d // len(names)] - n_tokens : ends[d // len(names)]].astype(np.int64)
        foreign = np.concatenate([streams[other][: n_tokens - LOCAL].astype(np.int64), whole[-LOCAL:]])
        inputs = whole, foreign, whole[-LOCAL:], whole[-NEAR:]
        for into, ids in zip(totals.values(), inputs, strict=True):
            nats, n_bytes = score(torch.from_numpy(ids)[None].to(score.device), SCORED)
            into.append((nats.sum().item() / math.log(2), n_bytes.sum().item()))
    gains = [(near - all_) / size for (all_, size), (near, _) in
             zip(totals["all"], totals[f"last {LOCAL} only"], strict=True)]  # fmt: skip
    return {"documents": DOCUMENTS, "packages": names,
            "bits_per_byte": {k: sum(b for b, _ in v) / sum(n for _, n in v) for k, v in totals.items()},
            "gain_of_distant_part": {"mean": statistics.mean(gains), "documents_helped": sum(g > 0 for g in gains),
                                     "standard_error": statistics.stdev(gains) / len(gains) ** 0.5}}  # fmt: skip


def by_position(score: Scorer, stream: np.ndarray, n_tokens: int, n_sequences: int) -> dict[str, float]:
    """Bits a byte in stretches of an input that doubles up to `n_tokens`: whether far positions stay usable."""
    edges = [0, *(2**p for p in range(10, int(math.log2(n_tokens)) + 1))]
    starts = np.linspace(0, len(stream) - n_tokens, n_sequences).astype(int)
    sums = np.zeros((2, n_tokens))
    for start in starts:
        ids = torch.from_numpy(stream[start : start + n_tokens].astype(np.int64))[None].to(score.device)
        nats, n_bytes = score(ids, n_tokens)
        sums += np.stack([nats[0].cpu().numpy(), n_bytes[0].cpu().numpy()])
    return {f"{a}-{b}": float(sums[0, a:b].sum() / sums[1, a:b].sum() / math.log(2))
            for a, b in itertools.pairwise(edges)}  # fmt: skip


def open_in_transformers(gguf: pathlib.Path) -> torch.nn.Module:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig  # only the CPU checks need transformers

    state = read_state(gguf)
    config = Gemma4TextConfig(**Config().hf_config(), attn_implementation="eager")
    model = Gemma4ForCausalLM(config).float().eval()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model


@torch.no_grad()
def check(gguf: pathlib.Path, streams: dict[str, np.ndarray]) -> None:
    """Prints the loss of this model and of transformers on the same text, and the largest difference of a logit."""
    ids = torch.from_numpy(streams["stdlib-heldout"][:2048].astype(np.int64))[None]
    inputs = ids.roll(1, 1)
    inputs[:, 0] = BOS
    ours = TinyHybrid(Config()).eval()
    ours.load_state_dict(read_state(gguf))
    a, b = ours(inputs), open_in_transformers(gguf)(inputs).logits
    losses = [torch.nn.functional.cross_entropy(x[0], ids[0]).item() for x in (a, b)]
    print(f"loss {losses[0]:.6f} here, {losses[1]:.6f} in transformers; logits differ by {(a - b).abs().max():.2e}")


@torch.no_grad()
def samples(gguf: pathlib.Path, tokenizer: Tokenizer, heldout: pathlib.Path, n_new: int = 128) -> list[dict]:
    """Continuations of PROMPTS, greedy and at temperature 0.6 (seed 4), and one chat."""
    model = open_in_transformers(gguf)
    files = {(d["package"], d["path"]): d["text"] for d in map(json.loads, heldout.open())}
    prompts = {f"{path}: {mark.strip()}": files[package, path].partition(mark)[0] + mark for package, path, mark in PROMPTS}
    ask = "Write the Python function `add(a, b)`: Return the sum of two numbers."
    prompts["chat"] = render_chat([{"role": "user", "content": ask}], add_generation_prompt=True).removeprefix("<bos>")
    found = []
    for name, prompt in prompts.items():
        ids = [BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids[-PROMPT_TOKENS:]]
        for temperature in (0.0, 0.6):
            torch.manual_seed(4)
            sampled = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 64}
            how = sampled if temperature else {"do_sample": False}
            out = model.generate(torch.tensor([ids]), max_new_tokens=n_new, **how)[0].tolist()
            found.append({"prompt": name, "prompt_tokens": len(ids), "prompt_end": prompt[-240:], "temperature": temperature,
                          "continuation": tokenizer.decode(out[len(ids) :])})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", default=str(pathlib.Path(__file__).with_name("tokenizer.json")))
    parser.add_argument("--out", type=pathlib.Path, help="JSON of all figures")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--samples", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    streams = {p.stem: np.fromfile(p, np.uint16) for p in sorted((args.data / "heldout").glob("*.u16"))}
    if args.check:
        check(args.gguf, streams)
    if args.samples:
        print(json.dumps(samples(args.gguf, tokenizer, args.data / "heldout.jsonl"), indent=1))
    if args.out:
        score = Scorer(args.gguf, tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
        longest = max(streams.values(), key=len)
        results = {
            "held_out": {name: bits_per_byte(score, stream) for name, stream in streams.items()},
            "context_use": {str(n): context_use(score, streams, n) for n in (4096, 8192, 32768)},
            "bits_per_byte_by_position": by_position(score, longest, 65536, 6),
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
