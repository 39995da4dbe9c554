"""Prune, distil, quantise, in any order; what each stage did is reported.

    report = Pipeline(
        ("prune", lambda model: sparsegpt_(model, data, "2:4")),
        ("distil", lambda model: distil_(model, teacher, data, steps=200)),
        ("quantise", lambda model: quantise_(model, "int8")),
        evaluate=lambda model: {"accuracy": accuracy(model)},
    ).run(model)

A stage is any function of the model that changes it in place. Masks last through all of them. What a later stage does
to whole numbers is seen in the report's `levels`: distillation after quantisation leaves the grid unless `distil_` is
told to round (quantise=), pruning by magnitude stays on it, SparseGPT's update needs its own quantise=.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .layers import Filter, as_matrix, layers, weight_of

Stage = tuple[str, Callable[[nn.Module], Any]]


@dataclass(frozen=True)
class StageReport:
    """The model after one stage: weights of its layers, share of zeros, what `evaluate` said.

    `levels`: the most distinct values in a row of any layer, zero included; at most 255 for int8, 253 for fp8.
    `result` is what the stage returned.
    """

    stage: str
    seconds: float
    weights: int
    nonzeros: int
    levels: int
    metrics: dict[str, float] = field(default_factory=dict)
    result: Any = None

    @property
    def sparsity(self) -> float:
        """Share of the layers' weights that is zero."""
        return 1 - self.nonzeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class PipelineReport:
    """One row a stage, the model as it came first ("start")."""

    stages: tuple[StageReport, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain numbers and strings, tensors left out."""
        return [
            {
                "stage": s.stage,
                "seconds": s.seconds,
                "weights": s.weights,
                "nonzeros": s.nonzeros,
                "sparsity": s.sparsity,
                "levels": s.levels,
                "metrics": s.metrics,
                "result": _plain(s.result),
            }
            for s in self.stages
        ]

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def __rich__(self) -> Table:
        metrics = list(dict.fromkeys(name for s in self.stages for name in s.metrics))
        table = Table(title="pipeline", title_justify="left")
        for i, heading in enumerate(("stage", "seconds", "sparsity", "nonzeros", "levels", *metrics)):
            table.add_column(heading, justify="right" if i else "left")
        for s in self.stages:
            values = (f"{s.metrics[m]:.4g}" if m in s.metrics else "" for m in metrics)
            row = (s.stage, f"{s.seconds:.1f}", f"{s.sparsity:.1%}", str(s.nonzeros), str(s.levels))
            table.add_row(*row, *values)
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


class Pipeline:
    """Stages (name, function of the model), run in the order given; evaluate(model) -> {metric: number} after each.

    filter_fn chooses the layers that the report counts.
    """

    def __init__(
        self,
        *stages: Stage,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        filter_fn: Filter | None = None,
    ) -> None:
        if not stages:
            raise ValueError("a pipeline needs at least one stage, a pair (name, function)")
        for stage in stages:
            if len(stage) != 2 or not callable(stage[1]):
                raise ValueError(f"a stage is a pair (name, function of the model), got {stage!r}")
        self.stages, self.evaluate, self.filter_fn = stages, evaluate, filter_fn

    def run(self, model: nn.Module, show: Callable[[StageReport], Any] | None = None) -> PipelineReport:
        """Runs the stages on the model, in place. show(row) is called after each."""
        rows = []
        for name, function in (("start", None), *self.stages):
            started = time.perf_counter()
            result = None if function is None else function(model)
            rows.append(self._row(name, model, result, time.perf_counter() - started))
            if show is not None:
                show(rows[-1])
        return PipelineReport(tuple(rows))

    @torch.no_grad()
    def _row(self, name: str, model: nn.Module, result: Any, seconds: float) -> StageReport:
        weights = [as_matrix(module, weight_of(module)) for _, module in layers(model, self.filter_fn)]
        return StageReport(
            stage=name,
            seconds=seconds,
            weights=sum(w.numel() for w in weights),
            nonzeros=sum(int(torch.count_nonzero(w)) for w in weights),
            levels=max((_levels(w) for w in weights), default=0),
            metrics=dict(self.evaluate(model)) if self.evaluate is not None else {},
            result=result,
        )


def _levels(matrix: Tensor) -> int:
    """The most distinct values in a row."""
    if not matrix.numel():
        return 0
    ordered = matrix.sort(dim=1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max()) + 1


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if not isinstance(part, Tensor)}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return repr(value)
