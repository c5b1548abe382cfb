"""The GPU table and the look-up. Expected figures are the vendors' own, not the code's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import UsageError
from headwise.hardware.gpus import GIB, GPUS, KIB, Gpu, find_gpu, known_gpu, markdown

NVIDIA = [gpu for gpu in GPUS if gpu.vendor == "nvidia"]
BY_NAME = {gpu.name: gpu for gpu in GPUS}


def each(rows: list[Gpu] | tuple[Gpu, ...] = GPUS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("gpu", rows, ids=lambda gpu: gpu.name)


# --- the table ---


def test_names_and_labels_are_unique():
    """Two rows of one name: the look-up returns whichever came last."""
    for values in ([gpu.name for gpu in GPUS], [gpu.label for gpu in GPUS]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


@each()
def test_a_row_is_plausible(gpu: Gpu):
    """A slipped digit: 9360 GB/s for a 3090 promises ten times the tokens."""
    assert gpu.name == gpu.name.lower()
    assert 2 * GIB <= gpu.memory_bytes <= 512 * GIB
    assert 60 <= gpu.bandwidth_gb_s <= 8200
    seconds_to_read_memory = gpu.memory_bytes / (gpu.bandwidth_gb_s * 1e9)
    assert 0.008 <= seconds_to_read_memory <= 0.75  # HBM cards at one end, unified memory at the other
    rates = gpu.tflops
    for rate in (rates.f32, rates.f16, rates.bf16, rates.fp8, rates.int8):
        assert rate is None or 1 <= rate <= 5100
    assert gpu.source.startswith("https://")
    assert " " not in gpu.source


@each()
def test_rates_are_dense_and_grow_as_the_type_shrinks(gpu: Gpu):
    """A sparse figure in a dense column is twice too large: it shows as a step of four between 16 and 8 bits."""
    rates = gpu.tflops
    if rates.bf16 is not None and gpu.name != "mi100":  # AMD's first bf16 ran at half the f16 rate
        assert rates.bf16 == rates.f16
    if rates.fp8 is not None:
        assert rates.f16 is not None
        assert rates.fp8 / rates.f16 == pytest.approx(2, rel=0.02)
    if rates.f16 is not None and rates.int8 is not None:
        assert round(rates.int8 / rates.f16, 1) in (1, 2, 4)
    if rates.f16 is not None and rates.f32 is not None:
        assert 1.95 <= rates.f16 / rates.f32 <= 33


@each()
def test_a_dtype_has_a_rate_only_where_the_chip_has_the_unit(gpu: Gpu):
    """fp8 promised on Ampere, bf16 on Turing: a plan for a kernel that cannot exist."""
    if gpu.capability is not None:
        assert gpu.tflops.fp8 is None or gpu.capability >= (8, 9)
        assert gpu.tflops.bf16 is None or gpu.capability >= (8, 0)
        assert gpu.tflops.f16 is None or gpu.capability >= (7, 0)
    if gpu.vendor == "amd":
        assert gpu.tflops.fp8 is None or gpu.arch in ("cdna3", "cdna4", "rdna4")
        assert gpu.tflops.bf16 is None or gpu.arch.startswith("cdna") or gpu.arch >= "rdna3"


@each()
def test_the_api_fields_belong_to_the_vendor(gpu: Gpu):
    """A CUDA row without a capability is refused by every backend, without a reason."""
    assert gpu.api == {"nvidia": "cuda", "amd": "rocm", "apple": "metal", "intel": "sycl"}[gpu.vendor]
    assert (gpu.capability is not None) == (gpu.vendor == "nvidia")
    assert (gpu.gfx is not None) == (gpu.vendor == "amd")
    assert gpu.unified or gpu.vendor != "apple"


# CUDA C++ Programming Guide, "Maximum amount of shared memory per thread block"
SMEM_KIB = {"6.0": 48, "6.1": 48, "7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99} | {
    "9.0": 227, "10.0": 227, "10.3": 227, "11.0": 227, "12.0": 99, "12.1": 99,
}  # fmt: skip


@each(NVIDIA)
def test_shared_memory_follows_from_the_capability(gpu: Gpu):
    """163 KiB assumed on a 3090, which has 99: the kernel fails to launch."""
    assert gpu.capability is not None
    assert gpu.smem_bytes == SMEM_KIB[f"{gpu.capability[0]}.{gpu.capability[1]}"] * KIB


@pytest.mark.parametrize(
    ("name", "gib", "gb_s", "f16", "fp8", "int8"),
    [  # GA102 v2, Ada, RTX Blackwell, Turing and Volta whitepapers; A100, H100, H200, L4, L40S and MI300X datasheets
        ("rtx2080ti", 11, 616, 53.8, None, 215.2),
        ("titan-rtx", 24, 672, 130.5, None, 261),
        ("t4", 15, 320, 65, None, 130),
        ("v100-sxm2-32gb", 32, 900, 125, None, None),
        ("rtx3080", 10, 760, 59.5, None, 238),
        ("rtx3090", 24, 936, 71, None, 284),
        ("rtx-a6000", 48, 768, 154.8, None, 309.7),
        ("a10", 22.5, 600, 125, None, 250),
        ("a100-sxm-80gb", 80, 2039, 312, None, 624),
        ("rtx4090", 24, 1008, 165.2, 330.3, 660.6),
        ("rtx6000-ada", 48, 960, 364.2, 728.5, 728.5),
        ("l4", 22.5, 300, 121, 242.5, 242.5),
        ("l40s", 45, 864, 362, 733, 733),
        ("h100-sxm", 80, 3350, 989, 1979, 1979),
        ("h200", 140.4, 4800, 989, 1979, 1979),
        ("b200", 179, 7700, 2250, 4500, 4500),
        ("rtx5080", 16, 960, 112.6, 225.1, 450.2),
        ("rtx5090", 32, 1792, 209.5, 419, 838),
        ("rtx-pro-6000", 96, 1792, 503.8, 1007.6, 1007.6),
        ("rx9070xt", 16, 640, 195, 389, 389),
        ("rx7900xtx", 24, 960, 122.8, None, 122.8),
        ("mi300x", 192, 5300, 1307.4, 2614.9, 2614.9),
        ("mi355x", 288, 8000, 2516.6, 5033.2, 5033.2),
    ],
)
def test_known_cards_have_the_published_figures(
    name: str, gib: float, gb_s: float, f16: float, fp8: float | None, int8: float | None
):
    """GeForce f16 with fp32 sums is half of the printed tensor rate: 142 on a 3090 doubles the prefill promised."""
    gpu = BY_NAME[name]

    assert gpu.memory_bytes / GIB == pytest.approx(gib, rel=0.002)
    assert gpu.bandwidth_gb_s == pytest.approx(gb_s, rel=0.005)
    assert gpu.tflops.f16 == pytest.approx(f16, rel=0.006)
    assert gpu.tflops.fp8 == (None if fp8 is None else pytest.approx(fp8, rel=0.006))
    assert gpu.tflops.int8 == (None if int8 is None else pytest.approx(int8, rel=0.006))


# --- the look-up ---


@each()
def test_every_name_and_label_finds_its_own_row(gpu: Gpu):
    """A driver's name that lands on a neighbour: a 4070 planned as a 4070 Ti."""
    for spelling in (gpu.name, gpu.label, gpu.label.upper(), gpu.name.replace("-", " "), *gpu.also):
        assert find_gpu(spelling) == gpu


@each()
def test_every_row_can_be_given_its_own_size(gpu: Gpu):
    """NAME:GiB picks another row of the family, with another bandwidth."""
    whole_gib = round(gpu.memory_bytes / GIB)

    found = find_gpu(f"{gpu.name}:{whole_gib}")

    assert (found.name, found.memory_bytes) == (gpu.name, whole_gib * GIB)


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("rtx3060:12", "rtx3060", 12),
        ("rtx3060:8", "rtx3060-8gb", 8),
        ("RTX 3060", "rtx3060", 12),
        ("RTX 3060 8GB", "rtx3060-8gb", 8),
        ("NVIDIA GeForce RTX 3060", "rtx3060", 12),
        ("  nvidia  geforce_rtx-3060 ", "rtx3060", 12),
        ("4090", "rtx4090", 24),
        ("4090:48", "rtx4090", 48),
        ("4060ti:16", "rtx4060ti-16gb", 16),
        ("4070 Ti Super", "rtx4070tisuper", 16),
        ("RTX 4060 Ti 16GB", "rtx4060ti-16gb", 16),
        ("a6000", "rtx-a6000", 48),
        ("h200:141", "h200", 141),
        ("H100", "h100-sxm", 80),
        ("h100:94", "h100-nvl", 94),
        ("a100:40", "a100-sxm-40gb", 40),
        ("A100-80GB", "a100-sxm-80gb", 80),
        ("v100:32", "v100-sxm2-32gb", 32),
        ("NVIDIA H100 80GB HBM3", "h100-sxm", 80),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb", 80),
        ("NVIDIA GH200 480GB", "gh200-96gb", 96),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb", 16),
        ("NVIDIA B300 SXM6 AC:268.5", "b300", 268.5),
        ("mi300x", "mi300x", 192),
        ("AMD Instinct MI300X OAM", "mi300x", 192),
        ("rx7900xtx", "rx7900xtx", 24),
        ("Radeon RX 7900 XTX", "rx7900xtx", 24),
        ("mi50:32", "mi50-32gb", 32),
        ("m4-max:64", "m4-max", 64),
        ("Apple M4 Max", "m4-max", 128),
        ("Intel(R) Arc(TM) A770 Graphics:16", "arc-a770-16gb", 16),
        ("b580", "arc-b580", 12),
    ],
)
def test_what_people_type_finds_the_card(text: str, name: str, gib: float):
    """Each spelling stood in a question on a forum or in a driver's answer."""
    found = find_gpu(text)

    assert (found.name, found.memory_bytes) == (name, gib * GIB)


def test_a_decimal_size_is_exact_to_the_byte():
    """Through a float the last size rounds up: a byte more than was asked for, and a plan that does not add up."""
    assert find_gpu("rtx3090:23.7").memory_bytes == 237 * GIB // 10
    assert find_gpu("rtx3090:23.700").memory_bytes == 237 * GIB // 10
    assert find_gpu("m4-max:500.000891787").memory_bytes == 500000891787 * GIB // 10**9 == 536871869548


@pytest.mark.parametrize("text", ["a100", "v100", "rtx4060ti", "NVIDIA GeForce RTX 5060 Ti", "gh200", "a770"])
def test_a_card_sold_in_several_sizes_must_name_one(text: str):
    """8 or 16 GiB picked for the user: the plan fits a card that they do not have. The advice must work as printed."""
    with pytest.raises(UsageError, match="several memory sizes") as caught:
        find_gpu(text)

    advised = caught.value.do.removeprefix("say ").split(" or ")
    assert len(advised) == 2
    assert len({find_gpu(each).name for each in advised}) == 2


def test_a_default_among_several_sizes_is_written_in_its_note():
    """A default that no page mentions is a guess."""
    for gpu in GPUS:
        family = [row for row in GPUS if row.family == gpu.family]
        if len(family) > 1:
            try:
                default = find_gpu(gpu.family)
            except UsageError:
                continue
            assert f"`{gpu.family}` alone means this" in default.note


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ("0", "not more than 0"),
        ("-12", "not more than 0"),
        ("0.0", "not more than 0"),
        ("0.1", "less than 0.25"),
        ("97", "more than four times the 24 GiB"),
        ("999999", "more than four times"),
        ("", "not a number"),
        ("twelve", "not a number"),
        ("nan", "not a number"),
        ("inf", "not a number"),
        ("1e3", "not a number"),
        ("12GB", "not a number"),
        ("0x10", "not a number"),
        ("1_0", "not a number"),
        ("12:24", "not a number"),
        ("١٢", "not a number"),
        ("9" * 5000, "not a number"),
        (".", "not a number"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused_with_the_reason(size: str, reason: str):
    """`rtx3090:-24` gave a card with negative memory; 5000 digits, a ValueError from int()."""
    with pytest.raises(UsageError) as caught:
        find_gpu("rtx3090:" + size)

    assert reason in caught.value.why
    assert "rtx3090:24" in caught.value.do
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("rtx3091", "rtx3090"),
        ("rtx 4090 laptop gpu", "rtx4090"),
        ("mi300z", "mi300x"),
        ("m4-mxa", "m4-max"),
        ("rx7900xtz:24", "rx7900xtx"),
    ],
)
def test_an_unknown_card_is_answered_with_the_nearest_names(text: str, near: str):
    """A laptop's RTX 4090 has a 4080's chip: it must not be planned as the desktop card."""
    with pytest.raises(UsageError) as caught:
        find_gpu(text)

    assert text in caught.value.what
    assert near in caught.value.why
    assert "headwise.hardware.gpus" in caught.value.do
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", " ", ":", ":24", "nvidia", "GeForce", "12GB", "RTX 9999 12GB", "\x00", "日本"])
def test_a_text_without_a_card_is_refused(text: str):
    """Vendor words alone reduce to nothing, and nothing must not match."""
    with pytest.raises(UsageError):
        find_gpu(text)


SIZES = st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.decimals().map(str))
NAMES = st.sampled_from([gpu.name for gpu in GPUS] + [gpu.label for gpu in GPUS])


@given(st.one_of(st.text(), NAMES, st.builds("{}:{}".format, NAMES, SIZES), st.builds("{} {}GB".format, NAMES, SIZES)))
def test_any_text_gives_a_gpu_or_a_usage_error(text: str):
    """ZeroDivisionError, OverflowError and ValueError once reached the terminal."""
    try:
        found = find_gpu(text)
    except UsageError as error:
        assert error.what
        assert error.why
        assert error.do
    else:
        assert found.name in BY_NAME
        assert found.memory_bytes > 0
        assert type(found.memory_bytes) is int


# --- a driver's own name ---


def test_a_drivers_name_shared_by_two_sizes_is_told_apart_by_memory():
    """The driver says "NVIDIA GeForce RTX 4060 Ti" for both; only the memory tells."""
    large = known_gpu("NVIDIA GeForce RTX 4060 Ti", 16380 * 2**20)
    small = known_gpu("NVIDIA GeForce RTX 4060 Ti", 8188 * 2**20)

    assert large is not None
    assert small is not None
    assert (large.name, large.memory_bytes) == ("rtx4060ti-16gb", 16380 * 2**20)
    assert (small.name, small.memory_bytes) == ("rtx4060ti-8gb", 8188 * 2**20)
    assert known_gpu("NVIDIA GeForce RTX 4060 Ti", None) is None


@pytest.mark.parametrize("seen", ["NVIDIA GeForce RTX 3090 Laptop GPU", "GRID A100-20C", "NVIDIA A10-24Q", "Fancy", ""])
def test_a_drivers_name_without_a_row_is_not_given_the_nearest(seen: str):
    """A vGPU slice planned as the whole card."""
    assert known_gpu(seen, 24 * GIB) is None


# --- the page ---


def test_the_docs_page_is_what_the_module_prints():
    """The page showed figures that the planner no longer used."""
    page = Path(__file__).parents[2] / "docs" / "gpus.md"

    assert page.read_text(encoding="utf-8") == markdown(), "python -m headwise.hardware.gpus > docs/gpus.md"


def test_the_page_has_a_row_and_a_source_for_every_card():
    """A row left out of the page is a figure nobody can check."""
    text = markdown()

    for gpu in GPUS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{gpu.name}` |"))
        assert gpu.source in row
        assert row.count("|") == 14
