"""Products and lookups of a loaded file's re-tiled weights. A program of its own: it must start with TRITON_INTERPRET=1.

    python -m model.planes_case FILE.gguf     prints a JSON object: weight and rows -> relative error
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from headwise.model.arena import Room
from headwise.model.linear import linear, linears, rows
from headwise.planner.residence import groups, planed, resident_types
from headwise.spec.read import open_model
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import BlockTensor, dequantise
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import stored_types


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def main(path: Path) -> dict[str, float]:
    source = open_model(path, env={})
    resident = resident_types(source.spec, stored_types(source.spec, list_checkpoint(path)), cpu=False, dtype="f32")
    together = groups(source.spec, resident)
    names = planed(source.spec, resident)
    ours = load_weights(source.spec, path, resident=resident, device="cpu", groups=together, planes=names)
    blocks = load_weights(source.spec, path, resident=resident, device="cpu", groups=together)
    torch.manual_seed(0)
    words, partial, done = torch.empty(2**15, dtype=torch.int32), torch.empty(2**17), torch.zeros(2**10, dtype=torch.int32)
    room = Room(torch.empty(2**16), words, partial, done)
    out: dict[str, float] = {"planes": len(names)}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for t in weight_tensors(source.spec):
        held = blocks[t.name]
        if t.name not in names:
            continue
        assert isinstance(held, BlockTensor)
        if (held.type, held.shape) in seen:
            continue
        seen.add((held.type, held.shape))
        dense = dequantise(held.data, held.type, torch.float32)
        for T in (1, 12, 20):
            x = torch.randn(T, t.shape[-1])
            y = torch.full((T, t.shape[0]), float("nan"))
            linear(x, ours[t.name], y, room)
            out[f"{t.name} {held.type} {T}"] = error(y, x @ dense.t())
        ids = torch.tensor([3, 0, 3, t.shape[0] - 1])
        out[f"{t.name} {held.type} rows"] = error(rows(ours[t.name], ids, torch.empty(4, t.shape[1])), dense[ids])
    group, members = next((g, m) for g, m in together.items() if m[0] in names)
    x = torch.randn(3, blocks[members[0]].shape[1])
    whole, apart = torch.empty(3, sum(blocks[m].shape[0] for m in members)), []
    linear(x, ours[group], whole, room)
    for m in members:
        apart.append(torch.empty(3, blocks[m].shape[0]))
    linears(x, [(ours[m], y) for m, y in zip(members, apart, strict=True)], room)
    out["members of a group"] = error(whole, torch.cat(apart, -1))
    out["counters"] = float(room.done.abs().sum()) if room.done is not None else 1.0
    return out


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
