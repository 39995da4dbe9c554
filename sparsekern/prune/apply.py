"""Magnitude pruning of a module or a whole model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import score
from .mask import finalize_, mask_of, set_mask
from .pattern import Pattern, Unstructured, pattern_of


@torch.no_grad()
def magnitude_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    sparsity: float | None = None,
    *,
    p: float = 1.0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    keep_mask: bool = True,
) -> dict[str, float]:
    """Removes the weights of least |w|^p that the pattern lets go, from Linears and Conv2ds, in place.

    pattern: "2:4", "unstructured" (inside each weight), "row", "global" (one threshold for the whole
    model), "block", or a Pattern (NM, Unstructured, Block); sparsity: the share to remove, for all but N:M,
    which has its own. filter_fn(module, name) chooses the layers. With keep_mask the mask stays through
    fine-tuning as a parametrization (end it with `finalize_`, or let `convert_` do so); else the zeros are
    written into the weight and nothing is left. A layer that is already masked is pruned further from its
    masked weight.

    Returns the sparsity reached, by layer. Layers that cannot be pruned (a foreign parametrization, a
    weight tied to something that is no Linear or Conv2d, no parameter of its own) are left alone with a
    warning that says why.
    """
    rule = pattern_of(pattern)
    targets = _targets(model, filter_fn)
    scores = [score.magnitude(module.weight, p) for _, module in targets]  # type: ignore[arg-type]
    if isinstance(rule, Unstructured) and rule.scope == "global":
        masks = rule.masks(scores, sparsity)
    else:
        masks = [rule.mask(s, sparsity, p) for s in scores]
    for (_, module), mask in zip(targets, masks, strict=True):
        set_mask(module, mask)
    by_weight = {id(weight_parameter(module)): mask for (_, module), mask in zip(targets, masks, strict=True)}
    for _, module in _twins(model, by_weight, targets):
        set_mask(module, by_weight[id(weight_parameter(module))])
    if not keep_mask:
        finalize_(model)
    return {name: 1 - density(mask) for (name, _), mask in zip(targets, masks, strict=True)}


def density(mask: Tensor) -> float:
    """The share of True (or nonzero) entries; 0 for an empty tensor."""
    return int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 0.0


def weight_parameter(module: Any) -> nn.Parameter | None:
    """The parameter behind `module.weight`, masked or not; None where there is no single one."""
    if mask_of(module) is not None:
        original = getattr(module.parametrizations["weight"], "original", None)
        return original if isinstance(original, nn.Parameter) else None
    weight = module._parameters.get("weight")
    return weight if isinstance(weight, nn.Parameter) else None


def _prunable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _targets(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None) -> list[tuple[str, nn.Module]]:
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    targets, seen = [], set()
    for name, module in model.named_modules():
        if not _prunable(module) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        reason = _why_not(module, users)
        if reason is not None:
            warnings.warn(f"{name or type(module).__name__} is not pruned: {reason}", stacklevel=3)
            continue
        weight = weight_parameter(module)
        if id(weight) not in seen:
            seen.add(id(weight))
            targets.append((name, module))
    return targets


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
    others = [type(m).__name__ for m in users.get(id(weight), []) if not _prunable(m) and not _holds_mask(m)]
    if others:
        return f"its weight is tied to a {others[0]}, which would be pruned with it"
    return None


def _holds_mask(module: nn.Module) -> bool:
    """True for the list that torch keeps a parametrized weight in."""
    return isinstance(module, parametrize.ParametrizationList)


def _twins(
    model: nn.Module, by_weight: dict[int, Tensor], targets: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """Other layers that use a weight which was pruned: they get the same mask."""
    done = {id(module) for _, module in targets}
    return [
        (name, module)
        for name, module in model.named_modules()
        if _prunable(module) and id(module) not in done and id(weight_parameter(module)) in by_weight
    ]
