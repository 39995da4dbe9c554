"""Files of tensors, read one tensor at a time: .safetensors, .pt/.pth/.bin, and directories of shards.

No file can run code: safetensors hold none, and torch files are read with weights_only=True. Whatever is
wrong with a file is a ValueError that names it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Where training scripts keep the state_dict inside a larger dictionary.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params")


class TensorFile:
    """Named tensors of one checkpoint. `metadata` is the text that came with them."""

    path: Path
    metadata: dict[str, str]

    def keys(self) -> list[str]:
        raise NotImplementedError(f"{type(self).__name__} has no keys")

    def get(self, key: str) -> Tensor:
        """The tensor of this name, on the CPU, in memory of its own."""
        raise NotImplementedError(f"{type(self).__name__} has no get")

    def headers(self) -> list[str]:
        """sparsekern's own header, of every file that has one."""
        return [self.metadata["sparsekern"]] if "sparsekern" in self.metadata else []

    def ties(self) -> dict[str, str]:
        """Names of the same memory: each later one with the first. Only torch files know such."""
        return {}

    def __contains__(self, key: str) -> bool:
        return key in self._names

    @property
    def _names(self) -> frozenset[str]:
        if not hasattr(self, "_known"):
            self._known = frozenset(self.keys())
        return self._known


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a checkpoint: a .safetensors or torch file, or a directory of such shards (with an index, or
    alone).

    Raises FileNotFoundError where there is nothing, ValueError where it is not such a file.
    """
    path = Path(path)
    if path.is_dir():
        return ShardedFile(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or _looks_like_safetensors(start, path.stat().st_size):
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES or start[:2] == b"PK" or start[:1] == b"\x80":
        return TorchFile(path)
    known = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise ValueError(f"{path}: not a checkpoint that can be read ({known}, or a directory of .safetensors)")


def _looks_like_safetensors(start: bytes, size: int) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def safetensors_module() -> Any:
    """The safetensors package, an optional extra."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'sparsekern[checkpoint]'"
        ) from None
    return safetensors


class SafetensorsFile(TensorFile):
    """One .safetensors file, mapped; a tensor is copied out when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        safetensors = safetensors_module()
        self._error = safetensors.SafetensorError
        try:
            self._file = safetensors.safe_open(str(path), framework="pt", device="cpu")
            self.metadata = dict(self._file.metadata() or {})
            self._keys = list(self._file.keys())
        except (self._error, UnicodeError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from None

    def keys(self) -> list[str]:
        return self._keys

    def get(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key).clone()
        except (self._error, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path}: tensor {key!r} cannot be read: {error}") from None


class TorchFile(TensorFile):
    """One file written by torch.save: a state_dict, or a dictionary that holds one."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        try:
            mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # the unpickler raises whatever a broken file makes it raise
            raise ValueError(f"{path}: {_why_not_loaded(error)}") from None
        self._tensors = _state_dict(loaded, path)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def ties(self) -> dict[str, str]:
        first: dict[object, str] = {}
        tied = {}
        for key, t in self._tensors.items():
            if type(t) is Tensor and not _sparse(t) and t.numel():
                place = (t.data_ptr(), t.dtype, t.shape, t.stride())
                if first.setdefault(place, key) != key:
                    tied[key] = first[place]
        return tied

    def get(self, key: str) -> Tensor:
        value = self._tensors[key].detach()
        return value if type(value) is not Tensor else value.to_dense().clone() if _sparse(value) else value.clone()


def _sparse(value: Tensor) -> bool:
    return value.layout != torch.strided


def _why_not_loaded(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    if "weights_only" in str(error) or "Unsupported" in str(error) or "Unsupported global" in str(error):
        return (
            "it holds pickled Python objects, which can run code, and is not read; "
            f"save model.state_dict() instead (torch says: {first[:200]})"
        )
    return f"not a readable torch file: {type(error).__name__}: {first[:300]}"


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a loaded file: the dictionary itself, or the one that a known key wraps."""
    if isinstance(loaded, Tensor):
        return {"weight": loaded}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, expected a state_dict")
    tensors = _tensors_of(loaded)
    for wrapper in WRAPPERS:
        inner = loaded.get(wrapper)
        if isinstance(inner, Mapping) and len(_tensors_of(inner)) > len(tensors):
            tensors = _tensors_of(inner)
    if not tensors:
        shown = ", ".join(repr(key) for key in list(loaded)[:8])
        raise ValueError(f"{path}: no tensors found; its keys are {shown or 'none'}")
    return tensors


def _tensors_of(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: t for key, t in mapping.items() if isinstance(key, str) and isinstance(t, Tensor)}


class ShardedFile(TensorFile):
    """A directory: the shards that its index names, or every .safetensors file in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        self._place = dict(_shards(path))
        self._open: dict[str, TensorFile] = {}
        self.parts = [self._shard(name) for name in sorted(set(self._place.values()))]
        for key, shard in self._place.items():
            if key not in self._shard(shard):
                raise ValueError(f"{path}: the index says that {key!r} is in {shard}, but it is not")

    def keys(self) -> list[str]:
        return list(self._place)

    def get(self, key: str) -> Tensor:
        return self._shard(self._place[key]).get(key)

    def headers(self) -> list[str]:
        return [text for part in self.parts for text in part.headers()]

    def _shard(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = open_tensors(self.path / name)
        return self._open[name]


def _shards(path: Path) -> Iterator[tuple[str, str]]:
    """(tensor, file name) for every tensor of a directory."""
    for index in INDEXES:
        if (path / index).exists():
            yield from _indexed(path / index)
            return
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{path}: a directory with neither {' nor '.join(INDEXES)} nor .safetensors files")
    seen: dict[str, str] = {}
    for file in files:
        keys = open_tensors(file).keys()
        for key in keys:
            if key in seen:
                raise ValueError(f"{path}: {key!r} is both in {seen[key]} and in {file.name}")
            seen[key] = file.name
            yield key, file.name


def _indexed(index: Path) -> Iterator[tuple[str, str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not a readable index of shards: {type(error).__name__}: {error}") from None
    for key, name in items:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{index}: {key!r} is said to be in {name!r}, which is no plain file name")
        yield key, name
