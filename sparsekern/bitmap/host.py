"""bitmap on the compiled CPU kernels (csrc/bitmap)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import ACTIVATIONS, DTYPES, host, why_not_host
from .._plan import plan
from .layout import Bitmap

# Tokens from which skipping zeros beats expanding them on vectors; on tiles nothing does.
_ROWS_TOKENS = 32


def why_not(op: str, layout: Bitmap, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype != layout.values.dtype:
        return f"activations of {str(x.dtype).removeprefix('torch.')} need values of the same type"
    if op != "mm" and layout.values.numel() >= 2**31:
        return f"{op} counts stored values in 32 bits, and there are {layout.values.numel()}"
    return why_not_host()


def mm(layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    n, k = layout.shape
    m = x.shape[0]
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    if m >= _ROWS_TOKENS and host().active_isa() != "amx" and layout.values.numel() < 2**31:
        return _rows.mm(_topology(layout), layout.values, x, bias, activation)
    x = _rows.unit_stride(x)
    y = x.new_empty((m, n))
    host().bitmap_mm(
        layout.values.data_ptr(),
        layout.bits.data_ptr(),
        layout.offsets.data_ptr(),
        DTYPES[layout.values.dtype],
        n,
        k,
        x.data_ptr(),
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _topology(layout: Bitmap) -> _rows.Rows:
    """Where each stored value belongs."""
    bits, offsets, (n, k), nnz = layout.bits, layout.offsets, layout.shape, layout.values.numel()

    def make() -> _rows.Rows:
        col = torch.empty(nnz, dtype=torch.int32)
        host().bitmap_columns(bits.data_ptr(), offsets.data_ptr(), n, k, col.data_ptr(), torch.get_num_threads())
        return _rows.Rows(offsets.int(), col, (n, k))

    rows: _rows.Rows = plan(bits, ("bitmap.rows", n, k), make)
    return rows


def mm_t(layout: Bitmap, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return _rows.mm_t(_topology(layout), layout.values, dy)


def sddmm(layout: Bitmap, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    dvalues = layout.values.new_empty(layout.values.shape)
    _rows.sddmm(_topology(layout), dvalues, dy, x)
    return dvalues
