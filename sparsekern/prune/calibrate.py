"""One pass of calibration data through a model: hooks see what each layer gets and gives, statistics stream.

Nothing is kept of a batch but sums, so memory does not grow with the data. A batch is a tensor (model(batch)), a
tuple or list (model(*batch)), a dict (model(**batch)) or a `Call`; `forward(model, batch)` replaces that, for instance
`lambda model, batch: model(batch[0])` where the loader also gives labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .layers import groups, sharing

Forward = Callable[[nn.Module, Any], Any]
# watcher(module, inputs, output): called after every forward of the module that it watches.
Watcher = Callable[[nn.Module, tuple[Any, ...], Any], None]

_UNFOLDED = 1 << 24  # elements of a convolution's unfolded inputs at a time


@dataclass(frozen=True)
class Call:
    """A recorded call of a module: a batch that carries positional and named arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def feed(model: nn.Module, batch: Any) -> Any:
    """model's answer to a batch: tensor, tuple or list (positional), dict (named) or `Call` (both)."""
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients, every module's mode put back after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def shown(text: str, total: int | None, progress: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on the terminal that vanishes when it is done; yields the function that moves it on by one."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    disable = not (progress and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(text, total=total)
        yield lambda note=text: bar.update(task, advance=1, description=note)


def tracked(data: Iterable[Any], text: str, progress: bool = True) -> Iterator[Any]:
    """The batches of `data` behind a progress bar. Raises ValueError where there are none."""
    seen = False
    with shown(text, len(data) if isinstance(data, Sized) else None, progress) as step:
        for batch in data:
            seen = True
            yield batch
            step()
    if not seen:
        raise ValueError("the calibration data holds no batch (an iterator that was used up before?)")


def repeatable(data: Iterable[Any]) -> Iterable[Any]:
    """Data that can be gone through again: an iterator becomes a list, anything else stays."""
    return list(data) if isinstance(data, Iterator) else data


class Enough(Exception):
    """Ends a forward whose rest nobody watches."""


def observe(
    model: nn.Module,
    data: Iterable[Any],
    watchers: Mapping[nn.Module, Watcher],
    *,
    forward: Forward | None = None,
    progress: bool = True,
    text: str = "calibrating",
    stop_after: nn.Module | None = None,
) -> None:
    """One pass of `data` through the model, without gradients and in evaluation mode, hooks calling the watchers.

    A weight that several layers share is watched at all of them. With `stop_after` a forward ends when that module
    has run, which saves the rest of the model.
    """
    forward = forward or feed

    def hook(watcher: Watcher) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: watcher(module, inputs, output)

    def enough(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        raise Enough

    handles = []
    try:
        for module, watcher in watchers.items():
            twins = sharing(model, module) if hasattr(module, "weight") else [module]
            handles += [twin.register_forward_hook(hook(watcher)) for twin in twins]
        if stop_after is not None:
            handles.append(stop_after.register_forward_hook(enough))
        with evaluating(model):
            for batch in tracked(data, text, progress):
                with contextlib.suppress(Enough):
                    forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def call_order(
    model: nn.Module, batch: Any, modules: Iterable[nn.Module], forward: Forward | None = None
) -> list[tuple[nn.Module, int, int]]:
    """[(module, id of its input tensor, calls)] in the order in which a batch reaches them; others are absent.

    Equal ids: the modules read the very same tensor (query, key and value of an attention).
    """
    source: dict[nn.Module, int] = {}
    calls: dict[nn.Module, int] = {}
    held: list[Any] = []  # alive, so that no id is given twice

    def watcher(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        held.append(inputs)
        source.setdefault(module, id(inputs[0]))
        calls[module] = calls.get(module, 0) + 1

    observe(model, [batch], dict.fromkeys(modules, watcher), forward=forward, progress=False)
    return [(module, source[module], calls[module]) for module in source]


def followers(
    model: nn.Module, batch: Any, modules: Iterable[nn.Module], kinds: tuple[type, ...], forward: Forward | None = None
) -> dict[nn.Module, nn.Module]:
    """module -> the module of one of `kinds` that takes its very output, for one batch (tensor identity)."""
    produced: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[nn.Module, nn.Module] = {}

    def gives(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        produced[id(output)] = (module, output)

    def takes(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and id(inputs[0]) in produced:
            found.setdefault(produced[id(inputs[0])][0], module)

    watchers: dict[nn.Module, Watcher] = dict.fromkeys(modules, gives)
    watchers |= {module: takes for module in model.modules() if isinstance(module, kinds)}
    observe(model, [batch], watchers, forward=forward, progress=False)
    return found


def input_rows(module: nn.Module, x: Tensor, order: str = "crs") -> Iterator[Tensor]:
    """What the layer multiplies its matrix W[N, K] with, in pieces [groups, T, K] of float32 (or float64).

    A token, or a pixel of a convolution's output, is a row. `order` is the K order of a convolution; a grouped one has
    the rows of every group.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(module, nn.Conv2d):
        yield x.reshape(1, -1, x.shape[-1])
        return
    x = x if x.dim() == 4 else x[None]
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    taps = module.kernel_size[0] * module.kernel_size[1]
    pixels = max(1, x.shape[2] * x.shape[3] // (module.stride[0] * module.stride[1]))
    for part in x.split(max(1, _UNFOLDED // (x.shape[1] * taps * pixels))):
        part = F.pad(part, around, mode=mode) if any(around) else part
        # [B, C taps, L]: the channels outermost
        columns = F.unfold(part, module.kernel_size, module.dilation, 0, module.stride)
        columns = columns.unflatten(1, (groups(module), -1, taps))  # [B, G, C / G, taps, L]
        columns = columns.permute(1, 0, 4, 2, 3) if order == "crs" else columns.permute(1, 0, 4, 3, 2)
        yield columns.reshape(columns.shape[0], columns.shape[1] * columns.shape[2], -1)


class InputNorm:
    """||X_j||_2 of every input feature j over all tokens, [groups, K]; streaming: a sum of squares."""

    def __init__(self, order: str = "crs") -> None:
        self.order, self.squares, self.tokens = order, torch.zeros((), device="cpu"), 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for rows in input_rows(module, inputs[0], self.order):
            self.squares = self.squares.to(rows) + rows.square().sum(1)
            self.tokens += rows.shape[1]

    @property
    def norm(self) -> Tensor:
        return self.squares.sqrt()


class InputGram:
    """H = (2 / T) sum_t x_t x_t^T over all T tokens, [groups, K, K]: the Hessian of the layer's squared error."""

    def __init__(self, order: str = "crs") -> None:
        self.order, self.tokens = order, 0
        self.sum: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for rows in input_rows(module, inputs[0], self.order):
            if self.sum is None:
                g, _, k = rows.shape
                self.sum = rows.new_zeros(g, k, k)
            self.sum.baddbmm_(rows.transpose(1, 2), rows)
            self.tokens += rows.shape[1]

    @property
    def hessian(self) -> Tensor:
        if self.sum is None or self.tokens == 0:
            raise ValueError("no token reached this layer")
        return self.sum * (2 / self.tokens)
