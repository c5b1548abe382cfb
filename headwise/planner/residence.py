"""The type each weight has in memory: a pure rule that the planner counts with and the loader follows.

Vectors (norms, biases, routers, scales) are fp32 everywhere. On a GPU a quantised weight stays as it is stored, re-tiled where
our kernels read it, and matrices and experts in e4m3 stay so too, while tables in e4m3 are expanded to the activations' type; on a
CPU, where PyTorch multiplies floats only, matrices are expanded once to that type, and tables that are only looked up stay
as stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from headwise.spec.ggml import by_name, n_bytes
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import TensorSpec, layer_of, weight_tensors

FLOAT_TYPES = frozenset({"f32", "f16", "bf16"})
KEPT_TYPES = frozenset({"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "mxfp4"})
# Types that our kernels multiply as they are, re-tiled once at load; `kernels.tiled` has a layout of each.
PLANE_TYPES = frozenset({"q4_k", "q5_k", "q6_k", "q8_0", "q5_0", "q4_0", "mxfp4"})
# e4m3 bytes with fp32 scales: one a row, or one for each 128 values of a row (where 128 rows share one on disk, each has a copy).
FP8_TYPES = frozenset({"fp8", "fp8_block"})
FP8_BLOCK = 128
ROWS_TOGETHER = 8  # of a re-tiled matrix
MAX_EXPERTS = 256  # that our router chooses from
GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "experts_gate_up": ("experts_gate", "experts_up")}


def resident_types(spec: ModelSpec, stored: Mapping[str, str], *, cpu: bool, dtype: str) -> dict[str, str]:
    """Our tensor name -> the type it is kept in.

    Args:
        stored: our tensor name -> the type on disk.
        dtype: of the activations: f32, f16 or bf16.
    """
    return {t.name: _resident(t, stored[t.name], spec, cpu, dtype) for t in weight_tensors(spec)}


def _resident(tensor: TensorSpec, stored: str, spec: ModelSpec, cpu: bool, dtype: str) -> str:
    if tensor.role == "vector":
        return "f32"
    only_looked_up = tensor.role == "table" and not (tensor.name == "embed" and spec.tied)
    if stored in FP8_TYPES and tensor.role in ("matrix", "experts") and not cpu:
        return stored
    if stored in KEPT_TYPES and (only_looked_up or not cpu):
        return stored
    return dtype


def weight_bytes(spec: ModelSpec, types: Mapping[str, str]) -> dict[str, int]:
    """Our tensor name -> its bytes in the given types."""
    return {t.name: _tensor_bytes(t, types[t.name]) for t in weight_tensors(spec)}


def _tensor_bytes(tensor: TensorSpec, kind: str) -> int:
    if kind not in FP8_TYPES:
        return n_bytes(by_name(kind), tensor.n_elements)
    columns = tensor.shape[-1]
    return tensor.n_elements + tensor.n_elements // columns * 4 * (1 if kind == "fp8" else -(-columns // FP8_BLOCK))


def groups(spec: ModelSpec, types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Matrices that share their input and type lie in one allocation, so that one product serves them."""
    out = {}
    for layer in spec.layers:
        for name, members in GROUPS.items():
            present = tuple(m for m in (f"layers.{layer.index}.{x}" for x in members) if m in types)
            if len(present) > 1 and len({types[m] for m in present}) == 1:
                out[f"layers.{layer.index}.{name}"] = present
    return out


def multiplied(spec: ModelSpec, resident: Mapping[str, str]) -> frozenset[int]:
    """Layers whose experts our kernels multiply: all floats, all in e4m3, or all of types with planes; at most 256 of them."""
    stacks: dict[int, list[TensorSpec]] = {}
    for t in weight_tensors(spec):
        if t.role == "experts" and t.shape[0] <= MAX_EXPERTS:
            stacks.setdefault(layer_of(t.name), []).append(t)
    return frozenset(
        i
        for i, of in stacks.items()
        if any(all(x(resident[t.name], t) for t in of) for x in (_floats, _planes)) or _fp8([resident[t.name] for t in of])
    )


def planed(spec: ModelSpec, resident: Mapping[str, str]) -> frozenset[str]:
    """Weights that our kernels read re-tiled: the same bytes in another order. Experts of a layer all, or none."""
    whole = multiplied(spec, resident)
    return frozenset(
        t.name
        for t in weight_tensors(spec)
        if _planes(resident[t.name], t)
        and (t.role in ("matrix", "table") or (t.role == "experts" and layer_of(t.name) in whole))
    )


def _floats(kind: str, tensor: TensorSpec) -> bool:
    return kind in FLOAT_TYPES


def _fp8(kinds: list[str]) -> bool:
    """Gate, up and down in e4m3; the first two, which one launch multiplies, with scales of one form."""
    return FP8_TYPES.issuperset(kinds) and kinds[0] == kinds[1]


def _planes(kind: str, tensor: TensorSpec) -> bool:
    return kind in PLANE_TYPES and tensor.shape[-2] % ROWS_TOGETHER == 0
