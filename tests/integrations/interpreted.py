"""Logits of two hybrid models through our kernels, in triton's interpreter on CPU tensors, beside eager attention.

A program of its own: the interpreter must be chosen before triton is imported. Prints one JSON line a model.
"""

from __future__ import annotations

import json
from dataclasses import replace

import tiny
import torch
import transformers

from headwise.attention.capability import BACKENDS
from headwise.integrations import transformers as ours

MODELS = {
    "gemma4-31b": {"head_dim": 64, "global_head_dim": 128, "num_hidden_layers": 3, "layer_types": [tiny.SLIDING] * 2 + [tiny.FULL]},
    "gpt-oss": {"head_dim": 64, "num_hidden_layers": 2, "layer_types": [tiny.SLIDING, tiny.FULL]},  # learned sinks
}


def errors(name: str) -> dict[str, float]:
    """Largest differences: a whole prompt, one padded on the left, one token after it, six more."""
    torch.manual_seed(1)
    config = tiny.model_config(name, **MODELS[name])
    net = tiny.lively(name, transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    ids = torch.randint(1, 320, (2, 44))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found = {}
    for kind in ("eager", "headwise"):
        net.set_attn_implementation(kind)
        with torch.inference_mode():
            prompt = net(ids[:, :37], attention_mask=mask[:, :37], use_cache=True)
            one = net(ids[:, 37:38], attention_mask=mask[:, :38], past_key_values=prompt.past_key_values)
            six = net(ids[:, 38:], attention_mask=mask, past_key_values=one.past_key_values)
            found[kind] = {
                "whole": net(ids).logits,
                "padded": prompt.logits[mask[:, :37].bool()],
                "decode": one.logits,
                "six": six.logits,
            }
    return {k: float((found["headwise"][k] - found["eager"][k]).abs().max()) for k in found["eager"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [replace(b, apis=("cpu",), kv=("f32",), dtypes=("f32",), min_capability=None) for b in BACKENDS]
    ours.BACKENDS = [next(r for r in rows if r.name == "headwise-triton")]
    ours.register()
    launched = []
    launch = ours.own_kernels.launch
    ours.own_kernels.launch = lambda backend, *args, **kwargs: (launched.append(backend), launch(backend, *args, **kwargs))
    for name in MODELS:
        launched.clear()
        print(json.dumps({"errors": errors(name), "launches": len(launched)}), flush=True)
