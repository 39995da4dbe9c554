"""Launchers of 2:4 convolution on NVIDIA's sparse tensor cores: the products of csrc/sp24, reading windows in place.

Images are taken channels innermost; others are copied into that order and the result back, which costs reading and
writing both once. K runs (r, s, c), so that a slice of it is a run of channels of shifted pixels: on Hopper the TMA
brings it in its im2col mode where a multiple of 64 channels lies in a group, elsewhere cp.async does, in pieces of
16, 8 or 4 bytes by what divides the channels. A group is a launch of its own on a part of the weight. A 1 x 1 kernel
of stride 1 is the product itself, on a view. The gradients are cuDNN's on the weight written out densely; that of the
weight is then gathered at the stored positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, grad

from ..sp24 import cuda as product
from ..sp24 import fragments, repack
from ..sp24.config import Choice
from ..sp24.layout import Sp24
from .geometry import ORDERS, Geometry, channels_last, matrix_of, memory_format

MOST_PIXELS = 2**30  # of all images: pixels are counted in 32 bits


def why_not(op: str, layout: Sp24, x: Tensor, g: Geometry) -> str | None:
    """Why the CUDA kernels cannot run this convolution, or None where they can."""
    if layout.dtype.itemsize == 1:
        return f"{str(layout.dtype).removeprefix('torch.')} convolution weights are not supported by the CUDA kernels"
    reason = product.why_not({"conv2d": "mm", "conv2d_input": "mm_t"}.get(op, "sddmm"), layout, x)
    if reason is None and op == "conv2d" and not g.pointwise:
        reason = _why_not_windows(layout, x, g)
    return reason


def _why_not_windows(layout: Sp24, x: Tensor, g: Geometry) -> str | None:
    rows, channels = layout.shape[0] // g.groups, layout.shape[1] // g.taps
    if g.taps > 1 and g.order != 1:
        return "a slice of K must be channels of one tap: K must run (r, s, c), order 'rsc'"
    if g.groups > 1 and channels == 1:
        return "a depthwise convolution has nothing to skip"
    if g.groups > 1 and rows % fragments.BLOCK_ROWS:
        return f"a group must be whole blocks of {fragments.BLOCK_ROWS} output channels, these have {rows}"
    if channels % 2 or channels == 0:
        return f"4 bytes must lie inside one tap: the input channels of a group must be even, these are {channels}"
    height, width = g.out_size(*x.shape[2:])
    if x.shape[0] * max(height * width, x.shape[2] * x.shape[3]) >= MOST_PIXELS:
        return f"{MOST_PIXELS} pixels or more are not supported by the CUDA kernels"
    return None


def conv2d(
    layout: Sp24, x: Tensor, bias: Tensor | None, g: Geometry, activation: str, how: Choice | None = None
) -> Tensor:
    """y = act(conv(x, W) + bias): x [B, C, H, W] -> [B, O, H', W'] in x's memory order.

    how: instead of the heuristic's choice, of which each group takes the same.
    """
    last = channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last)
    size = g.out_size(*x.shape[2:])
    if g.pointwise:
        rows = product.mm(layout, _rows(x), bias, activation, how=how)
    else:
        rows = x.new_empty((x.shape[0] * size[0] * size[1], layout.shape[0]))
        if rows.numel():
            _windows(layout, x, size, rows, bias, g, activation, how)
    y = _as_images(rows, x.shape[0], *size)
    return y if last else y.contiguous()


def _windows(
    layout: Sp24,
    x: Tensor,
    size: tuple[int, int],
    y: Tensor,
    bias: Tensor | None,
    g: Geometry,
    activation: str,
    how: Choice | None,
) -> None:
    """Into y [B H' W', O] from channels_last images: a launch for each group."""
    if x.data_ptr() % 4:
        x = x.clone()
    count, channels, height, width = x.shape
    own, rows = channels // g.groups, layout.shape[0] // g.groups
    images = (
        height, width, own, *size, g.kernel_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.top, g.left,
    )  # fmt: skip
    weight, tma = product.packed(layout), _tma_reads(x, g, size)
    blocks = -(-rows // fragments.BLOCK_ROWS)
    for i in range(g.groups):
        part = x.as_strided((count * height * width, own), (channels, 1), x.storage_offset() + i * own)
        outs = slice(i * rows, (i + 1) * rows)
        fragment = weight[i * blocks : (i + 1) * blocks]
        beside = None if bias is None else bias[outs]
        product.windows(fragment, layout.shape[1], part, images, y[:, outs], beside, activation, tma, how)


def _tma_reads(x: Tensor, g: Geometry, size: tuple[int, int]) -> bool:
    """Whether every block of K lies in one tap, and the windows are as a map of images can say (launch.h)."""
    height, width = x.shape[2:]
    lower = (-g.top, -g.left)
    upper = (
        (size[0] - 1) * g.stride_h - g.top - (height - 1),
        (size[1] - 1) * g.stride_w - g.left - (width - 1),
    )
    reach = max(g.dilation_h * (g.kernel_h - 1), g.dilation_w * (g.kernel_w - 1))
    return (
        x.shape[1] // g.groups % fragments.block_k(x.dtype) == 0
        and x.data_ptr() % 16 == 0
        and max(g.stride_h, g.stride_w) <= 8
        and reach <= 255
        and all(-128 <= corner <= 127 for corner in (*lower, *upper))
    )


def conv2d_input(layout: Sp24, dy: Tensor, g: Geometry, height: int, width: int) -> Tensor:
    """dx, of the given height and width, from dy, in dy's memory order."""
    order, dy = memory_format(dy), dy.contiguous(memory_format=torch.channels_last)
    if g.pointwise:
        dx = _as_images(product.mm_t(layout, _rows(dy)), dy.shape[0], height, width)
    else:
        steps, edges = _steps(g)
        channels = layout.shape[1] // g.taps * g.groups
        size = (dy.shape[0], channels, height + edges[2] + edges[3], width + edges[0] + edges[1])
        dx = grad.conv2d_input(size, _dense(layout, g), dy, **steps)
        dx = dx[:, :, edges[2] : edges[2] + height, edges[0] : edges[0] + width]
    return dx.contiguous(memory_format=order)


def conv2d_weight(layout: Sp24, dy: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """dW at the stored positions, like layout.values."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    if g.pointwise:
        return product.sddmm(layout, _rows(dy), _rows(x))
    steps, edges = _steps(g)
    padded = functional.pad(x, edges) if any(edges) else x
    size = (layout.shape[0], layout.shape[1] // g.taps, g.kernel_h, g.kernel_w)
    dense = grad.conv2d_weight(padded, size, dy, **steps)
    dvalues = layout.values.new_empty(layout.values.shape)
    repack.sample(layout.metadata, matrix_of(dense, ORDERS[g.order]), dvalues)
    return dvalues


def _dense(layout: Sp24, g: Geometry) -> Tensor:
    """The weight [O, C / groups, kh, kw] written out, a view of W[O, K]: channels_last where K runs (r, s, c)."""
    dense, channels = repack.unpack(layout), layout.shape[1] // g.taps
    if g.order == 1:
        return dense.view(-1, g.kernel_h, g.kernel_w, channels).permute(0, 3, 1, 2)
    return dense.view(-1, channels, g.kernel_h, g.kernel_w)


def _steps(g: Geometry) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """torch's arguments, and what a padding that differs from side to side has more: left, right, top, bottom."""
    h, w = min(g.top, g.bottom), min(g.left, g.right)
    steps = {
        "stride": (g.stride_h, g.stride_w),
        "padding": (h, w),
        "dilation": (g.dilation_h, g.dilation_w),
        "groups": g.groups,
    }
    return steps, (g.left - w, g.right - w, g.top - h, g.bottom - h)


def _rows(x: Tensor) -> Tensor:
    """channels_last images as a matrix of pixels, a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_images(rows: Tensor, count: int, height: int, width: int) -> Tensor:
    return rows.view(count, height, width, rows.shape[1]).permute(0, 3, 1, 2)
