"""Products with a weight, and rows of a table, into a given buffer; the weight may stay quantised.

Legend: T tokens, N rows and K columns of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.weights.blocks import Weight, dequantise


def linear(x_TK: Tensor, weight: Weight, out_TN: Tensor, tile: Tensor | None) -> Tensor:
    """out = x @ weight.T. A quantised weight is expanded whole rows at a time into `tile`, a flat buffer of x's dtype."""
    if isinstance(weight, Tensor):
        if x_TK.shape[0] == 1:  # a matrix-vector product reads the weight as it lies; a product of one row packs it first
            torch.mv(weight, _row(x_TK), out=_row(out_TN))
            return out_TN
        return torch.mm(x_TK, weight.t(), out=out_TN)
    n_rows, columns = weight.shape
    if tile is None or tile.numel() < columns:
        raise ValueError(f"linear: rows of {columns} values need a tile of at least that, got {tile}")
    step = tile.numel() // columns
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        part = tile[: (stop - start) * columns].view(stop - start, columns)
        dequantise(weight.data[start:stop], weight.type, x_TK.dtype, out=part)
        torch.mm(x_TK, part.t(), out=out_TN[:, start:stop])
    return out_TN


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
    return dequantise(table.data[ids_T], table.type, out_TK.dtype, out=out_TK)
