"""A mask lives on the dense module as a parametrization until conversion makes it a format.

The module's `weight` is then `where(mask, original, 0)`: removed weights get no gradient and stay zero
whatever the optimizer, its momentum or its weight decay do to the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """w -> where(mask, w, 0); `mask` is a bool buffer of the weight's shape."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask must be bool, got {mask.dtype}")
        self.register_buffer("mask", mask.contiguous())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"shape={tuple(self.mask.shape)}, density={self.mask.float().mean().item():.4f}"


def mask_of(module: Any, name: str = "weight") -> Mask | None:
    """The mask on `module.weight`, or None."""
    if parametrize.is_parametrized(module, name):
        for step in module.parametrizations[name]:
            if isinstance(step, Mask):
                return step
    return None


def set_mask(module: nn.Module, mask: Tensor, name: str = "weight") -> None:
    """Puts a mask on `module.weight`, or changes the one it has."""
    weight = getattr(module, name)
    if mask.shape != weight.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
    known = mask_of(module, name)
    if known is not None:
        known.mask = mask.to(known.mask.device).contiguous()
    else:
        parametrize.register_parametrization(module, name, Mask(mask.to(weight.device)))


def finalize_(model: nn.Module) -> nn.Module:
    """Makes every mask permanent: removed weights become zeros of an ordinary parameter. Returns the model.

    The parameters keep their identity, so an optimizer goes on with them (and may then fill the zeros again).
    Foreign parametrizations are left alone; a mask that shares its weight with one raises ValueError.
    """
    masked: list[tuple[str, Any]]
    masked = [(name, module) for name, module in model.named_modules() if mask_of(module) is not None]
    for name, module in masked:
        if len(module.parametrizations["weight"]) > 1:
            kinds = ", ".join(type(step).__name__ for step in module.parametrizations["weight"])
            raise ValueError(f"{name or type(module).__name__}: the weight has several parametrizations ({kinds})")
    for _, module in masked:
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for name in [n for n in module._parameters if n != "weight"]:  # the weight first again, as optimizers saw it
            module._parameters[name] = module._parameters.pop(name)
    return model


def _own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class of its own.

    torch makes one when it registers a parametrization, but a deepcopy shares it, and removing the
    parametrization from one of the two takes the `weight` property away from both.
    """
    cls = type(module)
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
