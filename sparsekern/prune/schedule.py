"""When to prune: small objects that follow a training loop. Call `schedule.step()` after `optimizer.step()`.

A schedule counts optimizer steps and changes masks at its times; the masks are parametrizations, so momentum
and weight decay never refill what was removed. `state_dict` and `load_state_dict` save and resume exactly:
load the schedule first (it puts the masks on), then the model and the optimizer. `fit` is the loop for the
simple case. Prune-and-grow: `grow.py`; learned masks: `learn.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .apply import Criterion, prune_
from .calibrate import shown
from .layers import Filter, layers, weight_of
from .mask import apply_masks_, finalize_, mask_of, masked, masks_of, set_mask
from .pattern import STRUCTURAL, Pattern, pattern_of

Share = float | Mapping[str, float] | None


class Schedule:
    """What all schedules share: what to prune (as `prune_` takes it) and how many steps were made.

    model, optimizer: those of the training loop (the optimizer only where a schedule changes its state);
    pattern, sparsity, criterion, data, loss, sample, p, filter_fn and further options as for `prune_`.
    Unless the pattern is structural, every layer is masked from the beginning (with nothing removed), so
    that the names in the model's state_dict do not change on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        pattern: Pattern | str = "unstructured",
        sparsity: Share = None,
        *,
        criterion: Criterion = "magnitude",
        filter_fn: Filter | None = None,
        **options: Any,
    ) -> None:
        self.model, self.optimizer, self.pattern = model, optimizer, pattern_of(pattern)
        self.target, self.criterion, self.filter_fn, self.options = sparsity, criterion, filter_fn, options
        self.count = 0
        if not isinstance(self.pattern, STRUCTURAL):
            for module in self.layers().values():
                if mask_of(module) is None:
                    set_mask(module, torch.ones_like(weight_of(module), dtype=torch.bool), pattern=self.pattern)

    def layers(self) -> dict[str, nn.Module]:
        """The layers that this schedule prunes, by name."""
        return {
            name: module
            for name, module in layers(self.model, self.filter_fn)
            if not isinstance(self.target, Mapping) or name in self.target
        }

    def step(self) -> bool:
        """Counts an optimizer step that was made; True where the masks changed."""
        self.count += 1
        return self._due()

    def _due(self) -> bool:
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether nothing more will change, and the training that belongs to it has been counted."""
        raise NotImplementedError

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters that is removed now."""
        masks = [mask.mask for _, _, _, mask in masked(self.model)]
        total = sum(m.numel() for m in masks)
        return 1 - sum(int(m.count_nonzero()) for m in masks) / total if total else 0.0

    def prune(self, share: Share) -> None:
        """Prunes to a sparsity now: never fewer zeros than before."""
        prune_(self.model, self.pattern, share, self.criterion, filter_fn=self.filter_fn, **self.options)

    def each(self, function: Callable[[float], float]) -> Share:
        """The target sparsity, one or one per layer, with a function applied."""
        if isinstance(self.target, Mapping):
            return {name: function(share) for name, share in self.target.items()}
        return None if self.target is None else function(float(self.target))

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the model's and the optimizer's own state: tensors and plain data."""
        return {"count": self.count, "masks": masks_of(self.model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Call it before the model's own."""
        self.count = int(state["count"])
        apply_masks_(self.model, state["masks"])


class OneShot(Schedule):
    """Prunes once, when `at` steps were made (0: at once); what follows is fine-tuning.

    Mishra et al. 2021 (arXiv 2104.08378) for 2:4: train, prune, train again with the same settings.
    """

    def __init__(self, *args: Any, at: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.at = at
        self._due()

    def _due(self) -> bool:
        if self.count != self.at:
            return False
        self.prune(self.target)
        return True

    @property
    def finished(self) -> bool:
        return self.count >= self.at


class Iterative(Schedule):
    """Prune, train, prune further: `rounds` prunings, `every` steps apart, the first after `begin` steps.

    Round i of R prunes to 1 - (1 - s)^(i/R) with spacing "geometric" (the same share of what is left each
    time), to s i/R with "linear", to s f_i with a list of R factors f. Han et al. 2015 (arXiv 1506.02626).
    """

    def __init__(
        self,
        *args: Any,
        rounds: int,
        every: int,
        begin: int = 0,
        spacing: str | Sequence[float] = "geometric",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if rounds < 1 or every < 1 or begin < 0:
            raise ValueError(f"rounds and every must be at least 1, begin at least 0: {rounds}, {every}, {begin}")
        known = spacing in ("geometric", "linear") if isinstance(spacing, str) else len(spacing) == rounds
        if not known:
            raise ValueError(f"spacing must be 'geometric', 'linear' or {rounds} factors, got {spacing!r}")
        self.rounds, self.every, self.begin, self.spacing, self.round = rounds, every, begin, spacing, 0
        if begin == 0:
            self._due()

    def share(self, round: int) -> Share:
        """The sparsity that a round (from 1) prunes to."""
        part, spacing = round / self.rounds, self.spacing
        if not isinstance(spacing, str):
            return self.each(lambda s: s * spacing[round - 1])
        return self.each(lambda s: s * part if spacing == "linear" else 1 - (1 - s) ** part)

    def _due(self) -> bool:
        if self.round >= self.rounds or self.count != self.begin + self.round * self.every:
            return False
        self.advance()
        return True

    def advance(self) -> None:
        """The next round's pruning."""
        self.round += 1
        self.prune(self.share(self.round))

    @property
    def finished(self) -> bool:
        return self.count >= self.begin + self.rounds * self.every

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.round = int(state["round"])


class Gradual(Schedule):
    """Sparsity rises along a cubic: s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, in n steps of dt.

    t0 = `begin`, dt = `every`, t0 + n dt = `end`, s_i = `initial`, s_f = sparsity. Zhu & Gupta 2017, "To
    prune, or not to prune" (arXiv 1710.01878).
    """

    def __init__(self, *args: Any, end: int, every: int, begin: int = 0, initial: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if every < 1 or begin < 0 or end <= begin:
            raise ValueError(f"needs every >= 1 and 0 <= begin < end, got every={every}, begin={begin}, end={end}")
        self.begin, self.end, self.every, self.initial = begin, end, every, initial
        if begin == 0:
            self._due()

    def share(self, t: int) -> Share:
        """The sparsity that the formula gives after t steps."""
        left = (1 - min(max(t - self.begin, 0) / (self.end - self.begin), 1.0)) ** 3
        return self.each(lambda s: s + (self.initial - s) * left)

    def _due(self) -> bool:
        t = self.count
        if t < self.begin or t > self.end or ((t - self.begin) % self.every and t != self.end):
            return False
        self.prune(self.share(t))
        return True

    @property
    def finished(self) -> bool:
        return self.count >= self.end


class LotteryTicket(Iterative):
    """Iterative magnitude pruning with rewinding: train, prune, set the survivors back to step k, again.

    A round of training has `every` steps. The weights, buffers and the optimizer's state after `rewind` = k
    steps of the first are kept; after each round the masks go further by `Iterative`'s sparsities and all of
    that comes back, so that survivors have theta_k bit for bit (k = 0: the initialisation), and the next
    round begins at its step k. `position` is the step inside the round, for learning rates; a `scheduler` of
    torch's is rewound with the rest. After the last rewinding comes one more training, the ticket's own.
    Frankle & Carbin 2019 (arXiv 1803.03635); rewinding to k > 0: Frankle et al. 2020 (arXiv 1912.05671).
    """

    def __init__(self, *args: Any, rewind: int = 0, scheduler: Any = None, **options: Any) -> None:
        if not 0 <= rewind < options.get("every", rewind + 1):
            raise ValueError(f"rewind must be a step of the first round (0 to every - 1), got {rewind}")
        self.kept: dict[str, Any] | None = None
        self.position, self.rewind, self.scheduler = 0, rewind, scheduler
        super().__init__(*args, **options)
        if rewind == 0:
            self._keep()

    def _due(self) -> bool:
        if self.count == 0:
            return False  # the first round trains before it prunes
        self.position += 1
        if self.round == 0 and self.position == self.rewind:
            self._keep()
        if self.position != self.every or self.round >= self.rounds:
            return False
        self.advance()
        self._rewind()
        return True

    def _keep(self) -> None:
        self.kept = {
            "model": {n: t.detach().clone() for n, t in self._tensors()},
            "optimizer": None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
        }

    @torch.no_grad()
    def _rewind(self) -> None:
        assert self.kept is not None
        for name, tensor in self._tensors():
            tensor.copy_(self.kept["model"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(self.kept["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self.kept["scheduler"]))
        self.position = self.rewind

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers by name, masks apart."""
        masks = {id(mask.mask) for _, _, _, mask in masked(self.model)}
        found = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [(name, t) for name, t in found if id(t) not in masks]

    @property
    def finished(self) -> bool:
        return self.round >= self.rounds and self.position >= self.every

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "position": self.position, "kept": copy.deepcopy(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.position, self.kept = int(state["position"]), copy.deepcopy(state["kept"])


class Ice(Iterative):
    """Iterative pruning that trains only where it must, and only what it must.

    After a round, `evaluate(model)` (larger is better) is compared with its value at the beginning; while
    the drop is below `skip_below`, the next round follows at once, without training between. For the
    training that remains, the share `freeze` of the layers that the last training phase's prunings changed
    least, by ||removed|| / ||weight||, is frozen. `skipped` lists the rounds that needed no training. After
    ICE-Pruning (Hu et al. 2025, arXiv 2505.07411), whose learning-rate schedule is left to the training loop.
    """

    def __init__(
        self,
        *args: Any,
        evaluate: Callable[[nn.Module], float],
        skip_below: float = 0.01,
        freeze: float = 0.0,
        **options: Any,
    ) -> None:
        if not 0 <= freeze < 1:
            raise ValueError(f"freeze is a share in [0, 1), got {freeze}")
        self.evaluate, self.skip_below, self.freeze = evaluate, skip_below, freeze
        self.skipped: list[int] = []
        self.frozen: list[str] = []
        self.baseline: float | None = None
        super().__init__(*args, **options)

    def advance(self) -> None:
        if self.baseline is None:
            self.baseline = float(self.evaluate(self.model))
        self._set_frozen([])
        before = {n: weight_of(m).detach().clone() for n, m in self.layers().items()}
        while True:
            super().advance()
            if self.round >= self.rounds or self.baseline - float(self.evaluate(self.model)) >= self.skip_below:
                break
            self.skipped.append(self.round)
        self._set_frozen(self._insensitive(before))

    def _insensitive(self, before: dict[str, Tensor]) -> list[str]:
        now, change = self.layers(), {}
        for n, w in before.items():
            change[n] = float((w - weight_of(now[n]).detach()).norm() / w.norm().clamp_min(1e-30))
        return sorted(change, key=lambda n: change[n])[: int(self.freeze * len(change))]

    def _set_frozen(self, names: list[str]) -> None:
        modules = dict(self.model.named_modules())
        for name in self.frozen:
            modules[name].requires_grad_(True)
        for name in names:
            for parameter in modules[name].parameters():
                parameter.requires_grad_(False)
                parameter.grad = None  # an optimizer skips it then, momentum and all
        self.frozen = names

    def _due(self) -> bool:
        # Rounds that were skipped take no training time: the next one is due `every` steps after the last.
        if self.round >= self.rounds or self.count != self.begin + (self.round - len(self.skipped)) * self.every:
            return False
        self.advance()
        return True

    @property
    def finished(self) -> bool:
        return self.round >= self.rounds and self.count >= self.begin + (self.rounds - len(self.skipped)) * self.every

    def state_dict(self) -> dict[str, Any]:
        own = {"skipped": list(self.skipped), "frozen": list(self.frozen), "baseline": self.baseline}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.skipped, self.baseline = list(state["skipped"]), state["baseline"]
        self._set_frozen(list(state["frozen"]))


def reinitialise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """New random weights under the same masks: the control that a winning ticket must beat. Returns the model.

    Every module's own `reset_parameters` is called (parameters of modules without one stay).
    """
    masks = masks_of(model)
    finalize_(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return apply_masks_(model, masks)


def fit(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | None = None,
    *,
    steps: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    scheduler: Any = None,
    progress: bool = True,
) -> list[float]:
    """The training loop for the simple case: loss, backward, optimizer.step(), schedule.step(). Returns losses.

    data: batches, gone through again and again; loss(model, batch) -> scalar; steps: how many (default:
    until the schedule is finished). penalty(model) is added to the loss (`l1`,
    `group_lasso`); scheduler: torch's, stepped each time. The model is left in training mode as it was.
    Raises ValueError where there is neither steps nor a schedule, or no data.
    """
    if steps is None and schedule is None:
        raise ValueError("fit needs steps=, or a schedule that says when it is finished")
    training, losses, went = model.training, list[float](), True
    model.train()
    with shown("training", steps, progress) as bar:
        while went and (steps is None or len(losses) < steps):
            went = False
            for batch in data:
                if (steps is not None and len(losses) >= steps) or (steps is None and schedule.finished):  # type: ignore[union-attr]
                    break
                went = True
                optimizer.zero_grad(set_to_none=True)
                value = loss(model, batch)
                (value if penalty is None else value + penalty(model)).backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if schedule is not None:
                    schedule.step()
                losses.append(float(value.detach()))
                bar()
    model.train(training)
    if not losses and (steps or not (schedule is not None and schedule.finished)):
        raise ValueError("there is no batch to train on (an iterator that was used up before?)")
    return losses
