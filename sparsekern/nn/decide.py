"""Which candidate a layer gets: measured, expected, or the first that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, tune
from ..conv import library
from ..heuristic import predict
from .base import SparseModule
from .candidates import Candidate
from .capture import Seen
from .linear import SparseLinear
from .report import Call
from .survey import Site

NOISE = 0.02  # a gain smaller than this is none, however quiet the machine


@dataclass
class Trial:
    """A candidate built for one site: its modules, what they took, and what stands in its way."""

    candidate: Candidate
    module: SparseModule
    backend: str
    calls: list[Call]
    spread: float = 0.0

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
        tried = {
            b: dispatch.why_not(b, "mm", packed, rows)
            for b in dispatch.backends(module.format, x.device.type)
        }
    else:
        name = library.choose("conv2d", packed, x, None).__name__.rpartition(".")[2]
        tried = {b: library.why_not(b, "conv2d", packed, x) for b in dispatch.BACKENDS}
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
    return Trial(candidate, module, name, []), ""


def measure(site: Site, trials: list[Trial], seen: Sequence[Seen], seconds: float) -> None:
    """Fills in the calls of every trial, from the cache where the very same case was measured before."""
    for call in seen:
        x, tokens = call.input(), call.tokens(site.conv)
        cases = {id(t): case(site, t, call) for t in trials}
        known = {key: tune.lookup(c) for key, c in cases.items()}
        todo = [t for t in trials if (r := known[id(t)]) is None or r.m != tokens]
        if todo:
            with torch.no_grad(), call.context():
                layer = site.dense[0]
                variants = {str(i): _call(t.module, x) for i, t in enumerate(todo)}
                records = tune.measure(_call(layer, x), variants, m=tokens, seconds=seconds)
            for i, t in enumerate(todo):
                known[id(t)] = records[str(i)]
                tune.store(cases[id(t)], records[str(i)])
        for t in trials:
            record = known[id(t)]
            assert record is not None
            t.calls.append(Call(call.shape, tokens, call.count, 1e3 * record.dense, 1e3 * record.sparse))
            t.spread = max(t.spread, record.spread)


def _call(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Without hooks: they are the same on both sides and would drown small layers."""
    return lambda: module.forward(x)


def case(site: Site, trial: Trial, seen: Seen) -> tune.Case:
    """The name under which a measurement is kept."""
    layer: Any = site.dense[0]
    op = "mm"
    if site.conv:
        geometry = (tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)
        op = f"conv2d {geometry} {layer.padding_mode} {seen.shape} {seen.stride}".replace("'", "")
    if layer.bias is not None:
        op += " bias"
    if seen.autocast is not None:
        op += f" autocast {seen.autocast}"
    n, k = trial.module.packed.shape
    dtype = str(seen.dtype).removeprefix("torch.")
    density = trial.module.density
    return tune.Case(
        op,
        str(trial.candidate),
        trial.backend,
        dtype,
        seen.tokens(site.conv),
        n,
        k,
        density,
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
