"""Which kernel of csrc/sp24 runs a product, and how its work is dealt out: a pure function of shape and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLOCK_ROWS = 64
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may have, by architecture
# Share of the peak rate that a family and its tile reach at best, for choosing among them.
RATES = {"mm_sm90": 1.0, "mm_sm80": 0.5, "decode": 0.5}


class Kernel(NamedTuple):
    """A row of _cuda.sp24_kernels(type): its tile (of a whole cluster), threads and memory."""

    family: str
    rows: int
    tokens: int
    cluster: int
    threads: int
    shared_bytes: int
    partial_words: int  # 32-bit words of partial sums for every worker
    counters: int  # for every tile


@dataclass(frozen=True)
class Choice:
    """`kernel` is the row's number; `workers` blocks, or clusters; the first `streamed` tiles are cut along K."""

    kernel: int
    workers: int
    streamed: int
    tiles: int
    cost: float  # in no unit; for comparing


def candidates(
    kernels: Sequence[Kernel], m: int, n: int, k_blocks: int, *, capability: int, processors: int, aligned: bool
) -> list[Choice]:
    """Every legal choice for Y[M, N] = X[M, K] W[N, K]^T, the cheapest first.

    capability: ten times the compute capability (90); processors: SMs; aligned: every row of x begins at a multiple
    of 16 bytes, which TMA needs.
    """
    card = max(arch for arch in SHARED if arch <= capability)
    found = []
    for number, kernel in enumerate(kernels):
        if kernel.shared_bytes > SHARED[card] * 1024:
            continue
        if kernel.family == "mm_sm90" and not (capability == 90 and aligned):
            continue
        if kernel.family == "decode":
            if m <= kernel.tokens:
                found.append(_decode(number, kernel, m, n, k_blocks, processors))
        else:
            found.append(_mm(number, kernel, m, n, k_blocks, processors))
    return sorted(found, key=lambda choice: choice.cost)


def _decode(number: int, kernel: Kernel, m: int, n: int, k_blocks: int, processors: int) -> Choice:
    """One stream of the weight's blocks in equal shares; a share is at least a block for every warp."""
    tiles = -(-n // BLOCK_ROWS)
    units, warps = tiles * k_blocks, kernel.threads // 32
    workers = max(1, min(processors, units // warps))
    # Bound by bytes: a block's share of a processor's bandwidth, its tokens, and the way to full flight.
    share = -(-units // workers)
    cost = share * (4.6 + 0.06 * kernel.tokens) + 25 + 0.2 * kernel.tokens + (8 - warps)
    return Choice(number, workers, tiles, tiles, cost)


def _mm(number: int, kernel: Kernel, m: int, n: int, k_blocks: int, processors: int) -> Choice:
    """Whole tiles in turns; those of the last, unfilled turn are cut along K so that all workers share them."""
    tiles = -(-n // kernel.rows) * -(-m // kernel.tokens)
    workers = max(1, processors // kernel.cluster)
    rest = tiles % workers
    streamed = 0
    if rest and k_blocks >= 8:
        streamed = rest if tiles < workers or rest * 3 >= workers else min(tiles, rest + workers)
        if streamed * k_blocks < 4 * workers:  # shares of less than four blocks are not worth their sums
            workers = max(1, streamed * k_blocks // 4) if tiles == streamed else workers
    area = kernel.rows * kernel.tokens / kernel.cluster / 1024
    # Cycles of a block of K, by the products and by the bytes that a tile must bring.
    rate = RATES[kernel.family] * (1.0 if kernel.threads > 256 else 0.9)
    step = area * 16 / rate + (kernel.rows / kernel.cluster * 0.56 + kernel.tokens) * 0.25
    turns = (tiles - streamed) / workers
    blocks = -(-(tiles - streamed) // workers) * k_blocks if turns else 0
    blocks += streamed * k_blocks / workers
    cost = blocks * step + (-(-tiles // workers)) * (area * 40 + 300) + (area * 60 if streamed else 0) + 400
    # A decode kernel's unit is a kilobyte at 20 bytes a cycle, 50 cycles.
    return Choice(number, workers, streamed, tiles, cost / 50)
