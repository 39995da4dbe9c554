"""Fragment order: sp24 as NVIDIA's tensor cores take it (csrc/sp24/fragments.cuh). Derived, cached, never saved.

W is cut into blocks of 64 rows x 128 bytes of K, contiguous along K; a block holds, for each half of its K and each of
128 threads, the 16 bytes of the A operand of mma.sp and wgmma.sp (PTX ISA), then the metadata words: 4608 bytes for
16-bit types, 5120 for 8-bit ones. Packing is a permutation, so it is lossless and needs no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Sp24

BLOCK_ROWS = 64
EMPTY = 0xEE  # two groups that store columns 2 and 3: legal metadata for what lies outside of the weight


def block_k(dtype: torch.dtype) -> int:
    """Columns of a block: 128 bytes of the dense weight."""
    return 128 // dtype.itemsize


def pack(layout: Sp24) -> Tensor:
    """uint8 [ceil(N / 64), ceil(K / block_k), 4608 or 5120] of a layout with 16-bit or 8-bit values."""
    values, metadata = layout.values, layout.metadata
    bytes_, (n, k) = values.element_size(), layout.shape
    if bytes_ > 2:
        raise ValueError(f"fragment order is for 16-bit and 8-bit values, not {values.dtype}")
    rows, blocks = -(-n // BLOCK_ROWS), -(-k // block_k(values.dtype))
    raw = _padded(values.contiguous().view(torch.uint8), rows * BLOCK_ROWS, blocks * 64, 0)
    # Row 16 w + 8 h + g; byte 64 b + 32 s + 16 r + 4 t + e of the stored row. A thread is (w, g, t), a register (r, h).
    split = raw.view(rows, 4, 2, 8, blocks, 2, 2, 4, 4)
    operand = split.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(rows, blocks, 4096)
    width = 8 if bytes_ == 2 else 16  # bytes of metadata in a row of a block
    nibbles = _padded(metadata, rows * BLOCK_ROWS, blocks * width, EMPTY)
    split = nibbles.view(rows, 4, 2, 8, blocks, 2, 2, width // 4)
    # 16 bits: lane t = 2 s + upper, its halves are rows g and g + 8. 8 bits: a word for each s, lane t = h + 2 upper.
    order = (0, 4, 1, 3, 5, 6, 2, 7) if bytes_ == 2 else (0, 4, 5, 1, 3, 6, 2, 7)
    words = split.permute(order).reshape(rows, blocks, 64 * width)
    return torch.cat((operand, words), dim=-1)


def unpack(fragments: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, metadata) in canonical order: the inverse of `pack` for a weight of this shape and dtype."""
    rows, blocks, _ = fragments.shape
    (n, k), width = shape, 8 if dtype.itemsize == 2 else 16
    operand = fragments[..., :4096].reshape(rows, blocks, 2, 4, 8, 4, 2, 2, 4)
    raw = operand.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(rows * BLOCK_ROWS, blocks * 64)
    words = fragments[..., 4096:]
    if dtype.itemsize == 2:
        nibbles = words.reshape(rows, blocks, 4, 8, 2, 2, 2, 2).permute(0, 2, 6, 3, 1, 4, 5, 7)
    else:
        nibbles = words.reshape(rows, blocks, 2, 4, 8, 2, 2, 4).permute(0, 3, 6, 4, 1, 2, 5, 7)
    kp = (k + 7) // 8 * 8
    values = raw[:n, : kp // 2 * dtype.itemsize].contiguous().view(dtype)
    return values, nibbles.reshape(rows * BLOCK_ROWS, blocks * width)[:n, : kp // 8].contiguous()


def _padded(matrix: Tensor, rows: int, columns: int, value: int) -> Tensor:
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, columns - k, 0, rows - n), value=value)
