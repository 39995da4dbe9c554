"""Which candidate a layer gets: measured, expected, or the first that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from .report import Call
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

    @cached_property
    def module(self) -> SparseModule:
        return self.candidate.build(self.site.dense[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return self.module.nbytes if self.candidate.nbytes is None else self.candidate.nbytes

    def total(self, which: str) -> float:
        return sum(getattr(call, which) * call.count for call in self.calls)

    @property
    def speedup(self) -> float:
        return self.total("dense_ms") / self.total("sparse_ms")

    @property
    def worst(self) -> float:
        return min(call.dense_ms / call.sparse_ms for call in self.calls if call.dense_ms and call.sparse_ms)


def backend_of(module: SparseModule, x: Tensor) -> tuple[str, str]:
    """The backend that will run a module on x, and why the faster ones do not (empty where one does)."""
    packed = module.packed
    if isinstance(module, SparseLinear):
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        name = dispatch.choose("mm", packed, rows).__name__.rpartition(".")[2]
        tried = {b: dispatch.why_not(b, "mm", packed, rows) for b in dispatch.backends(module.format, x.device.type)}
    else:
        geometry = cast(Geometry, module.geometry)
        name = library.choose("conv2d", packed, x, None, geometry).__name__.rpartition(".")[2]
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


def remembered(site: Site, wanted: Sequence[Candidate], seen: Sequence[Seen]) -> list[Trial]:
    """A trial of every candidate from the cache alone, unpacked; none where one is not known in full."""
    trials = []
    for candidate in wanted:
        names = dispatch.backends(candidate.format, seen[0].device.type)[:-1]
        made = [t for name in names if _recall(t := Trial(site, candidate, name), seen)]
        if not made:
            return []
        trials.append(min(made, key=lambda t: t.total("sparse_ms")))
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


def measure(site: Site, trials: list[Trial], seen: Sequence[Seen], seconds: float) -> None:
    """Fills in the calls of every trial, from the cache where the very same case was measured before."""
    for call in seen:
        x, tokens = call.input(), call.tokens(site.conv)
        cases = [case(t, call) for t in trials]
        known = [tune.lookup(c) for c in cases]
        todo = {str(i): t for i, t in enumerate(trials) if (r := known[i]) is None or r.m != tokens}
        records: dict[str, tune.Record] = {}
        if todo:
            with torch.no_grad(), call.context():
                variants = {i: _call(t.module, x) for i, t in todo.items()}
                records = tune.measure(_call(site.dense[0], x), variants, m=tokens, seconds=seconds)
        for i, t in enumerate(trials):
            record = records.get(str(i)) or known[i]
            if record is None:
                raise RuntimeError(f"{site.names[0]}: {t.candidate} was not measured")
            if str(i) in records:
                tune.store(cases[i], record)
            _note(t, call, tokens, record)


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
