"""bitmap on NVIDIA GPUs (csrc/bitmap/*.cuh): few tokens straight from the bits, many on dense tensor cores.

Skipping half of the products saves nothing where they are what costs: beyond DECODE tokens, and for gradients, the
weight is written out densely for cuBLAS by a kernel that costs its dense bytes, and thrown away.

Where few weights are left their bits cost more than their columns: csrc/csr/mv.cuh has the bytes of both. On an H100 a
multiprocessor spends some 55 cycles on 1024 weights by bits, whatever their number, and 0.2 cycles on each nonzero by
distances (3 bytes) for one token, 0.4 for up to four: equal at densities of 0.27 and 0.13. Cards with less bandwidth
count bytes, 2 d + 1/8 and 3 d: equal at 0.125, 10 % more at 0.18. BY_ROWS lies between.

Beside the layout lie the records that the kernels read: on a GPU a weight that has met few tokens takes its bytes
twice, or as much as the dense one at a density of 0.44.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ending, _rows_cuda
from .._ext import (
    ACTIVATIONS,
    DTYPES,
    capability,
    capturing,
    code_on,
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
from .._rows import DerivedRows
from .._workspace import workspace
from ..ref import ACTIVATIONS as FUNCTIONS
from . import fragments
from .layout import Bitmap

ENDINGS = frozenset(("x_scale", "residual", "beta", "out_dtype"))  # what mm takes besides (_ending.py)
DECODE = 64  # tokens
BY_ROWS = {1: 0.2, 2: 0.13, 3: 0.13, 4: 0.13}  # tokens: densities below which the weight is read as rows
HALVES = (torch.bfloat16, torch.float16)
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may have, by architecture


def why_not(op: str, layout: Bitmap, x: Tensor) -> str | None:
    """Why the CUDA kernels cannot run `op` on this layout and x, or None where they can."""
    own = layout.values.dtype
    if own not in DTYPES or own == torch.int8:
        return f"{own} is not supported by the CUDA kernels"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    return why_not_cuda(x.device)


def mm(
    layout: Bitmap,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y = act(x_scale * X W^T + bias) + beta * residual: x [M, K] -> [M, N] in out_dtype."""
    ending = _ending.Ending(x_scale, residual, out_dtype, beta=beta)
    asked, m = ending.asked(), x.shape[0]
    if m and min(layout.shape) and m <= DECODE and layout.dtype in HALVES and (asked or not by_rows(layout, m)):
        how = _choice(layout, m, x.device)
        if how is not None:
            return _decode(layout, x, bias, activation, *how, **asked)
    return _ending.mm(_PLAIN, layout, x, bias, activation, ending) if asked else _plain(layout, x, bias, activation)


def _plain(layout: Bitmap, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`mm` by rows or by the dense weight, which end with bias and activation alone."""
    m = x.shape[0]
    if m and min(layout.shape) and by_rows(layout, m):
        return _rows_cuda.mm(rows_of(layout), x, bias, activation)
    bias = bias if bias is None else bias.to(x.dtype)
    return FUNCTIONS[activation](torch.nn.functional.linear(x, _dense(layout), bias))


_PLAIN: Any = SimpleNamespace(mm=_plain, ENDINGS=frozenset())


def by_rows(layout: Bitmap, m: int) -> bool:
    """Whether a product with m tokens reads the weight as rows: few tokens, and few weights or fp32 ones, for which no
    tensor core is exact enough."""
    if m > _rows_cuda.MV_TOKENS or layout.values.numel() >= 2**31:
        return False
    return layout.dtype not in HALVES or layout.density < BY_ROWS[m]


def mm_t(layout: Bitmap, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K]."""
    return dy @ _dense(layout)


def sddmm(layout: Bitmap, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [nnz], sampled from cuBLAS's product."""
    values = layout.values.new_empty(layout.values.shape)
    _expand("bitmap_from_dense", layout, values, (dy.t() @ x).contiguous())
    return values


def _decode(
    layout: Bitmap,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    number: int,
    kernel: Kernel,
    workers: int,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    n, m = layout.shape[0], x.shape[0]
    x, y, bias = unit_rows(x), x.new_empty((m, n), dtype=out_dtype), known_bias(bias)
    x = word_rows(x, 16 if kernel.order == "sm90" else 4)
    if residual is not None:
        residual = unit_rows(residual if residual.dtype == y.dtype else residual.to(y.dtype))
    packed = _packed(layout, fragments.ORDERS[kernel.order]).fragments
    tiles = -(-n // kernel.rows)
    partials, counters = workspace(x, 2 * kernel.tokens * kernel.rows * workers, tiles * kernel.rows // 64)
    cuda().bitmap_mm(
        number,
        DTYPES[x.dtype],
        packed.records.data_ptr(),
        packed.offsets.data_ptr(),
        packed.longest,
        n,
        x.shape[1],
        x.data_ptr(),
        m,
        x.stride(0),
        y.data_ptr(),
        n,
        DTYPES[y.dtype],
        0 if x_scale is None else x_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        beta,
        workers,
        partials.data_ptr(),
        counters.data_ptr(),
        stream_of(x),
    )
    return y


class Kernel(NamedTuple):
    """A row of _cuda.bitmap_kernels(type)."""

    order: str  # of the records: "sm90", for that architecture alone, or "sm80"
    rows: int  # of a tile
    tokens: int
    blocks: int  # of an SM, where shared memory allows
    least: int  # blocks of K that are worth a worker
    shared_bytes: int  # without any record
    shared_more: int  # for each byte of the longest record

    def shared(self, longest: int) -> int:
        return self.shared_bytes + self.shared_more * longest


@cache
def kernels(dtype: int) -> tuple[Kernel, ...]:
    """The compiled kernels for values of this type."""
    return tuple(Kernel(*row) for row in cuda().bitmap_kernels(dtype))


def _choice(layout: Bitmap, m: int, device: torch.device) -> tuple[int, Kernel, int] | None:
    """The first kernel that has so many tokens and fits the card, with its workers; None where none fits."""
    here = _card(device)
    room = SHARED[max(arch for arch in SHARED if arch <= here)] * 1024
    orders, (n, k) = _orders(device), layout.shape
    for number, kernel in enumerate(kernels(DTYPES[layout.dtype])):
        if m > kernel.tokens or kernel.order not in orders:
            continue
        order = fragments.ORDERS[kernel.order]
        shared = kernel.shared(_packed(layout, order).fragments.longest)
        if shared <= room:
            blocks = max(1, min(kernel.blocks, room // (shared + 1024)))
            shares = -(-n // kernel.rows) * -(-k // order.columns) // kernel.least
            return number, kernel, max(1, min(blocks * multiprocessors(device), shares))
    return None


def _orders(device: torch.device) -> tuple[str, ...]:
    """The orders of records for which kernels were built that this card runs."""
    return ("sm90", "sm80") if _card(device) == code_on(device) == 90 else ("sm80",)


def _card(device: torch.device) -> int:
    return 90 if emulating() else capability(device)


class _Packed:
    """A weight's records in one order, which follow its values and bits."""

    def __init__(self, layout: Bitmap, order: fragments.Order) -> None:
        self.pack(layout, order)

    def pack(self, layout: Bitmap, order: fragments.Order) -> None:
        if capturing(layout.values):
            raise RuntimeError("packing a bitmap's bits waits for the GPU: call it once before a CUDA graph")
        self.fragments, self.version = fragments.pack(layout, order), _version(layout.bits)
        if layout.values.requires_grad:
            self._places(layout, order)

    def renew(self, layout: Bitmap, order: fragments.Order) -> None:
        """New values, in the memory that a captured graph knows, by their places, which are found once; or new bits."""
        if self.version != _version(layout.bits):
            self.pack(layout, order)
        else:
            at = self._places(layout, order)
            with torch.no_grad(), torch.inference_mode(self.fragments.records.is_inference()):
                self.fragments.records.index_copy_(0, at, layout.values.view(torch.int16))

    def _places(self, layout: Bitmap, order: fragments.Order) -> Tensor:
        key = ("bitmap.places", order.name, layout.shape)
        at: Tensor = plan(layout.bits, key, lambda: fragments.places(layout, self.fragments, order))
        return at


def _packed(layout: Bitmap, order: fragments.Order) -> _Packed:
    """The weight in fragment order, kept beside its values and renewed in place when they change."""
    found: _Packed = plan(
        layout.values,
        ("bitmap.fragments", order.name, layout.shape, layout.bits.data_ptr()),
        lambda: _Packed(layout, order),
        lambda old: old.renew(layout, order),
        live=True,
        also=layout.bits,
    )
    return found


def _version(bits: Tensor) -> int:
    return -1 if bits.is_inference() else bits._version


def _dense(layout: Bitmap) -> Tensor:
    dense = layout.values.new_empty(layout.shape)
    _expand("bitmap_to_dense", layout, layout.values, dense)
    return dense


def _expand(entry: str, layout: Bitmap, values: Tensor, dense: Tensor) -> None:
    n, k = layout.shape
    if n and k:
        bits, offsets = layout.bits.data_ptr(), layout.offsets.data_ptr()
        where = (bits, offsets, n, k, dense.data_ptr(), stream_of(values))
        getattr(cuda(), entry)(DTYPES[values.dtype], values.data_ptr(), *where)


def rows_of(layout: Bitmap) -> DerivedRows:
    """The same weight with explicit columns, derived once."""

    def make() -> tuple[Tensor, Tensor]:
        return layout.offsets.to(torch.int32), layout.mask().nonzero()[:, 1].to(torch.int32)

    crow, col = plan(layout.bits, ("bitmap.rows", *layout.shape), make)
    return DerivedRows(layout.values, crow, col, layout.shape)
