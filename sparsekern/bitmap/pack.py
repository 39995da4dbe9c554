"""Dense <-> bitmap."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import DTYPES, host, host_packs
from .layout import Bitmap


def pack(dense: Tensor) -> Bitmap:
    """Packs the nonzeros of W[N, K]; -0.0 counts as zero, NaN is kept."""
    dense = dense.detach()
    if host_packs(dense):
        return _pack_host(dense)
    n, k = dense.shape
    mask = dense != 0
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=dense.device)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    bytes_ = torch.nn.functional.pad(mask, (0, -k % 8)).reshape(n, (k + 7) // 8, 8).to(torch.uint8)
    bits = (bytes_ << torch.arange(8, dtype=torch.uint8, device=dense.device)).sum(-1, dtype=torch.uint8)
    return Bitmap(values=dense[mask], bits=bits, offsets=offsets, shape=(n, k))


def _pack_host(dense: Tensor) -> Bitmap:
    """The same on the compiled packers (csrc/bitmap)."""
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    (n, k), threads = dense.shape, torch.get_num_threads()
    bits = dense.new_empty((n, (k + 7) // 8), dtype=torch.uint8)
    offsets = dense.new_empty(n + 1, dtype=torch.int64)
    where = (
        dense.data_ptr(),
        DTYPES[dense.dtype],
        n,
        k,
        dense.stride(0),
        bits.data_ptr(),
        offsets.data_ptr(),
    )
    host().bitmap_count(*where, threads)
    values = dense.new_empty(int(offsets[-1]))
    host().bitmap_fill(*where, values.data_ptr(), threads)
    return Bitmap(values=values, bits=bits, offsets=offsets, shape=(n, k))
