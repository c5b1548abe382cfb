"""One allocation for every buffer of a forward pass, carved by the planner's own list."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from headwise.planner.workspace import Buffer, arena_bytes, offsets

T = TypeVar("T")
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64}

ZEROS = ("quant.done", "router.done", "done", "span", "pages")  # counters, and numbers that a first step may read unwritten


class Room(NamedTuple):
    """Scratch of a product with a quantised weight, None where no weight needs it; and which kernels of ours there are.

    Args:
        tile: rows of the weight as floats; or of activations, arranged for `kernels.skinny`, or in e4m3.
        words, partial, done: `kernels.matvec`: activations as integers, partial sums, counters (zeros).
        fused: one row of floats takes `kernels.floats`.
        skinny_rows: most that take `kernels.skinny`.
        scaled_rows: the card multiplies e4m3 by e4m3, with a scale for each row of both.
    """

    tile: Tensor | None = None
    words: Tensor | None = None
    partial: Tensor | None = None
    done: Tensor | None = None
    fused: bool = False
    skinny_rows: int = 0
    scaled_rows: bool = False


class Arena:
    """Named flat buffers in one storage; `take` gives the first elements of one in the shape asked for."""

    def __init__(self, buffers: Sequence[Buffer], device: torch.device) -> None:
        self._reserved_bytes = sum(b.n_bytes for b in buffers if b.reserved)
        self.storage = torch.empty(arena_bytes(buffers) - self._reserved_bytes, dtype=torch.uint8, device=device)
        self.reserve: Tensor | None = self._hold()
        starts = offsets(buffers)
        self._flat = {
            b.name: self.storage[starts[b.name] :][: prod(b.shape) * TORCH[b.dtype].itemsize].view(TORCH[b.dtype])
            for b in buffers
            if not b.reserved
        }
        self._shaped = {b.name: self._flat[b.name].view(b.shape) for b in buffers if not b.reserved}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._kept: dict[object, Any] = {}
        tile, words, partial, done = (self._flat.get(n) for n in ("weight.tile", "quant.words", "quant.partial", "quant.done"))
        self.room = Room(tile, words, partial, done)
        for name in ZEROS:
            if name in self._flat:
                self._flat[name].zero_()
        self.eps = self._flat["eps"]
        self.eps_value = 0.0  # the same, for a kernel's argument

    def _hold(self) -> Tensor:
        return torch.empty(self._reserved_bytes, dtype=torch.uint8, device=self.storage.device)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The planned room for what operators allocate themselves is held between steps and free during one."""
        if not self._reserved_bytes:
            yield
            return
        self.reserve = None
        try:
            yield
        finally:
            self.reserve = self._hold()

    def take(self, name: str, *shape: int) -> Tensor:
        """The first elements of `name` in `shape`. Views are kept: a decode step asks for the same ones every time."""
        key = (name, shape)
        view = self._views.get(key)
        if view is None:
            if len(self._views) > 4096:  # prefill tails of many lengths
                self._views.clear()
            view = self._views[key] = self._flat[name][: prod(shape)].view(shape)
        return view

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """Whatever views `make` builds of the buffers, built once per key: a decode step asks for the same every time."""
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) > 4096:
                self._kept.clear()
            kept = self._kept[key] = make()
        return kept

    def flat(self, name: str) -> Tensor | None:
        """A buffer as one row of elements; None where this model needs none."""
        return self._flat.get(name)

    def size(self, name: str) -> int:
        """Elements of a buffer."""
        return self._flat[name].numel()

    def get(self, name: str) -> Tensor | None:
        """A buffer in its full shape; None where this model has none."""
        return self._shaped.get(name)
