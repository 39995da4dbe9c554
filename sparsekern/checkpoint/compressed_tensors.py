"""The sparse layouts of compressed-tensors (up to 0.14), which no other library reads any more.

- sparse-24-bitmask: P.compressed [N, K / 2], P.bitmask uint8 [N, ceil(K / 8)], P.shape int64 [2, 1];
- sparse-bitmask: P.compressed [nnz], P.bitmask, P.shape int64 [2], P.row_offsets int64 [N], the start of each
row. Bit k % 8 of byte k // 8 says whether weight k is kept (little order). P is the module's name; files of
some releases keep "weight" in it. Vectors (norms) are stored the same way. Quantised values have
P.weight_scale beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bitmap import Bitmap
from ..layout import FLOATS
from ..sp24 import Sp24
from ..tensor import SparseTensor
from .weight import Weight

SP24, BITMASK = "sparse-24-bitmask", "sparse-bitmask"


def decode(name: str, parts: dict[str, Tensor]) -> Weight:
    """The weight behind `compressed`, `bitmask` and `shape`, and `row_offsets` or `scale` where there are
    such.

    A 2:4 weight becomes an sp24 SparseTensor, any other matrix a bitmap one; vectors, and types that no
    format holds, become dense. Raises ValueError that names the weight and the first bad place.
    """
    source = f"compressed-tensors {BITMASK if 'row_offsets' in parts else SP24}"
    try:
        shape = _shape(parts["shape"])
        values, mask = parts["compressed"].contiguous().reshape(-1), _mask(parts["bitmask"], shape)
        kept = int(mask.count_nonzero())
        if values.numel() != kept:
            raise ValueError(f"bitmask keeps {kept} weights, but compressed has {values.numel()}")
        if "row_offsets" in parts:
            _check_row_offsets(parts["row_offsets"], mask)
        packed = _packed(values, mask, shape, parts.get("scale"))
        if packed is not None:
            return Weight(name, SparseTensor(packed), source, shape)
    except ValueError as error:
        raise ValueError(f"weight {name!r} ({source}): {error}") from None
    dense = torch.zeros(shape, dtype=values.dtype)
    _bytes(dense)[mask.reshape(shape)] = _bytes(values)
    return Weight(name, dense, source, shape, note="unpacked, no sparse format holds such a tensor")


def _bytes(t: Tensor) -> Tensor:
    """8-bit floats as bytes: few of torch's functions take them."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def _shape(t: Tensor) -> tuple[int, ...]:
    if t.dtype not in (torch.int64, torch.int32) or t.numel() not in (1, 2):
        raise ValueError(f"shape must be one or two integers, got {t.dtype} of shape {tuple(t.shape)}")
    shape = tuple(int(n) for n in t.reshape(-1))
    if any(n < 0 or n > 2**31 - 1 for n in shape):
        raise ValueError(f"shape must be from 0 to {2**31 - 1}, got {shape}")
    return shape


def _mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bool [N, K], checked: the right size, no bit beyond the last column."""
    n, k = (1, *shape)[-2:]
    width = (k + 7) // 8
    if bits.dtype != torch.uint8 or bits.numel() != n * width:
        raise ValueError(f"bitmask must be uint8 [{n}, {width}], got {bits.dtype} {tuple(bits.shape)}")
    bit = torch.arange(8, dtype=torch.uint8)
    whole = ((bits.reshape(n, width, 1) >> bit) & 1).bool().reshape(n, width * 8)
    beyond = whole[:, k:].any(1).nonzero()
    if len(beyond):
        raise ValueError(f"bitmask of row {int(beyond[0])} has a bit set beyond column {k - 1}")
    return whole[:, :k].contiguous()


def _check_row_offsets(offsets: Tensor, mask: Tensor) -> None:
    counts = mask.sum(1)
    expected = counts.cumsum(0) - counts
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.numel() != len(expected):
        raise ValueError(f"row_offsets must be {len(expected)} integers, got {offsets.dtype} {tuple(offsets.shape)}")
    wrong = (offsets.reshape(-1) != expected).nonzero()
    if len(wrong):
        row = int(wrong[0])
        found = int(offsets.reshape(-1)[row])
        raise ValueError(f"row_offsets of row {row} is {found}, but the bitmask says {int(expected[row])}")


def _packed(values: Tensor, mask: Tensor, shape: tuple[int, ...], scale: Tensor | None) -> Sp24 | Bitmap | None:
    if len(shape) != 2:
        return None
    n, k = shape
    quantised = values.dtype == torch.int8 and scale is not None and scale.numel() in (1, n)
    if values.dtype not in FLOATS and not quantised:
        return None
    if k % 4 == 0:
        groups = mask.reshape(n, k // 4, 4)
        if bool((groups.sum(-1) == 2).all()):
            return _sp24(values, groups, (n, k), scale if quantised else None)
    if quantised:
        return None
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    return Bitmap(values=values, bits=_bits(mask), offsets=offsets, shape=(n, k))


def _sp24(values: Tensor, groups: Tensor, shape: tuple[int, int], scale: Tensor | None) -> Sp24:
    """Exactly two are kept in every group: their positions are the nibbles, stored zeros included."""
    n, k = shape
    first = groups.to(torch.uint8).argmax(-1)
    second = 3 - groups.flip(-1).to(torch.uint8).argmax(-1)
    nibbles = (first | second << 2).to(torch.uint8)
    values = values.reshape(n, k // 2)
    if k % 8:  # sp24 is padded to whole bytes
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=0xE)
        values = torch.nn.functional.pad(values, (0, 2))
    metadata = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if scale is not None:
        scale = scale.reshape(-1).to(torch.float32).expand(n).contiguous()
    return Sp24(values=values.contiguous(), metadata=metadata.contiguous(), shape=shape, scale=scale)


def _bits(mask: Tensor) -> Tensor:
    """bool [N, K] as bytes [N, ceil(K / 8)], little order."""
    bytes_ = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def why_not_encode(weight: Weight, format: str) -> str | None:
    """Why a weight cannot be written as "sparse-24-bitmask" or "sparse-bitmask", or None where it can."""
    if not isinstance(weight.tensor, SparseTensor):
        return "it is dense"
    packed = weight.tensor.packed
    if len(weight.shape) != 2 or weight.tensor.transposed:
        return "compressed-tensors stores matrices along K only"
    if not weight.name.endswith("weight"):
        return "compressed-tensors stores tensors named 'weight' only"
    if format == BITMASK:
        return None if packed.scale is None else f"{BITMASK} stores no quantised weights"
    if not isinstance(packed, Sp24):
        return f"{SP24} stores 2:4 weights only, this one is {packed.format}"
    if weight.shape[1] % 4:
        return f"{SP24} stores whole groups of four only, K is {weight.shape[1]}"
    return None


def encode(weight: Weight, format: str) -> dict[str, Tensor]:
    """The tensors of a sparse matrix by key, in the later spelling (no "weight" in them)."""
    reason = why_not_encode(weight, format)
    if reason is not None:
        raise ValueError(f"weight {weight.name!r} cannot be written as {format}: {reason}")
    assert isinstance(weight.tensor, SparseTensor)
    packed = weight.tensor.packed
    n, k = packed.shape
    if isinstance(packed, Sp24) and format == SP24:
        kept = torch.zeros(n, 2 * packed.values.shape[1], dtype=torch.bool).scatter_(1, packed.columns(), True)
        parts = {
            "compressed": packed.values.detach()[:, : k // 2].contiguous(),
            "bitmask": _bits(kept[:, :k]),
            "shape": torch.tensor([[n], [k]]),
        }
        if packed.scale is not None:
            parts["weight_scale"] = packed.scale[:, None].contiguous()
    else:
        dense = packed.unpack().detach()
        mask = dense != 0
        counts = mask.sum(1)
        parts = {
            "compressed": dense[mask],
            "bitmask": _bits(mask),
            "shape": torch.tensor([n, k]),
            "row_offsets": counts.cumsum(0) - counts,
        }
    prefix = weight.name[: -len("weight")]
    return {prefix + field: t for field, t in parts.items()}


def config(format: str, density: float, ignore: list[str]) -> dict[str, Any]:
    """The "quantization_config" that a config.json needs beside such a file; `ignore` lists dense modules."""
    return {
        "version": "0.9.4",
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {
            "format": format,
            "global_sparsity": round(1 - density, 6),
            "sparsity_structure": "2:4" if format == SP24 else "unstructured",
            "targets": ["Linear"],
            "ignore": ignore,
            "registry_requires_subclass": False,
        },
    }
