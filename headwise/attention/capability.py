"""What each attention backend can do, as data: best first, one row each, with the source of every limit.

A row claims no more than its adapter's tests run. `fused` means no score matrix (queries by keys) is ever stored;
`materialised` means it is; strict mode, the default everywhere, runs fused rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headwise.hardware.gpus import Gpu
from headwise.spec.kv import KVFormat, k_values
from headwise.spec.layers import LayerSpec

Api = Literal["cpu", "cuda", "rocm", "metal", "sycl"]
ALL_KV = ("f32", "f16", "bf16", "fp8", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What a backend needs to know of a device."""

    api: Api
    capability: tuple[int, int] | None = None  # CUDA compute capability
    label: str = "the CPU"

    @classmethod
    def of(cls, gpu: Gpu) -> DeviceKind:
        return cls(gpu.api, gpu.capability, gpu.label)  # type: ignore[arg-type]


CPU = DeviceKind("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one layer asks of a backend on one device."""

    head_dim: int
    key_dim: int  # what a cached key holds: head_dim, or V and the rotated part of K in one tensor
    window: int | None
    kv: str
    dtype: str  # of the activations
    softcap: float | None
    sinks: bool
    api: Api
    capability: tuple[int, int] | None  # CUDA compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One backend's declared limits; `refusal` compares them with a need and quotes both numbers."""

    name: str
    module: str  # imported only when chosen
    verdict: Literal["fused", "materialised"]
    apis: tuple[Api, ...]
    head_dims: range
    kv: tuple[str, ...] = ALL_KV
    dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
    windowed: bool = True
    softcap: bool = False
    min_capability: tuple[int, int] | None = None
    source: str

    def refusal(self, need: Need) -> str | None:
        """Why this backend cannot serve `need`, or None when it can."""
        if need.api not in self.apis:
            return f"runs on {' and '.join(self.apis)}, not on {need.api}"
        if self.min_capability and (need.capability is None or need.capability < self.min_capability):
            has = ".".join(map(str, need.capability)) if need.capability else "unknown"
            return f"compute capability {has}, needs at least {'.'.join(map(str, self.min_capability))}"
        for what, n in (("head_dim", need.head_dim), ("one-tensor key size", need.key_dim)):
            if n not in self.head_dims:
                step = f", multiples of {self.head_dims.step}" if self.head_dims.step > 1 else ""
                return f"{what} {n} not in {self.head_dims.start}..{self.head_dims[-1]}{step}"
        if need.window is not None and not self.windowed:
            return f"window {need.window}: it takes no window"
        if need.softcap is not None and not self.softcap:
            return f"softcap {need.softcap:g}: it has none"
        if need.kv not in self.kv:
            return f"KV type {need.kv} not in {', '.join(self.kv)}"
        if need.dtype not in self.dtypes:
            return f"activations in {need.dtype}, takes {', '.join(self.dtypes)}"
        return None


BACKENDS: Sequence[Capability] = (
    Capability(
        name="flash-attn-2",
        module="headwise.attention.torch_fused",
        verdict="fused",
        apis=("cuda",),
        head_dims=range(8, 257, 8),
        dtypes=("f16", "bf16"),
        windowed=False,
        min_capability=(8, 0),
        source="FlashAttention-2 as built into PyTorch 2.11 (sdp_utils.cpp check_head_dim_size_flash); README: head "
        "dimensions up to 256, Ampere or newer; its SDPA entry has no window",
    ),
    Capability(
        name="torch-efficient",
        module="headwise.attention.torch_fused",
        verdict="fused",
        apis=("cuda",),
        head_dims=range(8, 1025, 8),
        min_capability=(7, 0),
        source="PyTorch 2.11 memory-efficient SDPA (CUTLASS, kernels for any K up to 65536); 16-byte aligned rows",
    ),
    Capability(
        name="torch-flash-cpu",
        module="headwise.attention.torch_fused",
        verdict="fused",
        apis=("cpu",),
        head_dims=range(2, 1025),
        source="PyTorch 2.11 aten/native/cpu/FlashAttentionKernel.cpp: any head size, additive mask, grouped heads",
    ),
    Capability(
        name="reference",
        module="headwise.attention.reference",
        verdict="materialised",
        apis=("cpu", "cuda", "rocm", "metal", "sycl"),
        head_dims=range(1, 65537),
        softcap=True,
        source="headwise/attention/reference.py: the formula, with a score matrix",
    ),
)


def need_for(layer: LayerSpec, *, kv: KVFormat, dtype: str, device: DeviceKind) -> Need:
    """What `layer` needs on `device`."""
    return Need(
        head_dim=layer.head_dim,
        key_dim=k_values(layer),
        window=layer.window,
        kv=kv.name,
        dtype=dtype,
        softcap=layer.softcap,
        sinks=layer.sinks,
        api=device.api,
        capability=device.capability,
    )
