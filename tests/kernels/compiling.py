"""Compiles kernels for cards that are not here: a driver that only says which card it is, and what ptxas said on the way."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
knobs.nvidia.dump_ptxas_log = True


class Report(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str  # of gfx cards the assembly


class Card:
    """What triton asks a driver while it compiles."""

    def __init__(self, card: int | str) -> None:
        self.card, self.target = card, GPUTarget("hip" if isinstance(card, str) else "cuda", card, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.card  # triton keeps what it compiled by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """Stands where a kernel stood: a launch compiles it for `card` (a compute capability, or a gfx name) and keeps the report."""

    def __init__(self, kernel: Any, card: int | str) -> None:
        self.kernel, self.card, self.reports = kernel, card, []

    def __getitem__(self, grid: object) -> Any:
        def launch(*args: object, **options: object) -> None:
            driver.set_active(Card(self.card))
            with redirect_stdout(io.StringIO()) as said:
                compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.reports.append(report(compiled, self.card, said.getvalue()))

        return launch


def report(compiled: Any, capability: int | str, said: str) -> Report:
    """`said`: by ptxas on the way; nothing where triton had the kernel in its cache, or this process compiled it before."""
    if isinstance(capability, str):
        text = compiled.asm["amdgcn"]
        names = ("vgpr_count", "private_segment_fixed_size")
        registers, private = (int(re.findall(rf"\.{name}: +(\d+)", text)[0]) for name in names)
        return Report(registers, private, compiled.metadata.shared, text)
    kept = Path(knobs.cache.dir) / f"{compiled.hash}.ptxas"  # beside what triton keeps of the kernel
    if not said:
        arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
        said = kept.read_text() if kept.exists() else _ptxas(compiled.asm["ptx"], arch)
    kept.write_text(said)
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert registers, said
    return Report(int(registers[1]), max(map(int, spills), default=0), compiled.metadata.shared, compiled.asm["ptx"])


def _ptxas(ptx: str, arch: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        return subprocess.run([PTXAS, "-v", f"--gpu-name={arch}", f.name, "-o", "/dev/null"], capture_output=True, text=True).stderr
