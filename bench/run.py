"""Gate, time, record: python -m bench.run [GROUP ...] [--out FILE] [--repeats N].

GROUP is one of bench/cases.py; without one, all that the README shows. Every case is checked before it is timed. A row
holds the median and the spread of each variant, each bar with its ratio and whether it was met, and the machine;
`scripts/results_table` writes the README's tables from these files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsekern.testing import measure, threads

from . import cases as catalogue
from . import report


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*catalogue.GROUPS, []], help="default: all that the README shows")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    console = report.console()
    rows: list[dict[str, Any]] = []
    for group in args.groups or catalogue.TABLES:
        made = []
        for case in catalogue.GROUPS[group]():
            row = run(case, args.repeats)
            made.append(row)
            console.print(f"[dim]{escape(case.name)}[/dim]", highlight=False)
        show(made, console)
        rows += made
    if args.out:
        args.out.write_text(json.dumps({"machine": report.machine(), "rows": rows}, indent=1) + "\n")
    if any("error" in row for row in rows):
        raise SystemExit("a gate failed: its row has no time")


if __name__ == "__main__":
    main()
