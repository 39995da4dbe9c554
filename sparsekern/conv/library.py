"""The convolution's ops: three per format, as in `_library`; the geometry goes as integers."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._ext import emulating, interpreting
from .._library import _define, apply_of, unwatched
from ..dispatch import BACKENDS
from ..formats import FORMATS
from ..layout import Layout
from ..ref import ACTIVATIONS
from . import host, ref, rows_cuda, sp24_cuda, triton
from .geometry import Geometry, memory_format

_MODULES = {"host": host, "triton": triton, "ref": ref}
_CUDA = {"sp24": sp24_cuda, "csr": rows_cuda, "bitmap": rows_cuda}  # the module of a format
_BACKENDS = {"cpu": ("host",), "cuda": ("cuda", "triton")}  # device type -> backends beside the oracle, fastest first


def _module(backend: str, format: str) -> ModuleType | None:
    return _CUDA.get(format) if backend == "cuda" else _MODULES.get(backend)


@cache
def modules(format: str, device_type: str) -> tuple[ModuleType, ...]:
    """The modules that may run a format's convolutions on a device type, in the order in which they are tried."""
    found = (_module(name, format) for name in (*_BACKENDS.get(device_type, ()), "ref"))
    return tuple(module for module in found if module is not None)


def name_of(module: ModuleType) -> str:
    """The backend that a module implements."""
    return "cuda" if module in _CUDA.values() else module.__name__.rpartition(".")[2]


def why_not(backend: str, op: str, layout: Layout, x: Tensor, g: Geometry) -> str | None:
    """Why `backend` cannot run this convolution, or None where it can."""
    if backend not in BACKENDS:
        return f"there is no backend of this name; known: {', '.join(BACKENDS)}"
    simulated = (backend == "triton" and interpreting()) or (backend == "cuda" and emulating())
    module = _module(backend, layout.format)
    if module is None or (not simulated and backend not in (*_BACKENDS.get(x.device.type, ()), "ref")):
        return f"convolution with {layout.format} has no such backend on {x.device.type} tensors"
    reason: str | None = module.why_not(op, layout, x, g)
    return reason


def choose(op: str, layout: Layout, x: Tensor, backend: str | None, g: Geometry) -> ModuleType:
    """The module that runs `op`; an explicit backend runs or raises with its reason."""
    if backend:
        reason = why_not(backend, op, layout, x, g)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} cannot run {layout.format}_{op}: {reason}")
        return _module(backend, layout.format) or ref
    for module in modules(layout.format, x.device.type):
        if module.why_not(op, layout, x, g) is None:
            return module
    return ref


def _geometry(geometry):
    """What an op got as integers."""
    return geometry if isinstance(geometry, Geometry) else Geometry(*geometry)


def _conv2d(layout, x, bias, geometry, activation, backend):
    g = _geometry(geometry)
    return choose("conv2d", layout, x, backend, g).conv2d(layout, x, bias, g, activation)


def _conv2d_fake(values, index, scale, dims, x, bias, geometry, activation, backend):
    size = (x.shape[0], dims[0], *Geometry(*geometry).out_size(x.shape[2], x.shape[3]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


CONV2D = _define(
    "conv2d",
    "Tensor x, Tensor? bias, int[] geometry, str activation, str? backend) -> Tensor",
    _conv2d,
    _conv2d_fake,
)


def conv2d(
    w: Layout, x: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, backend: str | None, direct: bool
) -> Tensor:
    """y = act(conv(x, W) + bias) of checked arguments, by either road. Not differentiable."""
    if direct:
        return _conv2d(w, x, bias, geometry, activation, backend)
    return CONV2D[w.format](*w.parts, x, bias, geometry, activation, backend)


def _conv2d_input(layout, dy, geometry, height, width, backend):
    g = _geometry(geometry)
    return choose("conv2d_input", layout, dy, backend, g).conv2d_input(layout, dy, g, height, width)


def _conv2d_input_fake(values, index, scale, dims, dy, geometry, height, width, backend):
    g = Geometry(*geometry)
    size = (dy.shape[0], dims[1] // g.taps * g.groups, height, width)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=memory_format(dy))


CONV2D_INPUT = _define(
    "conv2d_input",
    "Tensor dy, int[] geometry, SymInt height, SymInt width, str? backend) -> Tensor",
    _conv2d_input,
    _conv2d_input_fake,
)


def conv2d_input(
    w: Layout, dy: Tensor, geometry: Geometry, height: int, width: int, backend: str | None, direct: bool
) -> Tensor:
    """dx, of the given height and width, from dy."""
    if direct:
        return _conv2d_input(w, dy, geometry, height, width, backend)
    return CONV2D_INPUT[w.format](*w.parts, dy, geometry, height, width, backend)


def _conv2d_weight(layout, dy, x, geometry, backend):
    g = _geometry(geometry)
    return choose("conv2d_weight", layout, x, backend, g).conv2d_weight(layout, dy, x, g)


def _conv2d_weight_fake(values, index, scale, dims, dy, x, geometry, backend):
    return values.new_empty(values.shape)


CONV2D_WEIGHT = _define(
    "conv2d_weight",
    "Tensor dy, Tensor x, int[] geometry, str? backend) -> Tensor",
    _conv2d_weight,
    _conv2d_weight_fake,
)


def conv2d_weight(w: Layout, dy: Tensor, x: Tensor, geometry: Geometry, backend: str | None, direct: bool) -> Tensor:
    """dW at the stored positions, like values."""
    if direct:
        return _conv2d_weight(w, dy, x, geometry, backend)
    return CONV2D_WEIGHT[w.format](*w.parts, dy, x, geometry, backend)


class SparseConv(torch.autograd.Function):
    """Y = conv(X, W) + bias; dX transposed; dW at the stored positions; dbias = the sums of dY."""

    @staticmethod
    def forward(ctx, values, x, bias, scale, format, dims, geometry, backend, direct, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, geometry, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = FORMATS[format].layout.from_parts(values, index, scale, dims)
        return conv2d(w, x, bias, geometry, "none", backend, direct)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, geometry, backend = ctx.call
        need_values, need_x, need_bias = ctx.needs_input_grad[:3]
        w = FORMATS[format].layout.from_parts(values, tuple(index), scale, dims)
        direct = unwatched(values, x, dy)
        dvalues = conv2d_weight(w, dy, x, geometry, backend, direct) if need_values else None
        dx = conv2d_input(w, dy, geometry, x.shape[2], x.shape[3], backend, direct) if need_x else None
        dbias = None
        if need_bias:
            dbias = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dvalues, dx, dbias, None, None, None, None, None, None, *(None for _ in index)


def conv2d_layout(
    w: Layout, x: Tensor, bias: Tensor | None, geometry: Geometry, activation: str, backend: str | None, direct: bool
) -> Tensor:
    """The convolution of checked arguments: x [B, C, H, W]."""
    if torch.is_grad_enabled() and (
        w.values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = apply_of(SparseConv, direct)(
            w.values, x, bias, w.scale, w.format, w.dims, geometry, backend, direct, *w.index
        )
        return ACTIVATIONS[activation](y)
    return conv2d(w, x, bias, geometry, activation, backend, direct)
