"""Pruning a module or a whole model in place: a criterion's scores, a pattern's masks, put on the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import score
from .calibrate import evaluating, feed, repeatable
from .groups import Slice
from .layers import Filter, is_layer, layers, oriented, weight_of, weight_parameter
from .mask import finalize_, mask_of, set_mask
from .pattern import STRUCTURAL, Layers, Pattern, min_of, pattern_of
from .structure import container_of, drop_layers_, groups_of, layer_shapes, mask_groups_

Criterion = str | Callable[[nn.Module, str], Tensor] | Mapping[str, Tensor]


@torch.no_grad()
def prune_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    sparsity: float | Mapping[str, float] | None = None,
    criterion: Criterion = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    sample: Any = None,
    p: float = 1.0,
    filter_fn: Filter | None = None,
    keep_mask: bool = True,
    **options: Any,
) -> dict[str, float]:
    """Removes what matters least by a criterion and what a pattern lets go, in place.

    pattern: what may stay, a Pattern or its name (`pattern_of`); sparsity: the share to remove, for all but
    N:M, which has its own, or {layer: share}, where layers without one are left alone. criterion: how much a
    weight matters: a name that `scores` knows, with its `data`, `loss` and `options`; a function
    (module, name) -> scores shaped like the weight; or {layer: scores}. p: weights join to blocks as sum
    |w|^p (inf: the largest). filter_fn(module, name) chooses the layers.

    Weight patterns prune Linears, Conv2ds and transformers' Conv1Ds. With keep_mask the mask stays through
    fine-tuning as a parametrization (end it with `finalize_`, or let `convert_` do so); else the zeros are
    written into the weight and nothing is left. What is masked already stays so: pruning again goes further.

    Channels and Heads mask all that belongs to a unit, `shrink_` then makes the layers smaller. Channels
    need a `sample` of the model's inputs (default: the first batch of data). Layers are taken out at once.

    Returns the share removed by layer, of structural patterns by group. Layers that cannot be pruned (a
    foreign parametrization, a weight tied to something that is no Linear or Conv2d, no parameter of its own)
    are left alone with a warning that says why. Raises ValueError for settings that cannot be.
    """
    rule = pattern_of(pattern)
    data = None if data is None else repeatable(data)  # scores and sample both read it
    ask = _Scores(model, criterion, data, loss, p, options)
    if isinstance(rule, STRUCTURAL):
        if sample is None and data is not None and "forward" not in options:
            sample = next(iter(data), None)
        return _structural(model, rule, sparsity, ask, data, sample, filter_fn, keep_mask)
    targets = layers(model, filter_fn)
    if isinstance(sparsity, Mapping):
        _check_names(sparsity, targets)
        targets = [(name, module) for name, module in targets if name in sparsity]
        shares: Any = [sparsity[name] for name, _ in targets]
    else:
        shares = sparsity
    masks = rule.masks(ask.weights(targets), shares, p=p, alive=_alive([module for _, module in targets]))
    for (_, module), mask in zip(targets, masks, strict=True):
        set_mask(module, oriented(module, mask), pattern=rule)
    by_weight = {id(weight_parameter(module)): mask for (_, module), mask in zip(targets, masks, strict=True)}
    for _, module in _twins(model, by_weight, targets):
        set_mask(module, oriented(module, by_weight[id(weight_parameter(module))]), pattern=rule)
    if not keep_mask:
        finalize_(model)
    return {name: 1 - density(mask) for (name, _), mask in zip(targets, masks, strict=True)}


def magnitude_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    sparsity: float | Mapping[str, float] | None = None,
    *,
    p: float = 1.0,
    filter_fn: Filter | None = None,
    keep_mask: bool = True,
) -> dict[str, float]:
    """Removes the weights of least |w|^p that the pattern lets go: `prune_` by magnitude, which has it all."""
    return prune_(model, pattern, sparsity, "magnitude", p=p, filter_fn=filter_fn, keep_mask=keep_mask)


class _Scores:
    """What a criterion says, asked for once."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        data: Iterable[Any] | None,
        loss: Callable[..., Tensor] | None,
        p: float,
        options: dict[str, Any],
    ) -> None:
        self.model, self.criterion, self.data, self.loss, self.p = model, criterion, data, loss, p
        self.options = options

    def weights(self, targets: list[tuple[str, nn.Module]]) -> list[Tensor]:
        """The scores of these layers' weights, each of its weight's shape."""
        found = self.named(targets)
        for name, module in targets:
            shape, got = weight_of(module).shape, found[name].shape
            if shape != got:
                raise ValueError(
                    f"{name}: the criterion gives scores of shape {tuple(got)} for a weight {tuple(shape)}; "
                    "one score per channel suits the pattern 'channels'"
                )
        return [oriented(module, found[name]) for name, module in targets]

    def named(self, targets: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
        if isinstance(self.criterion, Mapping):
            missing = [name for name, _ in targets if name not in self.criterion]
            if missing:
                raise ValueError(f"the criterion has no scores for {', '.join(missing)}")
            return dict(self.criterion)
        if callable(self.criterion):
            return {name: self.criterion(module, name) for name, module in targets}
        options = {"p": self.p, **self.options} if self.criterion == "magnitude" else self.options
        chosen = {id(module) for _, module in targets}
        pick = lambda module, name: id(module) in chosen  # noqa: E731
        return score.scores(self.model, self.criterion, data=self.data, loss=self.loss, filter_fn=pick, **options)

    def slices(self, layers: list[tuple[str, nn.Module]]) -> Callable[[Slice], Tensor | None]:
        """The scores of the slices of groups; by magnitude also of parameters that are no layer's weight."""
        found = self.named(layers)

        def of(s: Slice) -> Tensor | None:
            if s.parameter == "weight" and s.layer in found:
                return found[s.layer]
            if self.criterion == "magnitude":
                return score.magnitude(getattr(s.module, s.parameter), self.p)
            return None

        return of


def density(mask: Tensor) -> float:
    """The share of True (or nonzero) entries; 0 for an empty tensor."""
    return int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 0.0


# Structures -------------------------------------------------------------------------------------------------


def _structural(
    model: nn.Module,
    rule: Any,
    sparsity: float | Mapping[str, float] | None,
    ask: _Scores,
    data: Iterable[Any] | None,
    sample: Any,
    filter_fn: Filter | None,
    keep_mask: bool,
) -> dict[str, float]:
    if isinstance(rule, Layers):
        return _layers(model, rule, sparsity, ask, data, sample)
    groups = groups_of(model, rule, sample, filter_fn)
    if isinstance(sparsity, Mapping):
        known = {name for g in groups for name in (g.name, *g.producers)}
        unknown = set(sparsity) - known
        if unknown:
            raise ValueError(f"no group of {rule} is made by {', '.join(sorted(unknown))}")
    layers = {s.layer: s.module for g in groups for s in g.slices if s.role in ("out", "in") and is_layer(s.module)}
    result = mask_groups_(groups, rule, sparsity, ask.slices(list(layers.items())))
    if not keep_mask:
        finalize_(model)
    return result


def _layers(
    model: nn.Module,
    rule: Layers,
    sparsity: float | Mapping[str, float] | None,
    ask: _Scores,
    data: Iterable[Any] | None,
    sample: Any,
) -> dict[str, float]:
    """Takes the layers of least score out of a container; by "influence" those that change their input least."""
    name, container = container_of(model, rule)
    names = [f"{name}.{i}" if name else str(i) for i in range(len(container))]
    if isinstance(sparsity, Mapping):
        unknown = set(sparsity) - set(names)
        if unknown:
            raise ValueError(f"{name!r} has no layer {', '.join(sorted(unknown))}")
        drop = [i for i, n in enumerate(names) if sparsity.get(n, 0) == 1]
    else:
        if sparsity is None or not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity is the share of layers to remove, in [0, 1]; got {sparsity}")
        batches = list(data) if data is not None else [] if sample is None else [sample]
        shapes = layer_shapes(model, container, lambda: _run(model, batches)) if batches else {}
        free = [i for i in range(len(names)) if not batches or shapes.get(i, (False, 0.0))[0]]
        if ask.criterion == "influence":
            if not batches:
                raise ValueError("the influence of a layer is measured: pass data= (or sample=)")
            worth = {i: shapes[i][1] for i in free}
        else:
            worth = {i: _mean_score(container[i], names[i], ask) for i in free}
        keep = max(round((1 - sparsity) * len(names)), min_of(rule.min_keep, len(names)))
        drop = sorted(free, key=lambda i: worth[i])[: len(names) - keep]
    drop_layers_(container, drop)
    return {n: float(i in drop) for i, n in enumerate(names)}


def _mean_score(layer: nn.Module, name: str, ask: _Scores) -> float:
    inside = [(f"{name}.{n}" if n else name, m) for n, m in layer.named_modules() if is_layer(m)]
    scores = ask.named(inside)
    count = sum(scores[n].numel() for n, _ in inside)
    return sum(float(scores[n].double().sum()) for n, _ in inside) / count if count else 0.0


def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    with evaluating(model):
        for batch in batches:
            feed(model, batch)


# Which layers -----------------------------------------------------------------------------------------------


def _check_names(sparsity: Mapping[str, float], targets: list[tuple[str, nn.Module]]) -> None:
    unknown = set(sparsity) - {name for name, _ in targets}
    if unknown:
        raise ValueError(f"no layer that can be pruned is called {', '.join(sorted(unknown))}")


def _alive(modules: list[nn.Module]) -> list[Tensor] | None:
    """What earlier masks left of each weight, outputs first; None where there is no mask."""
    masks = [mask_of(module) for module in modules]
    if not any(m is not None for m in masks):
        return None
    return [
        oriented(module, m.mask if m is not None else torch.ones_like(weight_of(module), dtype=torch.bool))
        for m, module in zip(masks, modules, strict=True)
    ]


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
