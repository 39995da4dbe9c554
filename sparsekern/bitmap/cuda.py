"""bitmap on NVIDIA GPUs (csrc/bitmap/*.cuh): few tokens straight from the bits, many on dense tensor cores.

Skipping half of the products saves nothing where they are what costs: beyond DECODE tokens, and for gradients, the
weight is written out densely for cuBLAS by a kernel that costs its dense bytes, and thrown away.

Where few weights are left their bits cost more than their columns: csrc/csr/mv.cuh has the bytes of both. On an H100 a
multiprocessor spends about 70 cycles on 1024 weights by bits, whatever their number, and 0.2 cycles on each nonzero by
distances (3 bytes) for one token, 0.4 for up to four: equal at densities of 0.34 and 0.17. Cards with less bandwidth
count bytes, 2 d + 1/8 and 3 d: equal at 0.125, 11 % more at 0.2. BY_ROWS lies between.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _rows_cuda
from .._ext import (
    ACTIVATIONS,
    DTYPES,
    capability,
    cuda,
    emulating,
    known_bias,
    multiprocessors,
    stream_of,
    unit_rows,
    why_not_cuda,
    word_rows,
)
from .._plan import plan
from .._rows import DerivedRows
from .._workspace import workspace
from ..ref import ACTIVATIONS as FUNCTIONS
from . import fragments
from .layout import Bitmap

ENDINGS = frozenset[str]()  # what mm takes beside bias and activation (_ending.py)
DECODE = 64  # tokens
BY_ROWS = {1: 0.25, 2: 0.15, 3: 0.15, 4: 0.15}  # tokens: densities below which the weight is read as rows
HALVES = (torch.bfloat16, torch.float16)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may have, by architecture


def why_not(op: str, layout: Bitmap, x: Tensor) -> str | None:
    """Why the CUDA kernels cannot run `op` on this layout and x, or None where they can."""
    own = layout.values.dtype
    if own not in DTYPES or own == torch.int8:
        return f"{own} is not supported by the CUDA kernels"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    return why_not_cuda(x.device)


def mm(layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    (n, k), m = layout.shape, x.shape[0]
    if m and n and k:
        if by_rows(layout, m):
            return _rows_cuda.mm(rows_of(layout), x, bias, activation)
        if layout.dtype in HALVES and m <= DECODE:
            how = _choice(layout, m, x.device)
            if how is not None:
                return _decode(layout, x, bias, activation, *how)
    bias = bias if bias is None else bias.to(x.dtype)
    return FUNCTIONS[activation](torch.nn.functional.linear(x, _dense(layout), bias))


def by_rows(layout: Bitmap, m: int) -> bool:
    """Whether a product with m tokens reads the weight as rows: few tokens, and few weights or fp32 ones, for which no
    tensor core is exact enough."""
    if m > _rows_cuda.MV_TOKENS or layout.values.numel() >= 2**31:
        return False
    return layout.dtype not in HALVES or layout.density < BY_ROWS[m]


def mm_t(layout: Bitmap, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return dy @ _dense(layout)


def sddmm(layout: Bitmap, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz], sampled from cuBLAS's product."""
    values = layout.values.new_empty(layout.values.shape)
    _expand("bitmap_from_dense", layout, values, (dy.t() @ x).contiguous())
    return values


def _decode(
    layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str, number: int, kernel: Kernel, workers: int
) -> Tensor:
    n, m, dtype = layout.shape[0], x.shape[0], DTYPES[x.dtype]
    x, y, bias = word_rows(unit_rows(x)), x.new_empty(m, n), known_bias(bias)
    packed = _packed(layout)
    row_blocks = -(-n // fragments.TILE_ROWS)
    words = 2 * kernel.tokens * fragments.TILE_ROWS * workers
    partials, counters = workspace(x, words, row_blocks)
    cuda().bitmap_mm(
        number,
        dtype,
        packed.records.data_ptr(),
        packed.offsets.data_ptr(),
        packed.longest,
        n,
        x.shape[1],
        x.data_ptr(),
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        workers,
        partials.data_ptr(),
        counters.data_ptr(),
        stream_of(x),
    )
    return y


class Kernel(NamedTuple):
    """A row of _cuda.bitmap_kernels(type)."""

    tokens: int
    warps: int
    blocks: int  # of an SM, where shared memory allows
    shared_bytes: int  # without any record
    shared_more: int  # for each byte of the longest record

    def shared(self, longest: int) -> int:
        return self.shared_bytes + self.shared_more * longest


@cache
def kernels(dtype: int) -> tuple[Kernel, ...]:
    """The compiled kernels for values of this type."""
    return tuple(Kernel(*row) for row in cuda().bitmap_kernels(dtype))


def _choice(layout: Bitmap, m: int, device: torch.device) -> tuple[int, Kernel, int] | None:
    """The first kernel that has so many tokens and fits the card, with its workers; None where none fits."""
    longest = _packed(layout).longest
    here = 90 if emulating() else capability(device)
    room = SHARED[max(arch for arch in SHARED if arch <= here)] * 1024
    (n, k) = layout.shape
    tiles = -(-n // fragments.TILE_ROWS) * -(-k // fragments.TILE_COLUMNS)
    for number, kernel in enumerate(kernels(DTYPES[layout.dtype])):
        shared = kernel.shared(longest)
        if m <= kernel.tokens and shared <= room:
            blocks = max(1, min(kernel.blocks, room // (shared + 1024)))
            # A share is at least a tile for every warp.
            return number, kernel, max(1, min(blocks * multiprocessors(device), tiles // kernel.warps))
    return None


def _packed(layout: Bitmap) -> fragments.Fragments:
    """The weight in fragment order, kept beside its values and renewed in place when they change."""
    bits = layout.bits
    key = ("bitmap.fragments", layout.shape, bits.data_ptr(), -1 if bits.is_inference() else bits._version)

    def again(old: fragments.Fragments) -> None:
        old.records.copy_(fragments.pack(layout).records)

    return plan(layout.values, key, lambda: fragments.pack(layout), again)


def _dense(layout: Bitmap) -> Tensor:
    dense = layout.values.new_empty(layout.shape)
    _expand("bitmap_to_dense", layout, layout.values, dense)
    return dense


def _expand(entry: str, layout: Bitmap, values: Tensor, dense: Tensor) -> None:
    n, k = layout.shape
    if n and k:
        bits, offsets = layout.bits.data_ptr(), layout.offsets.data_ptr()
        where = (bits, offsets, n, k, dense.data_ptr(), stream_of(values))
        getattr(cuda(), entry)(DTYPES[values.dtype], values.data_ptr(), *where)


def rows_of(layout: Bitmap) -> DerivedRows:
    """The same weight with explicit columns, derived once."""

    def make() -> tuple[Tensor, Tensor]:
        return layout.offsets.to(torch.int32), layout.mask().nonzero()[:, 1].to(torch.int32)

    crow, col = plan(layout.bits, ("bitmap.rows", *layout.shape), make)
    return DerivedRows(layout.values, crow, col, layout.shape)
