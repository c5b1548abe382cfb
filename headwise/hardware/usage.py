"""How busy this machine's GPUs and CPU are: a few samples while a server works, not a profiler.

Sources: nvidia-smi --help-query-gpu (`utilization.gpu`: percent of the last sample period, 1/6 s to 1 s, in which a kernel
ran); rocm-smi --showuse; proc(5) (/proc/stat: time of all CPUs in ticks; the fourth and fifth are idle and waiting).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from headwise.errors import ProbeError
from headwise.hardware.probe import Read, Run, read_file, run_tool


@dataclass(frozen=True, slots=True)
class Usage:
    gpu: float | None  # percent, of the busiest GPU; None: no tool that says
    cpu: float | None  # percent of all cores since the last sample; None: the first sample, or no Linux


def usage_sampler(run: Run = run_tool, read: Read = read_file) -> Callable[[], Usage]:
    """A function that takes a sample. It never fails: what cannot be read is None."""
    before: list[tuple[int, int]] = []
    tools = [_nvidia, _amd]

    def sample() -> Usage:
        gpu = None
        for tool in tuple(tools):
            percents = tool(run)
            if percents:
                gpu = max(percents)
                break
            tools.remove(tool)  # not here, or it fails: not asked again
        now = _ticks(read("/proc/stat") or "")
        cpu = None
        if now and before and now[1] > before[0][1]:
            cpu = 100 * (now[0] - before[0][0]) / (now[1] - before[0][1])
        before[:] = [now] if now else []
        return Usage(gpu, cpu)

    return sample


def _nvidia(run: Run) -> list[float]:
    try:
        output = run(("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"))
    except ProbeError:
        return []
    return [float(n) for n in re.findall(r"^\s*([0-9]{1,3})\s*$", output.out, re.MULTILINE)] if output and output.code == 0 else []


def _amd(run: Run) -> list[float]:
    try:
        output = run(("rocm-smi", "--showuse", "--json"))
        cards = json.loads(output.out) if output and output.code == 0 else {}
    except (ProbeError, ValueError):
        return []
    values = [card.get("GPU use (%)") for card in cards.values() if isinstance(card, dict)] if isinstance(cards, dict) else []
    return [float(v) for v in values if isinstance(v, str) and re.fullmatch("[0-9]{1,3}", v)]


def _ticks(stat: str) -> tuple[int, int] | None:
    """Busy and all ticks of all CPUs."""
    found = re.match(r"cpu +([0-9 ]+)\n", stat)
    ticks = [int(n) for n in found[1].split()[:8]] if found else []  # what guests use is in the first two already
    return (sum(ticks) - ticks[3] - ticks[4], sum(ticks)) if len(ticks) >= 5 else None
