"""What to expect without a measurement: a pure function of (device, format, op, M, N, K, dtype, density).

A call takes a fixed cost, its bytes and its arithmetic, on either side. Few tokens are mostly bytes
(decode), many mostly arithmetic (prefill), so M decides as much as the weight does. The constants are one
core's of an AMX machine, fitted to measurements by bench/fit_heuristic.py, and scaled to the other
instruction sets by their dense rates; only ratios matter, because cores scale both sides. GPUs have rooflines of
their own (roofline.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import roofline

FORMATS = ("sp24", "bsr", "csr", "bitmap")
OPS = ("mm", "mm_t", "sddmm")
DECODE = roofline.DECODE  # at most so many tokens are called decode


class Expected(NamedTuple):
    """The backend that will run the call, "decode" or "prefill", and the speed-up over dense."""

    backend: str
    regime: str
    speedup: float


class Rates(NamedTuple):
    """What one side of the comparison reaches with one type: a line through its time over M."""

    gflops: float  # on the multiplications that it does
    gbs: float  # bytes of the stored weight a nanosecond, indices included
    panel: float = 0.0  # nanoseconds to bring a byte of x or y into the order of the kernels and back
    gemv: float = 0.0  # gbs at a single token, where that is another kernel


# Of an AMX core. 16-bit values of csr are multiplied in float32 vectors, those of the others in matrix units.
# <fitted> python -m bench.fit_heuristic --write
DENSE = {
    "float32": Rates(154.0, 12.6, gemv=29.2),
    "bfloat16": Rates(1120.0, 14.7, gemv=12.7),
}
SPARSE = {
    "csr": {"float32": Rates(104.0, 16.6, panel=0.363), "bfloat16": Rates(102.0, 13.6, panel=0.414)},
    "bsr": {"float32": Rates(128.0, 17.6, panel=0.202), "bfloat16": Rates(902.0, 21.5, panel=0.17)},
    "sp24": {"float32": Rates(105.0, 24.7, panel=0.189), "bfloat16": Rates(476.0, 13.2, panel=0.0604)},
    "bitmap": {"float32": Rates(215.0, 8.67, panel=0.197), "bfloat16": Rates(1100.0, 10.2, panel=0.0942)},
}
# </fitted>
# Dense rates of the instruction sets: float32 and bfloat16 relative to AMX, float16 to the set's own float32.
_SCALE = {
    "amx": (1.0, 1.0, 1.5),
    "avx512_bf16": (0.97, 0.29, 0.75),
    "avx512": (0.97, 0.12, 0.62),
    "avx2": (0.48, 0.047, 0.5),
    "portable": (0.36, 0.035, 0.5),
}
_OVERHEAD_US = {"dense": 4.0, "sparse": 12.0}
_INDEX_BYTES = {"csr": 4.0, "bsr": 0.0, "sp24": 0.25, "bitmap": 0.0}  # beside each stored value


def stored_bytes(format: str, n: int, k: int, item: int, density: float) -> float:
    """Bytes of the stored weight, indices included."""
    stored = 0.5 if format == "sp24" else density
    return n * k * (stored * (item + _INDEX_BYTES[format]) + (0.125 if format == "bitmap" else 0.0))


def predict(
    device: str,
    format: str,
    op: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    density: float,
    block: tuple[int, int] = (32, 32),
) -> Expected:
    """The backend, regime and speed-up over dense of one call Y[M, N] = X[M, K] W^T (or its mm_t, sddmm).

    device: "cpu-" and an instruction set (portable, avx2, avx512, avx512_bf16, amx), "cpu" without compiled
    kernels, "cuda-" and a card (a100, rtx4090, h100, h200), or "cuda" for the h100; density: the share of weights
    stored; block: of bsr, which counts on GPUs. Raises ValueError for names and sizes that cannot be. What is said of
    GPUs no card has confirmed (roofline.py).
    """
    kind, _, isa = device.partition("-")
    if format not in FORMATS or op not in OPS:
        raise ValueError(f"expected a format of {', '.join(FORMATS)} and an op of {', '.join(OPS)}")
    if min(m, n, k) < 0 or not 0 <= density <= 1:
        raise ValueError(f"m, n, k must not be negative and density a share, got {(m, n, k, density)}")
    if kind not in ("cpu", "cuda") or (isa and isa not in (_SCALE if kind == "cpu" else roofline.CARDS)):
        raise ValueError(
            f"device must be cpu, cuda, cpu-<{', '.join(_SCALE)}> or cuda-<{', '.join(roofline.CARDS)}>, got {device!r}"
        )
    regime = "decode" if m <= DECODE else "prefill"
    if kind == "cuda":
        card, work = roofline.CARDS[isa or "h100"], roofline.Work(op, m, n, k, dtype, density)
        time = roofline.sparse_us(card, format, work, block)
        backend = "triton" if format == "bsr" else "cuda"
        return Expected(backend, regime, roofline.dense_us(card, work) / time) if time else Expected("ref", regime, 0.5)
    if not isa or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        # The reference unpacks the weight before a dense product: never faster than that product.
        return Expected("ref", regime, 0.5)
    name = "float32" if dtype == torch.float32 else "bfloat16"
    dense_gflops, sparse_gflops = _gflops(isa, format, dtype)
    dense = dense_us(DENSE[name]._replace(gflops=dense_gflops), m, n, k, dtype.itemsize)
    rates = SPARSE[format][name]._replace(gflops=sparse_gflops)
    return Expected("host", regime, dense / sparse_us(rates, format, m, n, k, dtype.itemsize, density))


def dense_us(rates: Rates, m: int, n: int, k: int, item: int) -> float:
    """Microseconds of a dense product with `item` bytes a value."""
    gbs = rates.gemv if m == 1 and rates.gemv else rates.gbs
    return _OVERHEAD_US["dense"] + 2e-3 * m * n * k / rates.gflops + 1e-3 * item * n * k / gbs


def sparse_us(rates: Rates, format: str, m: int, n: int, k: int, item: int, density: float) -> float:
    """Microseconds of the product with a weight of the format."""
    # The bits of a bitmap are expanded before they are multiplied, zeros included.
    multiplied = {"sp24": 0.5, "bitmap": 1.0}.get(format, density)
    size = stored_bytes(format, n, k, item, density)
    panels = rates.panel * item * m * (n + k)
    return _OVERHEAD_US["sparse"] + 2e-3 * m * n * k * multiplied / rates.gflops + 1e-3 * (size / rates.gbs + panels)


def _gflops(isa: str, format: str, dtype: torch.dtype) -> tuple[float, float]:
    """Dense and sparse GFLOP/s of an instruction set: float16 runs on float32 vectors, bfloat16 on what is faster."""
    float32, bfloat16, float16 = _SCALE[isa]
    vectors = SPARSE[format]["float32"].gflops * float32
    if dtype == torch.bfloat16:
        units = SPARSE[format]["bfloat16"].gflops * bfloat16
        return DENSE["bfloat16"].gflops * bfloat16, units if isa == "amx" else max(vectors, units)
    dense = DENSE["float32"].gflops * float32
    return (dense if dtype == torch.float32 else dense * float16), vectors
