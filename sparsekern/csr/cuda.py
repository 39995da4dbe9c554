"""csr on NVIDIA GPUs: launchers of the compiled kernels (csrc/csr/*.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows_cuda
from .._ext import DTYPES, why_not_cuda
from .layout import Csr

ENDINGS = _rows_cuda.ENDINGS


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    own = layout.values.dtype
    if own != x.dtype:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if own not in DTYPES or own == torch.int8:
        return f"{own} is not supported by the CUDA kernels"
    return why_not_cuda(x.device)


def mm(
    layout: Csr,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Y = act(x_scale * X W^T + bias) + beta * residual: x [M, K] -> [M, N] in out_dtype (None: x's type)."""
    return _rows_cuda.mm(
        layout, x, bias, activation, x_scale=x_scale, residual=residual, out_dtype=out_dtype, beta=beta
    )


def mm_t(layout: Csr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return _rows_cuda.mm_t(layout, dy)


def sddmm(layout: Csr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    return _rows_cuda.sddmm(layout, dy, x)
