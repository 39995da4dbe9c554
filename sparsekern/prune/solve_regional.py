"""Block-wise reconstruction: regional gradients choose, a few optimisation steps repair (Wanda++, 2503.04992)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import Call, Forward, InputNorm, Watcher, evaluating, feed, observe
from .layers import Filter, as_matrix, as_weight, layers, sharing, weight_of, weight_parameter
from .mask import finalize_, mask_of, set_mask
from .pattern import Pattern, pattern_of
from .score_activation import wanda
from .score_gradient import samples
from .solve import check_local
from .solve_blocks import by_blocks, calls_of, first_tensor
from .solve_model import LayerResult, Sparsity, share_of


def regional_gradients(block: nn.Module, calls: Sequence[Call], filter_fn: Filter | None = None) -> dict[str, Tensor]:
    """G_ij = sqrt(mean_s (d ||f(x_s)||_2 / d W_ij)^2) of one block f over single samples x_s. Wanda++, 2503.04992.

    {layer: G shaped like its weight}. No loss and no labels: the norm of the block's own output.
    """
    targets = layers(block, filter_fn)
    parameters = [p for _, module in targets if (p := weight_parameter(module)) is not None]
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    count = 0
    with evaluating(block), _learning(parameters):
        for call in calls:
            for one in samples(call):
                norm = first_tensor(feed(block, one)).float().norm()
                for sum_, g in zip(squares, torch.autograd.grad(norm, parameters), strict=True):
                    sum_ += g.detach().float().square()
                count += 1
    return {name: (sum_ / max(1, count)).sqrt() for (name, _), sum_ in zip(targets, squares, strict=True)}


def reconstruct_block_(
    block: nn.Module,
    calls: Sequence[Call],
    pattern: Pattern | str = "2:4",
    sparsity: Sparsity = None,
    *,
    alpha: float = 100.0,
    rounds: int = 5,
    samples_per_round: int = 32,
    rate: float = 1e-4,
    seed: int = 0,
    filter_fn: Filter | None = None,
    keep_mask: bool = True,
) -> dict[str, LayerResult]:
    """Prunes one block in place by (alpha G_ij + ||X_j||_2) |W_ij| and repairs it towards its dense outputs.

    A round prunes by the score, then takes one RMSprop step (rate) a call on ||f'(x) - f(x)||^2 / numel, for
    samples_per_round of the calls; gradients reach the pruned weights too, so that the next round may take them back.
    A last pruning ends it. G and ||X|| are the dense block's. Biases and norms stay. Returns what became of each layer;
    the error is that of the block's output, ||f' - f||^2 / ||f||^2, the same for all of them. Wanda++, 2503.04992 (RGS
    and RO; their rate for 7B models is 3e-7).
    """
    rule, started = pattern_of(pattern), time.perf_counter()
    check_local(rule)
    order = str(getattr(rule, "order", "crs"))
    targets = layers(block, filter_fn)
    norms = {module: InputNorm(order) for _, module in targets}
    watchers: dict[nn.Module, Watcher] = dict(norms)
    observe(block, calls, watchers, progress=False)
    idle = [name for name, module in targets if not norms[module].tokens]
    if idle:
        raise ValueError(f"no data reaches {', '.join(idle)}; leave them out by filter_fn")
    gradients = regional_gradients(block, calls, filter_fn)
    with evaluating(block):
        wanted = [first_tensor(feed(block, call)) for call in calls]
    parameters = [p for _, module in targets if (p := weight_parameter(module)) is not None]
    masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def prune() -> None:
        """Zeros where the score is least. No mask yet: a weight that went gets gradients and may come back."""
        for (name, module), parameter in zip(targets, parameters, strict=True):
            size = as_matrix(module, weight_of(module), order)
            score = wanda(size, norms[module].norm) + alpha * as_matrix(module, gradients[name], order) * size.abs()
            mask = as_weight(module, rule.mask(score, share_of(sparsity, name)), order)
            before = mask_of(module)
            masks[name] = mask if before is None else mask & before.mask
            parameter.mul_(masks[name])

    optimizer = torch.optim.RMSprop(parameters, lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        prune()
        for i in torch.randperm(len(calls), generator=generator)[:samples_per_round].tolist():
            with evaluating(block), _learning(parameters):
                loss = F.mse_loss(first_tensor(feed(block, calls[i])).float(), wanted[i].float())
                found = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    prune()
    for name, module in targets:
        for twin in sharing(block, module):
            set_mask(twin, masks[name])
    error, seconds = _distance(block, calls, wanted), time.perf_counter() - started
    if not keep_mask:
        finalize_(block)
    reached = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
    return {name: LayerResult("wanda++", reached[name], error, 0.0, seconds) for name, _ in targets}


def reconstruct_(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    data: Iterable[Any],
    pattern: Pattern | str = "2:4",
    sparsity: float | None = None,
    *,
    forward: Forward | None = None,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, LayerResult]]:
    """`reconstruct_block_` over the blocks of a model, in place, each with inputs from those pruned before it.

    blocks: in their order, `model.layers` say; data: see `calibrate`; options: those of `reconstruct_block_`.
    """
    calls = calls_of(model, blocks[0], data, forward=forward, progress=progress)

    def work(block: nn.Module, calls: Sequence[Call]) -> dict[str, LayerResult]:
        return reconstruct_block_(block, calls, pattern, sparsity, **options)

    return by_blocks(blocks, calls, work, progress=progress)


@contextlib.contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients on, for these parameters whatever they are otherwise."""
    required = [p.requires_grad for p in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, before in zip(parameters, required, strict=True):
            parameter.requires_grad_(before)


def _distance(block: nn.Module, calls: Sequence[Call], wanted: Sequence[Tensor]) -> float:
    """||f' - f||^2 / ||f||^2 over all calls."""
    lost = whole = 0.0
    with evaluating(block):
        for call, target in zip(calls, wanted, strict=True):
            lost += float((first_tensor(feed(block, call)).double() - target.double()).square().sum())
            whole += float(target.double().square().sum())
    return lost / whole if whole else 0.0
