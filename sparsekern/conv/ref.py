"""The oracle: the three products of a convolution in plain torch, for any layout.

Slow and obvious: it unpacks the weight and calls torch's dense convolution. float64 runs in float64,
everything else accumulates in float32 and is rounded once at the end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional, grad

from ..layout import Layout
from ..ref import ACTIVATIONS, _weight, _wide
from .geometry import ORDERS, Geometry, matrix_of, memory_format, weight_of


def why_not(op: str, layout: Layout, x: Tensor, g: Geometry) -> str | None:
    """The oracle runs everything."""
    return None


def _dense(layout: Layout, g: Geometry) -> Tensor:
    return weight_of(_weight(layout), (g.kernel_h, g.kernel_w), ORDERS[g.order])


def _steps(g: Geometry) -> dict[str, Any]:
    return {
        "stride": (g.stride_h, g.stride_w),
        "dilation": (g.dilation_h, g.dilation_w),
        "groups": g.groups,
    }


def _padded(x: Tensor, g: Geometry) -> Tensor:
    return functional.pad(_wide(x), (g.left, g.right, g.top, g.bottom))


def conv2d(layout: Layout, x: Tensor, bias: Tensor | None, g: Geometry, activation: str) -> Tensor:
    """y = act(conv(x, W) + bias): x [B, C, H, W] -> [B, O, H', W']."""
    y = functional.conv2d(_padded(x, g), _dense(layout, g), None if bias is None else _wide(bias), **_steps(g))
    return ACTIVATIONS[activation](y).to(x.dtype).contiguous(memory_format=memory_format(x))


def conv2d_input(layout: Layout, dy: Tensor, g: Geometry, height: int, width: int) -> Tensor:
    """dx, of the given height and width, from dy."""
    weight = _dense(layout, g)
    size = (dy.shape[0], weight.shape[1] * g.groups, height + g.top + g.bottom, width + g.left + g.right)
    dx = grad.conv2d_input(size, weight, _wide(dy), **_steps(g))
    dx = dx[:, :, g.top : g.top + height, g.left : g.left + width]
    return dx.to(dy.dtype).contiguous(memory_format=memory_format(dy))


def conv2d_weight(layout: Layout, dy: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """dW at the stored positions, like layout.values."""
    o, k = layout.shape
    size = (o, k // g.taps, g.kernel_h, g.kernel_w)
    dense = grad.conv2d_weight(_padded(x, g), size, _wide(dy), **_steps(g))
    return layout.sample(matrix_of(dense, ORDERS[g.order])).to(layout.dtype)
