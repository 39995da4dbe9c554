"""A mask lives on the dense module as a parametrization until conversion makes it a format.

The module's `weight` is then `where(mask, original, 0)`: removed weights get no gradient and stay zero
whatever the optimizer, its momentum or its weight decay do to the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from .pattern import Pattern


class Mask(nn.Module):
    """w -> where(mask, w, 0); `mask` is a bool buffer of the weight's shape, `pattern` what made it, if known.

    While `watching`, the gradient of the masked weight is summed up in `gradient`, removed places included:
    what prune-and-grow needs to know which of them to bring back.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, pattern: Pattern | None = None) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask must be bool, got {mask.dtype}")
        self.register_buffer("mask", mask.contiguous())
        self.pattern = pattern
        self.watching = False
        self.gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        masked = torch.where(self.mask, weight, 0)
        if self.watching and masked.requires_grad:
            masked.register_hook(self._watch)
        return masked

    def _watch(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach().clone() if self.gradient is None else self.gradient + gradient.detach()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        kind = "" if self.pattern is None else f", pattern={self.pattern!r}"
        return f"shape={tuple(self.mask.shape)}, density={self.mask.float().mean().item():.4f}{kind}"


def mask_of(module: Any, name: str = "weight") -> Mask | None:
    """The mask on `module.weight`, or None."""
    if parametrize.is_parametrized(module, name):
        for step in module.parametrizations[name]:
            if isinstance(step, Mask):
                return step
    return None


def set_mask(module: nn.Module, mask: Tensor, name: str = "weight", pattern: Pattern | None = None) -> None:
    """Puts a mask on `module.weight` (or another parameter), or changes the one it has."""
    weight = getattr(module, name)
    if mask.shape != weight.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    known = mask_of(module, name)
    if known is not None:
        known.mask = mask.to(known.mask.device).contiguous()
        known.pattern = pattern or known.pattern
    else:
        parametrize.register_parametrization(module, name, Mask(mask.to(weight.device), pattern))


def masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Mask]]:
    """(module's name, module, parameter's name, mask) of every masked parameter."""
    for name, module in model.named_modules():
        steps = module.parametrizations if parametrize.is_parametrized(module) else {}
        for parameter in list(steps):
            mask = mask_of(module, parameter)
            if mask is not None:
                yield name, module, parameter, mask


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Every mask of a model by the name of its parameter ("encoder.0.weight"): bool, on its device."""
    return {_join(name, parameter): mask.mask.clone() for name, _, parameter, mask in masked(model)}


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor], keep_mask: bool = True) -> nn.Module:
    """Puts masks ("encoder.0.weight": bool) on a model's parameters; returns it.

    This is how a pruned weight is made sparse again after something refilled it, the merge of a LoRA update
    W + BA above all: take `masks_of(model)` before and apply it after. keep_mask=False writes zeros and
    leaves nothing behind. Raises ValueError for a name that the model has not and for a shape that differs.
    """
    modules = dict(model.named_modules())
    for key, mask in masks.items():
        owner, _, parameter = key.rpartition(".")
        module = modules.get(owner)
        if module is None or not isinstance(getattr(module, parameter, None), Tensor):
            raise ValueError(f"the model has no parameter {key!r} to mask")
        value = getattr(module, parameter)
        if keep_mask or mask_of(module, parameter) is not None:
            set_mask(module, mask, parameter)
        elif mask.shape != value.shape:
            raise ValueError(f"{key}: the mask has shape {tuple(mask.shape)}, the weight {tuple(value.shape)}")
        else:
            value.masked_fill_(~mask.to(value.device), 0)
    return model


def hold_zeros_(optimizer: torch.optim.Optimizer, masks: Mapping[nn.Parameter, Tensor]) -> Any:
    """Keeps parameters that have no mask of their own sparse: after every step w <- w * mask, state too.

    For a model whose masks were made permanent, or loaded with its zeros: momentum and weight decay then
    refill nothing, because both are zeroed with the weight. masks: {parameter: bool mask}. Returns the
    handle whose `remove()` ends it.
    """

    @torch.no_grad()
    def hold(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, mask in masks.items():
            removed = ~mask.to(parameter.device)
            parameter.masked_fill_(removed, 0)
            zero_state(optimizer, parameter, removed)

    return optimizer.register_step_post_hook(hold)


@torch.no_grad()
def zero_state(optimizer: torch.optim.Optimizer | None, parameter: Tensor, where: Tensor) -> None:
    """Zeroes what an optimizer keeps for these entries of a parameter (momentum, second moments)."""
    if optimizer is None:
        return
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where, 0)


def finalize_(model: nn.Module) -> nn.Module:
    """Makes every mask permanent: removed weights become zeros of an ordinary parameter. Returns the model.

    The parameters keep their identity, so an optimizer goes on with them (and may then fill the zeros again;
    `hold_zeros_` prevents it). Foreign parametrizations are left alone; a mask that shares its weight with
    one raises ValueError.
    """
    found: list[tuple[str, Any, str]] = [(name, module, parameter) for name, module, parameter, _ in masked(model)]
    for name, module, parameter in found:
        if len(module.parametrizations[parameter]) > 1:
            kinds = ", ".join(type(step).__name__ for step in module.parametrizations[parameter])
            where = name or type(module).__name__
            raise ValueError(f"{where}: the {parameter} has several parametrizations ({kinds})")
    for _, module, parameter in found:
        _own_class(module)
        order = list(dict.fromkeys((parameter, *module._parameters)))
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
        if parameter == "weight":  # first again, as optimizers saw it
            for name in [n for n in order if n != "weight"]:
                module._parameters[name] = module._parameters.pop(name)
    return model


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class of its own.

    torch makes one when it registers a parametrization, but a deepcopy shares it, and removing the
    parametrization from one of the two takes the `weight` property away from both.
    """
    cls = type(module)
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
