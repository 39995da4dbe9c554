"""Products of weights whose values lie row by row, given the column of each: the way of 2:4 and bitmap in training.

The kernels are those of csr (csrc/csr/host.h); they take any values in row-major order with a (crow, col) topology.
A format derives that topology once and keeps it beside its index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._ext import ACTIVATIONS, DTYPES, host
from ._plan import plan


class Rows(NamedTuple):
    """The topology: crow [N + 1] and col [nnz], both int32, of a weight of this shape (K as padded by the format)."""

    crow: Tensor
    col: Tensor
    shape: tuple[int, int]


def unit_stride(x: Tensor) -> Tensor:
    """x with unit stride along its rows; the rows themselves may lie any distance apart."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _index(rows: Rows, tokens: int) -> tuple[int, int]:
    """Address and shift of the tile index that a product with so many tokens walks; 0: it walks rows."""
    crow, col, (n, k) = rows
    nnz = col.shape[0]
    shift = host().csr_shift(tokens, n, k, nnz)
    if shift == 0:
        return 0, 0

    def make() -> Tensor:
        index = torch.empty(host().csr_plan_bytes(n, k, nnz, shift), dtype=torch.uint8)
        host().csr_plan(crow.data_ptr(), col.data_ptr(), n, k, shift, index.data_ptr(), torch.get_num_threads())
        return index

    return plan(col, ("rows.tiles", n, k, shift), make).data_ptr(), shift


def mm(rows: Rows, values: Tensor, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias)."""
    x = unit_stride(x)
    m, n = x.shape[0], rows.shape[0]
    y = x.new_empty((m, n))
    index, shift = _index(rows, m)
    host().csr_mm(
        values.data_ptr(),
        DTYPES[values.dtype],
        rows.crow.data_ptr(),
        rows.col.data_ptr(),
        *rows.shape,
        index,
        shift,
        0,
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        0,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def mm_t(rows: Rows, values: Tensor, dy: Tensor) -> Tensor:
    """dX = dY W."""
    dy = unit_stride(dy)
    m, k = dy.shape[0], rows.shape[1]
    dx = dy.new_empty((m, k))
    index, shift = _index(rows, m)
    host().csr_mm_t(
        values.data_ptr(),
        DTYPES[values.dtype],
        rows.crow.data_ptr(),
        rows.col.data_ptr(),
        *rows.shape,
        index,
        shift,
        dy.data_ptr(),
        DTYPES[dy.dtype],
        m,
        dy.stride(0),
        dx.data_ptr(),
        k,
        torch.get_num_threads(),
    )
    return dx


def sddmm(rows: Rows, dvalues: Tensor, dy: Tensor, x: Tensor) -> None:
    """dvalues = (dY^T X) at the stored positions."""
    dy, x = unit_stride(dy), unit_stride(x)
    index, shift = _index(rows, x.shape[0])
    host().csr_sddmm(
        dvalues.data_ptr(),
        DTYPES[dvalues.dtype],
        rows.crow.data_ptr(),
        rows.col.data_ptr(),
        *rows.shape,
        index,
        shift,
        dy.data_ptr(),
        DTYPES[dy.dtype],
        x.shape[0],
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        torch.get_num_threads(),
    )
