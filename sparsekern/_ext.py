"""Lazy loading of the compiled modules, and the numbers by which they know torch's types."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch

from ._sources import digest

# csrc/core/types.h has the same numbers.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"sparsekern.{name}"), None
    except ImportError as error:
        return None, str(error)


@cache
def _load_host() -> tuple[ModuleType | None, str | None]:
    """The compiled CPU module, or why there is none that this Python code can use."""
    module, reason = _load("_host")
    if module is None:
        return None, f"the compiled CPU module is missing (reinstall with a C++ compiler): {reason}"
    there, built = digest(), getattr(module, "sources", None)
    if built is not None and there in (None, built):
        return module, None
    # An old module has other entries, or reads other plans: wrong numbers would be the mild case.
    how = "pip install --force-reinstall sparsekern" if there is None else "python setup.py build_ext --inplace"
    reason = f"the compiled CPU module is out of date; rebuild it with: {how}"
    warnings.warn(f"sparsekern: {reason} (until then every op runs on plain torch, slowly)", stacklevel=2)
    return None, reason


def host() -> ModuleType:
    """The compiled CPU module. Call only where `why_not_host()` is None."""
    module, reason = _load_host()
    if module is None:
        raise RuntimeError(f"sparsekern._host cannot be used: {reason}")
    return module


def why_not_host() -> str | None:
    """Why the compiled CPU kernels are not available, or None where they are."""
    return _load_host()[1]


def host_packs(dense: torch.Tensor) -> bool:
    """Whether the compiled packers take this dense matrix; plain torch packs the others."""
    return dense.device.type == "cpu" and dense.dtype in DTYPES and why_not_host() is None


def why_not_cuda() -> str | None:
    """Why the compiled GPU kernels are not available, or None where they are."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    module, reason = _load("_cuda")
    return None if module is not None else f"the compiled GPU module is missing: {reason}"


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with unit stride along its rows, which may lie any distance apart: what every kernel takes."""
    return x if x.is_contiguous() or x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def known_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the kernels read it: contiguous, of a type that they know."""
    if bias is None or (bias.dtype in DTYPES and bias.is_contiguous()):
        return bias
    return (bias if bias.dtype in DTYPES else bias.float()).contiguous()
