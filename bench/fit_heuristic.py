"""Fits the constants of sparsekern/heuristic.py to measurements: python -m bench.fit_heuristic [--write | --check].

Reads the Linear rows of bench/results/cpu.json and, where it is there, grid.json (more shapes: python -m bench.run grid
--out bench/results/grid.json), both measured on an AMX machine. Every format and type is a line over M of its own, so
each is fitted by itself: least squares of the logarithms, so that a microsecond's call counts as much as a second's.
What no measurement tells stays as in DENSE and SPARSE below: bytes are fitted only where few tokens were measured,
because many are another kernel, and a weak pull stands towards the rest.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from sparsekern.heuristic import FORMATS, Rates, dense_us, sparse_us

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "sparsekern" / "heuristic.py"
RESULTS = tuple(ROOT / "bench" / "results" / f"{name}.json" for name in ("cpu", "grid"))
GROUPS = ("csr_mm", "bsr_mm", "sp24_mm", "decode", "grid")  # those without gradients
ITEM = {"float32": 4, "bfloat16": 2}
FEW = 16  # tokens
PULL = 0.1  # what an error of a factor e in a constant weighs against one in a time
# Where a fit starts, and what stays where nothing was measured.
DENSE = {"float32": Rates(165.0, 20.0, gemv=14.0), "bfloat16": Rates(900.0, 15.0, gemv=10.0)}
SPARSE = {
    "csr": {"float32": Rates(100.0, 8.0, 0.2), "bfloat16": Rates(100.0, 8.0, 0.2)},
    "bsr": {"float32": Rates(130.0, 15.0, 0.2), "bfloat16": Rates(700.0, 15.0, 0.1)},
    "sp24": {"float32": Rates(90.0, 12.0, 0.2), "bfloat16": Rates(450.0, 12.0, 0.1)},
    "bitmap": {"float32": Rates(180.0, 12.0, 0.2), "bfloat16": Rates(900.0, 10.0, 0.1)},
}


class Seen(NamedTuple):
    """A measured case, in microseconds of all its cores together."""

    format: str
    dtype: str
    m: int
    n: int
    k: int
    density: float
    sparse: float
    dense: float


def observations(rows: Iterable[dict[str, Any]]) -> list[Seen]:
    """The rows that say something about a product Y = X W^T on one core."""
    seen = []
    for row in rows:
        if row["group"] not in GROUPS or "error" in row:
            continue
        p = row["params"]
        n, k = map(int, p["shape"].split("x"))
        format = p.get("format", row["group"].removesuffix("_mm"))
        density = 1 - p.get("sparsity", 0.5)
        times = (1e3 * row["ms"][name]["median"] * row["threads"] for name in ("sparsekern", "dense"))
        seen.append(Seen(format, p["dtype"], p["M"], n, k, density, *times))
    return seen


def fit_rates(start: Rates, model: Callable[[Rates], list[float]], times: list[float], few: int) -> tuple[Rates, float]:
    """The rates that explain the times best, and the typical factor by which they miss them.

    `few` is the least number of tokens among them: what it does not reach is not fitted.
    """
    reach = {"gbs": FEW, "gemv": 1}
    free = [i for i, name in enumerate(start._fields) if start[i] > 0 and few <= reach.get(name, few)]
    origin = np.log([start[i] for i in free])

    def rates(logs: np.ndarray) -> Rates:
        values = list(start)
        for i, value in zip(free, np.exp(logs), strict=True):
            values[i] = float(value)
        return Rates(*values)

    def residuals(logs: np.ndarray) -> np.ndarray:
        misses = np.log(model(rates(logs))) - np.log(times)
        return np.concatenate([misses, PULL * (logs - origin)])

    found = least_squares(residuals, origin, loss="soft_l1", f_scale=0.2)
    misses = found.fun[: len(times)]
    return Rates(*(float(f"{value:.3g}") for value in rates(found.x))), float(np.exp(np.sqrt(np.mean(misses**2))))


def fit(seen: list[Seen]) -> tuple[dict[str, Rates], dict[str, dict[str, Rates]], dict[str, float]]:
    """DENSE and SPARSE of the heuristic, and by name the factor by which each misses its measurements."""
    dense, misses = dict(DENSE), {}
    sparse = {format: dict(rates) for format, rates in SPARSE.items()}
    for dtype, item in ITEM.items():
        own = [s for s in seen if s.dtype == dtype]
        if own:
            dense[dtype], misses[f"dense {dtype}"] = fit_rates(
                dense[dtype],
                lambda r, own=own, item=item: [dense_us(r, s.m, s.n, s.k, item) for s in own],
                [s.dense for s in own],
                min(s.m for s in own),
            )
        for format in FORMATS:
            own = [s for s in seen if (s.format, s.dtype) == (format, dtype)]
            if own:
                sparse[format][dtype], misses[f"{format} {dtype}"] = fit_rates(
                    sparse[format][dtype],
                    lambda r, own=own, item=item: [sparse_us(r, s.format, s.m, s.n, s.k, item, s.density) for s in own],
                    [s.sparse for s in own],
                    min(s.m for s in own),
                )
    return dense, sparse, misses


def source(dense: dict[str, Rates], sparse: dict[str, dict[str, Rates]]) -> str:
    """The constants as heuristic.py spells them."""
    lines = ["DENSE = {", *(f'    "{dtype}": {one(r)},' for dtype, r in dense.items()), "}", "SPARSE = {"]
    for format, rates in sparse.items():
        lines.append(f'    "{format}": {{' + ", ".join(f'"{dtype}": {one(r)}' for dtype, r in rates.items()) + "},")
    return "\n".join([*lines, "}"]) + "\n"


def one(rates: Rates) -> str:
    """A Rates as its call, without what has its default."""
    plain = [str(value) for value in rates[:2]]
    named = [f"{name}={value}" for name, value in zip(rates._fields[2:], rates[2:], strict=True) if value]
    return f"Rates({', '.join(plain + named)})"


def load() -> list[Seen]:
    rows = []
    for path in RESULTS:
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        if result["machine"]["isa"] != "amx":
            raise SystemExit(f"{path} was not measured on an AMX machine but on {result['machine']['isa']}")
        rows += result["rows"]
    return observations(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="rewrite the constants in sparsekern/heuristic.py")
    what.add_argument("--check", action="store_true", help="fail where they are not what the fit gives")
    args = parser.parse_args()
    dense, sparse, misses = fit(load())
    text = SOURCE.read_text()
    made = re.sub(
        r"(# <fitted>[^\n]*\n).*?(# </fitted>)", lambda m: m[1] + source(dense, sparse) + m[2], text, flags=re.S
    )
    if args.check:
        sys.exit(0 if made == text else "sparsekern/heuristic.py: run python -m bench.fit_heuristic --write")
    print(source(dense, sparse))
    for name, factor in misses.items():
        print(f"{name:18} off by a factor of {factor:.2f} (root mean square)")
    if args.write:
        SOURCE.write_text(made)


if __name__ == "__main__":
    main()
