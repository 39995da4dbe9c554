"""bsr on NVIDIA GPUs: launchers of the Triton kernels (kernels.py).

The list of work is kept beside the topology (work.py); a call looks it up, picks a configuration and launches. Nothing
waits for the device once the list is there. TRITON_INTERPRET=1 runs the same kernels on CPU tensors, slowly.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._ext import FP8, capability, known_bias, multiprocessors, on_card, unit_rows, why_not_triton
from ..ref import result_dtype
from . import tuning
from .config import LARGEST, PRECISIONS, SMALLEST, Config, beside_a_residual, sides
from .layout import Bsr
from .work import by_columns, rows_of, work_list

ENDINGS = frozenset(("x_scale", "residual", "out_dtype"))  # what mm takes beside bias and activation (_ending.py)
_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    FP8: "float8e4nv",
}


def why_not(op: str, layout: Bsr, x: Tensor) -> str | None:
    """Why the Triton kernels cannot run this call, or None where they can."""
    own, given = layout.values.dtype, x.dtype
    if given not in _NAMES or own not in _NAMES:
        return f"{given if given not in _NAMES else own} is not supported by the Triton kernels"
    if any(b < SMALLEST or b > LARGEST or b & (b - 1) for b in layout.block):
        return f"blocks must have sides of 16, 32, 64 or 128, these are {layout.block[0]}x{layout.block[1]}"
    if given.itemsize == 1:
        if op != "mm":
            return f"{_short(given)} activations are supported by mm only, not by {op}"
        if own != given:
            return f"{_short(given)} activations need {_short(given)} values, these are {own}"
        if layout.block[1] < 32:
            return f"{_short(given)} products need blocks of at least 32 columns"
    elif own.itemsize == 1:
        if op == "sddmm":
            return f"{_short(own)} values have no gradient"
    elif own != given:
        return f"values are {own}, activations {given}; they must agree"
    reason = why_not_triton(x.device)
    if reason is None and x.is_cpu and torch.bfloat16 in (given, own):
        return "Triton's interpreter computes bfloat16 wrongly"
    if reason is None and FP8 in (given, own) and x.is_cuda and capability(x.device) < 89:
        return "float8_e4m3fn needs compute capability 8.9"
    return reason


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fp32_precision() -> str:
    """How float32 products are made: $SPARSEKERN_FP32 (ieee, tf32, tf32x3), else what torch is allowed to do.

    torch.set_float32_matmul_precision("highest"), the default: tf32x3, three tensor-core products whose sum is as good
    as float32's; "high" and "medium": tf32.
    """
    named = os.environ.get("SPARSEKERN_FP32")
    if named is not None:
        if named not in PRECISIONS:
            raise ValueError(f"SPARSEKERN_FP32 must be one of {', '.join(PRECISIONS)}, got {named!r}")
        return named
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def mm(
    layout: Bsr,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    how: Config | None = None,
) -> Tensor:
    """Y = act(x_scale * X W^T + bias) + residual: x [M, K] -> [M, N] in out_dtype (None: x's type, float32 of bytes).

    x_scale: float32 [M], one for each token; how: instead of the heuristic's configuration.
    """
    y = x.new_empty((x.shape[0], layout.shape[0]), dtype=out_dtype or result_dtype(x))
    x_scale = None if x_scale is None else x_scale.contiguous()
    return _product("mm", layout, unit_rows(x), y, known_bias(bias), activation, x_scale, residual, how)


def mm_t(layout: Bsr, dy: Tensor, residual: Tensor | None = None, how: Config | None = None) -> Tensor:
    """dX = dY W + residual: dy [M, N] -> [M, K]."""
    dx = dy.new_empty((dy.shape[0], layout.shape[1]))
    return _product("mm_t", layout, unit_rows(dy), dx, None, "none", None, residual, how)


def _product(
    op: str,
    layout: Bsr,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    residual: Tensor | None,
    how: Config | None,
) -> Tensor:
    (m, size), inner_size = y.shape, x.shape[1]
    if m == 0 or size == 0:
        return y
    kernels, columns = _kernels(), op == "mm_t"
    outer, inner = sides(op, layout.block)
    if how is None:
        how = chosen(op, layout, x, m)
        how = how if residual is None else beside_a_residual(how, outer)
    place, gather = by_columns(layout)[1:] if columns else (layout.col, None)
    work, tiles = work_list(layout, columns, how.most), -(-m // how.tokens)
    scale, sums = layout.scale, torch.int32 if x.dtype == torch.int8 else torch.float32
    residual = None if residual is None else unit_rows(residual)
    if residual is not None and residual.stride(0) >= 1 << 23:  # offsets inside a tile of up to 256 rows are int32
        residual = residual.contiguous()
    residual_stride = 0 if residual is None else residual.stride(0)
    # Nothing reads the sums of rows that are whole.
    partial = torch.empty((work.slots * tiles * how.tokens * outer,), dtype=sums, device=x.device)
    w: Any = layout.values
    given: Any = x
    tma = how.tma and w.dtype == x.dtype and _maps(x, w)  # values to be converted pass through registers anyway
    if tma:
        box = (how.depth, outer) if columns else (outer, how.depth)
        given, w = _map(x, how.tokens, how.depth), _map(w.flatten(0, 1), *box)
    count = work.items.shape[0]
    programs = count * tiles
    if how.resident:
        programs = min(programs, multiprocessors(x.device) * how.resident)
    ending = {"ACTIVATION": activation, "OUT": outer, "TOKENS": how.tokens}
    with on_card(x):
        kernels.bsr_mm[(programs,)](
            given, w, y, partial, bias, scale, x_scale, residual, work.items, place, gather,
            m, size, inner_size, x.stride(0), y.stride(0), residual_stride, count, tiles,
            **ending, IN=inner, DEPTH=how.depth, TRANSPOSED=columns, EVEN=inner_size % inner == 0, TMA=tma,
            PRECISION=fp32_precision(), TYPE=triton_type(x.dtype), ACC=triton_type(sums),
            FP8=x.dtype == FP8, SPLIT=work.slots > 0, GROUP=how.group,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if work.slots:
            rows = max(1, min(how.tokens, 4096 // outer))
            kernels.bsr_mm_join[(work.splits.shape[0] * -(-m // rows),)](
                partial, y, bias, scale, x_scale, residual, work.splits, m, size, y.stride(0), residual_stride, tiles,
                **ending, ROWS=rows, SCALED=scale is not None and not columns, num_warps=4,
            )  # fmt: skip
    return y


def sddmm(layout: Bsr, dy: Tensor, x: Tensor, how: Config | None = None) -> Tensor:
    """dW = dY^T X at the stored blocks: dy [M, N], x [M, K] -> like layout.values (zero beyond the edges of W)."""
    dy, x = unit_rows(dy), unit_rows(x)
    m, (n, k), (r, c) = x.shape[0], layout.shape, layout.block
    out = layout.values.new_empty(layout.values.shape)
    blocks = out.shape[0]
    if blocks == 0:
        return out
    if m == 0:
        return out.zero_()
    how = how or chosen("sddmm", layout, x, m)
    kernels, row = _kernels(), rows_of(layout)
    share = -(-m // (how.parts * how.tokens)) * how.tokens
    parts = -(-m // share)
    sums = out if parts == 1 else x.new_empty((parts, *out.shape), dtype=torch.float32)
    tma = how.tma and _maps(dy, x)
    a: Any = _map(dy, how.tokens, r) if tma else dy
    b: Any = _map(x, how.tokens, c) if tma else x
    with on_card(x):
        kernels.bsr_sddmm[(blocks, parts)](
            a, b, sums, row, layout.col, m, n, k, dy.stride(0), x.stride(0), share, blocks,
            R=r, C=c, TOKENS=how.tokens, EVEN=n % r == 0 and k % c == 0, TMA=tma, PRECISION=fp32_precision(),
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if parts > 1:
            add_parts(sums, out)
    return out


def add_parts(sums: Tensor, out: Tensor) -> None:
    """out = sums.sum(0), in order."""
    grid = (-(-out.numel() // 1024),)
    _kernels().add_parts[grid](sums, out, out.numel(), sums.shape[0], WIDTH=1024, num_warps=4)


def chosen(op: str, layout: Bsr, x: Tensor, m: int) -> Config:
    """The configuration for m rows of x's type: measured or the heuristic's; calls with equal sizes share it."""
    return tuning.chosen(op, layout, x, m, _precision(x))


def _precision(x: Tensor) -> str:
    return fp32_precision() if x.dtype == torch.float32 else "ieee"


FEW = 10  # configurations that a conversion tries for each call


def tune_forward(layout: Bsr, x: Tensor, timer: tuning.Timer) -> None:
    """Measures some configurations of `mm` for this call and remembers the times; once is enough."""
    x = unit_rows(x)
    if x.is_cuda and x.shape[0] and not tuning.is_known("mm", layout, x, _precision(x)):
        tune("mm", layout, x, timer, few=FEW)


def tune(
    op: str, layout: Bsr, x: Tensor, timer: tuning.Timer, dy: Tensor | None = None, few: int | None = None
) -> dict[Config, float]:
    """Measures every candidate of a product and remembers the times: {configuration: seconds}, the fastest first.

    x [M, K] (mm, sddmm) or [M, N] (mm_t); dy [M, N] for sddmm; timer(call): the seconds that a call takes; few: with at
    most so many candidates, those nearest to the rule's own choice.
    """
    if op == "sddmm" and dy is None:
        raise ValueError("sddmm needs dy")

    def run(how: Config) -> Tensor:
        if op == "mm":
            return mm(layout, x, None, "none", how=how)
        return mm_t(layout, x, how=how) if dy is None else sddmm(layout, dy, x, how)

    times = dict(tuning.search(op, layout, x, run, timer, _precision(x), few))
    return dict(sorted(times.items(), key=lambda pair: pair[1]))


@cache
def _kernels() -> Any:
    from . import kernels

    return kernels


@cache
def triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.int32 if dtype == torch.int32 else getattr(tl, _NAMES[dtype])


def _maps(*matrices: Tensor) -> bool:
    """Whether tensor maps can describe these: 16-byte aligned rows, not empty, rows apart."""
    return all(
        t.numel() and t.data_ptr() % 16 == 0 and t.stride(-1) == 1
        and t.stride(-2) * t.itemsize % 16 == 0 and t.stride(-2) >= t.shape[-1]
        for t in matrices
    )  # fmt: skip


def _map(t: Tensor, rows: int, columns: int) -> Any:
    """A tensor map over a matrix, in boxes of rows x columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])
