"""What each attention backend can do, as data: best first, one row each, with the source of every limit.

A row claims no more than its adapter's tests run. `fused` means no score matrix (queries by keys) is ever stored;
`materialised` means it is; strict mode, the default everywhere, runs fused rows only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Literal

from headwise.hardware.gpus import Gpu
from headwise.kernels.configs import GLUON
from headwise.spec.kv import KVFormat, q_values
from headwise.spec.layers import LayerSpec

Api = Literal["cpu", "cuda", "rocm", "metal", "sycl"]
PACKAGES = ("flash-attn", "flash-attn-4", "flashinfer-python")  # distributions that rows ask for
ALL_KV = ("f32", "f16", "bf16", "fp8", "q8_0", "q4_0")


def here(package: str) -> bool:
    """Whether this Python has the distribution."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def installed() -> frozenset[str]:
    """Those of PACKAGES that this Python has."""
    return frozenset(p for p in PACKAGES if here(p))


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What a backend needs to know of a device."""

    api: Api
    capability: tuple[int, int] | None = None  # CUDA compute capability
    label: str = "the CPU"
    triton: tuple[int, int] | None = GLUON  # the version installed there; PyTorch 2.11's where nothing is known
    packages: frozenset[str] = field(default_factory=installed)  # here

    @classmethod
    def of(cls, gpu: Gpu) -> DeviceKind:
        return cls(gpu.api, gpu.capability, gpu.label)  # type: ignore[arg-type]


CPU = DeviceKind("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one layer asks of a backend on one device."""

    head_dim: int
    key_dim: int  # values of a key: head_dim, or of one tensor V's and the rotated part of K
    window: int | None
    kv: str
    dtype: str  # of the activations
    softcap: float | None
    sinks: bool
    api: Api
    capability: tuple[int, int] | None  # CUDA compute capability
    triton: tuple[int, int] | None = None
    packages: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Layers of another row whose prefill a row takes where it is installed, in the spans that `attention.prefill` says."""

    of: str
    head_dim: int
    window: int | None
    why: str  # with the figures


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
    one_tensor: Collection[tuple[int, int]] | None = None  # (head_dim, key size) pairs, in both layouts; None: any in head_dims
    kv: tuple[str, ...] = ALL_KV
    dtypes: tuple[str, ...] = ("f32", "f16", "bf16")
    windowed: bool = True
    softcap: bool = False
    sinks: bool = True
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    floats_as_activations: bool = False  # a cache of floats must have the activations' type
    triton: tuple[int, int] | None = None  # the one version it is written for
    package: str | None = None  # the distribution that must be installed
    by_name: str | None = None  # runs a layer only when --backend names it, and why
    ahead: tuple[Ahead, ...] = ()  # takes another row's prefill without being named
    source: str

    def refusal(self, need: Need) -> str | None:
        """Why this backend cannot serve `need`, or None when it can."""
        if need.api not in self.apis:
            return f"runs on {' and '.join(self.apis)}, not on {need.api}"
        if self.package and self.package not in need.packages:
            return f"{self.package} is not installed"
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
        if need.sinks and not self.sinks:
            return "learned sinks: it takes none"
        if need.kv not in self.kv:
            return f"KV type {need.kv} not in {', '.join(self.kv)}"
        if need.dtype not in self.dtypes:
            return f"activations in {need.dtype}, takes {', '.join(self.dtypes)}"
        if self.floats_as_activations and need.kv in ("f32", "f16", "bf16") and need.kv != need.dtype:
            return f"KV type {need.kv}, reads floats of the activations' type {need.dtype} only"
        return None

    def prefills(self, row: Capability, need: Need) -> str | None:
        """Why it takes the many queries of a layer that `row` runs, if it does; that it does not refuse `need` is asked apart."""
        layer = (row.name, need.head_dim, need.window)
        return next((a.why for a in self.ahead if (a.of, a.head_dim, a.window) == layer and not need.sinks), None)


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
        triton=GLUON,
        source="headwise/kernels/attend_hopper.py, decode_hopper.py and, over fp8, q8_0 and q4_0, attend_packed.py (prefill) "
        "and decode_packed.py: TMA and wgmma; decode over those of more than 16 rows of 512 or of head_dim 64 is attend.py's, as "
        "is, of V alone, all but decode over floats; Gluon's API changes between versions of triton",
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
        source="headwise/kernels/attend.py and, under triton 3.6, attend_mma.py for prefill over fp8, q8_0 and q4_0 and, on "
        "other cards than Hopper, of 64, 256 and 512: every KV type read in the kernel; head sizes are powers of two",
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
        name="headwise-triton-rocm",
        module="headwise.attention.own_kernels",
        verdict="fused",
        apis=("rocm",),
        head_dims=(64, 128),
        reads="slots",
        one_tensor=(),
        kv=("f16", "bf16", "fp8", "q8_0", "q4_0"),
        dtypes=("f16", "bf16"),
        softcap=True,
        by_name="compiled for gfx1100, never run on a card",
        source="headwise/kernels/attend.py; tests/kernels/test_compile.py: 64 KB of LDS, no spills; larger heads spill",
    ),
    Capability(
        name="torch-cudnn",
        module="headwise.attention.torch_fused",
        verdict="fused",
        apis=("cuda",),
        head_dims=range(8, 257, 8),
        dtypes=("f16", "bf16"),
        windowed=False,
        min_capability=(9, 0),
        max_capability=(9, 0),
        by_name="632 TFLOP/s where headwise-hopper has 652 (causal 256 at 16K, one H200), and a plan for every new length",
        source="PyTorch 2.11 _scaled_dot_product_cudnn_attention, called at 8, 128, 136 and 256 on an H200",
    ),
    Capability(
        name="flash-attn",
        module="headwise.attention.optional",
        verdict="fused",
        apis=("cuda",),
        head_dims=range(8, 257, 8),
        one_tensor=(),
        kv=("f16", "bf16"),
        dtypes=("f16", "bf16"),
        softcap=True,
        min_capability=(8, 0),
        floats_as_activations=True,
        package="flash-attn",
        by_name="not measured here; flash-attn-2 is PyTorch's copy of it, without windows",
        source="flash-attention 2.8 README: head dimensions up to 256, Ampere or newer, sliding window, softcapping",
    ),
    Capability(
        name="flash-attn-4",
        module="headwise.attention.optional",
        verdict="fused",
        apis=("cuda",),
        head_dims=range(8, 257, 8),
        one_tensor=(),
        kv=("f16", "bf16"),
        dtypes=("f16", "bf16"),
        softcap=True,
        min_capability=(9, 0),
        max_capability=(9, 0),
        floats_as_activations=True,
        package="flash-attn-4",
        by_name="a beta, whose decode is not measured here",
        ahead=(
            Ahead(
                of="headwise-hopper",
                head_dim=256,
                window=None,
                why="in steps of more than 1,024 tokens, 665 TFLOP/s where headwise-hopper has 652 (causal 256 at 16K, one H200)",
            ),
            Ahead(
                of="headwise-hopper",
                head_dim=256,
                window=1024,
                why="in steps of more than 1,024 tokens whose keys lie in a row of the ring, as in a prompt's first, 552 TFLOP/s "
                "where headwise-hopper has 509 (window 1024 at 32K, one H200)",
            ),
        ),
        source="flash-attn-4 4.0.0b36 flash_attn/cute/interface.py _validate_head_dims: 8 to 256 in steps of 16 bytes on SM90",
    ),
    Capability(
        name="flashinfer",
        module="headwise.attention.optional",
        verdict="fused",
        apis=("cuda",),
        head_dims=(64, 128, 256),
        one_tensor=(),
        kv=("f16", "bf16"),
        dtypes=("f16", "bf16"),
        softcap=True,
        min_capability=(8, 0),
        floats_as_activations=True,
        package="flashinfer-python",
        by_name="not measured here in a run that is kept",
        source="FlashInfer 0.7.2 single_prefill_with_kv_cache; 64, 128 and 256 are the sizes its wheel has kernels of",
    ),
    Capability(
        name="flex-attention",
        module="headwise.attention.optional",
        verdict="fused",
        apis=("cuda", "cpu"),
        head_dims=(16, 32, 64, 128, 256),
        one_tensor=(),
        kv=("f32", "f16", "bf16"),
        sinks=False,
        floats_as_activations=True,
        by_name="255 TFLOP/s where headwise-hopper has 509 (window 1024 at 32K, one H200), and it compiles at the first call",
        source="torch.nn.attention.flex_attention under torch.compile: no log-sum-exp on a CPU (torch 2.13), so no sinks; out of "
        "shared memory at 512 on an H200",
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
        key_dim=q_values(layer),
        window=layer.window,
        kv=kv.name,
        dtype=dtype,
        softcap=layer.softcap,
        sinks=layer.sinks,
        api=device.api,
        capability=device.capability,
        triton=device.triton,
        packages=device.packages,
    )
