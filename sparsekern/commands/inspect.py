"""sparsekern inspect: which weights of a checkpoint are 2:4, block-sparse or unstructured, and what that is
worth.

Nothing is run and no model is needed. Gains are estimates, from a roofline of this processor's kind: what a
product must read (decides for one token) against what it must multiply (decides for many); `sparsekern bench`
measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from .. import _ext, heuristic
from ..checkpoint import Weight, open_tensors, read_weights
from ..layout import FLOATS
from ..patterns import Order, Patterns, analyse, suggest
from . import show

NEAR = 0.1  # share of violating groups up to which a weight is called nearly 2:4,
NEAR_DENSITY = 0.3  # where so few weights are zero that this is no accident
PREFILL = 512
NOTES = 24  # printed; all are in the JSON
EXAMPLE = """example:
  python -m sparsekern inspect model.safetensors
  python -m sparsekern inspect pytorch_model.bin --include 'layer\\.0\\.' --json

columns:
  zeros      share of the weights that are zero (-0.0 included)
  2:4        the K orders in which every group of four has at most two nonzeros, or how many groups have more
             (k: rows of a matrix, n: its columns; crs: a convolution's memory order, rsc: channels innermost)
  blocks     share of the 16x16, 32x32, 64x64 blocks that hold a nonzero
  suits      the format for these zeros, and the share of the bytes that it takes
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="which weights of a checkpoint are 2:4, block-sparse or unstructured, and what they would gain",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help=".safetensors, .pt, .pth, .bin, or a directory of shards")
    parser.add_argument("--include", metavar="REGEX", help="only weights whose name this finds")
    parser.add_argument("--exclude", metavar="REGEX", help="not those whose name this finds")
    parser.add_argument(
        "--device", metavar="NAME", help="estimate for cpu-avx2, cpu-avx512, ... (default: this machine)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    accept, device = show.chosen(args.include, args.exclude), args.device or this_device()
    entries, others = [], 0
    file = open_tensors(args.file)
    with show.progress() as progress:
        task = progress.add_task("reading", total=len(file.keys()))
        for weight in read_weights(file):
            progress.advance(task)
            if accept(weight.name) and is_weight(weight):
                entries.append(entry(weight, device))
            else:
                others += 1
    if args.json:
        show.print_json({"file": args.file, "device": device, "weights": entries, "other_tensors": others})
    else:
        _print(args.file, device, entries, others)
    return 0


def this_device() -> str:
    """This machine as `heuristic.predict` names it."""
    return "cpu" if _ext.why_not_host() is not None else f"cpu-{_ext.host().active_isa()}"


def is_weight(weight: Weight) -> bool:
    """Matrices and convolutions; norms, biases, positions and counters are none."""
    if weight.tensor is None:
        return True
    return 2 <= len(weight.shape) <= 5 and (weight.tensor.is_floating_point() or weight.is_sparse)


def entry(weight: Weight, device: str) -> dict[str, Any]:
    """All that is said about one weight, ready for JSON."""
    facts: dict[str, Any] = {"name": weight.name, "source": weight.source, "shape": list(weight.shape)}
    if weight.tensor is None:
        return facts | {"problem": weight.problem, "bytes": 0, "notes": [weight.problem]}
    packed = getattr(weight.tensor, "packed", None)
    dense = weight.dense()
    found = analyse(dense)
    wish = suggest(found)
    order = found.order(wish.order)
    return facts | {
        "dtype": str(weight.tensor.dtype).removeprefix("torch."),
        "stored_as": packed.format if packed is not None else "dense",
        "bytes": weight.nbytes,
        "density": found.density,
        "negative_zeros": found.negative_zeros,
        "nonfinite": found.nonfinite,
        "empty_rows": found.empty_rows,
        "orders": {o.name: _order(o) for o in found.orders},
        "bytes_as": _bytes_as(found, wish.order),
        "suggestion": {
            "format": wish.format,
            "order": wish.order,
            "block": wish.block,
            "reason": wish.reason,
        },
        "estimate": _estimate(found, wish.format, order, wish.block, device),
        "notes": list(_notes(weight, found)),
    }


def _order(order: Order) -> dict[str, Any]:
    return {
        "is_24": order.is_24,
        "groups": order.groups,
        "violations": order.violations,
        "first": str(order.first) if order.first is not None else None,
        "blocks": {str(block): share for block, share in order.blocks.items()},
    }


def _bytes_as(found: Patterns, order: str) -> dict[str, int]:
    plain = {format: found.nbytes(format, order=order) for format in ("dense", "sp24", "bitmap", "csr")}
    return plain | {f"bsr{block}": found.nbytes("bsr", block, order) for block in found.orders[0].blocks}


def _estimate(
    found: Patterns, format: str | None, order: Order, block: int | None, device: str
) -> dict[str, float] | None:
    """The speed-up over dense at one token and at many, or None for a weight that stays dense."""
    if format is None:
        return None
    n, k = order.shape
    density = order.blocks[block] if block is not None else found.density
    gain = {
        name: heuristic.predict(device, format, "mm", m, n, k, found.dtype, density).speedup
        for name, m in (("decode", 1), ("prefill", PREFILL))
    }
    return {name: round(value, 3) for name, value in gain.items()}


def _notes(weight: Weight, found: Patterns) -> Iterator[str]:
    """What a reader of the table would otherwise wonder about."""
    if weight.note:
        yield weight.note
    exact, nearest = found.sp24_orders, found.nearest_24
    if found.density >= NEAR_DENSITY and not exact and nearest.violation <= NEAR:
        yield (
            f"nearly 2:4 along {nearest.name}: {nearest.violations} of {nearest.groups} groups "
            f"({nearest.violation:.2%}) have three or four nonzeros, the first in {nearest.first}"
        )
    if exact == ("n",) and found.density <= 0.5:
        yield "2:4 along dim 0 only, as in layers that keep [in, out]; products run along the other one"
    if len(found.shape) > 2 and len(exact) == 1 and found.density > 0.25:
        other = next(o for o in found.orders if o.name != exact[0])
        yield (
            f"2:4 along {exact[0]} and not along {other.name} ({other.violation:.0%} of its groups have "
            f"more than two nonzeros): readers that expect {other.name} will call it dense"
        )
    if found.negative_zeros:
        yield f"{found.negative_zeros} weights are -0.0: zeros here, nonzeros for readers that compare bits"
    if found.nonfinite:
        yield f"{found.nonfinite} weights are NaN or infinite"
    if found.empty_rows:
        yield f"{found.empty_rows} of {found.shape[0]} output rows are zero and could be removed outright"
    if found.density < 1 and found.dtype not in FLOATS:
        yield f"zeros in {found.dtype}, which no format stores without a scale"


def _print(file: str, device: str, entries: list[dict[str, Any]], others: int) -> None:
    out = show.console()
    numbers = ("zeros", "bytes", "decode", "prefill")
    headings = (
        "weight",
        "shape",
        "dtype",
        "source",
        "zeros",
        "2:4",
        "blocks",
        "bytes",
        "suits",
        "decode",
        "prefill",
    )
    out.print(show.table(f"{file}: {len(entries)} weights", headings, map(_cells, entries), numbers))
    stored = sum(e["bytes"] for e in entries)
    best = sum(_best_bytes(e) for e in entries)
    out.print(
        f"{show.size(stored)} as stored, {show.size(best)} in the formats that suit"
        f"; {others} other tensors (norms, biases, and what --include and --exclude leave out)"
    )
    out.print(
        f"decode and prefill: speed-up over dense at 1 and {PREFILL} tokens; an estimate by a roofline for "
        f"{device}, not a measurement (sparsekern bench measures)"
    )
    notes = [(e["name"], note) for e in entries for note in e["notes"]]
    for name, note in notes[:NOTES]:
        out.print(f"{name}: {note}", markup=False)
    if len(notes) > NOTES:
        out.print(f"... and {len(notes) - NOTES} more notes (--json has all)")


def _best_bytes(e: dict[str, Any]) -> int:
    wish = e.get("suggestion")
    if not wish or wish["format"] is None:
        return e["bytes"]
    return min(e["bytes"], e["bytes_as"][_bytes_key(wish)])


def _bytes_key(wish: dict[str, Any]) -> str:
    return wish["format"] + (str(wish["block"]) if wish["format"] == "bsr" else "")


def _share(order: dict[str, Any]) -> str:
    """ "31% of the", or "7 of 2048" where a percentage would hide them."""
    share = order["violations"] / max(order["groups"], 1)
    return f"{share:.0%} of the" if share >= 0.01 else f"{order['violations']} of {order['groups']}"


def _cells(e: dict[str, Any]) -> tuple[str, ...]:
    if "problem" in e:
        return (e["name"], "", "", e["source"], "", "", "", "", f"cannot be read: {e['problem']}", "", "")
    orders, wish, gain = e["orders"], e["suggestion"], e["estimate"]
    exact = [name for name, o in orders.items() if o["is_24"]]
    nearest = min(orders.items(), key=lambda item: item[1]["violations"] / max(item[1]["groups"], 1))
    verdict = f"yes ({', '.join(exact)})" if exact else f"no, {_share(nearest[1])} groups ({nearest[0]})"
    verdict = verdict if e["density"] < 1 else "no"  # dimensions of one or two are 2:4 without being pruned
    blocks = " ".join(f"{value:.2f}" for value in orders[wish["order"]]["blocks"].values())
    if wish["format"] is None:
        suits = f"dense: {wish['reason']}"
    else:
        name = wish["format"] + (f" {wish['block']}x{wish['block']}" if wish["block"] else "")
        name += f" ({wish['order']})" if wish["order"] not in ("k", "crs") else ""
        suits = f"{name}, {e['bytes_as'][_bytes_key(wish)] / max(e['bytes_as']['dense'], 1):.0%}"
    speed = (f"{gain['decode']:.2f}x", f"{gain['prefill']:.2f}x") if gain else ("", "")
    return (
        e["name"],
        show.shape(e["shape"]),
        e["dtype"],
        e["source"],
        f"{1 - e['density']:.1%}",
        verdict,
        blocks,
        show.size(e["bytes"]),
        suits,
        *speed,
    )
