"""How fast whole tokens are on this card: a model's true shape with random weights, made on the card, nothing downloaded.

First the answer: the model's first layers, full width, against the same weights through PyTorch's fused attention and plain
operators in fp32. Then prefill and decode at each length, medians of several runs, each beside what the card's measured
bandwidth and products allow. Decode is greedy, one token at a time, launched ahead as `headwise run` does it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headwise.attention.capability import DeviceKind
from headwise.attention.choose import Choice, choose_layers
from headwise.bench.attention import ceilings
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.devices import Seat, card_of, device_kind
from headwise.engine.request import Sampling
from headwise.engine.runner import Runner
from headwise.engine.sample import Arriving, Draw
from headwise.engine.stage import build_stages
from headwise.errors import UsageError
from headwise.planner.ceiling import decode_bytes, weight_flops
from headwise.planner.memory import Plan, Workload, plan
from headwise.planner.quantise import weight_types
from headwise.planner.residence import groups, planed
from headwise.spec.kv import KVFormat, kv_format
from headwise.spec.layers import Kind, ModelSpec
from headwise.spec.tensors import TensorSpec, layer_of, weight_tensors
from headwise.weights.blocks import Fp8Tensor, Weight, dequantise, expand_fp8, row_bytes, to_fp8
from headwise.weights.load import RETILED_VALUES, allocate

LAYERS_CHECKED, TOKENS_CHECKED, DECODED_CHECKED = 6, 1300, 8  # a whole pattern of Gemma 4; past its window
# Of the hidden states, against fp32. PyTorch's own operators in bf16 are 0.02 to 0.04 away from it over six layers of this shape, a
# quarter as wide; 0.04 to 0.09 with Gemma's experts; 0.12 to 0.17 where rows of prompts are rounded to e4m3 before each product.
ERROR, ERROR_EXPERTS, ERROR_FP8 = 6e-2, 0.12, 0.25
DECODED = 48
SCORES = 2.0  # with 16 to 22, as Gemma's scale of 1 would have it, the largest score takes all and rounding decides which it is
ROUTES = 3.0  # deviation of an expert's score: of two that are nearly tied for the last place neither has much weight


# Where the f16 scales of a file's block lie; mxfp4's is an exponent in its first byte.
SCALES = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q8_0": (0,), "q5_0": (0,), "q4_0": (0,), "mxfp4": ()}
STEPS = {  # rms of random integers times theirs
    "q4_k": 258.0, "q5_k": 527.0, "q6_k": 1368.0, "q8_0": 74.0, "q5_0": 9.0, "q4_0": 4.6, "mxfp4": 2.93,
}  # fmt: skip
# Of the minima, in scales: weights have no mean then. With one, all rows of a product share a large part: attention sees one key
# like another, and one token in 70 is off by a tenth in bf16, whatever multiplies it.
MINIMA = {"q4_k": 7.5, "q5_k": 15.5}


def random_blocks(type_name: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """Blocks of a file with random integers, scaled to matrices that keep the stream's size; (rows, bytes)."""
    data = torch.randint(0, 256, (rows, row_bytes(type_name, columns)), dtype=torch.uint8, device=device)
    blocks = data.unflatten(-1, (-1, row_bytes(type_name, 256 if type_name.endswith("_k") else 32)))
    step = columns**-0.5 / STEPS[type_name]
    if type_name == "mxfp4":
        blocks[..., 0] = round(math.log2(step)) + 127
    for at, times in zip(SCALES[type_name], (1.0, MINIMA.get(type_name, 1.0)), strict=False):
        blocks[..., at : at + 2] = torch.tensor([step * times], dtype=torch.float16, device=device).view(torch.uint8)
    return data


def blocks_of(t: TensorSpec, type_name: str, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """A quantised matrix, or a stack of them, as `random_weights` has it, a few rows at a time: which matrix, first row, blocks."""
    torch.manual_seed(zlib.crc32(t.name.encode()))
    *lead, rows, columns = t.shape
    step = max(8, RETILED_VALUES // columns // 8 * 8)
    for i in range(*lead or (1,)):
        for start in range(0, rows, step):
            yield i, start, random_blocks(type_name, min(start + step, rows) - start, columns, device)


def _router(spec: ModelSpec, name: str, hidden: int) -> float:
    """Deviation of a router's weights, which see rows of size 1; Gemma's divides them by the root of their length before."""
    moe = spec.layers[layer_of(name)].mlp.moe
    return ROUTES if moe is not None and moe.beside_dense else ROUTES * hidden**-0.5


def _size(spec: ModelSpec, name: str) -> float:
    """Of a norm's weight: 1, and for queries what gives scores of keys that point anywhere a deviation of SCORES."""
    if not name.endswith(".q_norm"):
        return 1.0
    layer = spec.layers[layer_of(name)]
    return SCORES / (layer.scale * layer.head_dim**0.5)


def random_weights(
    spec: ModelSpec, p: Plan, device: torch.device, *, stage: int = 0, floats: bool = False
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Weights of a stage as the plan keeps them: normal matrices and random blocks scaled so that the stream begins and stays of
    size 1, norms near 1; the same numbers however the layers are shared out.

    Returns:
        The weights; and with `floats` each as fp32, of blocks what PyTorch makes of them.
    """
    tensors = weight_tensors(spec, p.stages[stage].layers)
    planes = planed(spec, p.resident) if p.workload.fused else frozenset()
    weights = allocate({t.name: t for t in tensors}, p.resident, groups(spec, p.resident), device, planes)
    wide: dict[str, Tensor] = {}
    for t in tensors:
        torch.manual_seed(zlib.crc32(t.name.encode()))
        w = weights[t.name]
        if isinstance(w, Tensor):
            if t.name.endswith(".router"):
                w.normal_(0.0, _router(spec, t.name, t.shape[-1]))
            elif t.role == "vector":
                w.normal_(0.0, 0.02).add_(1.0).mul_(_size(spec, t.name))
            else:
                w.normal_(0.0, 1.0 / spec.embed_scale if t.name == "embed" else t.shape[-1] ** -0.5)
            if floats:
                wide[t.name] = w.float()
            continue
        if isinstance(w, Fp8Tensor):
            rows, columns = t.shape[-2:]
            step = max(1, RETILED_VALUES // columns)
            for matrix in (w[i] for i in range(t.shape[0])) if t.role == "experts" else (w,):
                for start in range(0, rows, step):
                    part = matrix.part(start, min(start + step, rows))
                    data, scales = to_fp8(torch.randn(part.shape, device=device) * columns**-0.5)
                    part.data.copy_(data)
                    part.scales.copy_(scales.expand_as(part.scales))
            if floats:
                wide[t.name] = expand_fp8(w.data, w.scales)
            continue
        if t.name not in planes or p.resident[t.name] not in SCALES:
            raise UsageError(
                f"{t.name} of {spec.name} is kept as {p.resident[t.name]} blocks",
                why="those are not made here",
                do="--weights bf16",
            )
        from headwise.weights.retile import retile

        parts = []
        for i, start, blocks in blocks_of(t, p.resident[t.name], device):
            matrix = w.matrix(i) if t.role == "experts" else w  # type: ignore[union-attr]
            retile(blocks, p.resident[t.name], matrix.part(start, start + len(blocks)))  # type: ignore[union-attr]
            if floats:
                parts.append(dequantise(blocks, p.resident[t.name], torch.float32))
        if floats:
            wide[t.name] = torch.cat(parts).view(t.shape)
    return weights, wide


def in_bf16(spec: ModelSpec, scheme: str, device: torch.device) -> dict[str, Any]:
    """Of `plan_for` and `runner_for`: weights of a scheme (`planner.quantise`), activations and the whole cache in bf16."""
    fmt = kv_format("bf16")
    return {
        "kv": {"global": fmt, "sliding": fmt}, "dtype": "bf16", "stored": weight_types(spec, scheme), "kind": device_kind(device),
    }  # fmt: skip


def plan_for(
    spec: ModelSpec, *, context: int, chunk: int, kv: Mapping[Kind, KVFormat], dtype: str, stored: Mapping[str, str],
    kind: DeviceKind, seats: Sequence[Seat], slots: int = 1,
) -> tuple[tuple[Choice, ...], Plan, list[torch.device]]:  # fmt: skip
    """What is chosen and planned on `seats`, and the devices that get layers; nothing is loaded."""
    choices = choose_layers(spec, kv=dict(kv), dtype=dtype, device=kind)
    reads = frozenset(c.backend.reads for c in choices)
    work = Workload(context=context, slots=slots, chunk=chunk, kv=dict(kv), dtype=dtype, reads=reads)
    cards = [card_of(seat) for seat in seats]
    p = plan(spec, stored, work, [c.target for c in cards])
    if not p.fits:
        raise UsageError(f"{spec.name} with {context} tokens does not fit", why=f"{p.total_bytes:,} bytes", do="fewer --lengths")
    return choices, p, [c.seat.device for c in cards if any(c.target is t for t in p.targets)]


def runner_for(
    spec: ModelSpec, *, context: int, chunk: int, kv: Mapping[Kind, KVFormat], dtype: str, stored: Mapping[str, str],
    kind: DeviceKind, device: torch.device, weights: Mapping[str, Weight] | None = None,
    seats: Sequence[Seat] = (), slots: int = 1,
) -> tuple[Runner, tuple[Choice, ...], Plan]:  # fmt: skip
    """A runner over random weights, or over `weights`, with what was chosen and planned; on `seats`, default on `device`."""
    choices, p, used = plan_for(spec, context=context, chunk=chunk, kv=kv, dtype=dtype, stored=stored, kind=kind,
                                seats=seats or [Seat(device)], slots=slots)  # fmt: skip

    def load(stage: int, device: torch.device) -> Mapping[str, Weight]:
        return random_weights(spec, p, device, stage=stage)[0] if weights is None else weights

    return Runner(p, build_stages(p, choices, used, load)), choices, p


def first_layers(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=tuple(x for x in spec.layers if x.index < LAYERS_CHECKED), ple=None)


def check(spec: ModelSpec, scheme: str, kv: Mapping[Kind, KVFormat], kind: DeviceKind, device: torch.device) -> list[float]:
    """Relative errors of the hidden states of a prompt's last token and of a few decoded ones."""
    small = first_layers(spec)
    stored = weight_types(small, scheme)
    ids = torch.randint(3, spec.vocab_size, (TOKENS_CHECKED + DECODED_CHECKED,)).tolist()
    context = TOKENS_CHECKED + DECODED_CHECKED
    plain = replace(kind, triton=None)  # PyTorch's fused operators, which are proven elsewhere
    floats: dict[Kind, KVFormat] = {"global": kv_format("f32"), "sliding": kv_format("f32")}
    common: dict[str, Any] = {"context": context, "chunk": 512, "device": device}
    ours, _, p = runner_for(small, kv=kv, dtype="bf16", stored=stored, kind=kind, **common)
    _, wide = random_weights(small, p, device, floats=True)  # the same seed: the same numbers
    theirs, *_ = runner_for(small, kv=floats, dtype="f32", stored=dict.fromkeys(stored, "f32"), kind=plain, weights=wide, **common)
    errors = []
    for chunk in (ids[:TOKENS_CHECKED], *([token] for token in ids[TOKENS_CHECKED:])):
        got, want = (r.prefill(chunk).double().cpu() for r in (ours, theirs))
        errors.append(float((got - want).norm() / want.norm()))
    return errors


def bound(spec: ModelSpec, weights: str) -> float:
    """The relative error that a check allows."""
    if weights == "fp8":
        return ERROR_FP8
    return ERROR_EXPERTS if any(x.mlp.moe for x in spec.layers) else ERROR


def step_ahead(runner: Runner, places: Sequence[Place], drawn: Tensor, at: int) -> Tensor:
    """A decode step as `engine.engine` has it, launched before the host has the tokens `drawn` of the one before.

    Args:
        at: the position of these tokens, in every sequence.
    Returns:
        The likeliest next token of each, on the device; the host has those before.
    """
    arriving = Arriving(drawn)
    _, drawn = runner.draw(runner.run([Run(place, at, [0]) for place in places], drawn), [Draw(Sampling())] * len(places))
    arriving.wait()
    return drawn


@contextmanager
def unrecorded(runner: Runner) -> Iterator[None]:
    """Chunks of prompts as they are, neither filled up nor replayed."""
    kept = [stage.chunks for stage in runner.stages]
    for stage in runner.stages:
        stage.chunks = None
    try:
        yield
    finally:
        for stage, chunks in zip(runner.stages, kept, strict=True):
            stage.chunks = chunks


def measure(runner: Runner, ids: Sequence[int], rounds: int) -> tuple[float, float]:
    """Prefill seconds of `ids` and seconds of a decoded token after them, medians."""
    prefill: list[float] = []
    token = 0
    for i in range(rounds + 1):
        runner.reset()
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = int(runner.logits(runner.prefill(ids))[0].argmax())
        if i:  # the first one compiles
            prefill.append(time.perf_counter() - start)
    decode: list[float] = []
    with runner.on_stream():
        drawn, at = torch.tensor([token], device="cuda"), time.perf_counter()
        for i in range(DECODED):
            drawn = step_ahead(runner, [Place()], drawn, len(ids) + i)
            start, at = at, time.perf_counter()
            if i >= 8:  # the first ones compile and record
                decode.append(at - start)
    return statistics.median(prefill), statistics.median(decode)


def allowed(p: Plan, length: int, ceiling: tuple[float, float]) -> tuple[float, float]:
    """Seconds of a prefill and of a decoded token that the measured products and bandwidth allow."""
    flops = length * weight_flops(p.spec)
    for x in p.spec.layers:
        w = min(x.window or length, length)
        flops += 4.0 * x.n_heads * x.head_dim * (w * (w + 1) / 2 + (length - w) * w)
    return flops / (ceiling[0] * 1e12), decode_bytes(p, length) / (ceiling[1] * 1e12)


def bench(
    models: Sequence[str], *, lengths: Sequence[int], weights: str = "bf16", kv: str = "bf16", ubatch: int = 2048,
    rounds: int = 3, as_json: bool, say: Callable[[str], None], specs: Mapping[str, ModelSpec] | None = None,
    redraw: Callable[[Mapping[str, Weight]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The table, row by row as it is measured.

    Args:
        redraw: gives the weights other numbers, after the check and before anything is timed.
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
        errors = check(spec, weights, formats, kind, device)
        # Where two experts are nearly tied rounding decides between them, and that token differs; a fault would be in every token.
        error = statistics.median(errors) if any(x.mlp.moe for x in spec.layers) else max(errors)
        if not error < bound(spec, weights):
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} of the hidden states; nothing is timed")
        torch.cuda.empty_cache()
        stored = weight_types(spec, weights)
        runner, choices, p = runner_for(spec, context=max(lengths) + DECODED + 8, chunk=ubatch, kv=formats, dtype="bf16",
                                        stored=stored, kind=kind, device=device)  # fmt: skip
        if redraw is not None:
            for stage in runner.stages:
                redraw(stage.weights)
        for length in lengths:
            ids = torch.randint(3, spec.vocab_size, (length,)).tolist()
            prefill_s, decode_s = measure(runner, ids, rounds)
            best = allowed(p, length, ceiling)
            row = {
                "model": name, "who": "headwise", "weights": weights, "kv": kv, "tokens": length,
                "prefill_tok_s": length / prefill_s, "decode_tok_s": 1 / decode_s,
                "prefill_of_card": best[0] / prefill_s, "decode_of_card": best[1] / decode_s,
                "error": error, "errors": errors, "backends": sorted({c.names for c in choices}),
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
        f"{row['model']:<16}{row['who']:<13}{row['weights']:<7}{row['tokens']:>7} tokens  "
        f"prefill {row['prefill_tok_s']:>8,.0f} tok/s  "
        f"decode {row['decode_tok_s']:>6.1f} tok/s{of}"
    )
