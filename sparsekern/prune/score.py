"""How much a weight matters: scores by a criterion, larger means keep. The criteria that need the weights alone.

`scores` serves a whole model by the name of a criterion. Others live beside this file: `score_activation` (what goes
through a layer), `score_gradient` (what the loss says). A score says nothing about which weights may stay; that is the
pattern's part (`pattern.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import padded
from .calibrate import Forward, feed, followers
from .layers import Filter, layers, oriented, outputs, weight_of

Scores = dict[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


def magnitude(weight: Tensor, p: float = 1.0) -> Tensor:
    """|w|^p for every weight (L1: p=1, L2: p=2); p = inf gives |w|, to be joined by a maximum.

    weight of any shape and floating type; returns float32 (float64 for float64). Raises ValueError for p <=
    0 and for a weight that holds NaN, whose order is undefined.
    """
    if not p > 0:
        raise ValueError(f"p must be positive (1: L1, 2: L2, inf: maximum), got {p}")
    size = weight.detach().abs()
    size = size if size.dtype == torch.float64 else size.to(torch.float32)
    if bool(torch.isnan(size).any()):
        raise ValueError(f"the weight of shape {tuple(weight.shape)} holds NaN; there is no magnitude to prune by")
    return size if p == 1 or math.isinf(p) else size.pow(p)


def blocks(scores: Tensor, block: tuple[int, int], p: float = 1.0) -> Tensor:
    """The score of every R x C block of scores [N, K]: the sum, for p = inf the largest.

    `scores` are those of `magnitude(weight, p)`. Returns [ceil(N/R), ceil(K/C)]; edge
    blocks count the entries that they have.
    """
    (n, k), (r, c) = scores.shape, block
    nb, kb = -(-n // r), -(-k // c)
    tiles = padded(scores, nb * r, kb * c).reshape(nb, r, kb, c)
    return tiles.amax((1, 3)) if math.isinf(p) else tiles.sum((1, 3))


def geometric_median(matrix: Tensor) -> Tensor:
    """score_i = sum_k ||F_i - F_k||_2 of the rows F [N, K]: the least is nearest the geometric median. Returns [N].

    FPGM (He et al., CVPR 2019, 1811.00250): a filter near the median of its layer can be replaced by the others.
    """
    rows = matrix.detach().double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1).float()


@dataclass
class Request:
    """What a criterion may use: the model, its layers to be scored, the data and the loss where they were given."""

    model: nn.Module
    layers: list[tuple[str, nn.Module]]
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    forward: Forward = feed
    progress: bool = True

    def batches(self, criterion: str) -> Iterable[Any]:
        """The calibration data. Raises ValueError where none was given."""
        if self.data is None:
            raise ValueError(f"the criterion {criterion!r} needs data=, an iterable of batches")
        return self.data

    def loss_of(self, criterion: str) -> Loss:
        """loss(model, batch) -> scalar. Raises ValueError where none was given."""
        if self.loss is None:
            raise ValueError(
                f"the criterion {criterion!r} needs loss=, a function of (model, batch) that gives a scalar"
            )
        return self.loss


@dataclass(frozen=True)
class Criterion:
    """A way to score. `gives`: "weight" (scores shaped like the weight) or "channel" (one per output channel, [N]).

    `compare` is the scope in which its authors compare: "layer", "row" (inside each output row) or "global"; a pattern
    such as Unstructured(per=...) does the comparing.
    """

    name: str
    function: Callable[..., Scores]
    gives: str = "weight"
    compare: str = "layer"
    needs_data: bool = False
    needs_loss: bool = False

    @property
    def summary(self) -> str:
        """The first line of its description: the formula."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, **properties: Any) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Registers function(request, **options) -> {layer name: scores} under a name for `scores`."""

    def register(function: Callable[..., Scores]) -> Callable[..., Scores]:
        CRITERIA[name] = Criterion(name, function, **properties)
        return function

    return register


def scores(
    model: nn.Module,
    criterion: str | Callable[[nn.Module, str], Tensor] = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    filter_fn: Filter | None = None,
    forward: Forward | None = None,
    per: str = "weight",
    progress: bool = True,
    **options: Any,
) -> Scores:
    """{layer name: scores} of the model's Linears, Conv2ds and transformers' Conv1Ds; larger means keep.

    criterion: a name of `CRITERIA`, or a function (module, name) -> Tensor. Scores of "weight" criteria are shaped
    like the layer's weight; those of "channel" criteria (bn_scale, fpgm, hrank, activation, apoz) are [N], one per
    output channel. per="channel" sums weight scores over each output channel (p = inf: their maximum), to [N].

    data: batches (tensors, tuples, dicts; see `calibrate`), forward(model, batch) replaces how they are fed;
    loss(model, batch) -> scalar for gradient criteria. options go to the criterion (p=, seed=, alpha=, ...). The
    model is left as it was. Raises ValueError for an unknown name, and where data or loss is missing.
    """
    if per not in ("weight", "channel"):
        raise ValueError(f"per must be 'weight' or 'channel', got {per!r}")
    targets = layers(model, filter_fn)
    if callable(criterion):
        found, gives = {name: criterion(module, name) for name, module in targets}, "any"
    elif criterion in CRITERIA:
        chosen = CRITERIA[criterion]
        request = Request(model, targets, data, loss, forward or feed, progress)
        found, gives = chosen.function(request, **options), chosen.gives
    else:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, or a function; got {criterion!r}")
    for name, module in targets:
        found[name] = _checked(found[name], name, module, gives)
        if per == "channel" and found[name].dim() > 1:
            flat = oriented(module, found[name]).flatten(1)
            found[name] = flat.amax(1) if math.isinf(options.get("p", 1)) else flat.sum(1)
    return found


def _checked(scores: Tensor, name: str, module: nn.Module, gives: str) -> Tensor:
    weight, n = weight_of(module), outputs(module)
    shaped, structural = scores.shape == weight.shape, scores.shape == (n,)
    if not {"weight": shaped, "channel": structural}.get(gives, shaped or structural):
        raise ValueError(f"{name}: scores of shape {tuple(scores.shape)}, the weight has {tuple(weight.shape)}")
    if bool(torch.isnan(scores).any()):
        raise ValueError(f"{name}: the scores hold NaN")
    return scores.detach()


@criterion("magnitude", needs_data=False)
def _magnitude(request: Request, *, p: float = 1.0) -> Scores:
    """|w|^p (option p; L1 by default). Han et al., 1506.02626."""
    return {name: magnitude(weight_of(module), p) for name, module in request.layers}


@criterion("l1")
def _l1(request: Request) -> Scores:
    """|w|; per channel the L1 norm. Li et al., 1608.08710."""
    return _magnitude(request, p=1.0)


@criterion("l2")
def _l2(request: Request) -> Scores:
    """w^2; per channel the squared L2 norm."""
    return _magnitude(request, p=2.0)


@criterion("random")
def _random(request: Request, *, seed: int = 0, generator: torch.Generator | None = None) -> Scores:
    """Uniform in [0, 1) from a seeded generator: the control that every criterion must beat."""
    generator = generator or torch.Generator().manual_seed(seed)
    weights = ((name, weight_of(module)) for name, module in request.layers)
    return {
        name: torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device) for name, weight in weights
    }


@criterion("fpgm", gives="channel")
def _fpgm(request: Request) -> Scores:
    """sum_k ||F_i - F_k||_2: distance of filter i from the others (geometric median). He et al., 1811.00250."""
    weights = ((name, oriented(module, weight_of(module))) for name, module in request.layers)
    return {name: geometric_median(weight.flatten(1)) for name, weight in weights}


@criterion("bn_scale", gives="channel", compare="global", needs_data=True)
def _bn_scale(request: Request) -> Scores:
    """|gamma_c| of the BatchNorm that takes the layer's output. Network slimming, Liu et al., 1708.06519.

    The first batch of data shows which BatchNorm that is. Raises ValueError for a layer without one.
    """
    batch = next(iter(request.batches("bn_scale")))
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    after = followers(request.model, batch, [module for _, module in request.layers], norms, request.forward)
    found = {}
    for name, module in request.layers:
        gamma = getattr(after.get(module), "weight", None)
        if gamma is None:
            raise ValueError(
                f"bn_scale: no BatchNorm with a scale takes the output of {name}; leave it out by filter_fn"
            )
        found[name] = gamma.detach().abs().float()
    return found
