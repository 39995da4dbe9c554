"""sp24 from one form to others on an NVIDIA GPU, in one pass over the weight (csrc/sp24/pack.cuh)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._ext import CUDA_DTYPES, FP8, cuda, on_card, stream_of, unit_rows, why_not_cuda
from .layout import Sp24, padded

DTYPES = (torch.bfloat16, torch.float16, torch.int8, FP8)
WIDE = (torch.bfloat16, torch.float16)
BLOCK_ROWS = 64
_SOURCES = ("top2", "strict", "mask", "transposable", "sample", "canonical", "fragments")  # pack.cuh: From


class Packed(NamedTuple):
    """What a dense weight was packed into. `fragments_t` are those of W^T."""

    values: Tensor
    metadata: Tensor
    fragments: Tensor | None
    fragments_t: Tensor | None


def why_not(dense: Tensor) -> str | None:
    """Why the kernels cannot pack this matrix, or None where they can."""
    if dense.dtype not in DTYPES:
        return f"the GPU packers take bfloat16, float16, int8 and float8_e4m3fn, not {dense.dtype}"
    return why_not_cuda(dense.device)


def fragment_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The shape of W[N, K] in fragment order, uint8 (fragments.py)."""
    return -(-n // BLOCK_ROWS), -(-k * dtype.itemsize // 128), 4608 if dtype.itemsize == 2 else 5120


def new_fragments(n: int, k: int, like: Tensor) -> Tensor:
    """Memory for W[N, K] in fragment order; the kernels need it at a multiple of 16 bytes, as torch allocates it."""
    shape = fragment_shape(n, k, like.dtype)
    strides = (shape[1] * shape[2], shape[2], 1)
    return torch.empty_strided(shape, strides, dtype=torch.uint8, device=like.device)


def pack(
    dense: Tensor, how: str | Tensor, *, fragments: bool = False, transposed: bool = False, first: Tensor | None = None
) -> Packed:
    """A dense W[N, K] into canonical form and, where asked for, fragment order of W and of W^T.

    how: "top2" (the two of largest magnitude in each group, NaN largest of all, ties: the lower index), "strict" (the
    nonzeros), "transposable" (the 4 x 4 pattern of largest sum, 16-bit types) or a bool mask [N, K]. first: int64 [2]
    of -1; [0] becomes row * groups + group of the first group that has more than two entries to keep (strict, mask).
    transposed needs "transposable".
    """
    dense = unit_rows(dense)
    n, k = dense.shape
    kp = padded(k)
    values, metadata = dense.new_empty(n, kp // 2), dense.new_empty((n, kp // 8), dtype=torch.uint8)
    order = new_fragments(n, k, dense) if fragments else None
    order_t = new_fragments(k, n, dense) if transposed else None
    mask = None if isinstance(how, str) else _rows_of(how.view(torch.uint8))
    if first is None and how not in ("top2", "transposable"):
        first = no_crowd(dense)
    _run(
        "mask" if mask is not None else str(how), dense.dtype, n, k, dense=dense, mask=mask, first=first,
        to_values=values, to_metadata=metadata, to_fragments=order, to_transposed=order_t,
    )  # fmt: skip
    return Packed(values, metadata, order, order_t)


def no_crowd(like: Tensor) -> Tensor:
    """What `first` is before the kernel: no crowded group known."""
    return torch.full((2,), -1, dtype=torch.int64, device=like.device)


def to_fragments(layout: Sp24, out: Tensor | None = None) -> Tensor:
    """The layout in fragment order, into `out` where given."""
    out = new_fragments(*layout.shape, layout.values) if out is None else out
    _run_layout("canonical", layout, to_fragments=out)
    return out


def from_fragments(fragments: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values, metadata) of a weight of this shape and dtype: the inverse of `to_fragments`."""
    (n, k), kp = shape, padded(shape[1])
    values = torch.empty((n, kp // 2), dtype=dtype, device=fragments.device)
    metadata = torch.empty((n, kp // 8), dtype=torch.uint8, device=fragments.device)
    _run("fragments", dtype, n, k, fragments=fragments, to_values=values, to_metadata=metadata)
    return values, metadata


def unpack_fragments(fragments: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense W[N, K] of a weight in fragment order."""
    dense = torch.empty(shape, dtype=dtype, device=fragments.device)
    _run("fragments", dtype, *shape, fragments=fragments, to_dense=dense)
    return dense


def unpack(layout: Sp24) -> Tensor:
    """The dense W[N, K] in the values' type (scales not applied)."""
    dense = layout.values.new_empty(layout.shape)
    _run_layout("canonical", layout, to_dense=dense)
    return dense


def transpose(layout: Sp24, out: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """W^T's nonzeros in fragment order (16-bit types).

    first[1] becomes the number of the first of its groups, [K, groups along N], that has more than two.
    """
    n, k = layout.shape
    out = new_fragments(k, n, layout.values) if out is None else out
    _run_layout("canonical", layout, to_transposed=out, first=first)
    return out


def sample(metadata: Tensor, dense: Tensor, out: Tensor) -> Tensor:
    """out [n, Kp / 2] = the entries of dense [n, K] at the places of metadata [n, Kp / 8]."""
    dense = unit_rows(dense)
    _run("sample", dense.dtype, *dense.shape, dense=dense, metadata=metadata, to_values=out)
    return out


def _rows_of(mask: Tensor) -> Tensor:
    return mask if mask.stride(1) == 1 else mask.contiguous()


def _run_layout(source: str, layout: Sp24, **tensors: Tensor | None) -> None:
    values = layout.values
    n, k = layout.shape
    _run(source, values.dtype, n, k, values=values, metadata=layout.metadata, **tensors)


def _run(source: str, dtype: torch.dtype, n: int, k: int, **tensors: Tensor | None) -> None:
    def address(name: str) -> int:
        t = tensors.get(name)
        return 0 if t is None else t.data_ptr()

    def stride(name: str) -> int:
        t = tensors.get(name)
        return 0 if t is None else t.stride(0)

    some = next(t for t in tensors.values() if t is not None)
    with on_card(some):  # packing comes outside of ops, too
        cuda().sp24_repack(
            _SOURCES.index(source),
            CUDA_DTYPES[dtype],
            n,
            k,
            address("dense"),
            stride("dense"),
            address("mask"),
            stride("mask"),
            address("values"),
            address("metadata"),
            address("fragments"),
            address("to_fragments"),
            address("to_transposed"),
            address("to_values"),
            address("to_metadata"),
            address("to_dense"),
            stride("to_dense"),
            address("first"),
            stream_of(some),
        )
