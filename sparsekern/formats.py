"""The formats that exist: a line each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from . import bitmap, bsr, csr, sp24
from .layout import Layout


@dataclass(frozen=True, eq=False)
class Format:
    """A format's layout class, its packer, and the backends that it has beside the oracle, fastest first."""

    layout: type[Layout]
    pack: Callable[..., Any]
    backends: dict[str, tuple[str, ...]]  # device type -> names of modules in the format's folder

    @property
    def name(self) -> str:
        return self.layout.format


FORMATS = {
    f.name: f
    for f in (
        Format(sp24.Sp24, sp24.pack, {"cpu": ("host",), "cuda": ("cuda", "vendor")}),
        Format(bsr.Bsr, bsr.pack, {"cpu": ("host",), "cuda": ("triton", "vendor")}),
        Format(csr.Csr, csr.pack, {"cpu": ("host",), "cuda": ("cuda", "vendor")}),
        Format(bitmap.Bitmap, bitmap.pack, {"cpu": ("host",), "cuda": ("cuda",)}),
    )
}


@cache
def backend_module(format: str, backend: str) -> ModuleType:
    """The module that implements a backend of a format: why_not, mm, mm_t, sddmm."""
    return importlib.import_module(".ref" if backend == "ref" else f".{format}.{backend}", __package__)
