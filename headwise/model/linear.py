"""Products with a weight, and rows of a table, into a given buffer; the weight may stay quantised.

A weight is a tensor of floats, which one row meets in a kernel of ours where those are used (`kernels.floats`); the file's blocks
(BlockTensor), expanded by PyTorch a tile at a time; planes (`kernels.tiled`), which our kernels multiply as they are where rows
are few (`kernels.skinny`, `kernels.matvec`), and expand a tile at a time where they are many; or e4m3 with scales (Fp8Tensor), for
which the same is true (`kernels.fp8`), but that many rows become e4m3 too where the card multiplies that and each row of the
weight has one scale.

Legend: T tokens, N rows and K columns of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from headwise.model.arena import Room
from headwise.planner.workspace import scaled_bytes
from headwise.spec.layers import Activation
from headwise.weights.blocks import BlockTensor, Fp8Tensor, Weight, dequantise, expand_fp8

if TYPE_CHECKING:
    from headwise.kernels.arrange import Arranged
    from headwise.kernels.fp8 import Config as Fp8Config
    from headwise.kernels.matvec import Config, Integers
    from headwise.kernels.skinny import Config as SkinnyConfig

    C = TypeVar("C", Config, Fp8Config, SkinnyConfig)

Activations: TypeAlias = "Tensor | Integers | Arranged"

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
    if isinstance(weight, Fp8Tensor):
        return _fp8(_floats(x_TK), weight, out_TN, room)
    linears(x_TK, [(weight, out_TN)], room)
    return out_TN


def linears(x_TK: Activations, products: Sequence[tuple[Weight, Tensor]], room: Room) -> None:
    """Several products of the same activations, each into its buffer: they become integers, or are arranged, once."""
    given = x_TK
    for weight, out_TN in products:
        if isinstance(weight, Tensor | BlockTensor | Fp8Tensor):
            linear(x_TK, weight, out_TN, room)
            given = x_TK  # what was arranged in the tile may be overwritten
        elif x_TK.shape[0] <= room.skinny_rows:
            given = _skinny(given, weight, out_TN, room)
        elif x_TK.shape[0] <= MATRIX_ROWS:
            given = _few_rows(given, weight, out_TN, room)
        else:
            x = _floats(x_TK)
            _by_tiles(x, weight.rows, weight.K, out_TN, room, lambda start, stop, part, w=weight: _expanded(w, start, stop, part))


def acted(x_TK: Tensor, weight: Weight, act: Activation, out_TN: Tensor, room: Room, times_TN: Tensor | None = None) -> bool:
    """out = act(x @ weight.T) * times; no `times`: act of the product's first half by its second. False: no launch does it."""
    if x_TK.shape[0] > 1 or not isinstance(weight, Tensor | Fp8Tensor) or act == "swiglu_clamped":
        return False
    return _acted(x_TK, weight, act, out_TN, room, times_TN)


def _acted(
    x_1K: Tensor, weight: Tensor | Fp8Tensor, act: Activation | None, out_1N: Tensor, room: Room, times_1N: Tensor | None
) -> bool:
    if not room.fused:
        return False
    if isinstance(weight, Fp8Tensor):
        from headwise.kernels.fp8 import one_row

        one_row(x_1K, weight.data, weight.scales, out_1N, act=act, times=times_1N)
        return True
    from headwise.kernels.floats import product

    product(_row(x_1K), weight, _row(out_1N), act=act, times=None if times_1N is None else _row(times_1N))
    return True


def ready_room(weight: Weight, T: int, room: Room) -> Tensor | None:
    """Where T rows of activations become what meets `weight`: integers, or rows arranged; None: they stay as they are."""
    if isinstance(weight, Tensor | BlockTensor | Fp8Tensor):
        return None
    if room.skinny_rows >= T:
        return room.tile
    return room.words if T <= INTEGER_ROWS else None


def _floats(x_TK: Activations) -> Tensor:
    if not isinstance(x_TK, Tensor):
        raise ValueError(f"linear: {tuple(x_TK.shape)} activations as {type(x_TK).__name__}, by a weight of floats")
    return x_TK


def _few_rows(x: Activations, planes: Any, out_TN: Tensor, room: Room) -> Activations:
    """The product; what it was of, for the next."""
    from headwise.kernels import matvec as K
    from headwise.kernels import split

    T, k = x.shape
    if room.words is None or room.partial is None or room.done is None:
        raise ValueError("linear: planes need room for integers, partial sums and counters")
    most = T if T <= INTEGER_ROWS else MATRIX_ROWS
    config = K.config_for(planes.type, most, planes.rows, k, split.card(out_TN.device).processors)
    given = x if isinstance(x, K.Integers) else K.quantise(_floats(x), room.words) if T <= INTEGER_ROWS else _floats(x)
    K.matvec(given, planes, out_TN, scratch=room.partial, done=room.done, config=_within(config, T, planes.rows, room))
    return given


def _skinny(x: Activations, planes: Any, out_TN: Tensor, room: Room) -> Activations:
    """As `_few_rows`."""
    from headwise.kernels import skinny as S
    from headwise.kernels import split
    from headwise.kernels.arrange import Arranged, arrange

    if room.tile is None or room.partial is None or room.done is None:
        raise ValueError("linear: planes need room for what is arranged, partial sums and counters")
    given = x if isinstance(x, Arranged) else arrange(_floats(x), room.tile)
    T, k = x.shape
    config = _within(S.config_for(planes.type, T, planes.rows, k, split.card(out_TN.device)), T, planes.rows, room)
    S.skinny(given, planes, out_TN, scratch=room.partial, done=room.done, config=config)
    return given


def _fp8(x_TK: Tensor, w: Fp8Tensor, out_TN: Tensor, room: Room) -> Tensor:
    (T, K), (N, _) = x_TK.shape, w.shape
    if not room.fused:
        return _by_tiles(x_TK, N, K, out_TN, room, partial(_expanded_fp8, w))
    from headwise.kernels import fp8, fp8_rows, split

    if T == 1:
        return fp8.one_row(x_TK, w.data, w.scales, out_TN)
    if T <= fp8.MOST_ROWS:
        if room.partial is None or room.done is None:
            raise ValueError("linear: e4m3 needs room for partial sums and counters")
        config = _within(fp8.config_for(T, N, K, split.card(out_TN.device)), T, N, room)
        return fp8.product(x_TK, w.data, w.scales, out_TN, scratch=room.partial, done=room.done, config=config)
    if not _takes_scaled(w, out_TN, room):
        return _by_tiles(x_TK, N, K, out_TN, room, lambda a, b, tile: fp8_rows.expand(w.data[a:b], w.scales[a:b], tile))
    if room.tile is None or room.tile.nbytes < scaled_bytes(T, K):
        raise ValueError(f"linear: ({T}, {K}) in e4m3 need {scaled_bytes(T, K)} bytes, got {room.tile}")
    as_bytes = room.tile.view(torch.uint8)
    q_TK = as_bytes[: T * K].view(torch.float8_e4m3fn).view(T, K)
    scales_T = as_bytes[T * K : scaled_bytes(T, K)].view(torch.float32)
    fp8_rows.quantise(x_TK, q_TK, scales_T)
    return torch.ops.aten._scaled_mm.out(
        q_TK, w.data.t(), scales_T[:, None], w.scales.t(), out_dtype=out_TN.dtype, use_fast_accum=True, out=out_TN
    )


def _takes_scaled(w: Fp8Tensor, out_TN: Tensor, room: Room) -> bool:
    """Whether rows become e4m3 too: the card and PyTorch's product allow it. Source: ATen/native/cuda/ScaledBlas.cpp."""
    whole = all(n % 16 == 0 for n in w.shape)
    return room.scaled_rows and w.scales.shape[1] == 1 and whole and out_TN.is_contiguous()


def _within(config: C, T: int, N: int, room: Room) -> C:
    """Fewer programs a row where partial sums or counters have no room."""
    assert room.partial is not None
    assert room.done is not None
    while config.splits > 1 and (T * N * config.splits > room.partial.numel() or -(-N // config.rows) > room.done.numel()):
        config = config._replace(splits=config.splits // 2)
    return config


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


def _expanded_fp8(w: Fp8Tensor, start: int, stop: int, part: Tensor) -> None:
    expand_fp8(w.data[start:stop], w.scales[start:stop], part)


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
    assert not isinstance(table, Fp8Tensor)  # tables in e4m3 are expanded at load
    from headwise.kernels.expand import gather

    return gather(table, ids_T, out_TK)
