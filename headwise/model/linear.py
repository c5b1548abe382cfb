"""Products with a weight, and rows of a table, into a given buffer; the weight may stay quantised.

A weight is a tensor of floats, which one row meets in a kernel of ours where those are used (`kernels.floats`); the file's blocks
(BlockTensor), expanded by PyTorch a tile at a time; or planes (`kernels.tiled`), which our kernels multiply as they are where rows
are few, and expand a tile at a time where they are many.

Legend: T tokens, N rows and K columns of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from headwise.model.arena import Room
from headwise.spec.layers import Activation
from headwise.weights.blocks import BlockTensor, Weight, dequantise

if TYPE_CHECKING:
    from headwise.kernels.matvec import Integers

Activations: TypeAlias = "Tensor | Integers"

TILE_ROWS = 128  # a product into 780 columns takes four times as long as one into 768, on an H200 with cuBLAS 13
INTEGER_ROWS, MATRIX_ROWS = 8, 16  # rows that planes meet as integers, and as floats on the matrix unit


def linear(x_TK: Activations, weight: Weight, out_TN: Tensor, room: Room) -> Tensor:
    """out = x @ weight.T."""
    if isinstance(weight, Tensor):
        x = _floats(x_TK)
        if x.shape[0] > 1:
            return torch.mm(x, weight.t(), out=out_TN)
        if not _acted(x, weight, None, out_TN, room, None):
            torch.mv(weight, _row(x), out=_row(out_TN))  # reads the weight as it lies; a product of one row packs it first
        return out_TN
    if isinstance(weight, BlockTensor):
        x_TK = _floats(x_TK)
        n_rows, columns = weight.shape
        return _by_tiles(x_TK, n_rows, columns, out_TN, room, partial(_dequantised, weight))
    linears(x_TK, [(weight, out_TN)], room)
    return out_TN


def linears(x_TK: Activations, products: Sequence[tuple[Weight, Tensor]], room: Room) -> None:
    """Several products of the same activations, each into its buffer: they become integers once."""
    integers = None if isinstance(x_TK, Tensor) else x_TK
    for weight, out_TN in products:
        if isinstance(weight, Tensor | BlockTensor):
            linear(x_TK, weight, out_TN, room)
        elif x_TK.shape[0] > MATRIX_ROWS:
            x = _floats(x_TK)
            _by_tiles(x, weight.rows, weight.K, out_TN, room, lambda start, stop, part, w=weight: _expanded(w, start, stop, part))
        else:
            integers = _few_rows(x_TK, weight, out_TN, room, integers)


def acted(x_TK: Tensor, weight: Weight, act: Activation, out_TN: Tensor, room: Room, times_TN: Tensor | None = None) -> bool:
    """out = act(x @ weight.T) * times; no `times`: act of the product's first half by its second. False: no launch does it."""
    if x_TK.shape[0] > 1 or not isinstance(weight, Tensor) or act == "swiglu_clamped":
        return False
    return _acted(x_TK, weight, act, out_TN, room, times_TN)


def _acted(x_1K: Tensor, weight: Tensor, act: Activation | None, out_1N: Tensor, room: Room, times_1N: Tensor | None) -> bool:
    if not room.fused:
        return False
    from headwise.kernels.floats import product

    product(_row(x_1K), weight, _row(out_1N), act=act, times=None if times_1N is None else _row(times_1N))
    return True


def integer_room(weight: Weight, T: int, room: Room) -> Tensor | None:
    """Where T rows of activations become integers, if that is what `weight` multiplies."""
    return None if isinstance(weight, Tensor | BlockTensor) or T > INTEGER_ROWS else room.words


def _floats(x_TK: Activations) -> Tensor:
    if not isinstance(x_TK, Tensor):
        raise ValueError(f"linear: {tuple(x_TK.shape)} activations as integers, by a weight of floats")
    return x_TK


def _few_rows(x_TK: Activations, planes: Any, out_TN: Tensor, room: Room, integers: Integers | None) -> Integers | None:
    from headwise.kernels import matvec as K

    T, k = x_TK.shape
    if room.words is None or room.partial is None or room.done is None:
        raise ValueError("linear: planes need room for integers, partial sums and counters")
    config = K.config_for(planes.type, T if T <= INTEGER_ROWS else MATRIX_ROWS, planes.rows, k, K.processors(out_TN.device))
    while config.splits > 1 and (
        K.partial_floats(T, planes.rows, config.splits) > room.partial.numel() or -(-planes.rows // config.rows) > room.done.numel()
    ):
        config = config._replace(splits=config.splits // 2)
    if T <= INTEGER_ROWS:
        integers = integers or K.quantise(_floats(x_TK), room.words)
    K.matvec(integers or _floats(x_TK), planes, out_TN, scratch=room.partial, done=room.done, config=config)
    return integers


def _by_tiles(
    x_TK: Tensor, n_rows: int, columns: int, out_TN: Tensor, room: Room, expand: Callable[[int, int, Tensor], object]
) -> Tensor:
    for start, stop, part in _tiles(n_rows, columns, room.tile):
        expand(start, stop, part)
        torch.mm(x_TK, part.t(), out=out_TN[:, start:stop])
    return out_TN


def _tiles(n_rows: int, columns: int, tile: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, floats for them), as many rows at a time as `tile` has room for."""
    if tile is None or tile.numel() < columns:
        raise ValueError(f"linear: rows of {columns} values need a tile of at least that, got {tile}")
    step = tile.numel() // columns
    step = step // TILE_ROWS * TILE_ROWS or step
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        yield start, stop, tile[: (stop - start) * columns].view(stop - start, columns)


def _dequantised(weight: BlockTensor, start: int, stop: int, part: Tensor) -> None:
    dequantise(weight.data[start:stop], weight.type, part.dtype, out=part)


def _expanded(planes: Any, start: int, stop: int, part: Tensor) -> None:
    from headwise.kernels.expand import expand

    expand(planes, start, stop, part)


def _row(x_1K: Tensor) -> Tensor:
    """The only row. The arena hands out the same tensors every step, so each carries its row: a view costs a microsecond."""
    row = getattr(x_1K, "_row", None)
    if row is None:
        row = x_1K[0]
        setattr(x_1K, "_row", row)  # noqa: B010
    return row


def rows(table: Weight, ids_T: Tensor, out_TK: Tensor) -> Tensor:
    """The rows `ids_T` of a table."""
    if isinstance(table, Tensor):
        return torch.index_select(table, 0, ids_T, out=out_TK)
    if isinstance(table, BlockTensor):
        return dequantise(table.data[ids_T], table.type, out_TK.dtype, out=out_TK)
    from headwise.kernels.expand import gather

    return gather(table, ids_T, out_TK)
