"""What to expect without a measurement: a pure function of (device, format, op, M, N, K, dtype, density).

A call takes a fixed cost, its bytes and its arithmetic, on either side. Few tokens are mostly bytes
(decode), many mostly arithmetic (prefill), so M decides as much as the weight does. The constants are one
core's, measured on an AMX machine with 2048 x 2048 weights and scaled to the other instruction sets by
their dense rates; only ratios matter, because cores scale both sides.
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
    "amx": (165.0, 850.0, 250.0),
    "avx512_bf16": (160.0, 250.0, 120.0),
    "avx512": (160.0, 100.0, 100.0),
    "avx2": (80.0, 40.0, 40.0),
    "portable": (60.0, 30.0, 30.0),
}
# Bytes a nanosecond, dense by item size: torch's 16-bit GEMV is slow.
_DENSE_GBS = {4: 28.0, 2: 12.0}
_SPARSE_GBS = 24.0
_OVERHEAD_US = {"dense": 4.0, "sparse": 12.0}
# Share of the dense float32 rate (bsr: of the type's own) that a kernel reaches on the multiplications it
# does.
_EFFICIENCY = {"csr": 0.6, "bsr": 0.9, "sp24": 0.57, "bitmap": 0.26}
_INDEX_BYTES = {"csr": 4.0, "bsr": 0.0, "sp24": 0.25, "bitmap": 0.0}  # beside each stored value
_PANEL_NS = 0.32  # to bring a byte of x or y into the order of the kernels and back


def predict(device: str, format: str, op: str, m: int, n: int, k: int, dtype: torch.dtype, density: float) -> Expected:
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
    item, stored = dtype.itemsize, 0.5 if format == "sp24" else density
    flops, size, tokens = 2e-3 * m * n * k, 1e-3 * n * k, 1e-3 * item * m * (n + k)  # over GFLOP/s, GB/s: us
    dense = _OVERHEAD_US["dense"] + flops / own + item * size / _DENSE_GBS[item]
    index = _INDEX_BYTES[format] * stored + (0.125 if format == "bitmap" else 0.0)
    rate = _EFFICIENCY[format] * (own if format == "bsr" else float32)
    panels = tokens * _PANEL_NS * (0.3 if format == "bsr" and item == 2 else 1.0)
    read = (stored * item + index) * size / _SPARSE_GBS
    return Expected("host", regime, dense / (_OVERHEAD_US["sparse"] + stored * flops / rate + read + panels))
