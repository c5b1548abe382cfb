"""What this machine has: driver text → `Device`, and the memory the CPU may use.

NVIDIA  nvidia-smi, CSV. With MIG on, the slices instead of the card: `nvidia-smi -L` is the only list of them.
AMD     amd-smi, JSON; rocm-smi, JSON, where amd-smi is not installed.
Apple   sysctl and system_profiler.

A tool that is not installed means no such devices. A tool that is installed and fails is a ProbeError: a machine with a
broken driver is not a machine without a GPU. Devices hidden from a process by CUDA_VISIBLE_DEVICES are listed all the
same. Everything that touches the machine (`run`, `read`, `system`) is a parameter, so the tests need no GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headwise.errors import ProbeError
from headwise.hardware.gpus import GIB, KIB, MIB, Gpu, known_gpu

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device as its driver reports it. `gpu` is None when the table has no row for it: then nothing is assumed."""

    index: int  # the driver's; slices of one card share it
    gpu: Gpu | None
    seen: str  # the driver's own name
    total_bytes: int | None  # None: the driver does not say
    used_bytes: int | None  # held by anyone, now; None: the driver does not say
    driver: str  # version; "" when not told
    capability: tuple[int, int] | None = None  # CUDA compute capability as reported, for cards without a row too

    def __str__(self) -> str:
        return f"{self.index}: {self.seen} ({self.gpu.name if self.gpu else 'no table row'})"


@dataclass(frozen=True, slots=True)
class Output:
    code: int
    out: str
    err: str = ""

    @property
    def first_line(self) -> str:
        lines = [line.strip() for line in (self.out + "\n" + self.err).splitlines() if line.strip()]
        return lines[0][:300] if lines else f"exit status {self.code}, no message"


Run = Callable[[Sequence[str]], Output | None]  # None: the tool is not installed
Read = Callable[[str], str | None]  # None: no such file, or not ours to read
Memory = Callable[[], tuple[int, int]]


def run_tool(argv: Sequence[str], timeout_s: float = TIMEOUT_S) -> Output | None:
    """Run a driver's tool and wait at most `timeout_s` for it; None when it is not installed.

    Raises:
        ProbeError: it did not answer in time, or may not be executed.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"},
            start_new_session=True,  # a group of its own, so that a wrapper script's children end with it
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProbeError(
            f"{argv[0]} cannot be run", why=str(error), do=f"see whether `{' '.join(argv)}` works in a shell"
        ) from None
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        raise ProbeError(
            f"{argv[0]} did not answer in {timeout_s:g} s",
            why="a driver that hangs, or a GPU that fell off the bus, makes its tool wait",
            do=f"run `{' '.join(argv)}` in a shell; if it hangs there too, reboot",
        ) from None
    return Output(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the tool and what it started. One stuck inside the kernel is left behind: waiting would hang us too."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=1.0)


def read_file(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def detect(run: Run = run_tool, memory: Memory | None = None, system: str | None = None) -> tuple[Device, ...]:
    """Every GPU the drivers of this machine list; () when there is none.

    Args:
        memory: (total, available) of the system, for GPUs that share it; `cpu_memory` when not given.
        system: "Linux", "Darwin"; this machine's when not given.
    Raises:
        ProbeError: a driver's tool is installed and fails, hangs, or answers what we cannot read.
    """
    here = system or platform.system()
    shared = memory or (lambda: cpu_memory(run=run, system=here))
    if here == "Darwin":
        return _apple(run, shared)
    return (*_nvidia(run, shared), *_amd(run, shared))


# --- NVIDIA ---

_QUERY = ("index", "name", "memory.total", "memory.used", "driver_version", "compute_cap")
_INFOROM_CORRUPT = 14  # nvidia-smi's exit status for a warning: the answer is complete
_MIG = {(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)}  # compute capabilities of which some card can be sliced
_NVIDIA_TROUBLE = (  # (what the tool says, what to do about it)
    (
        "Driver/library version mismatch",
        "reboot: the driver's library was upgraded while its old kernel module is still loaded",
    ),
    (
        "couldn't communicate with the NVIDIA driver",
        "`sudo modprobe nvidia`; if that fails, reinstall the driver for the running kernel (`uname -r`)",
    ),
    (
        "Failed to initialize NVML: Unknown Error",
        "in a container: restart it (it lost its device files); else reboot",
    ),
    ("Insufficient Permissions", "give this user or container access to /dev/nvidia*"),
    ("GPU is lost", "reboot: the card fell off the bus; if it comes back, look at its power and riser"),
    ("Unable to determine the device handle", "reboot: a card fell off the bus; look at its power and riser"),
)


def _nvidia(run: Run, memory: Memory) -> tuple[Device, ...]:
    query = _QUERY
    output = run(_nvidia_command(query))
    if output is not None and output.code != 0 and "not a valid field" in output.out + output.err:
        query = _QUERY[:-1]  # drivers before 470 do not know compute_cap
        output = run(_nvidia_command(query))
    if output is None or "No devices were found" in output.out + output.err:
        return ()
    if output.code not in (0, _INFOROM_CORRUPT):
        raise _trouble("nvidia-smi", output, _NVIDIA_TROUBLE)
    devices: list[Device] = []
    for line in output.out.splitlines():
        if not line.strip() or line.startswith("WARNING"):
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(query) or not re.fullmatch("[0-9]{1,4}", cells[0]):
            raise _trouble("nvidia-smi", Output(0, line), _NVIDIA_TROUBLE)
        devices.append(_nvidia_device(cells, memory))
    if any(device.capability in _MIG for device in devices):
        listing = run(("nvidia-smi", "-L"))
        if listing is None or listing.code != 0:
            raise _trouble("nvidia-smi -L", listing or Output(127, "gone since the last call"), _NVIDIA_TROUBLE)
        return _with_slices(devices, listing.out)
    return tuple(devices)


def _nvidia_command(query: Sequence[str]) -> tuple[str, ...]:
    return ("nvidia-smi", "--query-gpu=" + ",".join(query), "--format=csv,noheader,nounits")


def _nvidia_device(cells: list[str], memory: Memory) -> Device:
    index, seen, total, used, driver = cells[:5]
    total_bytes, used_bytes = _mib(total), _mib(used)
    found = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", cells[5]) if len(cells) > 5 else None
    capability = (int(found[1]), int(found[2])) if found else None
    gpu = known_gpu(seen, total_bytes)
    if gpu and (gpu.vendor != "nvidia" or (capability and gpu.capability != capability)):
        gpu = None  # the name of one card, the chip of another
    if gpu and gpu.unified and total_bytes is None:
        total_bytes, used_bytes, gpu = _share(gpu, memory)
    return Device(
        index=int(index),
        gpu=gpu,
        seen=seen,
        total_bytes=total_bytes,
        used_bytes=used_bytes,
        driver=driver,
        capability=capability,
    )


def _mib(text: str) -> int | None:
    """ "24576" → bytes; "[N/A]", "[Not Supported]", "[Insufficient Permissions]" → None."""
    return int(text) * MIB if re.fullmatch("[0-9]{1,9}", text) else None


def _share(gpu: Gpu, memory: Memory) -> tuple[int, int, Gpu | None]:
    """Total and used bytes of a GPU that lives in the system's memory, and its row at that size."""
    total, available = memory()
    return total, total - available, known_gpu(gpu.name, total)


def _with_slices(devices: list[Device], listing: str) -> tuple[Device, ...]:
    """Put MIG slices in the place of the card they were cut from. Source: `nvidia-smi -L`."""
    slices: dict[int, list[str]] = {}
    card = -1
    for line in listing.splitlines():
        if found := re.match(r"GPU ([0-9]+):", line):
            card = int(found[1])
        elif found := re.match(r"\s+MIG (\S+)\s+Device\s+[0-9]+:", line):
            slices.setdefault(card, []).append(found[1])
    result: list[Device] = []
    for device in devices:
        for profile in slices.get(device.index, ()):
            result.append(
                Device(
                    index=device.index,
                    gpu=None,  # a slice has a share of the row's bandwidth and rates, by no published rule
                    seen=f"{device.seen} MIG {profile}",
                    total_bytes=None,
                    used_bytes=None,
                    driver=device.driver,
                    capability=device.capability,
                )
            )
        if device.index not in slices:
            result.append(device)
    return tuple(result)


# --- AMD ---

_AMD_NONE = ("amdgpu not found in modules", "No AMD GPUs", "No GPUs found", "No devices were found")
_AMD_TROUBLE = (
    ("Permission denied", "add this user to the groups render and video, then log in again"),
    ("not initialized", "`sudo modprobe amdgpu`; if that fails, reinstall the driver for the running kernel"),
    ("AMDSMI_STATUS", "`sudo modprobe amdgpu`, and use the amd-smi of the installed driver's release"),
)


def _amd(run: Run, memory: Memory) -> tuple[Device, ...]:
    static = _amd_json(run, ("amd-smi", "static", "--asic", "--vram", "--driver", "--json"))
    if static is not None:
        metric = _amd_json(run, ("amd-smi", "metric", "--mem-usage", "--json"))
        used = {_int(card.get("gpu")): _size(_in(card, "mem_usage", "used_vram")) for card in _cards(metric or [])}
        return tuple(
            _amd_device(
                index=position if (index := _int(card.get("gpu"))) is None else index,
                seen=str(_in(card, "asic", "market_name") or ""),
                gfx=str(_in(card, "asic", "target_graphics_version") or ""),
                total_bytes=_size(_in(card, "vram", "size")),
                used_bytes=used.get(_int(card.get("gpu"))),
                driver=str(_in(card, "driver", "version") or ""),
                memory=memory,
            )
            for position, card in enumerate(_cards(static))
        )
    command = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json")
    answer = _amd_json(run, command)
    if answer is None:
        return ()
    if not isinstance(answer, Mapping):
        raise _trouble("rocm-smi", Output(0, str(answer)), _AMD_TROUBLE)
    cards = cast("Mapping[str, Any]", answer)
    driver = str(_in(cards, "system", "Driver version") or "")
    devices: list[Device] = []
    for name, card in cards.items():
        if found := re.fullmatch("card([0-9]{1,4})", name):
            if not isinstance(card, Mapping):
                raise _trouble("rocm-smi", Output(0, f"{name}: {card}"), _AMD_TROUBLE)
            # "Card series" became "Card Series"
            facts = {str(key).lower(): value for key, value in cast("Mapping[str, Any]", card).items()}
            devices.append(
                _amd_device(
                    index=int(found[1]),
                    seen=str(facts.get("card series") or facts.get("card model") or ""),
                    gfx=str(facts.get("gfx version") or ""),
                    total_bytes=_int(facts.get("vram total memory (b)")),
                    used_bytes=_int(facts.get("vram total used memory (b)")),
                    driver=driver,
                    memory=memory,
                )
            )
    return tuple(sorted(devices, key=lambda device: device.index))


def _amd_device(
    *,
    index: int,
    seen: str,
    gfx: str,
    total_bytes: int | None,
    used_bytes: int | None,
    driver: str,
    memory: Memory,
) -> Device:
    name = seen
    if found := re.search(r"\[([^\]]+)\]", seen):  # "Navi 31 [Radeon RX 7900 XTX]", the PCI list's way
        name = found[1]
    gpu = known_gpu(name, total_bytes)
    if gpu and (gpu.vendor != "amd" or (gfx.startswith("gfx") and gpu.gfx != gfx.split(":")[0])):
        gpu = None  # the name of one card, the chip of another
    if gpu and gpu.unified and gpu.arch.startswith("rdna"):  # what the driver calls VRAM there is a carve-out
        total_bytes, used_bytes, gpu = _share(gpu, memory)
    return Device(
        index=index,
        gpu=gpu,
        seen=seen or "AMD GPU without a name",
        total_bytes=total_bytes,
        used_bytes=used_bytes,
        driver=driver,
    )


def _amd_json(run: Run, argv: Sequence[str]) -> object | None:
    """The tool's JSON; None when it is not installed, or says that there is no AMD GPU."""
    output = run(argv)
    if output is None or any(phrase in output.out + output.err for phrase in _AMD_NONE):
        return None
    start = re.search(r"[{\[]\s*[{\[\"}\]]", output.out)  # warnings come before the JSON, on the same stream
    if output.code != 0 or start is None:
        raise _trouble(argv[0], output, _AMD_TROUBLE)
    try:
        answer: object = json.JSONDecoder().raw_decode(output.out[start.start() :])[0]
    except (ValueError, RecursionError):
        raise _trouble(argv[0], output, _AMD_TROUBLE) from None
    return answer


def _cards(answer: object) -> list[Mapping[str, Any]]:
    """amd-smi's list of cards: bare before ROCm 7, under "gpu_data" since."""
    listed = cast("Mapping[str, Any]", answer).get("gpu_data") if isinstance(answer, Mapping) else answer
    if not isinstance(listed, list):
        raise _trouble("amd-smi", Output(0, str(answer)), _AMD_TROUBLE)
    return [cast("Mapping[str, Any]", card) for card in cast("list[object]", listed) if isinstance(card, Mapping)]


def _in(mapping: Mapping[str, Any], outer: str, inner: str) -> Any:
    found = mapping.get(outer)
    return cast("Mapping[str, Any]", found).get(inner) if isinstance(found, Mapping) else None


def _int(value: object) -> int | None:
    text = str(value).strip()
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _size(value: object) -> int | None:
    """{"value": 24560, "unit": "MB"} → bytes. amd-smi's MB are 2^20 bytes: a 24 GiB card reports 24560."""
    if not isinstance(value, Mapping):
        return None
    size = cast("Mapping[str, object]", value)
    scale = {"B": 1, "KB": KIB, "MB": MIB, "GB": GIB}.get(str(size.get("unit")))
    number = _int(size.get("value"))
    return None if number is None or scale is None else number * scale


# --- Apple ---


def _apple(run: Run, memory: Memory) -> tuple[Device, ...]:
    brand = run(("sysctl", "-n", "machdep.cpu.brand_string"))
    if brand is None or brand.code != 0 or not brand.out.startswith("Apple "):
        return ()  # an Intel Mac: nothing here runs on its GPU
    seen = brand.out.strip()
    cores = _apple_cores(run)
    total, available = memory()
    gpu = known_gpu(f"{seen} ({cores}-core GPU)", total)
    if gpu is None and known_gpu(f"{seen} (40-core GPU)", total) is None:  # else: two bandwidths under one chip name
        gpu = known_gpu(seen, total)
    version = run(("sw_vers", "-productVersion"))
    return (
        Device(
            index=0,
            gpu=gpu,
            seen=seen + (f" ({cores}-core GPU)" if cores else ""),
            total_bytes=total,
            used_bytes=total - available,
            driver="macOS " + version.out.strip() if version and version.code == 0 else "",
        ),
    )


def _apple_cores(run: Run) -> int | None:
    output = run(("system_profiler", "SPDisplaysDataType", "-json"))
    if output is None or output.code != 0:
        return None
    try:
        answer: object = json.loads(output.out)
    except ValueError:
        return None
    displays: object = cast("Mapping[str, object]", answer).get("SPDisplaysDataType") if isinstance(answer, dict) else 0
    for display in cast("list[object]", displays) if isinstance(displays, list) else ():
        if isinstance(display, Mapping) and (cores := _int(cast("Mapping[str, object]", display).get("sppci_cores"))):
            return cores
    return None


# --- the CPU's memory ---


def cpu_memory(run: Run = run_tool, read: Read = read_file, system: str | None = None) -> tuple[int, int]:
    """(total, available) bytes that this process may use: the machine's, or its control group's where that is less.

    Page cache counts as available, in a control group too: the kernel gives it up when asked.

    Raises:
        ProbeError: neither /proc/meminfo nor sysctl tells.
    """
    if (system or platform.system()) == "Darwin":
        return _mac_memory(run)
    meminfo = dict(re.findall(r"^(MemTotal|MemAvailable):\s+([0-9]+) kB", read("/proc/meminfo") or "", re.MULTILINE))
    if len(meminfo) != 2:
        raise ProbeError(
            "this machine does not say how much memory it has",
            why="/proc/meminfo has no MemTotal and MemAvailable",
            do="run on Linux (3.14 or later) or macOS, or name the memory yourself",
        )
    total, available = int(meminfo["MemTotal"]) * KIB, int(meminfo["MemAvailable"]) * KIB
    for limit, used in _group_limits(read):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, min(available, total)


def _mac_memory(run: Run) -> tuple[int, int]:
    """`kern.memorystatus_level` is the kernel's own "free percentage", the one that `memory_pressure` prints."""
    output = run(("sysctl", "-n", "hw.memsize", "kern.memorystatus_level"))
    numbers = output.out.split() if output and output.code == 0 else []
    if len(numbers) != 2 or _int(numbers[0]) is None or _int(numbers[1]) is None:
        raise ProbeError(
            "this machine does not say how much memory it has",
            why=output.first_line if output else "sysctl is not installed",
            do="run `sysctl -n hw.memsize kern.memorystatus_level` in a shell",
        )
    total = int(numbers[0])
    return total, total * min(100, int(numbers[1])) // 100


def _group_limits(read: Read) -> list[tuple[int, int]]:
    """(limit, bytes that cannot be given up) of this process's control group and each above it.

    Source: kernel documentation, cgroup-v2.rst "memory.max" and cgroup-v1/memory.rst "memory.limit_in_bytes".
    """
    limits: list[tuple[int, int]] = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        if parts[1] == "":
            root, names, cache = "/sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in parts[1].split(","):
            root, cache = "/sys/fs/cgroup/memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        steps = [step for step in parts[2].split("/") if step not in ("", "..")]
        for depth in range(len(steps), -1, -1):  # a container sees its own group at the root: always ask there too
            folder = "/".join([root, *steps[:depth]])
            limit, used = _int(read(f"{folder}/{names[0]}")), _int(read(f"{folder}/{names[1]}"))
            if limit is None:  # "max", or no such file
                continue
            found = re.search(rf"^{cache} ([0-9]+)$", read(f"{folder}/memory.stat") or "", re.MULTILINE)
            limits.append((limit, max(0, (used or 0) - (int(found[1]) if found else 0))))
    return limits


def _trouble(tool: str, output: Output, known: Sequence[tuple[str, str]]) -> ProbeError:
    said = output.out + output.err
    message = next((line.strip()[:300] for line in said.splitlines() if any(k in line for k, _ in known)), "")
    do = next((advice for phrase, advice in known if phrase in said), f"run `{tool}` in a shell and mend what it reports")
    what = f"{tool} failed" if output.code else f"{tool} answered something unreadable"
    return ProbeError(what, why=message or output.first_line, do=do)
