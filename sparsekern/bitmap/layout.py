"""bitmap: unstructured weights at 30-80 % sparsity, one bit a weight.

Invariants: `bits` [N, ceil(K / 8)] uint8, bit k % 8 of byte k // 8 is 1 where weight k is stored (little order),
bits at columns >= K are 0; `offsets` [N + 1] int64, row starts in `values` [nnz], each step equal to the row's
population count. Values run row by row. Rows are independent; orders that a kernel prefers are derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._ext import host
from ..layout import FLOATS, Layout


@dataclass(frozen=True, eq=False, kw_only=True)
class Bitmap(Layout):
    bits: Tensor
    offsets: Tensor

    format = "bitmap"
    index_fields = ("bits", "offsets")

    def mask(self) -> Tensor:
        """bool [N, K]: which weights are stored."""
        _n, k = self.shape
        bit = torch.arange(8, dtype=torch.uint8, device=self.device)
        return ((self.bits[:, :, None] >> bit) & 1).bool().flatten(1)[:, :k]

    def unpack(self) -> Tensor:
        dense = self.values.new_zeros(self.shape)
        dense[self.mask()] = self.values
        return dense

    def _unpack_host(self, dense: Tensor, dtype: int, threads: int) -> None:
        n, k = self.shape
        stored = (self.values.data_ptr(), self.bits.data_ptr(), self.offsets.data_ptr())
        host().bitmap_unpack(*stored, dtype, n, k, dense.data_ptr(), threads)

    def sample(self, dense: Tensor) -> Tensor:
        return dense[self.mask()]

    def check(self) -> Bitmap:
        n, k = self._check_shape()
        nnz = self.values.numel()
        self._check_tensor("values", (nnz,), *FLOATS)
        self._check_tensor("bits", (n, (k + 7) // 8), torch.uint8)
        self._check_tensor("offsets", (n + 1,), torch.int64)
        self._check_scale(quantised=False)
        if k % 8 and n:
            beyond = (self.bits[:, -1] >> (k % 8)).nonzero()
            if len(beyond):
                self._fail(f"row {int(beyond[0])} has a bit set beyond column {k - 1}")
        self._check_offsets("offsets", nnz)
        byte = torch.arange(256, device=self.device)
        population = sum((byte >> i) & 1 for i in range(8))
        assert isinstance(population, Tensor)
        counts = population[self.bits.long()].sum(1)
        wrong = (counts != self.offsets.diff()).nonzero()
        if len(wrong):
            row = int(wrong[0])
            self._fail(f"row {row} has {int(counts[row])} bits set but {int(self.offsets.diff()[row])} values")
        return self
