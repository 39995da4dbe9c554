"""Launchers of the compiled CPU convolution: any format as a stream of stored values (csrc/csr/conv.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from .. import _ext
from .._ext import ACTIVATIONS, DTYPES
from .._plan import plan
from ..bitmap import Bitmap
from ..bsr import Bsr
from ..csr import Csr
from ..formats import backend_module
from ..layout import Layout
from ..sp24 import Sp24
from .geometry import Geometry, channels_last

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, layout: Layout, x: Tensor, g: Geometry) -> str | None:
    """Why the compiled kernels cannot run this convolution, or None where they can."""
    reason = _ext.why_not_host()
    if reason is not None:
        return reason
    if not x.is_cpu:
        return f"the compiled CPU kernels take CPU tensors, x is on {x.device}"
    if x.dtype not in _TYPES:
        return f"{str(x.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if layout.dtype not in _TYPES:
        return f"{str(layout.dtype).removeprefix('torch.')} convolution weights are not supported by the host kernels"
    if layout.values.numel() >= 2**31:
        return "more than 2^31 stored values are not supported by the host kernels"
    return None


@dataclass(frozen=True)
class Stream:
    """The stored values of W row by row: row starts, each value's column, its place in `values`."""

    crow: Tensor  # int32 [N + 1]
    col: Tensor  # int32
    gather: Tensor | None  # int32; None: the i-th value of the stream is values[i]
    columns: int  # at least K; columns beyond K hold zeros


@dataclass(frozen=True)
class Tiled:
    """A stream cut in tiles of columns, as kernels read it (csrc/csr/conv.h): rows, or blocks of rows."""

    stream: Stream
    stored: int
    rows: int
    tile: int
    segment: Tensor | None = None
    blocks: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def arguments(self, values: Tensor) -> tuple[int, ...]:
        return (values.data_ptr(), DTYPES[values.dtype], values.numel(), *self._index)

    @cached_property
    def _index(self) -> tuple[int, ...]:
        s = self.stream
        gather = 0 if s.gather is None else s.gather.data_ptr()
        segment = 0 if self.segment is None else self.segment.data_ptr()
        blocks: tuple[int, ...] = (0, 0, 0, 0, 0)
        if self.blocks is not None:
            blocks = (*(t.data_ptr() for t in self.blocks), self.blocks[3].dtype == torch.uint8)
        return (gather, s.col.data_ptr(), segment, *blocks, self.rows, s.columns, self.stored, self.tile)


def _topology(layout: Layout) -> Tensor:
    """The tensor whose life and version the derived data follow."""
    return getattr(layout, "bits" if isinstance(layout, Bitmap) else layout.index_fields[-1])


def stream_of(layout: Layout) -> Stream:
    """Any layout as a stream, from its topology alone."""
    n, k = layout.shape
    if isinstance(layout, Csr):
        return Stream(layout.crow, layout.col, None, k)
    if isinstance(layout, Sp24):
        stored = layout.values.shape[1]
        crow = torch.arange(0, n * stored + 1, max(stored, 1), dtype=torch.int32, device="cpu")
        return Stream(
            crow if stored else torch.zeros(n + 1, dtype=torch.int32, device="cpu"),
            _flat(layout.columns()),
            None,
            2 * stored,
        )
    if isinstance(layout, Bitmap):
        return Stream(layout.offsets.to(torch.int32), _flat(layout.mask().nonzero()[:, 1]), None, k)
    if isinstance(layout, Bsr):
        return _stream_of_blocks(layout)
    raise TypeError(f"no stream of {type(layout).__name__}")


def _stream_of_blocks(layout: Bsr) -> Stream:
    """Blocks element by element, padding at ragged edges left out; sorted by row, then column."""
    (n, k), (r, c) = layout.shape, layout.block
    place = torch.arange(layout.values.numel(), device="cpu").reshape(-1, r, c)
    row = (layout.block_rows()[:, None, None] * r + torch.arange(r, device="cpu")[:, None]).expand_as(place)
    col = (layout.col.long()[:, None, None] * c + torch.arange(c, device="cpu")).expand_as(place)
    inside = ((row < n) & (col < k)).flatten()
    row, col, place = (t.reshape(-1)[inside] for t in (row, col, place))
    order = torch.argsort(row, stable=True)  # blocks ascend inside a block row, so columns stay ascending
    crow = torch.zeros(n + 1, dtype=torch.int32, device="cpu")
    torch.cumsum(torch.bincount(row, minlength=n), 0, out=crow[1:])
    return Stream(crow, _flat(col[order]), _flat(place[order]), k)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1).to(torch.int32)


def _count(stream: Stream, tile: int) -> int:
    """How many tiles there are; tile 0 is everything in one, unpacked."""
    return max(1, -(-stream.columns // tile)) if tile else 1


def _by_rows(stream: Stream, rows: int, tile: int) -> Tiled:
    tiles = _count(stream, tile)
    segment = torch.empty((tiles + 1) * rows, dtype=torch.int32, device="cpu")
    width = tile or max(stream.columns, 1)
    crow, col = stream.crow.data_ptr(), stream.col.data_ptr()
    _ext.host().conv_segments(crow, col, rows, width, tiles, segment.data_ptr())
    return Tiled(stream, stream.col.numel(), rows, tile, segment)


def _by_blocks(stream: Stream, rows: int, groups: int, tile: int) -> Tiled:
    if tile == 0:
        return _by_rows(stream, rows, tile)
    tiles = _count(stream, tile)
    blocks = tiles * groups * -(-rows // groups // 4)
    counts = torch.empty(blocks * 16, dtype=torch.int16, device="cpu")
    base, start = (torch.empty(blocks * each, dtype=torch.int32, device="cpu") for each in (4, 1))
    kind = torch.uint8 if stream.gather is None else torch.int32
    entries = torch.empty(2 * stream.col.numel(), dtype=kind, device="cpu")
    written = _ext.host().conv_blocks(
        stream.crow.data_ptr(), stream.col.data_ptr(),
        0 if stream.gather is None else stream.gather.data_ptr(),
        rows, groups, tile, tiles, counts.data_ptr(), base.data_ptr(), start.data_ptr(), entries.data_ptr(),
    )  # fmt: skip
    empty = stream.col.new_empty(0)  # the blocks say all that the stream does; let it go
    bare, stored = Stream(empty, empty, None, stream.columns), stream.col.numel()
    return Tiled(bare, stored, rows, tile, None, (counts, base, start, entries[:written].clone()))


def _tile(layout: Layout, rows: int, k: int, groups: int, pixels: int) -> int:
    columns = 2 * layout.values.shape[1] if isinstance(layout, Sp24) and k == layout.shape[1] else k
    return _ext.host().conv_tile(rows // groups, columns, k, layout.values.numel() // groups, pixels)


def _forward_plan(layout: Layout, g: Geometry, pixels: int) -> Tiled:
    n, k = layout.shape
    tile = _tile(layout, n, k, g.groups, pixels)
    key = ("conv2d", layout.dims, g.groups, tile)
    return plan(_topology(layout), key, lambda: _by_blocks(stream_of(layout), n, g.groups, tile))


def _weight_plan(layout: Layout, g: Geometry, pixels: int) -> Tiled:
    n, k = layout.shape
    tile = _tile(layout, n, k, g.groups, pixels)
    return plan(_topology(layout), ("conv2d_weight", layout.dims, tile), lambda: _by_rows(stream_of(layout), n, tile))


def _input_plan(layout: Layout, g: Geometry, pixels: int) -> Tiled:
    """The transposed stream; it depends on which taps meet which phase of the stride."""
    n, k = layout.shape
    channels, columns = k // g.taps * g.groups, n // g.groups * g.taps
    rows = channels * g.stride_h * g.stride_w
    tile = _tile(layout, rows, columns, g.groups, pixels)

    def make() -> Tiled:
        stream = stream_of(layout)
        crow = torch.empty(rows + 1, dtype=torch.int32, device="cpu")
        col, gather = torch.empty_like(stream.col), torch.empty_like(stream.col)
        stored = _ext.host().conv_transpose(
            _geometry(g), channels, stream.crow.data_ptr(), stream.col.data_ptr(),
            0 if stream.gather is None else stream.gather.data_ptr(), n,
            crow.data_ptr(), col.data_ptr(), gather.data_ptr(),
        )  # fmt: skip
        return _by_blocks(Stream(crow, col[:stored].clone(), gather[:stored].clone(), columns), rows, g.groups, tile)

    return plan(_topology(layout), ("conv2d_input", layout.dims, g[:6], g.groups, g.order, tile), make)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _geometry(g: Geometry) -> tuple[int, ...]:
    return (*g[:6], g.top, g.left, g.groups, g.order)


def _image(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), DTYPES[x.dtype], *x.shape, *x.stride())


def _dense(x: Tensor) -> Tensor:
    """x in one of the two dense memory orders."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if channels_last(like):
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape)


def _product(op: str, layout: Layout, x: Tensor, g: Geometry) -> ModuleType | None:
    """The format's own kernels, where pixels are the rows of a matrix and those can run it."""
    if not (g.pointwise and channels_last(x)):
        return None
    module = backend_module(layout.format, "host")
    return module if module.why_not(op, layout, x) is None else None


def _rows(x: Tensor) -> Tensor:
    """channels_last images as a matrix of pixels, a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def conv2d(layout: Layout, x: Tensor, bias: Tensor | None, g: Geometry, activation: str) -> Tensor:
    """y = act(conv(x, W) + bias): x [B, C, H, W] -> [B, O, H', W'] in x's memory order."""
    x = _dense(x)
    product = _product("mm", layout, x, g)
    if product is not None:
        return _as_images(product.mm(layout, _rows(x), bias, activation), x)
    y = _empty((x.shape[0], layout.shape[0], *g.out_size(*x.shape[2:])), x)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    _ext.host().conv_forward(
        _geometry(g), _image(x), _image(y), _forward_plan(layout, g, _pixels(y)).arguments(layout.values),
        0 if bias is None else bias.data_ptr(), ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    return y


def conv2d_input(layout: Layout, dy: Tensor, g: Geometry, height: int, width: int) -> Tensor:
    """dx, of the given height and width, from dy, in dy's memory order."""
    dy = _dense(dy)
    product = _product("mm_t", layout, dy, g)
    if product is not None:
        return _as_images(product.mm_t(layout, _rows(dy)), dy)
    dx = _empty((dy.shape[0], layout.shape[1] // g.taps * g.groups, height, width), dy)
    weight = _input_plan(layout, g, _pixels(dy)).arguments(layout.values)
    _ext.host().conv_backward_input(_geometry(g), _image(dy), _image(dx), weight, torch.get_num_threads())
    return dx


def conv2d_weight(layout: Layout, dy: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """dW at the stored positions, like layout.values."""
    dy, x = _dense(dy), _dense(x)
    product = _product("sddmm", layout, x, g)
    if product is not None and channels_last(dy):
        return product.sddmm(layout, _rows(dy), _rows(x))
    tiled = _weight_plan(layout, g, _pixels(dy))
    # Padding that no stream place stands for stays zero.
    whole = tiled.stored == layout.values.numel()
    dvalues = layout.values.new_empty(layout.values.shape) if whole else torch.zeros_like(layout.values)
    _ext.host().conv_backward_weight(
        _geometry(g), _image(dy), _image(x), tiled.arguments(layout.values), dvalues.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return dvalues
