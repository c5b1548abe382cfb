"""Where a model runs: the devices that were asked for, how they are now, and what is done on each before the first byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import NamedTuple

import torch

from headwise.attention.capability import CPU, DeviceKind
from headwise.errors import UsageError
from headwise.hardware.gpus import Gpu, known_gpu
from headwise.hardware.names import device_name
from headwise.hardware.probe import cpu_memory
from headwise.kernels.configs import GLUON
from headwise.planner.memory import CPU_MARGIN_BYTES, GPU_MARGIN_BYTES, Target


class Seat(NamedTuple):
    """A device, and the most memory that may be taken there; None: what is free."""

    device: torch.device
    limit_bytes: int | None = None


class Card(NamedTuple):
    """A seat, and what the planner and the backends are told of it; `gpu`: its row of the table, where it has one."""

    target: Target
    kind: DeviceKind
    seat: Seat
    gpu: Gpu | None = None


def seats(asked: str | Sequence[str] | None) -> tuple[list[Seat], bool]:
    """The devices that `asked` allows, and whether all of them are to be used (else as few as hold the model).

    Args:
        asked: "cpu", "cuda:N", either with a limit ("cuda:0:12GiB", "cpu:1GiB"), or a list of them; "cuda" is every card
            there is, None too where there is one, else the CPU.
    Raises:
        UsageError: no such device, or devices that do not go together.
    """
    if asked is None and not torch.cuda.is_available():
        asked = "cpu"
    if asked in (None, "cuda"):
        _require_cuda()
        return [Seat(torch.device("cuda", i)) for i in range(torch.cuda.device_count())], False
    names = [asked] if isinstance(asked, str) else list(asked or ())
    found = [_seat(name) for name in names]
    cards = [p.device for p in found if p.device.type == "cuda"]
    if not found or len(set(cards)) < len(cards) or 0 < len(cards) < len(found):
        raise UsageError(
            f"the devices {', '.join(names) or '(none)'} make no sense together",
            why="a model runs on the CPU or on cards, each named once",
            do="--device cpu, or --gpu 0,1",
        )
    return found, True


def _seat(name: str) -> Seat:
    found = device_name(name)
    if found.type == "cuda":
        _require_cuda()
        if found.index >= (n := torch.cuda.device_count()):
            raise UsageError(f"there is no {found.device}", why=f"PyTorch sees {n}, from cuda:0 on", do="--gpu 0")
    return Seat(torch.device(found.device), found.limit_bytes)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device", why="PyTorch sees none", do="--device cpu")


def device_kind(device: torch.device) -> DeviceKind:
    if device.type == "cpu":
        return CPU
    return DeviceKind(
        "cuda" if torch.version.hip is None else "rocm",  # PyTorch calls both cuda
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_name(device),
        _triton_version(),
    )


def skinny_refusal(kind: DeviceKind, dtype: str) -> str | None:
    """Why `kernels.skinny` does not run there: it is Gluon's, whose API changes between versions of triton; None: it does."""
    if kind.api != "cuda" or (kind.capability or (0, 0)) < (8, 0):
        return "needs an NVIDIA card of compute capability 8.0 or newer"
    if kind.triton != GLUON:
        return _other_triton(kind)
    return None if dtype in ("bf16", "f16") else f"takes bf16 and f16, not {dtype}"


def _other_triton(kind: DeviceKind) -> str:
    seen = "no triton" if kind.triton is None else f"triton {kind.triton[0]}.{kind.triton[1]}"
    return f"needs triton 3.6, which PyTorch 2.11 comes with, and there is {seen}: pip install 'torch==2.11.*'"


def slower(kind: DeviceKind, dtype: str, *, wide: bool, quantised: bool) -> Iterator[str]:
    """What is said at a start where kernels that fit the card do not run; of attention's only the version of triton.

    Args:
        wide: heads of 256 or more values, or a quantised cache; quantised: weights that stay so.
    """
    if kind.api == "cuda" and kind.capability == (9, 0) and kind.triton != GLUON:
        yield f"attention on {kind.label} is not headwise-hopper's: it {_other_triton(kind)}"
    if kind.api == "cuda" and (8, 0) <= (kind.capability or (0, 0)) != (9, 0) and kind.triton != GLUON and wide and dtype != "f32":
        what = "wide heads and quantised caches"
        yield f"prefill of {what} on {kind.label} takes two to four times as long: the kernel {_other_triton(kind)}"
    if quantised and (why := skinny_refusal(kind, dtype)):
        yield f"few rows meet quantised weights in slow kernels on {kind.label}: the fast one {why}"


def skinny_rows(device: torch.device, dtype: str) -> int:
    """The most rows that `kernels.skinny` multiplies there."""
    if skinny_refusal(device_kind(device), dtype):
        return 0
    from headwise.kernels.skinny import most_rows
    from headwise.kernels.split import card

    return most_rows(card(device))


def scaled_rows(device: torch.device, dtype: str) -> bool:
    """Whether PyTorch multiplies e4m3 by e4m3 there, with a scale for each row of both: NVIDIA from 8.9 on, into bf16."""
    kind = device_kind(device)
    return kind.api == "cuda" and kind.capability is not None and kind.capability >= (8, 9) and dtype == "bf16"


def _triton_version() -> tuple[int, int] | None:
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def card_of(seat: Seat, *, sharing: int = 1) -> Card:
    """A seat as it is now, to plan for.

    Args:
        sharing: stages that are to lie on the CPU together, each with its part of the memory.
    """
    if seat.device.type == "cpu":
        total, free = (n // sharing for n in cpu_memory())
        name, margin, gpu = "cpu", CPU_MARGIN_BYTES // sharing, None
    else:
        free, total = torch.cuda.mem_get_info(seat.device)
        seen = torch.cuda.get_device_name(seat.device)
        name, margin, gpu = f"{seen} ({seat.device})", GPU_MARGIN_BYTES, known_gpu(seen, total)
    total = min(total, seat.limit_bytes or total)
    target = Target(name=name, gpu=None, total_bytes=total, others_bytes=max(0, total - free), margin_bytes=margin)
    return Card(target, device_kind(seat.device), seat, gpu)


def keep_limit(seat: Seat) -> None:
    """Makes PyTorch refuse more memory of a card than its seat allows."""
    if seat.limit_bytes is not None and seat.device.type == "cuda":
        _, total = torch.cuda.mem_get_info(seat.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, seat.limit_bytes / total), seat.device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: triton launches there."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def before_loading(device: torch.device) -> int:
    """Bytes this process holds on a GPU already, cuBLAS's workspaces included (the plan's margin covers them)."""
    if device.type != "cuda":
        return 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(8, 8, dtype=dtype, device=device)
        torch.mm(x, x)
        torch.mv(x, x[0])
    del x
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
