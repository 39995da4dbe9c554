"""The solvers over a model: calibration data in, pruned layers with updated weights out.

`solve_` is the way of all of them: Hessians from one pass (or several, where they would not fit in memory), a solver a
layer, the solution written back with its mask. "dense" Hessians all come from the model as it is; "sequential" ones
come layer by layer from the model pruned so far, so that a layer makes up for the errors of those before it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Forward, InputGram, InputNorm, Watcher, call_order, observe, repeatable, shown
from .layers import Filter, as_matrix, as_weight, groups, layers, outputs, sharing, weight_of, weight_parameter
from .mask import finalize_, mask_of, set_mask
from .pattern import Pattern, Unstructured, pattern_of
from .quantise import RowQuantiser, quantised_type
from .score_activation import wanda
from .solve import Solved, sparsegpt
from .solve_exact import obs, refit

Sparsity = float | Mapping[str, float] | None


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer: the method, the sparsity reached, the relative squared error of its output.

    `scale` [N]: of a quantised layer, whose weights are whole numbers (or fp8 values) times it.
    """

    method: str
    sparsity: float
    error: float
    damp: float
    seconds: float
    note: str = ""
    scale: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """One layer for a solver: W[N, K] in the pattern's K order, its Hessian, what it may still hold."""

    name: str
    weight: Tensor
    hessian: Tensor  # [G, K, K], or for a layer above the limit the squares of the input norms [G, K]
    within: Tensor | None
    mask: Tensor | None


Solver = Callable[[Task], Solved]


def sparsegpt_(
    model: nn.Module,
    data: Iterable[Any],
    pattern: Pattern | str = "2:4",
    sparsity: Sparsity = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    hessians: str = "dense",
    damp: float = 0.1,
    block: int = 128,
    quantise: torch.dtype | str | None = None,
    filter_fn: Filter | None = None,
    forward: Forward | None = None,
    max_columns: int = 16384,
    memory: int = 2 << 30,
    keep_mask: bool = True,
    progress: bool = True,
) -> dict[str, LayerResult]:
    """Prunes Linears, Conv2ds and Conv1Ds in place and updates what stays (`solve.sparsegpt`). SparseGPT, 2301.00774.

    pattern: "2:4" or any Pattern (NM, Unstructured per layer or row, Block; a convolution in the K order that the
    pattern names); sparsity: a share for all layers, or {layer: share}. masks {layer: bool, shaped like the weight}:
    made elsewhere (transposable, by another score), then only the update is computed. data: see `calibrate`.

    hessians: "dense" or "sequential", see above. damp: the share of H's mean diagonal that is added to it. quantise:
    "int8" or "fp8" rounds the kept weights in the same sweep: the weights then hold dequantised values, the results the
    scales. A layer of more than max_columns inputs (K^2 floats for H, K^3 operations) is pruned by Wanda instead,
    without an update, and its result says so. memory: bytes of Hessians at a time; more passes where all do not fit.
    keep_mask: as in `magnitude_`. A layer that is masked already is pruned further.

    Returns what became of each layer. Raises ValueError for bad arguments and where no data reaches a layer.
    """
    rule = pattern_of(pattern)
    quantiser = None if quantise is None else RowQuantiser(quantised_type(quantise))

    def solver(task: Task) -> Solved:
        share = share_of(sparsity, task.name)
        chosen = {"mask": task.mask} if task.mask is not None else {"within": task.within}
        rule_ = None if task.mask is not None else rule
        return sparsegpt(task.weight, task.hessian, rule_, share, damp=damp, block=block, quantiser=quantiser, **chosen)

    return solve_(
        model,
        data,
        solver,
        "sparsegpt",
        pattern=rule,
        sparsity=sparsity,
        masks=masks,
        hessians=hessians,
        filter_fn=filter_fn,
        forward=forward,
        max_columns=max_columns,
        memory=memory,
        keep_mask=keep_mask,
        progress=progress,
    )


def obs_(
    model: nn.Module,
    data: Iterable[Any],
    pattern: Pattern | str = "2:4",
    sparsity: Sparsity = None,
    *,
    damp: float = 0.01,
    max_columns: int = 1024,
    **options: Any,
) -> dict[str, LayerResult]:
    """OBS over a model of small layers, in place (`solve_exact.obs`); options as of `sparsegpt_`."""
    rule = pattern_of(pattern)

    def solver(task: Task) -> Solved:
        share = share_of(sparsity, task.name)
        return obs(task.weight, task.hessian, rule, share, within=task.within, damp=damp, max_columns=max_columns)

    return solve_(model, data, solver, "obs", pattern=rule, sparsity=sparsity, max_columns=max_columns, **options)


def refit_(
    model: nn.Module,
    data: Iterable[Any],
    masks: Mapping[str, Tensor],
    *,
    damp: float = 0.1,
    order: str = "crs",
    **options: Any,
) -> dict[str, LayerResult]:
    """The best weights for given masks {layer: bool}, row by row by least squares (`solve_exact.refit`), in place.

    For masks of any origin; options as of `sparsegpt_`. Layers without a mask are left alone.
    """
    chosen = options.pop("filter_fn", None)

    def filter_fn(module: nn.Module, name: str) -> bool:
        return name in masks and (chosen is None or chosen(module, name))

    def solver(task: Task) -> Solved:
        assert task.mask is not None
        return refit(task.weight, task.hessian, task.mask, damp=damp)

    return solve_(model, data, solver, "refit", masks=masks, filter_fn=filter_fn, order=order, **options)


@torch.no_grad()
def solve_(
    model: nn.Module,
    data: Iterable[Any],
    solver: Solver,
    method: str,
    *,
    pattern: Pattern | None = None,
    sparsity: Sparsity = None,
    masks: Mapping[str, Tensor] | None = None,
    order: str | None = None,
    hessians: str = "dense",
    filter_fn: Filter | None = None,
    forward: Forward | None = None,
    max_columns: int = 16384,
    memory: int = 2 << 30,
    keep_mask: bool = True,
    write_masks: bool = True,
    progress: bool = True,
) -> dict[str, LayerResult]:
    """A solver(task) -> Solved over the model's layers, in place; the other arguments are those of `sparsegpt_`.

    write_masks=False leaves the layers' masks as they are: for solvers that only change weights.
    """
    if hessians not in ("dense", "sequential"):
        raise ValueError(f"hessians must be 'dense' or 'sequential', got {hessians!r}")
    run = _Run(model, solver, method, pattern, sparsity, masks, order, max_columns, forward, write_masks, progress)
    targets = layers(model, filter_fn)
    data = repeatable(data)
    results = run.dense(targets, data, memory) if hessians == "dense" else run.sequential(targets, data, memory)
    if not keep_mask:
        finalize_(model)
    return {name: results[name] for name, _ in targets}


@dataclass
class _Run:
    model: nn.Module
    solver: Solver
    method: str
    pattern: Pattern | None
    sparsity: Sparsity
    masks: Mapping[str, Tensor] | None
    order_: str | None
    max_columns: int
    forward: Forward | None
    write_masks: bool
    progress: bool

    @property
    def order(self) -> str:
        return self.order_ or str(getattr(self.pattern, "order", "crs"))

    def dense(self, targets: list[tuple[str, nn.Module]], data: Iterable[Any], memory: int) -> dict[str, LayerResult]:
        """All solutions from the model as it is, then all of them written."""
        solved = [
            (name, module, *self._solve(name, module, statistic))
            for part in self._parts(targets, memory)
            for name, module, statistic in self._watch(part, data, None)
        ]
        for _, module, found, _ in solved:
            self._write(module, found)
        return {name: result for name, _, _, result in solved}

    def sequential(
        self, targets: list[tuple[str, nn.Module]], data: Iterable[Any], memory: int
    ) -> dict[str, LayerResult]:
        """In the order of a forward; layers that read the same tensor share a pass, which ends after them."""
        names = {module: name for name, module in targets}
        first = next(iter(data), None)
        order = [] if first is None else call_order(self.model, first, names, self.forward)
        stages: list[tuple[int, list[tuple[str, nn.Module]]]] = []
        for module, source, _ in order:
            if not stages or stages[-1][0] != source:
                stages.append((source, []))
            stages[-1][1].append((names[module], module))
        repeated = {module for module, _, calls in order if calls > 1}
        missing = [name for module, name in names.items() if module not in {m for m, _, _ in order}]
        if missing:
            raise ValueError(f"no data reaches {', '.join(missing)}; leave them out by filter_fn")
        results = {}
        with shown("pruning in order", len(stages), self.progress) as step:
            for _, stage in stages:
                for part in self._parts(stage, memory):
                    last = None if any(module in repeated for _, module in part) else part[-1][1]
                    for name, module, statistic in self._watch(part, data, last, progress=False):
                        found, results[name] = self._solve(name, module, statistic)
                        self._write(module, found)
                step()
        return results

    def _parts(self, targets: list[tuple[str, nn.Module]], memory: int) -> Iterator[list[tuple[str, nn.Module]]]:
        """Layers whose Hessians fit into memory together, at least one at a time."""
        part: list[tuple[str, nn.Module]] = []
        held = 0
        for name, module in targets:
            k = _columns(module)
            size = 4 * groups(module) * (k * k if k <= self.max_columns else k)
            if part and held + size > memory:
                yield part
                part, held = [], 0
            part.append((name, module))
            held += size
        if part:
            yield part

    def _watch(
        self,
        part: list[tuple[str, nn.Module]],
        data: Iterable[Any],
        stop_after: nn.Module | None,
        progress: bool | None = None,
    ) -> Iterator[tuple[str, nn.Module, InputGram | InputNorm]]:
        """One pass; then every layer with its statistic, which is let go when the next one is taken."""
        made: dict[nn.Module, Any] = {
            module: (InputGram if _columns(module) <= self.max_columns else InputNorm)(self.order) for _, module in part
        }
        watchers: dict[nn.Module, Watcher] = dict(made)
        shows = self.progress if progress is None else progress
        observe(self.model, data, watchers, forward=self.forward, progress=shows, stop_after=stop_after)
        for name, module in part:
            statistic = made.pop(module)
            watchers.pop(module)
            if not statistic.tokens:
                raise ValueError(f"no data reaches {name}; leave it out by filter_fn")
            yield name, module, statistic

    def _solve(self, name: str, module: nn.Module, statistic: InputGram | InputNorm) -> tuple[Solved, LayerResult]:
        started = time.perf_counter()
        held = mask_of(module)
        given = None if self.masks is None else self.masks.get(name)
        if self.masks is not None and given is None:
            raise ValueError(f"masks has none for {name}; leave it out by filter_fn")
        task = Task(
            name,
            as_matrix(module, weight_of(module).detach(), self.order),
            statistic.hessian if isinstance(statistic, InputGram) else statistic.norm.square(),
            None if held is None else as_matrix(module, held.mask, self.order),
            None if given is None else as_matrix(module, given.to(weight_of(module).device), self.order),
        )
        method, note = self.method, ""
        if isinstance(statistic, InputGram):
            found = self.solver(task)
        else:
            method, note = "wanda", f"{_columns(module)} inputs > max_columns = {self.max_columns}: no update"
            warnings.warn(f"{name} is pruned by Wanda: {note}", stacklevel=2)
            found = self._by_wanda(task)
        seconds = time.perf_counter() - started
        sparsity = 1 - float(found.mask.float().mean())
        return found, LayerResult(method, sparsity, found.error, found.damp, seconds, note, found.scale)

    def _by_wanda(self, task: Task) -> Solved:
        """The mask of Wanda; the error counts the diagonal of H alone, which is all that is known."""
        mask = task.mask
        if mask is None:
            if self.pattern is None:
                raise ValueError(f"{task.name}: K = {task.weight.shape[1]} > max_columns = {self.max_columns}")
            rule = Unstructured("row") if isinstance(self.pattern, Unstructured) else self.pattern
            scores = wanda(task.weight, task.hessian.sqrt())
            scores = scores if task.within is None else scores * task.within
            mask = rule.mask(scores, share_of(self.sparsity, task.name))
            mask = mask if task.within is None else mask & task.within
        weight = torch.where(mask, task.weight, 0)
        diagonal = task.hessian.repeat_interleave(len(weight) // len(task.hessian), 0)
        whole = float((task.weight.double().square() * diagonal).sum())
        lost = float(((task.weight - weight).double().square() * diagonal).sum())
        return Solved(weight, mask, lost / whole if whole else 0.0, 0.0)

    def _write(self, module: nn.Module, found: Solved) -> None:
        parameter = weight_parameter(module)
        assert parameter is not None  # layers() gives no others
        mask = as_weight(module, found.mask, self.order)
        parameter.copy_(as_weight(module, found.weight, self.order))
        for twin in sharing(self.model, module) if self.write_masks else ():
            set_mask(twin, mask)


def _columns(module: nn.Module) -> int:
    """K, the number of inputs of an output feature."""
    return weight_of(module).numel() // max(1, outputs(module))


def share_of(sparsity: Sparsity, name: str) -> float | None:
    """The sparsity asked for of this layer. Raises ValueError where a dictionary leaves it out."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    if name not in sparsity:
        raise ValueError(f"sparsity has no entry for {name}; leave it out by filter_fn")
    return sparsity[name]
