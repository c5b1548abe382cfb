"""What is really allocated, counted from live tensors: this file shares nothing with the planner.

`allocated_bytes` walks an object and sums the storages of every tensor it can reach. `Peak` watches a CPU forward pass
and counts the tensors that operators allocate on the way; on a GPU the allocator's own maximum is read instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(root: object) -> dict[int, int]:
    """Address -> bytes of every storage reachable from `root` through containers, attributes and slots."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, (str, bytes, int, float, type, type(None))):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, Mapping):
            stack += x.values()
        elif isinstance(x, (list, tuple, set, frozenset)):
            stack += x
        elif type(x).__module__.startswith("headwise"):
            stack += getattr(x, "__dict__", {}).values()
            stack += [getattr(x, s) for c in type(x).__mro__ for s in getattr(c, "__slots__", ()) if hasattr(x, s)]
    return found


def allocated_bytes(root: object) -> int:
    return sum(storages(root).values())


class Peak(TorchDispatchMode):
    """Counts bytes of tensors that come to life inside; `peak_bytes` is the most that lived at once.

    Args:
        known: addresses of storages that were there before (weights, caches, the arena).
    """

    def __init__(self, known: Mapping[int, int]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._known, self._live, self._users = known, 0, dict[int, int]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; the default would import torch._dynamo, a second of every start."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._track(x)
        self.peak_bytes = max(self.peak_bytes, self._live)
        return result

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, n = storage.data_ptr(), storage.nbytes()
        if address in self._known or not n:
            return
        if not self._users.get(address):
            self._live += n
        self._users[address] = self._users.get(address, 0) + 1
        weakref.finalize(x, self._release, address, n).atexit = False

    def _release(self, address: int, n: int) -> None:
        self._users[address] -= 1
        if not self._users[address]:
            self._live -= n
