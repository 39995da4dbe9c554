"""Dense <-> bsr."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import DTYPES, host, host_packs
from ..layout import padded
from .layout import Bsr


def pack(dense: Tensor, block: tuple[int, int], *, scale: Tensor | None = None) -> Bsr:
    """Stores every R x C block of W[N, K] that holds a nonzero; ragged edges are padded with zeros."""
    if host_packs(dense):
        return _pack_host(dense.detach(), block, scale=scale)
    (n, k), (r, c) = dense.shape, block
    nb, kb = -(-n // r), -(-k // c)
    whole = padded(dense.detach(), nb * r, kb * c)
    blocks = whole.reshape(nb, r, kb, c).transpose(1, 2)
    mask = (blocks != 0).any(-1).any(-1)
    crow = torch.zeros(nb + 1, dtype=torch.int32, device=dense.device)
    torch.cumsum(mask.sum(1), 0, out=crow[1:])
    col = mask.nonzero()[:, 1].to(torch.int32)
    return Bsr(values=blocks[mask].contiguous(), crow=crow, col=col, shape=(n, k), block=(r, c), scale=scale)


def _pack_host(dense: Tensor, block: tuple[int, int], *, scale: Tensor | None = None) -> Bsr:
    """The same on the compiled packers (csrc/bsr)."""
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    (n, k), (r, c) = dense.shape, block
    nb, kb, threads = -(-n // r), -(-k // c), torch.get_num_threads()
    flags = dense.new_empty(nb * kb, dtype=torch.uint8)
    crow = dense.new_empty(nb + 1, dtype=torch.int32)
    where = (
        dense.data_ptr(),
        DTYPES[dense.dtype],
        dense.stride(0),
        n,
        k,
        r,
        c,
        flags.data_ptr(),
        crow.data_ptr(),
    )
    host().bsr_count(*where, threads)
    nnzb = int(crow[-1])
    col, values = dense.new_empty(nnzb, dtype=torch.int32), dense.new_empty((nnzb, r, c))
    host().bsr_fill(*where, col.data_ptr(), values.data_ptr(), threads)
    return Bsr(values=values, crow=crow, col=col, shape=(n, k), block=(r, c), scale=scale)
