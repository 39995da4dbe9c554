"""Which backend runs a call, and why the others do not: explicit > tuned > heuristic.

An explicit backend never falls back: it runs or raises with its reason. Without one, the backend that was
measured fastest for such a call (tune.py) is taken; without a measurement, the first of the format's list
for the device that can run the call. The oracle can run every call and is last.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import _ending, tune
from ._ending import Ending
from ._ext import emulating, interpreting
from .formats import FORMATS, Format, backend_module
from .layout import Layout

BACKENDS = ("host", "cuda", "triton", "vendor", "ref")


def backends(format: str, device_type: str) -> tuple[str, ...]:
    """The backends of a format on a device type, in the order in which they are tried."""
    return (*FORMATS[format].backends.get(device_type, ()), "ref")


def named(format: str, device_type: str) -> tuple[str, ...]:
    """The backends that run on a device type when asked for by name; interpreted and emulated kernels run only then."""
    on_gpu = FORMATS[format].backends.get("cuda", ())
    simulated = {"triton": interpreting(), "cuda": emulating()}
    return (*backends(format, device_type), *(name for name in on_gpu if simulated.get(name)))


def why_not(backend: str, op: str, layout: Layout, x: Tensor, ending: Ending | None = None) -> str | None:
    """Why `backend` cannot run this call (`ending`: of mm, what follows bias and activation), or None where it can."""
    if backend not in BACKENDS:
        return f"there is no backend of this name; known: {', '.join(BACKENDS)}"
    if backend not in named(layout.format, x.device.type):
        return f"format {layout.format} has no such backend on {x.device.type} tensors"
    module = backend_module(layout.format, backend)
    return module.why_not(op, layout, x) or _ending.why_not(module, ending)


def choose(op: str, layout: Layout, x: Tensor, backend: str | None = None, ending: Ending | None = None) -> ModuleType:
    """The backend module that runs `op` on this layout and these activations."""
    if backend:
        reason = why_not(backend, op, layout, x, ending)
        if reason is not None:
            raise NotImplementedError(f"backend {backend!r} cannot run {layout.format}_{op}: {reason}")
        return backend_module(layout.format, backend)
    modules = _modules(FORMATS[layout.format], x.device)
    if len(modules) > 2 and tune.measured(x.device):
        best = tune.backend_for(op, layout, x, backends(layout.format, x.device.type)[:-1])
        if best is not None and why_not(best, op, layout, x, ending) is None:
            return backend_module(layout.format, best)
    for module in modules:
        if module.why_not(op, layout, x) is None and _ending.why_not(module, ending) is None:
            return module
    return modules[-1]


@cache
def _modules(format: Format, device: torch.device) -> tuple[ModuleType, ...]:
    """The modules of `backends`, in that order."""
    return tuple(backend_module(format.name, name) for name in backends(format.name, device.type))


def explain(op: str, layout: Layout, x: Tensor) -> dict[str, str | None]:
    """Every backend with the reason why it cannot run this call (None: it can)."""
    return {name: why_not(name, op, layout, x) for name in BACKENDS}
