"""Dense <-> bsr."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Bsr


def pack(dense: Tensor, block: tuple[int, int], *, scale: Tensor | None = None) -> Bsr:
    """Stores every R x C block of W[N, K] that holds a nonzero; ragged edges are padded with zeros."""
    (n, k), (r, c) = dense.shape, block
    nb, kb = -(-n // r), -(-k // c)
    whole = torch.nn.functional.pad(dense.detach(), (0, kb * c - k, 0, nb * r - n))
    blocks = whole.reshape(nb, r, kb, c).transpose(1, 2)
    mask = (blocks != 0).any(-1).any(-1)
    crow = torch.zeros(nb + 1, dtype=torch.int32, device=dense.device)
    torch.cumsum(mask.sum(1), 0, out=crow[1:])
    col = mask.nonzero()[:, 1].to(torch.int32)
    return Bsr(values=blocks[mask].contiguous(), crow=crow, col=col, shape=(n, k), block=(r, c), scale=scale)
