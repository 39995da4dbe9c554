"""A new topology for a block-sparse weight, on its device, between two steps of training: prune and grow."""

from __future__ import annotations

import torch
from torch import Tensor

from . import work
from .layout import Bsr


def update_topology(layout: Bsr, mask: Tensor) -> Bsr:
    """Stores the blocks of `mask` instead of those that are stored now; in place, and without waiting for the device.

    mask bool [Nb, Kb], on the weight's device, with at most as many blocks as there is room for, nnzb. A block that
    stays keeps its values, a new one is zero. Where the mask has fewer, blocks of the old topology stay stored, as
    zeros, so that the sizes stay: first come, first served in row-major order. `values`, `crow` and `col` are written
    to, so optimizers, modules and captured CUDA graphs go on with the same tensors. Returns the layout. Raises
    ValueError for a mask of another shape, type or device; more blocks than nnzb are a RuntimeError, on a GPU at its
    next synchronisation.
    """
    (nb, kb), nnzb = layout.grid, layout.values.shape[0]
    if mask.shape != (nb, kb) or mask.dtype != torch.bool or mask.device != layout.device:
        raise ValueError(
            f"mask must be bool of shape {(nb, kb)} on {layout.device}, got {mask.dtype} of {tuple(mask.shape)} on "
            f"{mask.device}"
        )
    if layout.crow.is_inference() or layout.values.is_inference():
        raise ValueError("a layout made under torch.inference_mode cannot change: nothing would notice")
    torch._assert_async((mask.sum() <= nnzb), f"the mask has more blocks than the {nnzb} that there is room for")
    with torch.no_grad():
        place = layout.block_rows() * kb + layout.col
        before = torch.full((nb * kb,), -1, dtype=torch.int64, device=mask.device)
        before[place] = torch.arange(nnzb, device=mask.device)
        wanted = mask.flatten()
        # Wanted blocks first, then old ones that fill up.
        rank = torch.where(wanted, 0, torch.where(before >= 0, 1, 2))
        chosen = torch.argsort(rank, stable=True)[:nnzb].sort().values
        kept = wanted[chosen] & (before[chosen] >= 0)
        values = torch.where(kept[:, None, None], layout.values[before[chosen].clamp(min=0)], 0)
        layout.values.copy_(values)
        rows = torch.arange(nb + 1, device=mask.device)
        layout.crow.copy_(torch.searchsorted(chosen, rows * kb))
        layout.col.copy_(chosen % max(kb, 1))
    work.refresh(layout)
    return layout
