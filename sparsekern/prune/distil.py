"""Distillation: a pruned student learns from the dense model, in any training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import Forward, feed


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over all but the classes. Hinton et al., 1503.02531.

    Logits [..., classes] of one shape; scalar. T^2 keeps the gradient's size whatever T is.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits of the student {tuple(student.shape)} and the teacher {tuple(teacher.shape)} differ")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    classes = student.shape[-1]
    own = F.log_softmax(student.float() / temperature, -1).reshape(-1, classes)
    wanted = F.log_softmax(teacher.float() / temperature, -1).reshape(-1, classes)
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||s - t||^2 / ||t||^2: squared distance in units of the teacher's features. FitNets, 1412.6550 (normalised)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"features of the student {tuple(student.shape)} and the teacher {tuple(teacher.shape)} differ"
        )
    wanted = teacher.float()
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


class Distillation:
    """loss(student's output, batch): how far the student is from the teacher, for any training loop.

        with Distillation(teacher, student, features=["layers.3", "layers.7"]) as distil:
            output = student(x)
            loss = distil(output, x)  # + your own loss

    loss = logits * T^2 KL(teacher || student) + feature_weight * mean_l ||s_l - t_l||^2 / ||t_l||^2. The teacher is run
    on the same batch, in evaluation mode, without gradients. features: names of modules whose outputs are compared, or
    {student's module: teacher's module}; seen by hooks during the student's own forward, which must come just before.
    `select(output)` picks the logits out of an output that holds more (default: itself, `.logits`, or the first of a
    tuple); `where` picks positions: a bool mask shaped like the logits without their classes. Leave the `with` (or
    call close) to take the hooks away.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        temperature: float = 2.0,
        logits: float = 1.0,
        features: Mapping[str, str] | Iterable[str] = (),
        feature_weight: float = 1.0,
        select: Any = None,
        forward: Forward | None = None,
    ) -> None:
        self.teacher, self.student = teacher.eval(), student
        self.temperature, self.logits, self.feature_weight = temperature, logits, feature_weight
        self.select, self.forward = select or _logits, forward or feed
        self.pairs = dict(features) if isinstance(features, Mapping) else {name: name for name in features}
        self._own: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}
        self._handles = [
            module.get_submodule(name).register_forward_hook(self._keeper(kept, name))
            for module, names, kept in (
                (student, self.pairs, self._own),
                (teacher, dict.fromkeys(self.pairs.values()), self._wanted),
            )
            for name in names
        ]

    @staticmethod
    def _keeper(kept: dict[str, Tensor], name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def __call__(self, output: Any, batch: Any, where: Tensor | None = None) -> Tensor:
        """The loss of the student's `output` for this batch (`Call` for several arguments); scalar."""
        with torch.no_grad():
            expected = self.select(self.forward(self.teacher, batch))
        own = self.select(output)
        if where is not None:
            own, expected = own[where], expected[where]
        loss = self.logits * logits_loss(own, expected, self.temperature) if self.logits else own.new_zeros(())
        if self.pairs and self.feature_weight:
            missing = [name for name in self.pairs if name not in self._own]
            if missing:
                raise ValueError(f"the student's {', '.join(missing)} did not run since the last call")
            parts = [feature_loss(self._own[s], self._wanted[t].detach()) for s, t in self.pairs.items()]
            loss = loss + self.feature_weight * torch.stack(parts).mean()
        self._own.clear()
        self._wanted.clear()
        return loss

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output[0]
