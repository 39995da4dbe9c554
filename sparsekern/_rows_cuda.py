"""Launchers of the row kernels on NVIDIA GPUs (csrc/csr/*.cuh) for any weight whose values lie row by row.

csr is such a weight by itself; a bitmap weight becomes one with columns derived from its bits. What depends on the
topology alone (offsets, starts, orders, work lists) is derived once and kept beside `col` (_plan.py); the values are
read in place. No call waits for the device, but the first one with a topology does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._ext import (
    ACTIVATIONS,
    DTYPES,
    capability,
    cuda,
    emulating,
    known_bias,
    multiprocessors,
    stream_of,
    unit_rows,
)
from ._plan import plan
from ._rows import DerivedRows, Rows
from ._workspace import workspace

MV_TOKENS = 4  # at most so many are a matrix-vector product
_MV_CHUNK = 4096  # nonzeros of a part of a row, where a row is longer than twice that; a multiple of 4
# Distances from column to column in 8 bits: at this density one in 600 needs more, and ends a part of a row.
_DISTANCES = 0.025
_FILL = 2700  # cycles that a slice of X takes from the second-level cache: what a step costs without any nonzero
_STEP = 10  # cycles of a nonzero where one row is all that a block waits for; beside others it takes one


ENDINGS = frozenset(
    ("x_scale", "residual", "out_dtype", "beta")
)  # what mm takes beside bias and activation (_ending.py)


def mm(
    w: Rows,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    beta: float = 1.0,
) -> Tensor:
    """Y = act(x_scale * X W^T + bias) + beta * residual: x [M, K] -> [M, N] in out_dtype (None: x's type).

    x_scale: float32 [M], one for each token; residual [M, N] of the output's type.
    """
    y = x.new_empty((x.shape[0], w.shape[0]), dtype=out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    x, bias = unit_rows(x), known_bias(bias)
    x_scale = None if x_scale is None else x_scale.contiguous()
    residual = None if residual is None else unit_rows(residual)
    out = (
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        0 if x_scale is None else x_scale.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
    )
    if x.shape[0] <= MV_TOKENS:
        _mv(w, x, out, beta)
    else:
        _mm(w, x, out, beta)
    return y


def mm_t(w: Rows, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    gather, crow, col = _transposed(w)
    # The values in the order of columns: a read and a write of them, where the kernel would gather for each strip.
    values = w.values.index_select(0, gather)
    return mm(DerivedRows(values, crow, col, (w.shape[1], w.shape[0])), dy, None, "none")


def sddmm(w: Rows, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz]."""
    (n, k), m, nnz = w.shape, x.shape[0], w.col.shape[0]
    out = w.values.new_empty(nnz)
    if nnz == 0:
        return out
    if m == 0:
        return out.zero_()
    module, dtype, stream = cuda(), DTYPES[x.dtype], stream_of(x)
    topology = _topology(w)
    strips = -(-m // _strip(x))
    tiles = module.csr_sddmm_tiles(dtype)
    workers = multiprocessors(x.device)
    # Many rows share a slice of X where there are enough of them for the machine.
    kernel = 0 if _large(x) and -(-n // tiles[0][2]) * topology.slices >= workers else 1
    rows_per, warps, rows = tiles[kernel][:3]
    groups = -(-n // rows)
    splits = max(1, min(strips, workers // (groups * topology.slices)))
    order = _order(w, rows_per, warps)
    panels = _panels(x), _panels(dy)
    sums = out if splits == 1 and out.dtype == torch.float32 else out.new_empty(splits, nnz, dtype=torch.float32)
    module.csr_sddmm(
        kernel,
        dtype,
        out.data_ptr(),
        nnz,
        topology.offsets.data_ptr(),
        topology.starts.data_ptr(),
        order.data_ptr(),
        groups,
        m,
        n,
        k,
        panels[0].pointer,
        panels[1].pointer,
        sums.data_ptr(),
        splits,
        stream,
    )
    return out if splits == 1 else sums.sum(0).to(out.dtype)


def _mm(w: Rows, x: Tensor, out: tuple[int, ...], beta: float) -> None:
    (n, k), m = w.shape, x.shape[0]
    module, dtype = cuda(), DTYPES[x.dtype]
    topology, values = _topology(w), aligned(w.values)
    strips = -(-m // _strip(x))
    tiles = module.csr_mm_tiles(dtype)
    workers = multiprocessors(x.device)
    density = w.col.shape[0] / max(1, n * k)
    # A slice of X that many rows share pays where rows are sparse, or where there is work enough for everybody.
    kernel = 0 if _large(x) and (density < 0.03 or -(-n // tiles[0][2]) * strips >= workers) else 1
    rows_per, warps, rows, tokens = tiles[kernel][:4]
    items = _items(w, rows_per, warps, strips, workers)
    order = _order(w, rows_per, warps)
    partials, counters = workspace(x, items.slots * strips * rows * tokens, items.counters * strips)
    panels = _panels(x) if values.shape[0] else None  # no nonzero: nothing is read
    module.csr_mm(
        kernel,
        dtype,
        values.data_ptr(),
        values.shape[0],
        topology.offsets.data_ptr(),
        topology.starts.data_ptr(),
        order.data_ptr(),
        items.items.data_ptr(),
        items.items.shape[0],
        m,
        n,
        k,
        0 if panels is None else panels.pointer,
        out,
        beta,
        partials.data_ptr(),
        counters.data_ptr(),
        stream_of(x),
    )


def _mv(w: Rows, x: Tensor, out: tuple[int, ...], beta: float) -> None:
    (n, k), m = w.shape, x.shape[0]
    near = k <= 256 or w.col.shape[0] >= _DISTANCES * n * k
    values, units = aligned(w.values), _units(w, near)
    tokens = 1 if m == 1 else MV_TOKENS
    partials, counters = workspace(x, units.slots * tokens, units.splits.shape[0])
    distances = plan(w.col, "csr.cuda.distances", lambda: _distances(w.col)) if near else None
    short = None
    if not near and k <= 2**16:
        short = plan(w.col, "csr.cuda.short", lambda: padded_offsets(low_bits(w.col)))
    cuda().csr_mv(
        (0 if m == 1 else 1) + (0 if near else 2),
        DTYPES[x.dtype],
        values.data_ptr(),
        values.shape[0],
        0 if distances is None else distances.data_ptr(),
        0 if short is None else short.data_ptr(),
        w.col.data_ptr(),
        units.units.data_ptr(),
        units.units.shape[0],
        units.splits.data_ptr(),
        m,
        n,
        k,
        x.data_ptr(),
        x.stride(0),
        out,
        beta,
        max(1, min(2 * multiprocessors(x.device), -(-units.units.shape[0] // 64))),
        partials.data_ptr(),
        counters.data_ptr(),
        stream_of(x),
    )


# What the kernels read --------------------------------------------------------------------------------------


def _strip(x: Tensor) -> int:
    """Tokens of a panel's strip: 128 bytes of them."""
    return 128 // x.element_size()


class _Panels(NamedTuple):
    memory: Tensor
    pointer: int  # a multiple of 16 in it


def _panels(x: Tensor) -> _Panels:
    """X [M, K] as panels [ceil(M / strip), K, strip] (csrc/csr/panels.cuh)."""
    x = unit_rows(x)
    m, columns = x.shape
    memory = x.new_empty(-(-m // _strip(x)) * columns * _strip(x) + 16 // x.element_size())
    panels = _Panels(memory, memory.data_ptr() + -memory.data_ptr() % 16)
    cuda().csr_panels(DTYPES[x.dtype], x.data_ptr(), x.stride(0), m, columns, panels.pointer, stream_of(x))
    return panels


def aligned(values: Tensor) -> Tensor:
    """Values that begin at a multiple of 16 bytes: vectors are loaded from them."""
    return values if values.data_ptr() % 16 == 0 else values.clone()


def _large(x: Tensor) -> bool:
    """Whether a block may have the shared memory of two slices: not on consumer cards."""
    return emulating() or capability(x.device) in (80, 87, 90, 100, 103)


class _Topology(NamedTuple):
    offsets: Tensor  # uint16 (as int16) [nnz + 8]: the byte offset of each column's row in a slice of a panel
    starts: Tensor  # int32 [N * slices + 1]
    slices: int


def _topology(w: Rows) -> _Topology:
    (n, k), crow, col = w.shape, w.crow, w.col

    def make() -> _Topology:
        width = cuda().csr_slice_columns()
        slices = -(-k // width)
        row = torch.repeat_interleave(torch.arange(n, device=col.device), crow.diff().long(), output_size=col.shape[0])
        counts = torch.bincount(row * slices + col // width, minlength=n * slices)
        starts = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return _Topology(padded_offsets(low_bits(col % width * 128)), starts, slices)

    return plan(col, ("csr.cuda", n, k), make)


def low_bits(numbers: Tensor) -> Tensor:
    """The low 16 bits of each number."""
    return torch.where(numbers < 2**15, numbers, numbers - 2**16).to(torch.int16)


def padded_offsets(offsets: Tensor) -> Tensor:
    """Vectors of up to eight are read from it."""
    return functional.pad(offsets, (0, 8))


def _order(w: Rows, rows_per: int, warps: int) -> Tensor:
    """int32 [groups, rows_per, warps, 4]: which row a subwarp takes, -1 for none.

    The rows of a group by length, four of like length to a warp; the warps take such fours forth and back, so that
    each gets long and short ones.
    """
    n, crow, rows = w.shape[0], w.crow, 4 * rows_per * warps

    def make() -> Tensor:
        groups = -(-n // rows)
        lengths = functional.pad(crow.diff(), (0, groups * rows - n), value=-1).view(groups, rows)
        return deal(lengths, rows * torch.arange(groups, device=crow.device), rows_per, warps)

    return plan(w.crow, ("csr.cuda.order", n, rows_per, warps), make)


def deal(lengths: Tensor, first: Tensor, rows_per: int, warps: int) -> Tensor:
    """int32 [groups, rows_per, warps, 4] of rows from lengths [groups, rows], -1 where there is none; `first` [groups]
    is each group's first row."""
    place = lengths.argsort(dim=1, descending=True, stable=True)
    row = torch.where(lengths.gather(1, place) < 0, -1, place + first[:, None])
    fours = row.view(lengths.shape[0], rows_per, warps, 4)
    fours[:, 1::2] = fours[:, 1::2].flip(2)
    return fours.to(torch.int32).contiguous()


class Items(NamedTuple):
    items: Tensor  # int32 [count, 8]: csrc/csr/mm.cuh
    slots: int
    counters: int


def _items(w: Rows, rows_per: int, warps: int, strips: int, workers: int) -> Items:
    """The work list of csr_mm: groups of rows, cut along K where one of them would keep the machine waiting."""
    (n, k), rows = w.shape, 4 * rows_per * warps
    # Blocks that each strip of tokens should make, in powers of two: one list serves many token counts.
    wanted = 1 << max(0, (-(-2 * workers // strips) - 1).bit_length())

    def make() -> Items:
        topology = _topology(w)
        slices, groups = topology.slices, -(-n // rows)
        counts = topology.starts.diff().view(n, slices)
        padded = functional.pad(counts, (0, 0, 0, groups * rows - n)).view(groups, rows, slices)
        cost = torch.maximum(padded.sum(1), _STEP * padded.amax(1))
        cost = torch.where(cost > 0, cost + _FILL, 0).cpu()
        return cut(cost, max(1.0, cost.sum().item() / wanted), w.col.device)

    return plan(w.col, ("csr.cuda.items", n, k, rows, wanted), make)


def cut(cost: Tensor, target: float, device: torch.device) -> Items:
    """Items of about `target` at most, from the costs [groups, slices]; empty slices at either end are left out."""
    items, slots, counters = [], 0, 0
    for group, costs in enumerate(cost.tolist()):
        used = [i for i, c in enumerate(costs) if c]
        begin, end = (used[0], used[-1] + 1) if used else (0, 0)
        total = sum(costs)
        parts = max(1, min(end - begin, round(total / target)))
        bounds, done = [begin], 0.0
        for i in range(begin, end):
            done += costs[i]
            # A cut where the parts so far have their share of the whole, and something is left.
            if len(bounds) < parts and done >= total * len(bounds) / parts and i + 1 < end:
                bounds.append(i + 1)
        bounds.append(end)
        parts = len(bounds) - 1
        for part in range(parts):
            first, last = bounds[part], bounds[part + 1]
            items.append((sum(costs[first:last]), [group, first, last, part, parts, slots, counters, 0]))
        if parts > 1:
            slots, counters = slots + parts, counters + 1
    items.sort(key=lambda item: -item[0])  # stable: equal costs stay in order
    return Items(torch.tensor([item for _, item in items], dtype=torch.int32, device=device), slots, counters)


def _distances(col: Tensor) -> Tensor:
    """uint8 [nnz + 8]: how much further each column is than the one before it, where that fits."""
    return padded_offsets(torch.diff(col, prepend=col[:1]).clamp(0, 255).to(torch.uint8))


class _Units(NamedTuple):
    units: Tensor  # int32 [count, 8]: row, begin, end, first column, split or -1, part (csrc/csr/mv.cuh)
    splits: Tensor  # int32 [splits, 2]: first slot, parts
    slots: int


def _units(w: Rows, near: bool) -> _Units:
    """The work list of csr_mv: rows, and the parts of long ones, the longest first.

    near: a part ends where the next column is more than 255 further.
    """
    n, crow, col = w.shape[0], w.crow, w.col

    def make() -> _Units:
        begin, lengths = crow[:-1].long(), crow.diff().long()
        row = torch.arange(n, device=crow.device)
        parts = torch.where(lengths > 2 * _MV_CHUNK, -(-lengths // _MV_CHUNK), 1)
        of = torch.repeat_interleave(row, parts)
        first = begin[of] + (torch.arange(len(of), device=of.device) - (parts.cumsum(0) - parts)[of]) * _MV_CHUNK
        if near:
            far = torch.diff(col, prepend=col[:1]) > 255  # where a row begins there is a part already
            far = far.nonzero()[:, 0]
            of = torch.cat((of, torch.searchsorted(crow.long(), far, right=True) - 1))
            first = torch.cat((first, far))
        both = torch.unique(torch.stack((of, first), 1), dim=0)  # sorted by row, then by place
        of, first = both[:, 0], both[:, 1]
        parts = torch.bincount(of, minlength=n)
        part = torch.arange(len(of), device=of.device) - (parts.cumsum(0) - parts)[of]
        last = torch.where(part + 1 == parts[of], crow[1:].long()[of], first.roll(-1))
        column = functional.pad(col, (0, 1))[first]
        cut = parts > 1
        split = torch.where(cut, cut.cumsum(0) - 1, -1)[of]
        units = torch.stack((of, first, last, column, split, part, split, split), 1)
        units = units[(last - first).argsort(descending=True, stable=True)].to(torch.int32).contiguous()
        counts = parts[cut]
        splits = torch.stack((counts.cumsum(0) - counts, counts), 1).to(torch.int32).contiguous()
        return _Units(units, splits, int(counts.sum()))

    return plan(col, ("csr.cuda.units", n, near), make)


class _Transposed(NamedTuple):
    gather: Tensor  # int64 [nnz]: where the values of W^T's rows lie among those of W
    crow: Tensor
    col: Tensor


def _transposed(w: Rows) -> _Transposed:
    """The topology of W^T, rows ascending inside a column: a stable sort by column."""
    (n, k), crow, col = w.shape, w.crow, w.col

    def make() -> _Transposed:
        gather = col.argsort(stable=True)
        row = torch.repeat_interleave(torch.arange(n, device=col.device), crow.diff().long(), output_size=col.shape[0])
        counts = torch.bincount(col, minlength=k)
        starts = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return _Transposed(gather, starts, row[gather].to(torch.int32))

    return plan(col, ("csr.cuda.transposed", n, k), make)
