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
from .._ext import FP8, capturing
from .._plan import overwrite, plan
from ..layout import QUANTISED
from ..ref import ACTIVATIONS, result_dtype
from .layout import Sp24

# Multiples that torch asks of (N, K) and of the tokens, by type.
ALIGNMENT = {torch.bfloat16: (16, 8), torch.float16: (16, 8), torch.int8: (32, 16), FP8: (32, 16)}
# The type of 8-bit products; float8's are summed as the card's tensor cores do it.
_SUMS = {torch.int8: torch.int32, FP8: torch.float32}
ENDINGS = None  # its 16-bit outputs are rounded, so nothing exact can follow them (_ending.py)


def why_not(op: str, layout: Sp24, x: Tensor) -> str | None:
    """Why cuSPARSELt cannot run `op` on this layout and x, or None where it can."""
    own = layout.values.dtype
    if op != "mm":
        return "cuSPARSELt through torch has mm only"
    if own not in ALIGNMENT:
        return f"cuSPARSELt through torch takes bfloat16, float16, int8 and float8_e4m3fn values, not {own}"
    if x.dtype != own:
        return f"values are {own}, activations {x.dtype}; they must agree"
    many = ALIGNMENT[own][0]
    if layout.shape[0] % many or layout.shape[1] % many or 0 in layout.shape:
        return f"cuSPARSELt needs N and K in multiples of {many} for {own}, got {layout.shape}"
    return why_not_here(x.device) or why_not_type(own, x.device)


def why_not_here(device: torch.device) -> str | None:
    """Why there is no cuSPARSELt on this device, or None where there is."""
    if device.type != "cuda":
        return f"cuSPARSELt takes CUDA tensors, not {device.type} tensors"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"cuSPARSELt needs compute capability 8.0, {device} has less"
    return None


def why_not_type(own: torch.dtype, device: torch.device) -> str | None:
    """Why the cuSPARSELt of this device should not multiply values of one of its types, or None where it should."""
    card, version = torch.cuda.get_device_capability(device), torch.backends.cusparselt.version() or 0
    name = f"cuSPARSELt {version // 1000}.{version // 100 % 10}.{version % 100}" if version else "this cuSPARSELt"
    if own == torch.float16 and card == (9, 0) and not 600 <= version < 800:
        return (
            f"{name} may end in an illegal instruction with float16 on compute capability 9.0, as 0.8.1 is reported "
            "to, and no CUDA call works after that; versions 0.6 and 0.7 and bfloat16 are not known to"
        )
    if own == FP8 and (card < (8, 9) or (card == (8, 9) and version < 800)):
        return f"float8_e4m3fn needs compute capability 9.0, or 8.9 and cuSPARSELt 0.8; here are {card} and {name}"
    return None


def mm(layout: Sp24, x: Tensor, bias: Tensor | None, activation: str, *, algorithm: int | None = None) -> Tensor:
    """Y = act(X W^T * scale + bias): x [M, K] -> [M, N]. algorithm: a number of cuSPARSELt's; None searches."""
    m, out = x.shape[0], result_dtype(x)
    if m == 0:
        return x.new_empty((0, layout.shape[0]), dtype=out)
    weight, tokens = compressed(layout), columns(x)
    if algorithm is None:
        algorithm = searched(layout.shape, x.dtype, x.device, tune.bucket(m), weight, tokens)
    quantised = x.dtype in QUANTISED
    fused = bias if bias is not None and bias.dtype == x.dtype and not quantised else None
    y = torch._cslt_sparse_mm(
        weight,
        tokens,
        bias=fused,
        out_dtype=_SUMS.get(x.dtype),
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

    def make() -> Tensor:
        return torch._cslt_compress(layout.unpack())

    return plan(layout.values, key, make, lambda old: overwrite(old, make()), live=True)


def written_out(blob: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense W[N, K] of a compressed one, whatever its order: the library's product with the identity.

    Each sum has one term that is not zero, so every finite value comes back as it was (-0.0 as 0.0). Raises ValueError
    for sizes that do not fit, and where there are values that are not finite, beside which a row is lost.
    """
    (n, k), dtype = shape, blob.dtype
    many, size = ALIGNMENT[dtype][0], n * k // 16 * (10 if dtype.itemsize == 1 else 9)
    if n % many or k % many or 0 in shape or blob.numel() != size:
        raise ValueError(
            f"a compressed {dtype} weight has N and K in multiples of {many} and, of shape {shape}, {size} elements; "
            f"got {blob.numel()}"
        )
    ones = torch.eye(k, dtype=torch.int8, device=blob.device).to(dtype)
    wide = {torch.int8: torch.int32, FP8: torch.bfloat16}.get(dtype)
    dense = torch._cslt_sparse_mm(blob.reshape(n, -1), ones.t(), out_dtype=wide, transpose_result=True, alg_id=0).t()
    if wide != torch.int32 and not bool(dense.isfinite().all()):
        raise ValueError("a compressed weight with values that are not finite cannot be read back")
    return dense.to(dtype).contiguous()


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
        if capturing(tokens):
            return 0
        found = torch._cslt_sparse_mm_search(weight, tokens, out_dtype=_SUMS.get(dtype), transpose_result=True)
        _FOUND[key] = int(found)
    return _FOUND[key]
