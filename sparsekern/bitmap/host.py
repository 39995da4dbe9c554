"""bitmap on the compiled CPU kernels (csrc/bitmap)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import ACTIVATIONS, DTYPES, host, why_not_host
from .layout import Bitmap


def why_not(op: str, layout: Bitmap, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype != layout.values.dtype:
        return f"activations of {str(x.dtype).removeprefix('torch.')} need values of the same type"
    if op != "mm":
        return f"{op} is not built yet"
    return why_not_host()


def _rows(x: Tensor) -> Tensor:
    """x with unit stride along its rows; the rows themselves may lie any distance apart."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def mm(layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T + bias): x [M, K] -> [M, N]."""
    n, k = layout.shape
    m = x.shape[0]
    x = _rows(x)
    y = x.new_empty((m, n))
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    host().bitmap_mm(
        layout.values.data_ptr(),
        layout.bits.data_ptr(),
        layout.offsets.data_ptr(),
        DTYPES[layout.values.dtype],
        n,
        k,
        x.data_ptr(),
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y
