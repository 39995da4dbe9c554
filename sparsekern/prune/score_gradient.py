"""Scores from the loss: gradient, Taylor, SNIP, diagonal Hessian (OBD), movement.

`loss(model, batch)` gives a scalar. The model keeps its mode (call eval() first unless BatchNorm shall use the batch);
its gradients and its buffers are put back afterwards. A masked weight is scored where it lives: the gradient is that of
the effective weight, zero where the mask is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Call, tracked
from .layers import Filter, layers, weight_of, weight_parameter
from .score import Loss, Request, Scores, criterion


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Gradients and floating or counting buffers (BatchNorm's) are as before when this ends."""
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if b.dtype != torch.bool]
    try:
        with torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for parameter, gradient, required in gradients:
                parameter.grad = gradient
                parameter.requires_grad_(required)
            for buffer, value in buffers:
                buffer.copy_(value)


def _parameters(request: Request) -> list[nn.Parameter]:
    found = [weight_parameter(module) for _, module in request.layers]
    parameters = [p for p in found if p is not None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _gradients(request: Request, criterion: str, batches: Iterable[Any]) -> Iterator[list[Tensor]]:
    """dL/dw of the layers' weights, batch by batch. Raises ValueError where the loss does not depend on one."""
    loss = request.loss_of(criterion)
    parameters = _parameters(request)
    for batch in batches:
        value = loss(request.model, batch)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        yield [_used(g, name, criterion) for g, (name, _) in zip(found, request.layers, strict=True)]


def _used(gradient: Tensor | None, name: str, criterion: str) -> Tensor:
    if gradient is None:
        raise ValueError(f"{criterion}: the loss does not depend on {name}; leave it out by filter_fn")
    return gradient.detach() if gradient.dtype == torch.float64 else gradient.detach().float()


def _mean_gradients(request: Request, criterion: str) -> list[Tensor]:
    """The gradient of the mean loss over all batches."""
    with _undisturbed(request.model):
        total: list[Tensor] = []
        count = 0
        batches = tracked(request.batches(criterion), "gradients", request.progress)
        for found in _gradients(request, criterion, batches):
            total = [a + b for a, b in zip(total, found, strict=True)] if total else [g.clone() for g in found]
            count += 1
    return [g / count for g in total]


def _weights(request: Request) -> list[Tensor]:
    return [weight_of(module).detach() for _, module in request.layers]


def _named(request: Request, values: Iterable[Tensor]) -> Scores:
    return {name: value for (name, _), value in zip(request.layers, values, strict=True)}


@criterion("gradient", compare="global", needs_data=True, needs_loss=True)
def _gradient(request: Request) -> Scores:
    """|g|, g = dL/dw of the mean loss over the batches."""
    return _named(request, (g.abs() for g in _mean_gradients(request, "gradient")))


@criterion("taylor", compare="global", needs_data=True, needs_loss=True)
def _taylor(request: Request) -> Scores:
    """|g w|: the first-order change of the loss when w goes. Molchanov et al., 1611.06440, 1906.10771."""
    gradients = _mean_gradients(request, "taylor")
    return _named(request, ((g * w).abs() for g, w in zip(gradients, _weights(request), strict=True)))


@criterion("snip", compare="global", needs_data=True, needs_loss=True)
def _snip(request: Request) -> Scores:
    """|g_j w_j| / sum_k |g_k w_k| over all layers, from the first batch; at initialisation. Lee et al., 1810.02340."""
    first = next(iter(request.batches("snip")), None)
    if first is None:
        raise ValueError("snip: the data holds no batch")
    found = _taylor(replace(request, data=[first], progress=False))
    total = sum(s.double().sum() for s in found.values())
    if not total > 0:
        raise ValueError("snip: every |g w| is zero: the loss does not react to any weight")
    return {name: s / float(total) for name, s in found.items()}


def samples(batch: Any) -> Iterator[Any]:
    """A batch cut into batches of one along dimension 0 of its tensors; what is no tensor goes along whole."""
    sizes = {t.shape[0] for t in _tensors(batch) if t.dim()}
    if len(sizes) != 1:
        raise ValueError(f"the tensors of a batch have {sorted(sizes)} samples: cannot be cut into single ones")
    for i in range(sizes.pop()):
        yield _mapped(batch, lambda t, i=i: t[i : i + 1] if t.dim() else t)  # type: ignore[misc]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Call):
        yield from _tensors([*batch.args, *batch.kwargs.values()])
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Call):
        return Call(_mapped(batch.args, function), _mapped(batch.kwargs, function))
    if isinstance(batch, Mapping):
        return {key: _mapped(value, function) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(_mapped(part, function) for part in batch)
    return batch


def fisher(request: Request, *, per_sample: bool = True) -> list[Tensor]:
    """E[g^2], the diagonal of the empirical Fisher matrix: the mean over samples of the squared gradient.

    loss(model, batch) is then called with batches of one; per_sample=False takes each batch as one sample (faster, and
    smaller than the Fisher by cancellation inside a batch).
    """
    with _undisturbed(request.model):
        total: list[Tensor] = []
        count = 0
        for batch in tracked(request.batches("obd"), "Fisher", request.progress):
            for found in _gradients(request, "obd", samples(batch) if per_sample else [batch]):
                squares = [g.square() for g in found]
                total = [a.add_(b) for a, b in zip(total, squares, strict=True)] if total else squares
                count += 1
    return [t / count for t in total]


def hutchinson(request: Request, *, probes: int = 8, seed: int = 0) -> list[Tensor]:
    """diag(H) = E[v * (H v)], v = +-1 independent (Hutchinson; Bekas et al. 2007), of the mean loss over the batches.

    `probes` vectors v a batch. Exact in expectation; exact with one probe where H is diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = request.loss_of("obd")
    with _undisturbed(request.model):
        parameters = _parameters(request)
        total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        count = 0
        for batch in tracked(request.batches("obd"), "Hutchinson", request.progress):
            gradients = torch.autograd.grad(loss(request.model, batch), parameters, create_graph=True)
            for _ in range(probes):
                signs = [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters]
                products = torch.autograd.grad(gradients, parameters, signs, retain_graph=True, allow_unused=True)
                for sum_, v, hv in zip(total, signs, products, strict=True):
                    if hv is not None:  # a weight in which the loss is linear
                        sum_ += v * hv.detach()
                count += 1
    return [(t / count).float() for t in total]


@criterion("obd", compare="global", needs_data=True, needs_loss=True)
def _obd(request: Request, *, method: str = "fisher", **options: Any) -> Scores:
    """h_kk w_k^2 / 2, h the Hessian's diagonal. Optimal brain damage, LeCun et al., NeurIPS 1989.

    method "fisher" (empirical Fisher in place of the Hessian; option per_sample) or "hutchinson" (options probes, seed;
    negative curvature counts as it is, so a score may be negative).
    """
    if method not in ("fisher", "hutchinson"):
        raise ValueError(f"method must be 'fisher' or 'hutchinson', got {method!r}")
    diagonal = fisher(request, **options) if method == "fisher" else hutchinson(request, **options)
    return _named(request, (h * w.to(h.dtype).square() / 2 for h, w in zip(diagonal, _weights(request), strict=True)))


class Movement:
    """S = -sum_t w_t dL/dw_t: weights that training moves away from zero score high. Sanh et al., 2005.07683.

    Call `step()` after backward() and before the optimizer's step; `scores` then holds {layer: S}, shaped like the
    weights and signed.
    """

    def __init__(self, model: nn.Module, filter_fn: Filter | None = None) -> None:
        self.layers = layers(model, filter_fn)
        self.scores: Scores = {
            name: torch.zeros(weight_of(module).shape, device=weight_of(module).device) for name, module in self.layers
        }

    @torch.no_grad()
    def step(self) -> None:
        """Adds this step's -w g. Raises ValueError where a weight has no gradient."""
        for name, module in self.layers:
            parameter = weight_parameter(module)
            assert parameter is not None  # layers() gives no others
            if parameter.grad is None:
                raise ValueError(f"movement: {name} has no gradient; call step() after backward()")
            self.scores[name] -= (parameter * parameter.grad).float()


@criterion("movement", compare="global", needs_data=True, needs_loss=True)
def _movement(request: Request, *, optimizer: torch.optim.Optimizer | None = None) -> Scores:
    """-sum_t w_t g_t over the batches, signed. Sanh et al., movement pruning, 2005.07683.

    With optimizer= every batch is also a training step, which is what the paper means, and changes the model; without,
    the weights stay and the score says which way the first step would go.
    """
    loss = request.loss_of("movement")
    batches = tracked(request.batches("movement"), "movement", request.progress)
    chosen = {id(module) for _, module in request.layers}
    movement = Movement(request.model, lambda module, name: id(module) in chosen)
    if optimizer is None:
        with _undisturbed(request.model):
            return _moved(movement, request, loss, batches, None)
    return _moved(movement, request, loss, batches, optimizer)


def _moved(
    movement: Movement, request: Request, loss: Loss, batches: Iterable[Any], optimizer: torch.optim.Optimizer | None
) -> Scores:
    for batch in batches:
        request.model.zero_grad(set_to_none=True)
        loss(request.model, batch).backward()
        movement.step()
        if optimizer is not None:
            optimizer.step()
    return movement.scores
