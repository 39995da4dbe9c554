"""What is added to a loss so that training itself makes weights small: L1, group lasso, batch-norm scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .groups import BATCH_NORMS
from .layers import Filter, layers, oriented, weight_of
from .pattern import Channels, Pattern, _Units, pattern_of


def l1(model: nn.Module, strength: float = 1e-4, filter_fn: Filter | None = None) -> Tensor:
    """strength * sum |w| over the weights of the layers that can be pruned; a scalar with a gradient.

    Tibshirani 1996; Han et al. 2015 (arXiv 1506.02626) compare it with L2 before pruning.
    """
    return strength * _sum([weight_of(m).abs().sum() for _, m in layers(model, filter_fn)], model)


def group_lasso(
    model: nn.Module, pattern: Pattern | str = "block", strength: float = 1e-4, filter_fn: Filter | None = None
) -> Tensor:
    """strength * sum_g sqrt(|g|) ||w_g||_2 over the units g of a pattern (blocks, vectors, channels); a scalar.

    Drives whole units to zero together, so that pruning them later costs little. Yuan & Lin 2006; Wen et
    al. 2016, structured sparsity learning (arXiv 1608.03665). Raises ValueError for a pattern without units.
    """
    rule = pattern_of(pattern)
    terms = []
    for _, module in layers(model, filter_fn):
        weight = oriented(module, weight_of(module))
        if isinstance(rule, Channels):
            squares, size = weight.square().flatten(1).sum(1), torch.tensor(weight.numel() / max(1, weight.shape[0]))
        elif isinstance(rule, _Units):
            squares, size = rule.units(weight.square()), rule.units(torch.ones_like(weight))
        else:
            raise ValueError(f"{rule!r} has no groups of its own: use blocks, vectors or channels")
        terms.append(((squares + 1e-24).sqrt() * size.sqrt()).sum())
    return strength * _sum(terms, model)


def bn_l1(model: nn.Module, strength: float = 1e-4) -> Tensor:
    """strength * sum |gamma| over all batch norms: small scales mark channels to remove; a scalar.

    Network slimming, Liu et al. 2017 (arXiv 1708.06519); prune with criterion "bn_scale" after.
    """
    scales = [m.weight for m in model.modules() if isinstance(m, BATCH_NORMS) and m.weight is not None]
    return strength * _sum([s.abs().sum() for s in scales], model)


def _sum(terms: list[Tensor], model: nn.Module) -> Tensor:
    if terms:
        return torch.stack(terms).sum()
    return next(model.parameters(), torch.zeros(())).new_zeros(())
