"""CPU speed on the embedded model: headwise, transformers and (where installed) llama.cpp on the same weights, interleaved.

    python benchmarks/cpu_decode.py [--prompt 1024] [--tokens 64] [--rounds 5] [OUT.json]

Correct first: greedy tokens of headwise and transformers must agree before anything is timed. Decode is timed token by
token after a prompt of the same ids; each engine decodes the same number of tokens per round, in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import about
import torch
import transformers

from headwise import LLM
from headwise.text.demo import demo_prompt


def gemma_from(llm: LLM) -> Any:
    """transformers' own Gemma 4 with the embedded model's weights, dequantised to fp32."""
    spec, w = llm.spec, llm.runner.stages[0].weights
    full = next(layer for layer in spec.layers if layer.window is None)
    sliding = next(layer for layer in spec.layers if layer.window is not None)
    config = transformers.AutoConfig.for_model(
        "gemma4_text",
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=sliding.mlp.width,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=sliding.n_heads,
        num_key_value_heads=sliding.n_kv_heads,
        num_global_key_value_heads=full.n_kv_heads,
        head_dim=sliding.head_dim,
        global_head_dim=full.head_dim,
        sliding_window=sliding.window,
        max_position_embeddings=spec.max_context,
        attention_k_eq_v=True,
        layer_types=["full_attention" if x.window is None else "sliding_attention" for x in spec.layers],
        final_logit_softcapping=spec.final_softcap,
        hidden_size_per_layer_input=0,
    )
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    names = {
        "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"], "lm_head.weight": w["embed"]}
    for i in range(len(spec.layers)):
        state |= {
            f"model.layers.{i}.{theirs}.weight": w[f"layers.{i}.{ours}"]
            for ours, theirs in names.items()
            if f"layers.{i}.{ours}" in w
        }
        state[f"model.layers.{i}.layer_scalar"] = w[f"layers.{i}.layer_scalar"]
    left = net.load_state_dict(state, strict=False)
    missing = [k for k in left.missing_keys if "v_proj" not in k and "rotary" not in k and "embed_scale" not in k]
    if missing or left.unexpected_keys:
        raise SystemExit(f"weights do not match: {missing} {left.unexpected_keys}")
    return net


class Headwise:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def start(self, ids: list[int]) -> int:
        self.llm.runner.reset()
        return int(self.llm.runner.logits(self.llm.runner.prefill(ids))[0].argmax())

    def next(self, token: int) -> int:
        return int(self.llm.runner.logits(self.llm.runner.step([token]))[0].argmax())


class Transformers:
    def __init__(self, net: Any) -> None:
        self.net = net

    def start(self, ids: list[int]) -> int:
        with torch.inference_mode():
            out = self.net(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def next(self, token: int) -> int:
        with torch.inference_mode():
            out = self.net(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return int(out.logits[0, -1].argmax())


class LlamaCpp:
    """The same GGUF through llama-cpp-python: Q8_0 weights as stored (a quarter of our bytes), its default f16 cache, its rings."""

    def __init__(self, path: str, context: int) -> None:
        import llama_cpp

        self.llm = llama_cpp.Llama(
            path, n_ctx=context, n_batch=512, n_threads=torch.get_num_threads(), flash_attn=True, swa_full=False, verbose=False
        )

    def start(self, ids: list[int]) -> int:
        self.llm.reset()
        self.llm.eval(ids)
        return int(self.llm.sample(temp=0.0))

    def next(self, token: int) -> int:
        self.llm.eval([token])
        return int(self.llm.sample(temp=0.0))


def run(engine: Any, ids: list[int], n: int) -> tuple[list[int], float, float]:
    begin = time.perf_counter()
    tokens = [engine.start(ids)]
    middle = time.perf_counter()
    for _ in range(n):
        tokens.append(engine.next(tokens[-1]))
    return tokens, middle - begin, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    llm = LLM(device="cpu", context=args.prompt + args.tokens + 8)
    ids = llm.tokenize(demo_prompt())[: args.prompt]
    engines: dict[str, Callable[[], Any] | Any] = {"headwise": Headwise(llm), "transformers": Transformers(gemma_from(llm))}
    try:
        engines["llama.cpp"] = LlamaCpp(
            str(resources.files("headwise").joinpath("data/tiny-hybrid.gguf")), args.prompt + args.tokens + 8
        )
    except ImportError:
        print("llama-cpp-python is not installed: left out")
    first = {name: run(engine, ids, args.tokens)[0] for name, engine in engines.items()}
    same = {name: sum(a == b for a, b in zip(first["headwise"], tokens, strict=True)) for name, tokens in first.items()}
    print(f"greedy tokens equal to headwise's, of {args.tokens + 1}: {same}")
    if same["transformers"] != args.tokens + 1:
        raise SystemExit("refusing to time: headwise and transformers disagree")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            _, prefill, decode = run(engine, ids, args.tokens)
            times[name].append((args.prompt / prefill, args.tokens / decode))
    table = {
        name: {what: {"median": statistics.median(v), "min": min(v), "max": max(v)} for what, v in (
            ("prefill_tok_s", [t[0] for t in rows]), ("decode_tok_s", [t[1] for t in rows]))}
        for name, rows in times.items()
    }  # fmt: skip
    ratios = {
        f"decode headwise/{name}": statistics.median(a[1] / b[1] for a, b in zip(times["headwise"], rows, strict=True))
        for name, rows in times.items()
        if name != "headwise"
    }
    commit = about.commit()
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "prompt_tokens": args.prompt, "decode_tokens": args.tokens,
        "rounds": args.rounds, "engines": table, "ratios": ratios, "tokens_equal": same,
    }  # fmt: skip
    print(json.dumps(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory():
        main()
