"""DynamicSparseLinear: 2:4 training over a dense master weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._plan import plan
from ..functional import check_dynamic, dynamic_linear, linear_layout
from ..sp24.dynamic import prune
from ..sp24.layout import Sp24
from ..sp24.repack import WIDE
from .linear import SparseLinear


class DynamicSparseLinear(nn.Linear):
    """y = x S(W)^T + bias, where S(W) is the 2:4 part of the dense `weight`, packed anew after each of its steps.

    An nn.Linear in all else: parameters, state_dict, optimizers, autocast, torch.compile. mask "top2" keeps the two
    of largest magnitude in each group of four along K; "transposable" keeps the 4 x 4 tiles of largest sum that are
    2:4 along N as well, so that dX = dY S(W) is a sparse product too. The gradient goes straight through the mask to
    all weights; `decay` adds decay * (W - S(W)) to it (SR-STE, Zhou et al. 2021, arXiv 2102.04010: 2e-4), which
    settles the mask. `to_sparse()`, and `convert_` of a model, freeze it into a SparseLinear.
    `sparsekern.prune` does the same for any pattern on dense modules, at dense speed.
    """

    mask: str = "top2"
    decay: float = 0.0
    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: str = "top2",
        decay: float = 0.0,
    ) -> None:
        check_dynamic(mask, decay)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.mask, self.decay = mask, decay

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, mask: str = "top2", decay: float = 0.0) -> DynamicSparseLinear:
        """Around the parameters of an nn.Linear, which stay the same objects; same training mode."""
        module = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", mask=mask, decay=decay
        )
        module.weight, module.bias = linear.weight, linear.bias
        return module.train(linear.training)

    def packed(self, dtype: torch.dtype | None = None) -> Sp24:
        """S(W) as it is now, in `dtype`. Kept until the weight's next step."""
        dtype = dtype or self.weight.dtype
        key = ("sp24.dynamic", self.mask, dtype, self.backend)

        def make() -> Sp24:
            return prune(self.weight.detach().to(dtype), self.mask, self.backend)

        return plan(self.weight, key, make, live=dtype in WIDE)  # the GPU's packer waits for nothing

    def to_sparse(self) -> SparseLinear:
        """The SparseLinear of the mask as it is now: same bias parameter, same training mode."""
        layout = self.packed()
        module = SparseLinear.from_packed(layout.map(lambda t: t.clone()))
        module.bias = self.bias
        module.values.requires_grad_(self.weight.requires_grad)
        return module.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return dynamic_linear(input, weight, bias, mask=self.mask, decay=self.decay, backend=self.backend)
        kind = input.device.type
        cast = torch.is_autocast_enabled(kind) and input.dtype != torch.float64
        layout = self.packed(torch.get_autocast_dtype(kind) if cast else None)
        return linear_layout(layout, input, bias, None, self.backend)

    def extra_repr(self) -> str:
        decay = f", decay={self.decay:g}" if self.decay else ""
        return f"{super().extra_repr()}, mask={self.mask!r}{decay}"
