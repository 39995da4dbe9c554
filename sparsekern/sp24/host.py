"""sp24 on the compiled CPU kernels (csrc/sp24)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _rows
from .._ext import ACTIVATIONS, DTYPES, host, why_not_host
from .._plan import plan
from .layout import Sp24, padded


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype not in DTYPES:
        return f"activations of {str(x.dtype).removeprefix('torch.')} are not supported by the host kernels"
    if layout.values.dtype == torch.int8 and op != "mm":
        return "int8 values have no host kernel but mm"
    if op != "mm" and layout.values.numel() >= 2**31:
        return f"{op} counts stored values in 32 bits, and there are {layout.values.numel()}"
    return why_not_host()


def mm(layout: Sp24, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T * scale + bias): x [M, K] -> [M, N]."""
    n, k = layout.shape
    m = x.shape[0]
    values, scale = layout.values, layout.scale
    x = _rows.unit_stride(x)
    y = x.new_empty((m, n), dtype=torch.float32 if x.dtype == torch.int8 else x.dtype)
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    host().sp24_mm(
        values.data_ptr(),
        layout.meta.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        DTYPES[values.dtype],
        n,
        k,
        x.data_ptr(),
        DTYPES[x.dtype],
        m,
        x.stride(0),
        y.data_ptr(),
        DTYPES[y.dtype],
        n,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _topology(layout: Sp24) -> _rows.Rows:
    """Where each stored value belongs, with K padded to whole bytes of meta."""
    meta, n, kp = layout.meta, layout.shape[0], padded(layout.shape[1])

    def make() -> _rows.Rows:
        col = torch.empty(n * kp // 2, dtype=torch.int32)
        host().sp24_columns(meta.data_ptr(), n, kp, col.data_ptr(), torch.get_num_threads())
        crow = torch.arange(0, n * kp // 2 + 1, kp // 2, dtype=torch.int32) if kp else torch.zeros(n + 1, dtype=torch.int32)
        return _rows.Rows(crow, col, (n, kp))

    rows: _rows.Rows = plan(meta, ("sp24.rows", n, kp), make)
    return rows


def mm_t(layout: Sp24, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    k = layout.shape[1]
    dx = _rows.mm_t(_topology(layout), layout.values, dy)
    return dx if dx.shape[1] == k else dx[:, :k].contiguous()


def sddmm(layout: Sp24, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [N, Kp / 2], zero where padded."""
    k = layout.shape[1]
    dvalues = layout.values.new_empty(layout.values.shape)
    if padded(k) != k:
        x = torch.nn.functional.pad(x, (0, padded(k) - k))
    _rows.sddmm(_topology(layout), dvalues, dy, x)
    return dvalues
