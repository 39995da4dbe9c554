"""Gate, time, record: python -m bench.run [GROUP ...] [--device cuda] [--out FILE] [--repeats N] [--seconds S].

GROUP is one of bench/cases.py; without one, all that the README shows. Every case is checked before it is timed. A row
holds the median and the spread of each variant, each bar with its ratio and whether it was met, and the machine;
`scripts/results_table` writes the README's tables from these files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsekern.testing import measure, threads

from . import cases as catalogue
from . import gpu, gpu_data, report


def run(case: catalogue.Case, repeats: int) -> dict[str, Any]:
    """One row. A failed gate is a row too: with its error and no times."""
    row: dict[str, Any] = {
        "group": case.group,
        "params": case.params,
        "threads": case.threads,
        "note": case.note,
    }
    with threads(case.threads), torch.enable_grad():
        variants = case.make()
        try:
            if case.gate is not None:
                case.gate(variants)
        except AssertionError as error:
            return row | {"error": str(error)}
        timings = measure(variants, repeats=repeats)
    row["ms"] = {
        name: {"median": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}
        for name, t in timings.items()
    }
    ours = timings["sparsekern"].median
    row["ratio"] = {name: t.median / ours for name, t in timings.items() if name != "sparsekern"}
    row["bars"] = [
        {"baseline": b.baseline, "bar": b.ratio, "ratio": row["ratio"][b.baseline],
         "met": row["ratio"][b.baseline] >= b.ratio}
        for b in case.bars
    ]  # fmt: skip
    if "30 ms" in case.tags:
        row["bars"].append({"baseline": "30 ms", "bar": 1.0, "ratio": 30e-3 / ours, "met": ours <= 30e-3})
    return row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=None)
    for heading in ("case", "ours ms", "spread", "against", "bar"):
        table.add_column(heading)
    for row in rows:
        name = row["group"] + " " + " ".join(f"{v}" for v in row["params"].values())
        if "error" in row:
            table.add_row(name, "-", "-", row["error"], "gate failed")
            continue
        ours = row["ms"]["sparsekern"]
        against = ", ".join(f"{k} {v:.2f}x" for k, v in row["ratio"].items())
        bars = ", ".join(f"{b['bar']}x {'met' if b['met'] else 'MISSED'}" for b in row["bars"])
        table.add_row(name, f"{ours['median']:.3f}", f"{ours['p20']:.3f}-{ours['p80']:.3f}", against, bars)
    console.print(table)


@dataclass
class Run:
    """The rows so far, and where they are kept."""

    out: Path | None
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    clocks: dict[str, dict[str, str]] = field(default_factory=dict)  # of the GPU, at the end of each group
    unreached: list[str] = field(default_factory=list)  # cases for which no time was left

    @classmethod
    def begun(cls, out: Path | None, resume: bool) -> Run:
        """A new one, or that of the file; its rows are not measured again."""
        if not (resume and out and out.exists()):
            return cls(out, report.machine())
        old = json.loads(out.read_text())
        return cls(out, old["machine"], old["rows"], old.get("clocks", {}))

    def save(self) -> None:
        """After every case: a run that is cut off leaves what it has."""
        if self.out:
            more = {name: kept for name in ("clocks", "unreached") if (kept := getattr(self, name))}
            report.save(self.out, {"machine": self.machine, **more, "rows": self.rows})

    def has(self, case: catalogue.Case) -> bool:
        return any((row["group"], row["params"]) == (case.group, case.params) for row in self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*catalogue.GROUPS, *gpu.GROUPS, []]
    parser.add_argument("groups", nargs="*", choices=known, help="default: all that the README shows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose groups are run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after these no case is begun")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and measure the others")
    args = parser.parse_args()
    groups = gpu.GROUPS if args.device == "cuda" else catalogue.GROUPS
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if strange := set(args.groups) - set(groups):
        parser.error(f"{', '.join(sorted(strange))}: not a group of --device {args.device}")
    chosen = args.groups or list(groups if args.device == "cuda" else catalogue.TABLES)
    begin, console, done = time.monotonic(), report.console(), Run.begun(args.out, args.resume)
    for group in chosen:
        for case in groups[group]():
            if done.has(case):
                continue
            left = args.seconds - (time.monotonic() - begin)
            if left <= 0:
                done.unreached.append(case.name)
                continue
            console.print(f"[dim]{escape(case.name)}[/dim]", highlight=False)  # before: one that hangs is named, too
            done.rows.append(gpu.run(case, args.repeats) if args.device == "cuda" else run(case, args.repeats))
            done.save()
            if args.device == "cuda" and args.out and gpu.broken():
                console.print("a kernel's fault ended this process's use of the GPU: a new one goes on")
                own = ["--device", "cuda", "--out", str(args.out), "--repeats", str(args.repeats), "--resume"]
                within = [] if math.isinf(args.seconds) else ["--seconds", str(max(0.0, left))]
                os.execv(sys.executable, [sys.executable, "-m", "bench.run", *args.groups, *own, *within])
        if args.device == "cuda":
            gpu_data.forget()
            done.clocks[group] = report.gpu_state("clocks.sm", "clocks.mem", "temperature.gpu")
        show([row for row in done.rows if row["group"] == group], console)
    done.save()
    if done.unreached:
        console.print(f"no time was left for {len(done.unreached)} cases, from {escape(done.unreached[0])} on")
    if any("error" in row for row in done.rows):
        raise SystemExit("a case failed, or its gate: its row has no time")


if __name__ == "__main__":
    main()
