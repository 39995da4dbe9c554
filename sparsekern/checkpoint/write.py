"""Writing checkpoints: a file, or a directory of shards with an index. A file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import compressed_tensors, native
from .files import INDEXES, TORCH_SUFFIXES, safetensors_module
from .weight import Weight

FORMS = ("sparsekern", "compressed-tensors", "dense")
SHARD_BYTES = 5 << 30


class Writer:
    """Collects weights and writes them: `add` each, then `close`.

    path: a .safetensors file; a torch file (.pt, .pth, .bin) for form "dense"; or a directory, which gets
    shards of at most `shard_bytes` and an index. form: "sparsekern" (see `native`), "compressed-tensors"
    (layout `compressed_format`; what it cannot hold is written dense and listed in `ignored`), or "dense".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        form: str = "sparsekern",
        *,
        metadata: dict[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        compressed_format: str = compressed_tensors.SP24,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.path, self.form, self.shard_bytes = Path(path), form, shard_bytes
        self.torch_file = self.path.suffix in TORCH_SUFFIXES
        if self.torch_file and form != "dense":
            raise ValueError(f"{path}: form {form!r} is written to .safetensors files and directories only")
        if not self.torch_file:
            safetensors_module()
        self.sharded = not self.torch_file and self.path.suffix != ".safetensors"
        self.metadata, self.compressed_format = {"format": "pt", **(metadata or {})}, compressed_format
        self.metadata.pop(native.HEADER, None)
        self.ignored: dict[str, str] = {}  # name -> why it is dense
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, native.Record] = {}
        self._aliases: dict[str, str] = {}
        self._seen: set[str] = set()
        self._memory: set[int] = set()
        self._bytes, self._made_directory = 0, False
        self._written: list[tuple[Path, list[str], int]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """After an error nothing is left of what was written; otherwise `close` is still to be called."""
        if kind is not None:
            for part, *_rest in self._written:
                part.unlink(missing_ok=True)
            if self._made_directory:
                self.path.rmdir()

    def add(self, weight: Weight) -> int:
        """Takes one weight; returns the bytes that its tensors take in the file."""
        tensors = self._encode(weight)
        twice = self._seen.intersection(tensors)
        if twice:
            raise ValueError(f"{self.path}: two tensors would be called {min(twice)!r}")
        size = sum(t.nbytes for t in tensors.values())
        if self.sharded and self._bytes and self._bytes + size > self.shard_bytes:
            self._flush()
        self._seen.update(tensors)
        for key, t in tensors.items():
            self._tensors[key] = self._own(_plain(t))
        self._bytes += size
        return size

    def _own(self, t: Tensor) -> Tensor:
        """`t`, or a copy where its memory is in the file already: safetensors refuses shared memory."""
        pointer = t.untyped_storage().data_ptr()
        if pointer in self._memory and t.numel():
            t = t.clone()
            pointer = t.untyped_storage().data_ptr()
        self._memory.add(pointer)
        return t

    def alias(self, weight: Weight, target: str) -> int:
        """Takes a weight tied to `target`, which was added: by name where the form has names, else copied."""
        if self.form != "sparsekern":
            return self.add(weight)
        self._aliases[weight.name] = target
        return 0

    def _encode(self, weight: Weight) -> dict[str, Tensor]:
        if not weight.is_sparse or self.form == "dense":
            return {weight.name: weight.dense()}
        if self.form == "compressed-tensors":
            reason = compressed_tensors.why_not_encode(weight, self.compressed_format)
            if reason is None:
                return compressed_tensors.encode(weight, self.compressed_format)
            self.ignored[weight.name] = reason
            return {weight.name: weight.dense()}
        tensors, record = native.encode(weight, self._seen)
        self._records[weight.name] = record
        return tensors

    def _flush(self) -> None:
        metadata = dict(self.metadata)
        if self.form == "sparsekern" and (self._records or self._aliases or not self._written):
            metadata[native.HEADER] = native.header(self._records, self._aliases)
        if self.torch_file:
            write_whole(self.path, lambda file: torch.save(self._tensors, file))
        elif not self.sharded:
            _save_safetensors(self._tensors, self.path, metadata)
        else:
            if not self.path.exists():
                self.path.mkdir(parents=True)
                self._made_directory = True
            part = self.path / f".part-{len(self._written) + 1:05}.safetensors"
            _save_safetensors(self._tensors, part, metadata)
            self._written.append((part, list(self._tensors), self._bytes))
        self._tensors, self._records, self._aliases, self._bytes = {}, {}, {}, 0
        self._memory.clear()

    def close(self) -> list[Path]:
        """Writes what is left; returns the files."""
        self._flush()
        if not self.sharded:
            return [self.path]
        count, weight_map, files = len(self._written), {}, []
        for old in (*self.path.glob("model*.safetensors"), *(self.path / index for index in INDEXES)):
            old.unlink(missing_ok=True)
        for at, (part, keys, _) in enumerate(self._written, 1):
            name = "model.safetensors" if count == 1 else f"model-{at:05}-of-{count:05}.safetensors"
            files.append(part.rename(self.path / name))
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(size for *_, size in self._written)},
                "weight_map": weight_map,
            }
            files.append(self.path / INDEXES[0])
            files[-1].write_text(json.dumps(index, indent=2), encoding="utf-8")
        return files


def _plain(t: Tensor) -> Tensor:
    """Contiguous, on the CPU, a view of nothing: what safetensors stores."""
    t = t.detach().cpu()
    if t.layout != torch.strided:
        t = t.to_dense()
    return (
        t
        if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
        else t.clone(memory_format=torch.contiguous_format)
    )


def _save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file = safetensors_module().torch.save_file
    write_whole(path, lambda file: save_file(tensors, file, metadata))


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Calls write(temporary file beside `path`), then puts it in place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
