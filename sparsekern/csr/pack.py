"""Dense <-> csr."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import DTYPES, host, host_packs
from .layout import Csr


def pack(dense: Tensor) -> Csr:
    """Packs the nonzeros of W[N, K]; -0.0 counts as zero, NaN is kept."""
    dense = dense.detach()
    if host_packs(dense):
        return _pack_host(dense)
    mask = dense != 0
    crow = row_starts(mask.sum(1), dense.shape[1])
    col = mask.nonzero()[:, 1].to(torch.int32)
    return Csr(values=dense[mask], crow=crow, col=col, shape=(dense.shape[0], dense.shape[1]))


def row_starts(counts: Tensor, k: int) -> Tensor:
    """int32 [N + 1]: where each row begins, of rows of so many nonzeros. ValueError where 31 bits cannot count them."""
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if len(counts) * k >= 2**31 and int(starts[-1]) >= 2**31:  # asks the device of nothing but huge matrices
        raise ValueError(_TOO_MANY.format(len(counts), k))
    return starts.to(torch.int32)


_TOO_MANY = "W[{}, {}] has 2^31 nonzeros or more, too many for int32 row starts"


def _pack_host(dense: Tensor) -> Csr:
    """The same on the compiled packers (csrc/csr)."""
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    (n, k), threads = dense.shape, torch.get_num_threads()
    crow = torch.empty(n + 1, dtype=torch.int32, device="cpu")
    where = (dense.data_ptr(), DTYPES[dense.dtype], n, k, dense.stride(0), crow.data_ptr())
    nnz = host().csr_count(*where, threads)
    if nnz < 0:
        raise ValueError(_TOO_MANY.format(n, k))
    col, values = torch.empty(nnz, dtype=torch.int32, device="cpu"), dense.new_empty(nnz)
    host().csr_fill(*where, col.data_ptr(), values.data_ptr(), threads)
    return Csr(values=values, crow=crow, col=col, shape=(n, k))
