"""Tiny checkpoints in FP8, in the forms that are published: Qwen's and DeepSeek's blocks, compressed-tensors by block, row, matrix.

Scales and bytes are worked out here by plain PyTorch, not by the code under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMS = ("blocks", "ct-block", "ct-channel", "ct-tensor")


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales as one for each value."""
    N, K = shape
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(N, K)
    if scales.shape == (N, 1):
        return scales.expand(N, K)
    return scales.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]


def scales_of(w: Tensor, form: str) -> Tensor:
    (N, K), size = w.shape, w.abs()
    if form == "ct-tensor":
        return size.max().reshape(1) / 448
    if form == "ct-channel":
        return size.amax(1, keepdim=True) / 448
    rows, columns = -(-N // 128), -(-K // 128)
    whole = torch.zeros(rows * 128, columns * 128)
    whole[:N, :K] = size
    return whole.view(rows, 128, columns, 128).amax((1, 3)) / 448


def config(form: str) -> dict[str, Any]:
    """`quantization_config` of published files: Qwen/Qwen3-8B-FP8, RedHatAI's *-FP8-block and *-FP8-dynamic."""
    if form == "blocks":
        return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    strategy = form.removeprefix("ct-")
    weights = {
        "actorder": None, "block_structure": [128, 128] if strategy == "block" else None, "dynamic": False, "group_size": None,
        "num_bits": 8, "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": "float",
    }  # fmt: skip
    group = {"input_activations": weights | {"dynamic": True, "strategy": "token"}, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group | {"output_activations": None}}, "format": "float-quantized", "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    }  # fmt: skip


def pack(tensors: dict[str, Tensor], form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with matrices of layers, but routers, in e4m3, and what they are worth in fp32; stacks of experts come apart."""
    packed: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    suffix = "_scale_inv" if form == "blocks" else "_scale"

    def put(name: str, w: Tensor) -> Tensor:
        scales = scales_of(w, form).to(torch.bfloat16)
        each = spread(scales.float(), w.shape)
        data = (w / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        packed[name], packed[name + suffix] = data, scales
        return data.float() * each

    for name, w in tensors.items():
        router = name.endswith(("mlp.gate.weight", "router.proj.weight"))
        if w.dim() == 3:
            stem = name.rsplit(".", 1)[0]
            made = []
            for e in range(w.shape[0]):
                parts = {"gate_proj": w[e].chunk(2)[0], "up_proj": w[e].chunk(2)[1]} if "gate_up" in name else {"down_proj": w[e]}
                made.append(torch.cat([put(f"{stem}.{e}.{kind}.weight", part.contiguous()) for kind, part in parts.items()]))
            floats[name] = torch.stack(made)
        elif w.dim() == 2 and ".layers." in name and not router:
            floats[name] = put(name, w)
        else:
            packed[name] = floats[name] = w
    return packed, floats


def save(made: Path, to: Path, form: str) -> Path:
    """The checkpoint `made` in FP8 as `to`/fp8, and with the same values in fp32 as `to`/floats."""
    packed, floats = pack(load_file(made / "model.safetensors"), form)
    values = json.loads((made / "config.json").read_text())
    for name, tensors, more in (("floats", floats, {}), ("fp8", packed, {"quantization_config": config(form)})):
        (to / name).mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, to / name / "model.safetensors", metadata={"format": "pt"})
        (to / name / "config.json").write_text(json.dumps(values | more))
    return to / "fp8"
