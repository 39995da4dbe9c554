"""csr on the CPU: launchers of the compiled kernels (csrc/csr)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import DTYPES, why_not_host
from .layout import Csr


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    for dtype in (layout.values.dtype, x.dtype):
        if dtype not in DTYPES or dtype == torch.int8:
            return f"{dtype} is not supported by the host kernels"
    if layout.values.dtype != x.dtype:
        return f"values are {layout.values.dtype}, activations {x.dtype}; they must agree"
    return why_not_host()


def _of(layout: Csr) -> _rows.Rows:
    return _rows.Rows(layout.values, layout.crow, layout.col, layout.shape)


def mm(layout: Csr, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    return _rows.mm(_of(layout), x, bias, activation)


def mm_t(layout: Csr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return _rows.mm_t(_of(layout), dy)


def sddmm(layout: Csr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    return _rows.sddmm(_of(layout), dy, x)
