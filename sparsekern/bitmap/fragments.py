"""Fragment order: bitmap as NVIDIA's tensor cores take it (csrc/bitmap/fragments.cuh). Derived, cached, never saved.

W is cut into tiles of 64 rows x 32 columns, contiguous along K, each a record of 256 bytes of bits and as many values
as it has, filled up to a multiple of 16 bytes. Packing is a permutation, so it is lossless and needs no kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as _pad

from ..layout import padded
from .layout import Bitmap

TILE_ROWS, TILE_COLUMNS = 64, 32
UNIT = 16  # bytes that offsets count
_BITS = 128  # 16-bit halves of a record's bits
# Row 16 i + 8 r + g of a tile, column 16 s + 8 h + 2 t + e: the axes of a tile after the split, and in walking order.
_SPLIT = (4, 2, 8, 2, 2, 4, 2)  # i r g | s h t e


class Fragments(NamedTuple):
    """records: int16 halves; offsets: int32 [tiles + 1], where each tile's record begins, in 16 bytes; longest: bytes
    of the longest record."""

    records: Tensor
    offsets: Tensor
    longest: int


def pack(layout: Bitmap) -> Fragments:
    """The records of a layout with 16-bit values."""
    if layout.values.element_size() != 2:
        raise ValueError(f"fragment order is for 16-bit values, not {layout.values.dtype}")
    mask = _tiles(layout.mask(), layout.shape)  # [rows, columns, i r g s h t e] of tiles
    tiles = mask.shape[0] * mask.shape[1]
    # Values: steps, groups (i, h), lanes (g, t), bits (r, e). Bits: steps, lanes, then i, h, r, e.
    walk = mask.permute(0, 1, 5, 2, 6, 4, 7, 3, 8).reshape(tiles, TILE_ROWS * TILE_COLUMNS)
    words = mask.permute(0, 1, 5, 4, 7, 2, 6, 3, 8).reshape(tiles, 2 * _BITS, 8)
    place = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (words.to(torch.uint8) << place).sum(-1, dtype=torch.uint8).view(torch.int16)

    counts = walk.sum(1)
    units = (counts + 7) // 8 + _BITS // 8
    offsets = _pad(units.cumsum(0), (1, 0))
    records = torch.zeros(int(offsets[-1]) * 8, dtype=torch.int16, device=mask.device)
    starts = offsets[:-1] * 8
    records[starts[:, None] + torch.arange(_BITS, device=mask.device)] = bits
    dense = _tiles(layout.unpack().view(torch.int16), layout.shape)
    values = dense.permute(0, 1, 5, 2, 6, 4, 7, 3, 8).reshape(tiles, TILE_ROWS * TILE_COLUMNS)[walk]
    rank = torch.arange(len(values), device=mask.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    records[torch.repeat_interleave(starts + _BITS, counts) + rank] = values
    longest = int(units.max()) * UNIT if tiles else 0
    return Fragments(records, offsets.to(torch.int32), longest)


def unpack(fragments: Fragments, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense W[N, K] of these records: the inverse of `pack`."""
    (n, k), records = shape, fragments.records
    rows, columns = -(-n // TILE_ROWS), -(-k // TILE_COLUMNS)
    starts = fragments.offsets[:-1].long() * 8
    bits = records[starts[:, None] + torch.arange(_BITS, device=records.device)].view(torch.uint8)
    words = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=records.device) & 1).bool()
    split = words.view(rows, columns, 2, 8, 4, 4, 2, 2, 2)  # s g t i h r e
    walk = split.permute(0, 1, 2, 5, 6, 3, 4, 7, 8).reshape(rows * columns, TILE_ROWS * TILE_COLUMNS)  # s i h g t r e
    counts = walk.sum(1)
    rank = torch.arange(int(counts.sum()), device=records.device)
    rank = rank - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    dense = records.new_zeros(walk.shape)
    dense[walk] = records[torch.repeat_interleave(starts + _BITS, counts) + rank]
    order = dense.view(rows, columns, 2, 4, 2, 8, 4, 2, 2)  # s i h g t r e
    matrix = order.permute(0, 3, 7, 5, 1, 2, 4, 6, 8).reshape(rows * TILE_ROWS, columns * TILE_COLUMNS)
    return matrix[:n, :k].contiguous().view(dtype)


def _tiles(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N, K] as [rows of tiles, columns of tiles, i, r, g, s, h, t, e], zeros at the ragged edges."""
    (n, k) = shape
    rows, columns = -(-n // TILE_ROWS), -(-k // TILE_COLUMNS)
    whole = padded(matrix, rows * TILE_ROWS, columns * TILE_COLUMNS)
    return whole.view(rows, *_SPLIT[:3], columns, *_SPLIT[3:]).permute(0, 4, 1, 2, 3, 5, 6, 7, 8)
