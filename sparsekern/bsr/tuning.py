"""Measured configurations of the Triton kernels: kept with the other measurements (tune.py), asked before the rule.

A configuration is part of the name under which a time is kept ("triton 128 64 8 4 ..."), so one cache serves both:
which backend a call takes, and how its kernel is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import tune
from .._ext import capability, multiprocessors
from .config import Config, candidates, config
from .layout import Bsr

Timer = Callable[[Callable[[], Any]], float]


def chosen(op: str, layout: Bsr, x: Tensor, m: int, precision: str) -> Config:
    """The configuration of `op` for m rows of x's type: the fastest that was measured, else the heuristic's."""
    (nb, kb), blocks = layout.grid, layout.values.shape[0]
    call = (op, m, *layout.shape, layout.block, x.dtype, blocks / max(nb * kb, 1))
    return _chosen(call, x.device, precision, tune.generation() if tune.enabled() else -1)


@lru_cache(maxsize=4096)
def _chosen(call: tuple[Any, ...], device: torch.device, precision: str, generation: int) -> Config:
    card: tuple[Any, ...] = (capability(device), multiprocessors(device), precision)
    known = []
    if device.type == "cuda" and generation >= 0:
        for tried in candidates(*call, *card):
            record = tune.lookup(_case(call, tried, device))
            if record is not None:
                known.append((record.sparse, tried))
    return min(known, key=lambda pair: pair[0])[1] if known else config(*call, *card)


def search(
    op: str, layout: Bsr, x: Tensor, run: Callable[[Config], Any], timer: Timer, precision: str, few: int | None = None
) -> Iterator[tuple[Config, float]]:
    """Times `run` with every candidate, seconds by `timer`, and remembers them; yields each as it is known.

    few: with so many of them, nearest to the rule's own choice first. What does not compile on this card is left out.
    `tune.save()` writes the times to disk.
    """
    (nb, kb), blocks, m = layout.grid, layout.values.shape[0], x.shape[0]
    call = (op, m, *layout.shape, layout.block, x.dtype, blocks / max(nb * kb, 1))
    tries = list(candidates(*call, capability(x.device), multiprocessors(x.device), precision))
    own, baseline = tries[0], None
    if few is not None:  # every candidate is compiled first, which takes a second
        tries = sorted(tries, key=lambda tried: differences(own, tried))[:few]
    for tried in tries:
        try:
            seconds = timer(partial(run, tried))
        except RuntimeError:  # out of resources: more registers or shared memory than the estimate
            continue
        baseline = baseline or seconds
        tune.store(_case(call, tried, x.device), tune.Record(m, baseline, seconds, 0.0))
        yield tried, seconds


def differences(own: Config, other: Config) -> int:
    """In how many settings two configurations differ."""
    return sum(a != b for a, b in zip(astuple(own), astuple(other), strict=True))


def is_known(op: str, layout: Bsr, x: Tensor, precision: str) -> bool:
    """Whether configurations were measured for such a call: the rule's own always is among them."""
    (nb, kb), blocks, m = layout.grid, layout.values.shape[0], x.shape[0]
    call = (op, m, *layout.shape, layout.block, x.dtype, blocks / max(nb * kb, 1))
    own = config(*call, capability(x.device), multiprocessors(x.device), precision)
    return tune.lookup(_case(call, own, x.device)) is not None


def _case(call: tuple[Any, ...], tried: Config, device: torch.device) -> tune.Case:
    op, m, n, k, block, dtype, density = call
    name = "triton " + " ".join(str(int(v)) for v in astuple(tried))
    kind = str(dtype).removeprefix("torch.")
    return tune.Case(op, tune.described("bsr", block), name, kind, m, n, k, density, str(device))
