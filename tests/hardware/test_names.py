"""Names of devices: the server and its engines read the same."""

from __future__ import annotations

import pytest

from headwise.errors import UsageError
from headwise.hardware.names import device_name


@pytest.mark.parametrize(
    ("name", "device", "limit"),
    [("cpu", "cpu", None), ("cpu:512MiB", "cpu", 2**29), ("cuda", "cuda:0", None), ("cuda:3", "cuda:3", None),
     ("cuda:1:12", "cuda:1", 12 * 2**30), ("cuda:0:1.5GiB", "cuda:0", 3 * 2**29)],
)  # fmt: skip
def test_a_device_and_its_limit_are_read(name: str, device: str, limit: int | None) -> None:
    found = device_name(name)

    assert (found.device, found.limit_bytes) == (device, limit)


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0:1GiB", "cuda:-1", "cuda:1:12GB", "cuda:1:12:3", "tpu:0", "CUDA", "cuda:1 "])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        device_name(name)
