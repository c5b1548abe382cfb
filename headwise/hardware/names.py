"""How people name devices: `cpu`, `cuda`, `cuda:1`, and with a limit `cuda:0:12GiB`, `cpu:512MiB`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headwise.errors import UsageError

_NAME = re.compile(r"(?P<type>[a-z]+)(:(?P<index>\d{1,3}))?(:(?P<size>\d{1,6}(\.\d{1,9})?)(?P<unit>GiB|MiB)?)?")
_UNITS = {"GiB": 2**30, "MiB": 2**20, None: 2**30}


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A device as it was named.

    Args:
        type: cpu or cuda.
        index: 0 where none was named.
        limit_bytes: the most memory that may be taken there; None: what is free.
    """

    type: str
    index: int
    limit_bytes: int | None

    @property
    def device(self) -> str:
        """As PyTorch calls it."""
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"


def device_name(name: str) -> DeviceName:
    """Raises UsageError: it is none, or of a kind that nothing here runs on."""
    m = _NAME.fullmatch(name)
    if m is None or (m["type"] == "cpu" and m["index"]):
        raise UsageError(
            f"unknown device {name!r}",
            why="a device is cpu, cuda or cuda:N, and with a limit cuda:N:12GiB",
            do="--device cpu or --gpu 0,1",
        )
    if m["type"] not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", why="headwise runs on CPU and CUDA", do="--device cpu")
    limit = None if m["size"] is None else int(float(m["size"]) * _UNITS[m["unit"]])
    return DeviceName(m["type"], int(m["index"] or 0), limit)
