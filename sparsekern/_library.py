"""The one place that talks to torch.library: three ops per format, their fakes, and the autograd around them.

Every format takes the same shape of arguments (`layout.Operand`), so ops are made from the format's name:
`sparsekern::sp24_mm`, `sparsekern::csr_sddmm` and so on. Autograd is a Function outside the op, because that costs
a third of an autograd kernel inside it; the gradient of each product is made of the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose
from .formats import FORMATS, layout_of
from .layout import Operand
from .ref import out_dtype

_library = torch.library.Library("sparsekern", "DEF")
_WEIGHT = "Tensor values, Tensor[] index, Tensor? scale, int[] dims"


def _layout(format: str, values: Tensor, index: Sequence[Tensor], scale: Tensor | None, dims: Sequence[int]) -> Any:
    return layout_of(Operand(format, values, tuple(index), scale, tuple(dims)))


def _define(name: str, schema: str, impl: Any, fake: Any) -> Any:
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_library)
    return getattr(torch.ops.sparsekern, name).default


def _define_mm(format: str) -> Any:
    def mm(values, index, scale, dims, x, bias, activation, backend):
        layout = _layout(format, values, index, scale, dims)
        return choose("mm", layout, x, backend).mm(layout, x, bias, activation)

    def fake(values, index, scale, dims, x, bias, activation, backend):
        return x.new_empty((x.shape[0], dims[0]), dtype=out_dtype(x))

    schema = f"({_WEIGHT}, Tensor x, Tensor? bias, str activation, str? backend) -> Tensor"
    return _define(f"{format}_mm", schema, mm, fake)


def _define_mm_t(format: str) -> Any:
    def mm_t(values, index, scale, dims, dy, backend):
        layout = _layout(format, values, index, scale, dims)
        return choose("mm_t", layout, dy, backend).mm_t(layout, dy)

    def fake(values, index, scale, dims, dy, backend):
        return dy.new_empty((dy.shape[0], dims[1]))

    return _define(f"{format}_mm_t", f"({_WEIGHT}, Tensor dy, str? backend) -> Tensor", mm_t, fake)


def _define_sddmm(format: str) -> Any:
    def sddmm(values, index, scale, dims, dy, x, backend):
        layout = _layout(format, values, index, scale, dims)
        return choose("sddmm", layout, x, backend).sddmm(layout, dy, x)

    def fake(values, index, scale, dims, dy, x, backend):
        return values.new_empty(values.shape)

    return _define(f"{format}_sddmm", f"({_WEIGHT}, Tensor dy, Tensor x, str? backend) -> Tensor", sddmm, fake)


MM = {name: _define_mm(name) for name in FORMATS}
MM_T = {name: _define_mm_t(name) for name in FORMATS}
SDDMM = {name: _define_sddmm(name) for name in FORMATS}


class SparseMM(torch.autograd.Function):
    """Y = X W^T + bias; dX = dY W; dW = dY^T X at the stored positions; dbias = the column sums of dY."""

    @staticmethod
    def forward(ctx, values, x, bias, scale, format, dims, backend, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return MM[format](values, index, scale, dims, x, bias, "none", backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, backend = ctx.call
        need_values, need_x, need_bias = ctx.needs_input_grad[:3]
        dvalues = SDDMM[format](values, index, scale, dims, dy, x, backend) if need_values else None
        dx = MM_T[format](values, index, scale, dims, dy, backend) if need_x else None
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype) if need_bias else None
        return dvalues, dx, dbias, None, None, None, None, *(None for _ in index)


class SparseMMT(torch.autograd.Function):
    """Y = X W; dX = dY W^T; dW = X^T dY at the stored positions."""

    @staticmethod
    def forward(ctx, values, x, scale, format, dims, backend, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, backend)
        return MM_T[format](values, index, scale, dims, x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, backend = ctx.call
        need_values, need_x = ctx.needs_input_grad[:2]
        dvalues = SDDMM[format](values, index, scale, dims, x, dy, backend) if need_values else None
        dx = MM[format](values, index, scale, dims, dy, None, "none", backend) if need_x else None
        return dvalues, dx, None, None, None, None, *(None for _ in index)
