"""How busy a machine is, from its tools' words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from headwise.errors import ProbeError
from headwise.hardware.probe import Output
from headwise.hardware.usage import Usage, usage_sampler


def test_the_busiest_gpu_and_the_cpu_between_two_samples_count() -> None:
    """/proc/stat counts from boot: a single reading says how busy the machine was since then."""
    stats = iter(["cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1\n", "cpu  160 0 120 810 10 0 0 0 0 0\n"])
    sample = usage_sampler(lambda argv: Output(0, "3\n97\n") if argv[0] == "nvidia-smi" else None, lambda _: next(stats))

    assert sample() == Usage(97.0, None)
    assert sample() == Usage(97.0, pytest.approx(80.0))  # (60 + 20) of 100 ticks


def test_amd_is_asked_where_nvidia_is_not() -> None:
    said = '{"card0": {"GPU use (%)": "42"}, "system": {}}'
    sample = usage_sampler(lambda argv: Output(0, said) if argv[0] == "rocm-smi" else None, lambda _: None)

    assert sample() == Usage(42.0, None)


@pytest.mark.parametrize("said", ["", "[N/A]\n", "Failed to initialize NVML\n", "[1]", '{"card0": 7}'])
def test_what_cannot_be_read_is_none_and_is_not_asked_again(said: str) -> None:
    asked: list[str] = []

    def run(argv: Sequence[str]) -> Output | None:
        asked.append(argv[0])
        if said == "":
            raise ProbeError("nvidia-smi did not answer in 5 s")
        return Output(0, said)

    sample = usage_sampler(run, lambda _: "rubbish")

    assert [sample(), sample()] == [Usage(None, None)] * 2
    assert asked == ["nvidia-smi", "rocm-smi"]
