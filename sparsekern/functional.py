"""The functions a user calls: check, choose, run. `linear` and `matmul` take a SparseTensor as their weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import MM, MM_T, SparseMM, SparseMMT
from .layout import FLOATS, Layout, Operand
from .ref import ACTIVATIONS
from .tensor import SparseTensor, values_of

DENSE_ACTIVATIONS = (
    "sparsekern's weights are sparse and its activations dense; for sparse activations (point clouds) use a library "
    "such as spconv, MinkowskiEngine or TorchSparse"
)


def operand_of(w: Any, name: str = "w") -> Operand:
    """The Operand behind a SparseTensor or a layout; differentiable in the values of a SparseTensor."""
    if isinstance(w, SparseTensor):
        if w.transposed:
            raise ValueError(f"{name} is transposed; pass the weight W[N, K] itself")
        return w.packed.operand._replace(values=values_of(w))
    if isinstance(w, Layout):
        return w.operand
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
) -> Tensor:
    """y = act(x W^T + bias).

    x [..., K] in the values' type (float32, bfloat16, float16, float64), any strides; w a sparse W[N, K]; bias [N];
    activation None, "relu", "gelu" (exact), "gelu_tanh" or "silu"; backend None to let the dispatcher choose, or a
    name ("host", "ref", ...) that then runs or raises. Returns [..., N] in x's type. int8 weights take float
    activations (weight * scale), or int8 activations with a float32 result. Differentiable in x, values and bias.
    Raises ValueError for shapes, types or devices that do not fit, NotImplementedError where an explicit backend
    cannot run the call.
    """
    return linear_operand(operand_of(w), x, bias, activation, backend)


def linear_operand(
    w: Operand, x: Tensor, bias: Tensor | None = None, activation: str | None = None, backend: str | None = None
) -> Tensor:
    """`linear` on an Operand: the way modules call it."""
    activation = activation or "none"
    _check_is_dense(x)
    x, w, bias = _autocast(x, w, bias)
    _check_linear(w, x, bias, activation)
    n, k = w.dims[0], w.dims[1]
    tokens = x if x.dim() == 2 else x.reshape(_count(x.shape[:-1]), k)
    if torch.is_grad_enabled() and (
        w.values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = SparseMM.apply(w.values, tokens, bias, w.scale, w.format, w.dims, backend, *w.index)
        y = ACTIVATIONS[activation](y)
    else:
        y = MM[w.format](w.values, w.index, w.scale, w.dims, tokens, bias, activation, backend)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)


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
    _check_is_dense(x)
    x, op, _ = _autocast(x, operand_of(w), None)
    n, k = op.dims[0], op.dims[1]
    _check_tokens(op, x, n, "N")
    tokens = x.reshape(_count(x.shape[:-1]), n)
    if torch.is_grad_enabled() and (op.values.requires_grad or x.requires_grad):
        y = SparseMMT.apply(op.values, tokens, op.scale, op.format, op.dims, backend, *op.index)
    else:
        y = MM_T[op.format](op.values, op.index, op.scale, op.dims, tokens, backend)
    return y.reshape(*x.shape[:-1], k)


def _count(shape: torch.Size) -> int:
    """The number of tokens; -1 in reshape cannot tell it where K is 0."""
    total = 1
    for size in shape:
        total = total * size
    return total


def _autocast(x: Tensor, w: Operand, bias: Tensor | None) -> tuple[Tensor, Operand, Tensor | None]:
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x, w, bias
    dtype = torch.get_autocast_dtype(device)
    values = w.values if w.values.dtype == torch.int8 else w.values.to(dtype)
    return x.to(dtype), w._replace(values=values), None if bias is None else bias.to(dtype)


def _check_is_dense(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a dense torch.Tensor, got {type(x).__name__}: {DENSE_ACTIVATIONS}")
    if isinstance(x, SparseTensor):
        raise TypeError(f"x must be dense, got a SparseTensor; only the weight may be sparse: {DENSE_ACTIVATIONS}")
    if x.layout != torch.strided:
        raise ValueError(f"x must be a dense (strided) tensor, got {x.layout}: {DENSE_ACTIVATIONS}")


def _check_tokens(w: Operand, x: Tensor, last: int, letter: str) -> None:
    if x.dim() < 1 or x.shape[-1] != last:
        raise ValueError(
            f"x must have shape [..., {letter} = {last}] for a weight of shape {tuple(w.dims[:2])}, got {tuple(x.shape)}"
        )
    if x.device != w.values.device:
        raise ValueError(f"x is on {x.device}, the weight on {w.values.device}")
    quantised = w.values.dtype == torch.int8
    if not (x.dtype in (*FLOATS, torch.int8) if quantised else x.dtype == w.values.dtype):
        raise ValueError(f"x is {x.dtype}, the weight {w.values.dtype}; cast one of them, or use autocast")


def _check_linear(w: Operand, x: Tensor, bias: Tensor | None, activation: str) -> None:
    _check_tokens(w, x, w.dims[1], "K")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {activation!r}")
    if bias is not None:
        if bias.shape != (w.dims[0],):
            raise ValueError(f"bias must have shape [N = {w.dims[0]}], got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device}, x on {x.device}")
        if not bias.is_floating_point():
            raise ValueError(f"bias must be a floating-point tensor, got {bias.dtype}")
