"""Which type each weight has under a named scheme, by llama.cpp's own rules, so that a plan needs no file.

Source: llama.cpp 0c1e57098 src/llama-quant.cpp `llama_tensor_get_type` and its callers: which tensors are left alone (norms,
biases, routers, per_layer_model_proj), the output at Q6_K, the extra bits for V and the down projections, and the
fall-back where a row is no whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from headwise.errors import UsageError
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, weight_tensors

_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q2_k": "iq4_nl", "q3_k": "iq4_nl"}
_LEFT_ALONE = ("ple.proj",)  # kept at 16 bits by every scheme
_BLOCK = {"q4_0": 32, "q8_0": 32, "q5_0": 32, "q5_1": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256}


def weight_types(spec: ModelSpec, scheme: str) -> dict[str, str]:
    """Our tensor name -> type name under `scheme`.

    Raises:
        UsageError: an unknown scheme.
    """
    key = scheme.lower()
    if key not in SCHEMES:
        raise UsageError(f"unknown weight type {scheme!r}", why="no rule for it here", do=f"one of: {', '.join(SCHEMES)}")
    rule = SCHEMES[key]
    types = {}
    for tensor in weight_tensors(spec):
        if tensor.role == "vector":
            types[tensor.name] = "f32"
        elif tensor.name in _LEFT_ALONE:
            types[tensor.name] = key if key in ("f32", "f16") else "bf16"
        else:
            types[tensor.name] = _whole_blocks(rule(spec, tensor), tensor)
    return types


def _whole_blocks(kind: str, tensor: TensorSpec) -> str:
    """A row that K-quants cannot pack takes the nearest type with blocks of 32; one that even those cannot, f16."""
    columns = tensor.shape[-1]
    if columns % _BLOCK.get(kind, 1):
        kind = _FALLBACK.get(kind, kind)
    return "f16" if columns % _BLOCK.get(kind, 1) else kind


def _part(tensor: TensorSpec) -> str:
    return tensor.name.rsplit(".", 1)[-1] if tensor.name.startswith("layers.") else tensor.name


def _layer(tensor: TensorSpec) -> int:
    return int(tensor.name.split(".")[1])


def _more_bits(i: int, n: int) -> bool:
    """The layers at both ends and every third between, where an error costs most."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _is_output(spec: ModelSpec, tensor: TensorSpec) -> bool:
    """The output projection; with tied embeddings both tables count as one."""
    return tensor.name == "head" or (spec.tied and tensor.role == "table")


def _k_quant(base: str, more: str | None) -> Callable[[ModelSpec, TensorSpec], str]:
    def rule(spec: ModelSpec, tensor: TensorSpec) -> str:
        part = _part(tensor)
        if _is_output(spec, tensor):
            return "q6_k"
        if part == "v" and more:
            have_v = [layer.index for layer in spec.layers if not layer.k_eq_v]  # files carry dead ones of sharing layers
            return more if _more_bits(have_v.index(_layer(tensor)), len(have_v)) else base
        if part in ("down", "experts_down") and more:
            return more if _more_bits(_layer(tensor), len(spec.layers)) else base
        return base

    return rule


def _uniform(kind: str, output: str | None = None) -> Callable[[ModelSpec, TensorSpec], str]:
    def rule(spec: ModelSpec, tensor: TensorSpec) -> str:
        return output if output and _is_output(spec, tensor) else kind

    return rule


def _mxfp4(spec: ModelSpec, tensor: TensorSpec) -> str:
    """gpt-oss as published: experts in MXFP4, the rest in bf16."""
    return "mxfp4" if tensor.role == "experts" else "bf16"


SCHEMES: Mapping[str, Callable[[ModelSpec, TensorSpec], str]] = {
    "f32": _uniform("f32"),
    "bf16": _uniform("bf16"),
    "f16": _uniform("f16"),
    "q8_0": _uniform("q8_0"),
    "q6_k": _uniform("q6_k"),
    "q5_k_m": _k_quant("q5_k", "q6_k"),
    "q4_k_m": _k_quant("q4_k", "q6_k"),
    "q4_k_s": _k_quant("q4_k", None),
    "q4_0": _uniform("q4_0", output="q6_k"),
    "mxfp4": _mxfp4,
}
