"""sparsekern's own form in a safetensors file: the tensors of a model's state_dict, and a record of every
sparse weight, so that the file can be read with no model.

A sparse weight "fc.weight" is kept as SparseModule keeps it: "fc.values" and the index tensors of its format,
in canonical, row-independent, architecture-free order. The metadata entry "sparsekern" is the JSON text of
    {"version": 1, "weights": {"fc.weight": {format, shape, dims, order, dtype, prefix}}, "aliases": {}}
with the shape that the model gives the weight, the layout's dims (N, K, and the block for bsr), the K order
(see `sparsekern.patterns`) and the prefix of its tensors. A convolution also
has "order_rsc", as SparseConv2d does. `aliases` maps tied names to the one that is
stored.
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..formats import FORMATS
from ..patterns import order_names
from ..tensor import SparseTensor
from .weight import Weight

HEADER = "sparsekern"
VERSION = 1
ORDER_FLAG = "order_rsc"  # SparseConv2d's buffer
LARGEST = 2**31 - 1  # no format indexes further


@dataclass(frozen=True)
class Record:
    """The header's entry of one sparse weight."""

    format: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    order: str
    dtype: str
    prefix: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The tensors that must be there; a scale may be."""
        return ("values", *FORMATS[self.format].layout.index_fields)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "shape": list(self.shape),
            "dims": list(self.dims),
            "order": self.order,
            "dtype": self.dtype,
            "prefix": self.prefix,
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prefix_of(name: str) -> str:
    """Where the parts of a weight are kept: beside it ("fc." for "fc.weight"), or under its own name."""
    return name[: -len("weight")] if name == "weight" or name.endswith(".weight") else f"{name}."


def encode(weight: Weight, taken: Container[str] = ()) -> tuple[dict[str, Tensor], Record]:
    """The tensors of a sparse weight by key, and its record. Keys in `taken` are not used."""
    assert isinstance(weight.tensor, SparseTensor)
    packed = weight.tensor.packed
    parts = {field: t.detach() for field, t in packed.tensors().items()}
    prefix = prefix_of(weight.name)
    if any(prefix + field in taken for field in parts):
        prefix = f"{weight.name}."
    record = Record(packed.format, weight.shape, packed.dims, weight.order, dtype_name(packed.dtype), prefix)
    if len(weight.shape) > 2:
        parts[ORDER_FLAG] = torch.tensor(weight.order == "rsc")
    return {prefix + field: t for field, t in parts.items()}, record


def header(records: dict[str, Record], aliases: dict[str, str]) -> str:
    """The text of the metadata entry."""
    weights = {name: record.as_json() for name, record in records.items()}
    return json.dumps({"version": VERSION, "weights": weights, "aliases": aliases})


def parse_header(text: str) -> tuple[dict[str, Record], dict[str, str]]:
    """The records and the aliases of a file. Raises ValueError for anything that `header` does not write."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its sparsekern header is not JSON: {error}") from None
    if not isinstance(parsed, dict) or type(parsed.get("version")) is not int:
        raise ValueError("its sparsekern header has no version")
    if parsed["version"] != VERSION:
        raise ValueError(f"its sparsekern header has version {parsed['version']}; this release reads version {VERSION}")
    weights, aliases = parsed.get("weights"), parsed.get("aliases", {})
    if not isinstance(weights, dict) or not isinstance(aliases, dict):
        raise ValueError("its sparsekern header must hold the objects 'weights' and 'aliases'")
    for name, target in aliases.items():
        if not isinstance(target, str) or name == target:
            raise ValueError(f"its sparsekern header ties {name!r} to {target!r}, which is no other name")
    return {name: _record(name, entry) for name, entry in weights.items()}, aliases


def _record(name: str, entry: Any) -> Record:
    def fail(message: str) -> NoReturn:
        raise ValueError(f"weight {name!r}: in the sparsekern header, {message}")

    if not isinstance(entry, dict):
        fail(f"its entry is {entry!r}, expected an object")
    for field in ("format", "order", "dtype", "prefix"):
        if not isinstance(entry.get(field), str):
            fail(f"{field} must be text, got {entry.get(field)!r}")
    for field in ("shape", "dims"):
        value = entry.get(field)
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= LARGEST for n in value):
            fail(f"{field} must be a list of integers from 0 to {LARGEST}, got {value!r}")
    if entry["format"] not in FORMATS:
        fail(f"format must be one of {', '.join(FORMATS)}, got {entry['format']!r}")
    shape, dims, order = tuple(entry["shape"]), tuple(entry["dims"]), entry["order"]
    if not 2 <= len(shape) <= 5 or order not in order_names(len(shape)):
        fail(f"shape {shape} and order {order!r} do not go together")
    matrix = (shape[0], torch.Size(shape[1:]).numel())
    if dims[:2] != (matrix[::-1] if order == "n" else matrix):
        fail(f"dims {dims} do not fit shape {shape} in order {order!r}")
    return Record(entry["format"], shape, dims, order, entry["dtype"], entry["prefix"])


def decode(name: str, record: Record, parts: dict[str, Tensor]) -> Weight:
    """The checked sparse weight. Raises ValueError that names the weight and the first bad place."""
    layout = FORMATS[record.format].layout
    try:
        index = tuple(parts[field] for field in layout.index_fields)
        if len(record.dims) != layout.dims_count():
            few = "few" if len(record.dims) < layout.dims_count() else "many"
            raise ValueError(f"dims {record.dims} are too {few} for format {record.format}")
        packed = layout.from_parts(parts["values"], index, parts.get("scale"), record.dims)
        flag = parts.get(ORDER_FLAG)
        if flag is not None and (flag.numel() != 1 or bool(flag) != (record.order == "rsc")):
            raise ValueError(f"{ORDER_FLAG} contradicts the header's order {record.order!r}")
        if dtype_name(packed.dtype) != record.dtype:
            raise ValueError(f"values are {dtype_name(packed.dtype)}, but the header says {record.dtype}")
        tensor = SparseTensor(packed, transposed=record.order == "n")
    except ValueError as error:
        raise ValueError(f"weight {name!r}: {error}") from None
    return Weight(name, tensor, f"sparsekern {record.format}", record.shape, record.order)
