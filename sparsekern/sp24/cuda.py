"""sp24 on NVIDIA's sparse tensor cores (csrc/sp24): compressed weights in fragment order, kernels since Ampere."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import ref
from .._ext import (
    ACTIVATIONS,
    CUDA_DTYPES,
    FP8,
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
from .._plan import keep, plan
from .._workspace import workspace
from ..ref import result_dtype
from . import fragments, repack
from .config import Choice, Kernel, candidates, why_not_fp8
from .layout import Sp24

OPERANDS = (torch.bfloat16, torch.float16, torch.int8, FP8)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
# What mm takes beside bias and activation (_ending.py).
ENDINGS = frozenset(("x_scale", "residual", "beta", "out_dtype", "use_fast_accum"))


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
    if reason is None and own == FP8 and not emulating():
        return why_not_fp8(capability(x.device), code_on(x.device))
    return reason


def mm(
    layout: Sp24,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    how: Choice | None = None,
) -> Tensor:
    """Y = act(X W^T * w_scale * x_scale + bias) + beta * residual: x [M, K] -> [M, N].

    x_scale: float32 [M], one for each token. out_dtype: the output's type; torch.int32 gives the plain sums of an int8
    product, without any epilogue. use_fast_accum: fp8 sums may stay in Hopper's tensor cores for all of K, which keep
    some 14 bits of them; else they are promoted to float32 every 128 columns. how: instead of the heuristic's choice.
    """
    (n, k), m, dtype = layout.shape, x.shape[0], layout.values.dtype
    out = out_dtype or result_dtype(x)
    if out not in OUTPUTS and not (out == torch.int32 and dtype == torch.int8):
        raise ValueError(f"out_dtype must be one of float32, bfloat16, float16 (int32 for int8 values), got {out}")
    y = x.new_empty(m, n) if out == x.dtype else x.new_empty((m, n), dtype=out)  # 0.7 and 1.3 us
    if m == 0 or n == 0:
        return y
    if k == 0:  # nothing to multiply
        return ref.mm(layout, x, bias, activation, x_scale=x_scale, residual=residual, beta=beta, out_dtype=out)
    return _product(packed(layout), layout.scale, x, y, bias, activation, x_scale, residual, beta, use_fast_accum, how)


def _product(
    weight: Tensor,
    scale: Tensor | None,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    use_fast_accum: bool = False,
    how: Choice | None = None,
) -> Tensor:
    """`mm` into y [M, N] by a weight in fragment order of x's type; none of the sizes is 0."""
    aligned = _aligned(x)
    if not (aligned and x.is_contiguous() and x.shape[1] * x.element_size() % 4 == 0):
        x = _readable(x)
        aligned = _aligned(x)
    if residual is not None:
        residual = unit_rows(residual if residual.dtype == y.dtype else residual.to(y.dtype))
    how = how or _chosen(y.shape[1], x, aligned, use_fast_accum)
    _launch(how, weight, x.shape[1], x, y, scale, bias, activation, x_scale, residual, beta, ())
    return y


def _readable(x: Tensor) -> Tensor:
    """x, or a copy of it, as some kernel can read it; what a copy has more lies in the weight's last block."""
    x = unit_rows(x)
    if x.stride(0) < x.shape[1]:  # TMA reads no rows that overlap, as those of v.expand(M, K) do
        x = x.contiguous() if x.shape[0] > 1 else x.view(-1).unsqueeze(0)
    x = word_rows(x)
    if x.dtype == FP8 and not _aligned(x) and _card(x.get_device()) == 90:
        x = torch.nn.functional.pad(x.view(torch.uint8), (0, -x.shape[1] % 16)).clone().view(FP8)
    return x


def windows(
    weight: Tensor,
    k: int,
    x: Tensor,
    images: tuple[int, ...],
    y: Tensor,
    bias: Tensor | None,
    activation: str,
    tma: bool,
    how: Choice | None = None,
) -> None:
    """y [M, N] = act(X W^T + bias), where X's rows are the M windows of images x [pixels, channels], read in place.

    weight: W[N, k] in fragment order; 16-bit types. images: the fields of csrc/device/images.h. tma: whether it can
    read them, which is for the caller to know. The rows of x and y may lie any distance apart.
    """
    how = how or _choice(CUDA_DTYPES[x.dtype], *y.shape, k, x.get_device(), tma, False, True)
    _launch(how, weight, k, x, y, None, bias, activation, None, None, 1.0, images)


def _launch(
    how: Choice,
    weight: Tensor,
    k: int,
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    residual: Tensor | None,
    beta: float,
    images: tuple[int, ...],
) -> None:
    (m, n), dtype, stream = y.shape, CUDA_DTYPES[x.dtype], stream_of(x)
    partials = counters = 0
    if how.streamed:  # shared tiles: partial sums, and counters that every launch leaves at zero
        kernel = kernels(dtype)[how.kernel]
        scratch = workspace(x, kernel.partial_words * how.workers, kernel.counters * how.tiles, stream)
        partials, counters = scratch[0].data_ptr(), scratch[1].data_ptr()
    bias = known_bias(bias)
    cuda().sp24_mm(
        how.kernel,
        dtype,
        weight.data_ptr(),
        n,
        k,
        x.data_ptr(),
        m,
        x.stride()[0],  # half the time of x.stride(0)
        y.data_ptr(),
        y.stride()[0],
        CUDA_DTYPES[y.dtype],
        0 if scale is None else scale.data_ptr(),
        0 if x_scale is None else x_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else CUDA_DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        1.0,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        beta,
        images,
        how.workers,
        how.streamed,
        partials,
        counters,
        stream,
    )


def mm_t(layout: Sp24, dy: Tensor) -> Tensor:
    """dX = dY W: dy [M, N] -> [M, K].

    Where W^T is 2:4 as well (a transposable mask), `mm` of its fragments; else Hopper decompresses W in the registers
    of a dense product, and other cards decompress it for cuBLAS.
    """
    (n, k), m = layout.shape, dy.shape[0]
    if min(m, n, k) > 0:
        if transposable(layout):
            return _product(packed_t(layout), None, dy, dy.new_empty(m, k))
        how = _gradient("mm_t", CUDA_DTYPES[dy.dtype], m, k, n, dy.get_device())
        if how is not None:
            dy = word_rows(unit_rows(dy), 16)
            dx = dy.new_empty(m, k)
            _launch(how, packed(layout), dy.shape[1], dy, dx, None, None, "none", None, None, 1.0, ())
            return dx
    return dy @ repack.unpack(layout)


def sddmm(layout: Sp24, dy: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X at the stored positions: dy [M, N], x [M, K] -> [N, Kp / 2].

    The dense gradient never lies in memory as a whole. On Hopper a dense product keeps two of every four sums;
    elsewhere cuBLAS forms it in slices of rows that stay in the second-level cache, and a kernel gathers each slice
    before the next one takes its place.
    """
    (n, k), m = layout.shape, x.shape[0]
    dvalues = layout.values.new_empty(layout.values.shape)
    how = _gradient("sddmm", CUDA_DTYPES[x.dtype], k, n, m, x.get_device()) if min(m, n, k) > 0 else None
    if how is not None:
        _sampled(how, layout, word_rows(unit_rows(dy), 16), word_rows(unit_rows(x), 16), dvalues)
        return dvalues
    step = min(n, slice_rows(k, x.element_size()))
    scratch = x.new_empty(step, k)
    for first in range(0, n, max(step, 1)):
        last = min(first + step, n)
        dense = torch.mm(dy[:, first:last].t(), x, out=scratch[: last - first])
        repack.sample(layout.metadata[first:last], dense, dvalues[first:last])
    return dvalues


def _sampled(how: Choice, layout: Sp24, dy: Tensor, x: Tensor, dvalues: Tensor) -> None:
    dtype, stream, metadata = CUDA_DTYPES[x.dtype], stream_of(x), layout.metadata
    partials = counters = 0
    if how.streamed:
        kernel = kernels(dtype)[how.kernel]
        scratch = workspace(x, kernel.partial_words * how.workers, kernel.counters * how.tiles, stream)
        partials, counters = scratch[0].data_ptr(), scratch[1].data_ptr()
    cuda().sp24_sddmm(
        how.kernel,
        dtype,
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        metadata.data_ptr(),
        metadata.stride(0),
        dvalues.data_ptr(),
        *layout.shape,
        dvalues.shape[1] // 2,
        how.workers,
        how.streamed,
        partials,
        counters,
        stream,
    )


SLICE = 32 << 20  # bytes of the dense gradient at a time: less than the second-level cache of the cards since Ampere


def slice_rows(k: int, itemsize: int) -> int:
    """How many rows of the dense gradient are formed at a time: whole blocks of rows, at least one."""
    return max(1, SLICE // max(1, k * itemsize) // fragments.BLOCK_ROWS) * fragments.BLOCK_ROWS


def packed(layout: Sp24) -> Tensor:
    """The weight in fragment order, kept beside its values and renewed in place when they change."""
    return plan(
        layout.values,
        _key("sp24.fragments", layout),
        lambda: repack.to_fragments(layout),
        lambda old: repack.to_fragments(layout, old),
        live=True,
        also=layout.metadata,
    )


def packed_t(layout: Sp24) -> Tensor:
    """W^T in fragment order, kept like `packed`. For a transposable mask and 16-bit values."""
    return plan(
        layout.values,
        _key("sp24.fragments_t", layout),
        lambda: repack.transpose(layout),
        lambda old: repack.transpose(layout, old),
        live=True,
        also=layout.metadata,
    )


def transposable(layout: Sp24) -> bool:
    """Whether W^T is 2:4 as well, whatever the values; found out once for each mask, which waits for the GPU.

    A CUDA graph that is captured before anybody has asked cannot wait, and does without.
    """
    if layout.values.dtype.itemsize != 2:
        return False

    def make() -> bool:
        if capturing(layout.values):
            return False
        ones = layout.with_values(torch.ones_like(layout.values))
        first = repack.no_crowd(layout.values)
        repack.transpose(ones, first=first)
        return int(first[1]) == -1

    return plan(layout.metadata, ("sp24.transposable", layout.shape), make)


def adopt(layout: Sp24, weight: Tensor, weight_t: Tensor | None) -> None:
    """Keeps fragments that were made together with a layout, of W and, where its mask is transposable, of W^T."""
    keep(layout.values, _key("sp24.fragments", layout), weight, layout.metadata)
    if weight_t is not None:
        keep(layout.values, _key("sp24.fragments_t", layout), weight_t, layout.metadata)
    keep(layout.metadata, ("sp24.transposable", layout.shape), weight_t is not None)


def _key(name: str, layout: Sp24) -> tuple[object, ...]:
    return name, layout.shape, layout.metadata.data_ptr()


@cache
def kernels(dtype: int) -> tuple[Kernel, ...]:
    """The compiled kernels for operands of this type."""
    return tuple(Kernel(*row) for row in cuda().sp24_kernels(dtype))


def choice(layout: Sp24, x: Tensor, use_fast_accum: bool = False) -> Choice:
    """The heuristic's choice for this product."""
    return _chosen(layout.shape[0], x, _aligned(x), use_fast_accum)


def _chosen(n: int, x: Tensor, aligned: bool, use_fast_accum: bool) -> Choice:
    m, k = x.shape
    return _choice(CUDA_DTYPES[x.dtype], m, n, k, x.get_device(), aligned, use_fast_accum, False)


def _card(device: int) -> int:
    return 90 if device < 0 else capability(torch.device("cuda", device))  # -1: the emulator's


def _aligned(x: Tensor) -> bool:
    """Whether TMA can read the rows of x: they begin at multiples of 16 bytes and do not overlap."""
    stride = x.stride()[0]
    return (x.data_ptr() | stride * x.element_size()) % 16 == 0 and stride >= x.shape[1]


@cache
def _resident(dtype: int, device: int) -> tuple[int, ...] | None:
    """How many clusters of every kernel are on a card at once, as it says itself; None where there is none to ask."""
    if device < 0 or not _card(device) == code_on(torch.device("cuda", device)) == 90:
        return None
    with torch.cuda.device(device):
        processors = multiprocessors(torch.device("cuda", device))
        return tuple(
            cuda().sp24_resident(dtype, number) if kernel.cluster > 1 else processors
            for number, kernel in enumerate(kernels(dtype))
        )


@lru_cache(maxsize=4096)
def _gradient(op: str, dtype: int, m: int, n: int, k: int, device: int) -> Choice | None:
    """The heuristic's choice for a gradient, sizes as `candidates` has them; None where no kernel of ours does it."""
    card = torch.device("cpu") if device < 0 else torch.device("cuda", device)
    found = candidates(
        kernels(dtype),
        m,
        n,
        -(-k // 64),
        op=op,
        capability=_card(device),
        processors=multiprocessors(card),
        aligned=True,
        code=code_on(card),
        resident=_resident(dtype, device),
    )
    return found[0] if found else None


@lru_cache(maxsize=4096)
def _choice(dtype: int, m: int, n: int, k: int, device: int, aligned: bool, fast_accum: bool, images: bool) -> Choice:
    fp8, card = dtype == CUDA_DTYPES[FP8], torch.device("cpu") if device < 0 else torch.device("cuda", device)
    found = candidates(
        kernels(dtype),
        m,
        n,
        -(-k // fragments.block_k(next(t for t, number in CUDA_DTYPES.items() if number == dtype))),
        capability=_card(device),
        processors=multiprocessors(card),
        aligned=aligned,
        code=code_on(card),
        resident=_resident(dtype, device),
        fp8=fp8,
        fast_accum=fast_accum,
        images=images,
    )
    return found[0]
