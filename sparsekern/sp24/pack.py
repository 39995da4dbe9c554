"""Dense <-> sp24."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from .._ext import DTYPES, host, host_packs
from . import repack
from .layout import Sp24, movable, padded


def prune_mask(dense: Tensor) -> Tensor:
    """bool, true for the two entries of largest magnitude in each group of four along the last dimension.

    Ties keep the lower index. A ragged last group is filled up with zeros.
    """
    k = dense.shape[-1]
    groups = torch.nn.functional.pad(dense, (0, padded(k) - k)).unflatten(-1, (-1, 4))
    order = groups.abs().argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return keep.flatten(-2)[..., :k]


def transposable_mask(dense: Tensor) -> Tensor:
    """bool [N, K], two true in every row and column of each 4 x 4 tile: W and W^T are both 2:4.

    Of the 90 such tiles the one whose entries have the largest sum of magnitudes (float32; infinities and NaN count
    as 2^120). Ragged edges are filled up with zeros. Pairs of columns 01 02 03 12 13 23 are numbered p = 0..5, so the
    complement of p is 5 - p. What rows 0 and 1 leave to rows 2 and 3 depends on their column counts alone: 19 cases,
    of which the first largest is taken (Hubara et al. 2021, arXiv 2102.08124, pose the problem as a flow).
    """
    n, k = dense.shape
    whole = torch.nn.functional.pad(dense.detach(), (0, -k % 4, 0, -n % 4)).float().abs()
    whole = torch.where(whole < MOST, whole, MOST)  # a NaN is not less
    tiles = whole.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(0, 1)
    sums = torch.stack([tiles[..., a] + tiles[..., b] for a, b in combinations(range(4), 2)], -1)  # [tiles, rows, 6]
    above, below = _cases(sums.device)
    # [tiles, 19, orders]: both rows of a half, in each order that gives the same column counts.
    top = sums[:, 0][:, above[..., 0]] + sums[:, 1][:, above[..., 1]]
    bottom = sums[:, 2][:, below[..., 0]] + sums[:, 3][:, below[..., 1]]
    (best_top, which_top), (best_bottom, which_bottom) = top.max(-1), bottom.max(-1)
    case = (best_top + best_bottom).argmax(-1, keepdim=True)
    flat = case.squeeze(-1)
    orders = [which.gather(1, case).squeeze(-1) for which in (which_top, which_bottom)]
    pairs = torch.cat((above[flat, orders[0]], below[flat, orders[1]]), 1)
    columns = torch.tensor(list(combinations(range(4), 2)), device=dense.device)
    mask = torch.zeros(tiles.shape, dtype=torch.bool, device=dense.device).scatter_(-1, columns[pairs], True)
    rows = (n + 3) // 4
    return mask.unflatten(0, (rows, -1)).transpose(1, 2).reshape(whole.shape)[:n, :k]


MOST = 2.0**120


def _cases(device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [19, 6, 2] twice: for each column count of rows 0 and 1, the pairs of these rows, and of rows 2 and 3."""
    above = [[(p, p)] for p in range(6)]
    above.append([(p, 5 - p) for p in range(6)])
    above += [[(p, q), (q, p)] for p, q in combinations(range(6), 2) if q != 5 - p]
    below = [[(p, q) if len(case) == 6 else (5 - p, 5 - q) for p, q in case] for case in above]
    fill = [[(case * 6)[:6] for case in half] for half in (above, below)]
    return torch.tensor(fill[0], device=device), torch.tensor(fill[1], device=device)


def pack(dense: Tensor, *, prune: bool = False, scale: Tensor | None = None) -> Sp24:
    """Packs a W[N, K] that is 2:4 along K: at most two nonzeros in every group of four.

    prune=True keeps the two of largest magnitude instead of raising. -0.0 counts as zero. Raises ValueError that
    names the first row and group with more than two nonzeros, and its values.
    """
    dense = dense.detach()
    if host_packs(dense):
        return _pack_host(dense, prune, scale)
    if dense.is_cuda and repack.why_not(dense) is None:
        return _pack_device(dense, prune, scale)
    n, k = dense.shape
    kp = padded(k)
    if prune:
        kept = prune_mask(dense.float() if dense.dtype.itemsize == 1 else dense)
        # Not a product: that turns a pruned infinity into NaN.
        dense = movable(dense).masked_fill(~kept, 0).view(dense.dtype)
    whole = torch.nn.functional.pad(dense, (0, kp - k))
    groups = whole.reshape(n, kp // 4, 4)
    nonzero = groups != 0
    crowded = (nonzero.sum(-1) > 2).nonzero()
    if len(crowded):
        row, group = (int(i) for i in crowded[0])
        raise not_24(row, group, groups[row, group])
    # The stored pair: every nonzero, filled up from the right, so an empty group stores (2, 3) = 0xE.
    rank = torch.where(nonzero, 8, 0) + torch.arange(4, device=dense.device)
    pair = rank.topk(2, dim=-1).indices.sort(dim=-1).values
    values = movable(groups).gather(-1, pair).view(dense.dtype).reshape(n, kp // 2)
    nibbles = (pair[..., 0] | pair[..., 1] << 2).to(torch.uint8).reshape(n, kp // 8, 2)
    metadata = nibbles[..., 0] | nibbles[..., 1] << 4
    return Sp24(values=values.contiguous(), metadata=metadata.contiguous(), shape=(n, k), scale=scale)


def _pack_host(dense: Tensor, prune: bool, scale: Tensor | None) -> Sp24:
    """The same on the compiled packers (csrc/sp24)."""
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    n, k = dense.shape
    kp = padded(k)
    values, metadata = dense.new_empty(n, kp // 2), dense.new_empty((n, kp // 8), dtype=torch.uint8)
    packer = host().sp24_pack_top2 if prune else host().sp24_pack
    where = (dense.data_ptr(), DTYPES[dense.dtype], n, k, dense.stride(0), values.data_ptr(), metadata.data_ptr())
    bad = packer(*where, torch.get_num_threads())
    if bad is not None and bad >= 0:
        row, group = divmod(bad, kp // 4)
        values_of_group = torch.nn.functional.pad(dense[row, 4 * group : 4 * group + 4], (0, max(0, 4 * group + 4 - k)))
        raise not_24(row, group, values_of_group)
    return Sp24(values=values, metadata=metadata, shape=(n, k), scale=scale)


def _pack_device(dense: Tensor, prune: bool, scale: Tensor | None) -> Sp24:
    """The same on the GPU's packers (csrc/sp24/pack.cuh)."""
    n, k = dense.shape
    first = None if prune else repack.no_crowd(dense)
    made = repack.pack(dense, "top2" if prune else "strict", first=first)
    bad = -1 if first is None else int(first[0])
    if bad >= 0:
        row, group = divmod(bad, padded(k) // 4)
        values = torch.nn.functional.pad(dense[row].float(), (0, padded(k) - k))[4 * group : 4 * group + 4]
        raise not_24(row, group, values)
    return Sp24(values=made.values, metadata=made.metadata, shape=(n, k), scale=scale)


def not_24(row: int, group: int, values: Tensor) -> ValueError:
    shown = ", ".join(f"{v:g}" for v in values.float().tolist())
    return ValueError(
        f"the weight is not 2:4: row {row}, group {group} (columns {4 * group}..{4 * group + 3}) holds [{shown}], "
        "more than two nonzeros; prune it first, or pass prune=True to keep the two largest of every group"
    )
