"""Products with e4m3, rows of it as floats, and activations as it, against PyTorch in fp64.

A program of its own: it must start with TRITON_INTERPRET=1, or on a GPU.

python -m kernels.fp8_cases [cpu|cuda]     prints a JSON object: type -> case -> largest relative error (or mismatch)
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from kernels.row_cases import relative
from torch import Tensor

from headwise.kernels import fp8 as P
from headwise.kernels import fp8_rows as R


def matrix(N: int, K: int, S: int, device: str) -> tuple[Tensor, Tensor]:
    """Every bit pattern but the two of NaN, subnormals and the largest included; scales that differ from row to row."""
    bytes_NK = torch.randint(0, 254, (N, K), dtype=torch.uint8, device=device)
    bytes_NK += (bytes_NK >= 127).to(torch.uint8)
    return bytes_NK.view(torch.float8_e4m3fn), (torch.rand(N, S, device=device) + 0.1) / 448


def row_cases(device: str, dtype: torch.dtype) -> dict[str, float]:
    """One row by N rows of K, plain, gated and times a vector, over launches of one block and of several a program."""
    out: dict[str, float] = {}
    for N, K, S, config in (
        (1, 96, 1, P.RowConfig(4, 128, 1)), (37, 776, 1, P.RowConfig(8, 256, 2, 2)), (33, 512, 4, P.RowConfig(2, 256, 1, 2)),
        (100, 257, 3, P.RowConfig(4, 128, 4)), (64, 1024, 8, P.RowConfig(4, 512, 2)), (19, 1000, 8, None),
    ):  # fmt: skip
        w, s = matrix(2 * N, K, S, device)
        x, m = (torch.randn(1, n, dtype=dtype, device=device) for n in (K, N))
        y = P.reference(x, w, s)
        nan = torch.full((1, N), float("nan"), dtype=dtype, device=device)
        case = f"{N}x{K}/{S}"
        out[case] = relative(P.one_row(x, w[:N], s[:N], nan.clone(), config=config), y[:, :N])
        out[f"{case} gated"] = relative(P.one_row(x, w, s, nan.clone(), act="silu", config=config), F.silu(y[:, :N]) * y[:, N:])
        times = F.gelu(y[:, :N], approximate="tanh") * m.double()
        out[f"{case} times"] = relative(P.one_row(x, w[:N], s[:N], nan.clone(), act="gelu_tanh", times=m, config=config), times)
    return out


def product_cases(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Rows past the end of both, K that is no whole block, partial sums, an `out` and an x with rows apart."""
    out: dict[str, float] = {}
    for T, N, K, S, config in (
        (2, 37, 96, 1, P.Config(splits=1)), (5, 70, 300, 3, P.Config(splits=1)), (16, 64, 512, 1, P.Config(splits=2)),
        (17, 100, 1000, 8, P.Config(splits=3)), (33, 129, 384, 1, P.Config(splits=3)), (64, 65, 640, 5, P.Config(splits=2)),
    ):  # fmt: skip
        w, s = matrix(N, K, S, device)
        x = torch.randn(T, K + 16, dtype=dtype, device=device)[:, :K]
        wide = torch.full((T, N + 3), float("nan"), dtype=dtype, device=device)
        scratch = torch.full((T * N * config.splits,), float("nan"), device=device)
        done = torch.zeros(-(-N // config.rows), dtype=torch.int32, device=device)
        case = f"{T}x{N}x{K}/{S}/{config.splits}"
        out[case] = relative(P.product(x, w, s, wide[:, :N], scratch=scratch, done=done, config=config), P.reference(x, w, s))
        out[f"{case} beside"] = float((~wide[:, N:].isnan()).sum() + done.abs().sum())
    return out


def converted(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Numbers that differ from PyTorch's."""
    out: dict[str, float] = {}
    for N, K, S in ((7, 96, 1), (9, 1100, 1), (5, 1100, 9), (4, 257, 3)):
        w, s = matrix(N, K, S, device)
        each = s.repeat_interleave(128 if S > 1 else K, 1)[:, :K]
        got = R.expand(w, s, torch.full((N, K), float("nan"), dtype=dtype, device=device))
        out[f"expand {N}x{K}/{S}"] = float((got != (w.float() * each).to(dtype)).sum())
    for T, K in ((1, 96), (3, 5000)):
        x = (torch.randn(T, K + 8, device=device) * 3).to(dtype)[:, :K]
        x[0, :5] = torch.tensor([0.0, 1e-3, -1e-2, 0.5, -0.4], dtype=dtype)
        if T > 1:
            x[1] = 0
        q, scale = torch.zeros(T, K, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn), torch.empty(T, device=device)
        R.quantise(x, q, scale)
        want = x.float().abs().amax(1).clamp(min=1e-30) / 448
        out[f"scales {T}x{K}"] = relative(scale, want)
        differ = q.float() != (x.float() / scale[:, None]).to(torch.float8_e4m3fn).float()
        out[f"quantise {T}x{K}"] = float(differ.sum()) / T / K
    return out


def main(device: str) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    dtypes = {"f32": torch.float32, "f16": torch.float16} | ({"bf16": torch.bfloat16} if device == "cuda" else {})
    out: dict[str, dict[str, float]] = {}
    for name, dtype in dtypes.items():
        out[f"row {name}"] = row_cases(device, dtype)
        out[f"rows {name}"] = product_cases(device, dtype)
        out[f"converted {name}"] = converted(device, dtype)
    return out


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1] if len(sys.argv) > 1 else "cpu")))
