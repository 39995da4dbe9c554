"""sparsekern convert: a checkpoint whose pruned weights are stored sparse, or stored dense again.

No model is needed. A weight that fits no format stays dense and says why; nothing is pruned unless --prune
asks for it. The result is read back by sparsekern.checkpoint.load(path) or load(path, model).
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Weight, Writer, open_tensors, read_weights, tied_names
from ..checkpoint import compressed_tensors as ct
from ..checkpoint.write import FORMS
from ..formats import FORMATS
from ..layout import FLOATS
from ..patterns import Patterns, Suggestion, analyse, as_matrix, suggest
from ..sp24.pack import prune_mask
from ..tensor import SparseTensor
from . import show
from .inspect import is_weight

EXAMPLE = """examples:
  python -m sparsekern convert model.safetensors sparse.safetensors
  python -m sparsekern convert model.safetensors sparse.safetensors --prune --exclude lm_head
  python -m sparsekern convert llama-2of4/ out/ --to compressed-tensors
  python -m sparsekern convert sparse.safetensors dense.safetensors --to dense
"""
# Pruned by magnitude, these cost the most and gain the least.
TENDER = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|head|cls|classifier)(\.|$)")


@dataclass
class Row:
    """What became of one weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    density: float | None
    before: int
    after: int
    stored: str
    order: str
    reason: str


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="store the pruned weights of a checkpoint sparse, or undo it",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help=".safetensors, .pt, .pth, .bin, or a directory of shards")
    parser.add_argument("output", help=".safetensors file, or a directory (sharded); with --to dense also .pt")
    parser.add_argument("--to", choices=FORMS, default="sparsekern", help="what to write (default: %(default)s)")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format of the sparse weights")
    parser.add_argument("--block", type=int, default=32, help="block size with --format bsr (default: %(default)s)")
    parser.add_argument("--prune", action="store_true", help="prune what fits no format to 2:4, by magnitude")
    parser.add_argument(
        "--order",
        choices=("crs", "rsc"),
        default="rsc",
        help="K order in which --prune prunes convolutions (default: %(default)s, channels)",
    )
    parser.add_argument(
        "--min-sparsity",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="zeros below which an unstructured weight stays dense (default: %(default)s)",
    )
    parser.add_argument("--include", metavar="REGEX", help="only weights whose name this finds")
    parser.add_argument("--exclude", metavar="REGEX", help="not those whose name this finds")
    parser.add_argument("--shard-size", type=float, default=5.0, metavar="GIB", help="largest shard of a directory")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    accept = show.chosen(args.include, args.exclude)
    file = open_tensors(args.input)
    aliases = tied_names(file)
    writer = Writer(
        args.output,
        args.to,
        metadata=file.metadata,
        shard_bytes=int(args.shard_size * 2**30),
        compressed_format=ct.BITMASK if args.format == "bitmap" else ct.SP24,
    )
    rows, rest = [], 0
    with show.progress() as progress, writer:
        task = progress.add_task("converting", total=len(file.keys()))
        for weight in read_weights(file):
            progress.advance(task)
            if weight.problem is not None:
                raise ValueError(f"{args.input}: weight {weight.name!r} ({weight.source}): {weight.problem}")
            names = [weight.name, *(name for name, target in aliases.items() if target == weight.name)]
            made, row = _convert(weight, names, args, accept)
            row.after = writer.add(made)
            for name in names[1:]:
                row.after += writer.alias(replace(made, name=name), weight.name)
            if weight.name in writer.ignored:
                row.stored, row.reason = "dense", writer.ignored[weight.name]
            if is_weight(weight):
                rows.append(row)
            else:
                rest += row.after
    files = [str(path) for path in writer.close()]
    if args.to == "compressed-tensors" and writer.sharded:
        files.append(str(_write_config(args, rows)))
    if args.json:
        show.print_json({"files": files, "other_bytes": rest, "weights": [asdict(row) for row in rows]})
    else:
        _print(args, rows, rest, files)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.block < 1:
        raise ValueError(f"--block must be at least 1, got {args.block}")
    if not 0 <= args.min_sparsity <= 1:
        raise ValueError(f"--min-sparsity must be a share from 0 to 1, got {args.min_sparsity}")
    if not args.shard_size > 0:
        raise ValueError(f"--shard-size must be positive, got {args.shard_size}")
    if args.to == "compressed-tensors" and args.format not in ("auto", "sp24", "bitmap"):
        raise ValueError(f"compressed-tensors has no {args.format}; it stores sp24 and bitmap")
    if args.prune and (args.to == "dense" or args.format not in ("auto", "sp24")):
        raise ValueError("--prune makes 2:4 weights: use it with --format auto or sp24, and not with --to dense")
    output = Path(args.output)
    if not output.resolve().parent.is_dir():
        raise ValueError(f"{output}: there is no directory {output.parent}")
    full = any(output.iterdir()) if output.is_dir() else output.exists()
    if full and not args.force:
        raise ValueError(f"{output} exists already; --force overwrites it")
    if output.is_dir() and (output.suffix == ".safetensors" or output.resolve() == Path(args.input).resolve()):
        raise ValueError(f"{output} is a directory that cannot be written over; choose another output")


def _convert(weight: Weight, names: list[str], args: argparse.Namespace, accept: Any) -> tuple[Weight, Row]:
    """The weight as it will be stored, and its row, but for `after`. names: all that it goes by."""
    assert weight.tensor is not None
    dtype = str(weight.tensor.dtype).removeprefix("torch.")
    row = Row(weight.name, weight.shape, dtype, None, weight.nbytes, 0, "dense", weight.order, "")
    if not is_weight(weight):
        row.reason = "neither a matrix nor a convolution"
        return weight, row
    packed = weight.tensor.packed if isinstance(weight.tensor, SparseTensor) else None
    if args.to == "dense":
        row.reason = f"was {packed.format}" if packed is not None else "was dense"
        return weight, row
    if not all(map(accept, names)):
        row.stored, row.reason = (
            packed.format if packed is not None else "dense",
            "left out by --include or --exclude",
        )
        return weight, row
    if packed is not None and (args.format in ("auto", packed.format) or packed.dtype not in FLOATS):
        row.stored, row.density, row.reason = (
            packed.format,
            packed.density,
            f"as in the file ({weight.source})",
        )
        return weight, row
    dense = weight.dense()
    found = analyse(dense)
    row.density = found.density
    wish = _wish(found, args)
    pruned = False
    if args.prune and (wish.format is None or (args.format == "sp24" and wish.format != "sp24")):
        why_not = _why_not_prune(weight, names, found, args)
        if why_not is None:
            dense, pruned = _prune(dense, args.order), True
            found = analyse(dense)
            wish = Suggestion("sp24", _prune_order(dense, args.order), None, "pruned to 2:4 by magnitude")
            row.density = found.density
        else:
            wish = Suggestion(None, wish.order, None, f"{wish.reason}; {why_not}")
    row.reason, row.order = wish.reason, wish.order
    if wish.format is None:
        row.stored = "dense"
        return replace(weight, tensor=dense), row
    made = _pack(weight, dense, wish)
    row.stored = wish.format + (f" {wish.block}x{wish.block}" if wish.block else "")
    if found.negative_zeros and not pruned:
        row.reason += f"; {found.negative_zeros} weights were -0.0"
    return made, row


def _wish(found: Patterns, args: argparse.Namespace) -> Suggestion:
    """The format asked for where the weight fits it, or None with the reason."""
    own = found.orders[0].name
    if args.format == "auto" and args.to == "compressed-tensors":
        args = argparse.Namespace(**{**vars(args), "format": "sp24"})
    if args.format == "auto":
        return suggest(found, args.min_sparsity)
    if found.dtype not in FLOATS:
        return Suggestion(None, own, None, f"no format stores {found.dtype} without a scale")
    if args.format == "sp24":
        exact = next((o for o in found.orders if o.is_24), None)
        if exact is None:
            near = found.nearest_24
            reason = f"not 2:4: {near.violation:.2%} of the groups along {near.name}, first {near.first}"
            return Suggestion(None, own, None, reason)
        if found.nbytes("sp24", order=exact.name) >= found.nbytes("dense"):
            return Suggestion(None, own, None, "too small to gain from sp24")
        return Suggestion("sp24", exact.name, None, f"exactly 2:4 along {exact.name}")
    if 1 - found.density < args.min_sparsity:
        return Suggestion(None, own, None, f"{1 - found.density:.1%} zeros, fewer than {args.min_sparsity:.0%}")
    block = args.block if args.format == "bsr" else None
    return Suggestion(args.format, own, block, f"{1 - found.density:.0%} zeros")


def _prune_order(dense: Tensor, order: str) -> str:
    return order if dense.dim() > 2 else "k"


def _why_not_prune(weight: Weight, names: list[str], found: Patterns, args: argparse.Namespace) -> str | None:
    order = _prune_order(torch.empty((0,) * len(weight.shape)), args.order)
    if found.dtype not in FLOATS:
        return f"{found.dtype} cannot be pruned"
    if args.include is None and any(map(TENDER.search, names)):
        return "not pruned, its name is that of an embedding or a head (--include overrides)"
    if found.order(order).shape[1] < 16 or found.nbytes("sp24", order=order) >= found.nbytes("dense"):
        return f"not pruned, K = {found.order(order).shape[1]} is too small"
    return None


def _prune(dense: Tensor, order: str) -> Tensor:
    from ..patterns import as_weight

    order = _prune_order(dense, order)
    matrix = as_matrix(dense, order)
    pruned = torch.where(prune_mask(matrix), matrix, torch.zeros((), dtype=matrix.dtype))
    return as_weight(pruned, tuple(dense.shape), order).contiguous()


def _pack(weight: Weight, dense: Tensor, wish: Suggestion) -> Weight:
    """The sparse weight, proved to hold exactly the same numbers."""
    assert wish.format is not None
    matrix = as_matrix(dense, wish.order).contiguous()
    packer = FORMATS[wish.format].pack
    packed = packer(matrix, (wish.block, wish.block)) if wish.block else packer(matrix)
    packed.check()
    if not torch.equal(packed.unpack().nan_to_num(0.5), matrix.nan_to_num(0.5)):
        raise ValueError(
            f"weight {weight.name!r}: {wish.format} does not give back what was packed; please report this"
        )
    tensor = SparseTensor(packed, transposed=wish.order == "n")
    return replace(weight, tensor=tensor, order=wish.order, source=f"sparsekern {wish.format}")


def _write_config(args: argparse.Namespace, rows: list[Row]) -> Path:
    """config.json of the output: the input's, with what compressed-tensors' readers look for."""
    old = Path(args.input) / "config.json" if Path(args.input).is_dir() else None
    config = json.loads(old.read_text(encoding="utf-8")) if old is not None and old.exists() else {}
    sizes = [torch.Size(row.shape).numel() for row in rows]
    density = sum((row.density or 1.0) * size for row, size in zip(rows, sizes, strict=True)) / max(sum(sizes), 1)
    ignore = [row.name.removesuffix(".weight") for row in rows if row.stored == "dense"]
    format = ct.BITMASK if args.format == "bitmap" else ct.SP24
    config["quantization_config"] = ct.config(format, density, ignore)
    path = Path(args.output) / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _print(args: argparse.Namespace, rows: list[Row], rest: int, files: list[str]) -> None:
    out = show.console()
    headings = ("weight", "shape", "dtype", "zeros", "stored as", "before", "after", "why")
    title = f"{args.input} -> {args.output}"
    out.print(show.table(title, headings, map(_cells, rows), ("zeros", "before", "after")))
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    sparse = sum(row.stored != "dense" for row in rows)
    share = f" ({after / before:.0%})" if before else ""
    out.print(
        f"{sparse} of {len(rows)} weights are sparse; {show.size(before)} -> {show.size(after)}{share}, "
        f"other tensors {show.size(rest)}; wrote {', '.join(files)}",
        markup=False,
    )


def _cells(row: Row) -> tuple[str, ...]:
    zeros = "" if row.density is None else f"{1 - row.density:.1%}"
    stored = row.stored + (f" ({row.order})" if row.stored != "dense" and row.order not in ("k", "crs") else "")
    sizes = (show.size(row.before), show.size(row.after))
    return (row.name, show.shape(row.shape), row.dtype, zeros, stored, *sizes, row.reason)
