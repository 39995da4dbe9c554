"""Launchers of block-sparse convolution on NVIDIA GPUs (kernels.py): an implicit product over pixels.

Images are taken channels innermost; others are copied into that order and the result back, which costs reading and
writing both once. K runs (r, s, c) and every block lies inside one tap.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ext import FP8, known_bias, multiprocessors, on_card
from .._plan import overwrite
from ..bsr import triton as product
from ..bsr.config import Config, sides
from ..bsr.layout import Bsr
from ..bsr.work import Work, cut, kept, refill, rows_of, walked_by
from ..layout import Layout
from .geometry import Geometry, channels_last


def why_not(op: str, layout: Layout, x: Tensor, g: Geometry) -> str | None:
    """Why the Triton kernels cannot run this convolution, or None where they can."""
    if not isinstance(layout, Bsr):
        return f"the Triton kernels are of bsr, this weight is {layout.format}"
    if layout.dtype in (torch.int8, FP8):
        return f"{str(layout.dtype).removeprefix('torch.')} convolution weights are not supported by the Triton kernels"
    (o, k), (r, c) = layout.shape, layout.block
    if g.groups > 1 and k == g.taps:
        return f"it is depthwise: of the {g.taps} weights of a channel there is nothing to skip that dense kernels read"
    if g.taps > 1 and g.order != 1:
        return "a block must lie inside one tap: K must run (r, s, c), order 'rsc'"
    if (k // g.taps) % c:
        return f"a block must lie inside one tap: {c} columns do not divide the {k // g.taps} channels of a group"
    if g.groups > 1 and (o // g.groups) % r:
        return f"a block must lie inside one group: {r} rows do not divide its {o // g.groups} channels"
    return product.why_not({"conv2d": "mm", "conv2d_input": "mm_t"}.get(op, "sddmm"), layout, x)


class Walk(NamedTuple):
    """Work, (dh, dw, channel block) of every block walked [nnzb, 3], which block it is (None: in stored order)."""

    work: Work
    shifts: Tensor
    gather: Tensor | None


def conv2d(
    layout: Bsr, x: Tensor, bias: Tensor | None, g: Geometry, activation: str, how: Config | None = None
) -> Tensor:
    """y = act(conv(x, W) + bias): x [B, C, H, W] -> [B, O, H', W'] in x's memory order."""
    last = channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last)
    if g.pointwise:
        y = product.mm(layout, _rows(x), bias, activation, how=how)
        y = y.reshape(x.shape[0], *x.shape[2:], y.shape[1]).permute(0, 3, 1, 2)
    else:
        size = g.out_size(*x.shape[2:])
        y = _empty(x, layout.shape[0], *size)
        how = how or _config("mm", layout, x, x.shape[0] * size[0] * size[1])
        strides, walk = (g.stride_h, g.stride_w), _forward(layout, g, how.most)
        _run("mm", layout, x, y, known_bias(bias), activation, size, strides, (0, 0), (1, 1), walk, how)
    return y if last else y.contiguous()


def conv2d_input(layout: Bsr, dy: Tensor, g: Geometry, height: int, width: int, how: Config | None = None) -> Tensor:
    """dx, of the given height and width, from dy, in dy's memory order: one launch for each phase of the stride."""
    last = channels_last(dy)
    dy = dy.contiguous(memory_format=torch.channels_last)
    if g.pointwise:
        dx = product.mm_t(layout, _rows(dy), how=how)
        dx = dx.reshape(dy.shape[0], *dy.shape[2:], dx.shape[1]).permute(0, 3, 1, 2)
    else:
        dx = _empty(dy, layout.shape[1] // g.taps * g.groups, height, width)
        steps = (g.stride_h, g.stride_w)
        for phase in ((h, w) for h in range(min(steps[0], height)) for w in range(min(steps[1], width))):
            size = (-(-(height - phase[0]) // steps[0]), -(-(width - phase[1]) // steps[1]))
            this = how or _config("mm_t", layout, dy, dy.shape[0] * size[0] * size[1])
            walk = _backward(layout, g, phase, this.most)
            _run("mm_t", layout, dy, dx, None, "none", size, (1, 1), phase, steps, walk, this)
    return dx if last else dx.contiguous()


def conv2d_weight(layout: Bsr, dy: Tensor, x: Tensor, g: Geometry, how: Config | None = None) -> Tensor:
    """dW at the stored blocks, like layout.values."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    if g.pointwise:
        return product.sddmm(layout, _rows(dy), _rows(x), how=how)
    out = layout.values.new_empty(layout.values.shape)
    pixels, blocks, (r, c) = dy.shape[0] * dy.shape[2] * dy.shape[3], out.shape[0], layout.block
    if blocks == 0:
        return out
    if pixels == 0:
        return out.zero_()
    how = how or _config("sddmm", layout, x, pixels)
    share = -(-pixels // (how.parts * how.tokens)) * how.tokens
    parts = -(-pixels // share)
    sums = out if parts == 1 else x.new_empty((parts, *out.shape), dtype=torch.float32)
    with on_card(x):
        _kernels().bsr_conv_sddmm[(blocks, parts)](
            dy, x, sums, rows_of(layout), _forward_shifts(layout, g), pixels, *dy.shape[2:], *x.shape[2:],
            x.shape[1], dy.shape[1], g.stride_h, g.stride_w, share, blocks,
            R=r, C=c, TOKENS=how.tokens, EVEN=dy.shape[1] % r == 0, PRECISION=product.fp32_precision(),
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if parts > 1:
            product.add_parts(sums, out)
    return out


def _run(
    op: str,
    layout: Bsr,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    grid: tuple[int, int],
    strides: tuple[int, int],
    first: tuple[int, int],
    steps: tuple[int, int],
    walk: Walk,
    how: Config,
) -> None:
    """One launch of bsr_conv, and the second pass over rows that were cut."""
    pixels = x.shape[0] * grid[0] * grid[1]
    if pixels == 0 or y.numel() == 0:
        return
    outer, inner = sides(op, layout.block)
    work, tiles, size = walk.work, -(-pixels // how.tokens), y.shape[1]
    partial = torch.empty((work.slots * tiles * how.tokens * outer,), dtype=torch.float32, device=x.device)
    programs = work.items.shape[0] * tiles
    if how.resident:
        programs = min(programs, multiprocessors(x.device) * how.resident)
    places = (*y.shape[2:], *first, *steps)
    ending = {"ACTIVATION": activation, "OUT": outer, "TOKENS": how.tokens}
    with on_card(x):
        _kernels().bsr_conv[(programs,)](
            x, layout.values, y, partial, bias, None, work.items, walk.shifts, walk.gather,
            pixels, *grid, *x.shape[2:], x.shape[1], size, *strides, *places, work.items.shape[0], tiles,
            **ending, IN=inner, DEPTH=how.depth, TRANSPOSED=op == "mm_t", EVEN=x.shape[1] % inner == 0,
            PRECISION=product.fp32_precision(), TYPE=product.triton_type(x.dtype), SPLIT=work.slots > 0,
            GROUP=how.group, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if work.slots:
            rows = max(1, min(how.tokens, 4096 // outer))
            _kernels().bsr_conv_join[(work.splits.shape[0] * -(-pixels // rows),)](
                partial, y, bias, work.splits, pixels, *grid, size, *places, tiles, **ending, ROWS=rows, num_warps=4
            )


# What depends on the topology and the geometry only -----------------------------------------------------------


def _places(layout: Bsr, g: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every stored block: its tap (row, column), its first input channel and its block row; int64 [nnzb]."""
    (o, k), (r, c) = layout.shape, layout.block
    channels, row, column = k // g.taps, layout.block_rows(), layout.col.long() * c
    tap = column // max(channels, 1)
    channel = column % max(channels, 1) + row * r // max(o // g.groups, 1) * channels
    return tap // g.kernel_w, tap % g.kernel_w, channel, row


def _forward_shifts(layout: Bsr, g: Geometry) -> Tensor:
    """(dh, dw, block of input channels) of every stored block, as an output pixel sees it."""

    def make() -> Tensor:
        r, s, channel, _ = _places(layout, g)
        shifts = (r * g.dilation_h - g.top, s * g.dilation_w - g.left, channel // layout.block[1])
        return torch.stack(shifts, 1).int().contiguous()

    return kept(layout, ("conv2d", g), make, lambda old: overwrite(old, make()))


def _forward(layout: Bsr, g: Geometry, most: int) -> Walk:
    return Walk(product.work_list(layout, False, most), _forward_shifts(layout, g), None)


def _backward(layout: Bsr, g: Geometry, phase: tuple[int, int], most: int) -> Walk:
    """For input pixels phase + stride (i, j): the blocks whose tap meets an output pixel, by block of input channels.

    Blocks of other phases are sorted behind the last row, where no item begins.
    """

    def make() -> Walk:
        r, s, channel, row = _places(layout, g)
        rows = layout.shape[1] // g.taps * g.groups // layout.block[1]
        h, w = phase[0] + g.top - r * g.dilation_h, phase[1] + g.left - s * g.dilation_w
        meets = (h % g.stride_h == 0) & (w % g.stride_w == 0)
        key = torch.where(meets, channel // layout.block[1], rows)
        order = torch.argsort(key, stable=True)
        starts = torch.searchsorted(key[order], torch.arange(rows + 1, device=key.device)).int()
        shifts = torch.stack([h // g.stride_h, w // g.stride_w, row], 1)[order].int().contiguous()
        return Walk(cut(starts, layout.values.shape[0], most), shifts, order.int())

    def again(old: Walk) -> None:
        new = make()
        refill(old.work, new.work)
        old.shifts.copy_(new.shifts)
        if old.gather is not None and new.gather is not None:
            old.gather.copy_(new.gather)

    return kept(layout, ("conv2d_input", g, phase, most), make, again)


walked_by("conv2d", _forward_shifts)
walked_by("conv2d_input", _backward)


def _config(op: str, layout: Bsr, x: Tensor, pixels: int) -> Config:
    return replace(product.chosen(op, layout, x, pixels), tma=False)


@cache
def _kernels() -> Any:
    from . import kernels

    return kernels


def _rows(x: Tensor) -> Tensor:
    """channels_last images as a matrix of pixels, a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
