"""How a Triton kernel of bsr is built for a call: a pure function of shapes, type and card, and what tuning may try.

The card's limits: shared memory of a thread block, 64 K registers, 2048 threads. A step brings TOKENS x DEPTH of the
activations and DEPTH x OUT of the weight; its bytes for each multiply-add fall with both, and the accumulators
(TOKENS x OUT float32) have to stay in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# KiB of shared memory that a thread block may have, by compute capability times ten.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SMALLEST, LARGEST = 16, 128  # sides of blocks
PRECISIONS = ("ieee", "tf32", "tf32x3")
OPS = ("mm", "mm_t", "sddmm")


@dataclass(frozen=True)
class Config:
    """tokens: of a tile (sddmm: of a step); depth: of a step along a block's inner side; warps, stages: Triton's.

    tma: loads through tensor maps; group: tiles of tokens that all work passes over before the next; most: blocks of
    an item, 0 for whole rows; parts: shares of the tokens (sddmm); resident: programs a multiprocessor, 0: one a tile.
    """

    tokens: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    group: int = 16
    most: int = 0
    parts: int = 1
    resident: int = 0


def shared_limit(cc: int) -> int:
    """Bytes of shared memory that a thread block may have on compute capability `cc` (80, 90, ...)."""
    known = max((known for known in SHARED if known <= cc), default=80)
    return SHARED[known] * 1024


def sides(op: str, block: tuple[int, int]) -> tuple[int, int]:
    """(outer, inner) side of a block: the one that is kept and the one that is summed over."""
    return (block[1], block[0]) if op == "mm_t" else block


def shared_bytes(op: str, config: Config, block: tuple[int, int], item: int) -> int:
    """What the stages of the loop take."""
    outer, inner = sides(op, block)
    if op == "sddmm":
        return config.stages * config.tokens * (outer + inner) * item
    return config.stages * config.depth * (config.tokens + outer) * item


def why_illegal(op: str, config: Config, block: tuple[int, int], dtype: torch.dtype, cc: int) -> str | None:
    """Why a configuration cannot be built, or None where it can."""
    least = 32 if dtype.itemsize == 1 else 16
    outer, inner = sides(op, block)
    steps = config.tokens if op == "sddmm" else config.depth
    powers = (config.tokens, config.depth, config.warps, config.group)
    if any(p < 1 or p & (p - 1) for p in powers):
        return f"tokens, depth, warps and group must be powers of two, got {powers}"
    if steps < least or (op != "sddmm" and inner % config.depth):
        return f"a step of {steps} is below {least} or does not divide the block's {inner}"
    if config.tokens < 16 or config.tokens > 256 or not 1 <= config.warps <= 16 or not 1 <= config.stages <= 8:
        return f"out of range: {config}"
    if config.tma and cc < 90:
        return "tensor maps need compute capability 9.0"
    accumulators = outer * inner if op == "sddmm" else config.tokens * outer
    if accumulators > 160 * 32 * config.warps:
        return f"{accumulators} sums do not fit in the registers of {config.warps} warps"
    need = shared_bytes(op, config, block, dtype.itemsize)
    if need > shared_limit(cc) - 1024:
        return f"{need} bytes of shared memory, there are {shared_limit(cc)}"
    return None


def config(
    op: str,
    m: int,
    n: int,
    k: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    density: float,
    cc: int,
    sms: int = 132,
    precision: str = "tf32x3",
) -> Config:
    """The configuration of a call with m tokens and a weight [n, k], unless a better one was measured.

    dtype: of the activations; density: the share of blocks stored; cc: compute capability times ten; sms: how many
    multiprocessors; precision: of float32 products.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    made = _sddmm(m, block, dtype, precision) if op == "sddmm" else _mm(op, m, block, dtype, precision, cc)
    made = _fitting(
        op, replace(made, tma=cc // 10 in (9, 10) and dtype.itemsize == 2 and made.tokens >= 64), block, dtype, cc
    )
    stored = density * -(-n // block[0]) * -(-k // block[1])
    if op == "sddmm":
        return replace(made, parts=_parts(stored, m, made.tokens, sms))
    rows, inner = (-(-n // block[0]), k) if op == "mm" else (-(-k // block[1]), n)
    tiles = -(-max(m, 1) // made.tokens)
    # Activations of a group of tiles: half of a 50 MB second cache.
    group = _power(max(1, min(tiles, (24 << 20) // max(made.tokens * inner * dtype.itemsize, 1))))
    resident = min(
        max(1, shared_limit(cc) // max(shared_bytes(op, made, block, dtype.itemsize), 1)), max(1, 32 // made.warps), 4
    )
    return replace(made, group=group, most=_most(stored, rows, tiles, sms * resident), resident=resident)


def beside_a_residual(made: Config, outer: int) -> Config:
    """The same with at most 128 x 128 sums: residuals and their addresses take registers, too."""
    return replace(made, tokens=min(made.tokens, max(16, 128 * 128 // outer)))


def candidates(
    op: str,
    m: int,
    n: int,
    k: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    density: float,
    cc: int,
    sms: int = 132,
    precision: str = "tf32x3",
) -> Iterator[Config]:
    """What tuning may try for a call, the heuristic's own choice first; every one is legal."""
    own = config(op, m, n, k, block, dtype, density, cc, sms, precision)
    seen = set()
    launches = ((own.warps, own.stages), (4, own.stages), (8, own.stages), (own.warps, own.stages - 1))
    for tokens in dict.fromkeys((own.tokens, own.tokens // 2, own.tokens * 2)):
        for depth in dict.fromkeys((own.depth, own.depth // 2, own.depth * 2)):
            for warps, stages in launches:
                for tma in dict.fromkeys((own.tma, not own.tma)):
                    for resident in dict.fromkeys((own.resident, 0)):
                        made = replace(
                            own, tokens=tokens, depth=depth, warps=warps, stages=stages, tma=tma, resident=resident
                        )
                        if made not in seen and why_illegal(op, made, block, dtype, cc) is None:
                            seen.add(made)
                            yield made


def _mm(op: str, m: int, block: tuple[int, int], dtype: torch.dtype, precision: str, cc: int) -> Config:
    outer, inner = sides(op, block)
    if dtype == torch.float32:
        if precision == "ieee":  # no tensor cores: small tiles, or the accumulators spill
            return Config(tokens=16 if m <= 16 else 32 if outer > 64 else 64, depth=16, warps=4, stages=2)
        # Three products hold their operands twice, as large and as small parts: 64 x 128 sums leave four warps no room.
        warps = 8 if m > 16 and outer >= 128 and inner >= 32 else 4
        return Config(tokens=16 if m <= 16 else 64, depth=min(inner, 32), warps=warps, stages=3)
    depth = min(inner, 128 // dtype.itemsize)
    if m <= 16:  # bytes: many loads on their way
        return Config(tokens=16, depth=min(inner, 128), warps=4, stages=5)
    if m <= 32:
        return Config(tokens=32, depth=depth, warps=4, stages=5)
    if m <= 64:
        return Config(tokens=64, depth=depth, warps=4, stages=4)
    if m <= 512 or outer < 64:
        return Config(tokens=128, depth=depth, warps=4 if outer < 128 else 8, stages=4)
    # mma.sync keeps operands in registers, too: 256 tokens are for the instructions that read shared memory.
    wide = outer >= 128 and cc // 10 in (9, 10)
    return Config(tokens=256 if wide else 128, depth=depth, warps=8 if outer >= 128 else 4, stages=4)


def _sddmm(m: int, block: tuple[int, int], dtype: torch.dtype, precision: str) -> Config:
    size = block[0] * block[1]
    warps = 8 if size >= 128 * 128 else 4
    if dtype == torch.float32:
        short = precision == "ieee" or (precision == "tf32x3" and size >= 128 * 128)  # operands held twice
        return Config(tokens=16 if short else 32, depth=16, warps=8 if size > 64 * 64 else 4, stages=2)
    return Config(tokens=32 if m <= 32 else 64, depth=16, warps=warps, stages=4)


def _fitting(op: str, made: Config, block: tuple[int, int], dtype: torch.dtype, cc: int) -> Config:
    """Fewer stages, then shorter steps, then fewer tokens, until the card can hold it."""
    least = 32 if dtype.itemsize == 1 else 16
    while why_illegal(op, made, block, dtype, cc) is not None:
        if made.stages > 3:
            made = replace(made, stages=made.stages - 1)
        elif op != "sddmm" and made.depth > 2 * least:
            made = replace(made, depth=made.depth // 2)
        elif made.tokens > 64 or (op == "sddmm" and made.tokens > least):
            made = replace(made, tokens=made.tokens // 2)
        elif made.stages > 1:
            made = replace(made, stages=made.stages - 1)
        elif made.warps < 16:
            made = replace(made, warps=made.warps * 2)
        else:
            raise ValueError(f"no configuration of {op} for blocks {block} of {dtype} fits on compute capability {cc}")
    return made


def _most(stored: float, rows: int, tiles: int, programs: int) -> int:
    """Blocks of an item: a power of two (few different lists); all programs have work and none has much more."""
    mean = stored / max(rows, 1)
    if rows * tiles >= 2 * programs:
        return _power(int(4 * mean)) * 2  # only rows far longer than others are cut
    return max(1, _power(int(stored * tiles / programs)))


def _parts(stored: float, m: int, tokens: int, sms: int) -> int:
    """Shares of the tokens, so that few blocks still give every multiprocessor work."""
    steps = -(-max(m, 1) // tokens)
    return int(max(1, min(steps // 4, 2 * sms // max(stored, 1.0), 64)))


def _power(value: int) -> int:
    """The largest power of two that is at most `value`, at least 1."""
    return 1 << max(value, 1).bit_length() - 1
