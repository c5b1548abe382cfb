"""Activations arranged in triton's interpreter, by their own launch and by the gate's, against PyTorch; whether each is right."""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

from headwise.kernels import arrange as A
from headwise.kernels.rows import gate
from headwise.planner.workspace import arranged_values

if __name__ == "__main__":
    found = {}
    for T, K in ((1, 256), (3, 96), (9, 2112), (16, 1056), (33, 320), (64, 32)):
        x = torch.randn(T, K + 8, dtype=torch.float16)[:, :K]
        room = torch.full((arranged_values(T, K) + 5,), 7.0, dtype=torch.float16)
        out = A.arrange(x, room)
        found[f"{T}x{K}"] = torch.equal(out.values, A.reference(x)) and bool((room[-5:] == 7.0).all())

        both = torch.randn(T, 2 * K, dtype=torch.float16)
        want = gate(both[:, :K].clone(), both[:, K:].clone(), "silu")
        room.fill_(7.0)
        out = gate(both[:, :K], both[:, K:], "silu", room)
        assert isinstance(want, torch.Tensor)
        assert isinstance(out, A.Arranged)
        found[f"gated {T}x{K}"] = torch.equal(out.values, A.reference(want)) and bool((room[-5:] == 7.0).all())
    print(json.dumps(found))
