"""What the cases on a GPU are made of: random weights and activations, made there, copies of them, a gate.

A weight is kept while cases follow that share it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekern import sp24
from sparsekern.layout import Layout

DEVICE = "cuda"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Random normal numbers, the same every time."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=rng, device=DEVICE).to(dtype)


@lru_cache(maxsize=1)
def weight(n: int, k: int, dtype: torch.dtype, density: float, block: int = 1) -> Tensor:
    """W[N, K] with this share of its blocks (1: of its entries), at random places."""
    kept = torch.rand(-(-n // block), -(-k // block), generator=_places(), device=DEVICE) < density
    if block > 1:
        kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    dense = normal(n, k, dtype=dtype, seed=0)
    return dense.masked_fill_(dense == 0, 1).masked_fill_(~kept, 0)


@lru_cache(maxsize=1)
def weight24(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, sp24.Sp24]:
    """The larger two of every four random normal numbers: dense, and packed. int8: whole numbers up to 100."""
    dense = normal(n, k, seed=0)
    dense = (dense * 25).round().clamp(-100, 100).to(dtype) if dtype == torch.int8 else dense.to(dtype)
    packed = sp24.pack(dense, prune=True)
    return packed.unpack(), packed


def _places() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(7)


def forget() -> None:
    """Frees the weights that are kept."""
    weight.cache_clear()
    weight24.cache_clear()


def copies_of(weight_bytes: int) -> int:
    """Copies of a weight that together exceed three second-level caches."""
    return max(1, min(48, -(-3 * cache_bytes() // max(1, weight_bytes))))


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def copied(layout: Layout) -> Any:
    """The layout in other memory."""
    return layout.map(lambda t: t.clone())


def copies(moved: int, count: int) -> list[Callable[[], Tensor]]:
    """So many copies from one memory to another, of which each reads and writes `moved` bytes in all."""
    size = max(1, moved // 2)
    pairs = [tuple(torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)) for _ in range(count)]
    for given, _ in pairs:
        given.random_()
    return [lambda given=given, to=to: to.copy_(given) for given, to in pairs]


def first_of(gate: Callable[[Any], None]) -> Callable[[dict[str, Any]], None]:
    """The gate on the first copy's calls; of a peer that cannot run the case, and of a copy, it is not asked."""

    def check(variants: dict[str, Any]) -> None:
        able = {}
        for name, calls in variants.items():
            call = calls[0] if isinstance(calls, list) else calls
            if name == "copy":
                continue
            try:
                call()
                able[name] = call
            except Exception:
                if name == "sparsekern":
                    raise
        gate(able)

    return check
