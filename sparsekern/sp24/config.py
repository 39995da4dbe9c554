"""Which kernel of csrc/sp24 runs a product, and how its work is dealt out: a pure function of shape and card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

BLOCK_ROWS = 64
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block may have, by architecture
# The cost model: cycles of one processor. Estimates from the data sheets of Hopper, to be replaced by measurements.
# Share of the sparse tensor cores' peak, 4096 multiply-adds of W a cycle.
RATES = {"mm_sm90": 1.0, "mm_sm80": 0.5, "mm_t_sm90": 0.5, "sddmm_sm90": 0.5}
MEMORY, CACHE = 15.0, 30.0  # bytes a cycle that a processor gets from device memory and from the second level
LAUNCH = 3000.0
FAMILIES = {"mm": ("mm_sm90", "mm_sm80", "decode"), "mm_t": ("mm_t_sm90",), "sddmm": ("sddmm_sm90",)}
GPC = 18  # multiprocessors of one of Hopper's GPCs, at most; a cluster lies in one GPC


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
    accurate: bool  # sums of float32's precision: not those of fp8 that Hopper's tensor cores keep over the whole of K


@dataclass(frozen=True)
class Choice:
    """`kernel` is the row's number; `workers` blocks, or clusters; the first `streamed` tiles are cut along K."""

    kernel: int
    workers: int
    streamed: int
    tiles: int
    cost: float  # in no unit; for comparing

    def described(self, kernels: Sequence[Kernel]) -> str:
        """The choice as a line of a table."""
        kernel = kernels[self.kernel]
        tile = f"{self.kernel} {kernel.family} {kernel.rows}x{kernel.tokens} cluster {kernel.cluster}"
        return f"{tile}, {self.workers} workers, {self.streamed} of {self.tiles} streamed"


def candidates(
    kernels: Sequence[Kernel],
    m: int,
    n: int,
    k_blocks: int,
    *,
    capability: int,
    processors: int,
    aligned: bool,
    op: str = "mm",
    code: int | None = None,
    resident: Sequence[int] | None = None,
    fp8: bool = False,
    images: bool = False,
    fast_accum: bool = False,
) -> list[Choice]:
    """Every legal choice for Y[M, N] = X[M, K] W[N, K]^T, the cheapest first.

    op: "mm"; or a gradient, whose kernels are Hopper's alone: "mm_t", dX[M, N] = dY[M, K] W[K, N], or "sddmm",
    dW[N, M] = dY[K, N]^T X[K, M] (all sizes by their place in the product, not by their names in W).
    capability: ten times the compute capability (90); processors: SMs; aligned: TMA can read x, whose rows begin at
    multiples of 16 bytes and do not overlap; code: the architecture whose code runs there (None: the card's own), which
    has "mm_sm90" on Hopper alone, and no kernel with more shared memory than that architecture; resident: for every
    kernel how many of its clusters are on the card at once, 0 where it cannot run (None: `resident_clusters`);
    fp8: Hopper multiplies it by wgmma alone (its mma.sp would convert to 16 bits); fast_accum: Hopper's fp8 sums stay
    in the tensor cores for all of K, which keep some 14 bits of them; images: x is the windows of images, which
    "decode" cannot read; aligned then says whether TMA can.
    """
    code = capability if code is None else code
    room = 1024 * min(SHARED[max(known for known in SHARED if known <= arch)] for arch in (capability, code))
    found = []
    for number, kernel in enumerate(kernels):
        if kernel.family not in FAMILIES[op] or kernel.shared_bytes > room:
            continue
        if kernel.family.endswith("_sm90") and not (capability == code == 90 and aligned):
            continue
        if fp8 and capability == 90 and (kernel.family != "mm_sm90" or kernel.accurate == fast_accum):
            continue
        if images and kernel.family == "decode":
            continue
        if kernel.family != "decode":
            clusters = resident_clusters(processors, kernel.cluster) if resident is None else resident[number]
            found += _mm(number, kernel, m, n, k_blocks, clusters) if clusters else []
        elif m <= kernel.tokens:
            found.append(_decode(number, kernel, n, k_blocks, processors))
    return sorted(found, key=lambda choice: choice.cost)


def resident_clusters(processors: int, cluster: int) -> int:
    """How many clusters, one block on a processor, are on any card of so many processors at once; at least one.

    The fewest: of full GPCs and one that has the rest. Real ones may waste less: an H100's 132 processors have room for
    29 to 32 clusters of four, never for 33, and what is more than fits runs after the others.
    """
    full, rest = divmod(processors, GPC)
    return max(1, full * (GPC // cluster) + rest // cluster)


def why_not_fp8(card: int, code: int) -> str | None:
    """Why a card (90: Hopper) that runs code of an architecture has no products of float8_e4m3fn, or None where it has.

    Code that would only imitate them is compiled to a trap (csrc/device/mma.h).
    """
    if card < 89:
        return "float8_e4m3fn needs compute capability 8.9"
    if 100 <= card < 120:
        return "compute capability 10 multiplies float8_e4m3fn by tcgen05 alone, which these kernels do not use"
    needs = "90a" if card == 90 else "89" if card < 90 else "89 or 120"
    if code == 90 if card == 90 else code == 89 or code >= 120:
        return None
    return (
        f"float8_e4m3fn on compute capability {card / 10} needs kernels that were built for {needs}, and of this build "
        f"it runs those for {code}: rebuild with SPARSEKERN_CUDA_ARCHS={needs.split()[-1]}"
    )


def _decode(number: int, kernel: Kernel, n: int, k_blocks: int, processors: int) -> Choice:
    """One stream of the weight's blocks in equal shares; a share is at least a block for every warp."""
    tiles = -(-n // BLOCK_ROWS)
    units, warps = tiles * k_blocks, kernel.threads // 32
    workers = max(1, min(processors, units // warps))
    block = BLOCK_ROWS * 72 / MEMORY + kernel.tokens * 128 / CACHE  # 64 rows of 64 bytes and their metadata
    in_flight = min(1.0, warps / 8)  # fewer warps keep less on its way
    cost = -(-units // workers) * block / in_flight + 20 * kernel.tokens + LAUNCH
    return Choice(number, workers, tiles, tiles, cost)


def _mm(number: int, kernel: Kernel, m: int, n: int, k_blocks: int, workers: int) -> list[Choice]:
    """Whole tiles in turns; or those of the last, unfilled turn cut along K, so that all workers share them.

    workers: as many as are on the card at once. Processors in which no cluster fits stay idle, and cost the time in
    which the others do their share.
    """
    token_tiles = -(-m // kernel.tokens)
    tiles, rows = -(-n // kernel.rows) * token_tiles, kernel.rows // kernel.cluster
    # Bytes of a block of K: fragments, and the tokens' slice, which a cluster reads once.
    weights = rows * 72 / (MEMORY if token_tiles == 1 else CACHE)
    brought = weights + kernel.tokens * 128 / kernel.cluster / CACHE
    block = max(rows * kernel.tokens / 64 / RATES[kernel.family], brought)
    finish = rows * kernel.tokens / 16

    def choice(workers: int, streamed: int) -> Choice:
        whole = -(-(tiles - streamed) // workers)
        cost = whole * (k_blocks * block + finish) + LAUNCH
        if streamed:  # partial sums are written and read again
            cost += streamed * k_blocks / workers * block + finish + 2 * rows * kernel.tokens * 4 / CACHE
        return Choice(number, workers, streamed, tiles, cost)

    rest = tiles % workers
    found = [choice(workers, 0)]
    for streamed in {rest, min(tiles, rest + workers)} - {0}:
        # Shares of less than four blocks of K are not worth their sums.
        sharing = min(workers, max(1, streamed * k_blocks // 4)) if streamed == tiles else workers
        if streamed * k_blocks >= 4 * sharing:
            found.append(choice(sharing, streamed))
    return found
