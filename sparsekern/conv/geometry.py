"""Where a convolution reads: kernel, stride, padding, dilation, groups, and the order in which K runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ORDERS = ("crs", "rsc")  # csrc/csr/conv.h has the same numbers


class Geometry(NamedTuple):
    """Everything about a convolution but its sizes; integers, so that an op can carry it."""

    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    dilation_h: int = 1
    dilation_w: int = 1
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    groups: int = 1
    order: int = 0

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def pointwise(self) -> bool:
        """True where the convolution is a matrix product over pixels."""
        return self[:4] == (1, 1, 1, 1) and self[6:11] == (0, 0, 0, 0, 1)

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """The output's height and width."""
        reach_h, reach_w = self.dilation_h * (self.kernel_h - 1), self.dilation_w * (self.kernel_w - 1)
        return (
            (height + self.top + self.bottom - reach_h - 1) // self.stride_h + 1,
            (width + self.left + self.right - reach_w - 1) // self.stride_w + 1,
        )


def pair(value: Any, name: str, least: int) -> tuple[int, int]:
    """An int or a pair of ints, as a pair. Raises ValueError with what came instead."""
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(both) == 1:
        both = both * 2
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{name} must be an int or a pair of ints, each >= {least}, got {value!r}")
    return both[0], both[1]


def padding_of(
    padding: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of an int, a pair, "valid" or "same" (stride 1 only; the odd zero last)."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    h, w = pair(padding, "padding", 0)
    return h, h, w, w


def order_number(order: str) -> int:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    return ORDERS.index(order)


def matrix_of(weight: Tensor, order: str) -> Tensor:
    """A weight [O, C, kh, kw] as W[O, K] in a K order."""
    ordered = weight if order_number(order) == 0 else weight.permute(0, 2, 3, 1)
    return ordered.reshape(weight.shape[0], weight.shape[1:].numel())


def weight_of(matrix: Tensor, kernel: tuple[int, int], order: str) -> Tensor:
    """The inverse of matrix_of: W[O, K] as [O, C, kh, kw]."""
    o, k = matrix.shape
    channels = k // (kernel[0] * kernel[1])
    if order_number(order) == 0:
        return matrix.reshape(o, channels, *kernel)
    return matrix.reshape(o, *kernel, channels).permute(0, 3, 1, 2).contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether an image batch lies channels innermost; False where both orders are the same."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if channels_last(x) else torch.contiguous_format
