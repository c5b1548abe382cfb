"""Whole-token speed beside transformers and llama.cpp on the same card, in one run.

    PYTHONPATH=.:tests python benchmarks/engine.py OUT.json [MODEL ...] [--llama-cpp DIR]

headwise's rows are `headwise bench engine`'s, in bf16, some also in fp8 or q4_k_m; transformers (sdpa) builds the same random
shape in bf16 on the card and runs the same lengths, its cache growing as it does in `generate`; llama.cpp has the q4_k_m weights of
our plan in a GGUF, of Gemma 4 31B (benchmarks/llamacpp.py), and runs in micro-batches of 4,096. Rows of `dummy` weights have what
vLLM's `--load-format dummy` draws (`benchmarks/vllm_engine.py`): a product of zeros takes less power, and the card clocks higher.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import about
import torch
import transformers
from torch import Tensor

from headwise.bench.engine import bench, in_bf16, line, plan_for
from headwise.engine.devices import Seat
from headwise.spec import catalogue
from headwise.weights.blocks import Weight

LENGTHS = (512, 4096, 31744)
DECODED, UBATCH = 12, 4096
LLAMA_CPP = ("gemma-4-31b",)
QUANTISED = {"gemma-4-31b": ("fp8", "q4_k_m"), "gemma-4-26b-a4b": ("q4_k_m",)}  # also measured; transformers runs neither


def dummies(weights: Mapping[str, Weight]) -> None:
    """Every float within 1e-3 of 0. Norms have such weights too, and `layer_scalar` multiplies the stream by one of them after each
    of Gemma 4's layers: from the fourteenth of the 31B on it is zero.

    Source: vLLM 0.26.0 model_executor/model_loader/weight_utils.py initialize_dummy_weights.
    """
    for w in weights.values():
        if isinstance(w, Tensor):
            w.uniform_(-1e-3, 1e-3)


def built(name: str) -> Any:
    """transformers' model of a catalogue entry's shape, random weights in bf16 on the card, sdpa."""
    config = catalogue.config(name)
    kind = config.pop("model_type")
    made = transformers.AutoConfig.for_model(kind, **config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(torch.float32)


def theirs(name: str, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    model = built(name)
    rows = []
    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device="cuda")
        prefill, decode = [], []
        with torch.inference_mode():
            for _ in range(2):
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = model(ids, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                token.item()
                prefill.append(time.perf_counter() - start)
            cache = out.past_key_values
            for i in range(DECODED):
                start = time.perf_counter()
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                token.item()
                if i > 2:
                    decode.append(time.perf_counter() - start)
        rows.append({
            "model": name, "who": "transformers", "weights": "bf16", "kv": "bf16", "tokens": length,
            "prefill_tok_s": length / min(prefill), "decode_tok_s": 1 / statistics.median(decode),
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
        del out, cache
        torch.cuda.empty_cache()
    return rows


def llama_cpp(name: str, folder: Path, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    import llamacpp

    spec, device, context = catalogue.spec(name), torch.device("cuda"), max(lengths) + DECODED + 256
    _, p, _ = plan_for(spec, context=context, chunk=UBATCH, seats=[Seat(device)], **in_bf16(spec, "q4_k_m", device))
    engine, error = llamacpp.opened(folder, spec, p, device, context=context, ubatch=UBATCH)
    rows = []
    for length in lengths:
        ids, took = torch.randint(3, spec.vocab_size, (length,)).tolist(), list[float]()
        for _ in range(3):
            start = time.perf_counter()
            engine.prefill(ids)
            took.append(time.perf_counter() - start)
        rows.append({
            "model": name, "who": "llama.cpp", "weights": "q4_k_m", "kv": "f16", "tokens": length, "error": error,
            "prefill_tok_s": length / min(took), "decode_tok_s": 1 / engine.decode(DECODED),
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
    engine.close()
    return rows


def main(out: Path, models: list[str], folder: Path | None) -> None:
    result: dict[str, Any] = {}
    versions = {"commit": about.commit(), "transformers": transformers.__version__, "llama_cpp": "0.5.0" if folder else None}

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        """What was found so far, also on disk: a run may be cut short."""
        found = found | {"rows": result.get("rows", []) + found["rows"]}
        with open(out, "w") as file:
            json.dump(found | versions, file, indent=1)
        gc.collect()
        torch.cuda.empty_cache()
        return found

    for name in models:
        say = partial(print, flush=True)
        for weights in ("bf16", *QUANTISED.get(name, ())):
            result = kept(bench([name], lengths=LENGTHS, weights=weights, ubatch=UBATCH, as_json=False, say=say))
        if name in QUANTISED:
            found = bench([name], lengths=LENGTHS, ubatch=UBATCH, as_json=False, say=say, redraw=dummies)
            result = kept(found | {"rows": [row | {"weights": "bf16 dummy"} for row in found["rows"]]})
        try:
            result = kept(result | {"rows": theirs(name, LENGTHS)})
        except torch.OutOfMemoryError as error:
            print(f"transformers: {error}".splitlines()[0], flush=True)
        if folder and name in LLAMA_CPP:
            result = kept(result | {"rows": llama_cpp(name, folder, LENGTHS)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*", default=["gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e4b", "llama-3.2-3b"])
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="holds libllama*.so and libggml*.so, release 0.5.0")
    args = parser.parse_args()
    main(args.out, args.models, args.llama_cpp)
