"""SparseTensor: the one tensor subclass, a carrier of any format.

It behaves as a matrix weight does: products with dense tensors, transposition, casts, copies, pickling, and the
pointwise arithmetic that optimizers need, which acts on the stored values. Anything else raises and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS
from .layout import Layout

aten = torch.ops.aten


class SparseTensor(torch.Tensor):
    """A sparse W[N, K] (or its transpose) in one of the formats sp24, bsr, csr, bitmap.

    SparseTensor(packed) wraps a layout and checks it first: a ValueError names the first bad place.
    """

    packed: Layout
    transposed: bool

    @staticmethod
    def __new__(cls, packed: Layout, *, transposed: bool = False, requires_grad: bool = False) -> SparseTensor:
        if not isinstance(packed, Layout):
            raise TypeError(
                f"SparseTensor wraps a layout (Sp24, Bsr, Csr, Bitmap), got {type(packed).__name__}; "
                "use to_sparse_semi_structured, to_block_sparse, to_csr or to_bitmap to pack a dense weight"
            )
        packed.check()
        return _wrap(packed, transposed, requires_grad)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def format(self) -> str:
        return self.packed.format

    @property
    def density(self) -> float:
        """Share of the weights that is stored."""
        return self.packed.density

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all stored tensors, indices included."""
        return self.packed.nbytes

    def check(self) -> SparseTensor:
        """Proves every invariant of the layout; returns self. Raises ValueError that names the first bad place."""
        self.packed.check()
        return self

    def to_dense(self, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """The dense tensor, in `dtype` where given. Differentiable in the values."""
        dense = _ToDense.apply(self) if self.requires_grad and torch.is_grad_enabled() else self.packed.to_dense()
        dense = dense.t() if self.transposed else dense
        return dense if dtype is None else dense.to(dtype)

    def t(self) -> SparseTensor:
        """The transpose, a view: nothing is copied."""
        return _Transpose.apply(self)

    @property
    def T(self) -> SparseTensor:  # type: ignore[override]
        return self.t()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = ", transposed" if self.transposed else ""
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"SparseTensor(format={self.format!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={str(self.device)!r}, density={self.density:.4f}, nbytes={self.nbytes}{kind}{grad})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseTensor:
        copy = _wrap(self.packed.map(lambda t: t.detach().clone()), self.transposed, self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        packed = self.packed
        parts = (packed.format, packed.values.detach(), list(packed.index), packed.scale, list(packed.dims))
        return _rebuild, (*parts, self.transposed, self.requires_grad)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = [f"_t_{name}" for name in self.packed.tensors()]
        return names, (self.packed.format, self.packed.dims, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> SparseTensor:
        format, dims, transposed = context
        layout = FORMATS[format].layout
        index = tuple(inner[f"_t_{name}"] for name in layout.index_fields)
        return _wrap(layout.from_parts(inner["_t_values"], index, inner.get("_t_scale"), dims), transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        # Not super(): that would turn every dense result (the gradient of x, say) into a SparseTensor.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _DISPATCH.get(func)
        if handler is None and "_foreach_" in func._schema.name:
            handler = _foreach
        if handler is None:
            raise NotImplementedError(
                f"{func} is not supported on a SparseTensor of format {_first(args).format}; "
                "use .to_dense(), or work on .packed.values"
            )
        return handler(func, args, kwargs or {})


def _wrap(packed: Layout, transposed: bool = False, requires_grad: bool = False) -> SparseTensor:
    """A SparseTensor around a layout that is known to be right."""
    shape = packed.shape[::-1] if transposed else packed.shape
    made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,unused-ignore]  # old torch hides it
        SparseTensor, shape, dtype=packed.dtype, device=packed.device, requires_grad=requires_grad
    )
    made.packed, made.transposed = packed, transposed
    for name, t in packed.tensors().items():
        setattr(made, f"_t_{name}", t)
    return made


def _rebuild(
    format: str,
    values: Tensor,
    index: list[Tensor],
    scale: Tensor | None,
    dims: list[int],
    transposed: bool,
    requires_grad: bool,
) -> SparseTensor:
    """Unpickles, and checks: a file may hold anything."""
    if format not in FORMATS:
        raise ValueError(f"the file holds format {format!r}; known: {', '.join(FORMATS)}")
    layout = FORMATS[format].layout
    for name, parts, count in (("index", index, len(layout.index_fields)), ("dims", dims, layout.dims_count())):
        if not isinstance(parts, (list, tuple)) or len(parts) != count:
            raise ValueError(f"the file's {format} {name} must have {count} parts, got {parts!r:.80}")
    packed = layout.from_parts(values, tuple(index), scale, tuple(dims))
    return SparseTensor(packed, transposed=transposed, requires_grad=requires_grad)


torch.serialization.add_safe_globals([_rebuild])


class _Values(torch.autograd.Function):
    """From a SparseTensor to its values; the gradient is a SparseTensor of the same topology."""

    @staticmethod
    def forward(ctx: Any, w: SparseTensor) -> Tensor:
        ctx.packed, ctx.transposed = w.packed, w.transposed
        return w.packed.values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SparseTensor:
        return _wrap(ctx.packed.with_values(grad), ctx.transposed)


class _ToDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: SparseTensor) -> Tensor:
        ctx.packed, ctx.transposed = w.packed, w.transposed
        return w.packed.to_dense()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SparseTensor:
        return _wrap(ctx.packed.with_values(ctx.packed.sample(grad)), ctx.transposed)


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: SparseTensor) -> SparseTensor:
        return _wrap(w.packed, not w.transposed)

    @staticmethod
    def backward(ctx: Any, grad: SparseTensor) -> SparseTensor:
        return _wrap(grad.packed, not grad.transposed)


def values_of(w: SparseTensor) -> Tensor:
    """The stored values, joined to w's place in the autograd graph."""
    return _Values.apply(w) if torch.is_grad_enabled() and w.requires_grad else w.packed.values


# What torch functions mean on a SparseTensor ------------------------------------------------------------------


def _linear(x: Tensor, w: SparseTensor, bias: Tensor | None = None) -> Tensor:
    from . import functional

    if isinstance(x, SparseTensor):
        raise TypeError("linear: the input is a SparseTensor; only the weight may be sparse")
    return functional.linear(x, w, bias)


def _conv2d(
    x: Any, w: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    from . import functional

    return functional.conv2d(x, w, bias, stride, padding, dilation, groups)


def _matmul(a: Any, b: Any, *, out: None = None) -> Tensor:
    from . import functional

    return functional.matmul(a, b)


def _rmatmul(b: Any, a: Any) -> Tensor:
    return _matmul(a, b)


def _addmm(c: Tensor, a: Any, b: Any, *, beta: float = 1, alpha: float = 1, out: None = None) -> Tensor:
    return beta * c + alpha * _matmul(a, b)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.conv2d: _conv2d,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _rmatmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.t: SparseTensor.t,
    torch.Tensor.t: SparseTensor.t,
}


def _first(args: Any) -> SparseTensor:
    for a in args:
        if isinstance(a, SparseTensor):
            return a
        if isinstance(a, (list, tuple)) and any(isinstance(b, SparseTensor) for b in a):
            return _first(a)
    raise TypeError("no SparseTensor among the arguments")


def _on_tensors(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def handler(func: Any, args: Any, kwargs: Any) -> SparseTensor:
        w = args[0]
        return _wrap(w.packed.map(function), w.transposed)

    return handler


def _detach(func: Any, args: Any, kwargs: Any) -> SparseTensor:
    w = args[0]
    return _wrap(w.packed.with_values(w.packed.values.detach()), w.transposed)


def _to_copy(func: Any, args: Any, kwargs: Any) -> SparseTensor:
    w = args[0]
    moved = w.packed.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
    if moved.values is w.packed.values:
        moved = moved.map(torch.clone)
    return _wrap(moved, w.transposed)


def _same_topology(a: Layout, b: Layout) -> bool:
    return (
        type(a) is type(b)
        and a.dims == b.dims
        and all(s is t or torch.equal(s, t) for s, t in zip(a.index, b.index, strict=True))
    )


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Acts on the stored values; every SparseTensor among the arguments must have the same topology."""
    w = _first(args)
    for a in args:
        if isinstance(a, SparseTensor) and (a.transposed != w.transposed or not _same_topology(a.packed, w.packed)):
            raise NotImplementedError(f"{func}: the SparseTensors differ in topology; use .to_dense()")
        if isinstance(a, Tensor) and not isinstance(a, SparseTensor) and a.dim() > 0:
            raise NotImplementedError(f"{func}: a SparseTensor and a dense tensor do not mix; use .to_dense()")
    if w.packed.scale is not None:
        raise NotImplementedError(f"{func}: int8 weights have no arithmetic; use .to_dense()")
    target = kwargs.get("out", args[0])
    out = func(*map(_stored, args), **{name: _stored(a) for name, a in kwargs.items()})
    if func._schema.is_mutable:
        return target
    return _wrap(w.packed.with_values(out), w.transposed)


def _stored(a: Any) -> Any:
    """The values of a SparseTensor, also inside a list; anything else as it is."""
    if isinstance(a, (list, tuple)):
        return [_stored(b) for b in a]
    return a.packed.values if isinstance(a, SparseTensor) else a


def _foreach(func: Any, args: Any, kwargs: Any) -> Any:
    """Pointwise over lists, as the foreach variants of torch's optimizers call it; dense tensors may be among them."""
    first, *lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    for others in lists:
        for a, b in zip(first, others, strict=True):
            sparse = isinstance(a, SparseTensor), isinstance(b, SparseTensor)
            if sparse[0] != sparse[1] and b.dim() > 0:
                raise NotImplementedError(f"{func}: a SparseTensor and a dense tensor do not mix; use .to_dense()")
            if all(sparse) and (a.transposed != b.transposed or not _same_topology(a.packed, b.packed)):
                raise NotImplementedError(f"{func}: the SparseTensors differ in topology; use .to_dense()")
    out = func(*map(_stored, args), **kwargs)
    if func._schema.is_mutable or "_foreach_norm" in func._schema.name:
        return out
    return [
        _wrap(a.packed.with_values(o), a.transposed) if isinstance(a, SparseTensor) else o
        for a, o in zip(first, out, strict=True)
    ]


def _norm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The norm of all entries: zeros that are not stored add nothing to a norm of order >= 0."""
    w: SparseTensor = args[0]
    given: tuple[Any, ...] = args[1:]
    defaults: tuple[Any, ...] = (2, None)
    order, dim, *rest = given + defaults[len(given) :]
    if order < 0 or dim is not None:
        raise NotImplementedError(f"{func} of order {order} over dim {dim} on a SparseTensor; use .to_dense()")
    values = w.packed.values if w.packed.scale is None else w.packed.to_dense()
    return func(values if values.numel() else values.new_zeros(1), order, None, *rest, **kwargs)


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """zeros_like and its family keep the topology: the state of an optimizer is as sparse as its weight."""
    w = args[0]
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return _wrap(w.packed.with_values(func(w.packed.values, *args[1:], **kwargs)), w.transposed)


_POINTWISE = [
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.mul.Tensor, aten.mul_.Tensor,
    aten.div.Tensor, aten.div_.Tensor, aten.neg.default, aten.abs.default, aten.sqrt.default, aten.sqrt_.default,
    aten.addcmul.default, aten.addcmul_.default, aten.addcdiv.default, aten.addcdiv_.default,
    aten.lerp.Scalar, aten.lerp_.Scalar, aten.maximum.default, aten.maximum.out, aten.copy_.default, aten.zero_.default,
    aten.fill_.Scalar, aten.mul.Scalar, aten.mul_.Scalar, aten.add.Scalar, aten.add_.Scalar, aten.sign.default,
    aten.clamp.default, aten.clamp_.default, aten.square.default, aten.pow.Tensor_Scalar, aten.reciprocal.default,
]  # fmt: skip

_DISPATCH: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _on_tensors(torch.clone),
    aten._to_copy.default: _to_copy,
    aten.zeros_like.default: _like,
    aten.ones_like.default: _like,
    aten.empty_like.default: _like,
    aten.full_like.default: _like,
    aten.linalg_vector_norm.default: _norm,
    aten.t.default: lambda func, args, kwargs: _wrap(args[0].packed, not args[0].transposed),
    **dict.fromkeys(_POINTWISE, _pointwise),
}
