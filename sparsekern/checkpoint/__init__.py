"""Sparse checkpoints: save and load them, and read the pruned checkpoints of others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from . import native, recognise
from .files import TensorFile, open_tensors
from .modules import fill, weights_of
from .weight import Weight
from .write import Writer

__all__ = ["Checkpoint", "Weight", "Writer", "load", "open_tensors", "read_weights", "save", "tied_names"]

M = TypeVar("M", bound=nn.Module)


class Checkpoint(dict[str, Tensor]):
    """{name: SparseTensor or dense Tensor}, names as the dense model has them.

    `weights[name]` is the Weight behind a tensor: the shape that the model gives it, its K order, where it
    came from.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        super().__init__({name: weight.tensor for name, weight in weights.items() if weight.tensor is not None})
        self.weights = dict(weights)

    def dense_state_dict(self) -> dict[str, Tensor]:
        """Every tensor dense and in the model's shape: what the dense model's load_state_dict takes."""
        return {name: weight.dense() for name, weight in self.weights.items()}


def save(
    source: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a model, or a state_dict whose values may be SparseTensors, as safetensors.

    path: a .safetensors file, or a directory (sharded). Sparse weights are kept in canonical, row-independent
    form with a header that describes them, so `load(path)` needs no model; a converted model's
    load_state_dict takes the file's tensors as they are. Tied weights are stored once. metadata: more text
    for the file. Raises TypeError for entries that are no tensors.
    """
    writer = Writer(path, metadata=metadata)
    for weight, tied in weights_of(source):
        if tied is None:
            writer.add(weight)
        else:
            writer.alias(weight, tied)
    writer.close()


@overload
def load(path: str | os.PathLike[str]) -> Checkpoint: ...
@overload
def load(path: str | os.PathLike[str], model: M, *, strict: bool = True) -> M: ...


def load(path: Any, model: Any = None, *, strict: bool = True) -> Any:
    """Reads a checkpoint of any kind that `read_weights` knows.

    Without a model: {name: SparseTensor or Tensor}. With one: fills it and returns it; a weight that is
    sparse in the file makes its nn.Linear or nn.Conv2d a SparseLinear or SparseConv2d, fills a sparse module
    of any format, and is unpacked for every other module. Raises ValueError that names the file, the weight
    and the bad place (the model is then unchanged); RuntimeError, as load_state_dict does, for missing and
    unexpected names if `strict`.
    """
    file = open_tensors(path)
    everything, aliases = _find(file)
    stored = {found.name for found in everything if found.source != "sparsekern state_dict"}
    for name, target in aliases.items():
        if target not in stored or name in stored:
            raise ValueError(f"{path}: the header ties {name!r} to {target!r}, which is not stored")
    weights: dict[str, Weight] = {}
    raw: dict[str, Tensor] = {}
    for found in everything:
        if found.source == "sparsekern state_dict" and model is not None:
            raw.update({key: file.get(key) for key in found.parts.values()})
            continue
        for weight in _read(file, found):
            if weight.problem is not None:
                raise ValueError(f"{path}: weight {weight.name!r} ({weight.source}): {weight.problem}")
            weights[weight.name] = weight
    weights.update({name: weights[target] for name, target in aliases.items()})
    if model is None:
        return Checkpoint(weights)
    try:
        fill(model, weights, raw, strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model


def read_weights(path: str | os.PathLike[str] | TensorFile) -> Iterator[Weight]:
    """Every weight and other tensor of a checkpoint, one at a time: dense, or sparse and checked.

    Reads .safetensors, torch files (weights_only) and directories of shards, and in them: dense weights with
    zeros, sparsekern's own, compressed-tensors' sparse-24-bitmask and sparse-bitmask, masks of
    torch.nn.utils.prune, torch.ao.pruning, apex ASP and ModelOpt. What cannot be read has a `problem`; what
    is broken raises ValueError.
    """
    file = path if isinstance(path, TensorFile) else open_tensors(path)
    for found in _find(file)[0]:
        yield from _read(file, found)


def _find(file: TensorFile) -> tuple[list[recognise.Found], dict[str, str]]:
    """What a checkpoint holds, tied weights once, and which names are tied to which."""
    records, aliases = _headers(file)
    try:
        found = recognise.find(file.keys(), records)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    whole = {entry.name for entry in found if entry.source == "dense"}
    tied = {name: target for name, target in file.ties().items() if name in whole and target in whole}
    return [entry for entry in found if entry.name not in tied], {**aliases, **tied}


def tied_names(file: TensorFile) -> dict[str, str]:
    """Names that stand for a weight under another name: {name: the name that `read_weights` gives}."""
    return _find(file)[1]


def _headers(file: TensorFile) -> tuple[dict[str, native.Record], dict[str, str]]:
    """sparsekern's records of sparse weights and of tied names, from all of a checkpoint's files."""
    records: dict[str, native.Record] = {}
    aliases: dict[str, str] = {}
    for text in file.headers():
        try:
            more, tied = native.parse_header(text)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
        records.update(more)
        aliases.update(tied)
    return records, aliases


def _read(file: TensorFile, found: recognise.Found) -> list[Weight]:
    try:
        return recognise.read(found, file.get)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(f"{file.path}") else f"{file.path}: {message}") from None
