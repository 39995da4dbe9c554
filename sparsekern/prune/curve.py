"""Curves of accuracy over sparsity, with random and magnitude as controls, and the sensitivity of each layer."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .apply import Criterion, prune_
from .calibrate import repeatable, shown
from .layers import Filter, layers, weight_of
from .metrics import Result, evaluate_pruned
from .pattern import STRUCTURAL, Pattern, pattern_of
from .structure import shrink_

CONTROLS = ("random", "magnitude")


@dataclass
class Curve:
    """The results of several methods at several sparsities.

    print(curve) is a table, `to_json` a record, `plot` a picture.
    """

    results: list[Result]
    settings: dict[str, Any] = field(default_factory=dict)

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("method")
        for name in (
            "sparsity",
            "dense",
            "pruned",
            "recovered",
            "compression",
            "bytes",
            "in theory",
            "measured",
            "gap",
        ):
            table.add_column(name, justify="right")
        for r in self.results:
            table.add_row(*_cells(r))
        return table

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=140, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data: settings and results."""
        return {"settings": self.settings, "results": [r.to_dict() for r in self.results]}

    def to_json(self, path: str | Path | None = None) -> str:
        """The curve as JSON, also written to `path` where given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> Path:
        """Draws accuracy over sparsity, and over measured speed-up where it was measured, into an image file.

        Raises ImportError naming the extra where matplotlib is absent, ValueError where there is no result.
        """
        if not self.results:
            raise ValueError("the curve has no result to draw")
        timed = [r for r in self.results if r.speed is not None]
        figure = _figure(11 if timed else 6.5, 4.2)
        panels = list(figure.subplots(1, 2, sharey=True)) if timed else [figure.subplots()]
        for method in dict.fromkeys(r.method for r in self.results):
            own = sorted((r for r in self.results if r.method == method), key=lambda r: r.sparsity)
            style = {"marker": "o", "markersize": 4, "linestyle": "--" if method in CONTROLS else "-"}
            panels[0].plot([r.sparsity for r in own], [r.accuracy for r in own], label=method, **style)
            if timed:
                pairs = [(r.speed.speedup, r.accuracy) for r in own if r.speed is not None]
                panels[1].plot([s for s, _ in pairs], [a for _, a in pairs], label=method, **style)
        panels[0].axhline(self.results[0].accuracy_dense, color="0.5", linewidth=1, label="dense")
        panels[0].set(xlabel="sparsity", ylabel="accuracy")
        if timed:
            panels[1].axvline(1, color="0.5", linewidth=1)
            panels[1].set(xlabel="measured speed-up over dense")
        _finish(figure, panels)
        figure.savefig(str(path), dpi=120)
        return Path(path)


def _cells(r: Result) -> list[str]:
    recovered = "" if r.accuracy_recovered is None else f"{r.accuracy_recovered:.4f}"
    theory = r.size.theoretical_speedup if r.speed is None else r.speed.theoretical
    measured = "" if r.speed is None else f"{r.speed.speedup:.2f}x"
    gap = "" if r.speed is None or r.speed.gap is None else f"{r.speed.gap:.2f}"
    share = r.size.stored_bytes / max(1, r.size.dense_bytes)
    return [
        r.method, f"{r.sparsity:.1%}", f"{r.accuracy_dense:.4f}", f"{r.accuracy_pruned:.4f}", recovered,
        f"{r.size.compression:.2f}x", f"{share:.0%}", "" if theory is None else f"{theory:.2f}x", measured, gap,
    ]  # fmt: skip


def curve(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    pattern: Pattern | str = "unstructured",
    sparsities: Sequence[float | None] = (0.5, 0.7, 0.8, 0.9, 0.95),
    criteria: Sequence[Criterion] = (),
    *,
    controls: Sequence[str] = CONTROLS,
    recover: Callable[[nn.Module], Any] | None = None,
    sample: Any = None,
    timed: bool = True,
    progress: bool = True,
    seconds: float = 1.0,
    **options: Any,
) -> Curve:
    """Prunes a copy of the model at every sparsity by every criterion and by the controls, and measures each.

    evaluate(model) -> larger is better; recover(model) trains a pruned copy in place; sample: what the model
    is called with, for multiply-adds and (where `timed`) the time after `convert_`. criteria and further
    options (data, loss, filter_fn ...) as for `prune_`. Structural patterns are cut out (`shrink_`) before
    the measurement. N:M takes sparsities=(None,). ShrinkBench's rules: several sparsities, a random and a
    magnitude control, the dense accuracy beside each.
    """
    rule = pattern_of(pattern)
    methods = list(dict.fromkeys([*controls, *criteria]))
    if options.get("data") is not None:
        options["data"] = repeatable(options["data"])
    baseline, results = evaluate(model), []
    with shown("pruning", len(methods) * len(sparsities), progress) as bar:
        for method in methods:
            known = {k: v for k, v in options.items() if k not in ("data", "loss") or method not in CONTROLS}
            for share in sparsities:
                twin = copy.deepcopy(model)
                extra = {"sample": sample} if isinstance(rule, STRUCTURAL) and sample is not None else {}
                prune_(twin, rule, share, method, **extra, **known)
                if isinstance(rule, STRUCTURAL):
                    shrink_(twin, sample)
                results.append(
                    evaluate_pruned(
                        twin,
                        model,
                        evaluate,
                        method=_name(method),
                        pattern=str(rule),
                        recover=recover,
                        sample=sample,
                        timed=timed,
                        baseline=baseline,
                        seconds=seconds,
                    )
                )
                bar()
    return Curve(results, {"pattern": repr(rule), "threads": torch.get_num_threads()})


def _name(method: Criterion) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


# Sensitivity ------------------------------------------------------------------------------------------------


@dataclass
class Sensitivity:
    """accuracy[layer][sparsity] with that layer alone pruned; `baseline` is the dense model's, `sizes` the weights."""

    baseline: float
    accuracy: dict[str, dict[float, float]]
    sizes: dict[str, int]

    def plan(self, *, drop: float | None = None, sparsity: float | None = None) -> dict[str, float]:
        """{layer: sparsity}, as `prune_` takes it.

        drop: each layer gets the largest sparsity that, alone, costs at most this much accuracy. sparsity:
        the smallest drop is sought at which all layers together reach this share of their weights (or the
        most that the measured points allow: ValueError where even those do not reach it).
        """
        if (drop is None) == (sparsity is None):
            raise ValueError("plan takes drop=, or sparsity=, one of them")
        if drop is not None:
            return {name: self._most(name, drop) for name in self.accuracy}
        assert sparsity is not None
        total = sum(self.sizes.values())
        for allowed in sorted(
            {max(0.0, self.baseline - a) for points in self.accuracy.values() for a in points.values()}
        ):
            found = {name: self._most(name, allowed) for name in self.accuracy}
            if sum(found[n] * self.sizes[n] for n in found) / total >= sparsity - 1e-9:
                return found
        raise ValueError(f"the sparsities measured do not reach {sparsity:g}: measure higher ones")

    def _most(self, name: str, drop: float) -> float:
        """The largest sparsity such that it and all below it cost at most this much."""
        best = 0.0
        for share, value in sorted(self.accuracy[name].items()):
            if self.baseline - value > drop + 1e-12:
                break
            best = share
        return best

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        points = {n: [{"sparsity": s, "accuracy": a} for s, a in sorted(p.items())] for n, p in self.accuracy.items()}
        return {"baseline": self.baseline, "layers": points, "sizes": self.sizes}

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON, also written to `path` where given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("layer")
        table.add_column("weights", justify="right")
        shares = sorted({s for points in self.accuracy.values() for s in points})
        for share in shares:
            table.add_column(f"{share:.0%}", justify="right")
        for name, points in self.accuracy.items():
            cells = [f"{points[s] - self.baseline:+.4f}" if s in points else "" for s in shares]
            table.add_row(name, str(self.sizes[name]), *cells)
        return table

    def plot(self, path: str | Path) -> Path:
        """Draws the accuracy of every layer over its sparsity, into an image file (.png, .svg, .pdf).

        Raises ImportError naming the extra where matplotlib is absent.
        """
        figure = _figure(8, 4.8)
        axes = figure.subplots()
        for name, points in self.accuracy.items():
            pairs = sorted(points.items())
            axes.plot([s for s, _ in pairs], [a for _, a in pairs], marker="o", markersize=3, label=name)
        axes.axhline(self.baseline, color="0.5", linewidth=1, label="dense")
        axes.set(xlabel="sparsity of the layer alone", ylabel="accuracy")
        _finish(figure, [axes])
        figure.savefig(str(path), dpi=120)
        return Path(path)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    pattern: Pattern | str = "unstructured",
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    criterion: Criterion = "magnitude",
    *,
    filter_fn: Filter | None = None,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Prunes one layer at a time at every sparsity, the others dense, and measures. The model stays as it was.

    evaluate(model) -> larger is better; options as for `prune_`. The per-layer plan that comes of it is
    `Sensitivity.plan`. Li et al. 2017 (arXiv 1608.08710), Han et al. 2015 (arXiv 1506.02626). Channels are
    pruned by group, under the name of its first producer.
    """
    rule = pattern_of(pattern)
    data: Iterable[Any] | None = options.get("data")
    if data is not None:
        options["data"] = repeatable(data)
    if isinstance(rule, STRUCTURAL):
        groups = prune_(copy.deepcopy(model), rule, 0.0, criterion, filter_fn=filter_fn, **options)
        found: Mapping[str, int] = {name: _weights(model, name.split("+")) for name in groups}
    else:
        found = {name: weight_of(module).numel() for name, module in layers(model, filter_fn)}
    accuracy: dict[str, dict[float, float]] = {}
    with shown("measuring layers", len(found) * len(sparsities), progress) as bar:
        for name in found:
            accuracy[name] = {}
            for share in sparsities:
                twin = copy.deepcopy(model)
                prune_(twin, rule, {name: share}, criterion, filter_fn=filter_fn, **options)
                accuracy[name][share] = float(evaluate(twin))
                bar()
    return Sensitivity(float(evaluate(model)), accuracy, dict(found))


def _weights(model: nn.Module, names: Sequence[str]) -> int:
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'sparsekern[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Any, panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
