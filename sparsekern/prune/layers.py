"""Which layers can be pruned, and how their weights are read as a matrix W[N, K].

Linear [N, K], Conv2d [N, C / groups, R, S], and the Conv1D of transformers (GPT-2), which keeps [K, N]; it is known
by its name and attributes, so that transformers need not be there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import patterns
from .mask import mask_of

Filter = Callable[[nn.Module, str], bool]


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D: y = x W + b with W [in, out]; `nf` is the number of outputs."""
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_layer(module: nn.Module) -> bool:
    """True for the kinds of layers that can be pruned."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or is_conv1d(module)


def weight_of(module: Any) -> Tensor:
    """The weight as the layer's forward sees it: masked, where there is a mask."""
    return module.weight


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Output features first: a Conv1D's [K, N] as [N, K], anything else as it is. Its own inverse."""
    return tensor.t() if is_conv1d(module) else tensor


def as_matrix(module: nn.Module, tensor: Tensor, order: str = "crs") -> Tensor:
    """A tensor shaped like the layer's weight as [N, K]; `order` is the K order of a convolution."""
    return patterns.as_matrix(tensor, order) if tensor.dim() > 2 else oriented(module, tensor)


def as_weight(module: nn.Module, matrix: Tensor, order: str = "crs") -> Tensor:
    """[N, K] in the shape of the layer's weight: undoes `as_matrix`."""
    shape = tuple(weight_of(module).shape)
    return patterns.as_weight(matrix, shape, order) if len(shape) > 2 else oriented(module, matrix)


def outputs(module: nn.Module) -> int:
    """N, the number of output features or channels."""
    return oriented(module, weight_of(module)).shape[0]


def groups(module: nn.Module) -> int:
    """Groups of a convolution, 1 for a matrix: rows of different groups see different inputs."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def weight_parameter(module: Any) -> nn.Parameter | None:
    """The parameter behind `module.weight`, masked or not; None where there is no single one."""
    if mask_of(module) is not None:
        original = getattr(module.parametrizations["weight"], "original", None)
        return original if isinstance(original, nn.Parameter) else None
    weight = module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def layers(model: nn.Module, filter_fn: Filter | None = None) -> list[tuple[str, nn.Module]]:
    """(name, module) of the layers to prune, in the order of `named_modules`; a shared weight appears once.

    filter_fn(module, name) chooses among them. Layers that cannot be pruned are left out with a warning that says why.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    found, seen = [], set()
    for name, module in model.named_modules():
        if not is_layer(module) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        reason = _why_not(module, users)
        if reason is not None:
            warnings.warn(f"{name or type(module).__name__} is not pruned: {reason}", stacklevel=3)
            continue
        weight = weight_parameter(module)
        if id(weight) not in seen:
            seen.add(id(weight))
            found.append((name, module))
    return found


def sharing(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The layers of the model that use this layer's weight, itself included."""
    own = weight_parameter(module)
    if own is None:
        return [module]
    return [m for m in model.modules() if m is module or (is_layer(m) and weight_parameter(m) is own)]


def _why_not(module: nn.Module, users: dict[int, list[nn.Module]]) -> str | None:
    if parametrize.is_parametrized(module, "weight") and mask_of(module) is None:
        return "its weight has a parametrization of another kind"
    weight = weight_parameter(module)
    if weight is None:
        return "its weight is no parameter of its own (torch.nn.utils.prune? remove that mask first)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and not initialised yet"
    if weight.is_meta or not weight.is_floating_point():
        return f"its weight is {weight.dtype} on {weight.device}"
    others = [type(m).__name__ for m in users.get(id(weight), []) if not is_layer(m) and not _holds_mask(m)]
    if others:
        return f"its weight is tied to a {others[0]}, which would be pruned with it"
    return None


def _holds_mask(module: nn.Module) -> bool:
    """True for the list that torch keeps a parametrized weight in."""
    return isinstance(module, parametrize.ParametrizationList)
