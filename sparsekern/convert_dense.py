"""From a weight of any kind (dense, torch sparse, scipy.sparse) to a SparseTensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import bitmap, bsr, csr, sp24
from .layout import FLOATS
from .tensor import SparseTensor, _wrap

_SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def to_sparse_semi_structured(w: Any, *, prune: bool = False) -> SparseTensor:
    """W[N, K] as 2:4: two kept of each group of four along K.

    w: a dense tensor, a torch COO/CSR/CSC/BSR/BSC tensor or a scipy.sparse matrix; float32, bfloat16, float16,
    float64. A weight that is not 2:4 raises a ValueError that names the row, the group and the values;
    prune=True keeps the two of largest magnitude in every group instead.
    """
    return _wrap(sp24.pack(dense_weight(w), prune=prune))


def to_block_sparse(w: Any, block_size: int | tuple[int, int] = 32) -> SparseTensor:
    """W[N, K] as blocks of `block_size` (an int, or rows x columns); every block with a nonzero is stored.

    Shapes need not be divisible: edge blocks are padded with zeros. Inputs as for to_sparse_semi_structured.
    """
    block = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(block) != 2 or not all(isinstance(b, int) and b >= 1 for b in block):
        raise ValueError(f"block_size must be a positive integer or a pair of them, got {block_size}")
    return _wrap(bsr.pack(dense_weight(w), block))


def to_csr(w: Any) -> SparseTensor:
    """W[N, K] as CSR: the nonzeros. Inputs as for to_sparse_semi_structured."""
    return _wrap(csr.pack(dense_weight(w)))


def to_bitmap(w: Any) -> SparseTensor:
    """W[N, K] as one bit a weight and the nonzeros. Inputs as for to_sparse_semi_structured."""
    return _wrap(bitmap.pack(dense_weight(w)))


def dense_weight(w: Any) -> Tensor:
    """The dense W[N, K] that `w` stands for. Raises ValueError or TypeError for what is no such weight."""
    if isinstance(w, SparseTensor):
        w = w.to_dense()
    elif isinstance(w, Tensor):
        if w.layout in _SPARSE_LAYOUTS:
            w = w.to_dense()
    elif _is_scipy_sparse(w):
        w = torch.from_numpy(w.toarray())
    else:
        raise TypeError(
            "the weight must be a torch.Tensor (dense, COO, CSR, CSC, BSR) or a scipy.sparse matrix, "
            f"got {type(w).__name__}"
        )
    if w.dim() != 2:
        raise ValueError(f"the weight must be a matrix [N, K], got shape {tuple(w.shape)}")
    if w.dtype not in FLOATS:
        expected = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise ValueError(f"the weight must be one of {expected}, got {w.dtype}")
    return w.detach()


def _is_scipy_sparse(w: Any) -> bool:
    """True for scipy's sparse matrices and arrays, without importing scipy for anything else."""
    if type(w).__module__.partition(".")[0] != "scipy":
        return False
    import scipy.sparse

    return scipy.sparse.issparse(w)
