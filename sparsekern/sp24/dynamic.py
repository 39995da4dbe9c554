"""2:4 of a weight that changes: packed anew from the dense one, as often as that is stepped."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import emulating
from . import cuda, repack
from .layout import Sp24
from .pack import pack, transposable_mask

MASKS = ("top2", "transposable")


def prune(dense: Tensor, mask: str, backend: str | None = None) -> Sp24:
    """The 2:4 part of a dense W[N, K].

    mask: "top2" keeps the two of largest magnitude in each group of four along K, "transposable" the 4 x 4 tiles of
    largest sum that are 2:4 along N as well, so that dY W has sparse kernels too. On a GPU one pass over the weight
    packs what both directions need. Raises ValueError for another mask.
    """
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    dense = dense.detach()
    on_gpu = dense.is_cuda or (backend == "cuda" and emulating())
    if on_gpu and dense.dtype in repack.WIDE and repack.why_not(dense) is None:
        made = repack.pack(dense, mask, fragments=True, transposed=mask == "transposable")
        layout = Sp24(values=made.values, metadata=made.metadata, shape=(dense.shape[0], dense.shape[1]))
        assert made.fragments is not None
        cuda.adopt(layout, made.fragments, made.fragments_t)
        return layout
    if mask == "top2":
        return pack(dense, prune=True)
    return pack(dense.masked_fill(~transposable_mask(dense), 0))


def removed(weight: Tensor, metadata: Tensor) -> Tensor:
    """The weight [N, K] where the mask removes it, zeros where the mask of `metadata` keeps it."""
    n, k = weight.shape
    ones = torch.ones((n, 4 * metadata.shape[1]), dtype=torch.int8, device=weight.device)
    layout = Sp24(values=ones, metadata=metadata, shape=(n, k))
    kept = repack.unpack(layout) if ones.is_cuda and repack.why_not(ones) is None else layout.to_dense()
    return weight.masked_fill(kept.view(torch.bool), 0)
