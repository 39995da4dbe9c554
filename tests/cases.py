"""The formats as test parameters, and how a test makes a weight of each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsekern import testing
from sparsekern.layout import Layout, padded

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


@dataclass(frozen=True)
class Case:
    """A format and, for bsr, its block."""

    format: str
    block: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return f"bsr{self.block[0]}x{self.block[1]}" if self.format == "bsr" else self.format

    def dense(self, n: int, k: int, dtype: torch.dtype = torch.float32, density: float = 0.5, seed: int = 0) -> Tensor:
        return testing.random_weight(self.format, n, k, dtype, density, self.block, seed)

    def pack(self, dense: Tensor, scale: Tensor | None = None) -> Layout:
        return testing.pack(self.format, dense, self.block, scale)

    def topology(self, dense: Tensor) -> Tensor:
        """bool [N, K]: the positions that `pack(dense)` must store, so that a gradient flows to them."""
        if self.format != "bsr":
            return dense != 0
        (n, k), (r, c) = dense.shape, self.block
        whole = padded(dense != 0, n + -n % r, k + -k % c)
        blocks = whole.reshape(whole.shape[0] // r, r, whole.shape[1] // c, c)
        kept = blocks.any(3).any(1)
        return kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]


FOUR = (Case("sp24"), Case("bsr", (4, 4)), Case("csr"), Case("bitmap"))
ALL = (
    Case("sp24"),
    *(Case("bsr", block) for block in ((1, 1), (3, 5), (4, 4), (8, 1), (16, 16), (16, 32), (32, 32), (64, 64))),
    Case("csr"),
    Case("bitmap"),
)
QUANTISED = tuple(case for case in ALL if case.format in ("sp24", "bsr"))


def param(values: tuple, name: str = "case") -> pytest.MarkDecorator:
    """parametrize with readable ids."""
    return pytest.mark.parametrize(name, values, ids=[str(v).removeprefix("torch.") for v in values])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
