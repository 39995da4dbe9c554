"""What convert_ did, layer by layer: a table, a JSON file, a picture."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

CONVERTED, DENSE, SKIPPED, SPARSE = "converted", "dense", "skipped", "sparse"


@dataclass
class Call:
    """One shape that a layer was called with, how often, and the milliseconds of a call (None: untimed)."""

    shape: tuple[int, ...]
    tokens: int
    count: int = 1
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def speedup(self) -> float | None:
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None


@dataclass
class Row:
    """One layer. `status` is "converted", "dense" (kept so), "skipped" or "sparse" (it already was).

    `dense_ms` and `sparse_ms` are totals over `calls`; of a layer kept dense, sparse_ms is the best
    candidate's. `expected` is the heuristic's guess of the speed-up where nothing was timed. Bytes are
    those of the weight.
    """

    layer: str
    type: str
    shape: tuple[int, ...] = ()
    status: str = SKIPPED
    pattern: str = ""
    density: float | None = None
    format: str = "dense"
    backend: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0  # with dense_above, of both weights
    dense_above: int | None = None  # calls with more tokens run dense (convert_'s thresholds)
    expected: float | None = None
    max_error: float | None = None
    reason: str = ""
    also: tuple[str, ...] = ()  # other names of the same weight
    calls: list[Call] = field(default_factory=list)

    @property
    def dense_ms(self) -> float | None:
        return _total([(c.dense_ms, c.count) for c in self.calls])

    @property
    def sparse_ms(self) -> float | None:
        return _total([(self._own_ms(c), c.count) for c in self.calls])

    def _own_ms(self, call: Call) -> float | None:
        """What the sparse module takes for a call: above its threshold what dense takes."""
        return call.dense_ms if self.dense_above is not None and call.tokens > self.dense_above else call.sparse_ms

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time, over all calls; None where nothing was timed."""
        dense, sparse = self.dense_ms, self.sparse_ms
        return dense / sparse if dense and sparse else None

    @property
    def worst_speedup(self) -> float | None:
        """The speed-up of the call shape that gains least."""
        own = [(c.dense_ms, self._own_ms(c)) for c in self.calls]
        known = [dense / sparse for dense, sparse in own if dense and sparse]
        return min(known) if known else None

    @property
    def now_ms(self) -> float | None:
        """What the layer takes after the conversion."""
        return self.sparse_ms if self.status == CONVERTED else self.dense_ms


def _total(parts: list[tuple[float | None, int]]) -> float | None:
    if not parts or any(ms is None for ms, _ in parts):
        return None
    return sum(ms * count for ms, count in parts if ms is not None)


@dataclass
class Report:
    """The rows of a conversion, its settings and notes, and the converted `model`.

    print(report) is a table, `to_json` a record, `plot` a picture. Iterating gives rows, report["name"] one.
    """

    rows: list[Row]
    model: nn.Module
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, layer: str) -> Row:
        for row in self.rows:
            if layer == row.layer or layer in row.also:
                return row
        raise KeyError(f"no layer {layer!r} in this report; it has {', '.join(r.layer for r in self.rows) or 'none'}")

    @property
    def converted(self) -> list[Row]:
        return [row for row in self.rows if row.status == CONVERTED]

    def totals(self) -> dict[str, Any]:
        """Layers by status; milliseconds of all timed layers and bytes of all weights, before and after."""
        timed = [row for row in self.rows if row.dense_ms is not None and row.now_ms is not None]
        dense = sum(row.dense_ms for row in timed if row.dense_ms is not None)
        now = sum(row.now_ms for row in timed if row.now_ms is not None)
        return {
            "layers": {s: sum(r.status == s for r in self.rows) for s in (CONVERTED, DENSE, SKIPPED, SPARSE)},
            "timed": len(timed),
            "dense_ms": dense if timed else None,
            "now_ms": now if timed else None,
            "speedup": dense / now if timed and now else None,
            "bytes_before": sum(row.bytes_before for row in self.rows),
            "bytes_after": sum(row.bytes_after for row in self.rows),
        }

    # Table
    # ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The table as text: in colour and as wide as the terminal there, elsewhere plain, 160 columns."""
        tty = sys.stdout.isatty()
        return self.text(width=shutil.get_terminal_size((160, 24)).columns if tty else 160, colour=tty)

    def text(self, width: int = 160, colour: bool = False) -> str:
        """The table as text of at most `width` columns (at least 40); narrow ones leave columns out."""
        file = io.StringIO()
        console = Console(file=file, width=max(40, width), force_terminal=colour, no_color=not colour, highlight=False)
        if not colour:
            console.legacy_windows = False
        console.print(self.__rich__(console.width))
        for line in (*self._footnotes(), *self.summary()):
            console.print(Text(line))
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def __rich__(self, width: int = 160) -> Table:
        """The table for rich; the reasons stand under it (`text` has both)."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
        reasons = self._reasons()
        columns = self._fitting(width - (7 if reasons else 0))
        for c in columns:
            table.add_column(c.name, justify=c.justify, overflow="fold", no_wrap=c.name != "layer")
        if reasons:
            table.add_column("note", justify="right", no_wrap=True)
        for row in self.rows:
            style = {CONVERTED: "green", SPARSE: "green", SKIPPED: "dim"}.get(row.status, "")
            note = [f"[{reasons[_reason(row)]}]"] if _reason(row) else [""] if reasons else []
            table.add_row(*(Text(text) for text in [*(c.show(row) for c in columns), *note]), style=style)
        return table

    def _fitting(self, width: int) -> list[_Column]:
        """The columns that have something to say, less those that matter least until the rest fits."""
        wide = {c.name: max([len(c.show(row)) for row in self.rows], default=0) for c in _COLUMNS}
        columns = [c for c in _COLUMNS if wide[c.name]]
        wide = {name: max(size, len(name)) for name, size in wide.items()}
        wide["layer"] = min(wide["layer"], max(12, width // 4))  # the only one that may fold
        for name in _EXPENDABLE:
            if sum(wide[c.name] for c in columns) + 3 * (len(columns) - 1) <= width:
                break
            columns = [c for c in columns if c.name != name]
        return columns

    def _reasons(self) -> dict[str, int]:
        """The different reasons, numbered in the order of the rows."""
        return {text: i for i, text in enumerate(dict.fromkeys(filter(None, map(_reason, self.rows))), 1)}

    def _footnotes(self) -> list[str]:
        return [f"[{i}] {text}" for text, i in self._reasons().items()] + [""]

    def summary(self) -> list[str]:
        """The lines under the table: totals, settings, notes."""
        t = self.totals()
        counts = [f"{n} {name}" for name, n in t["layers"].items() if n]
        plural = "" if len(self.rows) == 1 else "s"
        lines = [f"{len(self.rows)} layer{plural}: {', '.join(counts) or 'none'}."]
        if t["bytes_before"]:
            share = t["bytes_after"] / t["bytes_before"]
            lines.append(f"Weights: {_size(t['bytes_before'])} -> {_size(t['bytes_after'])} ({100 * share:.0f} %).")
        if t["speedup"] is not None:
            layers = f"{t['timed']} timed layer{'' if t['timed'] == 1 else 's'}"
            lines.append(
                f"{layers}, all calls of the sample: {_ms(t['dense_ms'])} ms dense -> "
                f"{_ms(t['now_ms'])} ms now ({t['speedup']:.2f}x)."
            )
        return lines + self.notes

    # JSON
    # -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data: settings, totals, notes, rows."""
        extra = ("dense_ms", "sparse_ms", "speedup", "worst_speedup")
        rows = [{**asdict(row), **{name: getattr(row, name) for name in extra}} for row in self.rows]
        return {"settings": self.settings, "totals": self.totals(), "notes": self.notes, "rows": rows}

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, also written to `path` where given. Milliseconds; absent figures are null."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    # Picture
    # --------------------------------------------------------------------------------------------------

    def plot(self, path: str | Path, top: int = 40) -> Path:
        """Draws time and bytes of every layer, dense beside now, into an image file (.png, .svg, .pdf).

        At most the `top` layers of the largest weights. Raises ImportError naming the extra where
        matplotlib is absent, ValueError for a report without layers.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("report.plot needs matplotlib: pip install 'sparsekern[plot]'") from error
        rows = sorted((r for r in self.rows if r.bytes_before), key=lambda r: -r.bytes_before)[:top]
        if not rows:
            raise ValueError("the report has no layer to draw")
        rows = [r for r in self.rows if any(r is kept for kept in rows)]
        timed = any(r.dense_ms for r in rows)
        figure = Figure(figsize=(12, 1.8 + 0.32 * len(rows)), layout="constrained")
        panels = list(figure.subplots(1, 2, sharey=True)) if timed else [figure.subplots()]
        if timed:
            _bars(panels[0], [(r.dense_ms, r.sparse_ms, r.status == CONVERTED) for r in rows])
            panels[0].set_xlabel("ms, all calls of the sample")
            panels[0].margins(x=0.2)
            for i, r in enumerate(rows):
                if r.speedup is not None:
                    label = f" {r.speedup:.2f}x {r.format}"
                    panels[0].text(max(r.dense_ms or 0, r.sparse_ms or 0), i, label, va="center", fontsize=7)
        sizes = [(r.bytes_before / 2**20, r.bytes_after / 2**20, r.status == CONVERTED) for r in rows]
        _bars(panels[-1], [(before, after if taken else None, taken) for before, after, taken in sizes])
        panels[-1].set_xlabel("MiB of the weight")
        panels[0].set_yticks(range(len(rows)), [_short(r.layer) for r in rows], fontsize=8)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
        t = self.totals()
        speed = f", {t['speedup']:.2f}x over all timed layers" if t["speedup"] is not None else ""
        figure.suptitle(f"sparsekern: {len(self.converted)} of {len(self.rows)} layers converted{speed}", fontsize=11)
        figure.savefig(str(path), dpi=120)
        return Path(path)


def _bars(axes: Any, pairs: list[tuple[float | None, float | None, bool]]) -> None:
    """Grey: dense; green: sparse, taken; hatched: sparse, not taken because dense was faster."""
    at = range(len(pairs))
    axes.barh([i - 0.2 for i in at], [d or 0 for d, _, _ in pairs], 0.36, color="0.65", label="dense")
    kinds = (
        (True, "tab:green", None, "sparse, converted"),
        (False, "white", "////", "best sparse, not taken"),
    )
    for taken, colour, hatch, label in kinds:
        chosen = [(i, s) for i, (_, s, t) in zip(at, pairs, strict=True) if t == taken and s]
        if chosen:
            where, size = zip(*chosen, strict=True)
            style = {"color": colour, "hatch": hatch, "edgecolor": "0.4", "linewidth": 0.5, "label": label}
            axes.barh([i + 0.2 for i in where], size, 0.36, **style)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Column:
    name: str
    show: Any
    justify: Any = "left"


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def _size(size: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _short(name: str, width: int = 40) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _speedup(row: Row) -> str:
    if row.speedup is None:
        return "" if row.expected is None else f"~{row.expected:.2f}x"
    worst = row.worst_speedup
    several = len(row.calls) > 1 and worst is not None
    return f"{row.speedup:.2f}x" + (f" (worst {worst:.2f}x)" if several else "")


def _reason(row: Row) -> str:
    also = f"also {', '.join(row.also)}" if row.also else ""
    return "; ".join(part for part in (row.reason, also) if part)


_COLUMNS = (
    _Column("layer", lambda r: r.layer),
    _Column("type", lambda r: r.type),
    _Column("shape", lambda r: "x".join(map(str, r.shape))),
    _Column("pattern", lambda r: r.pattern),
    _Column("density", lambda r: "" if r.density is None else f"{100 * r.density:.3g}%", "right"),
    _Column("format", lambda r: r.format),
    _Column("backend", lambda r: r.backend or ""),
    _Column("dense ms", lambda r: _ms(r.dense_ms), "right"),
    _Column("sparse ms", lambda r: _ms(r.sparse_ms), "right"),
    _Column("speed-up", _speedup, "right"),
    _Column("bytes", lambda r: _size(r.bytes_before), "right"),
    _Column("after", lambda r: _size(r.bytes_after), "right"),
    _Column("error", lambda r: "" if r.max_error is None else f"{r.max_error:.1e}", "right"),
)
_EXPENDABLE = (
    "type",
    "error",
    "backend",
    "density",
    "bytes",
    "after",
    "shape",
    "sparse ms",
    "dense ms",
    "pattern",
)
