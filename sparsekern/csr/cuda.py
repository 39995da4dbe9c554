"""csr on NVIDIA GPUs (csrc/csr/*.cuh): its rows as they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import DTYPES, why_not_cuda
from .._rows_cuda import ENDINGS, mm, mm_t, sddmm
from .layout import Csr

__all__ = ["ENDINGS", "mm", "mm_t", "sddmm", "why_not"]


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why the compiled kernels cannot run this call, or None where they can."""
    own = layout.values.dtype
    if own != x.dtype:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if own not in DTYPES or own == torch.int8:
        return f"{own} is not supported by the CUDA kernels"
    return why_not_cuda(x.device)
