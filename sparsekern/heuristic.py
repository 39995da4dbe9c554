"""What to expect without a measurement: a pure function of (device, format, op, M, N, K, dtype, density).

A roofline of two lines for each side: the time of a call is the larger of what its bytes and what its
arithmetic take, plus a fixed cost. Few tokens are bound by bytes (decode), many by arithmetic (prefill);
where the lines cross, M decides as much as the weight does. The constants are one core's, measured; only
their ratios matter, because cores scale both sides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FORMATS = ("sp24", "bsr", "csr", "bitmap")
OPS = ("mm", "mm_t", "sddmm")
DECODE = 64  # at most so many tokens are called decode


class Expected(NamedTuple):
    """The backend that will run the call, "decode" or "prefill", and the speed-up over dense."""

    backend: str
    regime: str
    speedup: float


# Dense GFLOP/s of a core as torch reaches them, by instruction set: float32, bfloat16, float16.
_DENSE = {
    "amx": (120.0, 700.0, 200.0),
    "avx512_bf16": (110.0, 200.0, 90.0),
    "avx512": (100.0, 90.0, 90.0),
    "avx2": (60.0, 30.0, 30.0),
    "portable": (40.0, 15.0, 15.0),
}
_GBS = 12.0  # bytes a nanosecond of a core
_OVERHEAD_US = {"dense": 4.0, "sparse": 12.0}

# Share of the dense float32 rate that a kernel reaches on the multiplications that it does.
_EFFICIENCY = {"csr": 0.75, "bsr": 0.95, "sp24": 0.8, "bitmap": 0.8}
_INDEX_BYTES = {
    "csr": 2.0,
    "bsr": 0.0,
    "sp24": 0.25,
    "bitmap": 0.0,
}  # beside each value, as the kernels read them


def predict(
    device: str, format: str, op: str, m: int, n: int, k: int, dtype: torch.dtype, density: float
) -> Expected:
    """The backend, regime and speed-up over dense of one call Y[M, N] = X[M, K] W^T (or its mm_t, sddmm).

    device: "cpu-" and an instruction set (portable, avx2, avx512, avx512_bf16, amx), "cpu" without compiled
    kernels, or "cuda"; density: the share of weights stored. Raises ValueError for names and sizes that
    cannot be.
    """
    kind, _, isa = device.partition("-")
    if format not in FORMATS or op not in OPS:
        raise ValueError(f"expected a format of {', '.join(FORMATS)} and an op of {', '.join(OPS)}")
    if min(m, n, k) < 0 or not 0 <= density <= 1:
        raise ValueError(f"m, n, k must not be negative and density a share, got {(m, n, k, density)}")
    if kind not in ("cpu", "cuda") or (isa and isa not in _DENSE):
        raise ValueError(f"device must be cpu, cuda or cpu-<{', '.join(_DENSE)}>, got {device!r}")
    regime = "decode" if m <= DECODE else "prefill"
    column = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}.get(dtype)
    if kind == "cuda" or not isa or column is None:
        # The reference unpacks the weight before a dense product: never faster than that product.
        return Expected("ref", regime, 0.5)
    float32, own = _DENSE[isa][0], _DENSE[isa][column]
    flops, item = 2e-3 * m * n * k, dtype.itemsize  # in GFLOP/s, flops / rate is microseconds
    traffic = item * m * (n + k)
    dense = max(flops / own, 1e-3 * (item * n * k + traffic) / _GBS)
    stored = 0.5 if format == "sp24" else density
    rate, work = _compute(format, stored, float32, own)
    index = _INDEX_BYTES[format] * stored + (0.125 if format == "bitmap" else 0.0)
    sparse = max(work * flops / rate, 1e-3 * ((stored * item + index) * n * k + traffic) / _GBS)
    total = (dense + _OVERHEAD_US["dense"]) / (sparse + _OVERHEAD_US["sparse"])
    return Expected("host", regime, total)


def _compute(format: str, stored: float, float32: float, own: float) -> tuple[float, float]:
    """GFLOP/s of a kernel, and the share of the dense multiplications that it does.

    bsr runs on the type's own units; where those are far ahead of float32 (AMX), sp24 and bitmap are
    expanded for them and multiply densely; the others widen to float32.
    """
    if format == "bsr":
        return _EFFICIENCY[format] * own, stored
    if format in ("sp24", "bitmap") and own > 2 * float32:
        return 0.9 * own, 1.0
    return _EFFICIENCY[format] * float32, stored
