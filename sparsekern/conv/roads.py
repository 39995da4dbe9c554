"""Which of two roads a convolution by rows takes on this machine: measured, where somebody has (nn/decide.py).

The direct kernel skips zeros, cuDNN multiplies them on tensor cores (rows_cuda.py). Both times are kept with the other
measurements (tune.py), under the names "cuda direct" and "cuda dense".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

from .. import tune
from ..layout import Layout
from .geometry import Geometry

Timer = Callable[[Callable[[], Any]], float]
ROADS = {"cuda direct": True, "cuda dense": False}


def direct_is_faster(op: str, layout: Layout, x: Tensor, g: Geometry) -> bool | None:
    """What was measured for this call; None where nothing was."""
    if not (tune.enabled() and tune.measured(x.device)):
        return None
    call = (op, layout.format, tuple(layout.shape), x.dtype, tuple(x.shape), layout.density, g, str(x.device))
    return _known(call, tune.generation())


@lru_cache(maxsize=4096)
def _known(call: tuple[Any, ...], generation: int) -> bool | None:
    times = {name: tune.lookup(_case(call, name)) for name in ROADS}
    known = {name: record.sparse for name, record in times.items() if record is not None}
    return ROADS[min(known, key=lambda name: known[name])] if len(known) == len(ROADS) else None


def measure(op: str, layout: Layout, x: Tensor, g: Geometry, run: Callable[[bool], Any], timer: Timer) -> None:
    """Times run(direct) on both roads, seconds by `timer`, and remembers them; once is enough."""
    if not tune.enabled() or direct_is_faster(op, layout, x, g) is not None:
        return
    call = (op, layout.format, tuple(layout.shape), x.dtype, tuple(x.shape), layout.density, g, str(x.device))
    times = {name: timer(lambda direct=direct: run(direct)) for name, direct in ROADS.items()}  # type: ignore[misc]
    for name, seconds in times.items():
        tune.store(_case(call, name), tune.Record(_pixels(call), times["cuda dense"], seconds, 0.0))


def _pixels(call: tuple[Any, ...]) -> int:
    images, _, height, width = call[4]
    return int(images * height * width)


def _case(call: tuple[Any, ...], road: str) -> tune.Case:
    op, format, (n, k), dtype, size, density, g, device = call
    place = f"{op} {tuple(g)} {tuple(size)}"
    return tune.Case(place, format, road, str(dtype).removeprefix("torch."), _pixels(call), n, k, density, device)
