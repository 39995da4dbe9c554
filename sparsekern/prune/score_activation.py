"""Scores from what goes through a layer: Wanda, RIA, mean activation, APoZ, rank of feature maps (HRank)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import InputNorm, Watcher, followers, observe
from .layers import as_matrix, as_weight, outputs, weight_of
from .score import Request, Scores, criterion

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def wanda(matrix: Tensor, norm: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2 of W [N, K] and input norms [G, K], G groups of rows; [N, K]. Sun et al., 2306.11695."""
    rows = norm.repeat_interleave(matrix.shape[0] // norm.shape[0], 0)
    return matrix.detach().abs().to(norm.dtype) * rows


def ria(matrix: Tensor, norm: Tensor, alpha: float = 0.5) -> Tensor:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||_2^alpha of W [N, K], norms [G, K]. Returns [N, K].

    Relative importance and activations, Zhang et al. (Plug-and-Play), ICLR 2024; alpha = 0.5 is theirs. A row or column
    of zeros scores 0.
    """
    size = matrix.detach().abs().to(norm.dtype)
    grouped = size.unflatten(0, (norm.shape[0], -1))  # [G, N / G, K]: rows of one group see the same inputs
    tiny = torch.finfo(size.dtype).tiny
    relative = grouped / grouped.sum(2, keepdim=True).clamp_min(tiny)
    relative = relative + grouped / grouped.sum(1, keepdim=True).clamp_min(tiny)
    return (relative * norm.pow(alpha)[:, None]).flatten(0, 1)


def input_norms(request: Request, criterion: str) -> dict[str, Tensor]:
    """{layer: ||X_j||_2, [groups, K]} of all layers, in one pass. Raises ValueError where no token reaches one."""
    norms = {name: InputNorm() for name, _ in request.layers}
    watchers: dict[nn.Module, Watcher] = {module: norms[name] for name, module in request.layers}
    observe(request.model, request.batches(criterion), watchers, forward=request.forward, progress=request.progress)
    for name, found in norms.items():
        if not found.tokens:
            raise ValueError(f"{criterion}: no token reaches {name}; leave it out by filter_fn")
    return {name: found.norm for name, found in norms.items()}


@criterion("wanda", compare="row", needs_data=True)
def _wanda(request: Request) -> Scores:
    """|W_ij| ||X_j||_2, compared inside each output row (N:M: inside each group). Sun et al., 2306.11695."""
    norms = input_norms(request, "wanda")
    return {
        name: as_weight(module, wanda(as_matrix(module, weight_of(module)), norms[name]))
        for name, module in request.layers
    }


@criterion("ria", needs_data=True)
def _ria(request: Request, *, alpha: float = 0.5) -> Scores:
    """(|W_ij| / row sum + |W_ij| / column sum) ||X_j||_2^alpha. Zhang et al., ICLR 2024."""
    norms = input_norms(request, "ria")
    return {
        name: as_weight(module, ria(as_matrix(module, weight_of(module)), norms[name], alpha))
        for name, module in request.layers
    }


class _Channels:
    """Sum over everything but the channels of what a function makes of the activations."""

    def __init__(self, activation: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor], axis: int) -> None:
        self.activation, self.function, self.axis = activation, function, axis
        self.sum, self.count = torch.zeros((), device="cpu"), 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        channels = self.function(self.activation(output.detach())).movedim(self.axis, 0).flatten(1)
        self.sum = self.sum.to(channels.device) + channels.double().sum(1)
        self.count += channels.shape[1]


def _observed(request: Request, criterion: str, make: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """One watcher a layer, at the norm that takes its output, else at its own output; one pass of data."""
    data: Iterable[Any] = iter(request.batches(criterion))
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"{criterion}: the data holds no batch")
    data = itertools.chain([first], data)
    after = followers(request.model, first, [module for _, module in request.layers], _NORMS, request.forward)
    made = {name: make(module) for name, module in request.layers}
    watchers = {after.get(module, module): made[name] for name, module in request.layers}
    observe(request.model, data, watchers, forward=request.forward, progress=request.progress)
    for name, found in made.items():
        if not found.count:
            raise ValueError(f"{criterion}: no activation of {name} was seen; leave it out by filter_fn")
    return made


def _axis(module: nn.Module) -> int:
    return -3 if isinstance(module, nn.Conv2d) else -1


@criterion("activation", gives="channel", needs_data=True)
def _activation(request: Request, *, activation: Callable[[Tensor], Tensor] = torch.relu) -> Scores:
    """mean |a_c| of the channel's activations a = activation(norm(layer(x))). Molchanov et al., 1611.06440, 2.2.

    The norm counts where a BatchNorm, GroupNorm or LayerNorm takes the layer's very output; activation= is relu unless
    told, torch.nn.Identity() for none.
    """
    found = _observed(request, "activation", lambda m: _Channels(activation, torch.abs, _axis(m)))
    return {name: (stat.sum / stat.count).float() for name, stat in found.items()}


@criterion("apoz", gives="channel", needs_data=True)
def _apoz(request: Request, *, activation: Callable[[Tensor], Tensor] = torch.relu) -> Scores:
    """1 - APoZ_c: the share of the channel's activations that are not zero. Hu et al., network trimming, 1607.03250."""
    found = _observed(request, "apoz", lambda m: _Channels(activation, lambda a: a != 0, _axis(m)))
    return {name: (stat.sum / stat.count).float() for name, stat in found.items()}


class _Ranks:
    """Sum of matrix_rank over the feature maps of a channel."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation
        self.sum, self.count = torch.zeros((), device="cpu"), 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps = self.activation(output.detach())
        ranks = torch.linalg.matrix_rank(maps.float())  # [B, N]
        self.sum = self.sum.to(ranks.device) + ranks.reshape(-1, ranks.shape[-1]).double().sum(0)
        self.count += ranks.numel() // ranks.shape[-1]


@criterion("hrank", gives="channel", needs_data=True)
def _hrank(request: Request, *, activation: Callable[[Tensor], Tensor] = torch.relu) -> Scores:
    """mean over images of rank(feature map [H, W]) of the channel. HRank, Lin et al., CVPR 2020 (2002.10179).

    Convolutions only (ValueError else). Activations as for "activation".
    """
    for name, module in request.layers:
        if not isinstance(module, nn.Conv2d):
            raise ValueError(f"hrank: {name} is a {type(module).__name__}, only a Conv2d has feature maps")
    found = _observed(request, "hrank", lambda m: _Ranks(activation))
    return {
        name: (stat.sum / stat.count).float().reshape(outputs(module))
        for (name, module), stat in zip(request.layers, found.values(), strict=True)
    }
