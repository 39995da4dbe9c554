"""How much a weight matters: scores shaped like the weight, larger means keep.

A score says nothing about which weights may stay; that is the pattern's part (`pattern.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import padded


def magnitude(weight: Tensor, p: float = 1.0) -> Tensor:
    """|w|^p for every weight (L1: p=1, L2: p=2); p = inf gives |w|, to be joined by a maximum.

    weight of any shape and floating type; returns float32 (float64 for float64). Raises ValueError for p <=
    0 and for a weight that holds NaN, whose order is undefined.
    """
    if not p > 0:
        raise ValueError(f"p must be positive (1: L1, 2: L2, inf: maximum), got {p}")
    size = weight.detach().abs()
    size = size if size.dtype == torch.float64 else size.to(torch.float32)
    if bool(torch.isnan(size).any()):
        raise ValueError(f"the weight of shape {tuple(weight.shape)} holds NaN; there is no magnitude to prune by")
    return size if p == 1 or math.isinf(p) else size.pow(p)


def blocks(scores: Tensor, block: tuple[int, int], p: float = 1.0) -> Tensor:
    """The score of every R x C block of scores [N, K]: the sum, for p = inf the largest.

    `scores` are those of `magnitude(weight, p)`. Returns [ceil(N/R), ceil(K/C)]; edge
    blocks count the entries that they have.
    """
    (n, k), (r, c) = scores.shape, block
    nb, kb = -(-n // r), -(-k // c)
    tiles = padded(scores, nb * r, kb * c).reshape(nb, r, kb, c)
    return tiles.amax((1, 3)) if math.isinf(p) else tiles.sum((1, 3))
