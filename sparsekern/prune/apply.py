"""Magnitude pruning of a module or a whole model, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import score
from .layers import Filter, is_layer, layers, oriented, weight_of, weight_parameter
from .mask import finalize_, set_mask
from .pattern import Pattern, Unstructured, pattern_of


@torch.no_grad()
def magnitude_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    sparsity: float | None = None,
    *,
    p: float = 1.0,
    filter_fn: Filter | None = None,
    keep_mask: bool = True,
) -> dict[str, float]:
    """Removes the weights of least |w|^p that the pattern lets go, from Linears, Conv2ds and Conv1Ds, in place.

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
    targets = layers(model, filter_fn)
    scores = [score.magnitude(oriented(module, weight_of(module)), p) for _, module in targets]
    if isinstance(rule, Unstructured) and rule.scope == "global":
        masks = rule.masks(scores, sparsity)
    else:
        masks = [rule.mask(s, sparsity, p) for s in scores]
    for (_, module), mask in zip(targets, masks, strict=True):
        set_mask(module, oriented(module, mask))
    by_weight = {id(weight_parameter(module)): mask for (_, module), mask in zip(targets, masks, strict=True)}
    for _, module in _twins(model, by_weight, targets):
        set_mask(module, oriented(module, by_weight[id(weight_parameter(module))]))
    if not keep_mask:
        finalize_(model)
    return {name: 1 - density(mask) for (name, _), mask in zip(targets, masks, strict=True)}


def density(mask: Tensor) -> float:
    """The share of True (or nonzero) entries; 0 for an empty tensor."""
    return int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 0.0


def _twins(
    model: nn.Module, by_weight: dict[int, Tensor], targets: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """Other layers that use a weight which was pruned: they get the same mask."""
    done = {id(module) for _, module in targets}
    return [
        (name, module)
        for name, module in model.named_modules()
        if is_layer(module) and id(module) not in done and id(weight_parameter(module)) in by_weight
    ]
