"""What to expect of a GPU without a measurement: rooflines of the cards, and the share of them that kernels reach.

Pure functions of the card, the call and the weight. The cards' rates are their makers'; the shares below are
deliberately low and **no card has confirmed them**: they are there so that `policy="heuristic"` and `inspect` can tell
a hopeful case from a hopeless one. What a machine really does is for `policy="measured"` to say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Card(NamedTuple):
    """Peak rates: TB/s of memory and of the second-level cache; dense TFLOP/s of tensor cores and of float32 units."""

    memory: float
    cache: float
    half: float  # bfloat16 and float16, float32 sums
    tf32: float
    byte: float  # int8; float8_e4m3fn where the card has it
    float32: float


CARDS = {
    "a100": Card(1.56, 4.0, 312.0, 156.0, 624.0, 19.5),
    "rtx4090": Card(1.01, 4.0, 165.0, 82.6, 660.0, 82.6),
    "h100": Card(3.35, 5.5, 989.0, 494.7, 1979.0, 67.0),
    "h200": Card(4.8, 5.5, 989.0, 494.7, 1979.0, 67.0),
}
_BY_CAPABILITY = {80: "a100", 86: "rtx4090", 87: "a100", 89: "rtx4090", 90: "h100", 100: "h200", 103: "h200"}
NEWEST = "rtx4090"  # consumer cards from 12.0 on


def card(capability: int, name: str = "") -> str:
    """The card in CARDS that is most like one of this compute capability (times ten) and product name."""
    if capability == 90 and ("H200" in name or "GH200" in name):
        return "h200"
    return _BY_CAPABILITY.get(capability, NEWEST)


HOST_US = {"dense": 7.0, "sparse": 16.0}  # of Python and torch for a call: what a small product cannot be faster than
LATENCY_US = 3.0  # of a kernel
# Shares of the memory's rate and of the units' peak. Dense: cuBLAS (80 % of peak: 794 of 989 TFLOP/s on an H100).
_DENSE = (0.85, 0.8)
_READS = {"sp24": 0.65, "bsr": 0.65, "csr": 0.6, "bitmap": 0.6}
_SP24 = 0.5  # of twice the dense peak: what cuSPARSELt reaches on an H100
# Of the dense peak, for blocks that the second-level cache does not hold back; float32 is three TF32 products.
_BSR, _BSR_FLOAT32 = 0.45, 0.25
_ROWS = {4: 0.11, 2: 0.22}  # of float32's peak, by bytes of a value: 21 and 42 multiply-adds a cycle and SM, two thirds
_DECODED = 0.15  # of the dense peak, where a bitmap is expanded for tensor cores
DECODE = 64  # tokens: up to so many a bitmap is expanded inside of its kernel
HALVES = (torch.bfloat16, torch.float16)


class Work(NamedTuple):
    """A call: the product, tokens, the weight's shape, the activations' type, the share of weights stored."""

    op: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    density: float


def dense_us(card: Card, work: Work) -> float:
    """Microseconds of cuBLAS's product; float32 on float32 units, as torch's default has it."""
    reads, peak = _DENSE
    return max(
        HOST_US["dense"], LATENCY_US + _roof(card, work, work.n * work.k * _item(work), reads, _peak(card, work) * peak)
    )


def sparse_us(card: Card, format: str, work: Work, block: tuple[int, int] = (32, 32)) -> float | None:
    """Microseconds of our kernel; None where there is none for this type and product. block: of bsr."""
    item, nk = _item(work), work.n * work.k
    if work.dtype not in (*HALVES, torch.float32, torch.int8) or (
        work.dtype == torch.int8 and format in ("csr", "bitmap")
    ):
        return None
    if work.dtype == torch.int8 and work.op != "mm":
        return None
    reads, stored, extra = _READS[format], work.density, 0.0
    if format == "sp24":
        if work.dtype == torch.float32:
            return None
        size, peak = nk * (0.5 * item + 0.125), 2 * _peak(card, work) * _SP24
        if work.op != "mm":  # the dense weight, or its gradient, is written and read, and cuBLAS multiplies
            return dense_us(card, work) + LATENCY_US + 2 * nk * item / (card.memory * reads) * 1e-6
    elif format == "bsr":
        size, peak = (
            nk * stored * item,
            min(_peak_of_blocks(card, work), _cached(card, block, item)) / max(stored, 1e-9),
        )
    elif format == "bitmap" and (work.op != "mm" or work.m > DECODE or work.dtype not in HALVES):
        size = nk * (stored * item + 0.125)
        return dense_us(card, work) + LATENCY_US + (size + nk * item) / (card.memory * reads) * 1e-6
    elif format == "bitmap":
        size, peak = nk * (stored * item + 0.125), _peak(card, work) * _DECODED
    else:
        size, peak = nk * stored * (item + 2), card.float32 * _ROWS[item] / max(stored, 1e-9)
        if work.op == "mm_t":  # the values in the order of columns: a read and a write of them
            extra = 2 * nk * stored * item / (card.memory * reads) * 1e-6
    return max(HOST_US["sparse"], LATENCY_US + extra + _roof(card, work, size, reads, peak))


def _roof(card: Card, work: Work, weight_bytes: float, reads: float, tflops: float) -> float:
    """Microseconds of the slower of bytes and operations; tflops on the dense product's operations."""
    moved = weight_bytes + work.m * (work.n + work.k) * _item(work)
    # Tensor cores take 16 rows or columns at least.
    return max(moved / (card.memory * reads), 2 * max(work.m, 16) * work.n * work.k / tflops) * 1e-6


def _item(work: Work) -> int:
    return work.dtype.itemsize


def _peak(card: Card, work: Work) -> float:
    """TFLOP/s of a dense product of this type."""
    if work.dtype in HALVES:
        return card.half
    return card.byte if work.dtype == torch.int8 else card.float32


def _peak_of_blocks(card: Card, work: Work) -> float:
    """TFLOP/s on stored blocks."""
    return card.tf32 / 3 * _BSR_FLOAT32 if work.dtype == torch.float32 else _peak(card, work) * _BSR


def _cached(card: Card, block: tuple[int, int], item: int) -> float:
    """TFLOP/s that the second-level cache can feed: a block of B rows meets tiles of 128 tokens."""
    rows = block[0]
    return card.cache * 2 * rows * 128 / (rows + 128) / item
