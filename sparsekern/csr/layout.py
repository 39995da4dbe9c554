"""csr: unstructured weights, row by row.

Invariants: `values` [nnz]; `crow` [N + 1] int32, row starts, from 0 to nnz, never decreasing; `col` [nnz] int32 in
[0, K), strictly ascending inside a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._ext import host
from ..layout import FLOATS, Layout


@dataclass(frozen=True, eq=False, kw_only=True)
class Csr(Layout):
    crow: Tensor
    col: Tensor

    format = "csr"
    index_fields = ("crow", "col")

    def rows(self) -> Tensor:
        """int64 [nnz]: the row of every stored value."""
        counts = self.crow.diff().long()
        row = torch.arange(self.shape[0], device=self.device)
        return torch.repeat_interleave(row, counts, output_size=self.values.numel())

    def unpack(self) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[self.rows(), self.col.long()] = self.values
        return dense

    def _unpack_host(self, dense: Tensor, dtype: int, threads: int) -> None:
        n, k = self.shape
        index = (self.crow.data_ptr(), self.col.data_ptr())
        host().csr_unpack(dense.data_ptr(), dtype, n, k, k, *index, self.values.data_ptr(), threads)

    def sample(self, dense: Tensor) -> Tensor:
        return dense[self.rows(), self.col.long()]

    def check(self) -> Csr:
        n, k = self._check_shape()
        nnz = self.values.numel()
        self._check_tensor("values", (nnz,), *FLOATS)
        self._check_tensor("crow", (n + 1,), torch.int32)
        self._check_tensor("col", (nnz,), torch.int32)
        self._check_scale(quantised=False)
        self._check_offsets("crow", nnz)
        self._check_columns("crow", k, "in")
        return self
