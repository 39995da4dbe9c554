"""What is measured, against what, and the bar that each case has to reach.

A case makes its variants on random normal data; the first variant is ours, the others are baselines in the same
process. `gate` pairs are compared before any time is taken. Bars are ratios baseline / ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern import _ext
from sparsekern.conv.geometry import weight_of
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.testing import random_weight

Variants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Bar:
    """baseline / ours must be at least `ratio`."""

    baseline: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One measured row: a group (the table it belongs to), its parameters, its bars, and how to make it."""

    group: str
    params: dict[str, Any]
    bars: tuple[Bar, ...]
    make: Callable[[], Variants]
    threads: int = 1
    gate: Callable[[Variants], None] | None = None
    note: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)
    microseconds: tuple[float, ...] = ()  # bars that are times, not ratios (bench/gpu.py)

    @property
    def name(self) -> str:
        return f"{self.group}[{', '.join(f'{k}={v}' for k, v in self.params.items())}]"


SHORT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _gate(tolerance: float) -> Callable[[Variants], None]:
    """Every variant's result against the first one's."""

    def gate(variants: Variants) -> None:
        results = {name: run() for name, run in variants.items()}
        ours = next(iter(results))
        for name, result in results.items():
            if not isinstance(result, Tensor) or result.shape != results[ours].shape:
                continue
            error = (results[ours].double() - result.double()).norm() / result.double().norm().clamp_min(1e-30)
            if not float(error.detach()) < tolerance:
                raise AssertionError(
                    f"{ours} differs from {name} by {float(error):.2e} (relative), allowed {tolerance}"
                )

    return gate


def _dense_linear(n: int, k: int, m: int, dtype: torch.dtype, format: str, density: float, **kw: Any) -> Any:
    weight = random_weight(format, n, k, dtype=dtype, density=density, seed=0, **kw)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return weight, x


def csr_mm() -> Iterator[Case]:
    """CSR fp32 against dense and torch's CSR (MKL)."""
    dense_bar = {0.5: 1.6, 0.7: 2.5, 0.8: 3.5, 0.9: 7.0, 0.95: 12.0}
    for m in (128, 512):
        for sparsity, ratio in dense_bar.items():

            def make(m: int = m, sparsity: float = sparsity) -> Variants:
                weight, x = _dense_linear(4096, 4096, m, torch.float32, "csr", 1 - sparsity)
                w, torch_csr = sk.to_csr(weight), weight.to_sparse_csr()
                return {
                    "sparsekern": lambda: sk.linear(x, w),
                    "dense": lambda: F.linear(x, weight),
                    "torch CSR": lambda: F.linear(x, torch_csr),
                }

            bars = (Bar("dense", ratio), Bar("torch CSR", 4.0))
            params = {"shape": "4096x4096", "M": m, "sparsity": sparsity, "dtype": "float32"}
            yield Case("csr_mm", params, bars, make, gate=_gate(1e-5))


def bsr_mm() -> Iterator[Case]:
    """BSR against dense of the same type."""
    for dtype in ("bfloat16", "float32"):
        for block in (16, 32, 64):
            for m in (16, 128, 512):
                for sparsity in (0.5, 0.9):

                    def make(dtype: str = dtype, block: int = block, m: int = m, s: float = sparsity) -> Variants:
                        weight, x = _dense_linear(4096, 4096, m, SHORT[dtype], "bsr", 1 - s, block=(block, block))
                        w = sk.to_block_sparse(weight, block)
                        return {"sparsekern": lambda: sk.linear(x, w), "dense": lambda: F.linear(x, weight)}

                    bars = (Bar("dense", round(0.9 / (1 - sparsity), 2)),)
                    params = {
                        "shape": "4096x4096",
                        "block": block,
                        "M": m,
                        "sparsity": sparsity,
                        "dtype": dtype,
                    }
                    yield Case("bsr_mm", params, bars, make, gate=_gate(1e-2 if dtype == "bfloat16" else 1e-5))


def sp24_mm() -> Iterator[Case]:
    """2:4 against dense; bf16 rows are informative (dense bf16 may run on matrix units)."""
    for dtype in ("float32", "bfloat16"):
        for m in (64, 128, 512):

            def make(dtype: str = dtype, m: int = m) -> Variants:
                weight, x = _dense_linear(4096, 4096, m, SHORT[dtype], "sp24", 0.5)
                w = sk.to_sparse_semi_structured(weight)
                return {"sparsekern": lambda: sk.linear(x, w), "dense": lambda: F.linear(x, weight)}

            bars = (Bar("dense", 1.6),) if dtype == "float32" else ()
            params = {"shape": "4096x4096", "M": m, "dtype": dtype}
            yield Case("sp24_mm", params, bars, make, gate=_gate(1e-2 if dtype == "bfloat16" else 1e-5))


def decode() -> Iterator[Case]:
    """2:4 and bitmap at 50 %, bf16, on all cores, against torch and a dense GEMV at memory bandwidth."""
    for format in ("sp24", "bitmap"):
        for m in (1, 2, 4):

            def make(format: str = format, m: int = m) -> Variants:
                weight, x = _dense_linear(8192, 8192, m, torch.bfloat16, format, 0.5)
                w = sk.to_sparse_semi_structured(weight) if format == "sp24" else sk.to_bitmap(weight)
                return {
                    "sparsekern": lambda: sk.linear(x, w),
                    "dense": lambda: F.linear(x, weight),
                    "dense GEMV": lambda: dense_gemv(x, weight),
                }

            bars = (Bar("dense", 1.5), Bar("dense GEMV", 1.2))
            params = {"format": format, "shape": "8192x8192", "M": m, "dtype": "bfloat16", "sparsity": 0.5}
            yield Case("decode", params, bars, make, threads=torch.get_num_threads(), gate=_gate(1e-2))


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T by streaming a dense bf16 W once at memory bandwidth: the honest baseline of decode."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    _ext.host().dense_gemv_bf16(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.shape[0], *weight.shape, torch.get_num_threads()
    )
    return y


def training() -> Iterator[Case]:
    """Forward, dX, dW and an SGD step with momentum."""
    for format, block in (("csr", None), ("bsr", 32)):
        for m in (128, 512):

            def make(format: str = format, block: int | None = block, m: int = m) -> Variants:
                kw = {"block": (block, block)} if block else {}
                weight, x = _dense_linear(2048, 2048, m, torch.float32, format, 0.1, **kw)
                dense = torch.nn.Linear(2048, 2048)
                dense.weight.data.copy_(weight)
                sparse = SparseLinear.from_dense(dense, format=format, block_size=block or 32)
                sparse.bias = torch.nn.Parameter(dense.bias.detach().clone())
                return {"sparsekern": _step(sparse, x), "dense": _step(dense, x)}

            params = {"format": format, "shape": "2048x2048", "M": m, "sparsity": 0.9, "dtype": "float32"}
            yield Case("training_step", params, (Bar("dense", 3.0),), make, gate=_gate(1e-4))


# Kernel, channels in and out, image side, stride; a batch of 8.
CONVOLUTIONS = ((3, 256, 256, 28, 1), (1, 512, 512, 14, 1), (3, 256, 256, 28, 2))
CONV_WEIGHTS = (
    ("csr", None, 0.5), ("csr", None, 0.8), ("csr", None, 0.9), ("sp24", None, 0.5), ("bsr", 16, 0.9), ("bsr", 32, 0.9)
)  # fmt: skip


def conv() -> Iterator[Case]:
    """SparseConv2d against nn.Conv2d, forward alone and with all gradients; torch's own memory order (NCHW).

    2:4 and blocks lie along the channels at a fixed tap, as pruning makes them.
    """
    for kernel, c, o, side, stride in CONVOLUTIONS:
        for format, block, sparsity in CONV_WEIGHTS:
            for dtype, backward in ((d, b) for d in ("float32", "bfloat16") for b in (False, True)):

                def make(
                    geometry: tuple[int, ...] = (kernel, c, o, side, stride),
                    format: str = format,
                    block: int | None = block,
                    density: float = 1 - sparsity,
                    dtype: torch.dtype = SHORT[dtype],
                    backward: bool = backward,
                ) -> Variants:
                    sparse, dense, x = _convolutions(*geometry, format, block, density, dtype)
                    if backward:
                        return {"sparsekern": _gradients(sparse, x), "dense": _gradients(dense, x)}
                    sparse.requires_grad_(False)
                    dense.requires_grad_(False)
                    return {"sparsekern": lambda: sparse(x), "dense": lambda: dense(x)}

                params = {
                    "convolution": f"{kernel}x{kernel}, {c}→{o}, {side}x{side}" + (f", stride {stride}" * (stride > 1)),
                    "batch": 8,
                    "format": f"{format} {block}" if block else format,
                    "sparsity": sparsity,
                    "dtype": dtype,
                    "pass": "forward + backward" if backward else "forward",
                }
                yield Case("conv", params, (), make, gate=_gate(2e-2 if dtype == "bfloat16" else 1e-4))


def _convolutions(
    kernel: int, c: int, o: int, side: int, stride: int, format: str, block: int | None, density: float,
    dtype: torch.dtype,
) -> tuple[SparseConv2d, torch.nn.Conv2d, Tensor]:  # fmt: skip
    """The same random convolution, sparse and dense, and images for it."""
    dense = torch.nn.Conv2d(c, o, kernel, stride, kernel // 2, dtype=dtype)
    kw = {"block": (block, block)} if block else {}
    order = "rsc" if format in ("sp24", "bsr") else "crs"
    matrix, _ = _dense_linear(o, c * kernel**2, 1, dtype, format, density, **kw)
    dense.weight.data.copy_(weight_of(matrix, (kernel, kernel), order))
    sparse = SparseConv2d.from_dense(dense, format=format, block_size=block or 16, order=order)
    x = torch.randn(8, c, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    return sparse, dense, x


def _gradients(module: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward and the gradients of x, weight and bias; the result is dX."""
    x = x.clone().requires_grad_()
    parameters = list(module.parameters())

    def run() -> Tensor:
        y = module(x)
        return torch.autograd.grad(y, [x, *parameters], y.detach())[0]

    return run


def _step(module: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A training step; the result is dX, so that the gate sees forward and backward."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        x.grad = None
        module(x).square().sum().backward()
        optimizer.step()
        assert x.grad is not None
        return x.grad

    return step


def packing() -> Iterator[Case]:
    """Packing 4096 x 4096, all cores; the bar is 30 ms, the baselines are torch's own conversions."""
    for format, sparsity in (("sp24", 0.5), ("bsr", 0.9), ("csr", 0.5), ("csr", 0.9), ("bitmap", 0.5)):

        def make(format: str = format, sparsity: float = sparsity) -> Variants:
            kw = {"block": (32, 32)} if format == "bsr" else {}
            weight = random_weight(format, 4096, 4096, dtype=torch.float32, density=1 - sparsity, seed=0, **kw)
            pack = {
                "sp24": lambda: sk.sp24.pack(weight),
                "bsr": lambda: sk.bsr.pack(weight, (32, 32)),
                "csr": lambda: sk.csr.pack(weight),
                "bitmap": lambda: sk.bitmap.pack(weight),
            }[format]
            torchs = {
                "csr": {"torch": weight.to_sparse_csr},
                "bsr": {"torch": lambda: weight.to_sparse_bsr((32, 32))},
            }
            return {"sparsekern": pack, **torchs.get(format, {})}

        params = {"format": format, "shape": "4096x4096", "sparsity": sparsity}
        yield Case("packing", params, (), make, threads=torch.get_num_threads(), tags=frozenset({"30 ms"}))


def overhead() -> Iterator[Case]:
    """Python's share of a warm call: a weight so small that the kernel is nothing."""
    for format in ("sp24", "bsr", "csr", "bitmap"):

        def make(format: str = format) -> Variants:
            kw = {"block": (16, 16)} if format == "bsr" else {}
            weight, x = _dense_linear(32, 32, 1, torch.float32, format, 0.5, **kw)
            dense = torch.nn.Linear(32, 32, bias=False)
            dense.weight.data.copy_(weight)
            sparse = SparseLinear.from_dense(dense, format=format, block_size=16)
            return {"sparsekern": lambda: sparse(x), "dense": lambda: dense(x)}

        yield Case("overhead", {"format": format, "shape": "32x32", "M": 1}, (), make)


def grid() -> Iterator[Case]:
    """What sparsekern/heuristic.py is fitted to (bench/fit_heuristic.py): decode to prefill, every format and type."""
    for format, block in (("csr", None), ("bsr", 32), ("sp24", None), ("bitmap", None)):
        for dtype in ("float32", "bfloat16"):
            for sparsity in (0.5,) if format == "sp24" else (0.5, 0.9):
                for m in (1, 4, 16, 64, 256, 1024):

                    def make(
                        format: str = format,
                        block: int | None = block,
                        m: int = m,
                        density: float = 1 - sparsity,
                        dtype: torch.dtype = SHORT[dtype],
                    ) -> Variants:
                        kw = {"block": (block, block)} if block else {}
                        weight, x = _dense_linear(2048, 2048, m, dtype, format, density, **kw)
                        dense = torch.nn.Linear(2048, 2048, bias=False, dtype=dtype)
                        dense.weight.data.copy_(weight)
                        sparse = SparseLinear.from_dense(dense, format=format, block_size=block or 32)
                        sparse.requires_grad_(False)
                        dense.requires_grad_(False)
                        return {"sparsekern": lambda: sparse(x), "dense": lambda: dense(x)}

                    params = {"format": format, "shape": "2048x2048", "M": m, "sparsity": sparsity, "dtype": dtype}
                    yield Case("grid", params, (), make, gate=_gate(1e-2 if dtype == "bfloat16" else 1e-5))


# Those of the README's tables come first; `grid` is run by its name only.
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "csr_mm": csr_mm,
    "bsr_mm": bsr_mm,
    "sp24_mm": sp24_mm,
    "decode": decode,
    "training_step": training,
    "conv": conv,
    "packing": packing,
    "overhead": overhead,
    "grid": grid,
}
TABLES = tuple(name for name in GROUPS if name != "grid")
