"""The functions a user calls: check, choose, run. Each takes a SparseTensor as its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ending import Ending, sum_dtype
from ._library import PRUNE, DynamicMM, SparseMM, SparseMMT, apply_of, mm, mm_t, plain, unwatched
from .conv import Geometry, conv2d_layout, padding_of
from .conv.geometry import order_number, pair
from .layout import FLOATS, QUANTISED, Layout
from .ref import ACTIVATIONS, result_dtype
from .sp24 import Sp24
from .sp24.dynamic import MASKS
from .tensor import SparseTensor, values_of

DENSE_ACTIVATIONS = (
    "sparsekern's weights are sparse and its activations dense; for sparse activations (point clouds) use a library "
    "such as spconv, MinkowskiEngine or TorchSparse"
)


def layout_of(w: Any, name: str = "w") -> Layout:
    """The layout behind a SparseTensor; differentiable in the values of a SparseTensor."""
    if isinstance(w, SparseTensor):
        if w.transposed:
            raise ValueError(f"{name} is transposed; pass the weight W[N, K] itself")
        values = values_of(w)
        return w.packed if values is w.packed.values else w.packed.with_values(values)
    if isinstance(w, Layout):
        return w
    raise TypeError(
        f"{name} must be a SparseTensor (see to_sparse_semi_structured, to_block_sparse, to_csr, to_bitmap), "
        f"got {type(w).__name__}"
    )


def linear(
    x: Tensor,
    w: SparseTensor | Layout,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """y = act(x_scale * (x W^T) + bias) + residual.

    x [..., K] in the values' type (float32, bfloat16, float16, float64), any strides; w a sparse W[N, K]; bias [N];
    activation None, "relu", "gelu" (exact), "gelu_tanh" or "silu"; backend None to let the dispatcher choose, or a
    name ("host", "ref", ...) that then runs or raises. Returns [..., N] in x's type. int8 and (sp24, bsr)
    float8_e4m3fn weights have a scale for every row in themselves and take float activations, or such of their own
    type with a float32 result.

    x_scale: the scales of quantised activations, one for each token [...] or [..., 1], or a single one; float32.
    residual [..., N] in the result's type. out_dtype: the result's type, float32, bfloat16 or float16. use_fast_accum
    allows Hopper's tensor cores to keep fp8 sums for all of K, in some 14 bits, as torch._scaled_mm's does. One kernel
    does it all where the backend's can (sp24 on a GPU); else torch ends the product, from sums in full precision.

    Differentiable in x, values, bias, x_scale and residual, as far as they are no int8 or float8. Raises ValueError for
    shapes, types or devices that do not fit, NotImplementedError where an explicit backend cannot run the call.
    """
    ending = None
    if x_scale is not None or residual is not None or out_dtype is not None or use_fast_accum:
        ending = Ending(x_scale, residual, out_dtype, use_fast_accum)
    return linear_layout(layout_of(w), x, bias, activation, backend, ending)


def linear_layout(
    w: Layout,
    x: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    ending: Ending | None = None,
) -> Tensor:
    """`linear` on a layout: the way modules call it."""
    activation = activation or "none"
    direct = unwatched(w.values, x, bias)
    if not direct:
        _check_is_dense(x)
        _check_devices(w, x, bias)
        x, w, bias = _autocast(x, w, bias)
    _check_linear(w, x, bias, activation)
    matrix = x.dim() == 2
    tokens = x if matrix else x.reshape(_count(x.shape[:-1]), w.shape[1])
    grad = torch.is_grad_enabled() and (
        w.values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if ending is not None:
        ending = _checked_ending(w, x, ending)
        direct = direct and plain(ending.x_scale) and plain(ending.residual)
        y = _ended(w, tokens, bias, activation, backend, direct, ending, grad)
    elif grad:
        _check_gradients(w, x)
        y = apply_of(SparseMM, direct)(
            w.values, tokens, bias, w.scale, w.format, w.dims, backend, direct, None, *w.index
        )
        y = ACTIVATIONS[activation](y)
    else:
        y = mm(w, tokens, bias, activation, backend, direct)
    return y if matrix else y.reshape(*x.shape[:-1], w.shape[0])


def _ended(
    w: Layout,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    backend: str | None,
    direct: bool,
    ending: Ending,
    grad: bool,
) -> Tensor:
    """A product of tokens x [M, K] with an ending: one op, or torch's where there are gradients."""
    x_scale, residual, out_dtype, _ = ending
    if not grad and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_scale, residual))
    ):
        return mm(w, x, bias, activation, backend, direct, ending)
    _check_gradients(w, x)
    natural = result_dtype(x)
    out = out_dtype or natural
    sums = None if out == natural and x_scale is None else sum_dtype(x)
    y = apply_of(SparseMM, direct)(
        w.values, x, bias if x_scale is None else None, w.scale, w.format, w.dims, backend, direct, sums, *w.index
    )
    if x_scale is not None:
        y = y * x_scale[:, None]
        y = y if bias is None else y + bias
    y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual).to(out)


def dynamic_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str = "top2",
    decay: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """y = x S(W)^T + bias, where S(W) is the 2:4 part of a dense W, found anew in every call.

    x [..., K], weight dense [N, K] and bias [N] of one floating type (under autocast of any); returns [..., N] in
    x's type. mask: "top2", the two of largest magnitude in each group of four along K, or "transposable", the 4 x 4
    tiles of largest sum with two entries in each row and column, with which dX = dY S(W) is a 2:4 product as well.
    Gradients: dW = dY^T X + decay * (W - S(W)), straight through the mask, so that removed weights may come back;
    decay > 0 is SR-STE (Zhou et al. 2021, arXiv 2102.04010; with the transposable mask Hu et al. 2024, 2404.01847).
    Raises ValueError for shapes, types, devices or settings that do not fit.
    """
    check_dynamic(mask, decay)
    _check_is_dense(x)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix [N, K], got {weight.dtype} {tuple(weight.shape)}")
    if x.device != weight.device or (bias is not None and bias.device != x.device):
        where = [str(t.device) for t in (x, weight, bias) if t is not None]
        raise ValueError(f"x, weight and bias must be on one device, got {', '.join(where)}")
    if _autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(x.dtype)
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, the weight {weight.dtype}; cast one of them, or use autocast")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., K = {k}] for a weight of shape {(n, k)}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must have shape [N = {n}], got {tuple(bias.shape)}")
    tokens = x if x.dim() == 2 else x.reshape(_count(x.shape[:-1]), k)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, x, bias)):
        y = DynamicMM.apply(weight, tokens, bias, mask, decay, backend)
    else:
        values, metadata = PRUNE(weight.to(x.dtype), mask, backend)
        y = mm(Sp24.from_parts(values, (metadata,), None, (n, k)), tokens, bias, "none", backend, False)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)


def check_dynamic(mask: str, decay: float) -> None:
    """Raises ValueError for settings that `dynamic_linear` does not have."""
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
    if not 0 <= decay < float("inf"):
        raise ValueError(f"decay must be a number of at least 0, got {decay}")


def conv2d(
    x: Tensor,
    w: SparseTensor | Layout,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    backend: str | None = None,
    *,
    kernel_size: int | tuple[int, int] | None = None,
    order: str = "crs",
) -> Tensor:
    """y = act(conv2d(x, W) + bias), as torch.nn.functional.conv2d, with sparse weights and dense activations.

    x [B, C, H, W] or [C, H, W], contiguous or channels_last (the output has the same memory format); w the weight
    [O, C / groups, kh, kw] flattened to W[O, K]: `order` says how K runs, "crs" (torch's flatten) or "rsc" (channels
    innermost: what 2:4 pruning along channels gives). kernel_size may be left out for square kernels. padding: an
    int, a pair, "same" or "valid". Types, activation, backend and errors as for `linear`.
    """
    packed = layout_of(w)
    _check_images(packed, x)
    channels = x.shape[-3] if x.dim() >= 3 else 0
    taps = packed.shape[1] * groups // channels if channels else 0
    kernel = pair(round(taps**0.5) if kernel_size is None else kernel_size, "kernel_size", 1)
    steps, spread = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    edges = padding_of(padding, kernel, steps, spread)
    geometry = Geometry(*kernel, *steps, *spread, *edges, groups, order_number(order))
    return conv2d_geometry(packed, x, bias, geometry, activation, backend)


def conv2d_geometry(
    w: Layout,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`conv2d` on a layout and a Geometry: the way modules call it."""
    activation = activation or "none"
    direct = unwatched(w.values, x, bias)
    _check_images(w, x)
    if not direct:
        _check_devices(w, x, bias)
        x, w, bias = _autocast(x, w, bias)
    _check_conv(w, x, bias, geometry, activation)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    y = conv2d_layout(w, images, bias, geometry, activation, backend, direct)
    return y if x.dim() == 4 else y.squeeze(0)


def matmul(a: Tensor | SparseTensor, b: Tensor | SparseTensor, backend: str | None = None) -> Tensor:
    """a @ b where exactly one of them is sparse.

    x [..., K] @ W.t() -> [..., N];  x [..., N] @ W -> [..., K];  W @ x [K, M] -> [N, M];  W.t() @ x [N, M] -> [K, M].
    """
    if isinstance(b, SparseTensor) and not isinstance(a, SparseTensor):
        return _times(a, b, backend)
    if isinstance(a, SparseTensor) and not isinstance(b, SparseTensor):
        if b.dim() == 1:
            return _times(b, a.t(), backend)
        return _times(b.transpose(-1, -2), a.t(), backend).transpose(-1, -2)
    raise TypeError(f"matmul needs exactly one SparseTensor, got {type(a).__name__} and {type(b).__name__}")


def _times(x: Tensor, w: SparseTensor, backend: str | None) -> Tensor:
    """x @ w for a sparse w, transposed or not."""
    if w.transposed:
        return linear(x, w.t(), backend=backend)
    packed = layout_of(w)
    direct = unwatched(packed.values, x)
    if not direct:
        _check_is_dense(x)
        _check_devices(packed, x, None)
        x, packed, _ = _autocast(x, packed, None)
    n, k = packed.shape
    _check_tokens(packed, x, n, "N")
    tokens = x.reshape(_count(x.shape[:-1]), n)
    if torch.is_grad_enabled() and (packed.values.requires_grad or x.requires_grad):
        y = apply_of(SparseMMT, direct)(
            packed.values, tokens, packed.scale, packed.format, packed.dims, backend, direct, *packed.index
        )
    else:
        y = mm_t(packed, tokens, backend, direct)
    return y.reshape(*x.shape[:-1], k)


def _count(shape: torch.Size) -> int:
    """The number of tokens; -1 in reshape cannot tell it where K is 0."""
    total = 1
    for size in shape:
        total = total * size
    return total


def _autocast(x: Tensor, w: Layout, bias: Tensor | None) -> tuple[Tensor, Layout, Tensor | None]:
    if not _autocasts(x):
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    values = w.values if w.values.dtype in QUANTISED else w.values.to(dtype)
    return x.to(dtype), w.with_values(values), None if bias is None else bias.to(dtype)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x, which float64 and quantised activations are spared."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype in FLOATS and x.dtype != torch.float64


def _check_is_dense(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a dense torch.Tensor, got {type(x).__name__}: {DENSE_ACTIVATIONS}")
    if isinstance(x, SparseTensor):
        raise TypeError(f"x must be dense, got a SparseTensor; only the weight may be sparse: {DENSE_ACTIVATIONS}")
    if x.layout != torch.strided:
        raise ValueError(f"x must be a dense (strided) tensor, got {x.layout}: {DENSE_ACTIVATIONS}")


def _check_devices(w: Layout, x: Tensor, bias: Tensor | None) -> None:
    if x.device != w.values.device:
        raise ValueError(f"x is on {x.device}, the weight on {w.values.device}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x on {x.device}")


def _check_tokens(w: Layout, x: Tensor, last: int, letter: str) -> None:
    if x.dim() < 1 or x.shape[-1] != last:
        raise ValueError(
            f"x must have shape [..., {letter} = {last}] for a weight of shape {w.shape}, got {tuple(x.shape)}"
        )
    _check_types(w, x)


def _check_types(w: Layout, x: Tensor) -> None:
    own = w.values.dtype
    if x.dtype != own and not (own in QUANTISED and x.dtype in FLOATS):
        raise ValueError(f"x is {x.dtype}, the weight {own}; cast one of them, or use autocast")


def _check_linear(w: Layout, x: Tensor, bias: Tensor | None, activation: str) -> None:
    _check_tokens(w, x, w.shape[1], "K")
    _check_epilogue(w, x, bias, activation)


def _check_gradients(w: Layout, x: Tensor) -> None:
    for name, t in (("the weight's values", w.values), ("x", x)):
        if t.requires_grad and t.dtype in QUANTISED:
            raise NotImplementedError(
                f"{name} of {t.dtype} have no gradient: train in a float type and quantise in the forward pass "
                "(straight through), or call requires_grad_(False)"
            )


def _checked_ending(w: Layout, x: Tensor, ending: Ending) -> Ending:
    """The ending with x_scale [M] and residual [M, N]."""
    x_scale, residual, out_dtype, use_fast_accum = ending
    lead, n = x.shape[:-1], w.shape[0]
    m = lead[0] if x.dim() == 2 else _count(lead)
    if out_dtype is not None and out_dtype not in (torch.float32, torch.bfloat16, torch.float16, sum_dtype(x)):
        raise ValueError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    if x_scale is not None:
        if x_scale.device != x.device:
            raise ValueError(f"x_scale is on {x_scale.device}, x on {x.device}")
        if x_scale.dtype != torch.float32:
            raise ValueError(f"x_scale must be float32, got {x_scale.dtype}")
        if x_scale.shape in (lead, (*lead, 1)):
            x_scale = x_scale.reshape(m)
        elif x_scale.dim() <= 1 and x_scale.numel() == 1:
            x_scale = x_scale.reshape(1).expand(m)
        else:
            raise ValueError(
                f"x_scale must have one scale for each token, shape {tuple(lead)}, or a single one, "
                f"got {tuple(x_scale.shape)}"
            )
        x_scale = x_scale.contiguous()
    if residual is not None:
        if residual.device != x.device:
            raise ValueError(f"residual is on {residual.device}, x on {x.device}")
        if residual.shape != (*lead, n):
            raise ValueError(f"residual must have the result's shape {(*lead, n)}, got {tuple(residual.shape)}")
        out = out_dtype or result_dtype(x)
        if residual.dtype != out:
            raise ValueError(
                f"residual is {residual.dtype}, the result {out}: cast it, or pass out_dtype={residual.dtype}"
            )
        residual = residual if x.dim() == 2 else residual.reshape(m, n)
    return Ending(x_scale, residual, out_dtype, use_fast_accum)


def _check_images(w: Layout, x: Tensor) -> None:
    _check_is_dense(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be images [B, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")


def _check_conv(w: Layout, x: Tensor, bias: Tensor | None, g: Geometry, activation: str) -> None:
    (n, k), channels = w.shape, x.shape[-3]
    if g.groups < 1 or n % g.groups or channels % g.groups:
        raise ValueError(f"groups must divide the {channels} input and {n} output channels, got {g.groups}")
    if k != channels // g.groups * g.taps:
        raise ValueError(
            f"a weight of shape ({n}, {k}) does not fit {channels} channels in {g.groups} groups and a "
            f"{g.kernel_h}x{g.kernel_w} kernel: K must be C / groups * kh * kw = {channels // g.groups * g.taps}"
        )
    if min(g.out_size(x.shape[-2], x.shape[-1])) < 1:
        raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]} are smaller than the (dilated) kernel")
    _check_types(w, x)
    if x.dtype in QUANTISED:
        raise ValueError(f"convolutions take floating-point activations, got {x.dtype}")
    _check_epilogue(w, x, bias, activation)


def _check_epilogue(w: Layout, x: Tensor, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if bias is not None:
        if bias.shape != (w.shape[0],):
            raise ValueError(f"bias must have shape [N = {w.shape[0]}], got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise ValueError(f"bias must be a floating-point tensor, got {bias.dtype}")
