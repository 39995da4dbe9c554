"""Convolution on NVIDIA GPUs for weights whose values lie row by row, csr and bitmap (csrc/csr/conv.cuh).

Images in torch's usual order are copied once into planes with zeros around them (csrc/csr/planes.cuh; not where the
kernel is 1x1 and they are planes already), images with channels innermost are transposed on the way; Y is written in
X's order. A 1x1 convolution of images with channels innermost is the format's own product over pixels.

The direct kernel skips zeros, the tensor cores do not: what was measured decides (roads.py), else `worth_it` compares
the two. Where they say no, and for the
gradient of the weight, the weight (its gradient) is written out densely for cuDNN, which costs its dense bytes, and
sampled at the stored places; torch's switches then decide about TF32. The gradient of X is the same direct kernel over
planes of dY, with the topology transposed once and the values gathered at every call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product as pairs
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import bitmap
from .._ext import (
    ACTIVATIONS,
    DTYPES,
    capability,
    cuda,
    known_bias,
    multiprocessors,
    stream_of,
    why_not_cuda,
)
from .._plan import plan
from .._rows import Rows
from .._rows_cuda import Items, aligned, cut, deal, low_bits, padded_offsets
from .._workspace import workspace
from ..bitmap.cuda import rows_of as rows_of_bitmap
from ..formats import backend_module
from ..layout import Layout
from ..ref import ACTIVATIONS as FUNCTIONS
from . import roads
from .geometry import ORDERS, Geometry, channels_last, matrix_of, memory_format, weight_of

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FILL = 400  # a slice costs a block as much as so many nonzeros: what it brings from the second-level cache
_STEP = 4  # a nonzero of a row that all others wait for costs as much as so many beside others
# Multiply-adds a cycle and multiprocessor. The direct kernel's, on nonzeros of 4 and of 2 bytes (csrc/csr/conv.cuh);
# by architecture a dense convolution's on tensor cores with 16-bit operands (half of what the hardware has; again half
# of it with TF32), and on fp32 units.
_DIRECT = {4: 30, 2: 40}
_DENSE = {80: (512, 60), 86: (128, 120), 90: (1024, 120), 100: (2048, 120), 120: (128, 120)}


def why_not(op: str, layout: Layout, x: Tensor, g: Geometry) -> str | None:
    """Why the CUDA kernels cannot run this convolution, or None where they can."""
    if x.dtype not in _TYPES:
        return f"{str(x.dtype).removeprefix('torch.')} is not supported by the CUDA kernels"
    if layout.dtype != x.dtype:
        return f"values are {layout.dtype}, activations {x.dtype}; they must agree"
    if g.groups > 1 and layout.shape[1] == g.taps:
        return f"it is depthwise: of the {g.taps} weights of a channel there is nothing to skip that dense kernels read"
    if layout.values.numel() >= 2**31 or x.numel() >= 2**31:
        return "more than 2^31 stored values or activations are not supported by the CUDA kernels"
    return why_not_cuda(x.device)


def worth_it(dtype: torch.dtype, density: float, arch: int, tf32: bool) -> bool:
    """Whether the direct kernel should be faster than a dense convolution: operations alone, both from shared memory.

    arch: compute capability times ten. tf32: whether cuDNN may use it for float32.
    """
    tensor_cores, units = _DENSE[max((known for known in _DENSE if known <= arch), default=80)]
    dense = tensor_cores if dtype != torch.float32 else max(units, tensor_cores / 2 if tf32 else 0)
    return density * dense <= _DIRECT[dtype.itemsize]


def conv2d(
    layout: Layout, x: Tensor, bias: Tensor | None, g: Geometry, activation: str, direct: bool | None = None
) -> Tensor:
    """y = act(conv(x, W) + bias): x [B, C, H, W] -> [B, O, H', W'] in x's memory order.

    direct: by the kernel that skips zeros, where it can run, or by cuDNN; None: as was measured, or as is expected.
    """
    x = _dense_order(x)
    if g.pointwise and channels_last(x):
        return _as_images(backend_module(layout.format, "cuda").mm(layout, _pixels(x), bias, activation), x)
    y = _empty(x, layout.shape[0], *g.out_size(x.shape[2], x.shape[3]))
    grid = _forward_grid(g, x.shape[2], x.shape[3], 4 // x.element_size())
    if y.numel() and not (_direct("conv2d", layout, x, g, direct) and _runs(x, grid)):
        return FUNCTIONS[activation](_dense_conv2d(layout, x, bias, g)).contiguous(memory_format=memory_format(x))
    _run(_rows(layout), g, grid, False, x, y, known_bias(bias), ACTIVATIONS[activation])
    return y


def conv2d_input(
    layout: Layout, dy: Tensor, g: Geometry, height: int, width: int, direct: bool | None = None
) -> Tensor:
    """dx, of the given height and width, from dy, in dy's memory order. direct: as in conv2d."""
    dy = _dense_order(dy)
    if g.pointwise and channels_last(dy):
        return _as_images(backend_module(layout.format, "cuda").mm_t(layout, _pixels(dy)), dy)
    channels = layout.shape[1] // g.taps * g.groups
    dx = _empty(dy, channels, height, width)
    grid = _input_grid(g, height, width, dy.shape[2], dy.shape[3], 4 // dy.element_size())
    if dx.numel() and not (_direct("conv2d_input", layout, dy, g, direct) and _runs(dy, grid)):
        return _dense_backward(layout, dy, dx, g, True).contiguous(memory_format=memory_format(dy))
    _run(_rows(layout), g, grid, True, dy, dx, None, 0)
    return dx


def conv2d_weight(layout: Layout, dy: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """dW at the stored positions, like layout.values: cuDNN's whole dW, sampled.

    A direct kernel would be as fast as the one for Y, of which `worth_it` speaks; dense, dW is one call.
    """
    dense = matrix_of(_dense_backward(layout, dy, x, g, False), ORDERS[g.order])
    return dense.reshape(-1).index_select(0, _places(_rows(layout)))


# The dense road -----------------------------------------------------------------------------------------------


def _direct(op: str, layout: Layout, x: Tensor, g: Geometry, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    known = roads.direct_is_faster(op, layout, x, g)
    return worth_it(x.dtype, layout.density, capability(x.device), _tf32()) if known is None else known


def tune_forward(layout: Layout, x: Tensor, g: Geometry, timer: roads.Timer) -> None:
    """Measures both roads of `conv2d` for this call, where there are two, and remembers which is faster."""
    if g.pointwise and channels_last(x):
        return
    x = _dense_order(x)
    if x.numel() and _runs(x, _forward_grid(g, x.shape[2], x.shape[3], 4 // x.element_size())):
        roads.measure("conv2d", layout, x, g, lambda direct: conv2d(layout, x, None, g, "none", direct), timer)


def _tf32() -> bool:
    """Whether cuDNN may round float32 to TF32; torch refuses to say once its newer switches are used differently."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return True


def _places(w: Rows) -> Tensor:
    """int64 [nnz]: where each stored value lies in the dense matrix."""
    (n, k), crow, col = w.shape, w.crow, w.col

    def make() -> Tensor:
        return _row_of(n, crow, col) * k + col

    return plan(col, ("conv2d.places", n, k), make)


def _row_of(n: int, crow: Tensor, col: Tensor) -> Tensor:
    row = torch.arange(n, device=col.device)
    return torch.repeat_interleave(row, crow.diff().long(), output_size=col.shape[0])


def _weight(layout: Layout, g: Geometry, like: Tensor) -> Tensor:
    """The dense weight [O, C / groups, kh, kw] in the memory order of the images."""
    dense = layout.values.new_zeros(layout.shape[0] * layout.shape[1])
    dense.index_copy_(0, _places(_rows(layout)), layout.values)
    weight = weight_of(dense.view(layout.shape), (g.kernel_h, g.kernel_w), ORDERS[g.order])
    return weight.contiguous(memory_format=memory_format(like))


def _padding(g: Geometry) -> tuple[int, int] | None:
    """The padding as cuDNN takes it; None: it differs from side to side."""
    return (g.top, g.left) if g.top == g.bottom and g.left == g.right else None


def _padded(x: Tensor, g: Geometry) -> Tensor:
    return x if _padding(g) else functional.pad(x, (g.left, g.right, g.top, g.bottom))


def _dense_conv2d(layout: Layout, x: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    bias = bias if bias is None else bias.to(x.dtype)
    steps = ((g.stride_h, g.stride_w), _padding(g) or 0, (g.dilation_h, g.dilation_w), g.groups)
    return functional.conv2d(_padded(x, g), _weight(layout, g, x), bias, *steps)


def _dense_backward(layout: Layout, dy: Tensor, x: Tensor, g: Geometry, by_input: bool) -> Tensor:
    """dX (of x only the size is read), or the dense dW (of which the weight has only the size)."""
    whole = _padded(x, g)
    if by_input:
        weight = _weight(layout, g, dy)
    else:
        size = (layout.shape[0], layout.shape[1] // g.taps, g.kernel_h, g.kernel_w)
        weight = x.new_empty(1).expand(size)
    steps = ([g.stride_h, g.stride_w], list(_padding(g) or (0, 0)), [g.dilation_h, g.dilation_w])
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, whole, weight, None, *steps, False, [0, 0], g.groups, (by_input, not by_input, False)
    )
    if by_input and whole is not x:
        return dx[:, :, g.top : g.top + x.shape[2], g.left : g.left + x.shape[3]]
    return dx if by_input else dw


# What depends on sizes alone ------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A row of _cuda.csr_conv_tiles(type)."""

    rows_per: int
    warps: int
    rows: int
    positions: int
    words: int
    slice_words: int


@cache
def kernels(dtype: int) -> tuple[Kernel, ...]:
    """The compiled kernels for values of this type."""
    return tuple(Kernel(*row) for row in cuda().csr_conv_tiles(dtype))


class Grid(NamedTuple):
    """The planes that a product reads, where its taps lie in them, and which positions are which outputs."""

    size: tuple[int, int]  # positions of an image
    step: tuple[int, int]
    pad: tuple[int, int]
    pitch: int  # elements of a line
    lines: int  # of an image
    sheets: tuple[tuple[int, int, int], ...]  # phase of the step (two), first element
    taps: tuple[int, ...]  # the word of each tap in a channel's words of a slice
    pieces: tuple[tuple[int, int, int, int], ...]  # csrc/csr/conv.cuh
    windows: tuple[tuple[int, ...], ...]  # i0, i1, j0, j1, and the output of position (0, 0)
    out_step: tuple[int, int]

    @property
    def channel_words(self) -> int:
        return self.pieces[-1][3] + self.pieces[-1][2]

    @property
    def span(self) -> int:
        """Words that a tile reads, from its first position on."""
        return max(first + words for _, first, words, _ in self.pieces)


def _line(out: int, size: int, step: int, pad: int, taps: list[tuple[int, int]]) -> int:
    """Elements from line to line (lines from image to image): the zeros before the next are those behind this one.

    taps: (phase, distance) of each.
    """
    longest = out
    for phase in {phase for phase, _ in taps}:
        need = out + max(distance for p, distance in taps if p == phase)
        before, end = max(0, -((phase - pad) // step)), -((phase - pad - size) // step)
        longest = max(longest, min(end, need), need - before)
    return longest


def _grid(
    out: tuple[int, int],
    size: tuple[int, int],
    step: tuple[int, int],
    pad: tuple[int, int],
    taps: list[tuple[tuple[int, int], tuple[int, int]]],
    windows: tuple[tuple[int, ...], ...],
    out_step: tuple[int, int],
    per: int,
) -> Grid:
    """taps: (phase, distance) of each by lines and by columns; per: elements of a word."""
    lines = _line(out[0], size[0], step[0], pad[0], [h for h, _ in taps])
    pitch = _line(out[1], size[1], step[1], pad[1], [w for _, w in taps])
    far = [h[1] * pitch + w[1] for h, w in taps]
    of_tap = [(h[0], w[0], distance % per) for (h, w), distance in zip(taps, far, strict=True)]
    sheets = tuple(sorted(set(of_tap)))
    tile = 256 // per
    pieces: list[list[int]] = []
    for i, sheet in enumerate(sheets):
        words = sorted({distance // per for distance, s in zip(far, of_tap, strict=True) if s == sheet})
        for word in words:
            first, end = word // 4 * 4, -(-(word + tile) // 4) * 4
            if pieces and pieces[-1][0] == i and first <= pieces[-1][1] + pieces[-1][2]:
                pieces[-1][2] = end - pieces[-1][1]
            else:
                base = pieces[-1][3] + pieces[-1][2] if pieces else 0
                pieces.append([i, first, end - first, base])
    at = []
    for distance, sheet in zip(far, of_tap, strict=True):
        i, word = sheets.index(sheet), distance // per
        first, base = next((p[1], p[3]) for p in pieces if p[0] == i and p[1] <= word < p[1] + p[2] - tile + 1)
        at.append(base + word - first)
    made = tuple((p[0], p[1], p[2], p[3]) for p in pieces)
    return Grid(out, step, pad, pitch, lines, sheets, tuple(at), made, windows, out_step)


@lru_cache(maxsize=256)
def _forward_grid(g: Geometry, height: int, width: int, per: int) -> Grid:
    """Output (i, j) reads through tap (r, s) padded X at (i stride_h + r dilation_h, j stride_w + s dilation_w)."""
    out = g.out_size(height, width)
    taps = [
        ((r * g.dilation_h % g.stride_h, r * g.dilation_h // g.stride_h),
         (s * g.dilation_w % g.stride_w, s * g.dilation_w // g.stride_w))
        for r, s in pairs(range(g.kernel_h), range(g.kernel_w))
    ]  # fmt: skip
    window = (0, out[0], 0, out[1], 0, 0)
    step, pad = (g.stride_h, g.stride_w), (g.top, g.left)
    return _grid(out, (height, width), step, pad, taps, (window,), (1, 1), per)


@lru_cache(maxsize=256)
def _input_grid(g: Geometry, height: int, width: int, dy_height: int, dy_width: int, per: int) -> Grid:
    """X at i stride + phase - pad gets from tap r of that phase dY at i - r dilation / stride: rows of all phases over
    the same positions i, of which each phase has its window."""
    axes = (
        (g.stride_h, g.dilation_h, g.kernel_h, g.top, height),
        (g.stride_w, g.dilation_w, g.kernel_w, g.left, width),
    )
    bases = [pad // stride for stride, _, _, pad, _ in axes]
    reaches = [(kernel - 1) * dilation // stride for stride, dilation, kernel, _, _ in axes]
    out = [(size - 1 + pad) // stride - pad // stride + 1 for stride, _, _, pad, size in axes]
    taps = [
        ((0, reaches[0] - r * g.dilation_h // g.stride_h), (0, reaches[1] - s * g.dilation_w // g.stride_w))
        for r, s in pairs(range(g.kernel_h), range(g.kernel_w))
    ]
    windows = []
    for phase in pairs(range(g.stride_h), range(g.stride_w)):
        window: list[int] = []
        first = []
        for (stride, _, _, pad, size), base, p in zip(axes, bases, phase, strict=True):
            window += [-((p - pad) // stride) - base, (size - 1 + pad - p) // stride + 1 - base]
            first.append(base * stride - pad + p)
        windows.append((*window, *first))
    before = (reaches[0] - bases[0], reaches[1] - bases[1])
    steps = (g.stride_h, g.stride_w)
    return _grid((out[0], out[1]), (dy_height, dy_width), (1, 1), before, taps, tuple(windows), steps, per)


class _Tiling(NamedTuple):
    """How positions are cut into tiles: units are all images in a column, or each (where X is read in place)."""

    in_place: bool
    units: int
    images: int  # of a unit
    tiles: int  # of a unit
    plane_words: int


def _tiling(x: Tensor, grid: Grid) -> _Tiling:
    images, per = x.shape[0], 4 // x.element_size()
    pixels = grid.lines * grid.pitch
    tile = 256 // per
    plain = grid.channel_words == tile and grid.step == (1, 1) and grid.pad == (0, 0) and x.is_contiguous()
    plain = plain and (grid.lines, grid.pitch) == x.shape[2:] and grid.out_step == (1, 1)
    tiles = -(-pixels // 256)
    if plain and (pixels * x.element_size() | x.data_ptr()) % 16 == 0 and 10 * pixels >= 7 * 256 * tiles:
        return _Tiling(True, images, 1, tiles, pixels // per)
    tiles = -(-images * pixels // 256)
    return _Tiling(False, 1, images, tiles, -(-((tiles - 1) * tile + grid.span) // 4) * 4)


def _runs(x: Tensor, grid: Grid) -> bool:
    """Whether the direct kernel can run: the taps of a channel fit into a slice, and 32 bits count words."""
    words = x.shape[1] * len(grid.sheets) * _tiling(x, grid).plane_words
    return grid.channel_words <= max(k.slice_words for k in kernels(DTYPES[x.dtype])) and words < 2**30


# What depends on the topology, the geometry and the images' width -----------------------------------------------


class _Walk(NamedTuple):
    gather: Tensor | None  # int64 [nnz]: the order of the values; None: as they lie
    offsets: Tensor  # uint16 (as int16) [nnz + 8]: words in a slice
    starts: Tensor  # int32 [rows * slices + 1]
    slices: int
    channels: int  # of a slice


def _walk(w: Rows, g: Geometry, backward: bool, taps: tuple[int, ...], words: int, channels: int) -> _Walk:
    """The nonzeros by rows and slices of `channels` channels; transposed, a row is (group, phase, channel)."""
    (n, k), crow, col = w.shape, w.crow, w.col
    group_channels, group_rows = k // g.taps, n // g.groups
    slices = -(-(group_rows if backward else group_channels) // channels)
    rows = g.groups * g.stride_h * g.stride_w * group_channels if backward else n

    def make() -> _Walk:
        row, column = _row_of(n, crow, col), col.long()
        if g.order == 0:
            channel, tap = column // g.taps, column % g.taps
        else:
            channel, tap = column % group_channels, column // group_channels
        if backward:
            a, b = tap // g.kernel_w * g.dilation_h % g.stride_h, tap % g.kernel_w * g.dilation_w % g.stride_w
            phase = row // group_rows * g.stride_h * g.stride_w + a * g.stride_w + b
            row, channel = phase * group_channels + channel, row % group_rows
        key = row * slices + channel // channels
        at = channel % channels * words + torch.tensor(taps, device=col.device)[tap]
        gather = None
        if backward or (g.order == 1 and slices > 1):
            gather = key.argsort(stable=True)
            at = at[gather]
        counts = torch.bincount(key, minlength=rows * slices)
        starts = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return _Walk(gather, padded_offsets(low_bits(at)), starts, slices, channels)

    return _recent(col, (n, k, g, backward, taps, words, channels), make)


WALKS = 8  # of a weight: images of so many sizes in turn cost nothing


class _Walks(NamedTuple):
    """Those used last, the latest at the end; and those that a captured CUDA graph may read, for ever."""

    recent: OrderedDict[Any, _Walk]
    captured: dict[Any, _Walk]


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _recent(col: Tensor, key: Any, make: Callable[[], _Walk]) -> _Walk:
    """`make()`, remembered beside `col` with the other WALKS - 1 that were used last."""
    recent, captured = plan(col, "conv2d.walks", lambda: _Walks(OrderedDict(), {}))
    found = captured.get(key) or recent.pop(key, None) or make()
    if _capturing(col):
        captured[key] = found
    elif key not in captured:
        recent[key] = found
        if len(recent) > WALKS:
            recent.popitem(last=False)
    return found


def _order(w: Rows, g: Geometry, backward: bool, walk: _Walk, kernel: Kernel) -> Tensor:
    """int32 [groups * blocks, rows_per, warps]: which row a warp takes; a block's rows are of one group."""
    rows = (walk.starts.shape[0] - 1) // walk.slices
    group_rows = rows // g.groups
    blocks = -(-group_rows // kernel.rows)

    def make() -> Tensor:
        lengths = walk.starts[:: walk.slices].diff().view(g.groups, group_rows)
        lengths = functional.pad(lengths, (0, blocks * kernel.rows - group_rows), value=-1).view(-1, kernel.rows)
        block = torch.arange(g.groups * blocks, device=lengths.device)
        first = block // blocks * group_rows + block % blocks * kernel.rows
        return deal(lengths, first, kernel.rows_per, kernel.warps // 4)

    return plan(w.col, ("conv2d.order", w.shape, g, backward, kernel.rows), make)


def _items(w: Rows, g: Geometry, backward: bool, walk: _Walk, kernel: Kernel, tiles: int, workers: int) -> Items:
    """The work list: blocks of rows, cut along their channels where there are too few for the machine."""
    rows = (walk.starts.shape[0] - 1) // walk.slices
    group_rows = rows // g.groups
    blocks = -(-group_rows // kernel.rows)
    # Blocks that each tile of positions should make, in powers of two: one list serves many image sizes.
    wanted = 1 << max(0, (-(-2 * workers // tiles) - 1).bit_length())

    def make() -> Items:
        counts = walk.starts.diff().view(g.groups, group_rows, walk.slices)
        counts = functional.pad(counts, (0, 0, 0, blocks * kernel.rows - group_rows))
        counts = counts.reshape(g.groups * blocks, kernel.rows, walk.slices)
        cost = torch.maximum(counts.sum(1), _STEP * counts.amax(1))
        cost = torch.where(cost > 0, cost + _FILL, 0).cpu()
        return cut(cost, max(1.0, cost.sum().item() / wanted), w.col.device)

    return plan(w.col, ("conv2d.items", w.shape, g, backward, walk.channels, kernel.rows, wanted), make)


@cache
def _table(device: torch.device, *rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _maps(grid: Grid, y: Tensor) -> Tensor:
    """int32 [windows, 8] (csrc/csr/conv.cuh)."""
    down, right = y.stride(2), y.stride(3)
    ends = (grid.out_step[0] * down, grid.out_step[1] * right, 0)
    return _table(y.device, *((*w[:4], w[4] * down + w[5] * right, *ends) for w in grid.windows))


# The launch -----------------------------------------------------------------------------------------------------


def _run(
    w: Rows,
    g: Geometry,
    grid: Grid,
    backward: bool,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: int,
) -> None:
    """One product over the planes of x, written to y."""
    if y.numel() == 0:
        return
    module, dtype, workers, stream = cuda(), DTYPES[x.dtype], multiprocessors(x.device), stream_of(x)
    group_rows = y.shape[1] // g.groups * len(grid.windows)
    group_channels = x.shape[1] // g.groups
    tiling = _tiling(x, grid)
    tiles = tiling.units * tiling.tiles
    number, kernel = _choice(grid, kernels(dtype), g.groups, group_rows, tiles, workers)
    channels = min(group_channels, kernel.slice_words // grid.channel_words)
    walk = _walk(w, g, backward, grid.taps, grid.channel_words, channels)
    items = _items(w, g, backward, walk, kernel, tiles, workers)
    order = _order(w, g, backward, walk, kernel)
    values = aligned(w.values if walk.gather is None else w.values.index_select(0, walk.gather))
    pieces, maps = _table(x.device, *grid.pieces), _maps(grid, y)
    partials, counters = workspace(x, items.slots * tiles * kernel.rows * kernel.positions, items.counters * tiles)

    sheets = 1 if tiling.in_place else len(grid.sheets)
    channel_stride = sheets * tiling.plane_words
    if tiling.in_place or values.shape[0] == 0:  # no nonzero: nothing is read
        planes, words = x.data_ptr(), x.numel() * x.element_size() // 4
    else:
        words = x.shape[1] * channel_stride
        memory = x.new_empty(words + 4, dtype=torch.float32)
        planes = memory.data_ptr() + -memory.data_ptr() % 16
        module.csr_planes(
            dtype,
            x.data_ptr(),
            (*x.shape, *x.stride()),
            planes,
            tiling.plane_words,
            _table(x.device, *((*sheet, 0) for sheet in grid.sheets)).data_ptr(),
            sheets,
            (*grid.step, *grid.pad, grid.pitch, grid.lines),
            stream,
        )
    module.csr_conv(
        number,
        dtype,
        values.data_ptr(),
        values.shape[0],
        walk.offsets.data_ptr(),
        walk.starts.data_ptr(),
        order.data_ptr(),
        items.items.data_ptr(),
        items.items.shape[0],
        (walk.slices, len(grid.pieces), channels, grid.channel_words, group_channels, group_rows,
         -(-group_rows // kernel.rows), y.shape[1] // g.groups),
        planes,
        pieces.data_ptr(),
        maps.data_ptr(),
        (tiling.tiles, tiling.images, tiling.images * grid.lines, x.shape[0], grid.pitch, grid.lines, tiles),
        (tiling.plane_words, channel_stride, x.shape[1] * channel_stride, words, y.stride(0), y.stride(1)),
        y.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        activation,
        partials.data_ptr(),
        counters.data_ptr(),
        stream,
    )  # fmt: skip


def _choice(
    grid: Grid, known: tuple[Kernel, ...], groups: int, group_rows: int, tiles: int, workers: int
) -> tuple[int, Kernel]:
    """The kernel of many rows where there is work enough for it, or where the other's slices are too small."""
    first, second = known
    many = group_rows > 2 * second.rows and groups * -(-group_rows // first.rows) * tiles >= workers
    return (0, first) if many or grid.channel_words > second.slice_words else (1, second)


def _rows(layout: Layout) -> Rows:
    return rows_of_bitmap(layout) if isinstance(layout, bitmap.Bitmap) else layout  # type: ignore[return-value]


def _dense_order(x: Tensor) -> Tensor:
    """x in one of the two dense memory orders."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = (like.shape[0], channels, height, width)
    if channels_last(like):
        return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(size)


def _pixels(x: Tensor) -> Tensor:
    """channels_last images as a matrix of pixels, a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)
