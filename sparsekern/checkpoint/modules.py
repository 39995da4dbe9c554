"""Between checkpoints and models: the weights of a model, and a model filled with weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..nn.base import SparseModule
from ..nn.linear import SparseLinear
from ..tensor import SparseTensor, _wrap
from .native import prefix_of
from .weight import Weight


def weights_of(source: nn.Module | Mapping[str, Any]) -> Iterator[tuple[Weight, str | None]]:
    """(weight, the name of the weight it is tied to, or None) for all that a model or a state_dict holds."""
    state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    modules = dict(_sparse_modules(source)) if isinstance(source, nn.Module) else {}
    owned = {prefix + part: prefix for prefix, m in modules.items() for part in m.packed.tensors()}
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
    """Puts weights into a model, dense or sparse; nn.Linear and nn.Conv2d whose weight is sparse become
    sparse.

    Shapes are compared before anything is changed. `raw` goes to load_state_dict as it is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    state: dict[str, Tensor] = dict(raw)
    swaps: dict[nn.Module, SparseModule] = {}
    parameters: list[tuple[nn.Module, str, SparseTensor]] = []
    given: set[str] = set()  # keys of the new state_dict that need no loading
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        if not isinstance(weight.tensor, SparseTensor) or module is None:
            state[name] = weight.dense()
        elif attribute == "weight" and isinstance(module, SparseModule):
            _check_shape(name, weight, tuple(module.dense_shape))
            state.update(_for_sparse_module(name, weight, module))
        elif attribute == "weight" and _convertible(module) and weight.order != "n":
            _check_shape(name, weight, tuple(module.weight.shape))
            made = swaps.get(module) or _sparse_twin(module, weight)
            swaps[module] = made
            given.update(prefix_of(name) + part for part in made.packed.tensors())
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
                raise ValueError(
                    "the model itself is one layer; convert it first, its place cannot be changed"
                )
            setattr(modules[parent], attribute, swaps[module])
    for module, attribute, tensor in parameters:
        old = getattr(module, attribute)
        moved = tensor.to(device=old.device, dtype=tensor.dtype if tensor.dtype == torch.int8 else old.dtype)
        setattr(module, attribute, nn.Parameter(moved, requires_grad=old.requires_grad))
    _load(model, state, given, strict)


def _sparse_conv() -> Any:
    from .. import nn as sparse_nn

    return getattr(sparse_nn, "SparseConv2d", None)


def _convertible(module: nn.Module) -> bool:
    """Exactly these classes: a subclass may read its weight in ways of its own."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and _sparse_conv() is not None)


def _check_shape(name: str, weight: Weight, expected: tuple[int, ...]) -> None:
    if weight.shape != expected:
        raise ValueError(f"weight {name!r} has shape {weight.shape} in the file, {expected} in the model")


def _for_sparse_module(name: str, weight: Weight, module: SparseModule) -> dict[str, Tensor]:
    """The parts where the module stores weights the same way; else the dense weight, which it packs."""
    assert isinstance(weight.tensor, SparseTensor)
    packed = weight.tensor.packed
    same_order = len(weight.shape) == 2 or weight.order == getattr(module, "order", "crs")
    quantised = (packed.scale is None) == (module.scale is None)
    if (
        packed.format == module.format
        and packed.dims == module.operand.dims[: len(packed.dims)]
        and same_order
        and quantised
    ):
        return {prefix_of(name) + part: t for part, t in packed.tensors().items()}
    return {name: weight.dense()}


def _sparse_twin(module: nn.Module, weight: Weight) -> SparseModule:
    assert isinstance(weight.tensor, SparseTensor)
    dense: Any = module
    packed: Layout = weight.tensor.packed
    if dense.weight.device.type != "meta":
        packed = packed.to(device=dense.weight.device)
    if packed.dtype != torch.int8:
        packed = packed.to(dtype=dense.weight.dtype)
    if isinstance(module, nn.Linear):
        made: SparseModule = SparseLinear.from_packed(packed)
    else:
        made = _sparse_conv().from_packed(packed, module, order=weight.order)
    made.bias = dense.bias
    if made.values.is_floating_point():
        made.values.requires_grad_(dense.weight.requires_grad)
    return made.train(module.training)


def _check_state(model: nn.Module, state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    own = model.state_dict()
    for key, t in state.items():
        if (
            key in own
            and own[key].shape != t.shape
            and not isinstance(modules.get(key.rpartition(".")[0]), SparseModule)
        ):
            raise ValueError(
                f"{key!r} has shape {tuple(t.shape)} in the file, {tuple(own[key].shape)} in the model"
            )


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
