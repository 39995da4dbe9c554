"""csr on the CPU: launchers of the compiled kernels (csrc/csr)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import ACTIVATIONS, DTYPES, host, why_not_host
from .._plan import plan
from .layout import Csr


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    for dtype in (layout.values.dtype, x.dtype):
        if dtype not in DTYPES or dtype == torch.int8:
            return f"{dtype} is not supported by the host kernels"
    if layout.values.dtype != x.dtype:
        return f"values are {layout.values.dtype}, activations {x.dtype}; they must agree"
    return why_not_host()


def _rows(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _index(layout: Csr, tokens: int) -> tuple[Tensor | None, int]:
    """The index that a product with so many tokens walks (csrc/csr/host.h), its tile width; None: none."""
    (n, k), crow, col = layout.shape, layout.crow, layout.col
    tile = host().csr_tile(tokens, n, k, col.shape[0])
    if tile == 0:
        return None, 0

    def make() -> Tensor:
        index = torch.empty(host().csr_plan_bytes(n, k, col.shape[0], tile), dtype=torch.uint8)
        host().csr_plan(
            crow.data_ptr(), col.data_ptr(), n, k, tile, index.data_ptr(), torch.get_num_threads()
        )
        return index

    return plan(col, ("csr.tiles", n, k, tile), make), tile


class _Stream:
    """The values in the order in which an index is walked: a copy, made when the same values are used again.

    Weights in training change between any two products and are read in place; those that stay earn a copy.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.copy: Tensor | None = None


def _stream(layout: Csr, index: Tensor, tile: int) -> int:
    """The address of the values' copy in walking order, 0 where there is none (yet)."""
    values, crow, col = layout.values, layout.crow, layout.col
    stream = plan(values, "csr.stream", _Stream)
    if stream.index is not index:  # first use of these values, or another index
        stream.index, stream.copy = index, None
        return 0
    if stream.copy is None:
        n, k = layout.shape
        stream.copy = torch.empty(values.shape, dtype=values.dtype)
        host().csr_stream(
            values.data_ptr(),
            DTYPES[values.dtype],
            crow.data_ptr(),
            col.data_ptr(),
            n,
            k,
            index.data_ptr(),
            tile,
            stream.copy.data_ptr(),
            torch.get_num_threads(),
        )
    return stream.copy.data_ptr()


# Tokens below which the copy is not worth its memory: one narrow panel hardly waits for the values.
_STREAM_TOKENS = 64


def mm(layout: Csr, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    x = _rows(x)
    m, (n, k), values = x.shape[0], layout.shape, layout.values
    y = x.new_empty((m, n))
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    index, tile = _index(layout, m)
    dtype = DTYPES[values.dtype]
    host().csr_mm(
        values.data_ptr(),
        dtype,
        layout.crow.data_ptr(),
        layout.col.data_ptr(),
        n,
        k,
        0 if index is None else index.data_ptr(),
        tile,
        0 if index is None or m < _STREAM_TOKENS else _stream(layout, index, tile),
        x.data_ptr(),
        dtype,
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


def mm_t(layout: Csr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    dy = _rows(dy)
    m, (n, k), values = dy.shape[0], layout.shape, layout.values
    dx = dy.new_empty((m, k))
    index, tile = _index(layout, m)
    host().csr_mm_t(
        values.data_ptr(),
        DTYPES[values.dtype],
        layout.crow.data_ptr(),
        layout.col.data_ptr(),
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


def sddmm(layout: Csr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    dy, x = _rows(dy), _rows(x)
    m, (n, k) = x.shape[0], layout.shape
    dvalues = layout.values.new_empty(layout.values.shape)
    index, tile = _index(layout, m)
    host().csr_sddmm(
        dvalues.data_ptr(),
        DTYPES[dvalues.dtype],
        layout.crow.data_ptr(),
        layout.col.data_ptr(),
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
