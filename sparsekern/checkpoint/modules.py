"""Between checkpoints and models: the weights of a model, and a model filled with weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..nn.base import SparseModule
from ..nn.conv import SparseConv2d
from ..nn.linear import SparseLinear
from ..tensor import SparseTensor, _wrap
from .native import ORDER_FLAG, prefix_of
from .weight import Weight


def weights_of(source: nn.Module | Mapping[str, Any]) -> Iterator[tuple[Weight, str | None]]:
    """(weight, the name of the weight it is tied to, or None) for all that a model or a state_dict holds."""
    state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    modules = dict(_sparse_modules(source)) if isinstance(source, nn.Module) else {}
    owned = {prefix + part: prefix for prefix, m in modules.items() for part in (*m.packed.tensors(), ORDER_FLAG)}
    first: dict[Any, str] = {}
    done: set[str] = set()
    for key, value in state.items():
        if key in owned:
            prefix = owned[key]
            if prefix in done:
                continue
            done.add(prefix)
            weight = _module_weight(f"{prefix}weight", modules[prefix])
        else:
            weight = _entry(key, value)
        tied = first.setdefault(_identity(weight), weight.name)
        yield weight, None if tied == weight.name else tied


def _sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseModule]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseModule):
            yield f"{name}." if name else "", module


def _module_weight(name: str, module: SparseModule) -> Weight:
    shape = tuple(module.dense_shape)
    order = getattr(module, "order", "crs") if len(shape) > 2 else "k"
    return Weight(name, _wrap(module.packed), f"sparsekern {module.format}", shape, order)


def _entry(key: str, value: Any) -> Weight:
    if isinstance(value, SparseTensor):
        order = "n" if value.transposed else "k"
        return Weight(key, value.detach(), f"sparsekern {value.format}", tuple(value.shape), order)
    if isinstance(value, Tensor):
        return Weight(key, value.detach(), "dense", tuple(value.shape), "crs" if value.dim() > 2 else "k")
    raise TypeError(f"{key!r} is a {type(value).__name__}; a checkpoint holds tensors only")


def _identity(weight: Weight) -> Any:
    """Equal for two names of the same memory."""
    t = weight.tensor
    assert t is not None
    if isinstance(t, SparseTensor):
        t = t.packed.values
    if t.numel() == 0 or t.device.type == "meta":
        return weight.name
    return (t.device, t.data_ptr(), t.dtype, weight.shape, t.stride() if t.layout == torch.strided else None)


def fill(model: nn.Module, weights: Mapping[str, Weight], raw: Mapping[str, Tensor], strict: bool) -> None:
    """Puts weights into a model, dense or sparse; nn.Linear and nn.Conv2d become sparse
    where their weight is.

    Shapes are compared before anything is changed. `raw` goes to load_state_dict as it is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state: dict[str, Tensor] = dict(raw)
    swaps: dict[nn.Module, SparseModule] = {}
    parameters: list[tuple[nn.Module, str, SparseTensor]] = []
    given: set[str] = set()  # keys that need no loading
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        if attribute == "weight" and isinstance(module, SparseModule):
            _check_shape(name, weight, tuple(module.dense_shape))
            state.update(_for_sparse_module(name, weight, module))
        elif not isinstance(weight.tensor, SparseTensor) or module is None:
            state[name] = weight.dense()
        elif attribute == "weight" and _convertible(module, weight):
            _check_shape(name, weight, tuple(module.weight.shape))
            swaps[module] = swaps.get(module) or _sparse_twin(module, weight)
            state.update(_parts(name, weight))
        elif isinstance(getattr(module, attribute, None), SparseTensor):
            _check_shape(name, weight, tuple(getattr(module, attribute).shape))
            parameters.append((module, attribute, weight.tensor))
            given.add(name)
        else:
            state[name] = weight.dense()
    _check_state(model, state, modules)
    for name, module in modules.items():
        if module in swaps:
            parent, _, attribute = name.rpartition(".")
            if not name:
                raise ValueError("the model itself is one layer; convert it first, its place cannot be changed")
            setattr(modules[parent], attribute, swaps[module])
    for module, attribute, tensor in parameters:
        old = getattr(module, attribute)
        moved = tensor.to(device=old.device, dtype=tensor.dtype if tensor.dtype == torch.int8 else old.dtype)
        setattr(module, attribute, nn.Parameter(moved, requires_grad=old.requires_grad))
    _load(model, state, given, strict)


def _check_shape(name: str, weight: Weight, expected: tuple[int, ...]) -> None:
    if weight.shape != expected:
        raise ValueError(f"weight {name!r} has shape {weight.shape} in the file, {expected} in the model")


def _parts(name: str, weight: Weight) -> dict[str, Tensor]:
    """What the state_dict of a sparse module has for this weight."""
    assert isinstance(weight.tensor, SparseTensor)
    parts = {prefix_of(name) + part: t for part, t in weight.tensor.packed.tensors().items()}
    if len(weight.shape) > 2:
        parts[prefix_of(name) + ORDER_FLAG] = torch.tensor(weight.order == "rsc")
    return parts


def _for_sparse_module(name: str, weight: Weight, module: SparseModule) -> dict[str, Tensor]:
    """The parts where the module stores weights the same way; else the dense weight, which it packs."""
    if isinstance(weight.tensor, SparseTensor) and weight.order != "n":
        packed = weight.tensor.packed
        same = packed.format == module.format and packed.dims == module.packed.dims
        if same and (packed.scale is None) == (module.scale is None):
            return _parts(name, weight)
    dense = weight.dense()
    try:
        module.pack(dense)  # before anything is changed
    except ValueError as error:
        raise ValueError(f"weight {name!r} does not fit the model's {module.format} module: {error}") from None
    return {name: dense}


def _convertible(module: nn.Module, weight: Weight) -> bool:
    """Exactly these classes, because a subclass may read its weight in ways of its own."""
    assert isinstance(weight.tensor, SparseTensor)
    if type(module) is nn.Conv2d:
        return weight.tensor.packed.scale is None and len(weight.shape) == 4
    return type(module) is nn.Linear and weight.order == "k" and len(weight.shape) == 2


def _sparse_twin(module: nn.Module, weight: Weight) -> SparseModule:
    """The sparse module in the place of a dense one, on its device and in its type."""
    assert isinstance(weight.tensor, SparseTensor)
    dense: Any = module
    packed: Layout = weight.tensor.packed
    device = "cpu" if dense.weight.device.type == "meta" else dense.weight.device
    if isinstance(module, nn.Linear):
        packed = packed.to(device=device, dtype=None if packed.dtype == torch.int8 else dense.weight.dtype)
        made: SparseModule = SparseLinear.from_packed(packed)
        made.bias = dense.bias
        made.values.requires_grad_(dense.weight.requires_grad and packed.dtype != torch.int8)
        return made.train(module.training)
    shell = copy.copy(dense)
    values = weight.dense().to(device=device, dtype=dense.weight.dtype)
    shell._parameters = {**dense._parameters, "weight": nn.Parameter(values, dense.weight.requires_grad)}
    block: Any = packed.dims[2:] or 16
    return SparseConv2d.from_dense(shell, format=packed.format, block_size=block, order=weight.order)


def _check_state(model: nn.Module, state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Everything that load_state_dict would find out half-way."""
    own = model.state_dict()
    for key, t in state.items():
        owner, _, attribute = key.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, SparseModule) and attribute in (*module.packed.tensors(), ORDER_FLAG, "weight"):
            if attribute == "values":
                _check_parts(key, state, module)
        elif key in own and own[key].shape != t.shape:
            expected = tuple(own[key].shape)
            raise ValueError(f"{key!r} has shape {tuple(t.shape)} in the file, {expected} in the model")


def _check_parts(key: str, state: Mapping[str, Tensor], module: SparseModule) -> None:
    names = [name for name in module.packed.tensors() if name != "scale" or module.scale is not None]
    prefix = key[: -len("values")]
    try:
        SparseModule._packed_from(module, dict(state), prefix, tuple(names))
    except ValueError as error:
        raise ValueError(f"{prefix.rstrip('.') or 'the model'}: {error}") from None


def _load(model: nn.Module, state: Mapping[str, Tensor], given: set[str], strict: bool) -> None:
    assign = any(p.device.type == "meta" for p in model.parameters())
    try:
        result = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    missing = [key for key in result.missing_keys if key not in given]
    if strict and (missing or result.unexpected_keys):
        raise RuntimeError(
            f"the checkpoint and the model differ: missing {missing or 'nothing'}, "
            f"unexpected {result.unexpected_keys or 'nothing'} (strict=False ignores that)"
        )
