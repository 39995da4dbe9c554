"""Dense <-> csr."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Csr


def pack(dense: Tensor) -> Csr:
    """Packs the nonzeros of W[N, K]; -0.0 counts as zero, NaN is kept."""
    dense = dense.detach()
    mask = dense != 0
    crow = torch.zeros(dense.shape[0] + 1, dtype=torch.int32, device=dense.device)
    torch.cumsum(mask.sum(1), 0, out=crow[1:])
    col = mask.nonzero()[:, 1].to(torch.int32)
    return Csr(values=dense[mask], crow=crow, col=col, shape=(dense.shape[0], dense.shape[1]))
