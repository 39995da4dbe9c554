"""Masks that training finds itself: learned scores, and N:M with a sparse-refined straight-through estimator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .layers import Filter, layers, oriented, weight_of, weight_parameter
from .mask import Mask, mask_of, masked, set_mask
from .pattern import STRUCTURAL, Pattern, pattern_of
from .schedule import Schedule


class _Straight(torch.autograd.Function):
    """w * m(s); dL/dw = g * m, dL/ds = g * w: the step m(s) counts as the identity on the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return torch.where(mask, grads[0], 0), grads[0] * weight, None


class _Refined(torch.autograd.Function):
    """w * m(w); dL/dw = g + decay * (1 - m) * w."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.decay * torch.where(mask, 0, weight), None, None


class _Changing(Mask):
    """A mask that is made anew from scores in every forward of training; `flips` is the share that changed."""

    def __init__(self, layer: nn.Module, pattern: Pattern, sparsity: float | None) -> None:
        super().__init__(torch.ones_like(weight_of(layer), dtype=torch.bool), pattern)
        self.sparsity, self.flips = sparsity, 0.0
        self._oriented = _turn if oriented(layer, self.mask) is not self.mask else _stay

    @torch.no_grad()
    def renew(self, scores: Tensor) -> Tensor:
        """Takes the mask from these scores."""
        assert self.pattern is not None
        new = self._oriented(self.pattern.masks([self._oriented(scores.detach())], self.sparsity)[0]).contiguous()
        self.flips = float((new != self.mask).float().mean())
        self.mask = new
        return new


def _turn(t: Tensor) -> Tensor:
    return t.t()


def _stay(t: Tensor) -> Tensor:
    return t


class ScoredMask(_Changing):
    """w -> w * top(scores): the scores are a parameter, trained straight through. See `LearnableMask`."""

    def __init__(self, layer: nn.Module, pattern: Pattern, sparsity: float | None) -> None:
        super().__init__(layer, pattern, sparsity)
        self.scores = nn.Parameter(weight_of(layer).detach().abs().clone())
        self.renew(self.scores)

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.renew(self.scores) if self.training else self.mask
        return _Straight.apply(weight, self.scores, mask)


class SrSteMask(_Changing):
    """w -> w * top(|w|) with the refined gradient. See `sr_ste_`."""

    def __init__(self, layer: nn.Module, pattern: Pattern, sparsity: float | None, decay: float) -> None:
        super().__init__(layer, pattern, sparsity)
        self.decay = decay
        self.renew(weight_of(layer).abs())

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.renew(weight.abs()) if self.training else self.mask
        return _Refined.apply(weight, mask, self.decay)


class LearnableMask(Schedule):
    """Trains a score per weight beside it: the mask is what the pattern keeps of the scores, in every forward.

    y uses w * m(s); dL/ds = dL/d(w m) * w, straight through m. The scores begin as |w| and join the optimizer
    as a group of their own (learning rate `score_lr`, no weight decay). After `until` steps the masks are
    frozen. train_weights=False leaves the weights as they are and learns the mask alone. Edge-popup,
    Ramanujan et al. 2020 (arXiv 1911.13299); with trained weights it is movement pruning, Sanh et al. 2020
    (arXiv 2005.07683). Any pattern of single layers, N:M included.
    """

    def __init__(
        self, *args: Any, until: int, score_lr: float = 0.01, train_weights: bool = True, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if isinstance(self.pattern, STRUCTURAL) or getattr(self.pattern, "per", "") == "global":
            raise ValueError(f"a learned mask needs a pattern inside each layer, got {self.pattern!r}")
        if self.optimizer is None:
            raise ValueError("a learned mask needs the optimizer, which trains its scores")
        self.until, self.frozen = until, False
        scores = []
        for name, module in self.layers().items():
            share = self.target[name] if isinstance(self.target, Mapping) else self.target
            made = _replace(module, lambda m=module, s=share: ScoredMask(m, self.pattern, s))
            scores.append(made.scores)
            if not train_weights:
                parameter = weight_parameter(module)
                assert parameter is not None
                parameter.requires_grad_(False)
        self.optimizer.add_param_group({"params": scores, "lr": score_lr, "weight_decay": 0.0})

    def _due(self) -> bool:
        if not self.frozen:
            for module in self.layers().values():  # as of this step, not of the last forward
                mask = mask_of(module)
                assert isinstance(mask, ScoredMask)
                mask.renew(mask.scores)
            if self.count >= self.until:
                self._freeze()
        return not self.frozen or self.count == self.until

    def _freeze(self) -> None:
        freeze_masks_(self.model)
        self.frozen = True

    @property
    def finished(self) -> bool:
        return self.count >= self.until

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.count >= self.until and not self.frozen:
            self._freeze()


def sr_ste_(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    sparsity: float | None = None,
    decay: float = 2e-4,
    filter_fn: Filter | None = None,
) -> list[str]:
    """Trains N:M from scratch: w * m(|w|) forward, dL/dw = g + decay (1 - m) w back; masks anew in each forward.

    All weights get the gradient straight through the mask; those removed decay in addition, so that the
    mask settles. SR-STE, Zhou et al. 2021 (arXiv 2102.04010), decay 2e-4 as there; with the pattern
    "transposable" it is the masked decay of Hu et al. 2024 (arXiv 2404.01847), whose health figure is the
    flip rate, `mask_of(layer).flips`. Other patterns of single layers work alike. End it with
    `freeze_masks_` or `finalize_`. Returns the layers' names. Raises ValueError for a structural or global
    pattern.
    """
    rule = pattern_of(pattern)
    if isinstance(rule, STRUCTURAL) or getattr(rule, "per", "") == "global":
        raise ValueError(f"SR-STE needs a pattern inside each layer, got {rule!r}")
    found = layers(model, filter_fn)
    for _, module in found:
        _replace(module, lambda m=module: SrSteMask(m, rule, sparsity, decay))
    return [name for name, _ in found]


def freeze_masks_(model: nn.Module) -> nn.Module:
    """Makes masks that still change (learned, SR-STE) fixed ones, as they are now. Returns the model."""
    for _, module, name, mask in list(masked(model)):
        if isinstance(mask, _Changing):
            steps: Any = module.parametrizations[name]  # type: ignore[index]
            for i, step in enumerate(steps):
                if step is mask:
                    steps[i] = Mask(mask.mask, mask.pattern).train(mask.training)
    return model


def _replace(module: nn.Module, make: Any) -> Any:
    """Puts a mask of another kind on a layer's weight, in the place of the one that it has."""
    if mask_of(module) is None:
        set_mask(module, torch.ones_like(weight_of(module), dtype=torch.bool))
    steps: Any = module.parametrizations["weight"]  # type: ignore[index]
    made = make().train(module.training)
    for i, step in enumerate(steps):
        if isinstance(step, Mask):
            steps[i] = made
    assert parametrize.is_parametrized(module, "weight")
    return made
