"""Which tensors of a checkpoint make up which weight: every way in which pruned weights are known to be kept.

| source | tensors |
|---|---|
| sparsekern | its own header (see `native`) |
| compressed-tensors | P.compressed, P.bitmask, P.shape (, P.row_offsets) |
| torch.nn.utils.prune | X_orig, X_mask |
| torch.ao.pruning, and sparsekern's own masks | P.parametrizations.X.original, P.parametrizations.X.0.mask |
| apex ASP | X, P.__X_mma_mask; X is zeroed already |
| ModelOpt | X, P._X_mask |
| state_dict of sparsekern modules without a header | P.values and the index tensors of a format |
| everything else | the tensor itself, with zeros where it was pruned |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import FORMATS
from ..tensor import SparseTensor
from . import compressed_tensors, native
from .weight import Weight

_PARAMETRIZED = re.compile(r"^((?:.*\.)?)parametrizations\.([^.]+)\.original$")


@dataclass(frozen=True)
class Found:
    """One weight of a file: what it is called, who wrote it, and its tensors: role -> key."""

    name: str
    source: str
    parts: dict[str, str]
    record: native.Record | None = None
    drop: tuple[str, ...] = field(default=())  # keys that only said how the weight was pruned


def find(keys: Iterable[str], records: dict[str, native.Record]) -> list[Found]:
    """Every weight and every other tensor of a file, in the file's order; no key is used twice.

    Raises ValueError where a record's tensor is missing.
    """
    order = {key: at for at, key in enumerate(keys)}
    free = set(order)
    found: list[tuple[int, Found]] = []

    def take(name: str, source: str, parts: dict[str, str], **more: object) -> None:
        drop: tuple[str, ...] = more.get("drop", ())  # type: ignore[assignment]
        used = {*parts.values(), *drop}
        if used <= free:
            free.difference_update(used)
            found.append((min(order[key] for key in used), Found(name, source, parts, **more)))  # type: ignore[arg-type]

    for name, record in records.items():
        parts = {role: record.prefix + role for role in record.fields}
        absent = [key for key in parts.values() if key not in free]
        if absent:
            raise ValueError(f"weight {name!r}: tensor {absent[0]!r} is missing or belongs to another weight")
        if record.dtype == "int8" and f"{record.prefix}scale" in free:
            parts["scale"] = f"{record.prefix}scale"
        if len(record.shape) > 2 and record.prefix + native.ORDER_FLAG in free:
            parts[native.ORDER_FLAG] = record.prefix + native.ORDER_FLAG
        take(name, f"sparsekern {record.format}", parts, record=record)
    for key in order:
        if key not in free:
            continue
        prefix, _, last = key.rpartition(".")
        base = f"{prefix}." if prefix else ""
        if last == "bitmask" and f"{base}compressed" in free and f"{base}shape" in free:
            _take_bitmask(base, free, take)
        elif last == "weight_packed" and f"{base}scale_packed" in free and f"{base}meta" in free:
            parts = {"packed": key, "scale": f"{base}scale_packed", "meta": f"{base}meta"}
            take(f"{base}weight", "compressed-tensors marlin-24", parts)
        elif last.endswith("_orig") and f"{key[:-5]}_mask" in free:
            take(key[:-5], "torch.nn.utils.prune", {"dense": key, "mask": f"{key[:-5]}_mask"})
        elif (match := _PARAMETRIZED.match(key)) and f"{key[: -len('original')]}0.mask" in free:
            parts = {"dense": key, "mask": f"{key[: -len('original')]}0.mask"}
            take(match[1] + match[2], "torch.ao.pruning", parts)
        elif f"{base}__{last}_mma_mask" in free:
            drop = (f"{base}__{last}_mma_pruned_p",) if f"{base}__{last}_mma_pruned_p" in free else ()
            take(key, "apex ASP", {"dense": key, "mask": f"{base}__{last}_mma_mask"}, drop=drop)
        elif f"{base}_{last}_mask" in free:
            take(key, "ModelOpt", {"dense": key, "mask": f"{base}_{last}_mask"})
        elif last == "values":
            _take_state(base, free, take)
    found.extend((order[key], Found(key, "dense", {"dense": key})) for key in free)
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def _take_bitmask(base: str, free: set[str], take: Callable[..., None]) -> None:
    parts = {role: base + role for role in ("compressed", "bitmask", "shape")}
    if f"{base}row_offsets" in free:
        parts["row_offsets"] = f"{base}row_offsets"
    name = f"{base}weight"
    if base == "weight." or base.endswith(".weight."):  # the older spelling
        name = base[:-1]
    if f"{name}_scale" in free and f"{name}_zero_point" not in free:
        parts["scale"] = f"{name}_scale"
    take(name, "compressed-tensors", parts)


def _take_state(base: str, free: set[str], take: Callable[..., None]) -> None:
    for format in FORMATS.values():
        roles = ("values", *format.layout.index_fields)
        if all(base + role in free for role in roles):
            parts = {role: base + role for role in roles}
            if f"{base}scale" in free:
                parts["scale"] = f"{base}scale"
            # csr and bsr have the same index tensors; the number of dimensions tells them apart on reading.
            take(f"{base}weight", "sparsekern state_dict", parts)
            return


def read(found: Found, get: Callable[[str], Tensor]) -> list[Weight]:
    """Reads one weight, and beside it what turned out not to be part of it (a scale that no format takes).

    Raises ValueError that names the weight where its tensors do not fit together.
    """
    if found.source == "compressed-tensors marlin-24":
        return [Weight(found.name, None, found.source, problem="a GPU's register order; it never had a reader")]
    if found.source == "sparsekern state_dict":
        return [_read_state(found, get)]
    parts = {role: get(key) for role, key in found.parts.items()}
    if found.record is not None:
        return [native.decode(found.name, found.record, parts)]
    if found.source == "compressed-tensors":
        return _read_bitmask(found, parts)
    dense = parts["dense"]
    if isinstance(dense, SparseTensor):
        order = "n" if dense.transposed else "k"
        return [Weight(found.name, dense.check(), f"SparseTensor {dense.format}", tuple(dense.shape), order)]
    if "mask" not in parts:
        return [Weight(found.name, dense, found.source, tuple(dense.shape), _own_order(dense))]
    return [_masked(found, dense, parts["mask"])]


def _own_order(dense: Tensor) -> str:
    return "crs" if dense.dim() > 2 else "k"


def _read_bitmask(found: Found, parts: dict[str, Tensor]) -> list[Weight]:
    weight = compressed_tensors.decode(found.name, parts)
    if "scale" in parts and not (isinstance(weight.tensor, SparseTensor) and weight.tensor.packed.scale is not None):
        key = found.parts["scale"]
        return [weight, Weight(key, parts["scale"], "dense", tuple(parts["scale"].shape))]
    return [weight]


def _masked(found: Found, dense: Tensor, mask: Tensor) -> Weight:
    if mask.shape != dense.shape:
        raise ValueError(
            f"weight {found.name!r} ({found.source}): the mask has shape {tuple(mask.shape)}, "
            f"the weight {tuple(dense.shape)}"
        )
    keep = mask != 0
    pruned = torch.where(keep, dense, torch.zeros((), dtype=dense.dtype))
    return Weight(
        found.name,
        pruned,
        found.source,
        tuple(dense.shape),
        _own_order(dense),
        note="mask applied and dropped",
    )


def _read_state(found: Found, get: Callable[[str], Tensor]) -> Weight:
    """A state_dict of SparseLinear: only the number of columns must be inferred, where the parts allow it."""
    parts = {role: get(key) for role, key in found.parts.items()}
    values = parts["values"]
    problem = "a state_dict does not say how wide this weight is; save with sparsekern.checkpoint.save"
    format = "sp24" if "metadata" in parts else "bitmap" if "bits" in parts else "bsr" if values.dim() == 3 else "csr"
    source = f"{found.source} ({format})"
    if format == "sp24" and parts["metadata"].dim() == 2:
        dims: tuple[int, ...] = (values.shape[0], 8 * parts["metadata"].shape[1])
    elif format == "bitmap" and parts["bits"].dim() == 2:
        dims = (parts["bits"].shape[0], 8 * parts["bits"].shape[1])
    else:
        return Weight(found.name, None, source, problem=problem)
    record = native.Record(format, dims, dims, "k", native.dtype_name(values.dtype), "")
    weight = native.decode(found.name, record, parts)
    note = f"columns counted up to a multiple of 8: {dims[1]}"
    return Weight(found.name, weight.tensor, source, dims, note=note)
