"""Pruning a module or a whole model in place: a criterion's scores, a pattern's masks, put on the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import score
from .groups import Slice
from .mask import finalize_, mask_of, set_mask
from .pattern import STRUCTURAL, Layers, Pattern, min_of, pattern_of
from .structure import container_of, drop_layers_, groups_of, layer_shapes, mask_groups_

Filter = Callable[[nn.Module, str], bool]
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
    weight matters: a name that `score.scores` knows, with its `data`, `loss` and `options`; a function
    (module, name) -> scores shaped like the weight; or {layer: scores}. p: weights join to blocks as sum
    |w|^p (inf: the largest). filter_fn(module, name) chooses the layers.

    Weight patterns prune Linears and Conv2ds. With keep_mask the mask stays through fine-tuning as a
    parametrization (end it with `finalize_`, or let `convert_` do so); else the zeros are written into the
    weight and nothing is left. What is masked already stays so: pruning again goes further.

    Channels and Heads mask all that belongs to a unit, `shrink_` then makes the layers smaller. Channels
    need a `sample` of the model's inputs (default: the first batch of data). Layers are taken out at once.

    Returns the share removed by layer, of structural patterns by group. Layers that cannot be pruned (a
    foreign parametrization, a weight tied to something that is no Linear or Conv2d, no parameter of its own)
    are left alone with a warning that says why. Raises ValueError for settings that cannot be.
    """
    rule = pattern_of(pattern)
    if data is not None and not isinstance(data, (list, tuple)):
        data = list(data)  # scores and sample both read it
    ask = _Scores(model, criterion, data, loss, p, options)
    if isinstance(rule, STRUCTURAL):
        sample = _first(data) if sample is None and data else sample
        return _structural(model, rule, sparsity, ask, data, sample, filter_fn, keep_mask)
    targets = _targets(model, filter_fn)
    if isinstance(sparsity, Mapping):
        _check_names(sparsity, targets)
        targets = [(name, module) for name, module in targets if name in sparsity]
        shares: Any = [sparsity[name] for name, _ in targets]
    else:
        shares = sparsity
    masks = rule.masks(ask.weights(targets), shares, p=p, alive=_alive([module for _, module in targets]))
    for (_, module), mask in zip(targets, masks, strict=True):
        set_mask(module, mask, pattern=rule)
    by_weight = {id(weight_parameter(module)): mask for (_, module), mask in zip(targets, masks, strict=True)}
    for _, module in _twins(model, by_weight, targets):
        set_mask(module, by_weight[id(weight_parameter(module))], pattern=rule)
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
            shape, got = module.weight.shape, found[name].shape  # type: ignore[union-attr]
            if shape != got:
                raise ValueError(
                    f"{name}: the criterion gives scores of shape {tuple(got)} for a weight {tuple(shape)}; "  # type: ignore[arg-type]
                    "one score per channel suits the pattern 'channels'"
                )
        return [found[name] for name, _ in targets]

    def named(self, targets: list[tuple[str, nn.Module]]) -> dict[str, Tensor]:
        if isinstance(self.criterion, Mapping):
            missing = [name for name, _ in targets if name not in self.criterion]
            if missing:
                raise ValueError(f"the criterion has no scores for {', '.join(missing)}")
            return dict(self.criterion)
        if callable(self.criterion):
            return {name: self.criterion(module, name) for name, module in targets}
        return score_by_name(self.model, self.criterion, targets, self.data, self.loss, self.p, self.options)

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


def score_by_name(
    model: nn.Module,
    criterion: str,
    targets: list[tuple[str, nn.Module]],
    data: Iterable[Any] | None,
    loss: Callable[..., Tensor] | None,
    p: float,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """{layer: scores} of a criterion known by its name."""
    if criterion == "magnitude":
        return {name: score.magnitude(module.weight, p) for name, module in targets}  # type: ignore[arg-type]
    if criterion == "random":
        generator = torch.Generator().manual_seed(options.get("seed", 0))
        return {n: torch.rand(m.weight.shape, generator=generator) for n, m in targets}  # type: ignore[arg-type, union-attr]
    raise ValueError(f"criterion must be 'magnitude' or 'random', got {criterion!r}")


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
    layers = {s.layer: s.module for g in groups for s in g.slices if s.role in ("out", "in") and _prunable(s.module)}
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
    inside = [(f"{name}.{n}" if n else name, m) for n, m in layer.named_modules() if _prunable(m)]
    scores = ask.named(inside)
    count = sum(scores[n].numel() for n, _ in inside)
    return sum(float(scores[n].double().sum()) for n, _ in inside) / count if count else 0.0


@torch.no_grad()
def _run(model: nn.Module, batches: list[Any]) -> None:
    training = model.training
    model.eval()
    for batch in batches:
        inputs = _first([batch])
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    model.train(training)


def _first(data: Iterable[Any]) -> Any:
    """The model's inputs in the first batch; of (inputs, labels), as loaders give it, the inputs."""
    batch = next(iter(data))
    return batch[0] if isinstance(batch, (tuple, list)) else batch


# Which layers -----------------------------------------------------------------------------------------------


def _prunable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _check_names(sparsity: Mapping[str, float], targets: list[tuple[str, nn.Module]]) -> None:
    unknown = set(sparsity) - {name for name, _ in targets}
    if unknown:
        raise ValueError(f"no layer that can be pruned is called {', '.join(sorted(unknown))}")


def _alive(modules: list[nn.Module]) -> list[Tensor] | None:
    """What earlier masks left of each weight; None where there is no mask."""
    masks = [mask_of(module) for module in modules]
    if not any(m is not None for m in masks):
        return None
    return [
        m.mask if m is not None else torch.ones_like(module.weight, dtype=torch.bool)  # type: ignore[arg-type]
        for m, module in zip(masks, modules, strict=True)
    ]


def _targets(model: nn.Module, filter_fn: Filter | None) -> list[tuple[str, nn.Module]]:
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
