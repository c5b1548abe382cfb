"""vLLM on the shapes of `benchmarks/engine.py`, in bf16: python benchmarks/vllm_engine.py OUT.json gemma-4-31b

Where vLLM 0.26.0 is installed; dense and MoE Gemma 4, one model a process, rows added to what OUT.json has. Each row twice, by one
engine: `bf16 dummy` has the weights that `--load-format dummy` draws, every float of the model within 1e-3 of 0, norms and each
layer's `layer_scalar` too; so the stream is zero from Gemma 4 31B's fourteenth layer on, products of zeros take less power, and the
card clocks higher. `bf16` has the same engine's parameters drawn again in place, as `headwise.bench.engine.random_weights` draws.

Prefill is the wall time of `generate` for one token, decode what 64 more take, each behind its prompt; 16 streams have prompts of
512 tokens. Tokens are random and new each time, nothing is shared. Beside each rate the medians of power and clock on the way.

Source    vLLM 0.26.0 model_loader/dummy_loader.py, weight_utils.py initialize_dummy_weights, models/gemma4.py (layer_scalar).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import about
import pynvml

from headwise.spec import catalogue

PREFILL, DECODE, ANSWER = (4096, 31744), (16, 31744), 64
STREAMS, STREAM_PROMPT = 16, 512
ROUNDS, CONTEXT = 3, 33024
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0", "VLLM_HOST_IP": "127.0.0.1",
}  # fmt: skip


class Watch(threading.Thread):
    """Watts and MHz of the first card, sampled until asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        pynvml.nvmlInit()
        self.card, self.found, self.ended = pynvml.nvmlDeviceGetHandleByIndex(0), list[tuple[float, int]](), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            clock = pynvml.nvmlDeviceGetClockInfo(self.card, pynvml.NVML_CLOCK_SM)
            self.found.append((pynvml.nvmlDeviceGetPowerUsage(self.card) / 1e3, clock))

    def end(self) -> dict[str, float]:
        self.ended.set()
        self.join()
        return {key: statistics.median(v) for key, v in zip(("watts", "mhz"), zip(*self.found, strict=True), strict=False)}


def config_of(name: str) -> dict[str, Any]:
    """A catalogue model's config.json for vLLM, which does not read transformers 5.17's form of the head sizes of each layer."""
    return catalogue.config(name) | {"architectures": ["Gemma4ForCausalLM"], "dtype": "bfloat16", "per_layer_config": {}}


def redraw(model: Any) -> int:
    """Parameters as those of a network: the stream keeps its size, scores and routes have a deviation of 2.

    vLLM runs this where the model is, so that it names nothing outside itself.

    Returns:
        How many tensors were drawn.
    """
    import torch

    drawn = 0
    with torch.no_grad():
        for name, t in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
            if not t.is_floating_point() or "rotary_emb" in name or name.endswith(("normalizer", "root_size")):
                continue
            if name.endswith(("layer_scalar", "router.scale", "per_expert_scale", "_scale")):
                t.fill_(1.0)
            elif name.endswith("q_norm.weight"):  # keys are normed, and scores not scaled
                t.normal_(1.0, 0.02).mul_(2.0 * t.numel() ** -0.5)
            elif t.dim() == 1:
                t.normal_(1.0, 0.02)
            elif "router.proj" in name:  # what it sees is normed, and divided by the root of its length
                t.normal_(0.0, 2.0)
            else:
                for matrix in t if t.dim() == 3 else (t,):
                    matrix.normal_(0.0, t.shape[-1] ** -0.5)
            drawn += 1
        for attn in (layer.self_attn for layer in model.model.layers):
            if attn.use_k_eq_v:  # a checkpoint's global layers hold K's weights as V's too
                w, n = attn.qkv_proj.weight, attn.q_size
                w[n + attn.kv_size :].copy_(w[n : n + attn.kv_size])
    return drawn


def rows(llm: Any, vocabulary: int, model: str, weights: str) -> list[dict[str, Any]]:
    from vllm import SamplingParams  # type: ignore[import-not-found]

    def seconds(streams: int, prompt: int, answer: int) -> tuple[float, dict[str, float]]:
        took, watch = [], None
        for i in range(ROUNDS + 1):
            if i == 1:  # the first one is not measured
                watch = Watch()
            prompts = [{"prompt_token_ids": random.choices(range(10, vocabulary), k=prompt)} for _ in range(streams)]
            sampled = SamplingParams(max_tokens=answer, ignore_eos=True, detokenize=False, temperature=0.0)
            start = time.perf_counter()
            llm.generate(prompts, sampled, use_tqdm=False)
            took.append(time.perf_counter() - start)
        assert watch is not None
        return statistics.median(took[1:]), watch.end()

    out = []
    for streams, tokens in (*((1, n) for n in sorted({*PREFILL, *DECODE})), (STREAMS, STREAM_PROMPT)):
        (one, prefilling), (more, decoding) = (seconds(streams, tokens, answer) for answer in (1, 1 + ANSWER))
        row = {
            "model": model, "who": "vLLM", "weights": weights, "kv": "bf16", "tokens": tokens, "streams": streams,
            "prefill_tok_s": streams * tokens / one, "decode_tok_s": streams * ANSWER / (more - one), "prefilling": prefilling,
            "decoding": decoding,
        }  # fmt: skip
        print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        out.append(row)
    return out


def main(out: Path, name: str) -> None:
    os.environ |= SETTINGS
    config = config_of(name)
    own = {key: config[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    from vllm import LLM, __version__  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        start = time.perf_counter()
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=CONTEXT,
            max_num_seqs=64, enable_prefix_caching=False, hf_overrides=own, generation_config="vllm", seed=0,
            **json.loads(os.environ.get("VLLM_ARGUMENTS", "{}")),
        )  # fmt: skip
        ready = time.perf_counter() - start
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": [], "ready_s": {}}
    result |= about.card() | {
        "vllm": __version__, "step_tokens": llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens,
    }  # fmt: skip
    result["ready_s"][name] = ready
    print(f"{name}: ready in {ready:.0f} s", flush=True)
    for weights in ("bf16 dummy", "bf16"):
        if weights == "bf16":
            print(f"{llm.apply_model(redraw)} tensors drawn", flush=True)
        result["rows"] += rows(llm, config["vocab_size"], name, weights)
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
