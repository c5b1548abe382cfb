"""Checkpoints in FP8 kept so and multiplied by our kernels, in triton's interpreter: whole steps, and every byte."""

from __future__ import annotations

from pathlib import Path

import fp8_files
import pytest
from model.batch_case import save
from programs import program


@pytest.mark.parametrize(
    ("family", "form", "matrices"),
    [
        ("llama", "make", 4 * (7 + 2)),
        ("qwen3-moe", "blocks", 2 * (7 + 2)),  # and groups
        ("gemma4-26b-a4b", "ct-channel", 2 * (10 + 3) - 1),
    ],
)
def test_steps_on_e4m3_are_those_on_its_values(family: str, form: str, matrices: int, tmp_path: Path) -> None:
    """A prompt of more rows than the kernel for few takes, its end, and single tokens; members of a group, a K=V layer, experts."""
    made = save(family, tmp_path / "made")
    path = made if form == "make" else fp8_files.save(made, tmp_path, form)
    found = program("model.fp8_case", path, *(["make"] if form == "make" else []), interpret=True)[0]

    assert found.pop("matrices") == matrices
    assert found.pop("planned") == found.pop("allocated")
    assert found.pop("weights planned") == found.pop("weights allocated")
    assert 1e-2 < found.pop("in e4m3") < 4e-2  # one rounding of activations; none would be 3e-3
    assert len(found) == 3
    for case, error in found.items():
        assert error < (0.2 if form == "make" else 5e-3), (case, error)  # what three bits of mantissa cost; f16's rounding
