"""Sequences that share a step, with scattered pages, wrapped rings and drafts, say what each says alone."""

from __future__ import annotations

import pytest
from programs import program

CASES = [
    *((family, "operators") for family in ("gemma4-e2b", "gemma4-31b", "gpt-oss", "llama")),
    ("gemma4-e2b", "kernels"),
    ("gemma4-31b", "operators-v"),
    ("gemma4-31b", "kernels-v"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, float]]:
    words = [word for case in CASES for word in case]
    found = program("model.batch_case", tmp_path_factory.mktemp("models"), *words, interpret=True)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_sequences_of_a_step_do_not_meet(case: tuple[str, str], results: dict[tuple[str, str], dict[str, float]]) -> None:
    """A row of one sequence that reads another's keys, position or ring answers fluently about another conversation."""
    found = dict(results[case])
    most = 3e-2 if found.pop("dtype") else 2e-4

    assert len(found) == 9
    for case, error in found.items():
        assert error < most, (case, found)
