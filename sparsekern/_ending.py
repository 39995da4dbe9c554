"""What a product may end with beside bias and activation, in the kernel or, where that lacks it, composed in torch.

y = act(x_scale * (X W^T) + bias) + beta * residual, in out_dtype. A backend's module names in ENDINGS those of these
words that its `mm` takes; with the others it is given the sums and the rest is torch's. Both ways the sums are of
float32 (or float64), never of 16 bits, unless a residual is all that is asked for: that is added to outputs of x's type
as torch's two operations would.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import QUANTISED, Layout
from .ref import ACTIVATIONS, result_dtype


class Ending(NamedTuple):
    """x_scale float32 [M], residual [M, N] of the output's type; out_dtype None: x's type (float32 of quantised x).

    In the order of the ops' arguments.
    """

    x_scale: Tensor | None = None
    residual: Tensor | None = None
    out_dtype: torch.dtype | None = None
    use_fast_accum: bool = False
    beta: float = 1.0

    def asked(self) -> dict[str, Any]:
        """Those that were given, by name."""
        named = {name: value for name, value in zip(self._fields, self, strict=True) if value is not None}
        if not self.use_fast_accum:
            del named["use_fast_accum"]
        if self.residual is None or self.beta == 1:
            del named["beta"]
        return named


def why_not(module: ModuleType, ending: Ending | None) -> str | None:
    """Why a backend cannot end like this, or None where it can."""
    if ending is None or module.ENDINGS is not None:
        return None
    asked = [name for name in ending.asked() if name not in ("use_fast_accum", "beta")]
    return f"it has no {' and no '.join(asked)}" if asked else None


def mm(module: ModuleType, layout: Layout, x: Tensor, bias: Tensor | None, activation: str, ending: Ending) -> Tensor:
    """Y [M, N] of a backend's module that can run the product and end like this."""
    asked, own = ending.asked(), module.ENDINGS or frozenset()
    if "use_fast_accum" not in own:
        asked.pop("use_fast_accum", None)  # an allowance, not a wish
    if own.issuperset(asked):
        return module.mm(layout, x, bias, activation, **asked)
    natural = result_dtype(x)
    out = ending.out_dtype or natural
    if ending.x_scale is not None:
        y = _sums(module, layout, x, None, "none").mul_(ending.x_scale[:, None])
        y = ACTIVATIONS[activation](y if bias is None else y.add_(bias))
    elif out == natural:
        y = module.mm(layout, x, bias, activation)
    else:
        y = _sums(module, layout, x, bias, activation)
    return (y if ending.residual is None else y.add_(ending.residual, alpha=ending.beta)).to(out)


def sum_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums(module: ModuleType, layout: Layout, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """act(X W^T + bias), not rounded to 16 bits."""
    wide = sum_dtype(x)
    if result_dtype(x) == wide:
        return module.mm(layout, x, bias, activation)
    if "out_dtype" in module.ENDINGS:
        return module.mm(layout, x, bias, activation, out_dtype=wide)
    if layout.dtype not in QUANTISED:
        layout = layout.with_values(layout.values.to(wide))
    return module.mm(layout, x.to(wide), bias, activation)
