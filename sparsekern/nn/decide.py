"""Which candidate a layer gets: measured, expected, or the first that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import dispatch, tune
from ..conv import Geometry, library
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
    """A candidate for one site: the backend that runs it and what its calls take. Packed on first use."""

    site: Site
    candidate: Candidate
    backend: str
    calls: list[Call] = field(default_factory=list)
    spread: float = 0.0
    dense_above: int | None = None

    @cached_property
    def module(self) -> SparseModule:
        return self.candidate.build(self.site.dense[0])

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


def build(site: Site, candidate: Candidate, x: Tensor) -> tuple[Trial | None, str]:
    """A trial of the candidate, or the reason why there is none."""
    try:
        module = candidate.build(site.dense[0])
    except NotImplementedError as error:
        return None, f"{candidate}: {error}"
    name, why = backend_of(module, x)
    if name == "ref":
        return None, f"{candidate} has no fast kernel here ({why})"
    trial = Trial(site, candidate, name)
    trial.module = module
    return trial, ""


def remembered(site: Site, wanted: Sequence[Candidate], seen: Sequence[Seen], split: bool = False) -> list[Trial]:
    """A trial of every candidate from the cache alone, unpacked; none where one is not known in full.

    split: with thresholds.
    """
    trials = []
    for candidate in wanted:
        names = dispatch.backends(candidate.format, seen[0].device.type)[:-1]
        made = [t for name in names if _recall(t := Trial(site, candidate, name), seen)]
        if not made:
            return []
        trials.append(min(made, key=lambda t: t.sparse_ms))
    _split(trials, split)
    return trials


def _recall(trial: Trial, seen: Sequence[Seen]) -> bool:
    """Fills in a trial's calls from the cache; False where one was never measured."""
    for call in seen:
        tokens = call.tokens(trial.site.conv)
        record = None if trial.candidate.share is None else tune.lookup(case(trial, call))
        if record is None or record.m != tokens:
            return False
        _note(trial, call, tokens, record)
    return True


def _note(trial: Trial, call: Seen, tokens: int, record: tune.Record) -> None:
    trial.calls.append(Call(call.shape, tokens, call.count, 1e3 * record.dense, 1e3 * record.sparse))
    trial.spread = max(trial.spread, record.spread)


def measure(site: Site, trials: list[Trial], seen: Sequence[Seen], seconds: float, split: bool = False) -> None:
    """Fills in the calls of every trial, from the cache where the very same case was measured before.

    split: and their thresholds.
    """
    for call in seen:
        x, tokens = call.input(), call.tokens(site.conv)
        cases = [case(t, call) for t in trials]
        known = [tune.lookup(c) for c in cases]
        todo = {str(i): t for i, t in enumerate(trials) if (r := known[i]) is None or r.m != tokens}
        records: dict[str, tune.Record] = {}
        if todo:
            with torch.no_grad(), call.context():
                variants = {i: _call(t.module, x) for i, t in todo.items()}
                records = tune.measure(_call(site.dense[0], x), variants, m=tokens, seconds=seconds, device=call.device)
        for i, t in enumerate(trials):
            record = records.get(str(i)) or known[i]
            if record is None:
                raise RuntimeError(f"{site.names[0]}: {t.candidate} was not measured")
            if str(i) in records:
                tune.store(cases[i], record)
            _note(t, call, tokens, record)
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


def _call(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Without hooks: they are the same on both sides and would drown small layers."""
    return lambda: module.forward(x)


def case(trial: Trial, seen: Seen) -> tune.Case:
    """The name under which a measurement is kept."""
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
        trial.backend,
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
        device = call.device.type
        device = f"cpu-{tune.isa()}" if device == "cpu" and tune.isa() != "none" else device
        tokens, dtype = call.tokens(conv), call.autocast or call.dtype
        gain = predict(device, trial.module.format, "mm", tokens, n, k, dtype, density).speedup
        work = max(tokens, 16) * call.count  # below 16 tokens the weight's bytes are the work
        dense, sparse = dense + work, sparse + work / gain
    return dense / sparse if sparse else 0.0
