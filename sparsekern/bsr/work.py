"""What the GPU kernels walk: a list of work, longest first, made on the device from the topology alone.

An item is a run of stored blocks of one block row (of one block column, for `mm_t`). Rows longer than `most` are cut
in pieces, whose sums meet in a second pass, in order: results do not depend on who ran when. Every array has a size
that follows from the grid and from how many blocks there are, so a new topology is a new filling of the same arrays:
nothing asks the device for a number, and a captured CUDA graph that reads them goes on with the new topology.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ext import capturing
from .._plan import overwrite, plan, plans
from .layout import Bsr


class Columns(NamedTuple):
    """The stored blocks by column, inside a column by row; values stay where they are.

    starts [Kb + 1]: where each column begins; row [nnzb]: every block's block row; gather [nnzb]: which block it is.
    """

    starts: Tensor
    row: Tensor
    gather: Tensor


class Work(NamedTuple):
    """items [count, 4] int32: row (-1: nothing to do), first block, end, partial sum to write (-1: the row is whole).

    splits [count, 3] int32: row (-1: none), its first partial sum, how many; slots: room for so many partial sums;
    most: blocks that an item may have, 0 for any number.
    """

    items: Tensor
    splits: Tensor
    slots: int
    most: int


def rows_of(layout: Bsr) -> Tensor:
    """int32 [nnzb]: the block row of every block."""
    return kept(layout, ("rows",), lambda: layout.block_rows().int(), lambda old: overwrite(old, layout.block_rows()))


def by_columns(layout: Bsr) -> Columns:
    """The walk of `mm_t`."""

    def make() -> Columns:
        col, kb = layout.col.long(), layout.grid[1]
        order = torch.argsort(col, stable=True)
        starts = torch.searchsorted(col[order], torch.arange(kb + 1, device=col.device)).int()
        return Columns(starts, layout.block_rows()[order].int(), order.int())

    return kept(layout, ("columns",), make, lambda old: refill(old, make()))


def work_list(layout: Bsr, columns: bool, most: int) -> Work:
    """The work of a walk whose items have at most so many blocks (0: rows are never cut).

    Whether the second pass is needed at all is asked of the device once, when the list is made. Where no row was long
    enough then, none is ever cut, whatever topology follows.
    """
    nnzb = layout.values.shape[0]

    def starts() -> Tensor:
        return by_columns(layout).starts if columns else layout.crow

    def make() -> Work:
        begin = starts()
        return cut(begin, nnzb, most if most and (capturing(begin) or int(begin.diff().max()) > most) else 0)

    return kept(layout, ("work", columns, most), make, lambda old: refill(old, cut(starts(), nnzb, old.most)))


def cut(starts: Tensor, nnzb: int, most: int) -> Work:
    """The list of work over rows that begin at `starts`; items have at most `most` blocks (0: any number)."""
    rows, device = starts.shape[0] - 1, starts.device
    longest = most or max(nnzb, 1)
    count = starts.diff().long()
    pieces = (count + longest - 1).div(longest, rounding_mode="floor").clamp(min=1)
    ends = pieces.cumsum(0)
    place = torch.arange(rows + nnzb // longest, device=device)
    row = torch.searchsorted(ends, place, right=True)
    used = row < rows
    row = row.clamp(max=rows - 1)
    piece = place - (ends - pieces)[row]
    # The pieces of a row differ by one block at most.
    begin = (piece * count[row]).div(pieces[row], rounding_mode="floor")
    end = ((piece + 1) * count[row]).div(pieces[row], rounding_mode="floor")
    several = pieces > 1
    slot = torch.where(several, pieces, 0).cumsum(0) - torch.where(several, pieces, 0)
    base = starts.long()[row]
    item = torch.stack([row, base + begin, base + end, torch.where(several[row], slot[row] + piece, -1)], 1)
    item = torch.where(used[:, None], item, -1)
    order = torch.argsort(torch.where(used, end - begin, -1), descending=True, stable=True)
    first = torch.argsort(several.logical_not().int(), stable=True)[: min(rows, nnzb // (longest + 1))]
    split = torch.stack([first, slot[first], pieces[first]], 1)
    split = torch.where(several[first][:, None], split, -1)
    # A row of n > most blocks has fewer than 2 n / most pieces.
    slots = 2 * nnzb // longest if len(first) else 0
    return Work(item[order].int().contiguous(), split.int().contiguous(), slots, most)


_KEY = "bsr.walk"
_WALKS: dict[str, Callable[..., Any]] = {"rows": rows_of, "columns": by_columns, "work": work_list}


def walked_by(name: str, walk: Callable[..., Any]) -> None:
    """From now on `refresh` calls walk(layout, *rest) for all that is kept as (name, *rest)."""
    _WALKS[name] = walk


def refresh(layout: Bsr) -> None:
    """Brings all that is kept for this layout's topology up to date, in place: what captured graphs read."""
    for key in plans(layout.col):
        if key[:2] == (_KEY, layout.dims):
            name, *rest = key[2]
            _WALKS[name](layout, *rest)


def kept(layout: Bsr, name: tuple[Any, ...], make: Callable[[], Any], again: Callable[[Any], Any]) -> Any:
    """What depends on the topology alone, beside it; it must not hold the topology itself, or both never die.

    The first of the words in `name` is one that `refresh` knows.
    """
    return plan(layout.col, (_KEY, layout.dims, name), make, again)


def refill(old: Any, new: Any) -> None:
    """Copies every tensor of a record into the one that it replaces."""
    for mine, fresh in zip(old, new, strict=True):
        if isinstance(mine, Tensor):
            overwrite(mine, fresh)
