"""Prune-and-grow: sparse from the first step to the last, the places of the weights found on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import layers, oriented, weight_of, weight_parameter
from .mask import Mask, mask_of, set_mask, zero_state
from .pattern import _Units, best
from .schedule import Schedule


def erk(model: nn.Module, sparsity: float, filter_fn: Any = None) -> dict[str, float]:
    """{layer: sparsity} by Erdős–Rényi kernels: density_l = eps (n + c + r + s) / (n c r s), at most 1.

    eps is such that all layers together reach `sparsity`: small layers stay denser than large ones. Mocanu
    et al. 2018 (arXiv 1707.04780), kernels as in Evci et al. 2020 (arXiv 1911.11134).
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the share of weights to remove, in [0, 1]; got {sparsity}")
    shapes = {name: weight_of(module).shape for name, module in layers(model, filter_fn)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[n] for n in full)
        rest = sum(raw[n] * sizes[n] for n in raw if n not in full)
        eps = budget / rest if rest else 0.0
        more = {n for n in raw if n not in full and eps * raw[n] > 1}
        if not more:
            return {n: 0.0 if n in full else 1 - eps * raw[n] for n in raw}
        full |= more


class RigL(Schedule):
    """Every `every` steps drops the weakest weights and grows as many where the gradient is largest.

    Of the n units (weights, or blocks, as the pattern says) that a layer has, k = f n with f = alpha / 2 (1 +
    cos(t pi / T)) are dropped, those of least |w|, and the k of largest |dL/dw| among all that are not active
    then are grown, at zero and without momentum; after T = `until` steps the masks stay. The number of
    weights of each layer never changes. Evci et al. 2020 (arXiv 1911.11134).

    Begins with random masks at `sparsity` (a number for all layers, or {layer: share}, see `erk`), or with
    the masks that the model has. grow="random" takes random places instead of the gradient's.
    """

    def __init__(
        self,
        *args: Any,
        every: int = 100,
        until: int,
        alpha: float = 0.3,
        grow: str = "gradient",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if grow not in ("gradient", "random"):
            raise ValueError(f"grow must be 'gradient' or 'random', got {grow!r}")
        if every < 1 or until < every or not 0 < alpha <= 1:
            raise ValueError(f"needs 1 <= every <= until and 0 < alpha <= 1: {every}, {until}, {alpha}")
        super().__init__(*args, **options)
        if not isinstance(self.pattern, _Units) or self.pattern.per == "global":
            raise ValueError(f"prune-and-grow moves weights, blocks or vectors inside a layer, not {self.pattern!r}")
        self.every, self.until, self.alpha, self.grow = every, until, alpha, grow
        self.generator = torch.Generator().manual_seed(seed)
        self._begin()
        self._watch()

    def _begin(self) -> None:
        """Random masks, where the model has none yet."""
        for name, module in self.layers().items():
            mask = self._mask(module)
            if not bool(mask.mask.all()):
                continue
            if self.target is None:
                raise ValueError("prune-and-grow needs a sparsity, or a model that has masks")
            share = self.target[name] if isinstance(self.target, Mapping) else self.target
            units = self._pattern.units(oriented(module, torch.ones(mask.mask.shape)))
            chance = torch.rand(units.numel(), generator=self.generator, device="cpu")
            kept = best(chance[None], round((1 - share) * units.numel())).reshape(units.shape)
            shape = tuple(oriented(module, mask.mask).shape)
            set_mask(module, oriented(module, self._pattern.spread(kept, shape)), pattern=self.pattern)

    @property
    def _pattern(self) -> _Units:
        assert isinstance(self.pattern, _Units)
        return self.pattern

    @staticmethod
    def _mask(module: nn.Module) -> Mask:
        mask = mask_of(module)
        assert mask is not None
        return mask

    def fraction(self, t: int) -> float:
        """The share of a layer's weights that moves at step t: alpha / 2 (1 + cos(t pi / T)), 0 from T on."""
        return self.alpha / 2 * (1 + math.cos(math.pi * t / self.until)) if t < self.until else 0.0

    def _updates(self, t: int) -> bool:
        return 0 < t < self.until and t % self.every == 0

    def _watch(self) -> None:
        """Gradients of removed weights are collected in the step before an update only."""
        on = self.grow == "gradient" and self._updates(self.count + 1)
        for module in self.layers().values():
            mask = self._mask(module)
            mask.watching, mask.gradient = on, None

    def _due(self) -> bool:
        due = self._updates(self.count)
        if due:
            for name, module in self.layers().items():
                self._move(name, module)
        self._watch()
        return due

    @torch.no_grad()
    def _move(self, name: str, module: nn.Module) -> None:
        mask, pattern = self._mask(module), self._pattern
        old = oriented(module, mask.mask)
        active = (pattern.units(old.float()) > 0).reshape(-1)
        count = int(self.fraction(self.count) * int(active.sum()))
        count = min(count, int((~active).sum()))
        if not count:
            return
        size = pattern.units(oriented(module, weight_of(module)).abs()).reshape(-1)
        dropped = best((-size).masked_fill(~active, -math.inf)[None], count)[0]
        free = ~active | dropped
        grown = best(self._wish(name, module, mask).masked_fill(~free, -math.inf)[None], count)[0]
        kept = ((active & ~dropped) | grown).reshape(pattern.units(old.float()).shape)
        new = pattern.spread(kept, tuple(old.shape))
        fresh = oriented(module, new & ~old)
        parameter = weight_parameter(module)
        assert parameter is not None
        parameter.masked_fill_(fresh, 0)
        zero_state(self.optimizer, parameter, fresh)
        set_mask(module, oriented(module, new))

    def _wish(self, name: str, module: nn.Module, mask: Mask) -> Tensor:
        """How much each unit should be there: its gradient, or chance."""
        if self.grow == "random":
            units = self._pattern.units(oriented(module, mask.mask).float())
            return torch.rand(units.numel(), generator=self.generator, device="cpu").to(mask.mask.device)
        if mask.gradient is None:
            raise RuntimeError(
                f"{name} had no gradient in the step before an update; call schedule.step() once after every "
                "optimizer.step()"
            )
        return self._pattern.units(oriented(module, mask.gradient).abs().float()).reshape(-1)

    @property
    def finished(self) -> bool:
        return self.count >= self.until

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])
        self._watch()


class SET(RigL):
    """Sparse evolutionary training: drops the share `alpha` of least |w|, grows as many at random places.

    The share stays the same to the end. Mocanu et al. 2018 (arXiv 1707.04780), zeta = alpha.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, grow="random", **options)

    def fraction(self, t: int) -> float:
        """The share of a layer's weights that moves: alpha, before T."""
        return self.alpha if t < self.until else 0.0
