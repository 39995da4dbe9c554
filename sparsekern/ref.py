"""The oracle: the three products of any layout in plain torch.

Slow and obvious. It reads a layout only through `unpack` and `sample`, so one text serves every format; float64
runs in float64, everything else accumulates in float32 and is rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import QUANTISED, Layout

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def why_not(op: str, layout: Layout, x: Tensor) -> str | None:
    """The oracle runs everything."""
    return None


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float32)


def _weight(layout: Layout) -> Tensor:
    dense = _wide(layout.unpack())
    return dense if layout.scale is None else dense * layout.scale[:, None]


ENDINGS = frozenset(
    ("x_scale", "residual", "beta", "out_dtype")
)  # what mm takes beside bias and activation (_ending.py)


def result_dtype(x: Tensor) -> torch.dtype:
    """int8 and float8 activations give float32 outputs, every other type its own."""
    return torch.float32 if x.dtype in QUANTISED else x.dtype


def mm(
    layout: Layout,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = act(x_scale * X W^T + bias) + beta * residual: x [M, K] -> [M, N] in out_dtype."""
    y = _wide(x) @ _weight(layout).t()
    if x_scale is not None:
        y = y * x_scale[:, None]
    if bias is not None:
        y = y + _wide(bias)
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y.add(_wide(residual), alpha=beta)
    return y.to(out_dtype or result_dtype(x))


def mm_t(layout: Layout, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return (_wide(dy) @ _weight(layout)).to(dy.dtype)


def sddmm(layout: Layout, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> like layout.values."""
    return layout.sample(_wide(dy).t() @ _wide(x)).to(layout.dtype)
