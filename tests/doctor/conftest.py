"""What the tests of the probe share."""

from __future__ import annotations

import pytest

from headwise.doctor import probe


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of milliseconds are late by 100 where other tests run beside them."""
    monkeypatch.setattr(probe, "NOISE_S", 0.15)
