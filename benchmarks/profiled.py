"""What PyTorch's profiler saw on the card."""

from __future__ import annotations

from torch.profiler import profile


def kernels(found: profile) -> list[tuple[str, float, int]]:
    """Each kernel's name, microseconds and launches, the longest first."""
    ran = [(e.key, e.self_device_time_total, e.count) for e in found.key_averages() if e.self_device_time_total > 0]
    return sorted(ran, key=lambda kernel: -kernel[1])
