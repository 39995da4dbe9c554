"""int8 and fp8 weights over a model: what pruning left, with one scale a row."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .layers import Filter, as_matrix, as_weight, layers, weight_of, weight_parameter
from .quantise import Quantised, RowQuantiser, quantised, quantised_type
from .solve import Solved, sparsegpt
from .solve_model import LayerResult, Task, solve_


@torch.no_grad()
def quantise_(
    model: nn.Module,
    dtype: torch.dtype | str = "int8",
    *,
    method: str = "absmax",
    data: Iterable[Any] | None = None,
    filter_fn: Filter | None = None,
    damp: float = 0.1,
    **options: Any,
) -> dict[str, LayerResult]:
    """Rounds the layers' weights to int8 or fp8 e4m3, one scale a row, in place; masks and zeros stay.

    The weights then hold dequantised values, so that the model runs as before; `stored(module, scale)` gives the
    integers for the packers. method "absmax": s_i = max_j |w_ij| / q_max, nearest. method "gptq": columns left to
    right, later ones pay for the rounding of earlier ones (GPTQ, 2210.17323; needs data=, options as of `sparsegpt_`);
    zeros are taken as pruned and stay. To prune and round in one sweep: `sparsegpt_(..., quantise=dtype)`.

    Returns what became of each layer, `scale` included. For absmax the error is the weights' own, ||W' - W||^2 /
    ||W||^2, for gptq the output's.
    """
    quantiser = RowQuantiser(quantised_type(dtype))
    if method == "gptq":
        if data is None:
            raise ValueError("method 'gptq' needs data=, an iterable of batches")

        def solver(task: Task) -> Solved:
            kept = task.weight != 0
            return sparsegpt(task.weight, task.hessian, None, mask=kept, damp=damp, quantiser=quantiser)

        return solve_(model, data, solver, "gptq", write_masks=False, filter_fn=filter_fn, **options)
    if method != "absmax":
        raise ValueError(f"method must be 'absmax' or 'gptq', got {method!r}")
    results = {}
    for name, module in layers(model, filter_fn):
        started = time.perf_counter()
        matrix = as_matrix(module, weight_of(module))
        found = quantised(matrix, quantiser.dtype)
        rounded = found.dequantised().to(matrix.dtype)
        whole = float(matrix.double().square().sum())
        error = float((rounded.double() - matrix.double()).square().sum()) / whole if whole else 0.0
        parameter, sparsity = weight_parameter(module), float((matrix == 0).float().mean())
        assert parameter is not None  # layers() gives no others
        parameter.copy_(as_weight(module, rounded))
        results[name] = LayerResult("absmax", sparsity, error, 0.0, time.perf_counter() - started, scale=found.scale)
    return results


@torch.no_grad()
def stored(module: nn.Module, scale: torch.Tensor, dtype: torch.dtype | str = "int8", order: str = "crs") -> Quantised:
    """The integers (or fp8 values) W[N, K] of a layer that was quantised with this scale, and the scale.

    Exact for a weight that `quantise_` or `sparsegpt_(quantise=...)` made: values * scale is the weight.
    """
    return quantised(as_matrix(module, weight_of(module), order), dtype, scale)
