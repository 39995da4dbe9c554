"""Which weights may stay: N:M, unstructured, block. A pattern turns scores into a mask; a format stores it.

A convolution's weight [N, C, R, S] is a matrix W[N, K] in one of two orders of K: "crs" is the flattened
(c, r, s), as `weight.flatten(1)` has it; "rsc" has the channels innermost, so that a group of four lies along
C at a fixed tap. The two agree for 1x1 kernels only, so a pattern always says which one it means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import patterns
from . import score

ORDERS = patterns.order_names(4)


def _matrix(weight: Tensor, order: str = "crs") -> Tensor:
    """A weight [N, C, ...] as W[N, K]; a matrix has one order only and is returned as it is."""
    return weight if weight.dim() == 2 else patterns.as_matrix(weight, order)


def _weight(matrix: Tensor, shape: tuple[int, ...], order: str = "crs") -> Tensor:
    return matrix if len(shape) == 2 else patterns.as_weight(matrix, shape, order)


@dataclass(frozen=True)
class Pattern:
    """What `mask` needs: one weight's scores and the sparsity asked for."""

    scope: ClassVar[str] = "layer"

    def mask(self, scores: Tensor, sparsity: float | None = None, p: float = 1.0) -> Tensor:
        """bool, shaped like `scores`: True where the weight stays."""
        raise NotImplementedError(f"{type(self).__name__} has no mask")


@dataclass(frozen=True)
class NM(Pattern):
    """Keep the `keep` best of each `group` consecutive weights along K (axis=1) or along N (axis=0).

    A ragged last group keeps `keep` of what it has. Ties keep the lower index. 2:4 is NM(keep=2, group=4).
    """

    keep: int = 2
    group: int = 4
    axis: int = 1
    order: str = "crs"

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= self.group or self.group < 1:
            raise ValueError(f"N:M needs 0 <= keep <= group, got keep={self.keep}, group={self.group}")
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 1 (along K) or 0 (along N), got {self.axis}")
        _check_order(self.order)

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group

    def mask(self, scores: Tensor, sparsity: float | None = None, p: float = 1.0) -> Tensor:
        if sparsity is not None and abs(sparsity - self.sparsity) > 1e-6:
            raise ValueError(f"keep={self.keep}, group={self.group} has sparsity {self.sparsity:g}, not {sparsity}")
        matrix = _matrix(scores, self.order)
        rows = matrix if self.axis == 1 else matrix.t()
        k = rows.shape[1]
        # Padding scores below every weight, so that a ragged group keeps real entries.
        groups = torch.nn.functional.pad(rows, (0, -k % self.group), value=-math.inf).unflatten(1, (-1, self.group))
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)[:, :k]
        kept = kept if self.axis == 1 else kept.t()
        return _weight(kept, scores.shape, self.order)

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Keep the best weights, wherever they are.

    `per` "layer" compares inside one weight, "row" inside each output row, "global" across all weights of a
    call; then `min_keep` is the share that every layer keeps at least, which prevents the collapse of a
    layer.
    """

    per: str = "layer"
    min_keep: float = 0.0

    def __post_init__(self) -> None:
        if self.per not in ("layer", "row", "global"):
            raise ValueError(f"per must be 'layer', 'row' or 'global', got {self.per!r}")
        if not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep is a share in [0, 1], got {self.min_keep}")

    @property
    def scope(self) -> str:  # type: ignore[override]
        return "global" if self.per == "global" else "layer"

    def mask(self, scores: Tensor, sparsity: float | None = None, p: float = 1.0) -> Tensor:
        share = _share(sparsity)
        if self.per == "row":
            return _weight(_best(_matrix(scores), share), scores.shape)
        return _best(scores.reshape(1, -1), share).reshape(scores.shape)

    def masks(self, scores: Sequence[Tensor], sparsity: float | None) -> list[Tensor]:
        """The masks of several weights under one threshold."""
        share = _share(sparsity)
        raised = []
        for s in scores:
            flat = s.reshape(-1).clone()
            least = math.ceil(self.min_keep * flat.numel())
            if least:
                flat[flat.topk(least, sorted=False).indices] = math.inf
            raised.append(flat.cpu())
        if not raised:
            return []
        kept = _best(torch.cat(raised)[None], share)[0]
        parts = kept.split([s.numel() for s in scores])
        return [part.reshape(s.shape).to(s.device) for part, s in zip(parts, scores, strict=True)]

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block(Pattern):
    """Keep the best R x C blocks of W[N, K] whole; `size` is an int or (R, C). Edge blocks may be smaller."""

    size: int | tuple[int, int] = 32
    order: str = "crs"

    def __post_init__(self) -> None:
        if len(self.block) != 2 or not all(isinstance(b, int) and b >= 1 for b in self.block):
            raise ValueError(f"size must be a positive integer or a pair of them, got {self.size}")
        _check_order(self.order)

    @property
    def block(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def mask(self, scores: Tensor, sparsity: float | None = None, p: float = 1.0) -> Tensor:
        matrix = _matrix(scores, self.order)
        (n, k), (r, c) = matrix.shape, self.block
        best = score.blocks(matrix, self.block, p)
        kept = _best(best.reshape(1, -1), _share(sparsity)).reshape(best.shape)
        whole = kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
        return _weight(whole, scores.shape, self.order)

    def __str__(self) -> str:
        return "x".join(str(b) for b in self.block)


def pattern_of(pattern: Pattern | str) -> Pattern:
    """A pattern from itself or from its name: "2:4", "unstructured", "global", "row", "block" (32 x 32).

    Other N:M patterns are written NM(keep=..., group=...): the field does not agree on whether N is kept or
    pruned.
    """
    if isinstance(pattern, Pattern):
        return pattern
    known: dict[str, Pattern] = {
        "2:4": NM(),
        "unstructured": Unstructured(),
        "global": Unstructured(per="global"),
        "row": Unstructured(per="row"),
        "block": Block(),
    }
    if pattern not in known:
        raise ValueError(
            f"pattern must be one of {', '.join(known)}, or a Pattern such as NM(keep=1, group=4) or "
            f"Block((16, 32)); got {pattern!r}"
        )
    return known[pattern]


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")


def _share(sparsity: float | None) -> float:
    if sparsity is None:
        raise ValueError("this pattern needs a sparsity: the share of weights to remove, in [0, 1]")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the share of weights to remove, in [0, 1]; got {sparsity}")
    return sparsity


def _best(scores: Tensor, sparsity: float) -> Tensor:
    """bool: the best entries of every row, exactly round((1 - sparsity) * columns) of them; ties: any."""
    keep = round((1 - sparsity) * scores.shape[-1])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(keep, dim=-1, sorted=False).indices, True)
