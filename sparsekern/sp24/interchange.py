"""sp24 in the orders of other libraries, losslessly, in plain torch.

- CUTLASS for sm_80, which torch.sparse shares: values row-major, metadata `E` as int16 [N, K / 16] for 16-bit types
  and int32 [N, K / 32] for int8. In memory every block of 32 rows x 32 columns (16 x 64 for int8) is 128 contiguous
  bytes, of which lane l of a warp loads word l; blocks follow each other down the rows first.
- cuSPARSELt for sm_80, 16-bit types: one tensor, all values and then the same blocks, in tiles of 128 rows x 64
  columns.
- cuSPARSELt for sm_90, 16-bit types: one tensor, all values and then blocks of 64 rows x 32 columns, which follow each
  other along the columns first. In a block lies for each 16 rows and each g = 0..7 an 8-byte piece of rows g and g + 8;
  its bytes are the column groups 0 4 1 5 2 6 3 7, row g in the low nibble and row g + 8 in the high one. The order is
  that which torchao wrote for this library (its sparsify24.cu, until August 2026); nobody has compared ours with the
  library's own output yet: tests/test_sp24_interchange.py does where there is a card. For 8-bit types on sm_90 neither
  the order of the metadata nor whether padding follows it is known: the same test prints what the library makes there.
- cuSPARSELt of the card that is here, whatever its order: the library itself compresses, and multiplies by the identity
  to read back (vendor.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import vendor
from .layout import Sp24
from .pack import pack

_E_TYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int8: torch.int32}


def to_cutlass(layout: Sp24) -> tuple[Tensor, Tensor]:
    """(values [N, K / 2], E) for CUTLASS and torch.sparse on sm_80.

    bfloat16, float16: E int16 [N, K / 16], N and K multiples of 32. int8: E int32 [N, K / 32], N a multiple of 16 and
    K of 64. Raises ValueError for other types and shapes.
    """
    n, k = layout.shape
    dtype = _check(n, k, layout.values.dtype)
    words = _blocks(layout.metadata, n, k, layout.values.dtype)
    return layout.values.clone(), words.reshape(-1).view(dtype).reshape(n, -1)


def from_cutlass(values: Tensor, e: Tensor, scale: Tensor | None = None) -> Sp24:
    """The layout of (values, E), checked: the inverse of `to_cutlass`."""
    n, k = values.shape[0], 2 * values.shape[1]
    dtype = _check(n, k, values.dtype)
    expected = (n, k // 16 if dtype == torch.int16 else k // 32)
    if e.dtype != dtype or tuple(e.shape) != expected:
        raise ValueError(f"E must be {dtype} of shape {expected} for values {values.dtype} {tuple(values.shape)}, "
                         f"got {e.dtype} {tuple(e.shape)}")  # fmt: skip
    metadata = _rows(e.contiguous().reshape(-1).view(torch.uint8), n, k, values.dtype)
    return Sp24(values=values.contiguous(), metadata=metadata, shape=(n, k), scale=scale).check()


def to_cusparselt(layout: Sp24) -> Tensor:
    """W[N, K] on a GPU as its cuSPARSELt compresses it, in the values' type; N and K as `vendor.ALIGNMENT` says.

    Raises NotImplementedError where there is no such library, or it has no such type.
    """
    if _own_order(layout.values):
        return to_cusparselt_sm90(layout)
    return torch._cslt_compress(layout.unpack())


def from_cusparselt(blob: Tensor, shape: tuple[int, int], scale: Tensor | None = None) -> Sp24:
    """The layout of W[N, K] as the cuSPARSELt of the blob's card compressed it: the inverse of `to_cusparselt`.

    Every finite value is as it was, and -0.0 is 0.0 (of bfloat16's subnormal ones that is the card's to say). Raises
    ValueError for sizes that do not fit and values that are not finite, NotImplementedError as `to_cusparselt`.
    """
    if _own_order(blob):
        return from_cusparselt_sm90(blob, shape)
    return pack(vendor.written_out(blob, shape), scale=scale)


def _own_order(t: Tensor) -> bool:
    """Whether the order that is known must do, because the library should not multiply this type on this card."""
    if t.dtype not in vendor.ALIGNMENT:
        raise NotImplementedError(f"cuSPARSELt through torch has no {t.dtype}")
    reason = vendor.why_not_here(t.device)
    if reason is not None:
        raise NotImplementedError(reason)
    reason = vendor.why_not_type(t.dtype, t.device)
    if reason is not None and t.dtype != torch.float16:
        raise NotImplementedError(reason)
    return reason is not None


def to_cusparselt_sm80(layout: Sp24) -> Tensor:
    """[9 N K / 16] in the values' type: cuSPARSELt's compressed W for sm_80. 16-bit types, N % 128 = K % 64 = 0."""
    n, k = layout.shape
    _check_cusparselt(n, k, layout.values.dtype)
    blocks = _blocks(layout.metadata, n, k, layout.values.dtype).reshape(k // 64, 2, n // 128, 4, 128)
    tail = blocks.permute(0, 2, 1, 3, 4).reshape(-1).view(layout.values.dtype)
    return torch.cat((layout.values.reshape(-1), tail))


def from_cusparselt_sm80(blob: Tensor, shape: tuple[int, int]) -> Sp24:
    """The layout of cuSPARSELt's compressed W[N, K] for sm_80, checked: the inverse of `to_cusparselt_sm80`."""
    n, k = shape
    _check_cusparselt(n, k, blob.dtype)
    values, tail = _parts(blob, shape)
    blocks = tail.reshape(k // 64, n // 128, 2, 4, 128).permute(0, 2, 1, 3, 4).reshape(-1)
    return Sp24(values=values, metadata=_rows(blocks, n, k, blob.dtype), shape=shape).check()


def to_cusparselt_sm90(layout: Sp24) -> Tensor:
    """[9 N K / 16] in the values' type: cuSPARSELt's compressed W for sm_90. 16-bit types, N % 64 = K % 32 = 0.

    Not yet compared with the library (see above).
    """
    n, k = layout.shape
    _check_cusparselt_sm90(n, k, layout.values.dtype)
    nibbles = torch.stack((layout.metadata & 15, layout.metadata >> 4), -1)  # [N, K / 8, 2], group 2 byte + half
    # Row 64 b + 16 s + 8 h + g, group 8 c + 4 u + v -> block (b, c), piece (s, g), byte 2 v + u, nibble h.
    split = nibbles.reshape(n // 64, 4, 2, 8, k // 32, 2, 4).permute(0, 4, 1, 3, 6, 5, 2)
    tail = (split[..., 0] | split[..., 1] << 4).reshape(-1).view(layout.values.dtype)
    return torch.cat((layout.values.reshape(-1), tail))


def from_cusparselt_sm90(blob: Tensor, shape: tuple[int, int]) -> Sp24:
    """The layout of cuSPARSELt's compressed W[N, K] for sm_90, checked: the inverse of `to_cusparselt_sm90`."""
    n, k = shape
    _check_cusparselt_sm90(n, k, blob.dtype)
    values, tail = _parts(blob, shape)
    split = torch.stack((tail & 15, tail >> 4), -1).reshape(n // 64, k // 32, 4, 8, 4, 2, 2)
    nibbles = split.permute(0, 2, 6, 3, 1, 5, 4).reshape(n, k // 8, 2)
    return Sp24(values=values, metadata=(nibbles[..., 0] | nibbles[..., 1] << 4).contiguous(), shape=shape).check()


def _parts(blob: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(values [N, K / 2], metadata's bytes) of cuSPARSELt's compressed W[N, K] of 16 bits."""
    n, k = shape
    blob = blob.reshape(-1)
    if blob.numel() != n * k // 16 * 9:
        raise ValueError(f"a compressed weight of shape {shape} has {n * k // 16 * 9} elements, got {blob.numel()}")
    return blob[: n * k // 2].reshape(n, k // 2).clone(), blob[n * k // 2 :].clone().view(torch.uint8)


def _check(n: int, k: int, dtype: torch.dtype) -> torch.dtype:
    if dtype not in _E_TYPES:
        raise ValueError(f"CUTLASS's order is for bfloat16, float16 and int8 values, not {dtype}")
    rows, columns = (32, 32) if dtype.itemsize == 2 else (16, 64)
    if n % rows or k % columns:
        raise ValueError(f"N must be a multiple of {rows} and K of {columns} for {dtype}, got {(n, k)}")
    return _E_TYPES[dtype]


def _check_cusparselt(n: int, k: int, dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float16) or n % 128 or k % 64:
        raise ValueError(
            "cuSPARSELt's order for sm_80 is known for bfloat16 and float16 and N in multiples of 128, K of 64; "
            f"got {dtype}, {(n, k)}"
        )


def _check_cusparselt_sm90(n: int, k: int, dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float16) or n % 64 or k % 32:
        raise ValueError(
            "cuSPARSELt's order for sm_90 is known for bfloat16 and float16 and N in multiples of 64, K of 32; "
            f"got {dtype}, {(n, k)}"
        )


def _blocks(metadata: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Canonical metadata [N, K / 8] as uint8 [blocks of columns, blocks of rows, 128]."""
    if dtype.itemsize == 2:
        # Row 32 b + 16 s + 8 h + g, byte 4 c + 2 u + e -> word (lane 4 g + 2 s + u), half h, byte e: lanes t = 0, 1 of
        # a quad have the first 16 rows (selector 0), t = 2, 3 the others.
        split = metadata.reshape(n // 32, 2, 2, 8, k // 32, 2, 2)
        return split.permute(4, 0, 3, 1, 5, 2, 6).reshape(k // 32, n // 32, 128)
    # Row 16 b + 8 h + g, byte 8 c + 4 u + e -> word (lane 4 g + 2 u + h), byte e.
    split = metadata.reshape(n // 16, 2, 8, k // 64, 2, 4)
    return split.permute(3, 0, 2, 4, 1, 5).reshape(k // 64, n // 16, 128)


def _rows(blocks: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `_blocks`."""
    if dtype.itemsize == 2:
        split = blocks.reshape(k // 32, n // 32, 8, 2, 2, 2, 2)
        return split.permute(1, 3, 5, 2, 0, 4, 6).reshape(n, k // 8).contiguous()
    split = blocks.reshape(k // 64, n // 16, 8, 2, 2, 4)
    return split.permute(1, 4, 2, 0, 3, 5).reshape(n, k // 8).contiguous()
