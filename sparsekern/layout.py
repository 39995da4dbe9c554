"""What every format's layout shares: a frozen record of plain tensors that knows its shape and proves itself."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ._ext import DTYPES, FP8, host_packs

L = TypeVar("L", bound="Layout")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTISED = (torch.int8, FP8)  # with a scale per row


def is_size(n: Any) -> bool:
    """True for a non-negative int."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def padded(matrix: Tensor, n: int, k: int) -> Tensor:
    """[n, k] with the matrix in its upper left corner and zeros elsewhere; the matrix itself where it fits."""
    if matrix.shape == (n, k):
        return matrix
    whole = matrix.new_zeros(n, k)  # functional.pad of torch 2.9 refuses some matrices without rows
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """The stored form of one weight W[N, K].

    `values` holds the kept weights, the tensors named in `index_fields` say where they belong, `scale` [N] float32
    belongs to int8 and float8_e4m3fn values (weight = value * scale). `shape` is (N, K).
    """

    values: Tensor
    shape: tuple[int, int]
    scale: Tensor | None = None

    format: ClassVar[str]
    index_fields: ClassVar[tuple[str, ...]]  # one or two
    dims_field: ClassVar[str | None] = None  # the field, a pair, that belongs to `dims` beside (N, K)

    @property
    def index(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.index_fields)

    @property
    def dims(self) -> tuple[int, ...]:
        """The static integers of the layout: (N, K), and what else a format needs."""
        return self.shape if self.dims_field is None else (*self.shape, *getattr(self, self.dims_field))

    @classmethod
    def dims_count(cls) -> int:
        """How many integers `dims` has."""
        return 2 if cls.dims_field is None else 4

    @classmethod
    def from_parts(
        cls: type[L], values: Tensor, index: tuple[Tensor, ...], scale: Tensor | None, dims: tuple[int, ...]
    ) -> L:
        """The inverse of `parts`. It runs on every call, so it fills the record without the frozen setters."""
        names = cls.index_fields
        record: dict[str, Any] = {
            "values": values, names[0]: index[0], names[-1]: index[-1], "scale": scale, "shape": dims[:2],
        }  # fmt: skip
        if cls.dims_field is not None:
            record[cls.dims_field] = dims[2:]
        if torch.compiler.is_compiling():  # a trace follows the constructor only
            return cls(**record)
        made = object.__new__(cls)
        object.__setattr__(made, "__dict__", record)
        return made

    @property
    def parts(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None, tuple[int, ...]]:
        """The layout taken apart into what a torch op can carry, the same for every format."""
        return self.values, self.index, self.scale, self.dims

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Share of the weights that is stored, padding at ragged edges included."""
        total = self.shape[0] * self.shape[1]
        return self.values.numel() / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, indices included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: t for name, t in named if isinstance(t, Tensor)}

    def map(self: L, function: Any) -> L:
        """The same layout with every tensor replaced by function(tensor)."""
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})

    def with_values(self: L, values: Tensor) -> L:
        return self.from_parts(values, self.index, self.scale, self.dims)

    def to(self: L, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> L:
        moved = self.map(lambda t: t.to(device)) if device is not None else self
        if dtype is None or dtype == self.dtype:
            return moved
        if dtype in QUANTISED or self.dtype in QUANTISED:
            raise ValueError(f"{self.format}: values cannot be cast from {self.dtype} to {dtype}; quantise instead")
        return moved.with_values(moved.values.to(dtype))

    def check(self: L) -> L:
        """Proves every invariant; returns self. Raises ValueError that names the first bad place."""
        raise NotImplementedError(f"{type(self).__name__} has no check")

    def unpack(self) -> Tensor:
        """The dense W[N, K] in the values' type (scales not applied). Plain torch: the oracle of this format."""
        raise NotImplementedError(f"{type(self).__name__} has no unpack")

    def sample(self, dense: Tensor) -> Tensor:
        """The entries of a dense [N, K] at the stored positions, shaped like `values` (zero where padded)."""
        raise NotImplementedError(f"{type(self).__name__} has no sample")

    def to_dense(self) -> Tensor:
        """The dense W[N, K], scales applied (then float32)."""
        if host_packs(self.values):
            dense = self.values.new_empty(self.shape)
            self._unpack_host(dense, DTYPES[self.dtype], torch.get_num_threads())
        else:
            dense = self.unpack()
        return dense if self.scale is None else dense.to(torch.float32) * self.scale[:, None]

    def _unpack_host(self, dense: Tensor, dtype: int, threads: int) -> None:
        """`unpack` into `dense` [N, K] by the compiled module."""
        raise NotImplementedError(f"{type(self).__name__} has no compiled unpack")

    # What every check() begins with.

    def _fail(self, message: str) -> None:
        raise ValueError(f"{self.format} layout of shape {self.shape}: {message}")

    def _check_shape(self) -> tuple[int, int]:
        if not isinstance(self.shape, tuple) or len(self.shape) != 2 or not all(map(is_size, self.shape)):
            self._fail("shape must be two non-negative integers")
        for name in ("values", *self.index_fields):
            if not isinstance(getattr(self, name), Tensor):
                self._fail(f"{name} must be a tensor, got {type(getattr(self, name)).__name__}")
        if self.scale is not None and not isinstance(self.scale, Tensor):
            self._fail(f"scale must be a tensor or None, got {type(self.scale).__name__}")
        for name, t in self.tensors().items():
            if t.device != self.device:
                self._fail(f"{name} is on {t.device}, values on {self.device}")
            if t.layout != torch.strided:
                self._fail(f"{name} must be a plain (strided) tensor, got {t.layout}")
            if not t.is_contiguous():
                self._fail(f"{name} must be contiguous, got strides {tuple(t.stride())} for {tuple(t.shape)}")
        if self.device.type == "meta":
            self._fail("its tensors are on the meta device: there is nothing to check")
        return self.shape

    def _check_tensor(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        t = getattr(self, name)
        if not isinstance(t, Tensor):
            self._fail(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self._fail(f"{name} must be {expected}, got {str(t.dtype).removeprefix('torch.')}")
        if tuple(t.shape) != shape:
            self._fail(f"{name} must have shape {shape}, got {tuple(t.shape)}")

    def _check_scale(self, *, quantised: bool) -> None:
        if self.dtype in QUANTISED:
            kind = str(self.dtype).removeprefix("torch.")
            if not quantised:
                self._fail(f"{kind} values are not supported by this format")
            if self.scale is None:
                self._fail(f"{kind} values need a scale of shape [N]")
            self._check_tensor("scale", (self.shape[0],), torch.float32)
            assert self.scale is not None
            bad = (~torch.isfinite(self.scale)).nonzero()
            if len(bad):
                row = int(bad[0])
                self._fail(f"scale of row {row} is {self.scale[row].item()}, must be finite")
        elif self.scale is not None:
            self._fail(f"scale belongs to int8 values, but values are {self.dtype}")

    def _check_offsets(self, name: str, last: int) -> None:
        """Row starts: 0 first, `last` last, never decreasing."""
        offsets = getattr(self, name)
        if int(offsets[0]) != 0:
            self._fail(f"{name}[0] is {int(offsets[0])}, must be 0")
        falls = (offsets[1:] < offsets[:-1]).nonzero()
        if len(falls):
            i = int(falls[0])
            self._fail(f"{name} decreases at row {i}: {int(offsets[i])} then {int(offsets[i + 1])}")
        if int(offsets[-1]) != last:
            self._fail(f"{name}[-1] is {int(offsets[-1])}, but {last} entries are stored")

    def _check_columns(self, offsets_name: str, columns: int, unit: str) -> None:
        """`col` in range and strictly ascending inside every row."""
        offsets, col = getattr(self, offsets_name), self.col  # type: ignore[attr-defined]
        outside = ((col < 0) | (col >= columns)).nonzero()
        if len(outside):
            i = int(outside[0])
            row = int(torch.searchsorted(offsets, torch.tensor(i, device=offsets.device), right=True)) - 1
            self._fail(f"col[{i}] ({unit} row {row}) is {int(col[i])}, must be in [0, {columns})")
        if len(col) > 1:
            first = torch.zeros(len(col) + 1, dtype=torch.bool, device=col.device)
            first[offsets.long()] = True
            repeats = ((col[1:] <= col[:-1]) & ~first[1:-1]).nonzero()
            if len(repeats):
                i = int(repeats[0]) + 1
                row = int(torch.searchsorted(offsets, torch.tensor(i, device=offsets.device), right=True)) - 1
                self._fail(f"col must ascend inside {unit} row {row}: {int(col[i - 1])} then {int(col[i])}")
