"""The one place that talks to torch.library: three ops per format, their fakes, and the autograd around them.

Every format takes the same shape of arguments (`Layout.parts`), so ops are made from the format's name:
`sparsekern::sp24_mm`, `sparsekern::csr_sddmm` and so on. Autograd is a Function outside the op, because that costs
a third of an autograd kernel inside it; the gradient of each product is made of the other two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_autocast_enabled
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from . import _ending
from ._ending import Ending
from ._ext import on_card
from .dispatch import choose
from .formats import FORMATS
from .layout import Layout
from .ref import result_dtype
from .sp24 import Sp24, dynamic

_library = torch.library.Library("sparsekern", "DEF")
_WEIGHT = "Tensor values, Tensor[] index, Tensor? scale, int[] dims"


def _raw(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


# Without asking first whether CUDA is initialised, which a tensor on it proves.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_TYPES = frozenset((Tensor, torch.nn.Parameter))
try:
    # What a thread's dispatch keys are while no mode, transform, tracer or functionalization is active, and those of
    # an ordinary tensor on a CPU or a GPU; each outside and inside of inference mode. A tensor that is fake, batched,
    # lazily negated or of a subclass has others. They are spelt out: what is found at import might be found in a mode.
    _QUIET = frozenset((_raw("BackendSelect", "ADInplaceOrView"), _raw("BackendSelect")))
    _PLAIN = {
        _raw(*names): names[0].lower()
        for on in ("CPU", "CUDA")
        for names in ((on, "ADInplaceOrView", f"Autograd{on}", f"Autocast{on}"), (on, f"Autocast{on}"))
    }
    _keys_of_thread = torch._C._dispatch_tls_local_include_set
    _keys_of = torch._C._dispatch_keys
    _function_mode = torch._C._is_torch_function_mode_enabled
    _profiled = torch._C._autograd._profiler_enabled
    _can_tell = True
except AttributeError:  # a torch that names them otherwise: every call goes through its op
    _can_tell = False


def unwatched(values: Tensor, x: Tensor, other: Tensor | None = None) -> bool:
    """Whether torch would do nothing with a call but pass it on: then it goes straight, which spares 5 us.

    No trace, mode, transform, autocast or profiler is there to see an op, and every tensor is an ordinary one on
    one CPU or on the current GPU. Gradients are not asked about: the ops have none, they lie around them.
    """
    if is_compiling():  # first: what follows is for no trace to see
        return False
    if not _can_tell or _keys_of_thread().raw_repr() not in _QUIET or _function_mode() or _profiled():
        return False
    device = _PLAIN.get(_keys_of(x).raw_repr()) if type(x) in _TYPES else None
    return (
        device is not None
        and not is_autocast_enabled(device)
        and type(values) in _TYPES
        and _PLAIN.get(_keys_of(values).raw_repr()) == device
        and (other is None or (type(other) in _TYPES and _PLAIN.get(_keys_of(other).raw_repr()) == device))
        and (device == "cpu" or x.get_device() == values.get_device() == _current_device())
        and (device == "cpu" or other is None or x.get_device() == other.get_device())
    )


def plain(t: Tensor | None) -> bool:
    """Whether a tensor is an ordinary one, or none; of one more argument beside those of `unwatched`."""
    return t is None or (type(t) in _TYPES and _keys_of(t).raw_repr() in _PLAIN)


def _refuse_onnx(format: str) -> None:
    """Instead of the exporter's own message, which knows no cure."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"ONNX has no product with a {format} weight: export the dense twin, sparsekern.to_dense_(model); "
            "torch.export keeps it sparse"
        )


def _define(name: str, schema: str, run: Any, fake: Any) -> dict[str, Any]:
    """An op for every format, around run(layout, ...)."""

    def make(format: str) -> Any:
        layout = FORMATS[format].layout

        def impl(values, index, scale, dims, *rest):
            _refuse_onnx(format)
            w = layout.from_parts(values, tuple(index), scale, tuple(dims))
            device = values.device.type
            with on_card(values):
                if is_autocast_enabled(device):  # was heeded; torch's products in a backend are of the types they get
                    with torch.autocast(device, enabled=False):
                        return run(w, *rest)
                return run(w, *rest)

        def fake_impl(*arguments):
            _refuse_onnx(format)
            return fake(*arguments)

        op = f"{format}_{name}"
        _library.define(f"{op}({_WEIGHT}, {schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(op, impl, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparsekern::{op}", fake_impl, lib=_library)
        return getattr(torch.ops.sparsekern, op).default

    return {format: make(format) for format in FORMATS}


# Each product thrice: on a layout, as an op for every format, and by either road (`direct`: see `unwatched`).


def _mm(layout, x, bias, activation, backend, *given):
    if not given:
        return choose("mm", layout, x, backend).mm(layout, x, bias, activation)
    ending = Ending(*given)
    return _ending.mm(choose("mm", layout, x, backend, ending), layout, x, bias, activation, ending)


def _mm_fake(values, index, scale, dims, x, bias, activation, backend, *given):
    return x.new_empty((x.shape[0], dims[0]), dtype=Ending(*given).out_dtype or result_dtype(x))


MM = _define(
    "mm",
    "Tensor x, Tensor? bias, str activation, str? backend, Tensor? x_scale=None, Tensor? residual=None, "
    "ScalarType? out_dtype=None, bool use_fast_accum=False, float beta=1.0) -> Tensor",
    _mm,
    _mm_fake,
)


def mm(
    w: Layout,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str | None,
    direct: bool,
    ending: Ending | None = None,
) -> Tensor:
    """Y = act(X W^T + bias), with this ending, of checked arguments: x [M, K] -> [M, N]. Not differentiable."""
    if direct:
        return _mm(w, x, bias, activation, backend, *(ending or ()))
    return MM[w.format](*w.parts, x, bias, activation, backend, *(ending or ()))


def _mm_t(layout, dy, backend):
    return choose("mm_t", layout, dy, backend).mm_t(layout, dy)


def _mm_t_fake(values, index, scale, dims, dy, backend):
    return dy.new_empty((dy.shape[0], dims[1]))


MM_T = _define("mm_t", "Tensor dy, str? backend) -> Tensor", _mm_t, _mm_t_fake)


def mm_t(w: Layout, dy: Tensor, backend: str | None, direct: bool) -> Tensor:
    """dX = dY W of checked arguments: dy [M, N] -> [M, K]. Not differentiable."""
    if direct:
        return _mm_t(w, dy, backend)
    return MM_T[w.format](*w.parts, dy, backend)


def _sddmm(layout, dy, x, backend):
    return choose("sddmm", layout, x, backend).sddmm(layout, dy, x)


def _sddmm_fake(values, index, scale, dims, dy, x, backend):
    return values.new_empty(values.shape)


SDDMM = _define("sddmm", "Tensor dy, Tensor x, str? backend) -> Tensor", _sddmm, _sddmm_fake)


def sddmm(w: Layout, dy: Tensor, x: Tensor, backend: str | None, direct: bool) -> Tensor:
    """dW = dY^T X at the stored positions, of checked arguments: dy [M, N], x [M, K] -> like values."""
    if direct:
        return _sddmm(w, dy, x, backend)
    return SDDMM[w.format](*w.parts, dy, x, backend)


def apply_of(function: Any, direct: bool) -> Any:
    """function.apply; directly, what that calls in the end: the 3 us before it look for functorch."""
    return super(torch.autograd.Function, function).apply if direct else function.apply


class SparseMM(torch.autograd.Function):
    """Y = X W^T + bias; dX = dY W; dW = dY^T X at the stored positions; dbias = the column sums of dY.

    Of an out_dtype that is not x's the gradient is rounded to x's before the products.
    """

    @staticmethod
    def forward(ctx, values, x, bias, scale, format, dims, backend, direct, out_dtype, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = FORMATS[format].layout.from_parts(values, index, scale, dims)
        ending = None if out_dtype is None else Ending(out_dtype=out_dtype)
        return mm(w, x, bias, "none", backend, direct, ending)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, backend = ctx.call
        w = FORMATS[format].layout.from_parts(values, tuple(index), scale, dims)
        need_values, need_x, need_bias = ctx.needs_input_grad[:3]
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype) if need_bias else None
        if dy.dtype != x.dtype and (need_values or need_x):
            dy = dy.to(x.dtype)
        direct = unwatched(values, x, dy)
        dvalues = sddmm(w, dy, x, backend, direct) if need_values else None
        dx = mm_t(w, dy, backend, direct) if need_x else None
        return dvalues, dx, dbias, None, None, None, None, None, None, *(None for _ in index)


class SparseMMT(torch.autograd.Function):
    """Y = X W; dX = dY W^T; dW = X^T dY at the stored positions."""

    @staticmethod
    def forward(ctx, values, x, scale, format, dims, backend, direct, *index):
        ctx.save_for_backward(values, x, scale, *index)
        ctx.call = (format, dims, backend)
        return mm_t(FORMATS[format].layout.from_parts(values, index, scale, dims), x, backend, direct)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, x, scale, *index = ctx.saved_tensors
        format, dims, backend = ctx.call
        w = FORMATS[format].layout.from_parts(values, tuple(index), scale, dims)
        direct = unwatched(values, x, dy)
        need_values, need_x = ctx.needs_input_grad[:2]
        dvalues = sddmm(w, x, dy, backend, direct) if need_values else None
        dx = mm(w, dy, None, "none", backend, direct) if need_x else None
        return dvalues, dx, None, None, None, None, None, *(None for _ in index)


# 2:4 of a weight that changes


def _prune(weight, mask, backend):
    layout = dynamic.prune(weight, mask, backend)
    return layout.values, layout.metadata


def _prune_fake(weight, mask, backend):
    n, k = weight.shape
    kp = (k + 7) // 8 * 8
    return weight.new_empty(n, kp // 2), weight.new_empty((n, kp // 8), dtype=torch.uint8)


def _removed_fake(weight, metadata):
    return weight.new_empty(weight.shape)


def _define_one(op: str, schema: str, run: Any, fake: Any) -> Any:
    _library.define(f"{op}({schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{op}", fake, lib=_library)
    return getattr(torch.ops.sparsekern, op).default


PRUNE = _define_one(
    "sp24_prune", "Tensor weight, str mask, str? backend) -> (Tensor values, Tensor metadata)", _prune, _prune_fake
)
REMOVED = _define_one("sp24_removed", "Tensor weight, Tensor metadata) -> Tensor", dynamic.removed, _removed_fake)


class DynamicMM(torch.autograd.Function):
    """Y = X S(W)^T + bias with the 2:4 part S(W) of a dense W, found anew.

    dX = dY S(W); dW = dY^T X + decay * (W - S(W)), straight through the mask; dbias = the column sums of dY.
    """

    @staticmethod
    def forward(ctx, weight, x, bias, mask, decay, backend):
        values, metadata = PRUNE(weight.to(x.dtype), mask, backend)
        ctx.save_for_backward(weight, x, values, metadata)
        ctx.call = (decay, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dims = (weight.shape[0], weight.shape[1])
        return mm(Sp24.from_parts(values, (metadata,), None, dims), x, bias, "none", backend, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, x, values, metadata = ctx.saved_tensors
        decay, backend = ctx.call
        need_weight, need_x, need_bias = ctx.needs_input_grad[:3]
        dweight = dx = dbias = None
        if need_weight:
            dweight = (dy.t() @ x).to(weight.dtype)  # in the master's type: a small decay would be lost in 16 bits
            if decay:
                dweight = dweight.add(REMOVED(weight, metadata), alpha=decay)
        if need_x:
            layout = Sp24.from_parts(values, (metadata,), None, (weight.shape[0], weight.shape[1]))
            dx = mm_t(layout, dy, backend, False)
        if need_bias:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dweight, dx, dbias, None, None, None
