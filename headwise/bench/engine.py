"""How fast whole tokens are on this card: a model's true shape with random weights, made on the card, nothing downloaded.

First the answer: the model's first layers, full width, against the same weights through PyTorch's fused attention and plain
operators in fp32. Then prefill and decode at each length, medians of several runs, each beside what the card's measured
bandwidth and products allow. Decode is greedy, one token at a time through the host, as `headwise run` does it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headwise.attention.capability import DeviceKind
from headwise.attention.choose import Choice, choose_layers
from headwise.bench.attention import ceilings
from headwise.engine.llm import device_kind
from headwise.engine.replay import own_stream
from headwise.engine.runner import Runner
from headwise.errors import UsageError
from headwise.planner.ceiling import active_share
from headwise.planner.memory import Plan, Target, Workload, plan
from headwise.planner.quantise import weight_types
from headwise.planner.residence import groups
from headwise.spec.kv import KVFormat, kv_format, kv_read_bytes
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import Weight
from headwise.weights.load import allocate

LAYERS_CHECKED, TOKENS_CHECKED = 6, 1300  # a whole pattern of Gemma 4; past its window
ERROR = 3e-2  # of the hidden states, bf16 against fp32
DECODED = 48


def random_weights(spec: ModelSpec, p: Plan, device: torch.device) -> dict[str, Weight]:
    """Normal matrices scaled so that the stream keeps its size, norms near 1; blocks with plausible scales."""
    torch.manual_seed(0)
    weights = allocate({t.name: t for t in weight_tensors(spec)}, p.resident, groups(spec, p.resident), device)
    for t in weight_tensors(spec):
        w = weights[t.name]
        if not isinstance(w, Tensor):
            raise UsageError(f"{w.type} weights are not made here", why="random blocks are no numbers", do="--weights bf16")
        if t.role == "vector":
            w.normal_(0.0, 0.02).add_(1.0)
        else:
            w.normal_(0.0, 1.0 if t.name == "embed" else t.shape[-1] ** -0.5)
    return weights


def runner_for(
    spec: ModelSpec, *, context: int, chunk: int, kv: Mapping[Kind, KVFormat], dtype: str, stored: Mapping[str, str],
    kind: DeviceKind, device: torch.device, weights: Mapping[str, Weight] | None = None,
) -> tuple[Runner, tuple[Choice, ...], Plan]:  # fmt: skip
    """A runner over random weights, or over `weights`, with what was chosen and planned."""
    choices = choose_layers(spec, kv=dict(kv), dtype=dtype, device=kind)
    work = Workload(context=context, chunk=chunk, kv=dict(kv), dtype=dtype, reads=frozenset(c.backend.reads for c in choices))
    free, total = torch.cuda.mem_get_info(device)
    p = plan(spec, stored, work, [Target(name=kind.label, gpu=None, total_bytes=total, others_bytes=total - free)])
    if not p.fits:
        raise UsageError(f"{spec.name} with {context} tokens does not fit", why=f"{p.total_bytes:,} bytes", do="fewer --lengths")
    stream = torch.cuda.Stream(device)
    with own_stream(stream):
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        torch.mm(x, x)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = random_weights(spec, p, device) if weights is None else weights
    return Runner(p, choices, made, device, before_bytes=before, stream=stream), choices, p


def first_layers(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(x for x in spec.layers if x.index < LAYERS_CHECKED), ple=None)


def check(spec: ModelSpec, kv: Mapping[Kind, KVFormat], kind: DeviceKind, device: torch.device) -> float:
    """Largest relative error of the hidden states of a prompt's last tokens and of one decoded token."""
    small = first_layers(spec)
    stored = weight_types(small, "bf16")
    ids = torch.randint(3, spec.vocab_size, (TOKENS_CHECKED + 1,)).tolist()
    context = TOKENS_CHECKED + 8
    ours, _, p = runner_for(small, context=context, chunk=512, kv=kv, dtype="bf16", stored=stored, kind=kind, device=device)
    plain = replace(kind, triton=None)  # PyTorch's fused operators, which are proven elsewhere
    floats: dict[Kind, KVFormat] = {"global": kv_format("f32"), "sliding": kv_format("f32")}
    wide = {name: w.float() for name, w in ours.weights.items() if isinstance(w, Tensor) and name not in groups(small, p.resident)}
    theirs, *_ = runner_for(small, context=context, chunk=512, kv=floats, dtype="f32",
                            stored=dict.fromkeys(stored, "f32"), kind=plain, device=device, weights=wide)  # fmt: skip
    worst = 0.0
    for chunk in (ids[:-1], ids[-1:]):
        got, want = (r.prefill(chunk).double().cpu() for r in (ours, theirs))
        worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


def measure(runner: Runner, ids: Sequence[int], rounds: int) -> tuple[float, float]:
    """Prefill seconds of `ids` and seconds of a decoded token after them, medians."""
    prefill: list[float] = []
    token = 0
    for _ in range(rounds):
        runner.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = int(runner.logits(runner.prefill(ids))[0].argmax())
        prefill.append(time.perf_counter() - start)
    decode: list[float] = []
    for i in range(DECODED):
        start = time.perf_counter()
        token = int(runner.logits(runner.step([token]))[0].argmax())
        if i >= 8:  # the first ones compile and record
            decode.append(time.perf_counter() - start)
    return statistics.median(prefill), statistics.median(decode)


def allowed(p: Plan, length: int, ceiling: tuple[float, float]) -> tuple[float, float]:
    """Seconds of a prefill and of a decoded token that the measured products and bandwidth allow."""
    spec = p.spec
    tensors = weight_tensors(spec)
    read = sum(2 * t.n_elements * active_share(spec, t) for t in tensors if t.role != "table" or spec.tied)
    read += sum(kv_read_bytes(x, position=length, fmt=p.workload.kv[x.kind]) for x in spec.layers)
    flops = length * sum(2.0 * t.n_elements * active_share(spec, t) for t in tensors if t.role in ("matrix", "experts"))
    for x in spec.layers:
        w = min(x.window or length, length)
        flops += 4.0 * x.n_heads * x.head_dim * (w * (w + 1) / 2 + (length - w) * w)
    return flops / (ceiling[0] * 1e12), read / (ceiling[1] * 1e12)


def bench(
    models: Sequence[str], *, lengths: Sequence[int], kv: str = "bf16", ubatch: int = 2048, rounds: int = 3, as_json: bool,
    say: Callable[[str], None], specs: Mapping[str, ModelSpec] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The table, row by row as it is measured.

    Raises:
        UsageError: no NVIDIA card is here, or a model does not fit it.
    """
    from headwise.spec import catalogue

    if not torch.cuda.is_available():
        raise UsageError("nothing to measure", why="PyTorch sees no NVIDIA card", do="run it on the machine with the card")
    device = torch.device("cuda")
    kind = device_kind(device)
    ceiling = ceilings(device)
    fmt = kv_format(kv)
    formats: dict[Kind, KVFormat] = {"global": fmt, "sliding": fmt}
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "matrix_tflops": ceiling[0], "read_tb_s": ceiling[1], "rows": [],
    }  # fmt: skip
    say(f"{result['gpu']}: bf16 products {ceiling[0]:.0f} TFLOP/s, reads {ceiling[1]:.2f} TB/s")
    for name in models:
        spec = (specs or {}).get(name) or catalogue.spec(name)
        error = check(spec, formats, kind, device)
        if not error < ERROR:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} of the hidden states; nothing is timed")
        torch.cuda.empty_cache()
        stored = weight_types(spec, "bf16")
        runner, choices, p = runner_for(spec, context=max(lengths) + DECODED + 8, chunk=ubatch, kv=formats, dtype="bf16",
                                        stored=stored, kind=kind, device=device)  # fmt: skip
        for length in lengths:
            ids = torch.randint(3, spec.vocab_size, (length,)).tolist()
            prefill_s, decode_s = measure(runner, ids, rounds)
            best = allowed(p, length, ceiling)
            row = {
                "model": name, "who": "headwise", "weights": "bf16", "kv": kv, "tokens": length,
                "prefill_tok_s": length / prefill_s, "decode_tok_s": 1 / decode_s,
                "prefill_of_card": best[0] / prefill_s, "decode_of_card": best[1] / decode_s,
                "error": error, "backends": sorted({c.backend.name for c in choices}),
                "planned_bytes": p.total_bytes, "allocated_bytes": runner.allocated_bytes, "peak_bytes": runner.peak_bytes,
            }  # fmt: skip
            result["rows"].append(row)
            say(line(row))
        del runner
        torch.cuda.empty_cache()
    if as_json:
        print(json.dumps(result))
    return result


def line(row: Mapping[str, Any]) -> str:
    of = "" if row.get("prefill_of_card") is None else f"  {row['prefill_of_card']:.0%} and {row['decode_of_card']:.0%} of the card"
    return (
        f"{row['model']:<16}{row['who']:<13}{row['tokens']:>7} tokens  prefill {row['prefill_tok_s']:>8,.0f} tok/s  "
        f"decode {row['decode_tok_s']:>6.1f} tok/s{of}"
    )
