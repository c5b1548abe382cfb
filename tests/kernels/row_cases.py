"""Heads, norms, residuals, gates and products of one row against PyTorch.

A program of its own: it must start with TRITON_INTERPRET=1, or on a GPU.

python -m kernels.row_cases [cpu|cuda]     prints a JSON object: case -> largest relative error (or mismatch of integers)
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.cache.storage import Values
from headwise.kernels import floats as P
from headwise.kernels import heads as K
from headwise.kernels import matvec as M
from headwise.kernels import rows as R
from headwise.kernels.stored import Stored
from headwise.spec.kv import KV_FORMATS

EPS = 1e-6
HEADS = [  # name, T, position, H, G, A, pairs, one, owns, normed, v normed, ring, KV
    ("gemma sliding", 5, 39, 4, 2, 256, 128, False, True, True, True, 41, "f16"),
    ("gemma sliding q8_0", 3, 7, 4, 2, 256, 128, False, True, True, True, 12, "q8_0"),
    ("gemma global", 3, 11, 4, 1, 512, 64, True, True, True, True, 0, "f16"),
    ("gemma global q8_0", 2, 11, 4, 1, 512, 64, True, True, True, True, 0, "q8_0"),
    ("gemma global q4_0", 2, 0, 2, 1, 512, 64, True, True, True, True, 0, "q4_0"),
    ("gemma global, V alone", 3, 11, 4, 1, 512, 64, "v", True, True, True, 0, "f16"),
    ("gemma global, V alone, q4_0", 2, 1, 2, 1, 512, 64, "v", True, True, True, 0, "q4_0"),
    ("gemma global fp8", 3, 5, 2, 1, 512, 64, True, True, True, True, 0, "fp8"),
    ("gemma global, two tensors", 2, 4, 4, 2, 512, 64, False, True, True, True, 0, "q4_0"),
    ("gemma shared", 3, 11, 4, 0, 256, 128, False, False, True, True, 0, "f16"),
    ("qwen", 4, 2, 6, 3, 128, 64, False, True, True, False, 0, "fp8"),
    ("llama", 3, 9, 3, 1, 64, 32, False, True, False, False, 0, "q4_0"),
    ("exaone without rope", 2, 3, 4, 2, 128, 0, False, True, True, False, 0, "f16"),
    ("odd pairs", 2, 3, 2, 1, 128, 20, False, True, True, True, 7, "q8_0"),
    ("many: sliding", K.FEW + 3, 39, 2, 1, 256, 128, False, True, True, True, 80, "f16"),
    ("many: global q8_0", K.FEW + 3, 11, 2, 1, 512, 64, True, True, True, True, 0, "q8_0"),
    ("many: global q4_0", K.FEW + 2, 0, 2, 1, 512, 64, True, True, True, True, 0, "q4_0"),
    ("many: fp8", K.FEW + 1, 2, 2, 2, 128, 64, False, True, True, False, 0, "fp8"),
    ("many: shared", K.FEW + 5, 2, 3, 0, 64, 32, False, False, False, False, 0, "f16"),
]


def relative(got: Tensor, want: Tensor) -> float:
    if not torch.isfinite(got.float()).all():
        return float("inf")
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, P: int) -> Tensor:
    half = x.shape[-1] // 2
    out = x.clone()
    a, b = x[..., :P], x[..., half : half + P]
    out[..., :P] = a * cos - b * sin
    out[..., half : half + P] = b * cos + a * sin
    return out


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def heads_case(case: tuple[Any, ...], device: str, dtype: torch.dtype) -> dict[str, float]:
    _, T, start, H, G, A, P, one, owns, norm, v_norm, ring, kv = case
    stop, tail = start + T, 128 if one else 0
    fmt = KV_FORMATS["f16" if kv == "f16" else kv]
    n = H + G * (1 if one else 2)
    qkv = torch.randn(T, n * A, dtype=dtype, device=device) * 3
    q_w, k_w = (torch.rand(A, dtype=dtype, device=device) + 0.5 for _ in range(2))
    position = torch.arange(start, stop, device=device)[:, None]
    freq = 10000.0 ** -(torch.arange(P, device=device) / max(1, P)).float()
    cos, sin = (torch.empty(T, P, dtype=torch.float32, device=device) for _ in range(2))
    positions = torch.arange(start, stop, dtype=torch.int32, device=device)
    out: dict[str, float] = {}
    if P:
        K.rope_tables(positions, freq, cos, sin, 1.0)
        out["tables"] = max(
            relative(cos, torch.cos(position * freq)), relative(sin, torch.sin(position * freq)) if stop > 1 else 0.0
        )
    slots = ring or stop + 3
    k = Values(slots, G, A if one == "v" else A + tail, fmt, torch.device(device)) if owns else None
    v = Values(slots, G, A, fmt, torch.device(device)) if owns and not one else None
    q_out = torch.full((T, H, A + tail), float("nan"), dtype=dtype, device=device)
    to = positions % ring if ring else positions.clone()
    to[1:2] = -1  # the second token is stored nowhere
    stored = [t for t in range(T) if t != 1]
    kept, kept_v = (None if x is None else Stored(x.data_SGD, x.scales_SGB) for x in (k, v))
    K.heads(
        qkv, q_out, kept, kept_v, to, head_dim=A,
        pairs=P, cos_TP=cos, sin_TP=sin, q_norm=q_w if norm else None,
        k_norm=k_w if norm else None, v_norm=v_norm, eps=EPS,
    )  # fmt: skip
    x = qkv.float().view(T, n, A)
    c, s = cos[:, None, :], sin[:, None, :]
    q, keys, values = x[:, :H], x[:, H : H + G], x[:, H + G :]
    if norm:
        q = normed(q) * q_w.float()
    turned = rotated(q, c, s, P)
    if one:
        u = normed(keys)
        key = rotated(u * k_w.float(), c, s, P)
        pad = torch.zeros(T, G, tail - 2 * P, device=device)
        keys = u if one == "v" else torch.cat((u, key[..., :P], key[..., A // 2 : A // 2 + P], pad), -1)
        still = q * k_w.float()
        still[..., :P] = 0
        still[..., A // 2 : A // 2 + P] = 0
        pad = torch.zeros(T, H, tail - 2 * P, device=device)
        want = torch.cat((still, turned[..., :P], turned[..., A // 2 : A // 2 + P], pad), -1)
    else:
        want = turned
        keys = rotated(normed(keys) * k_w.float() if norm else keys, c, s, P)
        values = normed(values) if v_norm else values
    out["q"] = relative(q_out, want)
    for name, got, x_TGD in (("k", k, keys), ("v", v, values)):
        if got is None:
            continue
        there = Values(slots, G, x_TGD.shape[-1], fmt, torch.device(device))
        for t in stored:
            slot = (start + t) % ring if ring else start + t
            there.write(slot, x_TGD[t : t + 1].contiguous(), torch.empty(1, *x_TGD.shape[1:], device=device))
        a, b = (values_.read(0, slots, torch.empty(slots, G, x_TGD.shape[-1], device=device)) for values_ in (got, there))
        out[name] = relative(a, b)
        untouched = torch.ones(slots, dtype=torch.bool)
        untouched[[(start + t) % ring if ring else start + t for t in stored]] = False
        out[f"{name} elsewhere"] = float(a[untouched.to(a.device)].abs().sum())
    return out


def row_cases(device: str, dtype: torch.dtype) -> dict[str, float]:
    out: dict[str, float] = {}
    for T, D in ((1, 256), (3, 100), (2, 2816), (2, 5376)):
        x, y = (torch.randn(T, D, dtype=dtype, device=device) for _ in range(2))
        w, post = (torch.rand(D, dtype=dtype, device=device) + 0.5 for _ in range(2))
        scale = torch.tensor([0.7], dtype=dtype, device=device)
        nan = torch.full_like(x, float("nan"))
        out[f"norm {T}x{D}"] = relative(R.norm(x, w, nan.clone(), EPS), R.reference(x, w, EPS))
        out[f"norm without weight {T}x{D}"] = relative(R.norm(x, None, nan.clone(), EPS), R.reference(x, None, EPS))
        for p, s, nxt in itertools.product((None, post), (None, scale), (None, w)):
            mine, h = x.clone(), nan.clone()
            got = R.branch(y, p, mine, nxt, h, EPS, s)
            want = (x.double() + (y.double() if p is None else R.reference(y, p, EPS))) * (1.0 if s is None else s.double())
            label = f"branch {T}x{D} {p is not None} {s is not None} {nxt is not None}"
            out[label] = max(relative(mine, want), relative(got, want if nxt is None else R.reference(mine, nxt, EPS)))
    for T, W in ((1, 512), (3, 700), (2, 2112)):
        both = torch.randn(T, 2 * W, dtype=dtype, device=device) * 3
        for kind in ("gelu_tanh", "silu"):
            g, u = both.clone().split(W, -1)
            act = F.gelu(g.double(), approximate="tanh") if kind == "gelu_tanh" else F.silu(g.double())
            want = act * u.double()
            out[f"{kind} {T}x{W}"] = relative(R.gate(g, u, kind), want)
    for T, V in ((1, 5000), (3, 2048)):
        x = torch.randn(T, V, dtype=dtype, device=device) * 40
        x[0, :2] = torch.tensor([9e3, -9e3])
        out[f"softcap {T}x{V}"] = relative(R.softcap(x.clone(), 30.0), 30.0 * torch.tanh(x.double() / 30.0))
    return out


def integer_gate(T: int, W: int, device: str) -> float:
    """The gate's integers, as fp32 again."""
    g, u = (torch.randn(T, 2 * W, device=device) * 3).split(W, -1)
    found = R.gate(g, u, "silu", torch.full((M.integer_words(T, W, 2) + 3,), -1, dtype=torch.int32, device=device))
    assert isinstance(found, M.Integers)
    assert found.shape == (T, W)
    whole = found.words[..., :16].contiguous().view(torch.int8).view(T, -1, 2, 2, 4, 4).double()  # plane, half, word i, byte b
    v = (whole * torch.tensor([256.0, 1.0], device=device).view(-1, 1, 1, 1)).sum(2).transpose(-1, -2).flatten(-3)
    scale = found.words[..., 16:17].contiguous().view(torch.float32)
    return relative((v * scale).flatten(1), F.silu(g.double()) * u.double())


def product_cases(device: str, dtype: torch.dtype) -> dict[str, float]:
    """One row by N rows of K, plain, gated and times a vector, over launches of one block and of several a program."""
    out: dict[str, float] = {}
    for N, columns, config in (
        (1, 96, P.Config(4, 128, 1)), (37, 776, P.Config(8, 256, 2, 2)), (33, 512, P.Config(2, 256, 1, 2)),
        (100, 257, P.Config(4, 128, 4)), (64, 1024, P.Config(4, 512, 2)),
    ):  # fmt: skip
        x, m = (torch.randn(n, dtype=dtype, device=device) for n in (columns, N))
        w = (torch.randn(2 * N, columns, device=device) * columns**-0.5).to(dtype)
        y = w.double() @ x.double()
        nan = torch.full((N,), float("nan"), dtype=dtype, device=device)
        out[f"{N}x{columns}"] = relative(P.product(x, w[:N], nan.clone(), config=config), P.reference(x, w[:N]))
        out[f"{N}x{columns} gated"] = relative(P.product(x, w, nan.clone(), act="silu", config=config), F.silu(y[:N]) * y[N:])
        times = F.gelu(y[:N], approximate="tanh") * m.double()
        out[f"{N}x{columns} times"] = relative(P.product(x, w[:N], nan.clone(), act="gelu_tanh", times=m, config=config), times)
    return out


def main(device: str) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    dtypes = {"f32": torch.float32, "f16": torch.float16} | ({"bf16": torch.bfloat16} if device == "cuda" else {})
    out: dict[str, dict[str, float]] = {"integers": {f"gate {T}x{W}": integer_gate(T, W, device) for T, W in ((1, 96), (3, 2112))}}
    for name, dtype in dtypes.items():
        out[f"rows {name}"] = row_cases(device, dtype)
        out[f"products {name}"] = product_cases(device, dtype)
        for case in HEADS:
            out[f"{case[0]} {name}"] = heads_case(case, device, dtype)
    return out


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1] if len(sys.argv) > 1 else "cpu")))
