"""bitmap on the compiled CPU kernels (csrc/bitmap)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import ACTIVATIONS, DTYPES, host, known_bias, unit_rows, why_not_host
from .._plan import plan
from .layout import Bitmap

ENDINGS = frozenset(("out_dtype",))  # what mm takes beside bias and activation (_ending.py)
# Tokens from which skipping zeros beats expanding them on vectors; on tiles nothing does.
_ROWS_TOKENS = 32


def why_not(op: str, layout: Bitmap, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype != layout.values.dtype:
        return f"activations of {str(x.dtype).removeprefix('torch.')} need values of the same type"
    if op != "mm" and layout.values.numel() >= 2**31:
        return "2^31 nonzeros or more do not fit the int32 row starts of this product"
    return why_not_host()


def mm(
    layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N] in out_dtype (None: x's type, of int8 float32)."""
    n, k = layout.shape
    m = x.shape[0]
    if m >= _ROWS_TOKENS and host().active_isa() != "amx" and layout.values.numel() < 2**31:
        return _rows.mm(_rows_of(layout), x, bias, activation, out_dtype)
    x = unit_rows(x)
    y = x.new_empty(m, n) if out_dtype is None else x.new_empty(m, n, dtype=out_dtype)
    bias = known_bias(bias)
    host().bitmap_mm(
        layout.values.data_ptr(),
        layout.bits.data_ptr(),
        layout.offsets.data_ptr(),
        DTYPES[layout.values.dtype],
        n,
        k,
        x.data_ptr(),
        m,
        x.stride()[0],
        y.data_ptr(),
        DTYPES[y.dtype],
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _rows_of(layout: Bitmap) -> _rows.Rows:
    """The same weight with explicit columns, derived once."""
    n, k = layout.shape

    def make() -> tuple[Tensor, Tensor]:
        col = torch.empty(layout.values.shape, dtype=torch.int32, device="cpu")
        bits, offsets = layout.bits.data_ptr(), layout.offsets.data_ptr()
        host().bitmap_columns(bits, offsets, n, k, col.data_ptr(), torch.get_num_threads())
        return layout.offsets.to(torch.int32), col

    crow, col = plan(layout.bits, ("bitmap.rows", n, k), make)
    return _rows.DerivedRows(layout.values, crow, col, layout.shape)


def mm_t(layout: Bitmap, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return _rows.mm_t(_rows_of(layout), dy)


def sddmm(layout: Bitmap, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    return _rows.sddmm(_rows_of(layout), dy, x)
