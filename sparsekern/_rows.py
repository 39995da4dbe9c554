"""Launchers of the row-stream kernels (csrc/csr) for any weight whose values lie row by row.

csr is such a weight by itself; 2:4 and bitmap weights become one with columns derived from their index.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._ext import ACTIVATIONS, DTYPES, host, known_bias, unit_rows
from ._plan import plan


class Rows(Protocol):
    """values [nnz] row by row, crow [N + 1] int32, col [nnz] int32 ascending in a row, shape (N, K)."""

    @property
    def values(self) -> Tensor: ...
    @property
    def crow(self) -> Tensor: ...
    @property
    def col(self) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, int]: ...


class DerivedRows(NamedTuple):
    """Rows whose columns were derived from another index."""

    values: Tensor
    crow: Tensor
    col: Tensor
    shape: tuple[int, int]


def _index(w: Rows, tokens: int) -> tuple[Tensor | None, int]:
    """The tile index that a product with so many tokens walks (csrc/csr/host.h) and its width; None: it walks rows."""
    (n, k), crow, col = w.shape, w.crow, w.col
    tile = host().csr_tile(tokens, n, k, col.shape[0])
    if tile == 0:
        return None, 0

    def make() -> Tensor:
        index = torch.empty(host().csr_plan_bytes(n, k, col.shape[0], tile), dtype=torch.uint8, device="cpu")
        host().csr_plan(crow.data_ptr(), col.data_ptr(), n, k, tile, index.data_ptr(), torch.get_num_threads())
        return index

    return plan(col, ("csr.tiles", n, k, tile), make), tile


class _Stream:
    """The values in the order in which an index is walked: a copy, made when the same values are used again.

    Weights in training change between any two products and are read in place; weights that stay are worth a copy. The
    version counter tells of every change but one through `.data`: against that the kernel compares the values' hashes.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.copy: Tensor | None = None


def _stream(w: Rows, index: Tensor, tile: int) -> _Stream:
    """The values' copy in walking order, or none (yet)."""
    values, crow, col = w.values, w.crow, w.col
    stream = plan(values, "csr.stream", _Stream)
    if stream.index is not index:  # first use, or another index
        stream.index, stream.copy = index, None
    elif stream.copy is None:
        n, k = w.shape
        dtype = DTYPES[values.dtype]
        stream.copy = torch.empty(
            host().csr_stream_bytes(n, k, col.shape[0], tile, dtype), dtype=torch.uint8, device="cpu"
        )
        host().csr_stream(
            values.data_ptr(),
            dtype,
            crow.data_ptr(),
            col.data_ptr(),
            n,
            k,
            index.data_ptr(),
            tile,
            stream.copy.data_ptr(),
            torch.get_num_threads(),
        )
    return stream


# Tokens below which the copy is not worth its memory: one narrow panel hardly waits for the values.
_STREAM_TOKENS = 64


def mm(w: Rows, x: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N] in out_dtype (None: x's type)."""
    x = unit_rows(x)
    m, (n, k), values = x.shape[0], w.shape, w.values
    y = x.new_empty(m, n) if out_dtype is None else x.new_empty(m, n, dtype=out_dtype)
    bias = known_bias(bias)
    index, tile = _index(w, m)
    stream = None if index is None or m < _STREAM_TOKENS else _stream(w, index, tile)
    dtype = DTYPES[values.dtype]
    fresh = host().csr_mm(
        values.data_ptr(),
        dtype,
        w.crow.data_ptr(),
        w.col.data_ptr(),
        n,
        k,
        0 if index is None else index.data_ptr(),
        tile,
        0 if stream is None or stream.copy is None else stream.copy.data_ptr(),
        x.data_ptr(),
        dtype,
        m,
        x.stride()[0],
        y.data_ptr(),
        DTYPES[y.dtype],
        n,
        0,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    if stream is not None and not fresh:
        stream.index = stream.copy = None
    return y


def mm_t(w: Rows, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    dy = unit_rows(dy)
    m, (n, k), values = dy.shape[0], w.shape, w.values
    dx = dy.new_empty(m, k)
    index, tile = _index(w, m)
    host().csr_mm_t(
        values.data_ptr(),
        DTYPES[values.dtype],
        w.crow.data_ptr(),
        w.col.data_ptr(),
        n,
        k,
        0 if index is None else index.data_ptr(),
        tile,
        dy.data_ptr(),
        DTYPES[dy.dtype],
        m,
        dy.stride(0),
        dx.data_ptr(),
        k,
        torch.get_num_threads(),
    )
    return dx


def sddmm(w: Rows, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    dy, x = unit_rows(dy), unit_rows(x)
    m, (n, k) = x.shape[0], w.shape
    dvalues = w.values.new_empty(w.values.shape)
    index, tile = _index(w, m)
    host().csr_sddmm(
        dvalues.data_ptr(),
        DTYPES[dvalues.dtype],
        w.crow.data_ptr(),
        w.col.data_ptr(),
        n,
        k,
        0 if index is None else index.data_ptr(),
        tile,
        dy.data_ptr(),
        DTYPES[dy.dtype],
        m,
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        torch.get_num_threads(),
    )
    return dvalues
