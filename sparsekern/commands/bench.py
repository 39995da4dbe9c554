"""sparsekern bench: one linear layer on this machine, against dense and against torch's own sparse formats.

Every result is checked against float64 before it is timed. Variants run in one process, interleaved in random
order, on random normal data; the figures are medians, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, functional
from ..formats import FORMATS
from ..testing import TOLERANCE, Timing, measure, pack, random_weight, reference_mm, relative_error, threads
from . import show
from .info import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOISY = 2  # p80 / p20 above which a figure says more about the machine than about the kernel
EXAMPLE = """examples:
  python -m sparsekern bench --shape 4096x4096 --tokens 1,16,128
  python -m sparsekern bench --shape 4096x11008 --shape 11008x4096 --format csr,bsr --sparsity 0.8,0.9 --json
  out.json python -m sparsekern bench --dtype bfloat16 --format sp24,bitmap --tokens 1 --threads 1
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time one layer against dense and torch's sparse formats, on this machine",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NxK",
        type=_shape,
        help="out-features x in-features; may be given again (default: 2048x2048)",
    )
    parser.add_argument(
        "--tokens",
        type=_numbers(int, 0),
        default=[1, 16, 128],
        metavar="M,M",
        help="rows of the input (default: 1,16,128)",
    )
    parser.add_argument(
        "--dtype",
        type=_names(DTYPES),
        default=["float32"],
        metavar="NAME,NAME",
        help=f"of {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument(
        "--format",
        type=_names(FORMATS),
        default=list(FORMATS),
        metavar="NAME,NAME",
        help=f"of {', '.join(FORMATS)} (default: all)",
    )
    parser.add_argument(
        "--sparsity",
        type=_numbers(float, 0, 1),
        default=None,
        metavar="SHARE,SHARE",
        help="zeros for bsr, csr and bitmap (default: 0.9 for bsr and csr, 0.5 for bitmap)",
    )
    parser.add_argument("--block", type=_numbers(int, 1), default=[32], metavar="B,B", help="block sizes (default: 32)")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="of sparsekern (default: the dispatcher chooses)")
    parser.add_argument("--threads", type=int, help="threads of all variants (default: torch's)")
    parser.add_argument("--repeats", type=int, default=30, help="rounds at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case at most (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="evict the caches before every call")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file as well")
    parser.set_defaults(run=run)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    if not (n.isascii() and n.isdigit() and k.isascii() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"expected NxK such as 4096x4096, got {text!r}")
    return int(n), int(k)


def _numbers(kind: type, least: float, most: float = float("inf")) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            numbers = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
        if not all(least <= number <= most for number in numbers):
            raise argparse.ArgumentTypeError(f"expected numbers from {least} to {most}, got {text!r}")
        return numbers

    return parse


def _names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected names of {', '.join(known)}, got {unknown[0]!r}")
        return names

    return parse


def run(args: argparse.Namespace) -> int:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.repeats < 1 or not args.seconds > 0:
        raise ValueError("--repeats and --seconds must be positive")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"{args.json}: there is no such directory")
    cases, rows = list(_cases(args)), []
    with threads(args.threads or torch.get_num_threads()), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every sparse tensor
        facts = machine() | {"date": date.today().isoformat()}
        with show.progress() as progress:
            task = progress.add_task("measuring", total=len(cases))
            for case in cases:
                rows.append(_measure(case, args))
                progress.advance(task)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    _print(facts, rows)
    return 0


def _cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for n, k in args.shape or [(2048, 2048)]:
        for dtype in args.dtype:
            for format in args.format:
                for sparsity in [0.5] if format == "sp24" else args.sparsity or [0.5 if format == "bitmap" else 0.9]:
                    for block in args.block if format == "bsr" else [None]:
                        for tokens in args.tokens:
                            yield {
                                "n": n,
                                "k": k,
                                "dtype": dtype,
                                "format": format,
                                "sparsity": sparsity,
                                "block": block,
                                "tokens": tokens,
                            }


def _measure(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One row: the case, milliseconds of every variant, ratios, and why a variant has none."""
    dtype, block = DTYPES[case["dtype"]], case["block"] or 32
    weight = random_weight(case["format"], case["n"], case["k"], dtype, 1 - case["sparsity"], block)
    layout = pack(case["format"], weight, block)
    x = torch.randn(case["tokens"], case["k"], generator=torch.Generator().manual_seed(1)).to(dtype)
    backend = dispatch.choose("mm", layout, x, args.backend).__name__.rpartition(".")[2]
    row = case | {
        "backend": backend,
        "density": layout.density,
        "bytes": layout.nbytes,
        "dense_bytes": weight.nbytes,
    }
    variants: dict[str, Callable[[], Any]] = {
        "sparsekern": lambda: functional.linear(x, layout, backend=args.backend),
        "dense": lambda: F.linear(x, weight),
    }
    failures: dict[str, str] = {}
    name, torch_sparse = _torch_sparse(case["format"], block)
    try:
        variants[name] = torch_sparse(weight, x)
    except Exception as error:  # what torch says is the result
        failures[name] = _one_line(error)
    expected = reference_mm(weight, x)
    for name in list(variants):
        why = _wrong(variants[name], expected, dtype)
        if why is not None:
            failures[name] = why
            del variants[name]
    if "sparsekern" in failures:
        return row | {"failures": failures}
    times = measure(variants, args.repeats, seconds=args.seconds, cold=args.cold)
    ours = times["sparsekern"].median
    return row | {
        "ms": {name: _milliseconds(t) for name, t in times.items()},
        "ratio": {name: t.median / ours for name, t in times.items() if name != "sparsekern"},
        "failures": failures,
    }


def _torch_sparse(format: str, block: int) -> tuple[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]]:
    """The name of torch's own path for such weights, and what makes it ready to run."""
    if format == "sp24":
        return "torch 2:4", _torch_semi_structured
    if format == "bsr":
        return "torch bsr", lambda w, x: _torch_product(w.to_sparse_bsr((block, block)), x)
    return "torch csr", lambda w, x: _torch_product(w.to_sparse_csr(), x)


def _torch_product(sparse: Tensor, x: Tensor) -> Callable[[], Tensor]:
    xt = x.t().contiguous()  # the layout that torch's kernels want, for free
    return lambda: (sparse @ xt).t()


def _torch_semi_structured(weight: Tensor, x: Tensor) -> Callable[[], Tensor]:
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    return lambda: F.linear(x, sparse)


def _wrong(variant: Callable[[], Tensor], expected: Tensor, dtype: torch.dtype) -> str | None:
    """Why a variant's result cannot be timed, or None where it is right."""
    try:
        error = relative_error(variant(), expected)
    except Exception as failure:
        return _one_line(failure)
    limit = 2 * TOLERANCE[dtype]  # torch rounds partial sums in places
    return None if error <= limit else f"wrong result: relative error {error:.2g}, allowed {limit:.2g}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def _milliseconds(t: Timing) -> dict[str, float]:
    return {"median": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}


def _print(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    out = show.console()
    headings = (
        "N x K",
        "dtype",
        "format",
        "zeros",
        "tokens",
        "backend",
        "sparsekern ms",
        "dense ms",
        "vs dense",
        "torch sparse ms",
        "vs torch",
    )
    cells = [_cells(row) for row in rows]
    out.print(show.table("Y = X W^T, medians [p20..p80]", headings, cells, headings[3:5] + headings[6:]))
    out.print(
        f"{facts['processor']}, {facts.get('instruction_set', 'no compiled kernels')}, "
        f"{facts['threads']} threads, torch {facts['torch']}; ratios above 1: sparsekern is faster"
    )
    if noisy := sum(any(t["p80"] > NOISY * t["p20"] for t in row.get("ms", {}).values()) for row in rows):
        out.print(f"{noisy} of {len(rows)} rows spread by more than {NOISY}x: the machine is busy")
    said = {f"{name}: {why}" for row in rows for name, why in row["failures"].items()}
    for line in sorted(said):
        out.print(line, markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    format = row["format"] + (f" {row['block']}x{row['block']}" if row["block"] else "")
    start = (f"{row['n']}x{row['k']}", row["dtype"], format, f"{row['sparsity']:.0%}", str(row["tokens"]))
    ms, ratio = row.get("ms", {}), row.get("ratio", {})
    other = next((name for name in (*ms, *row["failures"]) if name.startswith("torch")), "")
    faster = [f"{ratio[name]:.2f}x" if name in ratio else "-" for name in ("dense", other)]
    return (
        *start,
        row["backend"],
        _time(ms, "sparsekern"),
        _time(ms, "dense"),
        faster[0],
        _time(ms, other),
        faster[1],
    )


def _time(ms: dict[str, Any], name: str) -> str:
    if name not in ms:
        return "-"
    t = ms[name]
    return f"{t['median']:.3g} [{t['p20']:.3g}..{t['p80']:.3g}]"
