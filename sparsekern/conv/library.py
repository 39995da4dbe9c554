"""The convolution's ops: three per format, as in `_library`; the geometry goes as integers."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import _WEIGHT, _define, _layout
from ..dispatch import BACKENDS
from ..formats import FORMATS
from ..layout import Layout, Operand
from ..ref import ACTIVATIONS
from . import host, ref
from .geometry import Geometry, memory_format

_MODULES = {"host": host, "ref": ref}
_BACKENDS = {"cpu": ("host",)}  # device type -> backends beside the oracle, fastest first


def why_not(backend: str, op: str, layout: Layout, x: Tensor) -> str | None:
    """Why `backend` cannot run this convolution, or None where it can."""
    if backend not in BACKENDS:
        return f"there is no backend of this name; known: {', '.join(BACKENDS)}"
    if backend not in (*_BACKENDS.get(x.device.type, ()), "ref"):
        return f"convolution has no such backend on {x.device.type} tensors"
    return _MODULES[backend].why_not(op, layout, x)


def choose(op: str, layout: Layout, x: Tensor, backend: str | None) -> ModuleType:
    """The module that runs `op`; an explicit backend runs or raises with its reason."""
    if backend:
        reason = why_not(backend, op, layout, x)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} cannot run {layout.format}_{op}: {reason}")
        return _MODULES[backend]
    for name in _BACKENDS.get(x.device.type, ()):
        if _MODULES[name].why_not(op, layout, x) is None:
            return _MODULES[name]
    return ref


def _define_conv2d(format: str):
    def conv2d(values, index, scale, dims, x, bias, geometry, activation, backend):
        layout, g = _layout(format, values, index, scale, dims), Geometry(*geometry)
        return choose("conv2d", layout, x, backend).conv2d(layout, x, bias, g, activation)

    def fake(values, index, scale, dims, x, bias, geometry, activation, backend):
        size = (x.shape[0], dims[0], *Geometry(*geometry).out_size(x.shape[2], x.shape[3]))
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))

    schema = f"({_WEIGHT}, Tensor x, Tensor? bias, int[] geometry, str activation, str? backend) -> Tensor"
    return _define(f"{format}_conv2d", schema, conv2d, fake)


def _define_conv2d_input(format: str):
    def conv2d_input(values, index, scale, dims, dy, geometry, height, width, backend):
        layout, g = _layout(format, values, index, scale, dims), Geometry(*geometry)
        return choose("conv2d_input", layout, dy, backend).conv2d_input(layout, dy, g, height, width)

    def fake(values, index, scale, dims, dy, geometry, height, width, backend):
        g = Geometry(*geometry)
        size = (dy.shape[0], dims[1] // g.taps * g.groups, height, width)
        return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=memory_format(dy))

    schema = f"({_WEIGHT}, Tensor dy, int[] geometry, SymInt height, SymInt width, str? backend) -> Tensor"
    return _define(f"{format}_conv2d_input", schema, conv2d_input, fake)


def _define_conv2d_weight(format: str):
    def conv2d_weight(values, index, scale, dims, dy, x, geometry, backend):
        layout, g = _layout(format, values, index, scale, dims), Geometry(*geometry)
        return choose("conv2d_weight", layout, x, backend).conv2d_weight(layout, dy, x, g)

    def fake(values, index, scale, dims, dy, x, geometry, backend):
        return values.new_empty(values.shape)

    schema = f"({_WEIGHT}, Tensor dy, Tensor x, int[] geometry, str? backend) -> Tensor"
    return _define(f"{format}_conv2d_weight", schema, conv2d_weight, fake)


CONV2D = {name: _define_conv2d(name) for name in FORMATS}
CONV2D_INPUT = {name: _define_conv2d_input(name) for name in FORMATS}
CONV2D_WEIGHT = {name: _define_conv2d_weight(name) for name in FORMATS}


class SparseConv(torch.autograd.Function):
    """Y = conv(X, W) + bias; dX transposed; dW at the stored positions; dbias = the sums of dY."""

    @staticmethod
    def forward(ctx, values, x, bias, scale, format, dims, geometry, backend, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, geometry, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return CONV2D[format](values, index, scale, dims, x, bias, geometry, "none", backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, geometry, backend = ctx.call
        need_values, need_x, need_bias = ctx.needs_input_grad[:3]
        dvalues = dx = dbias = None
        if need_values:
            dvalues = CONV2D_WEIGHT[format](values, index, scale, dims, dy, x, geometry, backend)
        if need_x:
            dx = CONV2D_INPUT[format](values, index, scale, dims, dy, geometry, x.shape[2], x.shape[3], backend)
        if need_bias:
            dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dvalues, dx, dbias, None, None, None, None, None, *(None for _ in index)


def conv2d_operand(
    w: Operand, x: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, backend: str | None
) -> Tensor:
    """The convolution of checked arguments: x [B, C, H, W]."""
    if torch.is_grad_enabled() and (
        w.values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = SparseConv.apply(w.values, x, bias, w.scale, w.format, w.dims, geometry, backend, *w.index)
        return ACTIVATIONS[activation](y)
    return CONV2D[w.format](w.values, w.index, w.scale, w.dims, x, bias, geometry, activation, backend)
