"""SparseLinear: nn.Linear with a sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._library import unwatched
from .._plan import overwrite, plan
from ..formats import FORMATS
from ..functional import linear_layout
from ..layout import Layout
from ..ref import ACTIVATIONS
from .base import SparseModule, random_topology


class SparseLinear(SparseModule):
    """y = act(x W^T + bias) with a sparse W[out_features, in_features]; sparse *weights*, dense activations.

    Constructor, forward and state_dict habits of nn.Linear. Initialised as nn.Linear and thinned to `density` at
    random (sp24: the two largest of every group of four). The usual way in is `SparseLinear.from_dense`.
    Not to be confused with modules of the same kind of name in libraries of sparse activations (point clouds).

    `dense_above`: calls with more tokens than this run dense (None: never), for layers whose kernel wins at few tokens
    only; `convert_(..., thresholds=True)` sets it. The dense weight is made at the first such call and kept beside
    the values: as many bytes as the dense layer had, in memory only. Calls that train the values, and compiled, traced
    or autocast ones, run sparse at any size.
    """

    dense_above: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "sp24",
        density: float = 0.5,
        block_size: int | tuple[int, int] = 32,
        activation: str | None = None,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        weight = random_topology(dense.weight.detach(), format, density, block_size)
        super().__init__(_pack(weight, format, block_size), None if not bias else dense.bias.detach(), activation)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_packed(cls, packed: Layout, bias: Tensor | None = None, activation: str | None = None) -> SparseLinear:
        """Around a layout W[N, K] and a bias [N], sharing their memory."""
        module = cls.__new__(cls)
        SparseModule.__init__(module, packed, None if bias is None else bias.detach(), activation)
        module.out_features, module.in_features = packed.shape
        return module

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        format: str = "sp24",
        block_size: int | tuple[int, int] = 32,
        prune: bool = False,
    ) -> SparseLinear:
        """The sparse twin of a pruned nn.Linear: same outputs, same bias parameter, same training mode.

        format "sp24", "bsr" (with block_size), "csr" or "bitmap". prune=True (sp24 only) prunes by magnitude;
        otherwise a weight that is not 2:4 raises a ValueError that names the first bad group.
        """
        module = cls.from_packed(_pack(linear.weight.detach(), format, block_size, prune))
        module.bias = linear.bias
        module.values.requires_grad_(linear.weight.requires_grad)
        return module.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear with the same weight, zeros filled in."""
        weight = self.dense_weight().detach()
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype)
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.dense_above is not None and self._runs_dense(input):
            weight = plan(self.values, "dense", self._written_out, lambda old: overwrite(old, self._written_out()))
            return ACTIVATIONS[self.activation or "none"](nn.functional.linear(input, weight, self.bias))
        return linear_layout(self.packed, input, self._parameters["bias"], self.activation, self.backend)

    def _written_out(self) -> Tensor:
        return self.dense_weight().detach()

    def _runs_dense(self, x: Tensor) -> bool:
        if not unwatched(self.values, x, self.bias) or (torch.is_grad_enabled() and self.values.requires_grad):
            return False
        fits = x.shape[-1:] == (self.in_features,)  # what does not fit is refused where sparse calls are
        alike = x.dtype == self.values.dtype and (self.bias is None or self.bias.dtype == x.dtype)
        return fits and alike and x.numel() > (self.dense_above or 0) * self.in_features

    def extra_repr(self) -> str:
        above = f", dense_above={self.dense_above}" if self.dense_above is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}{above}"


def _pack(weight: Tensor, format: str, block_size: int | tuple[int, int], prune: bool = False) -> Layout:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if prune and format != "sp24":
        raise ValueError(f"prune=True is for format 'sp24'; prune the weight first for {format!r}")
    if format == "bsr":
        block = (block_size, block_size) if isinstance(block_size, int) else block_size
        return FORMATS["bsr"].pack(weight, block)
    return FORMATS[format].pack(weight, **({"prune": True} if prune else {}))
