"""Activations arranged in triton's interpreter, by their own launch and by the gate's, against PyTorch; whether each is right."""

from __future__ import annotations

import json

import torch

from headwise.kernels import arrange as A
from headwise.kernels import router as R
from headwise.kernels.gates import Gate
from headwise.kernels.rows import gate
from headwise.planner.workspace import arranged_values, order_values


def pairs(T: int, K: int, E: int, of_each: int, bias: bool, tile_rows: int) -> dict[str, bool]:
    """Rows of each tile are those of its expert's pairs, in their order; what is left of a tile is 0."""
    ids = torch.stack([torch.randperm(E)[:of_each] for _ in range(T)]).int()
    order = R.order(ids, E, tile_rows, torch.zeros(order_values(T, E, of_each), dtype=torch.int32))
    P, n = T * of_each, arranged_values(tile_rows, K)
    x, both = torch.randn(T, K, dtype=torch.float16), torch.randn(P, 2 * K, dtype=torch.float16)
    gate = Gate("silu", torch.randn(E, K), torch.randn(E, K)) if bias else Gate("gelu_tanh")
    rooms = [torch.full((order.tiles(E) * n + 5,), 7.0, dtype=torch.float16) for _ in range(2)]
    plain, gated = A.arrange_pairs(x, order, E, rooms[0]), A.arrange_pairs(both, order, E, rooms[1], gate)
    tile, right, close, sorted_at = 0, True, True, 0
    for e in range(E):
        mine = (ids.flatten() == e).nonzero()[:, 0]
        for part in mine.split(tile_rows) if len(mine) else ():
            rows = both[sorted_at : sorted_at + len(part)].float()
            a, u = rows[:, :K], rows[:, K:]
            if gate.gate_bias_EW is not None and gate.up_bias_EW is not None:
                a, u = a + gate.gate_bias_EW[e], u + gate.up_bias_EW[e]
            want = (torch.nn.functional.silu(a) if bias else torch.nn.functional.gelu(a, approximate="tanh")) * u
            here = slice(tile * n, tile * n + n)
            right &= torch.equal(plain.values[here], A.reference(x[part // of_each], tile_rows))
            close &= torch.allclose(gated.values[here].float(), A.reference(want.half(), tile_rows).float(), rtol=2e-3, atol=1e-4)
            tile, sorted_at = tile + 1, sorted_at + len(part)
    untouched = all(bool((room[tile * n :] == 7.0).all()) for room in rooms)
    what = f"pairs {T}x{K} by {tile_rows}"
    return {what: right and untouched, f"gated {what}": close and untouched}


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
    for case in ((3, 96, 5, 2, False, 8), (20, 320, 4, 3, True, 16), (1, 32, 6, 4, False, 8), (64, 64, 3, 2, True, 8),
                 (64, 64, 3, 2, False, 32), (70, 96, 2, 1, True, 32)):  # fmt: skip
        found |= pairs(*case)
    print(json.dumps(found))
