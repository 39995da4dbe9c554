"""csr on the CPU: launchers of the compiled kernels (csrc/csr)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import DTYPES, why_not_host
from .layout import Csr

ENDINGS = frozenset(("out_dtype",))  # what mm takes beside bias and activation (_ending.py)


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    own = layout.values.dtype
    if own != x.dtype:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if own not in DTYPES or own == torch.int8:
        return f"{own} is not supported by the host kernels"
    return why_not_host()


def mm(layout: Csr, x: Tensor, bias: Tensor | None, activation: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N] in out_dtype (None: x's type, of int8 float32)."""
    return _rows.mm(layout, x, bias, activation, out_dtype)


def mm_t(layout: Csr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return _rows.mm_t(layout, dy)


def sddmm(layout: Csr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    return _rows.sddmm(layout, dy, x)
