"""Which type each weight has under a named scheme, by llama.cpp's own rules, so that a plan needs no file.

Types are those of a GGUF: norms, biases and routers stay f32 under every scheme. A file may still differ: a maker can
override tensors one by one (unsloth does), and with an importance matrix Q4_0 gives its first down projections more bits.
Source: llama.cpp 0c1e57098 src/llama-quant.cpp: `tensor_allows_quantization` (what is left alone),
`llama_tensor_get_type_impl` (the mixes), `tensor_type_fallback` (rows that are no whole blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headwise.errors import UsageError
from headwise.planner.residence import FLOAT_TYPES
from headwise.spec.ggml import by_name
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, layer_of, weight_tensors

_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # the nearest type with blocks of 32
MADE = "fp8"  # the scheme that a checkpoint of floats may get while it is loaded
_LEFT_ALONE = "ple.proj"  # per_layer_model_proj, small and shared by all layers: 16 bits in every quantised file


def _more_bits(i: int, n: int) -> bool:
    """The layers at both ends and every third between, where an error costs most."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first_eighth(i: int, n: int) -> bool:
    return i < n // 8


def _first_four(i: int, n: int) -> bool:
    return i < 4


@dataclass(frozen=True, slots=True)
class _Some:
    """The `where(i, n)` of n tensors of one kind, counted by i, take `type`."""

    type: str
    where: Callable[[int, int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A base type, and who gets another: the output projection, V, the down projections, the experts."""

    base: str
    output: str | None = None  # with tied embeddings: of both tables
    v: _Some | None = None
    down: _Some | None = None
    experts: str | None = None
    matrices: str | None = None  # of the layers, experts among them
    o_of_8_experts: str | None = None  # Mixtral's own rules


SCHEMES: Mapping[str, Scheme] = {
    "f32": Scheme(base="f32"),
    "bf16": Scheme(base="bf16"),
    "f16": Scheme(base="f16"),
    "q8_0": Scheme(base="q8_0"),
    "q6_k": Scheme(base="q6_k"),
    "q5_k_m": Scheme(base="q5_k", output="q6_k", v=_Some("q6_k", _more_bits), down=_Some("q6_k", _more_bits)),
    "q4_k_m": Scheme(
        base="q4_k",
        output="q6_k",
        v=_Some("q6_k", _more_bits),
        down=_Some("q6_k", _more_bits),
        o_of_8_experts="q5_k",
    ),
    "q4_k_s": Scheme(
        base="q4_k",
        output="q6_k",
        v=_Some("q5_k", _first_four),
        down=_Some("q5_k", _first_eighth),
        o_of_8_experts="q5_k",
    ),
    "q4_0": Scheme(base="q4_0", output="q6_k"),
    "mxfp4": Scheme(base="bf16", experts="mxfp4"),  # gpt-oss as published
    "fp8": Scheme(base="bf16", matrices="fp8"),  # what `made_at_load` makes of a checkpoint in bf16
}


def weight_types(spec: ModelSpec, scheme: str) -> dict[str, str]:
    """Our tensor name -> type name under `scheme`.

    Raises:
        UsageError: an unknown scheme, or MXFP4 experts of a model without experts.
    """
    key = scheme.lower()
    if key not in SCHEMES:
        raise UsageError(f"unknown weight type {scheme!r}", why="no rule for it here", do=f"one of: {', '.join(SCHEMES)}")
    rule = SCHEMES[key]
    if rule.experts and not any(layer.mlp.moe for layer in spec.layers):
        raise UsageError(
            f"{key} does not fit {spec.name}",
            why=f"it packs experts in {rule.experts}, and this model has none",
            do="--weights q4_k_m is the nearest in size",
        )
    v_layers = [layer.index for layer in spec.layers if not layer.k_eq_v]  # files carry dead ones of sharing layers too
    v_order = {layer: i for i, layer in enumerate(v_layers)}
    types = {}
    for tensor in weight_tensors(spec):
        if tensor.role == "vector":
            types[tensor.name] = "f32"
        elif tensor.name == _LEFT_ALONE:
            types[tensor.name] = key if key in ("f32", "f16") else "bf16"
        elif rule.matrices and in_layer(tensor):
            types[tensor.name] = rule.matrices
        else:
            types[tensor.name] = _whole_blocks(_type(spec, tensor, rule, v_order), tensor)
    return types


def made_at_load(spec: ModelSpec, stored: Mapping[str, str], weights: str | None) -> Mapping[str, str]:
    """The types of a checkpoint of `stored` ones after `--weights`; fp8: layers' matrices and experts stored as floats become e4m3.

    Raises:
        UsageError: weights that are not made at load.
    """
    if weights is None:
        return stored
    if weights.lower() != MADE:
        raise UsageError(
            f"--weights {weights} is not made at load",
            why=f"{MADE} is, of floats; other types come from files",
            do=f"--weights {MADE}",
        )
    made = {t.name for t in weight_tensors(spec) if in_layer(t)}
    return {name: MADE if name in made and kind in FLOAT_TYPES else kind for name, kind in stored.items()}


def in_layer(tensor: TensorSpec) -> bool:
    """A matrix of a layer, of attention or an MLP, or its experts; not the output projection, nor what all layers share."""
    return tensor.role in ("matrix", "experts") and tensor.name.startswith("layers.")


def _type(spec: ModelSpec, tensor: TensorSpec, rule: Scheme, v_order: Mapping[int, int]) -> str:
    if tensor.name == "head" or (spec.tied and tensor.role == "table"):
        return rule.output or rule.base
    if not tensor.name.startswith("layers."):
        return rule.base
    layer, part = layer_of(tensor.name), tensor.name.rsplit(".", 1)[-1]
    moe = spec.layers[layer].mlp.moe
    if by_name(rule.base).quantised and moe and moe.n_experts == 8:
        if part in ("k", "v"):
            return "q8_0"
        if part == "o" and rule.o_of_8_experts:
            return rule.o_of_8_experts
    if part == "v" and rule.v:
        kind = rule.v.type if rule.v.where(v_order[layer], len(v_order)) else rule.base
        return "q5_k" if kind == "q4_k" and _is_llama_70b(spec) else kind
    if part in ("down", "experts_down") and rule.down:
        return rule.down.type if rule.down.where(layer, len(spec.layers)) else rule.base
    if tensor.role == "experts" and rule.experts:
        return rule.experts
    return rule.base


def _is_llama_70b(spec: ModelSpec) -> bool:
    """Eight query heads share each V, which is small enough to keep at 5 bits or more."""
    return spec.family == "llama" and len(spec.layers) == 80 and spec.layers[0].group > 1


def _whole_blocks(kind: str, tensor: TensorSpec) -> str:
    """A row that K-quants cannot pack takes the nearest type with blocks of 32; one that even those cannot, f16."""
    columns = tensor.shape[-1]
    if columns % by_name(kind).block:
        kind = _FALLBACK.get(kind, kind)
    return "f16" if columns % by_name(kind).block else kind
