"""sp24 on NVIDIA's sparse tensor cores (csrc/sp24): compressed weights in fragment order, kernels since Ampere."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from .._ext import (
    ACTIVATIONS,
    CUDA_DTYPES,
    FP8,
    capability,
    cuda,
    emulating,
    known_bias,
    multiprocessors,
    stream_of,
    unit_rows,
    why_not_cuda,
    word_rows,
)
from .._plan import plan
from .._workspace import workspace
from ..ref import out_dtype
from . import fragments
from .config import Choice, Kernel, candidates
from .layout import Sp24

OPERANDS = (torch.bfloat16, torch.float16, torch.int8, FP8)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why the CUDA kernels cannot run `op` on this layout and x, or None where they can."""
    own = layout.values.dtype
    if own not in OPERANDS:
        return f"sparse tensor cores take bfloat16, float16, int8 and float8_e4m3fn values in 2:4 form, not {own}"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    if op != "mm" and own.itemsize == 1:
        return f"{own} values have no kernel but mm"
    reason = why_not_cuda(x.device)
    if reason is None and own == FP8 and not emulating() and capability(x.device) < 89:
        return "float8_e4m3fn needs compute capability 8.9"
    return reason


def mm(
    layout: Sp24,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out: torch.dtype | None = None,
    how: Choice | None = None,
) -> Tensor:
    """Y = act(X W^T * w_scale * x_scale + bias) + residual: x [M, K] -> [M, N].

    x_scale: float32 [M], one for each token. out: the output's type; torch.int32 gives the plain sums of an int8
    product, without any epilogue. how: instead of the heuristic's choice.
    """
    (n, k), m, dtype = layout.shape, x.shape[0], layout.values.dtype
    out = out or out_dtype(x)
    if out not in (*OUTPUTS, torch.int32) or (out == torch.int32 and dtype != torch.int8):
        raise ValueError(f"out must be one of float32, bfloat16, float16 (int32 for int8 values), got {out}")
    y = x.new_empty((m, n), dtype=out)
    if m == 0 or n == 0:
        return y
    if k == 0:
        raise NotImplementedError("a weight without columns has no CUDA kernel")
    x = word_rows(unit_rows(x))  # what it has more lies in the weight's last block
    how = how or choice(layout, x)
    kernel = kernels(CUDA_DTYPES[dtype])[how.kernel]
    scratch = _scratch(x, kernel, how)
    bias = known_bias(bias)
    residual = None if residual is None else unit_rows(residual.to(out))
    cuda().sp24_mm(
        how.kernel,
        CUDA_DTYPES[dtype],
        packed(layout).data_ptr(),
        n,
        x.shape[1],
        x.data_ptr(),
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        CUDA_DTYPES[out],
        0 if layout.scale is None else layout.scale.data_ptr(),
        0 if x_scale is None else x_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else CUDA_DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        1.0,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        1.0,
        how.workers,
        how.streamed,
        scratch[0].data_ptr(),
        scratch[1].data_ptr(),
        stream_of(x),
    )
    return y


def mm_t(layout: Sp24, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]. W is decompressed for cuBLAS: groups of four lie along K, not along N."""
    return dy @ layout.unpack()


def sddmm(layout: Sp24, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [N, Kp / 2], gathered from cuBLAS's product."""
    return layout.sample(dy.t() @ x)


def packed(layout: Sp24) -> Tensor:
    """The weight in fragment order, kept beside its values and renewed in place when they change."""
    metadata = layout.metadata
    key = ("sp24.fragments", layout.shape, metadata.data_ptr(), -1 if metadata.is_inference() else metadata._version)

    def again(old: Tensor) -> Tensor:
        return old.copy_(fragments.pack(layout))

    return plan(layout.values, key, lambda: fragments.pack(layout), again)


@cache
def kernels(dtype: int) -> tuple[Kernel, ...]:
    """The compiled kernels for operands of this type."""
    return tuple(Kernel(*row) for row in cuda().sp24_kernels(dtype))


def choice(layout: Sp24, x: Tensor) -> Choice:
    """The heuristic's choice for this product."""
    (n, k), dtype = layout.shape, layout.values.dtype
    aligned = (x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0
    card = 90 if emulating() else capability(x.device)
    shape = (x.shape[0], n, -(-k // fragments.block_k(dtype)))
    return _choice(CUDA_DTYPES[dtype], *shape, card, multiprocessors(x.device), aligned)


@lru_cache(maxsize=4096)
def _choice(dtype: int, m: int, n: int, k_blocks: int, card: int, processors: int, aligned: bool) -> Choice:
    return candidates(kernels(dtype), m, n, k_blocks, capability=card, processors=processors, aligned=aligned)[0]


def _scratch(x: Tensor, kernel: Kernel, how: Choice) -> tuple[Tensor, Tensor]:
    """Partial sums, and counters that every launch leaves at zero."""
    words = kernel.partial_words * how.workers if how.streamed else 0
    return workspace(x, words, kernel.counters * how.tiles)
