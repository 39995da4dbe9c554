"""sp24 by cuSPARSELt through torch: one more candidate, and the baseline of the benches.

The weight is compressed by cuSPARSELt itself (`torch._cslt_compress`) and kept beside the values. Its algorithm is
searched once for each weight shape and bucket of tokens (`torch._cslt_sparse_mm_search`), as the default one is often
far from the best; the numbers of algorithms mean something to one library version and card only, so they are kept in
this process and not on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tune
from .._plan import plan
from ..ref import ACTIVATIONS, result_dtype
from .layout import Sp24

# Multiples that torch asks of (N, K) and of the tokens, by type.
ALIGNMENT = {torch.bfloat16: (16, 8), torch.float16: (16, 8), torch.int8: (32, 16)}
ENDINGS = None  # its 16-bit outputs are rounded, so nothing exact can follow them (_ending.py)


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why cuSPARSELt cannot run `op` on this layout and x, or None where it can."""
    own = layout.values.dtype
    if op != "mm":
        return "cuSPARSELt through torch has mm only"
    if own not in ALIGNMENT:
        return f"cuSPARSELt through torch takes bfloat16, float16 and int8 values, not {own}"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    many = ALIGNMENT[own][0]
    if layout.shape[0] % many or layout.shape[1] % many or 0 in layout.shape:
        return f"cuSPARSELt needs N and K in multiples of {many} for {own}, got {layout.shape}"
    return why_not_here(x.device)


def why_not_here(device: torch.device) -> str | None:
    """Why there is no cuSPARSELt on this device, or None where there is."""
    if device.type != "cuda":
        return f"cuSPARSELt takes CUDA tensors, not {device.type} tensors"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"cuSPARSELt needs compute capability 8.0, {device} has less"
    return None


def mm(layout: Sp24, x: Tensor, bias: Tensor | None, activation: str, *, algorithm: int | None = None) -> Tensor:
    """Y = act(X W^T * scale + bias): x [M, K] -> [M, N]. algorithm: a number of cuSPARSELt's; None searches."""
    m, out = x.shape[0], result_dtype(x)
    if m == 0:
        return x.new_empty((0, layout.shape[0]), dtype=out)
    weight, tokens = compressed(layout), columns(x)
    if algorithm is None:
        algorithm = searched(layout.shape, x.dtype, x.device, tune.bucket(m), weight, tokens)
    quantised = x.dtype == torch.int8
    fused = bias if bias is not None and bias.dtype == x.dtype and not quantised else None
    y = torch._cslt_sparse_mm(
        weight,
        tokens,
        bias=fused,
        out_dtype=torch.int32 if quantised else None,
        transpose_result=True,
        alg_id=algorithm,
    )[:m]
    if quantised:
        y = y * layout.scale if layout.scale is not None else y.to(out)
    if bias is not None and fused is None:
        y = y + bias.to(y.dtype)
    return ACTIVATIONS[activation](y)


def mm_t(layout: Sp24, dy: Tensor) -> Tensor:
    """Not there; `why_not` says so."""
    raise NotImplementedError("cuSPARSELt through torch has mm only")


def sddmm(layout: Sp24, dy: Tensor, x: Tensor) -> Tensor:
    """Not there; `why_not` says so."""
    raise NotImplementedError("cuSPARSELt through torch has mm only")


def compressed(layout: Sp24) -> Tensor:
    """The weight as cuSPARSELt has it, values then metadata; kept beside the values, made anew when they change."""
    metadata = layout.metadata
    key = ("sp24.vendor", layout.shape, metadata.data_ptr(), -1 if metadata.is_inference() else metadata._version)
    return plan(layout.values, key, lambda: torch._cslt_compress(layout.unpack()))


def columns(x: Tensor) -> Tensor:
    """X^T [K, M'] for cuSPARSELt: rows of x contiguous, M' = M rounded up to what it asks of tokens."""
    more = -x.shape[0] % ALIGNMENT[x.dtype][1]
    return (torch.nn.functional.pad(x, (0, 0, 0, more)) if more else x.contiguous()).t()


_FOUND: dict[tuple[object, ...], int] = {}


def searched(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, bucket: int, weight: Tensor, tokens: Tensor
) -> int:
    """cuSPARSELt's fastest algorithm for weights of this shape and so many tokens.

    The first call of its kind times them all; where a CUDA graph is being captured, which allows no timing, an unknown
    one is number 0, the library's own choice.
    """
    key = (shape, dtype, device, bucket)
    if key not in _FOUND:
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        out = torch.int32 if dtype == torch.int8 else None
        _FOUND[key] = int(torch._cslt_sparse_mm_search(weight, tokens, out_dtype=out, transpose_result=True))
    return _FOUND[key]
