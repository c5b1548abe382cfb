"""What each attention backend can do, as data: best first, one row each, with the source of every limit.

A row claims no more than its adapter's tests run. `fused` means no score matrix (queries by keys) is ever stored;
`materialised` means it is; strict mode, the default everywhere, runs fused rows only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    triton: tuple[int, int] | None = (3, 6)  # the version installed there; PyTorch 2.11's where nothing is known

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
    triton: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One backend's declared limits; `refusal` compares them with a need and quotes both numbers.

    `reads` says what it needs beside the cache: "slots" nothing but where positions lie (our kernels), "tiles" masks, room for
    converted keys and for its own result (PyTorch's operators), "scores" a score matrix.
    """

    name: str
    module: str  # imported only when chosen
    verdict: Literal["fused", "materialised"]
    apis: tuple[Api, ...]
    head_dims: Collection[int]
    reads: Literal["slots", "tiles", "scores"] = "tiles"
    one_tensor: Collection[tuple[int, int]] | None = None  # (head_dim, key size) pairs it takes; None: any in head_dims
    kv: tuple[str, ...] = ALL_KV
    dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
    windowed: bool = True
    softcap: bool = False
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    floats_as_activations: bool = False  # a cache of floats must have the activations' type
    triton: tuple[int, int] | None = None  # the one version it is written for
    source: str

    def refusal(self, need: Need) -> str | None:
        """Why this backend cannot serve `need`, or None when it can."""
        if need.api not in self.apis:
            return f"runs on {' and '.join(self.apis)}, not on {need.api}"
        if self.min_capability and (need.capability is None or need.capability < self.min_capability):
            has = ".".join(map(str, need.capability)) if need.capability else "unknown"
            return f"compute capability {has}, needs at least {'.'.join(map(str, self.min_capability))}"
        if self.max_capability and need.capability and need.capability > self.max_capability:
            has, most = (".".join(map(str, c)) for c in (need.capability, self.max_capability))
            return f"compute capability {has}, made for at most {most}"
        if self.triton and need.triton != self.triton:
            has = ".".join(map(str, need.triton)) if need.triton else "none"
            return f"triton {has} installed, made for {'.'.join(map(str, self.triton))}"
        if need.head_dim not in self.head_dims:
            return f"head_dim {need.head_dim} not in {listed(self.head_dims)}"
        if need.key_dim != need.head_dim:
            if self.one_tensor is None and need.key_dim not in self.head_dims:
                return f"one-tensor key size {need.key_dim} not in {listed(self.head_dims)}"
            if self.one_tensor is not None and (need.head_dim, need.key_dim) not in self.one_tensor:
                return f"one tensor for K and V with keys of {need.key_dim} values for head_dim {need.head_dim}: not among its own"
        if need.window is not None and not self.windowed:
            return f"window {need.window}: it takes no window"
        if need.softcap is not None and not self.softcap:
            return f"softcap {need.softcap:g}: it has none"
        if need.kv not in self.kv:
            return f"KV type {need.kv} not in {', '.join(self.kv)}"
        if need.dtype not in self.dtypes:
            return f"activations in {need.dtype}, takes {', '.join(self.dtypes)}"
        if self.floats_as_activations and need.kv in ("f32", "f16", "bf16") and need.kv != need.dtype:
            return f"KV type {need.kv}, reads floats of the activations' type {need.dtype} only"
        return None


def listed(sizes: Collection[int]) -> str:
    """Head sizes as people write them."""
    if not isinstance(sizes, range):
        return ", ".join(map(str, sizes))
    return f"{sizes.start}..{sizes[-1]}" + (f", multiples of {sizes.step}" if sizes.step > 1 else "")


KERNEL_DIMS = (64, 128, 256, 512)

BACKENDS: Sequence[Capability] = (
    Capability(
        name="headwise-hopper",
        module="headwise.attention.own_kernels",
        verdict="fused",
        apis=("cuda",),
        head_dims=KERNEL_DIMS,
        reads="slots",
        one_tensor=((512, 640),),
        kv=("f16", "bf16", "fp8", "q8_0", "q4_0"),
        dtypes=("f16", "bf16"),
        floats_as_activations=True,
        min_capability=(9, 0),
        max_capability=(9, 0),
        triton=(3, 6),
        source="headwise/kernels/attend_hopper.py, decode_hopper.py, decode_packed.py: TMA and wgmma; with fp8, q8_0 and q4_0 "
        "prefill is attend.py's, and so are more than 16 rows of 512 and rows of less than 128 bytes; Gluon's API changes between "
        "versions of triton",
    ),
    Capability(
        name="headwise-triton",
        module="headwise.attention.own_kernels",
        verdict="fused",
        apis=("cuda",),
        head_dims=KERNEL_DIMS,
        reads="slots",
        one_tensor=tuple((d, d + r) for d in KERNEL_DIMS for r in (32, 64, 128, 256)),
        kv=("f16", "bf16", "fp8", "q8_0", "q4_0"),
        dtypes=("f16", "bf16"),
        softcap=True,
        min_capability=(8, 0),
        source="headwise/kernels/attend.py: every KV type read in the kernel; head sizes are powers of two",
    ),
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
        reads="scores",
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
        triton=device.triton,
    )
