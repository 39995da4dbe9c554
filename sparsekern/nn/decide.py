"""Which candidate a layer gets: measured, expected, or the first that fits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import dispatch, roofline, tune
from .._ext import capability
from ..conv import Geometry, library
from ..formats import backend_module
from ..heuristic import predict
from .base import SparseModule
from .candidates import Candidate
from .capture import Seen
from .linear import SparseLinear
from .report import Call, Row
from .survey import Site

NOISE, MOST_NOISE = 0.02, 0.25  # the least and the most that a gain must stand above its measurement's noise


@dataclass
class Trial:
    """A candidate for one site: the backends that can run it and what its calls take. Packed on first use."""

    site: Site
    candidate: Candidate
    backends: tuple[str, ...]  # all that are timed; the dispatcher then takes the fastest for each number of tokens
    calls: list[Call] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # by the calls, the fastest
    spread: float = 0.0
    dense_above: int | None = None

    @cached_property
    def module(self) -> SparseModule:
        return self.candidate.build(self.site.dense[0])

    @property
    def backend(self) -> str:
        """What runs it: the fastest backend of each call, or before they are timed the dispatcher's own choice."""
        return ", ".join(dict.fromkeys(self.used)) or self.backends[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, and of the dense one where that is kept too."""
        both = 0 if self.dense_above is None else self.site.row.bytes_before
        return both + (self.module.nbytes if self.candidate.nbytes is None else self.candidate.nbytes)

    @property
    def row(self) -> Row:
        """Its times, as a report counts them."""
        return Row(self.site.names[0], self.site.type, calls=self.calls, dense_above=self.dense_above)

    @property
    def sparse_ms(self) -> float:
        return self.row.sparse_ms or 0.0

    @property
    def speedup(self) -> float:
        return self.row.speedup or 1.0

    @property
    def worst(self) -> float:
        """Of the calls that run sparse."""
        return min(c.speedup or 1.0 for c in self.calls if self.dense_above is None or c.tokens <= self.dense_above)


def backend_of(module: SparseModule, x: Tensor) -> tuple[str, str]:
    """The backend that will run a module on x, and why the faster ones do not (empty where one does)."""
    packed = module.packed
    if isinstance(module, SparseLinear):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        name = dispatch.choose("mm", packed, rows).__name__.rpartition(".")[2]
        tried = {b: dispatch.why_not(b, "mm", packed, rows) for b in dispatch.backends(module.format, x.device.type)}
    else:
        geometry = cast(Geometry, module.geometry)
        name = library.name_of(library.choose("conv2d", packed, x, None, geometry))
        tried = {b: library.why_not(b, "conv2d", packed, x, geometry) for b in dispatch.BACKENDS}
    reasons = [f"{b}: {why}" for b, why in tried.items() if why is not None and "no such backend" not in why]
    return name, "" if name != "ref" else "; ".join(reasons) or f"no kernel on {x.device.type}"


def alternatives(module: SparseModule, first: str, seen: Sequence[Seen]) -> tuple[str, ...]:
    """The backend that the dispatcher takes first and the others that it would take for these calls, if measured."""
    if not isinstance(module, SparseLinear) or not tune.enabled() or any(call.autocast is not None for call in seen):
        return (first,)  # it asks for no measurement there
    names = [name for name in dispatch.backends(module.format, seen[0].device.type)[:-1] if name != first]
    rows = [call.input().reshape(-1, call.shape[-1]) for call in seen] if names else []
    able = (n for n in names if all(dispatch.why_not(n, "mm", module.packed, x) is None for x in rows))
    return (first, *able)


def build(site: Site, candidate: Candidate, seen: Sequence[Seen]) -> tuple[Trial | None, str]:
    """A trial of the candidate, or the reason why there is none."""
    try:
        module = candidate.build(site.dense[0])
    except NotImplementedError as error:
        return None, f"{candidate}: {error}"
    name, why = backend_of(module, seen[0].input())
    if name == "ref":
        return None, f"{candidate} has no fast kernel here ({why})"
    trial = Trial(site, candidate, alternatives(module, name, seen))
    trial.module = module
    return trial, ""


def remembered(site: Site, wanted: Sequence[Candidate], seen: Sequence[Seen], split: bool = False) -> list[Trial]:
    """A trial of every candidate from the cache alone, unpacked; none where one is not known in full.

    split: with thresholds.
    """
    trials = []
    for candidate in wanted:
        names = dispatch.backends(candidate.format, seen[0].device.type)[:-1]
        known = tuple(n for n in names if all(_recalled(Trial(site, candidate, (n,)), call, n) for call in seen))
        if not known:
            return []
        trial = Trial(site, candidate, known)
        for call in seen:
            _note(trial, call, {n: r for n in known if (r := _recalled(trial, call, n)) is not None})
        trials.append(trial)
    _split(trials, split)
    return trials


def as_now(trial: Trial, seen: Sequence[Seen]) -> bool:
    """Whether what was remembered is of the backends that would be timed now."""
    first = backend_of(trial.module, seen[0].input())[0]
    return set(alternatives(trial.module, first, seen)) == set(trial.backends)


def _recalled(trial: Trial, call: Seen, backend: str) -> tune.Record | None:
    """What the cache has of this very case."""
    if trial.candidate.share is None and "module" not in vars(trial):
        return None
    record = tune.lookup(case(trial, call, backend))
    return record if record is not None and record.m == call.tokens(trial.site.conv) else None


def _note(trial: Trial, call: Seen, records: dict[str, tune.Record]) -> None:
    """Adds a call with the fastest of the backends that were timed."""
    fastest = min(records, key=lambda name: records[name].sparse)
    best = records[fastest]
    tokens = call.tokens(trial.site.conv)
    trial.calls.append(Call(call.shape, tokens, call.count, 1e3 * best.dense, 1e3 * best.sparse))
    trial.used.append(fastest)
    trial.spread = max(trial.spread, best.spread)


def measure(site: Site, trials: list[Trial], seen: Sequence[Seen], seconds: float, split: bool = False) -> None:
    """Fills in the calls of every trial, from the cache where the very same case was measured before.

    split: and their thresholds.
    """
    for call in seen:
        x, tokens = call.input(), call.tokens(site.conv)
        known = [{name: _recalled(t, call, name) for name in t.backends} for t in trials]
        todo = {f"{i} {name}": (t, name) for i, t in enumerate(trials) for name, r in known[i].items() if r is None}
        records: dict[str, tune.Record] = {}
        if todo:
            for t in {id(t): t for t, _ in todo.values()}.values():
                tune_kernels(t, call)
            with torch.no_grad(), call.context():
                variants = {key: _call(_by(t, name), x) for key, (t, name) in todo.items()}
                records = tune.measure(_call(site.dense[0], x), variants, m=tokens, seconds=seconds, device=call.device)
        for i, t in enumerate(trials):
            found = {name: r or records.get(f"{i} {name}") for name, r in known[i].items()}
            if any(record is None for record in found.values()):
                raise RuntimeError(f"{site.names[0]}: {t.candidate} was not measured")
            for name, record in found.items():
                if f"{i} {name}" in records and record is not None:
                    tune.store(case(t, call, name), record)
            _note(t, call, {name: record for name, record in found.items() if record is not None})
    _split(trials, split)


def _split(trials: list[Trial], wanted: bool) -> None:
    for trial in trials:
        trial.dense_above = find_threshold(trial) if wanted else None


def find_threshold(trial: Trial) -> int | None:
    """The number of tokens above which dense is the faster one, beyond noise; None where sparse serves every call.

    Of all thresholds that leave the smallest calls to the sparse kernel, the one with the least total time.
    """
    counts = sorted({call.tokens for call in trial.calls})
    times = {m: replace(trial, dense_above=m).sparse_ms for m in counts}  # at the last one nothing runs dense
    best = min(counts, key=lambda m: times[m])
    worth = times[best] * (1 + min(MOST_NOISE, max(NOISE, 2 * trial.spread)))
    return best if worth < times[counts[-1]] else None


def best_of(trials: Sequence[Trial], worst: bool) -> tuple[Trial, float]:
    """The trial that gains most, and its gain; of those that gain as much within noise, the smallest."""
    gains = {id(t): t.worst if worst else t.speedup for t in trials}
    most = max(gains.values())
    near = [t for t in trials if gains[id(t)] * (1 + min(MOST_NOISE, max(NOISE, t.spread))) >= most]
    best = min(near, key=lambda t: t.nbytes)
    return best, gains[id(best)]


def tune_kernels(trial: Trial, call: Seen) -> None:
    """Lets backends that have several ways to run a call measure them first, so that the best of each is timed.

    The times are kept with the others: later calls, and other processes, take the same way. Not under autocast.
    """
    if call.autocast is not None or not tune.enabled() or call.device.type == "cpu":
        return
    module, x = trial.module, call.input()
    for name in trial.backends:
        if isinstance(module, SparseLinear):
            ways = getattr(backend_module(module.format, name), "tune_forward", None)
            given: tuple[Any, ...] = (x.reshape(-1, x.shape[-1]),)
        else:
            geometry = cast(Geometry, module.geometry)
            ways = getattr(library.choose("conv2d", module.packed, x, name, geometry), "tune_forward", None)
            given = (x, geometry)
        if ways is not None:
            with torch.no_grad():
                ways(module.packed, *given, partial(_seconds, call.device))


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """What a call takes; a glance, since many ways are to be compared."""
    from ..testing import measure as clock

    return clock({"it": call}, repeats=50, warmup=2, seconds=0.05, device=device)["it"].median


def _by(trial: Trial, backend: str) -> nn.Module:
    """The trial's module as this backend runs it."""
    if len(trial.backends) == 1:
        return trial.module
    module = copy.copy(trial.module)  # around the same parameters
    module.backend = backend
    return module


def _call(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Without hooks: they are the same on both sides and would drown small layers."""
    return lambda: module.forward(x)


def case(trial: Trial, seen: Seen, backend: str) -> tune.Case:
    """The name under which a measurement of this backend is kept."""
    layer: Any = trial.site.dense[0]
    op = "mm"
    if trial.site.conv:
        geometry = (tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)
        op = f"conv2d {geometry} {layer.padding_mode} {seen.shape} {seen.stride}".replace("'", "")
    if seen.autocast is not None:
        op += f" autocast {seen.autocast}"
    share = trial.candidate.share
    return tune.Case(
        op,
        str(trial.candidate),
        backend,
        str(seen.dtype).removeprefix("torch."),
        seen.tokens(trial.site.conv),
        layer.weight.shape[0],
        layer.weight[0].numel(),
        tune.stored_share(trial.module.packed) if share is None else share,
        str(seen.device),
    )


def expected(trial: Trial, seen: Sequence[Seen], conv: bool) -> float:
    """The speed-up to expect over all calls, from shapes alone."""
    (n, k), density = trial.module.packed.shape, trial.module.density
    dense = sparse = 0.0
    for call in seen:
        tokens, dtype = call.tokens(conv), call.autocast or call.dtype
        shape = (tokens, n, k, dtype, density, trial.candidate.block or (32, 32))
        gain = predict(described(call.device), trial.module.format, "mm", *shape).speedup
        work = max(tokens, 16) * call.count  # below 16 tokens the weight's bytes are the work
        dense, sparse = dense + work, sparse + work / gain
    return dense / sparse if sparse else 0.0


def described(device: torch.device) -> str:
    """A device as the heuristic names it."""
    if device.type == "cuda":
        return f"cuda-{roofline.card(capability(device), tune.device_name(str(device)))}"
    return f"cpu-{tune.isa()}" if device.type == "cpu" and tune.isa() != "none" else device.type
