"""Whole-token speed beside transformers on the same card, in one run: `python benchmarks/engine.py OUT.json [MODEL ...]`.

headwise's rows are `headwise bench engine`'s, in bf16, some also in fp8 or q4_k_m; transformers (sdpa) builds the same random
shape in bf16 on the card and runs the same lengths, its cache growing as it does in `generate`. Rows of `dummy` weights have what
vLLM's `--load-format dummy` draws (`benchmarks/vllm_engine.py`): a product of zeros takes less power, and the card clocks higher.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import about
import torch
import transformers
from torch import Tensor

from headwise.bench.engine import bench, line
from headwise.spec import catalogue
from headwise.weights.blocks import Weight

LENGTHS = (512, 4096, 31744)
DECODED = 12
QUANTISED = {"gemma-4-31b": ("fp8", "q4_k_m"), "gemma-4-26b-a4b": ("q4_k_m",)}  # also measured; transformers runs neither


def dummies(weights: Mapping[str, Weight]) -> None:
    """Every float within 1e-3 of 0. Norms have such weights too, and `layer_scalar` multiplies the stream by one of them after each
    of Gemma 4's layers: from the eleventh or so on its products multiply zeros.

    Source: vLLM 0.26.0 model_executor/model_loader/weight_utils.py initialize_dummy_weights.
    """
    for w in weights.values():
        if isinstance(w, Tensor):
            w.uniform_(-1e-3, 1e-3)


def built(name: str) -> Any:
    """transformers' model of a catalogue entry's shape, random weights in bf16 on the card, sdpa."""
    config = dict(catalogue._entries()[name]["config"])
    if isinstance(config.get("layer_types"), str):
        config["layer_types"] = ["sliding_attention" if c == "S" else "full_attention" for c in config["layer_types"]]
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


def main(out: str, models: list[str]) -> None:
    result: dict[str, Any] = {}

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        """What was found so far, also on disk: a run may be cut short."""
        found = found | {"rows": result.get("rows", []) + found["rows"]}
        with open(out, "w") as file:
            json.dump(found | {"commit": about.commit(), "transformers": transformers.__version__}, file, indent=1)
        gc.collect()
        torch.cuda.empty_cache()
        return found

    for name in models:
        say = partial(print, flush=True)
        for weights in ("bf16", *QUANTISED.get(name, ())):
            result = kept(bench([name], lengths=LENGTHS, weights=weights, ubatch=4096, as_json=False, say=say))
        if name in QUANTISED:
            found = bench([name], lengths=LENGTHS, ubatch=4096, as_json=False, say=say, redraw=dummies)
            result = kept(found | {"rows": [row | {"weights": "bf16 dummy"} for row in found["rows"]]})
        try:
            result = kept(result | {"rows": theirs(name, LENGTHS)})
        except torch.OutOfMemoryError as error:
            print(f"transformers: {error}".splitlines()[0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e4b", "llama-3.2-3b"])
