"""bsr: block-sparse weights; a block is stored whole or not at all.

Invariants, with Nb = ceil(N / R) block rows and Kb = ceil(K / C) block columns: `values` [nnzb, R, C]; `crow`
[Nb + 1] int32, block-row starts; `col` [nnzb] int32 block columns in [0, Kb), strictly ascending inside a block
row; entries beyond row N or column K are zero. Any R, C >= 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ext import host
from ..layout import FLOATS, QUANTISED, Layout, padded


@dataclass(frozen=True, eq=False, kw_only=True)
class Bsr(Layout):
    crow: Tensor
    col: Tensor
    block: tuple[int, int]

    format = "bsr"
    index_fields = ("crow", "col")
    dims_field = "block"

    @property
    def grid(self) -> tuple[int, int]:
        """(Nb, Kb): how many block rows and block columns."""
        (n, k), (r, c) = self.shape, self.block
        return -(-n // r), -(-k // c)

    def block_rows(self) -> Tensor:
        """int64 [nnzb]: the block row of every block."""
        row = torch.arange(self.grid[0], device=self.device)
        return torch.repeat_interleave(row, self.crow.diff().long(), output_size=self.values.shape[0])

    def unpack(self) -> Tensor:
        (n, k), (nb, kb), (r, c) = self.shape, self.grid, self.block
        blocks = self.values.new_zeros(nb, kb, r, c)
        blocks[self.block_rows(), self.col.long()] = self.values
        return blocks.transpose(1, 2).reshape(nb * r, kb * c)[:n, :k].contiguous()

    def _unpack_host(self, dense: Tensor, dtype: int, threads: int) -> None:
        (n, k), (r, c) = self.shape, self.block
        index = (self.crow.data_ptr(), self.col.data_ptr())
        host().bsr_unpack(dense.data_ptr(), dtype, k, n, k, r, c, *index, self.values.data_ptr(), threads)

    def sample(self, dense: Tensor) -> Tensor:
        (nb, kb), (r, c) = self.grid, self.block
        whole = padded(dense, nb * r, kb * c)
        blocks = whole.reshape(nb, r, kb, c).transpose(1, 2)
        return blocks[self.block_rows(), self.col.long()]

    def check(self) -> Bsr:
        n, k = self._check_shape()
        block: Any = self.block
        if len(block) != 2 or not all(isinstance(b, int) and b >= 1 for b in block):
            self._fail(f"block must be two positive integers, got {block}")
        (nb, kb), (r, c) = self.grid, self.block
        nnzb = self.values.shape[0] if self.values.dim() else 0
        self._check_tensor("values", (nnzb, r, c), *FLOATS, *QUANTISED)
        self._check_tensor("crow", (nb + 1,), torch.int32)
        self._check_tensor("col", (nnzb,), torch.int32)
        self._check_scale(quantised=True)
        self._check_offsets("crow", nnzb)
        self._check_columns("crow", kb, "in block")
        for name, at_edge, edge in (
            ("row", self.block_rows() == nb - 1, self.values[:, n - (nb - 1) * r :, :] if nb else None),
            ("column", self.col == kb - 1, self.values[:, :, k - (kb - 1) * c :] if kb else None),
        ):
            if edge is not None and edge.numel() and bool((edge[at_edge] != 0).any()):
                self._fail(f"an edge block stores a nonzero value beyond the last {name}")
        return self
