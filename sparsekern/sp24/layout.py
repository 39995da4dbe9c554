"""sp24: 2:4 weights, two kept of each group of four along K.

Invariants, with Kp = K rounded up to a multiple of 8:
- `values` [N, Kp / 2], the kept weights of a row in order of their columns;
- `metadata` [N, Kp / 8] uint8, a nibble per group of four (low nibble first): idx0 | idx1 << 2 with idx0 < idx1,
  so 0x4 0x8 0x9 0xC 0xD 0xE are the only legal ones, groups with fewer than two nonzeros included;
- values at columns >= K are zero.
Rows are independent: the storage can be sliced by rows, saved and sharded. Architecture-free: hardware orders are
derived and never saved. Nibbles as in the PTX ISA, mma.sp::ordered_metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._ext import FP8, host, host_packs
from ..layout import FLOATS, QUANTISED, Layout

LEGAL_NIBBLES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)


def movable(t: Tensor) -> Tensor:
    """float8 as bytes, which torch gathers and scatters; any other type as it is."""
    return t.view(torch.uint8) if t.dtype == FP8 else t


def padded(k: int) -> int:
    """K rounded up to whole bytes of metadata."""
    return (k + 7) // 8 * 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Sp24(Layout):
    metadata: Tensor

    format = "sp24"
    index_fields = ("metadata",)

    @property
    def density(self) -> float:
        return 0.5 if min(self.shape) else 0.0

    def columns(self) -> Tensor:
        """int64 [N, Kp / 2]: the column of every stored value."""
        n, kp = self.shape[0], padded(self.shape[1])
        metadata = self.metadata.long()
        nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).reshape(n, kp // 4)
        inside = torch.stack((nibbles & 3, nibbles >> 2), dim=-1)
        first = torch.arange(0, kp, 4, device=metadata.device)[:, None]
        return (inside + first).reshape(n, kp // 2)

    def unpack(self) -> Tensor:
        n, k = self.shape
        values = movable(self.values)
        dense = values.new_zeros(n, padded(k)).scatter_(1, self.columns(), values)
        return dense[:, :k].contiguous().view(self.dtype)

    def _unpack_host(self, dense: Tensor, dtype: int, threads: int) -> None:
        n, k = self.shape
        host().sp24_unpack(self.values.data_ptr(), self.metadata.data_ptr(), dtype, n, k, dense.data_ptr(), threads)

    def sample(self, dense: Tensor) -> Tensor:
        k = self.shape[1]
        whole = torch.nn.functional.pad(dense, (0, padded(k) - k))
        return movable(whole).gather(1, self.columns()).view(dense.dtype)

    def check(self) -> Sp24:
        n, k = self._check_shape()
        kp = padded(k)
        self._check_tensor("values", (n, kp // 2), *FLOATS, *QUANTISED)
        self._check_tensor("metadata", (n, kp // 8), torch.uint8)
        self._check_scale(quantised=True)
        bad = self._first_illegal()
        if bad is not None:
            row, group = divmod(bad, kp // 4)
            nibble = int(self.metadata[row, group // 2]) >> 4 * (group % 2) & 15
            self._fail(f"row {row}, group {group}: 0x{nibble:X} is no legal 2:4 nibble")
        if kp > k:
            beyond = ((self.columns()[:, -4:] >= k) & (self.values[:, -4:] != 0)).nonzero()
            if len(beyond):
                self._fail(f"row {int(beyond[0][0])} stores a nonzero value beyond column {k - 1}")
        return self

    def _first_illegal(self) -> int | None:
        """The first illegal nibble of metadata, counted row by row."""
        if host_packs(self.metadata.view(torch.int8)):
            bad = host().sp24_check(self.metadata.data_ptr(), self.metadata.numel())
            return bad if bad >= 0 else None
        legal = torch.zeros(16, dtype=torch.bool, device=self.device)
        legal[list(LEGAL_NIBBLES)] = True
        byte = torch.arange(256, device=self.device)
        wrong = (~(legal[byte & 15] & legal[byte >> 4]))[self.metadata.long()].flatten().nonzero()
        if not len(wrong):
            return None
        at = int(wrong[0])
        return 2 * at + (1 if bool(legal[int(self.metadata.flatten()[at]) & 15]) else 0)
