"""Channels, attention heads and layers: what is removed whole, first as masks, then for good.

`mask_groups_` masks the units of groups that a pattern lets go; `shrink_` cuts what is masked out of the
model, so that dense layers become smaller; `drop_layers_` takes out whole layers. The masked model and the
smaller one compute the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import head_groups
from .groups import BATCH_NORMS, CONVS, Group, Slice, channel_groups
from .mask import finalize_, mask_of, masks_of, set_mask
from .pattern import Channels, Heads, Layers, min_of, select

Filter = Callable[[nn.Module, str], bool]


def groups_of(model: nn.Module, pattern: Channels | Heads, sample: Any, filter_fn: Filter | None = None) -> list[Group]:
    """The groups that a pattern is about: of channels (traced on the sample), or of heads."""
    if isinstance(pattern, Heads):
        found = head_groups(model, filter_fn)
        if not found:
            raise ValueError("no attention was found: an nn.MultiheadAttention, or Linears q, k, v and an output")
        return found
    if sample is None:
        raise ValueError("channels are followed through the model by running it: pass sample= (or data=)")
    return channel_groups(model, sample, filter_fn)


@torch.no_grad()
def mask_groups_(
    groups: Sequence[Group],
    pattern: Channels | Heads,
    sparsity: float | Mapping[str, float] | None,
    scores: Callable[[Slice], Tensor | None],
) -> dict[str, float]:
    """Masks the units of least score in every group; returns the share of units removed, by group.

    `scores(slice)` gives the scores of a slice's parameter, shaped like it (or one per entry of its dim 0),
    or None where it has none. sparsity: the share of units, or one per layer (a group takes that of its
    first producer; a group without one stays). Units already masked stay so.
    """
    if sparsity is None:
        raise ValueError("this pattern needs a sparsity: the share of units to remove, in [0, 1]")
    chosen, shares = [], []
    for g in groups:
        named = [sparsity[n] for n in (g.name, *g.producers) if n in sparsity] if isinstance(sparsity, Mapping) else []
        share = named[0] if named else None if isinstance(sparsity, Mapping) else float(sparsity)
        if share is not None:
            if not 0 <= share <= 1:
                raise ValueError(f"sparsity is the share of units to remove, in [0, 1]; got {share}")
            chosen.append(g)
            shares.append(share)
    units = []
    for g in chosen:
        found = _unit_scores(g, pattern, scores)
        units.append(found.masked_fill(removed(g), -math.inf)[None])
    kept = select(units, shares, pattern.per, pattern.min_keep)
    result = {}
    for g, scored, keep in zip(chosen, units, kept, strict=True):
        final = _rounded(keep[0], scored[0], pattern)
        mask_units_(g, ~final)
        result[g.name] = 1 - float(final.float().mean())
    return result


def _unit_scores(group: Group, pattern: Channels | Heads, scores: Callable[[Slice], Tensor | None]) -> Tensor:
    """[units]: the sum of a unit's scores, for a global scope the mean."""
    whole = isinstance(pattern, Heads) or pattern.over == "group"
    total, count = torch.zeros(group.units, dtype=torch.float64), 0
    for s in group.role("out", "in") if whole else group.role("out"):
        if s.parameter.endswith("bias"):
            continue
        found = scores(s)
        if found is None or (found.dim() == 1 and s.dim != 0):
            continue
        picked = found.detach().double().cpu().movedim(s.dim if found.dim() > 1 else 0, 0)[s.index].flatten(1)
        total += picked.sum(1)
        count += picked.shape[1]
    if not count:
        raise ValueError(f"{group.name}: the criterion scores none of its layers")
    return total / count if pattern.per == "global" else total


def _rounded(keep: Tensor, scores: Tensor, pattern: Channels | Heads) -> Tensor:
    """At least min_keep units, and a multiple of round_to of them; never one that was removed before."""
    count = max(int(keep.sum()), min_of(pattern.min_keep, len(keep)))
    if isinstance(pattern, Channels):
        count = min(len(keep), -(-count // pattern.round_to) * pattern.round_to)
    order = scores.masked_fill(keep & (scores > -math.inf), math.inf).argsort(descending=True, stable=True)
    final = torch.zeros_like(keep)
    final[order[:count]] = True
    return final & (scores > -math.inf)


def removed(group: Group) -> Tensor:
    """bool [units]: the units that no longer matter, because all that reads them is zero.

    Where a layer norm sees them, and so mixes them with others, all that makes and scales them must be zero
    as well.
    """
    slices = group.role("in")
    if any(isinstance(s.module, nn.LayerNorm) for s in group.slices):
        slices = group.role("in", "out", "through")
    gone = torch.ones(group.units, dtype=torch.bool)
    for s in slices:
        nonzero = (getattr(s.module, s.parameter).detach() != 0).movedim(s.dim, 0).cpu()
        gone &= ~nonzero[s.index].flatten(1).any(1)
    return gone


def mask_units_(group: Group, gone: Tensor) -> None:
    """Masks every slice of these units, in all the layers of the group."""
    for s in group.slices:
        if s.role == "buffer":
            continue
        known = mask_of(s.module, s.parameter)
        value = getattr(s.module, s.parameter)
        mask = (
            known.mask.clone() if known is not None else torch.ones(value.shape, dtype=torch.bool, device=value.device)
        )
        mask.movedim(s.dim, 0)[s.index[gone].flatten().to(mask.device)] = False
        set_mask(s.module, mask, s.parameter)


@dataclass(frozen=True)
class Cut:
    """What `shrink_` did with one group: how many units of how many are left, and in which layers."""

    name: str
    kind: str
    before: int
    after: int
    layers: tuple[str, ...]


@torch.no_grad()
def shrink_(
    model: nn.Module, sample: Any = None, *, heads: bool = True, channels: bool = True, filter_fn: Filter | None = None
) -> list[Cut]:
    """Cuts removed channels and heads out of a model, in place: smaller dense layers, the same outputs.

    A unit is cut where all that reads it is zero (whatever pruned it), at least one of every group stays.
    sample: inputs on which torch.fx follows the channels; without one only heads are cut. Masks of other
    patterns are cut along and stay. Layer norms become ones that count the cut channels as zeros.
    Parameters that change shape are new ones: make the optimizer afterwards. Returns what was cut.
    """
    cuts = []
    masks = masks_of(model)
    finalize_(model)
    kinds = ([head_groups(model, filter_fn)] if heads else []) + (
        [channel_groups(model, sample, filter_fn)] if channels and sample is not None else []
    )
    for groups in kinds:
        plans: dict[tuple[int, str, int], tuple[Slice, Tensor]] = {}
        for group in groups:
            gone = removed(group)
            if bool(gone.all()):
                gone[0] = False
            if not bool(gone.any()):
                continue
            for s in group.slices:
                place = (id(s.module), s.parameter, s.dim)
                drop = s.index[gone].flatten()
                earlier = plans.get(place)
                plans[place] = (s, drop if earlier is None else torch.cat((earlier[1], drop)))
            kept = (~gone).nonzero().flatten()
            layers = tuple(dict.fromkeys(s.layer for s in group.slices))
            cuts.append(Cut(group.name, group.kind, group.units, len(kept), layers))
            if group.after is not None:
                group.after(kept)
        for s, drop in plans.values():
            _cut(s, drop, masks)
        for module in {id(s.module): s.module for s, _ in plans.values()}.values():
            _refresh(module)
    _restore(model, masks)
    return cuts


def _cut(s: Slice, drop: Tensor, masks: dict[str, Tensor]) -> None:
    value = getattr(s.module, s.parameter)
    stay = torch.ones(value.shape[s.dim], dtype=torch.bool)
    stay[drop] = False
    keep = stay.nonzero().flatten().to(value.device)
    smaller = value.detach().index_select(s.dim, keep).clone()
    if isinstance(value, nn.Parameter):
        setattr(s.module, s.parameter, nn.Parameter(smaller, requires_grad=value.requires_grad))
    else:
        s.module._buffers[s.parameter] = smaller
    if s.key in masks:
        masks[s.key] = masks[s.key].index_select(s.dim, keep.to(masks[s.key].device))
    if isinstance(s.module, nn.LayerNorm):
        s.module.__dict__.setdefault("of", s.module.normalized_shape[0])


def _refresh(module: Any) -> None:
    """The sizes that a layer states, from its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVS):
        if module.groups == module.in_channels and module.groups > 1:
            multiplier = module.out_channels // module.groups
            module.groups = module.in_channels = module.weight.shape[0] // multiplier
        else:
            module.in_channels = module.weight.shape[1] * module.groups
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, BATCH_NORMS):
        sizes = [t for t in (module.weight, module.running_mean) if t is not None]
        module.num_features = sizes[0].shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (module.weight.shape[0],)
        module.__class__ = NarrowLayerNorm


def _restore(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for key, mask in masks.items():
        owner, _, parameter = key.rpartition(".")
        if not bool(mask.all()):
            set_mask(modules[owner], mask, parameter)


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm over channels some of which were cut: (x - mean) / sqrt(var + eps) * weight + bias, where
    mean and var are those over all `of` channels, the cut ones being zeros.

    mean = sum(x) / of, var = sum(x²) / of - mean². `shrink_` turns a module into one.
    """

    of: int

    def forward(self, input: Tensor) -> Tensor:
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        mean = x.sum(-1, keepdim=True) / self.of
        cut = self.of - x.shape[-1]
        var = ((x - mean).square().sum(-1, keepdim=True) + cut * mean.square()) / self.of
        out = ((x - mean) * (var + self.eps).rsqrt()).to(input.dtype) * self.weight
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, of={self.of}"


# Whole layers -----------------------------------------------------------------------------------------------


def container_of(model: nn.Module, pattern: Layers) -> tuple[str, Any]:
    """The Sequential or ModuleList whose elements can be taken out."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 1}
    if pattern.container is not None:
        if pattern.container not in found:
            raise ValueError(f"the model has no Sequential or ModuleList {pattern.container!r}")
        return pattern.container, found[pattern.container]
    if not found:
        raise ValueError("the model has no Sequential or ModuleList of layers")
    name = max(found, key=lambda n: len(found[n]))
    return name, found[name]


@torch.no_grad()
def layer_shapes(model: nn.Module, container: Any, run: Callable[[], None]) -> dict[int, tuple[bool, float]]:
    """index -> (whether a layer's output has its input's shape, 1 - mean cos(input, output)), of one run."""
    seen: dict[int, list[tuple[bool, float]]] = {}

    def hook(i: int) -> Callable[..., None]:
        def look(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            x, y = args[0] if args else None, out[0] if isinstance(out, tuple) else out
            if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
                seen.setdefault(i, []).append((False, math.inf))
                return
            a, b = (t.double().reshape(-1, t.shape[-1]) for t in (x, y))
            seen.setdefault(i, []).append((True, 1 - float(nn.functional.cosine_similarity(a, b, dim=-1).mean())))

        return look

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(container)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {i: (all(s for s, _ in calls), sum(c for _, c in calls) / len(calls)) for i, calls in seen.items()}


def drop_layers_(container: Any, indices: Sequence[int]) -> None:
    """Takes elements out of a Sequential or ModuleList; the elements after them move up."""
    for i in sorted(indices, reverse=True):
        del container[i]
