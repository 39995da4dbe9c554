"""Putting a module in another's place, everywhere in a model, with what hangs on it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .base import SparseModule

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
_STANDARD = set(nn.Linear(1, 1).__dict__) | set(nn.Conv2d(1, 1, 1).__dict__) | {"weight"}


def replace_(model: nn.Module, mapping: Mapping[int, nn.Module]) -> nn.Module:
    """Puts mapping[id(module)] wherever `module` is a child; returns the model, or its replacement."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in mapping:
                parent._modules[name] = mapping[id(child)]
    return mapping.get(id(model), model)


def adopt(dense: nn.Module, sparse: SparseModule) -> SparseModule:
    """Gives `sparse` the hooks and attributes of the layer that it replaces, and its class for the way back.

    Hooks keep working and their handles still remove them.
    """
    _share_hooks(dense, sparse)
    carried = {k: v for k, v in dense.__dict__.items() if k not in _STANDARD and k not in sparse.__dict__}
    sparse.__dict__.update(carried)
    sparse.__dict__["_carried"] = tuple(carried)
    sparse.__dict__["_dense_class"] = parametrize.type_before_parametrizations(dense)
    return sparse.train(dense.training)


def restore(model: nn.Module) -> nn.Module:
    """Every SparseModule becomes the dense layer that it was; returns the model, or its replacement."""
    mapping: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for sparse in model.modules():
        if not isinstance(sparse, SparseModule):
            continue
        dense = sparse.to_dense()  # type: ignore[operator]
        dense.weight = weights.setdefault(id(sparse.values), dense.weight)
        dense.__class__ = sparse.__dict__.get("_dense_class", type(dense))
        dense.__dict__.update({k: sparse.__dict__[k] for k in sparse.__dict__.get("_carried", ())})
        _share_hooks(sparse, dense)
        mapping[id(sparse)] = dense.train(sparse.training)
    return replace_(model, mapping)


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _HOOKS:
        target.__dict__[name] = source.__dict__[name]
    pruning = [k for k, hook in source._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)]
    if pruning:  # the mask is part of the weight now; the dense module keeps its own
        target._forward_pre_hooks = source._forward_pre_hooks.copy()
        for key in pruning:
            del target._forward_pre_hooks[key]
