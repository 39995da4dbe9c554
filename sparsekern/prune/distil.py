"""Distillation: a pruned student learns from the dense model, in any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import Forward, feed, repeatable, shown
from .layers import Filter, as_matrix, as_weight, layers, weight_of, weight_parameter
from .quantise import RowQuantiser, quantised_type
from .quantise_model import quantise_
from .score import Loss


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


def distil_(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int,
    rate: float = 1e-4,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    quantise: torch.dtype | str | None = None,
    filter_fn: Filter | None = None,
    after_step: Callable[[int, float], Any] | None = None,
    forward: Forward | None = None,
    progress: bool = True,
    **options: Any,
) -> list[float]:
    """Trains the student in place on the `Distillation` loss (options: its own), for `steps` batches of data.

    data is gone through again and again. AdamW with the rate falling linearly to zero, unless an optimizer is given.
    loss(student, batch) -> scalar is added where given. Masks hold. quantise: "int8" or "fp8" trains the weights
    of the layers (filter_fn chooses) as they will be rounded, by straight-through gradients (Bengio et al., 1308.3432),
    and leaves them rounded. after_step(step, loss) is called after every step. The student's modes are kept: call
    train() or eval() first. Returns the losses.
    """
    quantiser = None if quantise is None else RowQuantiser(quantised_type(quantise))
    rounding = [] if quantiser is None else [module for _, module in layers(student, filter_fn)]
    own = optimizer or torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    schedule = None
    if optimizer is None:
        schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1 - step / max(1, steps))
    data, give = repeatable(data), forward or feed
    losses: list[float] = []
    with (
        Distillation(teacher, student, forward=forward, **options) as distillation,
        shown("distilling", steps, progress) as show,
    ):
        batches = _endless(data)
        for step in range(steps):
            batch = next(batches)
            with torch.enable_grad(), _rounded(rounding, quantiser):
                value = distillation(give(student, batch), batch)
                value = value if loss is None else value + loss(student, batch)
                own.zero_grad(set_to_none=True)
                value.backward()
            own.step()
            if schedule is not None:
                schedule.step()
            losses.append(float(value.detach()))
            if after_step is not None:
                after_step(step, losses[-1])
            show(f"distilling, loss {losses[-1]:.4f}")
    own.zero_grad(set_to_none=True)
    if quantiser is not None:
        quantise_(student, quantiser.dtype, filter_fn=filter_fn)
    return losses


@contextlib.contextmanager
def _rounded(modules: list[nn.Module], quantiser: RowQuantiser | None) -> Iterator[None]:
    """Inside, the layers' parameters hold rounded values; the gradients that they get are the rounded ones' own.

    Afterwards they hold what they did: the straight-through estimator without a word in the graph.
    """
    if quantiser is None:
        yield
        return
    kept = []
    with torch.no_grad():
        for module in modules:
            parameter = weight_parameter(module)
            assert parameter is not None  # layers() gives no others
            matrix = as_matrix(module, weight_of(module))
            rounded = quantiser.round(matrix, quantiser.scale(matrix)[:, None])
            kept.append((parameter, parameter.detach().clone()))
            parameter.copy_(as_weight(module, rounded))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _endless(data: Iterable[Any]) -> Iterator[Any]:
    while True:
        seen = False
        for batch in data:
            seen = True
            yield batch
        if not seen:
            raise ValueError("the data holds no batch")


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else output[0]
