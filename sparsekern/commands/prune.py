"""sparsekern prune: a checkpoint, or a model made by a function, with the weights that matter least set to zero.

MODEL is a checkpoint file or directory, for criteria that look at weights alone, or package.module:factory, a function
without arguments that returns an nn.Module, for all criteria. The result has the same names and shapes, with zeros
(channels, heads and layers are cut out: smaller shapes); `sparsekern convert` then stores it sparse, and
`sparsekern.convert_` makes it fast.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Writer, open_tensors, read_weights, tied_names
from ..layout import FLOATS
from ..patterns import analyse, suggest
from ..prune import (
    CRITERIA,
    NM,
    Block,
    Pattern,
    Unstructured,
    pattern_of,
    prune_,
    shrink_,
    size_of,
    sparsegpt_,
    speed_of,
)
from ..prune.layers import layers, oriented, weight_of
from ..prune.pattern import STRUCTURAL
from . import show
from .convert import TENDER

EXAMPLE = """examples:
  python -m sparsekern prune model.safetensors pruned.safetensors --pattern 2:4
  python -m sparsekern prune model.safetensors pruned.safetensors --pattern global --sparsity 0.8 --json
  python -m sparsekern prune mypackage.models:small pruned.safetensors --criterion wanda --data batches.pt
  python -m sparsekern prune mypackage.models:small pruned.pt --pattern channels --sparsity 0.5 --data x.npy --time
"""
SOLVERS = ("sparsegpt",)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="remove the weights of a model that matter least, in a pattern that a format stores",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or package.module:factory")
    parser.add_argument("output", metavar="OUTPUT", help=".safetensors, .pt, .pth, .bin, or a directory (sharded)")
    parser.add_argument(
        "--pattern",
        default="2:4",
        help="2:4, 4:8, transposable, unstructured, row, global, block:RxC, vector:L, channels, heads, layers "
        "(default: 2:4)",
    )
    parser.add_argument("--keep", type=int, metavar="N", help="with --group: keep N of every M weights")
    parser.add_argument("--group", type=int, metavar="M", help="with --keep: the size of a group")
    parser.add_argument(
        "--order", choices=("crs", "rsc"), default="rsc", help="K order of convolutions (default: rsc, channels)"
    )
    parser.add_argument("--sparsity", type=float, metavar="SHARE", help="the share to remove, for all but N:M")
    parser.add_argument("--min-keep", type=float, metavar="SHARE", help="what every layer keeps at least")
    parser.add_argument("--plan", metavar="FILE", help="JSON {layer: sparsity} instead of --sparsity")
    parser.add_argument(
        "--criterion",
        choices=(*CRITERIA, *SOLVERS),
        default="magnitude",
        metavar="NAME",
        help=f"{', '.join((*CRITERIA, *SOLVERS))} (default: magnitude)",
    )
    parser.add_argument("--data", metavar="FILE", help="calibration data: .pt (tensor, list, dict), .safetensors, .npy")
    parser.add_argument("--batch", type=int, default=32, help="rows of --data in a batch (default: %(default)s)")
    parser.add_argument("--loss", metavar="MODULE:NAME", help="loss(model, batch), for criteria that need gradients")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint for the factory's model")
    parser.add_argument("--include", metavar="REGEX", help="only layers whose name this finds")
    parser.add_argument("--exclude", metavar="REGEX", help="not those whose name this finds")
    parser.add_argument(
        "--time", action="store_true", help="convert the result and time it on the first batch of --data"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--report", metavar="FILE", help="write the report as JSON to this file as well")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    pattern, started = _pattern(args), time.monotonic()
    output = Path(args.output)
    if (any(output.iterdir()) if output.is_dir() else output.exists()) and not args.force:
        raise ValueError(f"{output} exists already; --force overwrites it")
    if not output.resolve().parent.is_dir():
        raise ValueError(f"{output}: there is no directory {output.resolve().parent}")
    sparsity = _sparsity(args)
    made = _is_factory(args.model)
    model = _build(args) if made else _container(args)
    if not made:
        _check_without_model(args, pattern)
    data = _batches(args)
    if args.time and data is None:
        raise ValueError("--time needs --data: what the model is called with")
    filter_fn = _filter(args, pattern)
    sample = None if data is None else data[0]
    before, dense = size_of(model, sample), copy.deepcopy(model) if args.time else None
    shapes = {name: tuple(weight_of(m).shape) for name, m in layers(model)}
    with show.progress() as progress:
        progress.add_task(f"pruning by {args.criterion}", total=None)
        removed = _prune(args, model, pattern, sparsity, data, filter_fn)
    after = size_of(model, sample)
    speed = speed_of(model, dense, sample) if dense is not None else None
    files = _write_model(args, model) if made else _write_checkpoint(args, model)
    report = {
        "model": args.model, "files": files, "pattern": str(pattern), "criterion": args.criterion,
        "sparsity": sparsity, "removed": removed, "layers": _rows(model, shapes),
        "before": asdict(before), "after": asdict(after) | {"compression": after.compression},
        "speed": None if speed is None else speed.to_dict(), "seconds": time.monotonic() - started,
    }  # fmt: skip
    if args.report:
        Path(args.report).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.json:
        show.print_json(report)
    else:
        _print(args, report)
    return 0


def _prune(
    args: argparse.Namespace, model: nn.Module, pattern: Pattern, sparsity: Any, data: Any, filter_fn: Any
) -> dict[str, float]:
    if args.criterion == "sparsegpt":
        if data is None:
            raise ValueError("sparsegpt needs --data")
        if isinstance(pattern, STRUCTURAL):
            raise ValueError(f"sparsegpt removes weights inside layers, not {pattern}")
        solved = sparsegpt_(model, data, pattern, sparsity, filter_fn=filter_fn, keep_mask=False)
        return {name: result.sparsity for name, result in solved.items()}
    chosen = CRITERIA[args.criterion]
    if chosen.needs_data and data is None:
        raise ValueError(f"the criterion {args.criterion} needs --data")
    if chosen.needs_loss and args.loss is None:
        raise ValueError(f"the criterion {args.criterion} needs --loss")
    loss = _attribute(args.loss) if args.loss else None
    removed = prune_(
        model, pattern, sparsity, args.criterion, data=data, loss=loss, filter_fn=filter_fn, keep_mask=False
    )  # fmt: skip
    if isinstance(pattern, STRUCTURAL):
        shrink_(model, None if data is None else data[0])
    return removed


# What was asked for -----------------------------------------------------------------------------------------


def _pattern(args: argparse.Namespace) -> Pattern:
    if (args.keep is None) != (args.group is None):
        raise ValueError("--keep and --group belong together")
    found = NM(args.keep, args.group) if args.keep is not None else pattern_of(args.pattern)
    if isinstance(found, Block) or hasattr(found, "order"):
        found = replace(found, order=args.order)  # type: ignore[call-arg]
    if args.min_keep is not None:
        if not isinstance(found, Unstructured):
            raise ValueError("--min-keep is for the patterns unstructured, row and global")
        found = replace(found, min_keep=args.min_keep)
    return found


def _sparsity(args: argparse.Namespace) -> Any:
    if args.plan is None:
        return args.sparsity
    if args.sparsity is not None:
        raise ValueError("--plan and --sparsity exclude each other")
    plan = json.loads(Path(args.plan).read_text(encoding="utf-8"))
    if not isinstance(plan, dict) or not all(isinstance(s, (int, float)) for s in plan.values()):
        raise ValueError(f"{args.plan} must hold an object of layers and their sparsities")
    return plan


def _is_factory(model: str) -> bool:
    return ":" in model and not Path(model).exists()


def _attribute(path: str) -> Any:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{path!r} must be written package.module:name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does for what it runs
    found = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {name}")
        found = getattr(found, part)
    return found


def _build(args: argparse.Namespace) -> nn.Module:
    model = _attribute(args.model)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{args.model} must return an nn.Module, not {type(model).__name__}")
    if args.weights:
        from ..checkpoint import load

        load(args.weights, model)
    return model.eval()


def _check_without_model(args: argparse.Namespace, pattern: Pattern) -> None:
    chosen = CRITERIA.get(args.criterion)
    if isinstance(pattern, STRUCTURAL):
        raise ValueError(f"{pattern} are followed through a model; pass package.module:factory instead of a checkpoint")
    if (
        chosen is None
        or chosen.needs_data
        or chosen.needs_loss
        or chosen.gives != "weight"
        or args.data
        or args.weights
    ):
        raise ValueError(
            "a checkpoint has weights but no model to run: only criteria without data (magnitude, random ...) prune "
            "it; pass package.module:factory for the others"
        )


def _filter(args: argparse.Namespace, pattern: Pattern) -> Any:
    accept = show.chosen(args.include, args.exclude)
    tender = args.include is None and not isinstance(pattern, STRUCTURAL)
    return lambda module, name: accept(name) and not (tender and TENDER.search(name))


def _batches(args: argparse.Namespace) -> list[Any] | None:
    """The data file as batches: a list as it is, a tensor or dict of tensors cut into --batch rows."""
    if args.data is None:
        return None
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    path = Path(args.data)
    if path.suffix == ".npy":
        import numpy

        held: Any = torch.from_numpy(numpy.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        file = open_tensors(path)
        held = {key: file.get(key) for key in file.keys()}  # noqa: SIM118
        held = next(iter(held.values())) if len(held) == 1 else held
    else:
        held = torch.load(path, weights_only=True)
    if isinstance(held, Tensor):
        found: list[Any] = list(held.split(args.batch))
    elif isinstance(held, Mapping) and held and all(isinstance(t, Tensor) for t in held.values()):
        parts = {key: t.split(args.batch) for key, t in held.items()}
        if len({len(p) for p in parts.values()}) > 1:
            raise ValueError(f"{path}: its tensors have different numbers of rows")
        found = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    elif isinstance(held, (list, tuple)):
        found = list(held)
    else:
        raise ValueError(f"{path} must hold a tensor, a dict of tensors, or a list of batches")
    if not found:
        raise ValueError(f"{path} holds no batch")
    return found


# A checkpoint as a model ------------------------------------------------------------------------------------


def _container(args: argparse.Namespace) -> nn.Module:
    """Modules that hold a checkpoint's matrices and convolutions under their names; they are never run."""
    if not Path(args.model).exists():
        raise ValueError(f"{args.model}: there is no such file; a model is written package.module:factory")
    top = nn.Module()
    for weight in read_weights(open_tensors(args.model)):
        if weight.problem is not None:
            raise ValueError(f"{args.model}: weight {weight.name!r} ({weight.source}): {weight.problem}")
        owner, _, name = weight.name.rpartition(".")
        if name != "weight" or not owner or len(weight.shape) not in (2, 4):
            continue
        dense = weight.dense()
        if dense.dtype not in FLOATS:
            continue
        n, k = weight.shape[:2]
        made: nn.Module = (
            nn.Linear(k, n, bias=False, device="meta")
            if len(weight.shape) == 2
            else nn.Conv2d(k, n, weight.shape[2:], bias=False, device="meta")  # type: ignore[arg-type]
        )
        made.weight = nn.Parameter(dense, requires_grad=False)
        _place(top, owner, made)
    return top


def _place(top: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in top._modules:
            top.add_module(part, nn.Module())
        top = top._modules[part]  # type: ignore[assignment]
    old = top._modules.get(last)
    for child, inside in old._modules.items() if old is not None else ():
        module.add_module(child, inside)
    top.add_module(last, module)


def _write_checkpoint(args: argparse.Namespace, model: nn.Module) -> list[str]:
    """Everything that the checkpoint has, the pruned weights in their places."""
    file = open_tensors(args.model)
    pruned = {f"{name}.weight": weight_of(m).detach() for name, m in layers(model)}
    aliases = tied_names(file)
    writer = Writer(args.output, "dense", metadata=file.metadata)
    with writer:
        for weight in read_weights(file):
            made = weight if weight.name not in pruned else replace(weight, tensor=pruned[weight.name])
            writer.add(made)
            for name, target in aliases.items():
                if target == weight.name:
                    writer.alias(replace(made, name=name), weight.name)
    return [str(path) for path in writer.close()]


def _write_model(args: argparse.Namespace, model: nn.Module) -> list[str]:
    from ..checkpoint.modules import weights_of

    writer = Writer(args.output, "dense")
    with writer:
        for weight, tied in weights_of(model):
            if tied is None:
                writer.add(weight)
            else:
                writer.alias(weight, tied)
    return [str(path) for path in writer.close()]


# What is said -----------------------------------------------------------------------------------------------


def _rows(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    rows = []
    for name, module in layers(model):
        weight = weight_of(module).detach()
        found = analyse(oriented(module, weight).contiguous())
        choice = suggest(found)
        size = found.nbytes(choice.format, choice.block or 32, choice.order) if choice.format else found.nbytes("dense")
        rows.append(
            {
                "layer": name,
                "shape": list(weight.shape),
                "shape_before": list(shapes.get(name, ())),
                "sparsity": 1 - found.density,
                "suits": choice.format or "dense",
                "reason": choice.reason,
                "bytes": found.nbytes("dense"),
                "stored_bytes": size,
            }
        )
    return rows


def _print(args: argparse.Namespace, report: dict[str, Any]) -> None:
    out = show.console()
    rows = [
        (
            row["layer"], show.shape(row["shape"]), f"{row['sparsity']:.1%}", row["suits"], show.size(row["bytes"]),
            show.size(row["stored_bytes"]), row["reason"],
        )
        for row in report["layers"]
    ]  # fmt: skip
    headings = ("layer", "shape", "zeros", "suits", "dense", "stored", "why")
    title = f"{args.model}: {report['pattern']} by {report['criterion']}"
    out.print(show.table(title, headings, rows, ("zeros", "dense", "stored")))
    before, after, speed = report["before"], report["after"], report["speed"]
    said = (
        f"{before['parameters']} parameters -> {after['nonzeros']} nonzeros; {show.size(before['dense_bytes'])} -> "
        f"{show.size(after['stored_bytes'])} stored; wrote {', '.join(report['files'])}"
    )
    out.print(said, markup=False)
    if speed is not None:
        out.print(
            f"measured on the first batch: {speed['dense']['ms']:.3g} ms dense, {speed['converted']['ms']:.3g} ms "
            f"converted, {speed['speedup']:.2f}x ({speed['theoretical_speedup']:.2f}x in theory)",
            markup=False,
        )
