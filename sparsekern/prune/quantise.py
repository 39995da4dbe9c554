"""int8 and fp8 (e4m3) weights with one scale a row: by their largest magnitude, or jointly with the solver (GPTQ).

Symmetric, so that a weight which was pruned stays exactly zero: q = round(w / s), w ~ q s, s = max_j |w_ij| / q_max.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The largest value of each type; int8 is symmetric, so that -w is as exact as w.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_NAMES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "e4m3": torch.float8_e4m3fn}


def quantised_type(dtype: torch.dtype | str) -> torch.dtype:
    """torch.int8 or torch.float8_e4m3fn, by itself or by name ("int8", "fp8", "e4m3"). Raises ValueError else."""
    found = _NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _LARGEST:
        raise ValueError(f"weights quantise to {', '.join(_NAMES)}, got {dtype}")
    return found


@dataclass(frozen=True)
class RowQuantiser:
    """round(w / s) s, one scale s a row."""

    dtype: torch.dtype = torch.int8

    def __post_init__(self) -> None:
        quantised_type(self.dtype)

    def scale(self, matrix: Tensor) -> Tensor:
        """s_i = max_j |w_ij| / q_max of W [N, K]; [N] float32 (float64 for float64). An empty row has s = 1."""
        largest = matrix.abs().amax(1) if matrix.shape[1] else matrix.new_zeros(matrix.shape[0])
        largest = largest if largest.dtype == torch.float64 else largest.float()
        scale = largest / _LARGEST[self.dtype]
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def values(self, weight: Tensor, scale: Tensor) -> Tensor:
        """w / s in the quantised type, nearest, clamped to its range; `scale` broadcasts against `weight`."""
        limit = _LARGEST[self.dtype]
        ratio = (weight / scale).clamp(-limit, limit)
        return ratio.round().to(torch.int8) if self.dtype == torch.int8 else ratio.to(self.dtype)

    def round(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """The nearest weight that can be represented, in the weight's type."""
        assert scale is not None
        return self.values(weight, scale).to(weight.dtype) * scale.to(weight.dtype)


@dataclass(frozen=True)
class Quantised:
    """W[N, K] ~ values * scale[:, None]: values int8 or float8_e4m3fn, scale [N] float32."""

    values: Tensor
    scale: Tensor

    def dequantised(self) -> Tensor:
        """values * scale, float32."""
        return self.values.float() * self.scale.float()[:, None]


def quantised(matrix: Tensor, dtype: torch.dtype | str = torch.int8, scale: Tensor | None = None) -> Quantised:
    """W [N, K] in int8 or fp8 e4m3 with a scale a row: s_i = max_j |w_ij| / q_max unless given. Zeros stay zeros.

    The packers take the result: `sk.sp24.pack(q.values, scale=q.scale)` and the like. Raises ValueError for another
    type or a weight that is no matrix.
    """
    if matrix.dim() != 2:
        raise ValueError(f"expected a matrix W[N, K], got shape {tuple(matrix.shape)}")
    quantiser = RowQuantiser(quantised_type(dtype))
    scale = quantiser.scale(matrix.detach()) if scale is None else scale
    return Quantised(quantiser.values(matrix.detach().to(scale.dtype), scale[:, None]), scale.float())
