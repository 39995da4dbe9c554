"""Which pattern a weight actually has: 2:4 along which axis and order, near 2:4, blocks, unstructured, dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .apply import density
from .pattern import as_matrix

# A weight counts as near 2:4 where at most this share of its groups has a third nonzero. A weight pruned at random
# to the same density has 31 % of them, so the line is far from both kinds.
NEAR = 0.05
BLOCKS = (16, 32, 64)
CONV_BLOCKS = ((8, 8), (16, 8), (16, 16), (32, 16), (32, 32), (64, 64))


@dataclass(frozen=True)
class Groups:
    """How a weight fits 2:4 in one direction: "k" (along K), "n" (along N), or a conv's "crs" and "rsc"."""

    order: str
    violating: float  # share of groups with more than two nonzeros
    row: int = -1  # the first of them: row of the matrix, group in the row, its values
    group: int = -1
    values: tuple[float, ...] = ()

    @property
    def exact(self) -> bool:
        return self.row < 0

    @property
    def first_bad(self) -> str | None:
        """The first violating group in words; None where there is none."""
        if self.exact:
            return None
        shown = ", ".join(f"{v:g}" for v in self.values)
        return f"row {self.row}, group {self.group} ({_ORDER_NAMES[self.order]}) holds [{shown}]"


_ORDER_NAMES = {
    "k": "along K",
    "n": "along N",
    "crs": "along flattened (c, r, s)",
    "rsc": "along C at one tap",
}


@dataclass(frozen=True)
class Found:
    """What a weight's zeros look like. `blocks[(order, R, C)]` is the share of blocks with a nonzero."""

    shape: tuple[int, ...]
    density: float
    groups: tuple[Groups, ...]
    blocks: dict[tuple[str, int, int], float]

    def exact(self) -> Groups | None:
        """The first direction along which the weight is 2:4 and a format can store it, or None."""
        return next((g for g in self.groups if g.exact and g.order != "n"), None)

    def nearest(self) -> Groups:
        """The storable direction with the fewest violating groups."""
        return min((g for g in self.groups if g.order != "n"), key=lambda g: g.violating)

    @property
    def near(self) -> bool:
        """Nearly 2:4, and not merely so sparse that few groups can violate it."""
        return self.exact() is None and self.density >= 0.4 and self.nearest().violating <= NEAR

    def best_block(self) -> tuple[str, int, int] | None:
        """The largest block of (almost) the least stored share, where blocks say more than single weights do."""
        useful = {b: share for b, share in self.blocks.items() if share <= 0.75}
        if not useful:
            return None
        least = min(useful.values())
        ok = [b for b, share in useful.items() if share <= 1.1 * least]
        best = max(ok, key=lambda b: b[1] * b[2])
        return best if self.density >= 0.5 * self.blocks[best] else None

    def __str__(self) -> str:
        """The pattern in a few words, as the report shows it."""
        if self.density == 0:
            return "all zero"
        exact, block = self.exact(), self.best_block()
        if block is not None:
            order = f" {block[0]}" if len(self.shape) > 2 else ""
            return f"block {block[1]}x{block[2]}{order}"
        if exact is not None:
            return "2:4" if exact.order == "k" else f"2:4 {exact.order}"
        if self.near:
            return f"near 2:4 ({100 * self.nearest().violating:.2g}% bad)"
        if any(g.exact for g in self.groups):
            return "2:4 along N"
        return "dense" if self.density > 0.95 else "unstructured"


@torch.no_grad()
def find(weight: Tensor) -> Found:
    """The pattern of a weight [N, K] or [N, C, R, S]; -0.0 counts as zero, NaN as a weight.

    For a convolution both orders of K are tried. Raises ValueError for a weight of fewer than two dimensions.
    """
    weight = weight.detach()
    orders = ("rsc", "crs") if weight.dim() > 2 and weight[:1, :1].numel() > 1 else ("crs",)
    groups: list[Groups] = []
    shares: dict[tuple[str, int, int], float] = {}
    sizes = CONV_BLOCKS if len(orders) > 1 else tuple((b, b) for b in BLOCKS)
    for order in orders:
        matrix = as_matrix(weight, order)
        nonzero = matrix != 0
        groups.append(_groups(matrix, nonzero, order if len(orders) > 1 else "k"))
        for r, c in sizes:
            if r <= 2 * matrix.shape[0] and c <= 2 * matrix.shape[1]:
                shares[order, r, c] = _block_share(nonzero, r, c)
    matrix = as_matrix(weight).t()
    groups.append(_groups(matrix, (matrix != 0).contiguous(), "n"))
    return Found(tuple(weight.shape), density(weight), tuple(groups), shares)


def _groups(matrix: Tensor, nonzero: Tensor, order: str) -> Groups:
    n, k = matrix.shape
    if not matrix.numel():
        return Groups(order, 0.0)
    # Four bytes of 0 or 1 are one int32; the product gathers their sum in its top byte.
    padded = torch.nn.functional.pad(nonzero, (0, -k % 4)) if k % 4 else nonzero.contiguous()
    crowded = ((padded.view(torch.uint8).view(torch.int32) * 0x01010101) >> 24) > 2
    bad = int(torch.count_nonzero(crowded))
    if not bad:
        return Groups(order, 0.0)
    first = int(crowded.reshape(-1).view(torch.uint8).argmax())
    row, group = divmod(first, crowded.shape[1])
    return Groups(order, bad / crowded.numel(), row, group, tuple(matrix[row, 4 * group : 4 * group + 4].tolist()))


def _block_share(nonzero: Tensor, r: int, c: int) -> float:
    n, k = nonzero.shape
    padded = torch.nn.functional.pad(nonzero, (0, -k % c, 0, -n % r)) if k % c or n % r else nonzero.contiguous()
    wide = padded.view(torch.uint8).view(torch.int64) != 0  # eight columns at a time: every c is a multiple of 8
    rows = wide.reshape(-(-n // r), r, -1).any(1)
    return density(rows.reshape(rows.shape[0], -1, c // 8).any(2))
