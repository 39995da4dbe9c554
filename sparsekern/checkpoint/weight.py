"""A weight of a checkpoint: dense or sparse, with the shape and the K order that the model gives it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import as_weight
from ..tensor import SparseTensor


@dataclass(frozen=True)
class Weight:
    """One entry of a checkpoint, as the dense model would call it.

    `tensor` is dense, or a SparseTensor; a sparse convolution is W[O, C * R * S] in the K order `order`
    ("crs" or "rsc"), a sparse matrix has "k", and "n" where its transpose is stored. `source` says what the
    file held; `problem` why it cannot be read (then `tensor` is None); `note` what happened on the way.
    """

    name: str
    tensor: Tensor | None
    source: str
    shape: tuple[int, ...] = ()
    order: str = "k"
    problem: str | None = None
    note: str | None = None

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.tensor, SparseTensor)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, indices included."""
        if self.tensor is None:
            return 0
        return self.tensor.nbytes

    def dense(self) -> Tensor:
        """The dense weight in the model's shape. Raises ValueError where it cannot be read."""
        if self.tensor is None:
            raise ValueError(f"{self.name}: {self.problem}")
        if not isinstance(self.tensor, SparseTensor):
            return self.tensor
        check_fits(self.name, self.shape, self.tensor.dtype)
        dense = self.tensor.detach().to_dense()
        matrix_only = len(self.shape) == 2
        return (dense if matrix_only else as_weight(dense, self.shape, self.order)).contiguous()


def check_fits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses to unpack what no memory holds: a few bytes of CSR can claim any number of columns."""
    size = torch.Size(shape).numel() * max(dtype.itemsize, 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 40
    if size > memory:
        raise ValueError(
            f"{name}: unpacked to {tuple(shape)} it would take {size / 2**30:.0f} GiB, more than this machine's memory"
        )
