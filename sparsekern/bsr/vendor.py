"""bsr by torch's own BSR tensors (its Triton kernel for 16-bit types, else cuSPARSE): a candidate and the baseline."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..ref import ACTIVATIONS
from .layout import Bsr

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIDES = (16, 32, 64, 128)  # of the blocks that torch's Triton kernel takes
ENDINGS = None  # its 16-bit outputs are rounded, so nothing exact can follow them (_ending.py)


def why_not(op: str, layout: Bsr, x: Tensor) -> str | None:
    """Why torch's BSR product cannot run `op` on this layout and x, or None where it can."""
    own, (n, k), (r, c) = layout.values.dtype, layout.shape, layout.block
    if op != "mm":
        return "torch has a product with BSR weights, and no gradients of it"
    if own not in TYPES:
        return f"torch's BSR product does not take {own}"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if layout.scale is not None:
        return "torch's BSR product knows no scales"
    if r != c or r not in SIDES or n % r or k % c:
        return f"torch's BSR product takes square blocks of {', '.join(map(str, SIDES))} that divide W, not {r}x{c}"
    if layout.values.shape[0] == 0 or 0 in layout.shape:
        return "torch's BSR product is not asked about weights without entries"
    return None if x.is_cuda else f"torch's BSR product takes CUDA tensors, not {x.device.type} tensors"


def mm(layout: Bsr, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    if x.shape[0] == 0:
        return x.new_empty(0, layout.shape[0])
    y = functional.linear(x.contiguous(), tensor(layout))
    return ACTIVATIONS[activation](y if bias is None else y + bias.to(y.dtype))


def mm_t(layout: Bsr, dy: Tensor) -> Tensor:
    """Not there; `why_not` says so."""
    raise NotImplementedError("torch has no gradient of its BSR product")


def sddmm(layout: Bsr, dy: Tensor, x: Tensor) -> Tensor:
    """Not there; `why_not` says so."""
    raise NotImplementedError("torch has no gradient of its BSR product")


def tensor(layout: Bsr) -> Tensor:
    """The layout as torch's BSR tensor, over the same memory."""
    parts = (layout.crow, layout.col, layout.values.detach())
    return torch.sparse_bsr_tensor(*parts, size=layout.shape, check_invariants=False)
