"""The GPU table: one row for each device a driver can list, and the look-up from what people call it.

Memory      What the driver reports as total where that is more than 1 % below the printed size (GDDR6 with ECC on, HBM
            counted in 10^9); the printed size in GiB otherwise. `NAME:GiB` overrides it.
Bandwidth   The vendor's peak, in 10^9 bytes/s. A reader reaches 80 to 93 % of it.
Rates       Dense, in 10^12 operations/s at boost clock, sums kept in fp32 (int32 for int8). Never the sparse figure.
            None: no such unit, or no figure we trust; the row's note says which where it is not plain.
            int8 of cards without a matrix unit is their four-way dot product (dp4a, dot4).
Device      What the driver counts: an A16 board is four rows' worth, an MI250X two.

Rates follow from f32 by ratios fixed for a chip family, which NVIDIA's whitepapers and AMD's table print:
    Turing    https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf
    Ampere    https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    Ada       https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    Blackwell https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    RDNA      https://gpuopen.com/learn/using_matrix_core_amd_rdna4
Intel's int8 rates are those of its product pages; Instinct and data-centre NVIDIA rates are the datasheets', halved
where these print sparse ones.
GeForce cards of these families keep sums in fp32 at half the tensor rate of the workstation card on the same chip.
Shared memory per block: CUDA C++ Programming Guide, table of compute capabilities; AMD: ROCm "GPU specifications"
(LDS); Apple: Metal Feature Set Tables (threadgroup memory).

`python -m headwise.hardware.gpus` prints the table as Markdown; docs/gpus.md is that text.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from headwise.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30

SMEM_BYTES = {  # the most one block may ask for, by compute capability
    (6, 0): 48 * KIB,
    (6, 1): 48 * KIB,
    (7, 0): 96 * KIB,
    (7, 5): 64 * KIB,
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
    (11, 0): 227 * KIB,
    (12, 0): 99 * KIB,
    (12, 1): 99 * KIB,
}


@dataclass(frozen=True, slots=True)
class Rates:
    """Dense peak rates in TFLOP/s (int8: TOP/s), fp32 sums. f32 is the vector unit's; the rest the matrix unit's."""

    f32: float | None
    f16: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    int8: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One row of the table. `find_gpu` may return it with another `memory_bytes`."""

    name: str  # "rtx3090"
    label: str  # "NVIDIA GeForce RTX 3090", the driver's spelling where it has one of its own
    vendor: str  # nvidia | amd | apple | intel
    arch: str
    api: str  # cuda | rocm | metal | sycl
    capability: tuple[int, int] | None  # CUDA compute capability
    gfx: str | None  # AMD code object target
    memory_bytes: int
    bandwidth_gb_s: float
    tflops: Rates
    smem_bytes: int | None  # shared memory (LDS, threadgroup memory) one block may use
    source: str
    also: tuple[str, ...] = ()  # further spellings that mean this row
    note: str = ""
    unified: bool = False  # memory is the system's own: the CPU's share comes out of it

    @property
    def family(self) -> str:
        """The name without its memory size: rows of one family are told apart by NAME:GiB."""
        return re.sub(r"-\d+gb$", "", self.name)


# --- row shorthands, one per vendor; the ratios to f32 are the families' of the docstring above ---


@dataclass(frozen=True, slots=True)
class _Chip:
    arch: str
    capability: tuple[int, int] | None = None
    gfx: str | None = None
    f16: float | None = None  # these four: multiples of the card's f32 rate
    bf16: float | None = None
    fp8: float | None = None
    int8: float | None = None

    def rates(self, f32: float) -> Rates:
        def of(ratio: float | None) -> float | None:
            return None if ratio is None else round(f32 * ratio, 1)

        return Rates(f32, of(self.f16), of(self.bf16), of(self.fp8), of(self.int8))


def _page(source: str) -> str:
    return source if source.startswith("https://") else "https://www.techpowerup.com/gpu-specs/" + source


def _nvidia(
    name: str,
    label: str,
    chip: _Chip,
    memory: int,
    bandwidth_gb_s: float,
    rates: float | Rates,
    source: str,
    also: tuple[str, ...] = (),
    note: str = "",
    unified: bool = False,
) -> Gpu:
    assert chip.capability is not None, name
    return Gpu(
        name=name,
        label="NVIDIA " + label,
        vendor="nvidia",
        arch=chip.arch,
        api="cuda",
        capability=chip.capability,
        gfx=None,
        memory_bytes=memory,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=rates if isinstance(rates, Rates) else chip.rates(rates),
        smem_bytes=SMEM_BYTES[chip.capability],
        source=_page(source),
        also=also,
        note=note,
        unified=unified,
    )


def _amd(
    name: str,
    label: str,
    chip: _Chip,
    memory: int,
    bandwidth_gb_s: float,
    rates: float | Rates,
    source: str,
    also: tuple[str, ...] = (),
    note: str = "",
    unified: bool = False,
) -> Gpu:
    return Gpu(
        name=name,
        label="AMD " + label,
        vendor="amd",
        arch=chip.arch,
        api="rocm",
        capability=None,
        gfx=chip.gfx,
        memory_bytes=memory,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=rates if isinstance(rates, Rates) else chip.rates(rates),
        smem_bytes=160 * KIB if chip.gfx == "gfx950" else 64 * KIB,
        source=_page(source),
        also=also,
        note=note,
        unified=unified,
    )


def _apple(
    name: str,
    label: str,
    memory: int,
    bandwidth_gb_s: float,
    f32: float | None,
    source: str,
    also: tuple[str, ...] = (),
    note: str = "",
) -> Gpu:
    return Gpu(
        name=name,
        label="Apple " + label,
        vendor="apple",
        arch=name.split("-")[0],
        api="metal",
        capability=None,
        gfx=None,
        memory_bytes=memory,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=Rates(f32),
        smem_bytes=32 * KIB,
        source=source,
        also=also,
        note=note,
        unified=True,
    )


def _intel(
    name: str,
    label: str,
    arch: str,
    memory: int,
    bandwidth_gb_s: float,
    f32: float,
    int8: float,
    source: str,
    note: str = "",
) -> Gpu:
    half = int8 / 2  # XMX runs 16-bit types at half the int8 rate
    return Gpu(
        name=name,
        label="Intel " + label,
        vendor="intel",
        arch=arch,
        api="sycl",
        capability=None,
        gfx=None,
        memory_bytes=memory,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=Rates(f32, half, half, None, int8),
        smem_bytes=None,
        source=_page(source),
        note=note,
    )


_GP10X = _Chip("pascal", (6, 1), int8=4)
_GP100 = _Chip("pascal", (6, 0))
_GV100 = _Chip("volta", (7, 0), f16=8)
_TU11X = _Chip("turing", (7, 5))
_TU10X = _Chip("turing", (7, 5), f16=4, int8=16)
_TU10X_PRO = _Chip("turing", (7, 5), f16=8, int8=16)
_GA100 = _Chip("ampere", (8, 0))
_GA10X = _Chip("ampere", (8, 6), f16=2, bf16=2, int8=8)
_GA10X_PRO = _Chip("ampere", (8, 6), f16=4, bf16=4, int8=8)
_GA10B = _Chip("ampere", (8, 7), f16=8, bf16=8, int8=16)
_AD10X = _Chip("ada", (8, 9), f16=2, bf16=2, fp8=4, int8=8)
_AD10X_PRO = _Chip("ada", (8, 9), f16=4, bf16=4, fp8=8, int8=8)
_GH100 = _Chip("hopper", (9, 0))
_GB100 = _Chip("blackwell", (10, 0))
_GB110 = _Chip("blackwell-ultra", (10, 3))
_THOR = _Chip("blackwell", (11, 0))
_GB20X = _Chip("blackwell", (12, 0), f16=2, bf16=2, fp8=4, int8=8)
_GB202_PRO = _Chip("blackwell", (12, 0), f16=4, bf16=4, fp8=8, int8=8)
_GB20B = _Chip("blackwell", (12, 1))

_VEGA10 = _Chip("gcn5", gfx="gfx900")
_VEGA20 = _Chip("gcn5", gfx="gfx906", f16=2, int8=4)
_NAVI10 = _Chip("rdna1", gfx="gfx1010")
_NAVI14 = _Chip("rdna1", gfx="gfx1012")
_CDNA1, _CDNA2 = _Chip("cdna1", gfx="gfx908"), _Chip("cdna2", gfx="gfx90a")
_CDNA3, _CDNA4 = _Chip("cdna3", gfx="gfx942"), _Chip("cdna4", gfx="gfx950")


def _rdna2(gfx: str) -> _Chip:
    return _Chip("rdna2", gfx=gfx, f16=2, int8=4)


def _rdna3(gfx: str, arch: str = "rdna3") -> _Chip:
    return _Chip(arch, gfx=gfx, f16=2, bf16=2, int8=2)


def _rdna4(gfx: str) -> _Chip:
    return _Chip("rdna4", gfx=gfx, f16=4, bf16=4, fp8=8, int8=8)


_NV = "https://www.nvidia.com/en-us/"
_DC = _NV + "data-center/"
_INSTINCT = "https://www.amd.com/en/products/accelerators/instinct/"
_WIKI = "https://en.wikipedia.org/wiki/"
_ECC = "ECC on (the factory setting) takes 1/16 of the memory"
_GCD = "one of the module's two dies: each is a device of its own to the driver"
_GB203_PRO = "matrix rates left out: published clocks and fp32-sum rates disagree"
_M5 = "no published rate, matrix units (Neural Accelerators) included"
_NO_F32 = "no published rate"

# fmt: off
GPUS: tuple[Gpu, ...] = (
    # NVIDIA Pascal: no tensor cores
    _nvidia("gtx1050ti", "GeForce GTX 1050 Ti", _GP10X, 4 * GIB, 112, 2.14, "geforce-gtx-1050-ti.c2885"),
    _nvidia("gtx1060-3gb", "GeForce GTX 1060 3GB", _GP10X, 3 * GIB, 192, 3.94, "geforce-gtx-1060-3-gb.c2867"),
    _nvidia("gtx1060-6gb", "GeForce GTX 1060 6GB", _GP10X, 6 * GIB, 192, 4.38, "geforce-gtx-1060-6-gb.c2862",
            also=("gtx1060",), note="`gtx1060` alone means this, the common one"),
    _nvidia("gtx1070", "GeForce GTX 1070", _GP10X, 8 * GIB, 256, 6.46, "geforce-gtx-1070.c2840"),
    _nvidia("gtx1070ti", "GeForce GTX 1070 Ti", _GP10X, 8 * GIB, 256, 8.19, "geforce-gtx-1070-ti.c3010"),
    _nvidia("gtx1080", "GeForce GTX 1080", _GP10X, 8 * GIB, 320, 8.87, "geforce-gtx-1080.c2839"),
    _nvidia("gtx1080ti", "GeForce GTX 1080 Ti", _GP10X, 11 * GIB, 484, 11.34, "geforce-gtx-1080-ti.c2877"),
    _nvidia("titan-xp", "TITAN Xp", _GP10X, 12 * GIB, 547.6, 12.15, "titan-xp.c2948"),
    _nvidia("p4", "Tesla P4", _GP10X, 8 * GIB, 192, 5.7, "tesla-p4.c2879"),
    _nvidia("p40", "Tesla P40", _GP10X, 24 * GIB, 346, 11.76, "tesla-p40.c2878"),
    _nvidia("p100-pcie-12gb", "Tesla P100-PCIE-12GB", _GP100, 12 * GIB, 549, 9.53, "tesla-p100-pcie-12-gb.c2915"),
    _nvidia("p100-pcie-16gb", "Tesla P100-PCIE-16GB", _GP100, 16 * GIB, 732, 9.53, "tesla-p100-pcie-16-gb.c2888",
            also=("p100",), note="`p100` alone means this one"),
    _nvidia("p100-sxm2", "Tesla P100-SXM2-16GB", _GP100, 16 * GIB, 732, 10.6, "tesla-p100-sxm2.c3183"),
    # Volta
    _nvidia("titan-v", "TITAN V", _GV100, 12 * GIB, 652.8, 14.9, "titan-v.c3051",
            note="f16 at the boost clock; NVIDIA prints 110"),
    _nvidia("v100-pcie-16gb", "Tesla V100-PCIE-16GB", _GV100, 16 * GIB, 900, 14.13, "tesla-v100-pcie-16-gb.c2957"),
    _nvidia("v100-pcie-32gb", "Tesla V100-PCIE-32GB", _GV100, 32 * GIB, 900, 14.13, "tesla-v100-pcie-32-gb.c3184"),
    _nvidia("v100-sxm2-16gb", "Tesla V100-SXM2-16GB", _GV100, 16 * GIB, 900, 15.67, "tesla-v100-sxm2-16-gb.c3018"),
    _nvidia("v100-sxm2-32gb", "Tesla V100-SXM2-32GB", _GV100, 32 * GIB, 900, 15.67, "tesla-v100-sxm2-32-gb.c3185"),
    _nvidia("v100s", "Tesla V100S-PCIE-32GB", _GV100, 32 * GIB, 1134, 16.35, "tesla-v100s-pcie-32-gb.c3467"),
    # Turing: GTX 16 has no tensor cores
    _nvidia("gtx1650", "GeForce GTX 1650", _TU11X, 4 * GIB, 128, 2.98, "geforce-gtx-1650.c3366",
            note="the GDDR5 card; later GDDR6 ones have 192 GB/s under the same name"),
    _nvidia("gtx1650super", "GeForce GTX 1650 SUPER", _TU11X, 4 * GIB, 192, 4.42, "geforce-gtx-1650-super.c3411"),
    _nvidia("gtx1660", "GeForce GTX 1660", _TU11X, 6 * GIB, 192, 5.03, "geforce-gtx-1660.c3365"),
    _nvidia("gtx1660super", "GeForce GTX 1660 SUPER", _TU11X, 6 * GIB, 336, 5.03, "geforce-gtx-1660-super.c3458"),
    _nvidia("gtx1660ti", "GeForce GTX 1660 Ti", _TU11X, 6 * GIB, 288, 5.44, "geforce-gtx-1660-ti.c3364"),
    _nvidia("rtx2060", "GeForce RTX 2060", _TU10X, 6 * GIB, 336, 6.45, "geforce-rtx-2060.c3310",
            note="`rtx2060` alone means this, the common one"),
    _nvidia("rtx2060-12gb", "GeForce RTX 2060 12GB", _TU10X, 12 * GIB, 336, 7.18, "geforce-rtx-2060-12-gb.c3836"),
    _nvidia("rtx2060super", "GeForce RTX 2060 SUPER", _TU10X, 8 * GIB, 448, 7.18, "geforce-rtx-2060-super.c3441"),
    _nvidia("rtx2070", "GeForce RTX 2070", _TU10X, 8 * GIB, 448, 7.47, "geforce-rtx-2070.c3252"),
    _nvidia("rtx2070super", "GeForce RTX 2070 SUPER", _TU10X, 8 * GIB, 448, 9.06, "geforce-rtx-2070-super.c3440"),
    _nvidia("rtx2080", "GeForce RTX 2080", _TU10X, 8 * GIB, 448, 10.07, "geforce-rtx-2080.c3224"),
    _nvidia("rtx2080super", "GeForce RTX 2080 SUPER", _TU10X, 8 * GIB, 496, 11.15, "geforce-rtx-2080-super.c3439"),
    _nvidia("rtx2080ti", "GeForce RTX 2080 Ti", _TU10X, 11 * GIB, 616, 13.45, "geforce-rtx-2080-ti.c3305"),
    _nvidia("titan-rtx", "TITAN RTX", _TU10X_PRO, 24 * GIB, 672, 16.31, "titan-rtx.c3311"),
    _nvidia("quadro-rtx4000", "Quadro RTX 4000", _TU10X_PRO, 8 * GIB, 416, 7.12, "quadro-rtx-4000.c3336"),
    _nvidia("quadro-rtx5000", "Quadro RTX 5000", _TU10X_PRO, 16 * GIB, 448, 11.15, "quadro-rtx-5000.c3308"),
    _nvidia("quadro-rtx6000", "Quadro RTX 6000", _TU10X_PRO, 24 * GIB, 672, 16.31, "quadro-rtx-6000.c3307"),
    _nvidia("quadro-rtx8000", "Quadro RTX 8000", _TU10X_PRO, 48 * GIB, 672, 16.31, "quadro-rtx-8000.c3306"),
    _nvidia("t4", "Tesla T4", _TU10X_PRO, 15360 * MIB, 320, 8.14, "tesla-t4.c3316", note=_ECC),
    # Ampere
    _nvidia("rtx3050-6gb", "GeForce RTX 3050 6GB", _GA10X, 6 * GIB, 168, 6.77, "geforce-rtx-3050-6-gb.c4188"),
    _nvidia("rtx3050", "GeForce RTX 3050", _GA10X, 8 * GIB, 224, 9.1, "geforce-rtx-3050-8-gb.c3858",
            note="`rtx3050` alone means this, the first one"),
    _nvidia("rtx3060", "GeForce RTX 3060", _GA10X, 12 * GIB, 360, 12.74, "geforce-rtx-3060-12-gb.c3682",
            note="`rtx3060` alone means this, the common one"),
    _nvidia("rtx3060-8gb", "GeForce RTX 3060 8GB", _GA10X, 8 * GIB, 240, 12.74, "geforce-rtx-3060-8-gb.c3937"),
    _nvidia("rtx3060ti", "GeForce RTX 3060 Ti", _GA10X, 8 * GIB, 448, 16.2, "geforce-rtx-3060-ti.c3681",
            note="the GDDR6 card; the GDDR6X one has 608 GB/s under the same name"),
    _nvidia("rtx3070", "GeForce RTX 3070", _GA10X, 8 * GIB, 448, 20.31, "geforce-rtx-3070.c3674"),
    _nvidia("rtx3070ti", "GeForce RTX 3070 Ti", _GA10X, 8 * GIB, 608, 21.75, "geforce-rtx-3070-ti.c3675"),
    _nvidia("rtx3080", "GeForce RTX 3080", _GA10X, 10 * GIB, 760, 29.77, "geforce-rtx-3080.c3621",
            note="`rtx3080` alone means this, the common one"),
    _nvidia("rtx3080-12gb", "GeForce RTX 3080 12GB", _GA10X, 12 * GIB, 912, 30.64, "geforce-rtx-3080-12-gb.c3834"),
    _nvidia("rtx3080ti", "GeForce RTX 3080 Ti", _GA10X, 12 * GIB, 912, 34.1, "geforce-rtx-3080-ti.c3735"),
    _nvidia("rtx3090", "GeForce RTX 3090", _GA10X, 24 * GIB, 936, 35.58, "geforce-rtx-3090.c3622"),
    _nvidia("rtx3090ti", "GeForce RTX 3090 Ti", _GA10X, 24 * GIB, 1008, 40.0, "geforce-rtx-3090-ti.c3829"),
    _nvidia("rtx-a2000-6gb", "RTX A2000", _GA10X_PRO, 6 * GIB, 288, 7.99, "rtx-a2000.c3820",
            note="`rtx-a2000` alone means this, the first one"),
    _nvidia("rtx-a2000-12gb", "RTX A2000 12GB", _GA10X_PRO, 12 * GIB, 288, 7.99, "rtx-a2000-12-gb.c3853"),
    _nvidia("rtx-a4000", "RTX A4000", _GA10X_PRO, 16 * GIB, 448, 19.17, "rtx-a4000.c3756"),
    _nvidia("rtx-a4500", "RTX A4500", _GA10X_PRO, 20 * GIB, 640, 23.65, "rtx-a4500.c3849"),
    _nvidia("rtx-a5000", "RTX A5000", _GA10X_PRO, 24 * GIB, 768, 27.77, "rtx-a5000.c3748"),
    _nvidia("rtx-a5500", "RTX A5500", _GA10X_PRO, 24 * GIB, 768, 34.1, "rtx-a5500.c3901"),
    _nvidia("rtx-a6000", "RTX A6000", _GA10X_PRO, 48 * GIB, 768, 38.71, "rtx-a6000.c3686"),
    _nvidia("a2", "A2", _GA10X_PRO, 15356 * MIB, 200, 4.53, _DC + "products/a2/", note=_ECC),
    _nvidia("a10", "A10", _GA10X_PRO, 23028 * MIB, 600, 31.24, _DC + "products/a10-gpu/", note=_ECC),
    _nvidia("a10g", "A10G", _Chip("ampere", (8, 6)), 23028 * MIB, 600, 31.52, "a10g.c3798",
            note=_ECC + "; the matrix rates of this cloud card are not published"),
    _nvidia("a16", "A16", _GA10X_PRO, 15356 * MIB, 200, 4.49, _DC + "products/a16-gpu/",
            note="one of the board's four GPUs; " + _ECC),
    _nvidia("a40", "A40", _GA10X_PRO, 46068 * MIB, 696, 37.42, _DC + "a40/", note=_ECC),
    _nvidia("a30", "A30", _GA100, 24 * GIB, 933, Rates(10.3, 165, 165, None, 330), _DC + "products/a30-gpu/"),
    _nvidia("a100-pcie-40gb", "A100-PCIE-40GB", _GA100, 40 * GIB, 1555, Rates(19.5, 312, 312, None, 624),
            _DC + "a100/"),
    _nvidia("a100-pcie-80gb", "A100 80GB PCIe", _GA100, 80 * GIB, 1935, Rates(19.5, 312, 312, None, 624),
            _DC + "a100/"),
    _nvidia("a100-sxm-40gb", "A100-SXM4-40GB", _GA100, 40 * GIB, 1555, Rates(19.5, 312, 312, None, 624),
            _DC + "a100/"),
    _nvidia("a100-sxm-80gb", "A100-SXM4-80GB", _GA100, 80 * GIB, 2039, Rates(19.5, 312, 312, None, 624),
            _DC + "a100/"),
    _nvidia("jetson-orin-nano", "Jetson Orin Nano 8GB", _GA10B, 8 * GIB, 68, 1.28, "jetson-orin-nano-8-gb.c4082",
            unified=True, note="before the Super clocks"),
    _nvidia("jetson-orin-nano-super", "Jetson Orin Nano Super", _GA10B, 8 * GIB, 102, 2.09,
            "jetson-orin-nano-super.c4377", unified=True),
    _nvidia("jetson-orin-nx-8gb", "Jetson Orin NX 8GB", _GA10B, 8 * GIB, 102, 1.57, "jetson-orin-nx-8-gb.c4081",
            unified=True),
    _nvidia("jetson-orin-nx-16gb", "Jetson Orin NX 16GB", _GA10B, 16 * GIB, 102, 1.88, "jetson-orin-nx-16-gb.c4086",
            unified=True),
    _nvidia("jetson-agx-orin-32gb", "Jetson AGX Orin 32GB", _GA10B, 32 * GIB, 205, 3.33,
            "jetson-agx-orin-32-gb.c4084", unified=True),
    _nvidia("jetson-agx-orin-64gb", "Jetson AGX Orin 64GB", _GA10B, 64 * GIB, 205, 5.33,
            "jetson-agx-orin-64-gb.c4085", unified=True),
    # Ada
    _nvidia("rtx4060", "GeForce RTX 4060", _AD10X, 8 * GIB, 272, 15.11, "geforce-rtx-4060.c4107"),
    _nvidia("rtx4060ti-8gb", "GeForce RTX 4060 Ti 8GB", _AD10X, 8 * GIB, 288, 22.06, "geforce-rtx-4060-ti-8-gb.c3890"),
    _nvidia("rtx4060ti-16gb", "GeForce RTX 4060 Ti 16GB", _AD10X, 16 * GIB, 288, 22.06,
            "geforce-rtx-4060-ti-16-gb.c4155"),
    _nvidia("rtx4070", "GeForce RTX 4070", _AD10X, 12 * GIB, 504, 29.15, "geforce-rtx-4070.c3924",
            note="the GDDR6X card; the GDDR6 one has 480 GB/s under the same name"),
    _nvidia("rtx4070super", "GeForce RTX 4070 SUPER", _AD10X, 12 * GIB, 504, 35.48, "geforce-rtx-4070-super.c4186"),
    _nvidia("rtx4070ti", "GeForce RTX 4070 Ti", _AD10X, 12 * GIB, 504, 40.09, "geforce-rtx-4070-ti.c3950"),
    _nvidia("rtx4070tisuper", "GeForce RTX 4070 Ti SUPER", _AD10X, 16 * GIB, 672, 44.1,
            "geforce-rtx-4070-ti-super.c4187"),
    _nvidia("rtx4080", "GeForce RTX 4080", _AD10X, 16 * GIB, 716.8, 48.74, "geforce-rtx-4080.c3888"),
    _nvidia("rtx4080super", "GeForce RTX 4080 SUPER", _AD10X, 16 * GIB, 736, 52.22, "geforce-rtx-4080-super.c4182"),
    _nvidia("rtx4090d", "GeForce RTX 4090 D", _AD10X, 24 * GIB, 1008, 73.54, "geforce-rtx-4090-d.c4189"),
    _nvidia("rtx4090", "GeForce RTX 4090", _AD10X, 24 * GIB, 1008, 82.58, "geforce-rtx-4090.c3889"),
    _nvidia("rtx2000-ada", "RTX 2000 Ada Generation", _AD10X_PRO, 16 * GIB, 224, 12.0,
            _NV + "products/workstations/rtx-2000/"),
    _nvidia("rtx4000-sff-ada", "RTX 4000 SFF Ada Generation", _AD10X_PRO, 20 * GIB, 280, 19.17,
            "rtx-4000-sff-ada-generation.c4139"),
    _nvidia("rtx4000-ada", "RTX 4000 Ada Generation", _AD10X_PRO, 20 * GIB, 360, 26.73,
            "rtx-4000-ada-generation.c4171"),
    _nvidia("rtx4500-ada", "RTX 4500 Ada Generation", _AD10X_PRO, 24 * GIB, 432, 39.63,
            "rtx-4500-ada-generation.c4172"),
    _nvidia("rtx5000-ada", "RTX 5000 Ada Generation", _AD10X_PRO, 32 * GIB, 576, 65.28,
            "rtx-5000-ada-generation.c4152"),
    _nvidia("rtx6000-ada", "RTX 6000 Ada Generation", _AD10X_PRO, 48 * GIB, 960, 91.06,
            "rtx-6000-ada-generation.c3933"),
    _nvidia("l4", "L4", _AD10X_PRO, 23034 * MIB, 300, 30.3, _DC + "l4/", note=_ECC),
    _nvidia("l20", "L20", _Chip("ada", (8, 9)), 46068 * MIB, 864, Rates(59.35, 119.5, 119.5, 239, 239), "l20.c4206",
            note=_ECC),
    _nvidia("l40", "L40", _Chip("ada", (8, 9)), 46068 * MIB, 864, Rates(90.5, 181, 181, 362, 362), _DC + "l40/",
            note=_ECC),
    _nvidia("l40s", "L40S", _Chip("ada", (8, 9)), 46068 * MIB, 864, Rates(91.6, 362, 362, 733, 733), _DC + "l40s/",
            note=_ECC),
    # Hopper
    _nvidia("h20", "H20", _GH100, 96 * GIB, 4000, Rates(44, 148, 148, 296, 296),
            "https://huggingface.co/hardware/h20"),
    _nvidia("h100-pcie", "H100 PCIe", _GH100, 80 * GIB, 2039, Rates(51.2, 756, 756, 1513, 1513), _DC + "h100/"),
    _nvidia("h100-sxm", "H100 80GB HBM3", _GH100, 80 * GIB, 3350, Rates(67, 989, 989, 1979, 1979), _DC + "h100/",
            also=("h100",), note="`h100` alone means this one"),
    _nvidia("h100-nvl", "H100 NVL", _GH100, 94 * GIB, 3938, Rates(60, 835.5, 835.5, 1671, 1671), _DC + "h100/"),
    _nvidia("h200", "H200", _GH100, 143771 * MIB, 4800, Rates(67, 989, 989, 1979, 1979), _DC + "h200/",
            also=("h200-sxm", "H200 SXM 141GB"), note="sold as 141 GB"),
    _nvidia("h200-nvl", "H200 NVL", _GH100, 143771 * MIB, 4800, Rates(60, 835.5, 835.5, 1671, 1671), _DC + "h200/",
            note="sold as 141 GB"),
    _nvidia("gh200-96gb", "GH200 480GB", _GH100, 96 * GIB, 4000, Rates(67, 990, 990, 1979, 1979),
            _DC + "grace-hopper-superchip/", also=("GH200 120GB",),
            note="HBM3; the size in the driver's name is the CPU's memory"),
    _nvidia("gh200-144gb", "GH200 144G HBM3e", _GH100, 144 * GIB, 4900, Rates(67, 990, 990, 1979, 1979),
            _DC + "grace-hopper-superchip/"),
    # Blackwell, data centre
    _nvidia("b100", "B100", _GB100, 183359 * MIB, 8000, Rates(60, 1750, 1750, 3500, 3500), _DC + "hgx/",
            note="announced, hardly sold; memory taken as the B200's"),
    _nvidia("b200", "B200", _GB100, 183359 * MIB, 7672, Rates(75, 2250, 2250, 4500, 4500), _DC + "hgx/",
            also=("B200 SXM 180GB",), note="sold as 180 GB; 7680 of the 8192 memory lines are on, hence not 8000 GB/s"),
    _nvidia("gb200", "GB200", _GB100, 189471 * MIB, 8000, Rates(80, 2500, 2500, 5000, 5000), _DC + "gb200-nvl72/",
            note="sold as 186 GB"),
    _nvidia("b300", "B300 SXM6 AC", _GB110, 275040 * MIB, 8000, Rates(75, 2250, 2250, 4500), _DC + "hgx/",
            also=("b300",), note="sold as 288 GB; int8 left out: far below the B200's, and sources disagree"),
    _nvidia("gb300", "GB300", _GB110, 284208 * MIB, 8000, Rates(80, 2500, 2500, 5000), _DC + "gb300-nvl72/",
            note="sold as 288 GB; int8 left out, as for the B300"),
    _nvidia("jetson-thor", "Thor", _THOR, 128 * GIB, 273, Rates(8.06, 258, 258, 517),
            _NV + "autonomous-machines/embedded-systems/jetson-thor/", also=("jetson agx thor", "jetson t5000"),
            unified=True, note="f16 taken as half the published fp8 rate; int8 not known"),
    # Blackwell, desktop
    _nvidia("rtx5050", "GeForce RTX 5050", _GB20X, 8 * GIB, 320, 13.17, "geforce-rtx-5050.c4220"),
    _nvidia("rtx5060", "GeForce RTX 5060", _GB20X, 8 * GIB, 448, 19.18, "geforce-rtx-5060.c4219"),
    _nvidia("rtx5060ti-8gb", "GeForce RTX 5060 Ti 8GB", _GB20X, 8 * GIB, 448, 23.7, "geforce-rtx-5060-ti-8-gb.c4246"),
    _nvidia("rtx5060ti-16gb", "GeForce RTX 5060 Ti 16GB", _GB20X, 16 * GIB, 448, 23.7,
            "geforce-rtx-5060-ti-16-gb.c4292"),
    _nvidia("rtx5070", "GeForce RTX 5070", _GB20X, 12 * GIB, 672, 30.87, "geforce-rtx-5070.c4218"),
    _nvidia("rtx5070ti", "GeForce RTX 5070 Ti", _GB20X, 16 * GIB, 896, 43.94, "geforce-rtx-5070-ti.c4243"),
    _nvidia("rtx5080", "GeForce RTX 5080", _GB20X, 16 * GIB, 960, 56.28, "geforce-rtx-5080.c4217"),
    _nvidia("rtx5090", "GeForce RTX 5090", _GB20X, 32 * GIB, 1792, 104.77, "geforce-rtx-5090.c4216"),
    _nvidia("rtx5090d", "GeForce RTX 5090 D", _Chip("blackwell", (12, 0)), 32 * GIB, 1792, 104.77,
            "geforce-rtx-5090-d.c4253", note="matrix rates cut for export by an unpublished amount per type"),
    _nvidia("rtx-pro-2000", "RTX PRO 2000 Blackwell", _Chip("blackwell", (12, 0)), 16 * GIB, 288, 17.03,
            "rtx-pro-2000-blackwell.c4330", note=_GB203_PRO),
    _nvidia("rtx-pro-4000-sff", "RTX PRO 4000 Blackwell SFF Edition", _Chip("blackwell", (12, 0)), 24 * GIB, 432,
            25.66, "rtx-pro-4000-blackwell-sff.c4329", note=_GB203_PRO),
    _nvidia("rtx-pro-4000", "RTX PRO 4000 Blackwell", _Chip("blackwell", (12, 0)), 24 * GIB, 672, 36.83,
            "rtx-pro-4000-blackwell.c4279", note=_GB203_PRO),
    _nvidia("rtx-pro-4500", "RTX PRO 4500 Blackwell", _Chip("blackwell", (12, 0)), 32 * GIB, 896, 50.53,
            "rtx-pro-4500-blackwell.c4278", note=_GB203_PRO),
    _nvidia("rtx-pro-5000-48gb", "RTX PRO 5000 Blackwell", _Chip("blackwell", (12, 0)), 48 * GIB, 1344, 66.94,
            "rtx-pro-5000-blackwell.c4276", also=("rtx-pro-5000",),
            note=_GB203_PRO + "; `rtx-pro-5000` alone means this, the first one"),
    _nvidia("rtx-pro-5000-72gb", "RTX PRO 5000 72GB Blackwell", _Chip("blackwell", (12, 0)), 72 * GIB, 1344, 66.94,
            "rtx-pro-5000-72-gb-blackwell.c4357", note=_GB203_PRO),
    _nvidia("rtx-pro-6000", "RTX PRO 6000 Blackwell Workstation Edition", _GB202_PRO, 96 * GIB, 1792, 125.95,
            "rtx-pro-6000-blackwell.c4272", also=("RTX PRO 6000 Blackwell",)),
    _nvidia("rtx-pro-6000-max-q", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", _GB202_PRO, 96 * GIB, 1792,
            109.7, "rtx-pro-6000-blackwell-max-q.c4273"),
    _nvidia("rtx-pro-6000-server", "RTX PRO 6000 Blackwell Server Edition", _GB202_PRO, 96 * GIB, 1597, 120,
            _DC + "rtx-pro-6000-blackwell-server-edition/"),
    _nvidia("gb10", "GB10", _GB20B, 119 * GIB, 273, 29.71, _NV + "products/workstations/dgx-spark/",
            also=("dgx spark", "spark"), unified=True,
            note="128 GB fitted, of which the system sees about 119 GiB; matrix rates left out: the published figure"
                 " is sparse fp4, and measured f16 does not tell which share of it remains"),

    # AMD GCN and RDNA
    _amd("vega56", "Radeon RX Vega 56", _VEGA10, 8 * GIB, 410, 10.54, "radeon-rx-vega-56.c2993", also=("RX Vega 56",)),
    _amd("vega64", "Radeon RX Vega 64", _VEGA10, 8 * GIB, 484, 12.66, "radeon-rx-vega-64.c2871", also=("RX Vega 64",)),
    _amd("radeon-vii", "Radeon VII", _VEGA20, 16 * GIB, 1024, 13.44, "radeon-vii.c3358"),
    _amd("radeon-pro-vii", "Radeon Pro VII", _VEGA20, 16 * GIB, 1024, 13.06, "radeon-pro-vii.c3575"),
    _amd("rx5500xt-4gb", "Radeon RX 5500 XT 4GB", _NAVI14, 4 * GIB, 224, 5.2, "radeon-rx-5500-xt.c3468"),
    _amd("rx5500xt-8gb", "Radeon RX 5500 XT 8GB", _NAVI14, 8 * GIB, 224, 5.2, "radeon-rx-5500-xt.c3468",
         note="the page describes the 4 GB card; only the memory differs"),
    _amd("rx5600xt", "Radeon RX 5600 XT", _NAVI10, 6 * GIB, 288, 7.19, "radeon-rx-5600-xt.c3474"),
    _amd("rx5700", "Radeon RX 5700", _NAVI10, 8 * GIB, 448, 7.95, "radeon-rx-5700.c3437"),
    _amd("rx5700xt", "Radeon RX 5700 XT", _NAVI10, 8 * GIB, 448, 9.75, "radeon-rx-5700-xt.c3339"),
    _amd("rx6500xt", "Radeon RX 6500 XT", _rdna2("gfx1034"), 4 * GIB, 144, 5.77, "radeon-rx-6500-xt.c3850"),
    _amd("rx6600", "Radeon RX 6600", _rdna2("gfx1032"), 8 * GIB, 224, 8.93, "radeon-rx-6600.c3696"),
    _amd("rx6600xt", "Radeon RX 6600 XT", _rdna2("gfx1032"), 8 * GIB, 256, 10.6, "radeon-rx-6600-xt.c3774"),
    _amd("rx6650xt", "Radeon RX 6650 XT", _rdna2("gfx1032"), 8 * GIB, 280, 10.79, "radeon-rx-6650-xt.c3898"),
    _amd("rx6700", "Radeon RX 6700", _rdna2("gfx1031"), 10 * GIB, 320, 11.29, "radeon-rx-6700.c3716"),
    _amd("rx6700xt", "Radeon RX 6700 XT", _rdna2("gfx1031"), 12 * GIB, 384, 13.21, "radeon-rx-6700-xt.c3695"),
    _amd("rx6750xt", "Radeon RX 6750 XT", _rdna2("gfx1031"), 12 * GIB, 432, 13.31, "radeon-rx-6750-xt.c3879"),
    _amd("rx6800", "Radeon RX 6800", _rdna2("gfx1030"), 16 * GIB, 512, 16.17, "radeon-rx-6800.c3713"),
    _amd("rx6800xt", "Radeon RX 6800 XT", _rdna2("gfx1030"), 16 * GIB, 512, 20.74, "radeon-rx-6800-xt.c3694"),
    _amd("rx6900xt", "Radeon RX 6900 XT", _rdna2("gfx1030"), 16 * GIB, 512, 23.04, "radeon-rx-6900-xt.c3481"),
    _amd("rx6950xt", "Radeon RX 6950 XT", _rdna2("gfx1030"), 16 * GIB, 576, 23.65, "radeon-rx-6950-xt.c3875"),
    _amd("w6600", "Radeon PRO W6600", _rdna2("gfx1032"), 8 * GIB, 224, 9.25, "radeon-pro-w6600.c3818"),
    _amd("w6800", "Radeon PRO W6800", _rdna2("gfx1030"), 32 * GIB, 512, 17.83, "radeon-pro-w6800.c3809"),
    _amd("rx7600", "Radeon RX 7600", _rdna3("gfx1102"), 8 * GIB, 288, 21.75, "radeon-rx-7600.c4153"),
    _amd("rx7600xt", "Radeon RX 7600 XT", _rdna3("gfx1102"), 16 * GIB, 288, 22.57, "radeon-rx-7600-xt.c4190"),
    _amd("rx7700xt", "Radeon RX 7700 XT", _rdna3("gfx1101"), 12 * GIB, 432, 35.17, "radeon-rx-7700-xt.c3911"),
    _amd("rx7800xt", "Radeon RX 7800 XT", _rdna3("gfx1101"), 16 * GIB, 624, 37.32, "radeon-rx-7800-xt.c3839"),
    _amd("rx7900gre", "Radeon RX 7900 GRE", _rdna3("gfx1100"), 16 * GIB, 576, 45.98, "radeon-rx-7900-gre.c4166"),
    _amd("rx7900xt", "Radeon RX 7900 XT", _rdna3("gfx1100"), 20 * GIB, 800, 51.48, "radeon-rx-7900-xt.c3912"),
    _amd("rx7900xtx", "Radeon RX 7900 XTX", _rdna3("gfx1100"), 24 * GIB, 960, 61.39, "radeon-rx-7900-xtx.c3941"),
    _amd("w7600", "Radeon PRO W7600", _rdna3("gfx1102"), 8 * GIB, 288, 19.99, "radeon-pro-w7600.c4169"),
    _amd("w7700", "Radeon PRO W7700", _rdna3("gfx1101"), 16 * GIB, 576, 31.95, "radeon-pro-w7700.c4184"),
    _amd("w7800-32gb", "Radeon PRO W7800", _rdna3("gfx1100"), 32 * GIB, 576, 45.25, "radeon-pro-w7800.c4148",
         also=("w7800",), note="`w7800` alone means this, the first one"),
    _amd("w7800-48gb", "Radeon PRO W7800 48GB", _rdna3("gfx1100"), 48 * GIB, 864, 45.25,
         "radeon-pro-w7800-48-gb.c4252"),
    _amd("w7900", "Radeon PRO W7900", _rdna3("gfx1100"), 48 * GIB, 864, 61.32, "radeon-pro-w7900.c4147"),
    _amd("8060s", "Radeon 8060S Graphics", _rdna3("gfx1151", "rdna3.5"), 128 * GIB, 256, 29.7,
         "radeon-8060s.c4270", also=("strix halo", "ryzen ai max 395", "ryzen ai max+ 395"), unified=True,
         note="Strix Halo; f32 with dual issue, which the page leaves out; the largest memory sold, of which the GPU's"
              " share is set in firmware or by the kernel"),
    _amd("rx9060xt-8gb", "Radeon RX 9060 XT 8GB", _rdna4("gfx1200"), 8 * GIB, 320, 25.64,
         "radeon-rx-9060-xt-8-gb.c4251"),
    _amd("rx9060xt-16gb", "Radeon RX 9060 XT 16GB", _rdna4("gfx1200"), 16 * GIB, 320, 25.64,
         "radeon-rx-9060-xt-16-gb.c4293"),
    _amd("rx9070gre", "Radeon RX 9070 GRE", _rdna4("gfx1201"), 12 * GIB, 432, 34.28, "radeon-rx-9070-gre.c4291"),
    _amd("rx9070", "Radeon RX 9070", _rdna4("gfx1201"), 16 * GIB, 640, 36.13, "radeon-rx-9070.c4250"),
    _amd("rx9070xt", "Radeon RX 9070 XT", _rdna4("gfx1201"), 16 * GIB, 640, 48.66, "radeon-rx-9070-xt.c4229"),
    _amd("r9700", "Radeon AI PRO R9700", _rdna4("gfx1201"), 32 * GIB, 640, 47.84, "radeon-ai-pro-r9700.c4290"),
    # AMD Instinct
    _amd("mi50-16gb", "Instinct MI50", _VEGA20, 16 * GIB, 1024, 13.41, "radeon-instinct-mi50.c3335",
         note="`mi50` alone means this, the common one"),
    _amd("mi50-32gb", "Instinct MI50 32GB", _VEGA20, 32 * GIB, 1024, 13.41, "radeon-instinct-mi50.c3335",
         note="the page describes the 16 GB card; only the memory differs"),
    _amd("mi60", "Instinct MI60", _VEGA20, 32 * GIB, 1024, 14.75, "radeon-instinct-mi60.c3233"),
    _amd("mi100", "Instinct MI100", _CDNA1, 32 * GIB, 1229, Rates(23.1, 184.6, 92.3, None, 184.6),
         "radeon-instinct-mi100.c3496"),
    _amd("mi210", "Instinct MI210", _CDNA2, 64 * GIB, 1638, Rates(22.6, 181, 181, None, 181),
         _INSTINCT + "mi200/mi210.html"),
    _amd("mi250", "Instinct MI250", _CDNA2, 64 * GIB, 1638, Rates(22.6, 181, 181, None, 181),
         _INSTINCT + "mi200/mi250.html", note=_GCD),
    _amd("mi250x", "Instinct MI250X", _CDNA2, 64 * GIB, 1638, Rates(23.9, 191.5, 191.5, None, 191.5),
         _INSTINCT + "mi200/mi250x.html", note=_GCD),
    _amd("mi300a", "Instinct MI300A", _CDNA3, 128 * GIB, 5300, Rates(122.6, 980.6, 980.6, 1961, 1961),
         _INSTINCT + "mi300/mi300a.html", unified=True),
    _amd("mi300x", "Instinct MI300X", _CDNA3, 192 * GIB, 5300, Rates(163.4, 1307, 1307, 2615, 2615),
         _INSTINCT + "mi300/mi300x.html", also=("MI300X OAM", "MI300X VF")),
    _amd("mi325x", "Instinct MI325X", _CDNA3, 256 * GIB, 6000, Rates(163.4, 1307, 1307, 2615, 2615),
         _INSTINCT + "mi300/mi325x.html", also=("MI325X OAM",)),
    _amd("mi350x", "Instinct MI350X", _CDNA4, 288 * GIB, 8000, Rates(144.2, 2307, 2307, 4614, 4614),
         _INSTINCT + "mi350/mi350x.html", also=("MI350X OAM",)),
    _amd("mi355x", "Instinct MI355X", _CDNA4, 288 * GIB, 8000, Rates(157.3, 2517, 2517, 5033, 5033),
         _INSTINCT + "mi350/mi355x.html", also=("MI355X OAM",)),

    # Apple: the largest memory sold with the chip; say m4-max:64 for another
    _apple("m1", "M1", 16 * GIB, 68.25, 2.6, _WIKI + "Apple_M1"),
    _apple("m1-pro", "M1 Pro", 32 * GIB, 204.8, 5.2, _WIKI + "Apple_M1"),
    _apple("m1-max", "M1 Max", 64 * GIB, 409.6, 10.4, _WIKI + "Apple_M1"),
    _apple("m1-ultra", "M1 Ultra", 128 * GIB, 819.2, 20.8, _WIKI + "Apple_M1"),
    _apple("m2", "M2", 24 * GIB, 102.4, 3.6, _WIKI + "Apple_M2"),
    _apple("m2-pro", "M2 Pro", 32 * GIB, 204.8, 6.8, _WIKI + "Apple_M2"),
    _apple("m2-max", "M2 Max", 96 * GIB, 409.6, 13.6, _WIKI + "Apple_M2"),
    _apple("m2-ultra", "M2 Ultra", 192 * GIB, 819.2, 27.2, _WIKI + "Apple_M2"),
    _apple("m3", "M3", 24 * GIB, 102.4, None, _WIKI + "Apple_M3", note=_NO_F32),
    _apple("m3-pro", "M3 Pro", 36 * GIB, 153.6, None, _WIKI + "Apple_M3", note=_NO_F32),
    _apple("m3-max", "M3 Max", 128 * GIB, 409.6, None, _WIKI + "Apple_M3", also=("M3 Max (40-core GPU)",),
           note="40 GPU cores; " + _NO_F32),
    _apple("m3-max-30core", "M3 Max (30-core GPU)", 96 * GIB, 307.2, None, _WIKI + "Apple_M3", note=_NO_F32),
    _apple("m3-ultra", "M3 Ultra", 512 * GIB, 819.2, None, _WIKI + "Apple_M3", note=_NO_F32),
    _apple("m4", "M4", 32 * GIB, 120, None, _WIKI + "Apple_M4", note=_NO_F32),
    _apple("m4-pro", "M4 Pro", 64 * GIB, 273, None, _WIKI + "Apple_M4", note=_NO_F32),
    _apple("m4-max", "M4 Max", 128 * GIB, 546, None, _WIKI + "Apple_M4", also=("M4 Max (40-core GPU)",),
           note="40 GPU cores; " + _NO_F32),
    _apple("m4-max-32core", "M4 Max (32-core GPU)", 36 * GIB, 410, None, _WIKI + "Apple_M4", note=_NO_F32),
    _apple("m5", "M5", 32 * GIB, 153, None, _WIKI + "Apple_M5", note=_M5),
    _apple("m5-pro", "M5 Pro", 64 * GIB, 307, None, _WIKI + "Apple_M5", note=_M5),
    _apple("m5-max", "M5 Max", 128 * GIB, 614, None, _WIKI + "Apple_M5", also=("M5 Max (40-core GPU)",),
           note="40 GPU cores; " + _M5),
    _apple("m5-max-32core", "M5 Max (32-core GPU)", 36 * GIB, 460, None, _WIKI + "Apple_M5", note=_M5),
    _apple("m5-ultra", "M5 Ultra", 256 * GIB, 1200, None, "https://www.apple.com/mac-studio/specs/", note=_M5),

    # Intel
    _intel("arc-a380", "Arc A380", "xe-hpg", 6 * GIB, 186, 4.2, 66, "arc-a380.c3913"),
    _intel("arc-a580", "Arc A580", "xe-hpg", 8 * GIB, 512, 12.29, 197, "arc-a580.c3928"),
    _intel("arc-a750", "Arc A750", "xe-hpg", 8 * GIB, 512, 17.2, 229, "arc-a750.c3929"),
    _intel("arc-a770-8gb", "Arc A770 8GB", "xe-hpg", 8 * GIB, 512, 19.66, 262, "arc-a770.c3914",
           note="the page describes the 16 GB card"),
    _intel("arc-a770-16gb", "Arc A770 16GB", "xe-hpg", 16 * GIB, 560, 19.66, 262, "arc-a770.c3914",
           note="bandwidth as Intel prints it (17.5 Gbit/s); the page has the 8 GB card's 512"),
    _intel("arc-b570", "Arc B570", "xe2-hpg", 10 * GIB, 380, 11.52, 203, "arc-b570.c4245"),
    _intel("arc-b580", "Arc B580", "xe2-hpg", 12 * GIB, 456, 13.67, 233, "arc-b580.c4244"),
    _intel("arc-pro-b50", "Arc Pro B50", "xe2-hpg", 16 * GIB, 224, 10.65, 170, "arc-pro-b50.c4345"),
    _intel("arc-pro-b60", "Arc Pro B60", "xe2-hpg", 24 * GIB, 456, 12.28, 197, "arc-pro-b60.c4350"),
    _intel("arc-pro-b70", "Arc Pro B70", "xe2-hpg", 32 * GIB, 608, 22.94, 367,
           "https://zolotukhin.ai/zinc/docs/intel-gpu-reference/"),
)
# fmt: on


# --- look-up ---

_MEANINGLESS = {"nvidia", "geforce", "tesla", "amd", "ati", "radeon", "instinct", "apple", "intel"}
_MEANINGLESS |= {"corporation", "inc", "tm", "r", "graphics", "gpu", "generation"}
_SIZE_AT_END = re.compile(r"(.*[^\s_(-])[\s_(-]+([0-9]{1,4})\s*gi?b\)?\s*", re.IGNORECASE | re.DOTALL)
_MOST_SHOWN = 60  # characters of the user's text in a message


def find_gpu(text: str) -> Gpu:
    """The row that `text` means: "rtx3060:12", "RTX 3060", "NVIDIA GeForce RTX 3060", "4090", "m4-max:64".

    Case, vendor words, spaces and dashes do not count. `:GiB` (a whole or decimal number) picks the row among cards
    sold in several sizes and sets `memory_bytes` to exactly that, so a modded card or a vGPU slice can be named too.

    Raises:
        UsageError: no such row, several rows and no size to choose by, or a size that makes no sense.
    """
    name, colon, size = text.partition(":")
    rows = _rows(name)
    if not rows and not colon and (spelt := _SIZE_AT_END.fullmatch(name[:200])):  # "RTX 3060 12GB", "v100-16gb"
        rows, colon, size = _rows(spelt[1]), ":", spelt[2]
    if not rows:
        raise _unknown(text)
    if colon:
        wanted = _size_bytes(size, rows, text)
        best = min(rows, key=lambda row: abs(row.memory_bytes - wanted))
        return dataclasses.replace(best, memory_bytes=wanted)
    default = _BY_KEY.get(_key(name))
    if default is None:
        raise UsageError(
            f"{_shown(text)} was sold with several memory sizes",
            why=f"the table has {', '.join(row.name for row in rows)}",
            do="say " + " or ".join(f"{row.family}:{_nominal_gib(row)}" for row in rows),
        )
    return default


def known_gpu(seen: str, total_bytes: int | None) -> Gpu | None:
    """The row for a driver's own name and memory; None when the table has none. Never the nearest name.

    The driver's memory wins over the row's. A name shared by several rows ("NVIDIA GeForce RTX 4060 Ti") needs it.
    """
    rows = _rows(seen)
    if total_bytes is None:
        return _BY_KEY.get(_key(seen))
    if not rows:
        return None
    best = min(rows, key=lambda row: abs(row.memory_bytes - total_bytes))
    return dataclasses.replace(best, memory_bytes=total_bytes)


def _rows(name: str) -> tuple[Gpu, ...]:
    """The rows that differ from each other only in memory (and what comes with it); empty when none is meant."""
    key = _key(name)
    if key in _FAMILIES:
        return _FAMILIES[key]
    row = _BY_KEY.get(key)
    return (row,) if row else ()


def _size_bytes(size: str, rows: tuple[Gpu, ...], text: str) -> int:
    """GiB as the user wrote it → bytes, exactly (a fraction of a byte is dropped)."""
    do = f"write NAME:GiB, such as {rows[0].family}:{_nominal_gib(rows[0])}"
    what = f"{_shown(text)}: the memory size makes no sense"
    stripped = size.strip()
    if not re.fullmatch(r"[+-]?([0-9]{1,6}(\.[0-9]{0,9})?|\.[0-9]{1,9})", stripped):
        raise UsageError(what, why=f"{_shown(size)} is not a number of GiB", do=do)
    gib = Fraction(stripped.rstrip(".") if stripped.endswith(".") else stripped)
    if gib <= 0:
        raise UsageError(what, why=f"{stripped} GiB is not more than 0", do=do)
    if gib * 4 < 1:
        raise UsageError(what, why=f"{stripped} GiB is less than 0.25 GiB: no model fits", do=do)
    largest = max(row.memory_bytes for row in rows)
    if gib * GIB > 4 * largest:
        most = f"{_nominal_gib(max(rows, key=lambda row: row.memory_bytes))} GiB"
        raise UsageError(what, why=f"{stripped} GiB is more than four times the {most} this card has", do=do)
    return int(gib * GIB)


def _unknown(text: str) -> UsageError:
    key = _key(text.partition(":")[0])[:_MOST_SHOWN]
    keys: dict[str, str] = {k: row.name for k, row in _BY_KEY.items()} | {k: rows[0].family for k, rows in _FAMILIES.items()}
    near = dict.fromkeys(keys[k] for k in difflib.get_close_matches(key, keys, n=5, cutoff=0.6))
    nearest = f"the nearest names are {', '.join(list(near)[:3])}" if near else "and no name comes near"
    return UsageError(
        f"no GPU called {_shown(text)} in the table",
        why=f"{len(GPUS)} rows; {nearest} (laptop and vGPU versions are other cards: none is listed)",
        do="`python -m headwise.hardware.gpus` prints every row; NAME:GiB changes a row's memory",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…")


def _nominal_gib(row: Gpu) -> int:
    """Whole GiB to suggest after the colon; exact for cards named by their size."""
    named = re.search(r"-(\d+)gb$", row.name)
    return int(named[1]) if named else -(-row.memory_bytes // GIB)


def _key(text: str) -> str:
    words = re.findall(r"[a-z0-9.]+", text.lower()[:200])
    return "".join(word for word in words if word not in _MEANINGLESS)


def _spellings(row: Gpu) -> Iterable[str]:
    yield from (row.name, row.label, *row.also)
    if short := _short(row.name):
        yield short


def _short(name: str) -> str | None:
    """ "rtx4090" → "4090", "rtx-a6000" → "a6000", "arc-b580" → "b580"; None where the number alone says too little."""
    found = re.fullmatch(r"(?:rtx-?|gtx|rx|arc-)([ab]?\d{3,4}(?:[a-z]|-\d+gb)*)", name)
    return found[1] if found else None


def _index(rows: Iterable[Gpu]) -> tuple[dict[str, Gpu], dict[str, tuple[Gpu, ...]]]:
    by_key: dict[str, Gpu] = {}
    by_family: dict[str, list[Gpu]] = {}
    for row in rows:
        for spelling in _spellings(row):
            assert by_key.setdefault(_key(spelling), row) is row, f"{spelling!r} means two rows"
        by_family.setdefault(row.family, []).append(row)
    families: dict[str, tuple[Gpu, ...]] = {}
    for family, members in by_family.items():
        if len(members) > 1:
            default = by_key.get(_key(family))  # the row whose name, label or `also` is the bare name; its note says so
            for key in (_key(family), _key(_short(family) or family)):
                families[key] = tuple(members)
                if default:
                    by_key[key] = default
    for model, names in _SEVERAL.items():
        families[model] = tuple(row for row in rows if row.name in names)
    return by_key, families


# Models whose bare name spans several families: a size picks among these.
_SEVERAL = {
    "p100": ("p100-pcie-12gb", "p100-pcie-16gb"),
    "v100": ("v100-sxm2-16gb", "v100-sxm2-32gb"),
    "a100": ("a100-sxm-40gb", "a100-sxm-80gb"),
    "h100": ("h100-sxm", "h100-nvl"),
}
_BY_KEY, _FAMILIES = _index(GPUS)


# --- docs/gpus.md ---


def markdown() -> str:
    """The table as the docs page prints it."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:g}" if value < 1000 else f"{value:.0f}"

    lines = [
        "# GPUs",
        "",
        "Written by `python -m headwise.hardware.gpus`; edit `headwise/hardware/gpus.py` instead.",
        "",
        "Memory in GiB, as the driver reports it. Bandwidth in 10^9 bytes/s. Rates are dense, with fp32 sums, in",
        "TFLOP/s (int8: TOP/s); f32 is the vector unit. – means no such unit, or no figure we trust. Shared memory in",
        "KiB per block. `NAME:GiB` changes the memory of a row: `rtx3060:12`, `m4-max:64`.",
        "",
        "| name | card | arch | target | memory | GB/s | f32 | f16 | bf16 | fp8 | int8 | shared | source |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in GPUS:
        rates = row.tflops
        target = f"sm_{row.capability[0]}{row.capability[1]}" if row.capability else row.gfx or row.api
        cells = [
            f"`{row.name}`",
            row.label,
            row.arch,
            target,
            f"{row.memory_bytes / GIB:.4g}",
            number(row.bandwidth_gb_s),
            *(number(rate) for rate in (rates.f32, rates.f16, rates.bf16, rates.fp8, rates.int8)),
            number(None if row.smem_bytes is None else row.smem_bytes / KIB),
            f"[page]({row.source})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Notes", ""]
    lines += [f"- `{row.name}`: {row.note}" for row in GPUS if row.note]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
