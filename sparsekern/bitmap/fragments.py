"""Fragment orders: bitmap as NVIDIA's tensor cores take it (csrc/bitmap/fragments.cuh). Derived, cached, never saved.

W is cut into tiles, contiguous along K, each a record of its bits and as many values as it has, filled up to a multiple
of 16 bytes. Packing is a permutation, so it is lossless and needs no kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as _pad

from ..layout import padded
from .layout import Bitmap

UNIT = 16  # bytes that offsets count
_AXES = {"s": 0, "i": 4, "r": 2, "g": 8, "h": 2, "t": 4, "e": 2}  # their lengths; s is the order's


class Order(NamedTuple):
    """How the weights of a tile are numbered: its axes of rows, then of columns, slowest first.

    Operand i of step s, lane 4 g + t, half h of K, register r (of rows), element e.
    """

    name: str
    steps: int
    row_axes: str
    column_axes: str
    head: int  # 16-bit halves of a record before its bits: where the values of each step begin

    @property
    def rows(self) -> int:
        return self._size(self.row_axes)

    @property
    def columns(self) -> int:
        return self._size(self.column_axes)

    @property
    def bits(self) -> int:
        """16-bit halves of a record's bits."""
        return self.steps * 64

    def _size(self, axes: str) -> int:
        return torch.Size(self.lengths(axes)).numel()

    def lengths(self, axes: str) -> list[int]:
        return [_AXES[axis] or self.steps for axis in axes]

    def permutation(self, axes: str, given: str = "") -> list[int]:
        """Of the axes behind the two of tiles, from the order `given` (that of the tile) to this one."""
        have = given or self.row_axes + self.column_axes
        return [0, 1, *(2 + have.index(axis) for axis in axes)]


SM80 = Order("sm80", 2, "irg", "shte", 0)
SM90 = Order("sm90", 4, "srg", "ihte", 8)
ORDERS = {order.name: order for order in (SM80, SM90)}
_WORDS = "sgtheir"  # a lane's bits, lowest first, step by step
_WALK = "sihgtre"  # values


class Fragments(NamedTuple):
    """records: int16 halves; offsets: int32 [tiles + 1], where each tile's record begins, in 16 bytes; longest: bytes
    of the longest record."""

    records: Tensor
    offsets: Tensor
    longest: int


def pack(layout: Bitmap, order: Order) -> Fragments:
    """The records of a layout with 16-bit values."""
    if layout.values.element_size() != 2:
        raise ValueError(f"fragment order is for 16-bit values, not {layout.values.dtype}")
    walk, counts = _walk(layout, order)
    tiles, head, device = len(walk), order.head + order.bits, walk.device
    words = _tiles(layout.mask(), order, _WORDS).reshape(tiles, order.bits * 2, 8)
    place = torch.arange(8, dtype=torch.uint8, device=device)
    bits = (words.to(torch.uint8) << place).sum(-1, dtype=torch.uint8).view(torch.int16)

    units = (counts + head + 7) // 8
    offsets = _pad(units.cumsum(0), (1, 0))
    records = torch.zeros(int(offsets[-1]) * 8, dtype=torch.int16, device=device)
    starts = offsets[:-1, None] * 8
    if order.head:
        steps = walk.view(tiles, order.steps, 1024).sum(2)
        begins = 2 * (head + steps.cumsum(1) - steps)
        records[starts + torch.arange(order.steps, device=device)] = begins.to(torch.int16)
    records[starts + order.head + torch.arange(order.bits, device=device)] = bits.view(tiles, order.bits)
    dense = _tiles(layout.unpack().view(torch.int16), order, _WALK)
    records[_positions(starts + head, walk, counts)] = dense.reshape(walk.shape)[walk]
    return Fragments(records, offsets.to(torch.int32), int(units.max()) * UNIT if tiles else 0)


def places(layout: Bitmap, fragments: Fragments, order: Order) -> Tensor:
    """int64 [nnz]: where in the records each of the layout's values lies, so that new values need no new packing."""
    walk, counts = _walk(layout, order)
    mask = layout.mask()
    number = torch.zeros(layout.shape, dtype=torch.int64, device=mask.device)
    number[mask] = torch.arange(layout.values.numel(), device=mask.device)
    starts = fragments.offsets[:-1, None].long() * 8 + order.head + order.bits
    out = number.new_empty(layout.values.numel())
    out[_tiles(number, order, _WALK).reshape(walk.shape)[walk]] = _positions(starts, walk, counts)
    return out


def unpack(fragments: Fragments, order: Order, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense W[N, K] of these records: the inverse of `pack`."""
    (n, k), records = shape, fragments.records
    rows, columns = -(-n // order.rows), -(-k // order.columns)
    starts = fragments.offsets[:-1, None].long() * 8 + order.head
    bits = records[starts + torch.arange(order.bits, device=records.device)].view(torch.uint8)
    place = torch.arange(8, dtype=torch.uint8, device=records.device)
    words = (bits[..., None] >> place & 1).bool().view(rows, columns, *order.lengths(_WORDS))
    walk = words.permute(order.permutation(_WALK, _WORDS)).reshape(rows * columns, order.rows * order.columns)
    dense = records.new_zeros(walk.shape)
    dense[walk] = records[_positions(starts + order.bits, walk, walk.sum(1))]
    split = dense.view(rows, columns, *order.lengths(_WALK))
    axes = order.permutation(order.row_axes + order.column_axes, _WALK)
    middle = 2 + len(order.row_axes)
    matrix = split.permute(0, *axes[2:middle], 1, *axes[middle:]).reshape(rows * order.rows, columns * order.columns)
    return matrix[:n, :k].contiguous().view(dtype)


def _walk(layout: Bitmap, order: Order) -> tuple[Tensor, Tensor]:
    """The mask of each tile in the order of its values, and how many there are."""
    split = _tiles(layout.mask(), order, _WALK)
    walk = split.reshape(split.shape[0] * split.shape[1], order.rows * order.columns)
    return walk, walk.sum(1)


def _positions(starts: Tensor, walk: Tensor, counts: Tensor) -> Tensor:
    """Where the values of all tiles lie, in the order of `walk`: those of a tile follow each other from its start."""
    rank = torch.arange(int(counts.sum()), device=walk.device)
    return rank + torch.repeat_interleave(starts[:, 0] - (counts.cumsum(0) - counts), counts)


def _tiles(matrix: Tensor, order: Order, axes: str) -> Tensor:
    """[N, K] as [rows of tiles, columns of tiles, *axes], zeros at the ragged edges."""
    (n, k) = matrix.shape
    rows, columns = -(-n // order.rows), -(-k // order.columns)
    whole = padded(matrix, rows * order.rows, columns * order.columns)
    middle = 1 + len(order.row_axes)
    split = whole.view(rows, *order.lengths(order.row_axes), columns, *order.lengths(order.column_axes))
    return split.permute(0, middle, *range(1, middle), *range(middle + 1, split.dim())).permute(order.permutation(axes))
