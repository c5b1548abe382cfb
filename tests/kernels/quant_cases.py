"""Quantised products in triton's interpreter, one JSON line in and out per case; and random blocks for them."""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

BLOCK = {"q4_k": 256, "q5_k": 256, "q6_k": 256, "q8_0": 32, "q5_0": 32, "q4_0": 32, "mxfp4": 32}
BLOCK_BYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210, "q8_0": 34, "q5_0": 22, "q4_0": 18, "mxfp4": 17}
HALF_AT = {
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "mxfp4": (),
}  # f16 fields of a block; of the others 0
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def random_blocks(type_name: str, N: int, K: int, seed: int = 0) -> Tensor:
    """Rows of a file, uint8 (N, bytes): every bit random but the exponents of the scales."""
    g = torch.Generator().manual_seed(seed)
    n = K // BLOCK[type_name]
    blocks = torch.randint(0, 256, (N, n, BLOCK_BYTES[type_name]), dtype=torch.uint8, generator=g)
    for at in HALF_AT.get(type_name, (0,)):
        d = (torch.rand(N, n, 1, generator=g) + 0.1) * 0.01
        blocks[..., at : at + 2] = d.half().view(torch.uint8)
    if type_name == "mxfp4":
        blocks[..., 0] = torch.randint(110, 130, (N, n), generator=g)
    return blocks.view(N, -1)


def values(blocks: Tensor, type_name: str) -> Tensor:
    """What the gguf package says the blocks are."""
    import gguf

    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type_name.upper()]))


def product(case: dict[str, object]) -> dict[str, object]:
    from headwise.kernels.matvec import Config, integer_words, matvec, quantise
    from headwise.weights.retile import empty, retile

    name, T, N, K = str(case["type"]), int(case["T"]), int(case["N"]), int(case["K"])  # type: ignore[call-overload]
    blocks = random_blocks(name, N, K, seed=T + N + K)
    w = empty(name, (N, K), "cpu")
    retile(blocks, name, w)
    g = torch.Generator().manual_seed(7)
    x = torch.randn(T, K + 16, generator=g).to(DTYPES[str(case["dtype"])])[:, :K]  # rows further apart than they are long
    out = torch.full((T, N + 3), float("nan"))[:, :N]
    config = Config(**case["config"])  # type: ignore[arg-type]
    planes = int(case.get("planes", 2))  # type: ignore[call-overload]
    given = x if config.matrix else quantise(x, torch.full((integer_words(T, K, planes),), -1, dtype=torch.int32), planes=planes)
    scratch, done = torch.full((T * N * config.splits,), float("nan")), torch.zeros(N, dtype=torch.int32)
    matvec(given, w, out, scratch=scratch, done=done, config=config)
    want = x.double() @ values(blocks, name).double().T
    return {"error": float((out - want).norm() / want.norm()), "done": int(done.abs().sum())}


def activations(case: dict[str, object]) -> dict[str, object]:
    """The largest error of a quantised value, in parts of its group's largest, and of the sums, in parts of all values'."""
    from headwise.kernels.matvec import integer_words, quantise

    planes, T, K = int(case["quantise"]), 3, 35 * 32  # type: ignore[call-overload]
    x = torch.randn(T, K + 16, generator=torch.Generator().manual_seed(3)).to(DTYPES[str(case["dtype"])])[:, :K]
    x[1, 32:64], x[1, 40] = 0.0, 300.0
    x[2, 64:96] = 0.0
    q = quantise(x, torch.full((integer_words(T, K, planes) + 1,), -1, dtype=torch.int32), planes=planes).words
    whole = q[..., : 8 * planes].contiguous().view(torch.int8).view(T, -1, planes, 2, 4, 4).double()  # plane, half, word i, byte b
    v = (whole * torch.tensor([256.0, 1.0] if planes == 2 else [1.0]).view(-1, 1, 1, 1)).sum(2).transpose(-1, -2).flatten(-3)
    s, z, z0, z1 = q[..., 8 * planes :].contiguous().view(torch.float32).double().unbind(-1)
    groups, y = x.double().view(T, -1, 32), v * s[..., None]
    largest = groups.abs().amax(-1)
    sums = [y.sum(-1) - z, y[..., :16].sum(-1) - z0, y[..., 16:].sum(-1) - z1]
    return {"error": float(((y - groups).abs().amax(-1) / largest.clamp(min=1e-9)).max()),
            "sums": max(float((e.abs() / y.abs().sum(-1).clamp(min=1e-9)).max()) for e in sums)}  # fmt: skip


def rows(case: dict[str, object]) -> dict[str, object]:
    """How many values of the rows of one matrix differ in any bit from the gguf package's, rounded once; and of those beside."""
    from headwise.kernels.expand import expand, gather
    from headwise.weights.retile import empty, retile

    name, N, K, stack = str(case["rows"]), int(case["N"]), int(case["K"]), int(case["stack"])  # type: ignore[call-overload]
    dtype = DTYPES[str(case["dtype"])]
    blocks = random_blocks(name, max(stack, 1) * N, K, seed=N + K)
    blocks = blocks.view(stack, N, -1) if stack else blocks
    w = empty(name, (*blocks.shape[:-1], K), "cpu")
    retile(blocks, name, w)
    if stack:
        blocks, w = blocks[stack - 1], w.matrix(stack - 1)
    if "ids" in case:
        ids = torch.tensor(case["ids"], dtype=torch.int64)
    else:
        ids = torch.arange(*case["range"])  # type: ignore[misc]
    room = torch.full((len(ids) + 2, K), 7.0, dtype=dtype)
    if "ids" in case:
        gather(w, ids, room[1:-1])
    else:
        expand(w, *case["range"], room[1:-1])  # type: ignore[misc]
    known = (ids >= 0) & (ids < N)
    want = values(blocks[ids[known]], name)
    if dtype == torch.bfloat16:  # the interpreter cuts off what a card rounds
        want = (want.view(torch.int32) >> 16 << 16).view(torch.float32)
    want = want.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return {"differ": int((room[1:-1][known].view(bits) != want.view(bits)).sum()), "values": want.numel(),
            "nan": int(room[1:-1][~known].isnan().sum()), "beside": int((room[[0, -1]] != 7).sum())}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        run = activations if "quantise" in case else rows if "rows" in case else product
        print(json.dumps(run(case)), flush=True)
