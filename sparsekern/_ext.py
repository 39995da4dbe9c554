"""Lazy loading of the compiled modules, and the numbers by which they know torch's types."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ._sources import digest

# csrc/core/types.h has the same numbers.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FP8 = torch.float8_e4m3fn
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"sparsekern.{name}"), None
    except ImportError as error:
        return None, str(error)


@cache
def _load_fitting(name: str, what: str, compiler: str) -> tuple[ModuleType | None, str | None]:
    """A compiled module, or why there is none that this Python code can use."""
    module, reason = _load(name)
    if module is None:
        return None, f"the compiled {what} module is missing (reinstall with {compiler}): {reason}"
    there, built = digest(cuda=name == "_cuda"), getattr(module, "sources", None)
    if built is not None and there in (None, built):
        return module, None
    # An old module has other entries, or reads other plans: wrong numbers would be the mild case.
    how = "pip install --force-reinstall sparsekern" if there is None else "python setup.py build_ext --inplace"
    reason = f"the compiled {what} module is out of date; rebuild it with: {how}"
    warnings.warn(f"sparsekern: {reason} (until then every op runs on plain torch, slowly)", stacklevel=3)
    return None, reason


@cache
def _load_host() -> tuple[ModuleType | None, str | None]:
    module, reason = _load_fitting("_host", "CPU", "a C++ compiler")
    if module is not None:
        module.share_threads(openmp())
    return module, reason


def openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with, 0 where there is none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):  # another system's name, or a torch on threads of its own
        return 0


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


CUDA_DTYPES = {**DTYPES, FP8: 4, torch.int32: 5}
_emulator: ModuleType | None = None


def emulate(module: ModuleType | None) -> None:
    """Lets the GPU kernels run on CPU tensors, in an emulator with the entries of sparsekern._cuda: for tests."""
    global _emulator
    _emulator = module


def emulating() -> bool:
    return _emulator is not None


def cuda() -> ModuleType:
    """The compiled GPU module. Call only where `why_not_cuda` is None."""
    if _emulator is not None:
        return _emulator
    module, reason = _load_fitting("_cuda", "GPU", "nvcc")
    if module is None:
        raise RuntimeError(f"sparsekern._cuda cannot be used: {reason}")
    return module


def why_not_cuda(device: torch.device | None = None) -> str | None:
    """Why the compiled GPU kernels cannot run on this device (None: on any), or None where they can."""
    return None if _emulator is not None else _why_not_on(device)


@cache
def _why_not_on(device: torch.device | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device is not None and device.type != "cuda":
        return f"the GPU kernels take CUDA tensors, not {device.type} tensors"
    module, reason = _load_fitting("_cuda", "GPU", "nvcc")
    if module is None or device is None:
        return reason
    here = capability(device)
    if here < 80:
        return f"the GPU kernels need compute capability 8.0, {device} has {here / 10}"
    if code_for(here, module.archs) is None:
        return f"the GPU kernels were built for {module.archs}, {device} has compute capability {here / 10}"
    return None


def code_for(card: int, archs: str) -> int | None:
    """The architecture (90: Hopper) that a card of this compute capability runs code of, None where there is none.

    archs: those of a build, "80,90a". Code for 8.x runs on later 8.y, other code on its own architecture, PTX of the
    last one on anything newer.
    """
    built = [int(arch.rstrip("a")) for arch in archs.split(",")]
    own = [arch for arch in built if arch // 10 == card // 10 and arch <= card]
    return max(own) if own else built[-1] if built[-1] <= card else None


@cache
def code_on(device: torch.device) -> int:
    """The architecture whose code runs on this device, on which `why_not_cuda` is None; emulated: all of Hopper's."""
    if _emulator is not None:
        return 90
    code = code_for(capability(device), cuda().archs)
    assert code is not None
    return code


# The stream's number without a Stream around it, as torch's own compiled code asks for it: 0.1 instead of 2 us.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda i: torch.cuda.current_stream(i).cuda_stream)


def on_card(x: torch.Tensor) -> AbstractContextManager[object]:
    """Launches go to the GPU of x, whichever is current; nothing where x is on another device."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def capturing(x: torch.Tensor) -> bool:
    """Whether work on x goes into a CUDA graph instead of being done."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def stream_of(x: torch.Tensor) -> int:
    """The CUDA stream that work on x belongs to."""
    return _raw_stream(x.get_device()) if x.is_cuda else 0


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"the Triton kernels need triton 3.6 or later, this is {version}"
    return None


def interpreting() -> bool:
    """Whether Triton interprets kernels on CPU tensors (TRITON_INTERPRET=1): for tests, not for speed."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def why_not_triton_compiler() -> str | None:
    """Why Triton cannot compile here, card or not, or None where it can."""
    return _triton_missing()


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None where they can."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"Triton kernels run on CUDA tensors (on CPU tensors with TRITON_INTERPRET=1), not on {device.type}"
    missing = _triton_missing()
    if missing is None and device.type == "cuda" and capability(device) < 80:
        return f"Triton kernels need compute capability 8.0, {device} has {capability(device) / 10}"
    return missing


@cache
def capability(device: torch.device) -> int:
    """Compute capability times ten (90: Hopper); that of an A100 where kernels are interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many thread blocks can run beside each other, at least; few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with unit stride along its rows, which may lie any distance apart: what every kernel takes."""
    return x if x.is_contiguous() or x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def word_rows(x: torch.Tensor, unit: int = 4) -> torch.Tensor:
    """x, or a copy whose rows begin and end at multiples of `unit` bytes (4, as the GPU's copies to shared memory need,
    or 16, as tensor maps do, whose rows must not overlap either).

    The columns that it has more are zeros: less than 16 bytes of them, up to a multiple of 16.
    """
    size, (m, k) = x.element_size(), x.shape
    if (x.data_ptr() | x.stride(0) * size | k * size) % unit == 0 and (unit == 4 or m == 1 or x.stride(0) >= k):
        return x
    rows = x.new_zeros(m, k + -k % (16 // size))  # functional.pad might keep the odd stride of a single row
    rows[:, :k] = x
    return rows


def known_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the kernels read it: contiguous, of a type that they know."""
    if bias is None or (bias.dtype in DTYPES and bias.is_contiguous()):
        return bias
    return (bias if bias.dtype in DTYPES else bias.float()).contiguous()
