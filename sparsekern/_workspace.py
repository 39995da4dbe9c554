"""Memory in which the thread blocks of a GPU kernel leave their parts of a sum, and the counters by which they meet."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ._ext import capturing, stream_of


def workspace(x: Tensor, words: int, counters: int, stream: int | None = None) -> tuple[Tensor, Tensor]:
    """`words` floats, and int32 counters that every launch leaves at zero: one set for each stream, grown when needed.

    A call belongs to one stream, so calls that share a set follow each other. Graphs that were captured on one stream
    may be replayed beside each other, so a call that is captured gets a set of its own: floats from its graph's memory,
    and counters from a reserve.
    """
    if capturing(x):
        zeros = _reserve(x.device).take(counters)
        return x.new_empty(words, dtype=torch.float32), zeros
    return _workspace(x.device, stream_of(x) if stream is None else stream).get(words, counters)


class _Reserve:
    """Counters of captured calls, zero already: zeros of a graph's own would be a node that every replay has to run.

    What a captured call has taken is never given back, since nothing tells when its graph is gone: four bytes for a
    tile of its output. Calls that are not captured fill the reserve up; where it is empty, the graph writes the zeros.
    """

    SIZE = 1 << 18

    def __init__(self, device: torch.device) -> None:
        self.device, self.taken = device, 0
        self.filled: list[Tensor] = []

    def fill(self) -> None:
        if not self.filled or self.taken > self.SIZE // 2:
            self.filled.append(torch.zeros(self.SIZE, dtype=torch.int32, device=self.device))
            self.taken = 0

    def take(self, count: int) -> Tensor:
        if not self.filled or self.taken + count > self.SIZE:
            return torch.zeros(count, dtype=torch.int32, device=self.device)
        first, self.taken = self.taken, self.taken + count
        return self.filled[-1][first : self.taken]


class _Workspace:
    """Outgrown memory goes back to torch, whose allocator lets only later work of the same stream have it."""

    def __init__(self, device: torch.device) -> None:
        self.reserve = _reserve(device)
        self.partials = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(4096, dtype=torch.int32, device=device)

    def get(self, words: int, counters: int) -> tuple[Tensor, Tensor]:
        self.reserve.fill()
        if words > self.partials.numel():
            self.partials = self.partials.new_empty(words)
        if counters > self.counters.numel():
            self.counters = self.counters.new_zeros(2 * counters)
        return self.partials, self.counters


@cache
def _reserve(device: torch.device) -> _Reserve:
    return _Reserve(device)


@cache
def _workspace(device: torch.device, stream: int) -> _Workspace:
    return _Workspace(device)
