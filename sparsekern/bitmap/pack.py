"""Dense <-> bitmap."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Bitmap


def pack(dense: Tensor) -> Bitmap:
    """Packs the nonzeros of W[N, K]; -0.0 counts as zero, NaN is kept."""
    dense = dense.detach()
    n, k = dense.shape
    mask = dense != 0
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=dense.device)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    bytes_ = torch.nn.functional.pad(mask, (0, -k % 8)).reshape(n, (k + 7) // 8, 8).to(torch.uint8)
    bits = (bytes_ << torch.arange(8, dtype=torch.uint8, device=dense.device)).sum(-1, dtype=torch.uint8)
    return Bitmap(values=dense[mask], bits=bits, offsets=offsets, shape=(n, k))
