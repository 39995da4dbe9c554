"""From the pattern that a weight has to the formats worth trying on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..formats import FORMATS
from ..patterns import Order, Patterns
from ..tune import described
from .base import SparseModule
from .conv import SparseConv2d
from .linear import SparseLinear

# Near 2:4: at most this share of the groups has a third nonzero, at about half density. A weight pruned to
# half at random has 31 % such groups, so the line is far from both kinds.
NEAR_VIOLATION, NEAR_DENSITY = 0.05, 0.4
FULL_24 = 0.35  # below, a weight may be 2:4 by chance, and sp24 would store mostly zeros
DENSE = 0.95  # above this density a weight counts as dense
CSR_DENSITY, BITMAP_DENSITY = 0.7, (0.1, 0.8)
BLOCK_SHARE, BLOCK_FILL = 0.75, 0.3  # most blocks stored, least density inside them
CONV_BLOCKS = (8, 16, 32, 64)
BLOCKS = (16, 32, 64)


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer. `block` belongs to bsr, `order` to convolutions, `prune` to sp24.

    `share` of the weights will be stored, in `nbytes` bytes; None where only packing can tell.
    """

    format: str
    block: tuple[int, int] | None = None
    order: str | None = None
    prune: bool = False
    share: float | None = None
    nbytes: int | None = None

    def __str__(self) -> str:
        return described(self.format, self.block or (), self.order)

    def build(self, layer: nn.Module) -> SparseModule:
        """The sparse twin of a plain nn.Linear or nn.Conv2d."""
        options: dict[str, Any] = {"format": self.format, "prune": self.prune}
        if self.block is not None:
            options["block_size"] = self.block
        if isinstance(layer, nn.Linear):
            return SparseLinear.from_dense(layer, **options)
        if isinstance(layer, nn.Conv2d):
            return SparseConv2d.from_dense(layer, order=self.order or "auto", **options)
        raise TypeError(f"expected an nn.Linear or nn.Conv2d, got {type(layer).__name__}")


def storable(patterns: Patterns) -> tuple[Order, ...]:
    """The K orders that a module can store: all but the transposed one."""
    return tuple(o for o in patterns.orders if o.name != "n")


def exact(patterns: Patterns) -> Order | None:
    """The first storable order along which the weight is 2:4."""
    return next((o for o in storable(patterns) if o.is_24), None)


def nearest(patterns: Patterns) -> Order:
    return min(storable(patterns), key=lambda o: o.violation)


def near(patterns: Patterns) -> bool:
    """Almost 2:4, and not merely so sparse that few groups can violate it."""
    close = nearest(patterns).violation <= NEAR_VIOLATION and patterns.density >= NEAR_DENSITY
    return close and exact(patterns) is None


def best_blocks(patterns: Patterns) -> list[tuple[int, Order]]:
    """At most two block sizes, with their order, of few and well filled blocks: the least stored first."""
    found = []
    for order in storable(patterns):
        for size, share in order.blocks.items():
            if 0 < share <= BLOCK_SHARE and patterns.density >= BLOCK_FILL * share and size <= 2 * min(order.shape):
                found.append((share, size, order))
    if not found:
        return []
    # Larger blocks run faster: one that stores at most a tenth more replaces a smaller one.
    found.sort(key=lambda f: f[0])
    kept = [f for f in found if not any(g[1] > f[1] and g[0] <= 1.1 * f[0] for g in found)]
    return [(size, order) for _, size, order in kept[:2]]


def describe(patterns: Patterns) -> str:
    """The pattern in a few words: "2:4 rsc", "near 2:4 (1.2% bad)", "block 32", "unstructured", ..."""
    if patterns.nonzeros == 0:
        return "all zero"
    conv = len(patterns.shape) > 2
    blocks, fits = best_blocks(patterns), exact(patterns)
    if fits is not None and patterns.density >= FULL_24:
        return "2:4" + (f" {fits.name}" if conv else "")
    if blocks:
        return f"block {blocks[0][0]}" + (f" {blocks[0][1].name}" if conv else "")
    if near(patterns):
        return f"near 2:4 ({100 * nearest(patterns).violation:.2g}% bad)"
    if patterns.density >= FULL_24 and any(o.is_24 for o in patterns.orders):
        return "2:4 along N"
    return "dense" if patterns.density > DENSE else "unstructured"


def candidates(
    patterns: Patterns, format: str, block_size: int | tuple[int, int] | None, prune: bool
) -> list[Candidate]:
    """The ways to store a weight of these patterns, the most specific format first.

    format "auto": those that the pattern speaks for; else the one asked for. Raises ValueError where the
    weight is not 2:4 but sp24 is asked for without prune.
    """
    conv = len(patterns.shape) > 2
    fits = exact(patterns)
    if format == "sp24" and fits is None and not prune:
        raise ValueError(violation(patterns))
    wanted: list[Candidate] = []
    if format in ("auto", "sp24"):
        if fits is not None:
            wanted.append(_plain("sp24", patterns, fits.name if conv else None))
        elif prune and (format == "sp24" or near(patterns)):
            order = nearest(patterns).name if conv else None
            wanted.append(_plain("sp24", patterns, order, prune=True))
    if format in ("auto", "bsr"):
        wanted += _block_candidates(patterns, format, block_size, conv)
    if format == "csr" or (format == "auto" and patterns.density <= CSR_DENSITY):
        wanted.append(_plain("csr", patterns))
    low, high = BITMAP_DENSITY
    if format == "bitmap" or (format == "auto" and low <= patterns.density <= high):
        wanted.append(_plain("bitmap", patterns))
    return wanted


def _plain(format: str, patterns: Patterns, order: str | None = None, *, prune: bool = False) -> Candidate:
    share = 0.5 if format == "sp24" else patterns.density
    return Candidate(format, None, order, prune, share, patterns.nbytes(format, order=order))


def _block_candidates(
    patterns: Patterns, format: str, block_size: int | tuple[int, int] | None, conv: bool
) -> list[Candidate]:
    if block_size is not None:
        block = (block_size, block_size) if isinstance(block_size, int) else block_size
        if format == "auto" and not best_blocks(patterns):
            return []
        return [Candidate("bsr", block)]
    best = best_blocks(patterns)
    if not best and format == "bsr":
        best = [(32, storable(patterns)[0])]
    return [
        Candidate(
            "bsr",
            (size, size),
            order.name if conv else None,
            share=order.blocks[size],
            nbytes=patterns.nbytes("bsr", size, order.name),
        )
        for size, order in best
    ]


def violation(patterns: Patterns) -> str:
    """Why a weight is not 2:4: the share of violating groups and the first of them, by order."""
    parts = []
    for order in storable(patterns):
        name = "" if order.name == "k" else f"{order.name}: "
        parts.append(f"{name}{order.violations} of {order.groups} groups, first {order.first}")
    return "not 2:4: " + "; ".join(parts)


def first_suitable(patterns: Patterns, wanted: list[Candidate]) -> Candidate | None:
    """The candidate to take without timing: 2:4, blocks, csr where few weights are left, else bitmap."""
    by_format = {c.format: c for c in reversed(wanted)}
    order = ["csr", "bitmap"] if patterns.density <= 0.3 else ["bitmap", "csr"]
    order = ["sp24", "bsr", *order] if patterns.density >= FULL_24 else ["bsr", *order, "sp24"]
    return next((by_format[name] for name in order if name in by_format), None)


def check_options(format: str, prune: bool) -> None:
    """Raises ValueError for a format that is none, and for prune with a format that it has no meaning for."""
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format must be 'auto' or one of {', '.join(FORMATS)}, got {format!r}")
    if prune and format not in ("auto", "sp24"):
        raise ValueError(
            f"prune=True is for format 'sp24' and 'auto'; for {format!r} prune the model first "
            "(sparsekern.prune.magnitude_)"
        )
