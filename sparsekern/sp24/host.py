"""sp24 on the compiled CPU kernels (csrc/sp24)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import ACTIVATIONS, DTYPES, host, known_bias, unit_rows, why_not_host
from .._plan import plan
from .layout import Sp24

ENDINGS = frozenset(("out_dtype",))  # what mm takes beside bias and activation (_ending.py)


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype not in DTYPES:
        return f"activations of {str(x.dtype).removeprefix('torch.')} are not supported by the host kernels"
    if layout.values.dtype == torch.int8 and op != "mm":
        return "int8 values have no host kernel but mm"
    if op != "mm" and x.dtype != layout.values.dtype:
        return f"values are {layout.values.dtype}, activations {x.dtype}; they must agree"
    return why_not_host()


def mm(
    layout: Sp24, x: Tensor, bias: Tensor | None, activation: str, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Y = act(X W^T * scale + bias): x [M, K] -> [M, N] in out_dtype (None: x's type, of int8 float32)."""
    n, k = layout.shape
    m = x.shape[0]
    values, scale = layout.values, layout.scale
    x = unit_rows(x)
    x_dtype = DTYPES[x.dtype]
    if out_dtype is not None:
        y, y_dtype = x.new_empty(m, n, dtype=out_dtype), DTYPES[out_dtype]
    elif x_dtype == 3:
        y, y_dtype = x.new_empty(m, n, dtype=torch.float32), 0
    else:
        y, y_dtype = x.new_empty(m, n), x_dtype
    bias = known_bias(bias)
    host().sp24_mm(
        values.data_ptr(),
        layout.metadata.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        DTYPES[values.dtype],
        n,
        k,
        x.data_ptr(),
        x_dtype,
        m,
        x.stride()[0],
        y.data_ptr(),
        y_dtype,
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _topology(layout: Sp24) -> tuple[Tensor, Tensor, Tensor | None]:
    """crow and col of the values as rows, and which values those are where K is ragged (None: all of them).

    Padding is left out: its columns lie beyond K.
    """
    (n, k), stored = layout.shape, layout.values.shape[1]

    def make() -> tuple[Tensor, Tensor, Tensor | None]:
        col = torch.empty((n, stored), dtype=torch.int32, device="cpu")
        host().sp24_columns(layout.metadata.data_ptr(), n, k, col.data_ptr(), torch.get_num_threads())
        if 2 * stored == k:
            return torch.arange(n + 1, dtype=torch.int32, device="cpu") * stored, col.flatten(), None
        inside = col < k
        crow = torch.zeros(n + 1, dtype=torch.int32, device="cpu")
        torch.cumsum(inside.sum(1), 0, out=crow[1:])
        return crow, col[inside], inside.flatten().nonzero().flatten()

    return plan(layout.metadata, ("sp24.rows", n, k), make)


def mm_t(layout: Sp24, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    crow, col, kept = _topology(layout)
    values = layout.values.flatten() if kept is None else layout.values.flatten()[kept]
    return _rows.mm_t(_rows.DerivedRows(values, crow, col, layout.shape), dy)


def sddmm(layout: Sp24, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [N, Kp / 2], zero where padded."""
    crow, col, kept = _topology(layout)
    dvalues = _rows.sddmm(_rows.DerivedRows(layout.values.flatten()[: len(col)], crow, col, layout.shape), dy, x)
    if kept is not None:
        dvalues = layout.values.new_zeros(layout.values.numel()).index_copy_(0, kept, dvalues)
    return dvalues.reshape(layout.values.shape)
