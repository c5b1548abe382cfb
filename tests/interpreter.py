"""Triton 3.6's interpreter, made several times as fast: `python -m interpreter MODULE ARG ...` runs MODULE in it.

As it is it patches `triton.language` anew at every call of a jitted helper, builds the same types over and over, and computes by a
dozen of its own operations whether an integer overflows, to say nothing then: here that ends the program.
"""

from __future__ import annotations

import os
import runpy
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def patch_once() -> None:
    """`triton.language` stays patched: a process with the interpreter compiles nothing."""
    patch = interpreter._patch_lang
    for module in (tl, tl.core):
        patch(type("Function", (), {"__globals__": {"tl": module}}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def check_overflow(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, operation: Any) -> None:
    """The operation in 64 bits must fit the type."""
    kind = lhs.type.scalar
    if kind.int_bitwidth < 64:
        name = operation.__name__
        exact = ARITHMETIC[name](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        assert exact.min() >= kind.get_int_min_value() and exact.max() <= kind.get_int_max_value(), f"{kind} overflow: {name}"


@cache
def shape_of(sizes: tuple[int, ...]) -> tuple[tl.tuple, int, tl.tuple, tl.constexpr]:
    """Of a type, and of a tensor of it: the shape and how many values that is. Refused as by triton."""
    count = validate_block_shape(list(sizes))
    return tl.tuple(sizes), count, tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(count)


NO_SHAPE = tl.tuple(()), tl.constexpr(1)


def block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
    assert sizes, "a block without dimensions"
    self.element_ty = element_ty
    self.shape, self.numel, *self.of_tensor = shape_of(sizes)
    self.name = f"<{sizes}, {element_ty.name}>"


def tensor(self: tl.tensor, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else NO_SHAPE


def equal(self: tl.tuple, other: Any, slowly: Any = tl.tuple.__eq__) -> tl.constexpr:
    return tl.constexpr(True) if self is other else slowly(self, other)


def main() -> None:
    patch_once()
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    tl.block_type.__init__, tl.tensor.__init__, tl.tuple.__eq__ = block_type, tensor, equal
    np_dtype, known = interpreter._get_np_dtype, {}

    def np_dtype_once(kind: Any) -> np.dtype[Any]:
        name = kind.name
        if name not in known:
            known[name] = np_dtype(kind)
        return known[name]

    interpreter._get_np_dtype = np_dtype_once
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
