"""What does `attn_implementation="headwise"` change in transformers on a CUDA card?

    PYTHONPATH=. python benchmarks/transformers_attention.py [OUT.json]

A random model of six layers of Gemma 4 31B, true head sizes (32 heads; 5 sliding layers of 16 KV heads of 256, window 1,024; one
global layer of 4 KV heads of 512), bf16. First the logits, against transformers' eager attention in fp32: a prompt, a batch
padded on the left, and tokens after each. Then tokens per second, kinds of attention in turn: prompts of 4K and 16K tokens, and
decode after them (DynamicCache, one sequence). A kind that is not installed, refuses or has no memory is listed with its reason.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from headwise.integrations.transformers import chosen, register

KINDS = ("sdpa", "headwise", "eager", "flash_attention_2")
CONFIG: dict[str, Any] = {
    "vocab_size": 8192, "vocab_size_per_layer_input": 8192, "hidden_size": 5376, "intermediate_size": 21504,
    "num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 256, "num_global_key_value_heads": 4, "global_head_dim": 512,
    "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size_per_layer_input": 0, "max_position_embeddings": 32768,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
}  # fmt: skip
LENGTHS, CHECKED, STEPS, ROUNDS = (4096, 16384), 1500, 24, 5
SECONDS = 75  # no further round begins after these
SLOW = 3.0  # seconds of one prompt from which a kind is measured once


def model(device: str, dtype: torch.dtype, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gemma4_text", **(CONFIG | changes))
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # Gemma 4 does not scale scores: keep them near 1
                value.fill_(value.shape[-1] ** -0.25)
    return net


def logits(net: transformers.PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the real tokens: a prompt, then one token, then five."""
    n, parts, at = ids.shape[1], [], 0
    cache = transformers.DynamicCache(config=net.config)
    for step in (n - 6, 1, 5):
        part = net(ids[:, at : at + step], attention_mask=mask[:, : at + step], past_key_values=cache).logits
        parts.append(part)
        at += step
    return torch.cat(parts, 1).float()[mask.bool()]


def errors(net: transformers.PreTrainedModel, n: int) -> dict[str, dict[str, float]]:
    """Relative error of each kind, in fp32 and in the model's type, against eager attention in fp32 with the same weights."""
    device, dtype = net.device, net.dtype
    ids = torch.randint(1, net.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(1)).to(device)
    whole = torch.ones_like(ids)
    padded = whole.clone()
    padded[1, : n // 3] = 0
    out: dict[str, dict[str, float]] = {}
    truth: dict[str, Tensor] = {}
    for kind_of_number, kinds in ((torch.float32, ("eager", "sdpa", "headwise")), (dtype, ("eager", "sdpa", "headwise"))):
        net.to(kind_of_number)
        for kind in kinds:
            net.set_attn_implementation(kind)
            for name, mask in (("whole", whole), ("padded", padded)):
                got = logits(net, ids, mask)
                want = truth.setdefault(name, got)
                key = f"{str(kind_of_number).removeprefix('torch.')} {name}"
                out.setdefault(key, {})[kind] = float((got - want).norm() / want.norm())
    return out


def tried(run: Callable[[], Any]) -> tuple[Any, str]:
    """The result, or the first line of why there is none."""
    try:
        return run(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        gc.collect()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def timed(net: transformers.PreTrainedModel, n: int, until: float) -> dict[str, dict[str, Any]]:
    """Tokens per second of each kind after a prompt of `n` tokens, and of the prompt."""
    device = net.device
    ids = torch.randint(1, net.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(2)).to(device)
    caches: dict[str, Any] = {}
    prompts: dict[str, list[float]] = {}
    tokens: dict[str, list[float]] = {}
    refused: dict[str, str] = {}

    def prompt(kind: str) -> None:
        caches[kind] = transformers.DynamicCache(config=net.config)
        net(ids, past_key_values=caches[kind], logits_to_keep=1)

    def decode(kind: str) -> None:
        for _ in range(STEPS):
            net(ids[:, :1], past_key_values=caches[kind], logits_to_keep=1)

    for turn in range(ROUNDS + 1):  # the first compiles
        for kind in KINDS:
            if kind in refused or (turn > 1 and prompts[kind][-1] > SLOW) or time.perf_counter() > until:
                continue
            if kind.startswith("flash") and find_spec("flash_attn") is None:
                refused[kind] = "not installed"
                continue

            def both(kind: str = kind) -> tuple[float, float]:
                net.set_attn_implementation(kind)
                return seconds(lambda: prompt(kind), device), seconds(lambda: decode(kind), device)

            took, why = tried(both)
            caches.pop(kind, None)
            if took is None:
                refused[kind] = why
                continue
            if turn:
                prompts[kind].append(took[0])
                tokens[kind].append(took[1])
            else:
                prompts[kind], tokens[kind] = [], []
        if device.type == "cuda":
            torch.cuda.empty_cache()
    out: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        if kind in refused or not prompts.get(kind):
            out[kind] = {"refused": refused.get(kind, "no time left")}
            continue
        out[kind] = {
            "prefill_tok_s": spread([n / s for s in prompts[kind]]),
            "decode_tok_s": spread([STEPS / s for s in tokens[kind]]),
        }
    return out


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def main() -> None:
    start = time.perf_counter()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    register()
    net = model("cuda", torch.bfloat16)
    with torch.inference_mode():
        found = errors(net, CHECKED)
        for key, row in found.items():
            print(f"{key:18}", "  ".join(f"{k} {v:.2e}" for k, v in row.items()))
            bound = 1e-4 if key.startswith("float32") else 1.25 * max(row["eager"], row["sdpa"])
            if not row["headwise"] <= bound:
                sys.exit(f"{key}: headwise is off by {row['headwise']:.2e}, at most {bound:.2e} is right; nothing is timed")
        rows = {n: timed(net, n, start + SECONDS) for n in LENGTHS}
    for n, kinds in rows.items():
        for kind, row in kinds.items():
            speeds = {k: f"{v['median']:.0f} tok/s" for k, v in row.items() if k != "refused"}
            print(f"{n:6}  {kind:18}", row.get("refused") or "  ".join(f"{k} {v}" for k, v in speeds.items()))
    device = torch.device("cuda", 0)
    result = {
        "gpu": torch.cuda.get_device_name(0),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "transformers")},
        "model": CONFIG,
        "backends": {
            f"head_dim {d}": chosen(device, torch.bfloat16, d, window, None, False).backend.name
            for d, window in ((256, 1024), (512, None))
        },
        "relative_error": found,
        "tokens_per_second": rows,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    text = json.dumps(result)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
