"""bsr on the CPU: launchers of the compiled kernels (csrc/bsr)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import ACTIVATIONS, DTYPES, host, known_bias, unit_rows, why_not_host
from .._plan import plan
from .layout import Bsr

ENDINGS = frozenset(("out_dtype",))  # what mm takes beside bias and activation (_ending.py)


def why_not(op: str, layout: Bsr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    own, given = layout.values.dtype, x.dtype
    if given not in DTYPES or own not in DTYPES:
        return f"{given if given not in DTYPES else own} is not supported by the host kernels"
    if given == torch.int8:
        if op != "mm":
            return f"int8 activations are supported by mm only, not by {op}"
        if own != torch.int8:
            return f"int8 activations need int8 values, these are {own}"
    elif own == torch.int8:
        if op == "sddmm":
            return "int8 values have no gradient"
    elif own != given:
        return f"values are {own}, activations {given}; they must agree"
    return why_not_host()


def mm(layout: Bsr, x: Tensor, bias: Tensor | None, activation: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N] in out_dtype (None: x's type, of int8 float32)."""
    x = unit_rows(x)
    m = x.shape[0]
    values, scale = layout.values, layout.scale
    (n, k), (r, c) = layout.shape, layout.block
    dtype = DTYPES[x.dtype]
    if out_dtype is not None:
        y, y_dtype = x.new_empty(m, n, dtype=out_dtype), DTYPES[out_dtype]
    elif dtype == 3:
        y, y_dtype = x.new_empty(m, n, dtype=torch.float32), 0
    else:
        y, y_dtype = x.new_empty(m, n), dtype
    bias = known_bias(bias)
    host().bsr_mm(
        values.data_ptr(),
        DTYPES[values.dtype],
        0 if scale is None else scale.data_ptr(),
        layout.crow.data_ptr(),
        layout.col.data_ptr(),
        n,
        k,
        r,
        c,
        x.data_ptr(),
        dtype,
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


def transpose_index(layout: Bsr) -> tuple[Tensor, Tensor, Tensor]:
    """The column-order view: crow_t [Kb + 1], row_t [nnzb], gather_t [nnzb], all int32."""
    nb, kb = layout.grid
    crow, col = layout.crow, layout.col
    crow_t, row_t, gather_t = crow.new_empty(kb + 1), torch.empty_like(col), torch.empty_like(col)
    host().bsr_transpose_index(
        crow.data_ptr(), col.data_ptr(), nb, kb, crow_t.data_ptr(), row_t.data_ptr(), gather_t.data_ptr()
    )
    return crow_t, row_t, gather_t


def mm_t(layout: Bsr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    dy = unit_rows(dy)
    m = dy.shape[0]
    values, scale = layout.values, layout.scale
    (n, k), (r, c) = layout.shape, layout.block
    dx = dy.new_empty(m, k)
    crow_t, row_t, gather_t = plan(layout.col, ("bsr.transpose", n, k, r, c), lambda: transpose_index(layout))
    host().bsr_mm_t(
        values.data_ptr(),
        DTYPES[values.dtype],
        0 if scale is None else scale.data_ptr(),
        crow_t.data_ptr(),
        row_t.data_ptr(),
        gather_t.data_ptr(),
        n,
        k,
        r,
        c,
        dy.data_ptr(),
        DTYPES[dy.dtype],
        m,
        dy.stride(0),
        dx.data_ptr(),
        k,
        torch.get_num_threads(),
    )
    return dx


def sddmm(layout: Bsr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored blocks: dy [M, N], x [M, K] -> like layout.values (zero beyond the edges of W)."""
    dy, x = unit_rows(dy), unit_rows(x)
    (n, k), (r, c) = layout.shape, layout.block
    dvalues = layout.values.new_empty(layout.values.shape)
    host().bsr_sddmm(
        dvalues.data_ptr(),
        DTYPES[dvalues.dtype],
        layout.crow.data_ptr(),
        layout.col.data_ptr(),
        n,
        k,
        r,
        c,
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        torch.get_num_threads(),
    )
    return dvalues
