"""Routed experts of a layer on our kernels and in PyTorch. A program of its own: it must start with TRITON_INTERPRET=1.

python -m model.experts_case     prints a JSON object: case -> relative difference of the two
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from kernels.quant_cases import random_blocks
from torch import Tensor

from headwise.kernels import experts as kernels
from headwise.model import experts
from headwise.model.arena import Arena
from headwise.model.mlp import experts_beside_dense, routed_experts
from headwise.model.ops import PLAIN
from headwise.planner.workspace import workspace
from headwise.spec import catalogue
from headwise.spec.kv import KV_FORMATS
from headwise.spec.layers import MlpSpec, MoeSpec
from headwise.weights.blocks import BlockTensor, Fp8Tensor, dequantise, expand_fp8, to_fp8
from headwise.weights.retile import empty, retile

D, C = 64, 12
TOKENS = (1, 2, 12)  # one, few, and more than meet experts as integers
GEMMA = MoeSpec(
    n_experts=5, n_active=2, width=32, selection="softmax_topk", renormalise=True, activation="gelu_tanh", beside_dense=True
)
QWEN = MoeSpec(n_experts=4, n_active=2, width=32, selection="softmax_topk", renormalise=False, activation="silu")
GPT_OSS = MoeSpec(
    n_experts=4, n_active=2, width=32, selection="topk_softmax", renormalise=False, activation="swiglu_clamped", bias=True
)
CASES: list[tuple[str, MoeSpec, tuple[str, str, str]]] = [  # types of gate, up and down
    ("gemma", GEMMA, ("f32", "f32", "f32")),
    ("gemma q8_0", GEMMA, ("q8_0", "q8_0", "q5_0")),
    ("qwen", QWEN, ("f32", "f32", "f32")),
    ("qwen of two types", QWEN, ("q4_0", "q8_0", "q8_0")),
    ("gpt-oss", GPT_OSS, ("f32", "f32", "f32")),
    ("gpt-oss mxfp4", GPT_OSS, ("mxfp4", "mxfp4", "mxfp4")),
    ("gemma fp8", GEMMA, ("fp8", "fp8", "fp8")),
    ("gpt-oss fp8", GPT_OSS, ("fp8", "fp8", "fp8")),
    ("qwen without kernels", QWEN, ("q4_1", "q4_1", "f32")),  # PyTorch's both times
    ("qwen half in fp8", QWEN, ("fp8", "fp8", "f32")),  # the same
]


def stack(kind: str, E: int, rows: int, columns: int, seed: int) -> tuple[Any, Tensor]:
    """A stack as PyTorch multiplies it, and its values; both of a size that keeps the stream's."""
    if kind == "f32":
        w = torch.randn(E, rows, columns) * columns**-0.5
        return w, w
    if kind == "fp8":
        w = Fp8Tensor(*to_fp8(torch.randn(E, rows, columns) * columns**-0.5))
        return w, expand_fp8(w.data, w.scales)
    if kind == "q4_1":
        import gguf

        floats = (torch.randn(E * rows, columns) * columns**-0.5).numpy()
        data = torch.from_numpy(gguf.quants.quantize(floats, gguf.GGMLQuantizationType.Q4_1)).view(E, rows, -1)
    else:
        data = random_blocks(kind, E * rows, columns, seed=seed).view(E, rows, -1)
    return BlockTensor(data, kind, (E, rows, columns)), dequantise(data, kind, torch.float32)


def planes_of(blocks: list[BlockTensor]) -> Any:
    """Blocks of one type under one another in each matrix, re-tiled."""
    data = torch.cat([b.data for b in blocks], 1)
    into = empty(blocks[0].type, (data.shape[0], data.shape[1], blocks[0].shape[-1]), "cpu")
    retile(data, blocks[0].type, into)
    return into


def weights(moe: MoeSpec, kinds: tuple[str, str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of one layer, for PyTorch and for our kernels; the values of quantised ones are scaled by what multiplies them."""
    E, W = moe.n_experts, moe.width
    gate, up, down = (stack(k, E, *shape, seed=i) for i, (k, shape) in enumerate(zip(kinds, ((W, D), (W, D), (D, W)), strict=True)))
    plain: dict[str, Any] = {"experts_gate": gate[0], "experts_up": up[0], "experts_down": down[0], "router": torch.randn(E, D)}
    for name, shape in (
        ("router_bias", (E,)),
        ("experts_gate_bias", (E, W)),
        ("experts_up_bias", (E, W)),
        ("experts_down_bias", (E, D)),
    ):
        if moe.bias:
            plain[name] = torch.randn(shape)
    if moe.beside_dense:
        for name in ("router_scale", "mlp_post_norm_1", "experts_norm", "experts_post_norm"):
            plain[name] = torch.rand(D) + 0.5
        plain |= {"expert_scale": torch.rand(E) + 0.5, "gate": torch.randn(40, D) / 16, "up": torch.randn(40, D) / 16}
        plain["down"] = torch.randn(D, 40) / 6
    ours = dict(plain)
    if kinds[0] == "f32":
        both = torch.cat((gate[0], up[0]), 1)
        ours |= {"experts_gate": both[:, :W], "experts_up": both[:, W:]}
    elif kinds[0] == "fp8":
        whole = Fp8Tensor(torch.cat((gate[0].data, up[0].data), 1), torch.cat((gate[0].scales, up[0].scales), 1))
        ours |= {"experts_gate_up": whole, "experts_gate": whole.part(0, W), "experts_up": whole.part(W, 2 * W)}
    elif "q4_1" not in kinds:
        ours["experts_down"] = planes_of([down[0]])
        if kinds[0] == kinds[1]:
            whole = planes_of([gate[0], up[0]])
            ours |= {"experts_gate_up": whole, "experts_gate": whole.part(0, W), "experts_up": whole.part(W, 2 * W)}
        else:
            ours |= {"experts_gate": planes_of([gate[0]]), "experts_up": planes_of([up[0]])}
    return plain, ours


def main() -> dict[str, float]:
    experts.EXPERT_ROWS = 4  # of 160; and large programs: the interpreter pays for each
    kernels.FEW_PROGRAMS = kernels.MANY_PROGRAMS
    torch.manual_seed(0)
    base = catalogue.spec("qwen3-30b-a3b")
    out: dict[str, float] = {}
    for name, moe, kinds in CASES:
        mlp = MlpSpec(width=40 if moe.beside_dense else 0, activation="gelu_tanh", moe=moe)
        spec = replace(base, hidden=D, layers=(replace(base.layers[0], mlp=mlp),))
        kv = {"global": KV_FORMATS["f32"], "sliding": KV_FORMATS["f32"]}
        three = 3 * 2 * moe.width * D  # experts at a time
        arenas = []
        mixed = kinds[0] != kinds[2] == "f32"
        for more in ({"block_weights": True}, {"plain_experts": mixed, "block_weights": mixed,
                                               "fused_experts": True, "plane_experts": True, "plane_values": three}):  # fmt: skip
            arena = Arena(workspace(spec, n_tokens=C, chunk=C, dtype="f32", kv=kv, cpu=True, **more), torch.device("cpu"))  # type: ignore[arg-type]
            arena.eps.fill_(1e-6)
            arena.eps_value = 1e-6
            arenas.append(arena)
        both = weights(moe, kinds)
        scale = D**-0.5 / (float(both[0]["experts_gate"].data.float().std()) if kinds[0] == "f32" else 1.0)
        for T in TOKENS:
            x = torch.randn(T, D)
            h = torch.randn(T, D) * (scale if kinds[0] != "f32" else 1.0)
            results = []
            for w, arena in zip(both, arenas, strict=True):
                y = torch.full((T, D), float("nan"))
                with torch.inference_mode():
                    if moe.beside_dense:
                        experts_beside_dense(mlp, w, x.clone(), h.clone(), y, arena, PLAIN)
                    else:
                        routed_experts(moe, w, x.clone(), h.clone(), y, arena, PLAIN)
                results.append(y)
            out[f"{name} {T}"] = float((results[0] - results[1]).norm() / results[0].norm())
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main()))
