"""The most tokens per second that a card's bandwidth and matrix rate allow, before anything runs.

Decode at batch 1 reads every active weight and the visible cache once per token; prefill computes two operations per
active weight and token, and attention over what each token sees. No engine can pass these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headwise.hardware.gpus import Gpu
from headwise.planner.memory import DEFAULT_CHUNK, Plan
from headwise.planner.residence import weight_bytes
from headwise.spec.kv import kv_read_bytes
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, layer_of, weight_tensors

STEPS = (2048, 1024, DEFAULT_CHUNK)  # of 512 a third goes into expanding Q4_K (one H200, docs/planning.md)
STEP_S = 0.5  # of the card's matrix rate: a second of its time, or a little more
LONG_STEP, LAUNCH_S = 4096, 0.05  # in which the card is done before the host has launched the next step of half the tokens


@dataclass(frozen=True, slots=True)
class Ceiling:
    decode_tok_s: float
    prefill_tok_s: float | None  # None: no matrix rate is known for this card


def active_share(spec: ModelSpec, tensor: TensorSpec) -> float:
    """The part of a tensor that one token uses: a row of a table, the chosen experts of a stack, all of a matrix."""
    if tensor.role == "table":
        return 1.0 if tensor.name == "embed" and spec.tied else 1 / tensor.shape[0]
    if tensor.role == "experts":
        moe = spec.layers[layer_of(tensor.name)].mlp.moe
        return moe.n_active / moe.n_experts if moe else 1.0
    return 1.0


def decode_bytes(plan: Plan, position: int) -> float:
    """What the token at `position` reads: every active weight, and the cached keys and values it sees."""
    sizes = weight_bytes(plan.spec, plan.resident)
    weights = sum(sizes[t.name] * active_share(plan.spec, t) for t in weight_tensors(plan.spec))
    return weights + sum(kv_read_bytes(x, position=position, fmt=plan.workload.kv[x.kind]) for x in plan.spec.layers)


def weight_flops(spec: ModelSpec) -> float:
    """Operations of one token's products with weights."""
    return sum(2 * t.n_elements * active_share(spec, t) for t in weight_tensors(spec) if t.role in ("matrix", "experts"))


def step_sizes(spec: ModelSpec, gpus: Sequence[Gpu | None]) -> tuple[int, ...]:
    """Tokens of a prefill step to choose from where nobody says how many, the most first.

    A step expands every quantised matrix once, so short steps do little else: more tokens are better up to `STEP_S`, in which
    nobody hears of progress and nobody else is answered. Where few weights are active the host takes longer to launch a step than
    the card to run it, so that twice the tokens cost no time. Of a card that is not known, and of the CPU, `DEFAULT_CHUNK`.
    """
    rates = [0.0 if gpu is None else 1e12 * (_rate(gpu) or 0.0) for gpu in gpus]
    in_a_second = min(rates, default=0.0) / weight_flops(spec)
    long = (LONG_STEP,) if in_a_second * LAUNCH_S >= LONG_STEP else ()
    return (*long, *(n for n in STEPS if n <= max(in_a_second * STEP_S, DEFAULT_CHUNK)))


def _rate(gpu: Gpu) -> float | None:
    return gpu.tflops.bf16 or gpu.tflops.f16 or gpu.tflops.f32


def ceiling(plan: Plan, gpu: Gpu) -> Ceiling:
    """For one sequence whose cache holds `context` tokens."""
    spec, w = plan.spec, plan.workload
    rate = _rate(gpu)
    prefill = None
    if rate:
        flops = weight_flops(spec)
        for layer in spec.layers:
            seen = w.context / 2 if layer.window is None else min(layer.window, w.context / 2)
            flops += 4 * seen * layer.n_heads * layer.head_dim
        prefill = rate * 1e12 / flops
    return Ceiling(gpu.bandwidth_gb_s * 1e9 / decode_bytes(plan, w.context - 1), prefill)
