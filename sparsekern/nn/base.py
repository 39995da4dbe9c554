"""What SparseLinear and SparseConv2d share: a sparse weight kept as ordinary parameters and buffers.

`values` is an ordinary nn.Parameter and every index tensor an ordinary buffer, so any optimizer steps it, DDP
reduces it, safetensors saves it and deepcopy copies it. A dense checkpoint loads into such a module (it is packed
on load), and `dense_state_dict` writes one back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FORMATS
from ..layout import QUANTISED, Layout
from ..tensor import SparseTensor, _wrap


class SparseModule(nn.Module):
    """A module with one sparse weight W[N, K], an optional bias [N], an activation and a backend.

    The weight's parts are `values` (a parameter) and the format's index tensors (buffers: `metadata`; `crow`, `col`;
    `bits`, `offsets`), `scale` for int8. `backend` None lets the dispatcher choose.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    scale: Tensor | None
    own_buffers: tuple[str, ...] = ()  # what else a subclass saves that a dense checkpoint does not have

    def __init__(self, packed: Layout, bias: Tensor | None, activation: str | None = None) -> None:
        super().__init__()
        self.format = packed.format
        self.activation = activation
        self.backend: str | None = None
        self._adopt(packed)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def _adopt(self, packed: Layout) -> None:
        """Makes `packed` this module's weight; a parameter that already exists keeps its identity."""
        values = packed.values.detach()
        if isinstance(getattr(self, "values", None), nn.Parameter):
            self.values.data = values
        else:
            self.values = nn.Parameter(values, requires_grad=values.dtype not in QUANTISED)
        for name, t in zip(packed.index_fields, packed.index, strict=True):
            self.register_buffer(name, t)
        self.register_buffer("scale", packed.scale)
        self._layout = type(packed)
        self._index_fields = packed.index_fields
        self._dims = packed.dims

    @property
    def packed(self) -> Layout:
        """The layout around this module's own tensors."""
        buffers: Any = self._buffers  # not self.<name>: nn.Module.__getattr__ would cost a microsecond each
        values: Any = self._parameters["values"]
        index = tuple([buffers[name] for name in self._index_fields])
        return self._layout.from_parts(values, index, buffers["scale"], self._dims)

    @property
    def weight(self) -> SparseTensor:
        """The weight as a SparseTensor [N, K] that shares this module's tensors."""
        return _wrap(self.packed)

    @property
    def density(self) -> float:
        return self.packed.density

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight, indices included, bias not."""
        return self.packed.nbytes

    def dense_weight(self) -> Tensor:
        """The dense weight in the shape that the dense module has."""
        return self.packed.to_dense()

    def pack(self, weight: Tensor) -> Layout:
        """A dense weight (in the dense module's shape) packed as this module stores it."""
        matrix = self._matrix(weight)
        if self.format == "bsr":
            return FORMATS["bsr"].pack(matrix, (self._dims[2], self._dims[3]))
        return FORMATS[self.format].pack(matrix)

    def _matrix(self, weight: Tensor) -> Tensor:
        """The dense module's weight as W[N, K]."""
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> SparseModule:
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)  # .half() and .bfloat16() mean the values, not their scales
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes this module's own parts, checked, or a dense `weight`, packed on load."""
        names = ("values", *self._index_fields, *(("scale",) if self.scale is not None else ()))
        try:
            packed = self._packed_from(state_dict, prefix, names)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            packed, found = None, True
        else:
            found = packed is not None
        if packed is not None:
            self._adopt(packed.map(lambda t: t.to(self.values.device)))
        own = {prefix + name for name in (*names, *self.own_buffers)}
        rest = {key: value for key, value in state_dict.items() if key not in own and key != prefix + "weight"}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if not (found and key in own))

    def _packed_from(self, state_dict: dict[str, Any], prefix: str, names: tuple[str, ...]) -> Layout | None:
        if prefix + "values" in state_dict:
            absent = [name for name in names if prefix + name not in state_dict]
            if absent:
                raise ValueError(
                    f"the checkpoint has values but no {', '.join(absent)}; it was not saved from format {self.format}"
                )
            parts = {name: state_dict[prefix + name].detach().clone() for name in names}
            index = tuple(parts[name] for name in self._index_fields)
            layout = self._layout.from_parts(parts["values"], index, parts.get("scale"), self._dims)
            layout.check()
            return self._as_own_dtype(layout)
        if prefix + "weight" in state_dict:
            weight = state_dict[prefix + "weight"]
            expected = tuple(self.dense_shape)
            if tuple(weight.shape) != expected:
                raise ValueError(f"the checkpoint's dense weight has shape {tuple(weight.shape)}, expected {expected}")
            return self._as_own_dtype(self.pack(weight))
        return None

    def _as_own_dtype(self, layout: Layout) -> Layout:
        """A checkpoint takes the module's type, as nn.Module.load_state_dict does for dense parameters."""
        if layout.dtype == self.values.dtype or torch.int8 in (layout.dtype, self.values.dtype):
            return layout
        return layout.to(dtype=self.values.dtype)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense module's weight."""
        return self._dims[:2]

    def _describe(self) -> str:
        block = f", block={self._dims[2:]}" if self.format == "bsr" else ""
        chosen = f", backend={self.backend!r}" if self.backend else ""
        fused = f", activation={self.activation!r}" if self.activation else ""
        return f"bias={self.bias is not None}, format={self.format!r}{block}, density={self.density:.3f}{fused}{chosen}"


def random_topology(weight: Tensor, format: str, density: float, block_size: int | tuple[int, int] = 32) -> Tensor:
    """`weight` [N, K] with a random topology of the format at (about) the given density, zeros elsewhere.

    sp24 keeps the two largest of every group and has no other density than a half.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")
    if format == "sp24":
        from ..sp24.pack import prune_mask

        return weight * prune_mask(weight)
    n, k = weight.shape
    r, c = (1, 1) if format != "bsr" else (block_size, block_size) if isinstance(block_size, int) else block_size
    keep = torch.rand(-(-n // r), -(-k // c), device=weight.device) < density
    return weight * keep.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]


def dense_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` as the dense model would have it: every sparse weight unpacked under its own name."""
    state = dict(module.state_dict())
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, SparseModule):
            prefix = f"{name}." if name else ""
            for part in ("values", *child._index_fields, "scale", *child.own_buffers):
                state.pop(prefix + part, None)
            state[prefix + "weight"] = child.dense_weight().detach()
    return state
