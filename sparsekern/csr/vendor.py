"""csr by cuSPARSE through torch's own CSR tensors: one more candidate on NVIDIA GPUs, and the baseline of the benches.

torch multiplies W X^T, so X^T is read as a view and Y^T is turned round afterwards: one more pass over Y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ref import ACTIVATIONS
from .layout import Csr

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAMPLED = (torch.float32, torch.float64)  # what torch.sparse.sampled_addmm takes
ENDINGS = None  # its 16-bit outputs are rounded, so nothing exact can follow them (_ending.py)


def why_not(op: str, layout: Csr, x: Tensor) -> str | None:
    """Why torch's CSR products cannot run `op` on this layout and x, or None where they can."""
    own = layout.values.dtype
    if own not in (SAMPLED if op == "sddmm" else TYPES):
        return f"torch's CSR {op} does not take {own}"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if 0 in layout.shape or layout.values.numel() == 0:
        return "torch's CSR products are not asked about weights without entries"
    return None if x.is_cuda else f"cuSPARSE takes CUDA tensors, not {x.device.type} tensors"


def mm(layout: Csr, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    y = torch.mm(tensor(layout), x.t()).t().contiguous() if x.shape[0] else x.new_empty(0, layout.shape[0])
    return ACTIVATIONS[activation](y if bias is None else y + bias.to(y.dtype))


def mm_t(layout: Csr, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]. torch brings W^T into row order at every call."""
    return torch.mm(dy, tensor(layout)) if dy.shape[0] else dy.new_empty(0, layout.shape[1])


def sddmm(layout: Csr, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    if dy.shape[0] == 0:
        return torch.zeros_like(layout.values)
    return torch.sparse.sampled_addmm(tensor(layout), dy.t().contiguous(), x.contiguous(), beta=0.0).values()


def tensor(layout: Csr) -> Tensor:
    """The layout as torch's CSR tensor, over the same memory."""
    parts = (layout.crow, layout.col, layout.values.detach())
    return torch.sparse_csr_tensor(*parts, size=layout.shape, check_invariants=False)
