"""What drivers answer → devices. Every answer below is composed: real in form, from several machines' reports."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import ProbeError
from headwise.hardware.gpus import GIB, MIB
from headwise.hardware.probe import Device, Output, Run, cpu_memory, detect, run_tool

NO_MEMORY_NEEDED = (0, 0)


def machine(answers: Mapping[str, Output | str]) -> Run:
    """A runner whose tools answer by the start of the command line; every other tool is not installed."""

    def run(argv: Sequence[str]) -> Output | None:
        line = " ".join(argv)
        found = [answer for start, answer in answers.items() if line.startswith(start)]
        if not found:
            return None
        return Output(0, found[0]) if isinstance(found[0], str) else found[0]

    return run


def probed(
    answers: Mapping[str, Output | str], memory: tuple[int, int] = NO_MEMORY_NEEDED, system: str = "Linux"
) -> tuple[Device, ...]:
    return detect(run=machine(answers), memory=lambda: memory, system=system)


# --- NVIDIA ---

# composed: a desktop with two consumer cards
TWO_CARDS = """\
0, NVIDIA GeForce RTX 3090, 24576, 312, 570.133.07, 8.6
1, NVIDIA GeForce RTX 4060 Ti, 16380, 15020, 570.133.07, 8.9
"""


def test_nvidia_cards_are_found_with_row_memory_and_driver():
    """The 4060 Ti's name is shared by an 8 and a 16 GiB card: the wrong row halves its memory."""
    first, second = probed({"nvidia-smi --query-gpu": TWO_CARDS})

    assert first.gpu is not None
    assert (first.index, first.gpu.name, first.seen) == (0, "rtx3090", "NVIDIA GeForce RTX 3090")
    assert (first.total_bytes, first.used_bytes, first.driver) == (24576 * MIB, 312 * MIB, "570.133.07")
    assert first.capability == (8, 6)
    assert second.gpu is not None
    assert (second.index, second.gpu.name, second.gpu.memory_bytes) == (1, "rtx4060ti-16gb", 16380 * MIB)


def test_the_query_asks_for_what_the_parser_reads():
    """A column more or less shifts memory into the driver's version."""
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str]) -> Output | None:
        asked.append(tuple(argv))
        return None

    assert detect(run=run, system="Linux") == ()

    assert asked[0] == (
        "nvidia-smi",
        "--query-gpu=index,name,memory.total,memory.used,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    )


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_a_machine_without_tools_has_no_devices(system: str):
    """`headwise plan` on a laptop died because nvidia-smi was not there."""
    assert detect(run=machine({}), memory=lambda: (GIB, GIB), system=system) == ()


def test_a_card_without_a_row_is_reported_as_seen_and_nothing_is_assumed():
    """An unknown card planned with infinite bandwidth, or as its nearest neighbour."""
    # composed: a laptop chip, a vGPU slice and a card of the future
    answer = """\
0, NVIDIA GeForce RTX 4090 Laptop GPU, 16376, 10, 580.65.06, 8.9
1, NVIDIA A10-24Q, 24512, 0, 580.65.06, 8.6
2, NVIDIA GeForce RTX 7090, 49152, 1, 580.65.06, 14.0
"""
    devices = probed({"nvidia-smi --query": answer, "nvidia-smi -L": ""})

    assert [device.gpu for device in devices] == [None, None, None]
    assert str(devices[1]) == "1: NVIDIA A10-24Q (no table row)"
    assert devices[2].total_bytes == 49152 * MIB
    assert devices[2].capability == (14, 0)


def test_a_name_whose_chip_disagrees_with_the_row_gets_no_row():
    """An early GTX 1650 by name with another chip's capability would be planned with the wrong kernels."""
    (device,) = probed({"nvidia-smi --query": "0, NVIDIA GeForce RTX 3090, 24576, 1, 570.1, 8.9\n"})

    assert device.gpu is None


# composed: an A100 cut in two beside a whole one
MIG_QUERY = """\
0, NVIDIA A100-SXM4-80GB, 81920, 87, 550.54.15, 8.0
1, NVIDIA A100-SXM4-80GB, 81920, 4, 550.54.15, 8.0
"""
MIG_LIST = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.40gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.10gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-1e5a0d6d-0000-2b2c-524d-9e3d8d2b8a77)
"""


def test_mig_slices_stand_in_for_the_card_they_were_cut_from():
    """80 GiB planned on a slice of 10."""
    devices = probed({"nvidia-smi --query": MIG_QUERY, "nvidia-smi -L": MIG_LIST})

    assert [device.seen for device in devices] == [
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB",
    ]
    assert [device.total_bytes for device in devices] == [None, None, 81920 * MIB]
    assert [device.gpu and device.gpu.name for device in devices] == [None, None, "a100-sxm-80gb"]


def test_a_gpu_in_system_memory_is_given_the_systems():
    """nvidia-smi says [N/A] on a DGX Spark: int("[N/A]") ended the program."""
    answer = "0, NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1\n"  # composed

    (device,) = probed({"nvidia-smi --query": answer}, memory=(119 * GIB, 100 * GIB))

    assert device.gpu is not None
    assert (device.gpu.name, device.gpu.memory_bytes) == ("gb10", 119 * GIB)
    assert (device.total_bytes, device.used_bytes) == (119 * GIB, 19 * GIB)


def test_memory_that_the_driver_hides_is_unknown_not_zero():
    """0 bytes used reads as an empty card."""
    answer = "0, NVIDIA H100 80GB HBM3, 81559, [Insufficient Permissions], 570.1, 9.0\n"  # composed

    (device,) = probed({"nvidia-smi --query": answer, "nvidia-smi -L": "GPU 0: NVIDIA H100 80GB HBM3 (UUID: x)\n"})

    assert device.used_bytes is None
    assert device.gpu is not None
    assert device.gpu.name == "h100-sxm"


def test_an_old_driver_without_compute_cap_still_answers():
    """nvidia-smi before 470 refuses the whole query for one unknown field."""
    without = "nvidia-smi --query-gpu=index,name,memory.total,memory.used,driver_version --"
    answers = {
        without: "0, Tesla P40, 24451, 0, 450.51.05\n",
        "nvidia-smi": Output(2, 'Field "compute_cap" is not a valid field to query.\n'),
    }

    (device,) = probed(answers)

    assert device.gpu is not None
    assert (device.gpu.name, device.capability) == ("p40", None)


def test_a_warning_after_the_answer_is_not_a_card():
    """A worn-out card's infoROM warning, exit status 14, hid four healthy ones."""
    text = TWO_CARDS + "WARNING: infoROM is corrupted at gpu 0000:05:00.0\n"  # composed

    assert len(probed({"nvidia-smi --query": Output(14, text)})) == 2


def test_a_driver_that_says_there_is_no_card_is_believed():
    """A container started without --gpus is not a broken driver."""
    assert probed({"nvidia-smi": Output(6, "No devices were found\n")}) == ()


@pytest.mark.parametrize(
    ("output", "why", "do"),
    [  # composed from the messages' published texts
        (
            Output(18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.126\n"),
            "Driver/library version mismatch",
            "reboot",
        ),
        (
            Output(
                9,
                "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the "
                "latest NVIDIA driver is installed and running.\n\n",
            ),
            "couldn't communicate",
            "modprobe nvidia",
        ),
        (Output(255, "Failed to initialize NVML: Unknown Error\n"), "Unknown Error", "restart"),
        (
            Output(15, "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error\n"),
            "device handle",
            "reboot",
        ),
        (Output(4, "", "Failed to initialize NVML: Insufficient Permissions\n"), "Permissions", "/dev/nvidia"),
        (Output(-11, ""), "exit status -11", "nvidia-smi"),
        (Output(0, "<html>not what we asked for</html>\n"), "not what we asked", "nvidia-smi"),
        (Output(0, "0, NVIDIA GeForce RTX 3090, 24576\n"), "24576", "nvidia-smi"),
    ],
)
def test_a_broken_nvidia_driver_is_told_with_the_cure(output: Output, why: str, do: str):
    """A driver that failed looked like a machine without a GPU, and the plan was made for the CPU."""
    with pytest.raises(ProbeError) as caught:
        probed({"nvidia-smi": output})

    assert "nvidia-smi" in caught.value.what
    assert why in caught.value.why
    assert do in caught.value.do


# --- AMD ---

# composed: a desktop with one card and the processor's own graphics
AMD_STATIC = [
    {
        "gpu": 0,
        "asic": {"market_name": "AMD Radeon RX 7900 XTX", "target_graphics_version": "gfx1100"},
        "vram": {"type": "GDDR6", "size": {"value": 24560, "unit": "MB"}},
        "driver": {"name": "amdgpu", "version": "6.12.12"},
    },
    {
        "gpu": 1,
        "asic": {"market_name": "AMD Radeon Graphics", "target_graphics_version": "gfx1036"},
        "vram": {"type": "DDR5", "size": {"value": 512, "unit": "MB"}},
        "driver": {"name": "amdgpu", "version": "6.12.12"},
    },
]
AMD_METRIC = [
    {"gpu": 0, "mem_usage": {"used_vram": {"value": 1044, "unit": "MB"}}},
    {"gpu": 1, "mem_usage": {"used_vram": {"value": "N/A", "unit": "MB"}}},
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["list", "gpu_data"])
def test_amd_smi_cards_are_found_in_both_of_its_shapes(wrapped: bool):
    """ROCm 7 moved the list under "gpu_data": no card was found any more."""
    static, metric = (json.dumps({"gpu_data": x} if wrapped else x) for x in (AMD_STATIC, AMD_METRIC))

    card, graphics = probed({"amd-smi static": "WARNING: not in the render group\n" + static, "amd-smi metric": metric})

    assert card.gpu is not None
    assert (card.index, card.gpu.name, card.driver) == (0, "rx7900xtx", "6.12.12")
    assert (card.total_bytes, card.used_bytes) == (24560 * MIB, 1044 * MIB)
    assert (graphics.gpu, graphics.seen, graphics.used_bytes) == (None, "AMD Radeon Graphics", None)


# composed: rocm-smi of ROCm 6 on two Instinct cards, of which one is new to the table
ROCM = {
    "card1": {
        "Card Series": "AMD Instinct MI999X",
        "GFX Version": "gfx9999",
        "VRAM Total Memory (B)": "412316860416",
        "VRAM Total Used Memory (B)": "298844160",
    },
    "card0": {
        "Card Series": "AMD Instinct MI300X OAM",
        "GFX Version": "gfx942",
        "VRAM Total Memory (B)": "206141652992",
        "VRAM Total Used Memory (B)": "298844160",
    },
    "system": {"Driver version": "6.10.5"},
}


def test_rocm_smi_answers_where_amd_smi_is_not_installed():
    """Its cards come in the order of a dictionary, its numbers as text."""
    first, second = probed({"rocm-smi": json.dumps(ROCM)})

    assert first.gpu is not None
    assert (first.index, first.gpu.name, first.total_bytes) == (0, "mi300x", 206141652992)
    assert (first.used_bytes, first.driver) == (298844160, "6.10.5")
    assert (second.index, second.gpu, second.total_bytes) == (1, None, 412316860416)
    assert str(second) == "1: AMD Instinct MI999X (no table row)"


def test_a_name_from_the_pci_list_is_read_inside_its_brackets():
    """Old rocm-smi prints the PCI database's name: "Vega 20 [Radeon VII]" was no card of ours."""
    # composed
    old = {"card0": {"Card series": "Vega 20 [Radeon VII]", "VRAM Total Memory (B)": "17163091968"}}

    (device,) = probed({"rocm-smi": json.dumps(old)})

    assert device.gpu is not None
    assert device.gpu.name == "radeon-vii"
    assert device.used_bytes is None


def test_an_amd_name_whose_target_disagrees_with_the_row_gets_no_row():
    """A kernel built for gfx1100 fails to load on the gfx1101 that bears its name."""
    other = [AMD_STATIC[0] | {"asic": {"market_name": "AMD Radeon RX 7900 XTX", "target_graphics_version": "gfx1101"}}]

    (device,) = probed({"amd-smi static": json.dumps(other), "amd-smi metric": "[]"})

    assert device.gpu is None
    assert device.total_bytes == 24560 * MIB


def test_a_carve_out_is_not_the_memory_of_a_strix_halo():
    """The driver says 512 MiB of VRAM; the GPU reads the system's 128 GB."""
    # composed
    card = {
        "gpu": 0,
        "asic": {"market_name": "AMD Radeon 8060S Graphics", "target_graphics_version": "gfx1151"},
        "vram": {"size": {"value": 512, "unit": "MB"}},
    }

    (device,) = probed({"amd-smi static": json.dumps([card]), "amd-smi metric": "[]"}, memory=(125 * GIB, 120 * GIB))

    assert device.gpu is not None
    assert (device.gpu.name, device.gpu.memory_bytes) == ("8060s", 125 * GIB)
    assert (device.total_bytes, device.used_bytes) == (125 * GIB, 5 * GIB)


@pytest.mark.parametrize(
    ("tool", "output", "do"),
    [  # composed
        ("rocm-smi", Output(1, "", "Permission denied: '/dev/kfd'\n"), "render and video"),
        ("amd-smi", Output(255, "", "AMDSMI_STATUS_NO_DRV: driver not loaded\n"), "modprobe amdgpu"),
        ("amd-smi", Output(0, "no JSON at all\n"), "run `amd-smi`"),
        ("amd-smi", Output(0, '[{"gpu": 0, '), "run `amd-smi`"),
        ("amd-smi", Output(0, '{"gpus_of_another_release": []}'), "run `amd-smi`"),
        ("rocm-smi", Output(0, "[[]]"), "run `rocm-smi`"),
        ("rocm-smi", Output(0, '{"card0": "asleep"}'), "run `rocm-smi`"),
    ],
)
def test_a_broken_amd_driver_is_told_with_the_cure(tool: str, output: Output, do: str):
    """Half an answer read as no card."""
    with pytest.raises(ProbeError) as caught:
        probed({tool: output})

    assert tool in caught.value.what
    assert do in caught.value.do


def test_rocm_tools_on_a_machine_without_amd_are_no_error():
    """A ROCm container on an NVIDIA machine could not plan for its NVIDIA card."""
    says_none = Output(2, "", "ERROR:root:Driver not initialized (amdgpu not found in modules)\n")

    devices = probed({"nvidia-smi --query": TWO_CARDS, "rocm-smi": says_none})

    assert len(devices) == 2


# --- Apple ---


def mac(brand: str, cores: str | None) -> dict[str, Output | str]:
    """composed: what macOS 15's tools answer."""
    displays = {"SPDisplaysDataType": [{"sppci_model": brand} | ({"sppci_cores": cores} if cores else {})]}
    return {
        "sysctl -n machdep": brand + "\n",
        "system_profiler": json.dumps(displays),
        "sw_vers": "15.6.1\n",
    }


def test_a_mac_is_one_device_that_shares_the_systems_memory():
    """The whole memory counted as free although half of it is in use."""
    (device,) = probed(mac("Apple M4 Max", "40"), memory=(64 * GIB, 40 * GIB), system="Darwin")

    assert device.gpu is not None
    assert (device.gpu.name, device.gpu.memory_bytes, device.gpu.bandwidth_gb_s) == ("m4-max", 64 * GIB, 546)
    assert (device.total_bytes, device.used_bytes, device.driver) == (64 * GIB, 24 * GIB, "macOS 15.6.1")
    assert device.capability is None


@pytest.mark.parametrize(
    ("brand", "cores", "name"),
    [
        ("Apple M4 Max", "32", "m4-max-32core"),
        ("Apple M4 Max", None, None),  # 410 or 546 GB/s: not known, not guessed
        ("Apple M4 Max", "36", None),
        ("Apple M1", "7", "m1"),
        ("Apple M2 Ultra", None, "m2-ultra"),
        ("Apple M9 Max", "40", None),
    ],
)
def test_a_macs_row_depends_on_its_gpu_cores_only_where_bandwidth_does(brand: str, cores: str | None, name: str | None):
    """The smaller M4 Max reads 410 GB/s, not 546: a third more tokens promised than it can give."""
    (device,) = probed(mac(brand, cores), memory=(36 * GIB, GIB), system="Darwin")

    assert (device.gpu and device.gpu.name) == name
    assert device.seen.startswith(brand)


def test_an_intel_mac_has_no_device():
    """Its Metal GPU runs nothing of ours."""
    answers = {"sysctl -n machdep": "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz\n"}

    assert probed(answers, system="Darwin") == ()


# --- any answer ---

ANSWERS = st.builds(
    Output,
    st.sampled_from([0, 0, 0, 1, 9, 14]),
    st.one_of(
        st.text(),
        st.lists(st.lists(st.one_of(st.text(max_size=6), st.integers().map(str)), min_size=6, max_size=6)).map(
            lambda rows: "\n".join(", ".join(row) for row in rows)
        ),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["gpu", "asic", "vram", "size", "value", "unit", "card0", "gpu_data", "system"]),
                    inner,
                    max_size=4,
                )
            ),
        ).map(json.dumps),
    ),
    st.text(max_size=10),
)


@given(answer=ANSWERS, tool=st.sampled_from(["nvidia-smi", "amd-smi", "rocm-smi"]))
def test_any_answer_gives_devices_or_a_probe_error(answer: Output, tool: str):
    """A driver of next year must not end the program with a traceback."""
    try:
        devices = probed({tool: answer})
    except ProbeError as error:
        assert error.why
        assert error.do
    else:
        assert all(device.seen is not None for device in devices)


# --- the real runner ---


def tool(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_tool_that_hangs_is_given_up_with_its_children(tmp_path: Path):
    """Killing the wrapper only left us waiting for the pipe that its child held open."""
    marker = tmp_path / "pid"
    hangs = tool(tmp_path, "nvidia-smi", f"sleep 60 & echo $! > {marker}; wait\n")
    start = time.monotonic()

    with pytest.raises(ProbeError, match=r"did not answer in 0\.5 s") as caught:
        run_tool([hangs], timeout_s=0.5)

    assert time.monotonic() - start < 5
    assert "reboot" in caught.value.do
    child = int(marker.read_text())
    for _ in range(100):  # the kernel needs a moment to bury it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the tool's child is still alive")


def test_a_tool_that_is_not_there_is_no_tool(tmp_path: Path):
    """FileNotFoundError from a laptop without a driver."""
    assert run_tool([str(tmp_path / "nvidia-smi")]) is None


def test_a_tool_that_may_not_run_is_an_error(tmp_path: Path):
    """PermissionError taken for "not installed": a broken install planned as no GPU."""
    path = tmp_path / "nvidia-smi"
    path.write_text("#!/bin/sh\n")

    with pytest.raises(ProbeError, match="cannot be run"):
        run_tool([str(path)])


def test_a_tools_answer_is_read_whole_and_in_any_encoding(tmp_path: Path):
    """One byte of a mangled card name ended the program with UnicodeDecodeError."""
    answers = tool(tmp_path, "nvidia-smi", "printf 'caf\\351 %s' \"$1\"; echo bad >&2; exit 3\n")

    assert run_tool([answers, "x"]) == Output(3, "caf\ufffd x", "bad\n")


# --- the CPU's memory ---

# composed
MEMINFO = "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   32768000 kB\n"
TOTAL, AVAILABLE = 65536000 * 1024, 32768000 * 1024


def linux(files: Mapping[str, str]) -> tuple[int, int]:
    return cpu_memory(run=machine({}), read={"/proc/meminfo": MEMINFO, **files}.get, system="Linux")


def test_memory_without_a_limit_is_the_machines():
    """MemFree instead of MemAvailable: page cache counted as used, and models refused that fit."""
    assert linux({}) == (TOTAL, AVAILABLE)
    assert linux({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}) == (TOTAL, AVAILABLE)


def test_a_containers_limit_is_its_memory():
    """A pod with 8 GiB on a host of 64 loaded a 30 GiB model and was killed."""
    files = {  # composed: cgroup v2 in a container, which sees its own group at the root
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": str(8 * GIB),
        "/sys/fs/cgroup/memory.current": str(5 * GIB),
        "/sys/fs/cgroup/memory.stat": f"anon 1\nactive_file 7\ninactive_file {3 * GIB}\n",
    }

    assert linux(files) == (8 * GIB, 6 * GIB)  # 5 used, of which 3 are page cache


def test_a_limit_beyond_the_machine_is_no_memory():
    """A limit of 1 TiB on a host of 64 GB promised the terabyte."""
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": str(1024 * GIB)}  # composed

    assert linux(files) == (TOTAL, AVAILABLE)


def test_a_limit_above_the_process_counts_too():
    """Only the process's own group was asked; the slice above it held the limit."""
    files = {  # composed: cgroup v2 on a host, the limit on the slice
        "/proc/self/cgroup": "0::/user.slice/job.scope\n",
        "/sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
        "/sys/fs/cgroup/user.slice/memory.max": str(10 * GIB),
        "/sys/fs/cgroup/user.slice/memory.current": str(1 * GIB),
    }

    assert linux(files) == (10 * GIB, 9 * GIB)


def test_the_first_version_of_control_groups_is_read():
    """Older hosts: other files, and a limit of 2^63 that means none."""
    files = {  # composed
        "/proc/self/cgroup": "12:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n",
        "/sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/memory/docker/ab/memory.usage_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/memory/docker/ab/memory.stat": f"cache 5\ntotal_inactive_file {GIB}\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(30 * GIB),
    }

    assert linux(files) == (4 * GIB, 1 * GIB)


def test_a_group_over_its_limit_has_nothing_left_not_less():
    """A negative number of free bytes."""
    files = {  # composed: the limit was lowered under the process
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": str(2 * GIB),
        "/sys/fs/cgroup/memory.current": str(3 * GIB),
    }

    assert linux(files) == (2 * GIB, 0)


def test_a_macs_memory_is_the_kernels_own_figure():
    """Free pages alone are near zero on any Mac that has been used for an hour."""
    run = machine({"sysctl -n hw.memsize": f"{64 * GIB}\n62\n"})

    assert cpu_memory(run=run, system="Darwin") == (64 * GIB, 64 * GIB * 62 // 100)


@pytest.mark.parametrize("system", ["Linux", "Darwin", "Windows"])
def test_a_machine_that_does_not_tell_its_memory_is_an_error(system: str):
    """0 bytes of memory: every model refused, with the wrong reason."""

    def nothing(_path: str) -> None:
        return None

    with pytest.raises(ProbeError, match="how much memory"):
        cpu_memory(run=machine({}), read=nothing, system=system)


def test_this_machine_tells_its_memory():
    """The defaults themselves: the right files, the right units."""
    total, available = cpu_memory()

    assert GIB / 4 < total < 64 * 1024 * GIB
    assert 0 <= available <= total
