"""convert_: the layers of a pruned model become sparse where that is faster. to_dense_ undoes it."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import tune
from ..patterns import analyse
from . import candidates as ways
from .base import SparseModule
from .candidates import Candidate
from .capture import DEFAULT_SIDE, DEFAULT_TOKENS, Seen, capture, default_calls, inference, run
from .decide import (
    MOST_NOISE,
    NOISE,
    Trial,
    as_now,
    backend_of,
    best_of,
    build,
    expected,
    measure,
    remembered,
)
from .linear import SparseLinear
from .report import CONVERTED, DENSE, Report, Row
from .survey import Filter, Site, survey
from .swap import adopt, replace_, restore

VERIFIED = 256  # rows of a call that are compared with dense
POLICIES = ("measured", "heuristic", "always")
_kept: WeakKeyDictionary[nn.Module, tuple[Any, Row]] = WeakKeyDictionary()


def convert_(
    model: nn.Module,
    format: str = "auto",
    policy: str = "measured",
    sample: Any = None,
    *,
    filter_fn: Filter | None = None,
    prune: bool = False,
    block_size: int | tuple[int, int] | None = None,
    min_speedup: float = 1.0,
    decide: str = "total",
    thresholds: bool = False,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    tolerance: float | None = None,
    strict: bool = True,
    seconds: float = 0.3,
    cache: bool = True,
    progress: bool = True,
) -> Report:
    """Replaces nn.Linear and nn.Conv2d by sparse twins, in place, where that is faster; reports every layer.

    format: "auto" (what the weight's zeros speak for), "sp24", "bsr" (with block_size), "csr" or "bitmap".
    policy: "measured" times dense against every candidate and keeps the fastest; "heuristic" decides from
    shapes alone; "always" takes the first format that fits, untimed.
    sample: what the model is called with, so that layers are timed at their real shapes: a tensor, a tuple
    or dict of inputs, a callable(model), or a list of these (several calls). The model runs in evaluation
    mode without gradients. Without a sample, Linears are timed at `tokens` rows, convolutions with one 28 x
    28 image. filter_fn(module, name): only layers for which it is true.
    prune: allow weights to be changed: sp24 prunes every weight to 2:4 by magnitude, "auto" those that are
    nearly so.
    min_speedup: what sparse must reach over dense, beyond the noise of its measurement (2 to 25 %).
    decide: over "total" time of the sample's calls, or at the "worst" of its shapes.
    thresholds: let a Linear that wins at few tokens and loses at many run sparse up to a number of tokens and dense
    above it (SparseLinear.dense_above), for models that both decode and prefill; give a sample with both. Such a
    layer keeps its dense weight in memory too. Policy "measured" only.
    tolerance: largest relative error of a converted layer against the dense one in higher precision
    (default by type).
    strict: a weight that cannot be stored in the format asked for raises; else it stays dense with the
    reason.
    seconds: the time for one layer at one shape; cache: use and keep measurements (see sparsekern.tune).

    Everything is decided and checked before the first layer is replaced: an error leaves the model as it was.
    A layer converted by a mask (prune.magnitude_, torch.nn.utils.prune) has the mask made permanent. Where
    `model` itself is the layer, it cannot be replaced in place: use report.model. Make optimizers
    afterwards: parameters of converted layers are new ones. Raises ValueError for settings that cannot be
    and, naming layer and first bad group, for a weight that is not 2:4 where sp24 was asked for;
    RuntimeError for a layer beyond tolerance.
    """
    _check(model, format, policy, prune, min_speedup, decide, thresholds, tokens)
    found, notes = survey(model, filter_fn)
    sites = [site for site in found if isinstance(site, Site)]
    options = _candidates(sites, format, block_size, prune, strict)
    if sample is not None and any(options[id(s)] for s in sites):
        seen = capture(model, sample, [m for s in sites if options[id(s)] for m in s.modules])
    else:
        seen = {}
    if sample is None and policy != "always" and any(options.values()):
        notes.append(
            f"No sample: Linears judged at {', '.join(map(str, tokens))} tokens, convolutions at one "
            f"{DEFAULT_SIDE}x{DEFAULT_SIDE} image."
        )
    chosen: list[tuple[Site, Trial]] = []
    settings: dict[str, Any] = {"format": format, "block_size": block_size, "policy": policy, "prune": prune,
                "min_speedup": min_speedup, "decide": decide, "thresholds": thresholds}  # fmt: skip
    with nullcontext() if cache else tune.disabled(), _bar(sites, progress and policy == "measured") as step:
        for site in sites:
            calls = _calls(site, seen, sample, tokens)
            trial = _judge(site, options[id(site)], calls, settings, seconds, step)
            if trial is not None:
                site.row.max_error = verify(site, trial, calls, tolerance)
                if isinstance(trial.module, SparseLinear):
                    trial.module.dense_above = trial.dense_above
                chosen.append((site, trial))
        if policy == "measured":
            notes += _finish_measuring()
    mapping = _mapping(chosen)
    root = replace_(model, mapping)
    rows = [entry.row if isinstance(entry, Site) else entry for entry in found]
    _run_again(model, root, sample, mapping, chosen)
    notes += _notes(model, root, chosen)
    settings |= {"environment": tune.environment(), "tokens": list(tokens) if sample is None else None}
    return Report(rows, root, settings, notes)


def to_dense_(model: nn.Module) -> nn.Module:
    """Replaces every sparse module by the nn.Linear or nn.Conv2d that it was, in place; returns the model.

    Weights come back bit for bit (-0.0 as 0.0) with their requires_grad, biases and hooks as they are, shared
    modules shared and tied weights tied. Where `model` itself is a sparse module, the dense one is returned.
    """
    return restore(model)


# Settings and candidates ------------------------------------------------------------------------------------


def _check(
    model: nn.Module,
    format: str,
    policy: str,
    prune: bool,
    min_speedup: float,
    decide: str,
    thresholds: bool,
    tokens: Sequence[int],
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted or traced module cannot be changed; convert the nn.Module and script that")
    ways.check_options(format, prune)
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if decide not in ("total", "worst"):
        raise ValueError(f"decide must be 'total' or 'worst', got {decide!r}")
    if thresholds and policy != "measured":
        raise ValueError(
            f"thresholds=True needs policy='measured', got {policy!r}: only times can tell where dense wins"
        )
    if not (math.isfinite(min_speedup) and min_speedup > 0):
        raise ValueError(f"min_speedup must be a positive number, got {min_speedup}")
    if not tokens or not all(isinstance(m, int) and m > 0 for m in tokens):
        raise ValueError(f"tokens must be positive integers, got {tokens}")


def _candidates(
    sites: list[Site], format: str, block_size: int | tuple[int, int] | None, prune: bool, strict: bool
) -> dict[int, list[Candidate]]:
    """The candidates by id(site). Raises one ValueError for all weights that violate the format asked for."""
    options: dict[int, list[Candidate]] = {}
    bad = []
    for site in sites:
        row, weight = site.row, site.weight
        found = analyse(weight, ways.CONV_BLOCKS if weight.dim() > 2 else ways.BLOCKS)
        row.pattern, row.density = ways.describe(found), found.density
        if _depthwise(site):
            row.status, row.reason = DENSE, "depthwise: a channel's few weights leave nothing to skip"
            options[id(site)] = []
            continue
        try:
            wanted = ways.candidates(found, format, block_size, prune)
        except ValueError as error:
            bad.append(f"{site.names[0]}: {error}")
            row.status, row.reason, wanted = DENSE, str(error), []
        if not wanted and not row.reason:
            row.status, row.reason = DENSE, _no_pattern(found, row.pattern)
        first = ways.first_suitable(found, wanted)
        options[id(site)] = sorted(wanted, key=lambda c: c is not first)
    if bad and strict:
        shown = "\n  ".join(bad[:20]) + (f"\n  and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise ValueError(
            f"format 'sp24' was asked for, but {len(bad)} of {len(sites)} weights are not 2:4:\n  {shown}\n"
            "Prune them first (sparsekern.prune.magnitude_), leave them out (filter_fn, strict=False), or "
            "pass prune=True to keep the two largest of every group of four"
        )
    return options


def _depthwise(site: Site) -> bool:
    layer = site.dense[0]
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.in_channels == layer.groups


def _no_pattern(found: Any, pattern: str) -> str:
    if pattern == "dense":
        return "dense weight: nothing to gain"
    if pattern.startswith("near 2:4"):
        return f"{pattern}, first bad group at {ways.nearest(found).first}; prune=True makes it 2:4"
    if pattern == "2:4 along N":
        return "2:4 along the output features, which no format can use; prune along K"
    return f"{100 * found.density:.0f}% of the weights are nonzero, neither 2:4 nor in blocks: too many"


def _calls(site: Site, seen: dict[int, list[Seen]], sample: Any, tokens: Sequence[int]) -> list[Seen]:
    """The calls of all modules of a site; the same kind is counted together."""
    if sample is None:
        return default_calls(site.dense[0], tokens)
    merged: dict[Any, Seen] = {}
    for module in site.modules:
        for call in seen.get(id(module), []):
            key = (call.shape, call.dtype, call.stride, call.device, call.autocast)
            if key in merged:
                merged[key].count += call.count
            else:
                merged[key] = call
    return list(merged.values())


# Deciding ---------------------------------------------------------------------------------------------------


def _judge(
    site: Site,
    wanted: list[Candidate],
    calls: list[Seen],
    settings: dict[str, Any],
    seconds: float,
    step: Callable[[int], None],
) -> Trial | None:
    """The trial to convert a site with, or None; fills in the site's row."""
    row, policy = site.row, settings["policy"]
    if not wanted:
        step(1)
        return None
    row.status = DENSE
    if policy == "always":
        trial = _always(site, wanted, calls)
    elif not calls:
        row.reason = "the sample never calls this layer"
        trial = None
    elif policy == "heuristic":
        trial = _heuristic(site, wanted, calls, settings["min_speedup"])
    else:
        trial = _measured(site, wanted, calls, settings, seconds)
    step(1)
    if trial is not None:
        row.status, row.format, row.backend = CONVERTED, str(trial.candidate), trial.backend
        row.bytes_after = trial.module.nbytes
        changed = "pruned to 2:4" if trial.candidate.prune else ""
        above = ""
        if trial.dense_above is not None:
            row.dense_above, row.bytes_after = trial.dense_above, row.bytes_after + row.bytes_before
            above = f"runs dense above {trial.dense_above} tokens, so it keeps the dense weight too"
        row.reason = "; ".join(part for part in (site.note, changed, above, row.reason) if part)
    return trial


def _always(site: Site, wanted: list[Candidate], calls: list[Seen]) -> Trial | None:
    x = (calls or default_calls(site.dense[0], (1,)))[0].input()
    for candidate in wanted:
        try:
            module = candidate.build(site.dense[0])
        except NotImplementedError as error:
            site.row.reason = f"{candidate}: {error}"
            continue
        site.row.reason = ""
        trial = Trial(site, candidate, (backend_of(module, x)[0],))
        trial.module = module
        return trial
    return None


def _trials(site: Site, wanted: list[Candidate], calls: list[Seen]) -> list[Trial]:
    made = [build(site, candidate, calls) for candidate in wanted]
    trials = [trial for trial, _ in made if trial is not None]
    if not trials:
        site.row.reason = "; ".join(reason for _, reason in made)
    return trials


def _heuristic(site: Site, wanted: list[Candidate], calls: list[Seen], least: float) -> Trial | None:
    row = site.row
    guesses = [(expected(t, calls, site.conv), t) for t in _trials(site, wanted, calls)]
    if not guesses:
        return None
    row.expected, best = max(guesses, key=lambda guess: guess[0])
    if row.expected >= least:
        return best
    row.reason = f"dense is expected to be faster: best candidate {best.candidate} at {row.expected:.2f}x"
    return None


def _measured(
    site: Site, wanted: list[Candidate], calls: list[Seen], settings: dict[str, Any], seconds: float
) -> Trial | None:
    row = site.row
    signature = _signature(site, wanted, calls, settings)
    earlier = _kept.get(site.modules[0])
    if earlier is not None and earlier[0] == signature:
        old = earlier[1]
        row.calls, row.backend, row.reason = list(old.calls), old.backend, old.reason
        return None
    worst = settings["decide"] == "worst"
    # Under autocast every call runs sparse.
    split = settings["thresholds"] and not site.conv and all(call.autocast is None for call in calls)
    trials = remembered(site, wanted, calls, split)
    if trials and not as_now(best_of(trials, worst)[0], calls):
        trials = []  # what was measured then is not what would run now
    if not trials:
        trials = _trials(site, wanted, calls)
        measure(site, trials, calls, seconds, split)
    if trials:
        best, gain = best_of(trials, worst)
        row.calls, row.backend = best.calls, best.backend
        needed = settings["min_speedup"] * (1 + min(MOST_NOISE, max(NOISE, 2 * best.spread)))
        if gain >= needed:
            return best
        where = " at its worst shape" if worst else ""
        verdict = "dense is faster" if gain < 1 else f"not beyond the {needed:.2f}x asked for (noise included)"
        row.reason = f"{verdict}: best candidate {best.candidate} at {gain:.2f}x{where}"
    _kept[site.modules[0]] = (signature, row)
    return None


def _signature(site: Site, wanted: list[Candidate], calls: list[Seen], settings: dict[str, Any]) -> Any:
    """What a decision to stay dense depends on; the same again gives the same answer without timing."""
    weights = tuple((id(m), p.data_ptr(), p._version) for m in site.modules for p in m.parameters())
    shapes = tuple((c.shape, c.dtype, c.stride, c.autocast, c.count) for c in calls)
    return weights, shapes, tuple(wanted), tuple(settings.items()), tune.environment()


@contextmanager
def _bar(sites: list[Site], shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown or not sites:
        yield lambda advance: None
        return
    columns = (TextColumn("measuring layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=len(sites))
        yield lambda advance: bar.advance(task, advance)


def _finish_measuring() -> list[str]:
    """Keeps the measurements, unless other work on the machine makes them worth little."""
    load = tune.foreign_load()
    if load <= 0.5:
        tune.save()
        return []
    tune.discard()
    return [
        f"Measured on a busy machine (other work takes about {load:.1f} of {tune.cores()} cores): the times "
        "are not kept; measure again when it is quiet."
    ]


# Verifying and replacing ------------------------------------------------------------------------------------


@torch.no_grad()
def verify(site: Site, trial: Trial, calls: list[Seen], tolerance: float | None = None) -> float:
    """The largest ||sparse - dense|| / ||dense|| over the calls, dense in float64.

    Of a Linear's tokens at most VERIFIED are compared, spread evenly; not where dense gives NaN or infinity,
    because a removed weight does not meet the infinities of x. A candidate that prunes is held against its
    own pruned weight. Raises RuntimeError beyond the tolerance of the norm; one entry may be ten times as
    far.
    """
    from ..testing import TOLERANCE, assert_close, relative_error

    layer: Any = site.dense[0]
    weight = trial.module.dense_weight() if trial.candidate.prune else site.weight
    weight, bias = weight.double(), None if layer.bias is None else layer.bias.detach().double()
    worst = 0.0
    for call in calls or default_calls(layer, (1,)):
        x = call.input()
        with call.context():
            out = trial.module.forward(x)
        limit = 8 * TOLERANCE[out.dtype] if tolerance is None else tolerance
        if not site.conv:
            x, out = _some(x), _some(out)
        with torch.autocast(x.device.type, enabled=False):
            if site.conv:
                reference = layer._conv_forward(x.double(), weight, bias)
            else:
                reference = nn.functional.linear(x.double(), weight, bias)
        error = _quick_error(out, reference, limit)
        if error is None:  # look closer: it may be right, and a message names the place
            finite = torch.isfinite(reference)
            out, reference = out.where(finite, 0), reference.where(finite, 0)
            try:
                assert_close(out, reference, tol=limit)
            except AssertionError as wrong:
                raise RuntimeError(
                    f"{site.names[0]} as {trial.candidate} ({trial.backend}) differs from dense at input "
                    f"{call.shape}: {wrong}"
                ) from wrong
            error = relative_error(out, reference)
        worst = max(worst, error)
    return worst


def _some(t: Tensor) -> Tensor:
    """At most VERIFIED of the rows [..., K], the first and the last among them."""
    rows = t.reshape(-1, t.shape[-1])
    if rows.shape[0] <= VERIFIED:
        return rows
    return rows[torch.linspace(0, rows.shape[0] - 1, VERIFIED, device=t.device).long()]


def _quick_error(out: Tensor, reference: Tensor, limit: float) -> float | None:
    """||out - reference|| / ||reference||, or None where that, or a single entry, wants a closer look."""
    if out.shape != reference.shape or not out.numel():
        return None
    size = float(reference.norm())
    difference = reference - out
    error, entry = float(difference.norm()), float(difference.abs().max())
    if not math.isfinite(size + error) or error > limit * size:
        return None
    typical = size / math.sqrt(reference.numel())
    return (error / size if size else 0.0) if entry <= 10 * limit * typical else None


def _mapping(chosen: list[tuple[Site, Trial]]) -> dict[int, SparseModule]:
    """By id(dense module), its sparse twin; Linears with a tied weight share the values and indices."""
    mapping: dict[int, SparseModule] = {}
    for site, trial in chosen:
        for i, (module, dense) in enumerate(zip(site.modules, site.dense, strict=True)):
            sparse = trial.module if i == 0 else _sharing(trial.module, dense)
            mapping[id(module)] = adopt(module, sparse)
    return mapping


def _sharing(first: SparseModule, dense: nn.Module) -> SparseModule:
    """Another SparseLinear around the very same parameter and buffers, with its own bias."""
    twin = type(first).from_packed(first.packed)  # type: ignore[attr-defined]
    twin.values, twin.bias, twin.dense_above = first.values, dense.bias, first.dense_above
    return twin.train(dense.training)


def _run_again(
    model: nn.Module,
    root: nn.Module,
    sample: Any,
    mapping: dict[int, SparseModule],
    chosen: list[tuple[Site, Trial]],
) -> None:
    """The converted model must still run: code may read `layer.weight` and do what a sparse one cannot."""
    if sample is None or not chosen:
        return
    try:
        with inference(root):
            run(root, sample)
    except Exception as error:
        replace_(model, {id(mapping[id(m)]): m for site, _ in chosen for m in site.modules})
        raise RuntimeError(
            f"the model no longer runs with its layers converted, and was left as it was: {error}. Code that "
            "reads a layer's weight itself is the usual cause; leave that layer out with filter_fn"
        ) from error


def _notes(model: nn.Module, root: nn.Module, chosen: list[tuple[Site, Trial]]) -> list[str]:
    notes = []
    if root is not model:
        notes.append("The model itself is the layer that was converted: use report.model, the argument is unchanged.")
        warnings.warn(notes[-1], stacklevel=3)
    converted = {id(trial.module) for _, trial in chosen}
    fused = sum(
        isinstance(m, nn.TransformerEncoderLayer) and any(id(c) in converted for c in m.children())
        for m in root.modules()
    )
    if fused:
        notes.append(
            f"{fused} nn.TransformerEncoderLayer lose torch's fused inference path (it needs dense weights); "
            "compare the whole model's time."
        )
    return notes
