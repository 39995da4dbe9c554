"""sp24 on the compiled CPU kernels (csrc/sp24)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ext import ACTIVATIONS, DTYPES, host, why_not_host
from .layout import Sp24


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why the host kernels cannot run `op` on this layout and x, or None where they can."""
    if layout.values.dtype not in DTYPES:
        return f"{str(layout.values.dtype).removeprefix('torch.')} is not supported by the host kernels"
    if x.dtype not in DTYPES:
        return f"activations of {str(x.dtype).removeprefix('torch.')} are not supported by the host kernels"
    if layout.values.dtype == torch.int8 and op != "mm":
        return "int8 values have no host kernel but mm"
    if op != "mm":
        return f"{op} is not built yet"
    return why_not_host()


def _rows(x: Tensor) -> Tensor:
    """x with unit stride along its rows; the rows themselves may lie any distance apart."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def mm(layout: Sp24, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Y = act(X W^T * scale + bias): x [M, K] -> [M, N]."""
    n, k = layout.shape
    m = x.shape[0]
    values, scale = layout.values, layout.scale
    x = _rows(x)
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
