"""Memory in which the thread blocks of a GPU kernel leave their parts of a sum, and the counters by which they meet."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ._ext import capturing, stream_of


def workspace(x: Tensor, words: int, counters: int, stream: int | None = None) -> tuple[Tensor, Tensor]:
    """`words` floats, and int32 counters that every launch leaves at zero: one set for each stream, grown when needed.

    A call belongs to one stream, so calls that share a set follow each other. Graphs that were captured on one stream
    may be replayed beside each other, so a call that is captured gets a set of its own from its graph's memory, whose
    zeros are written by the graph.
    """
    if capturing(x):
        return x.new_empty(words, dtype=torch.float32), x.new_zeros(counters, dtype=torch.int32)
    return _workspace(x.device, stream_of(x) if stream is None else stream).get(words, counters)


class _Workspace:
    """Outgrown memory goes back to torch, whose allocator lets only later work of the same stream have it."""

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(4096, dtype=torch.int32, device=device)

    def get(self, words: int, counters: int) -> tuple[Tensor, Tensor]:
        if words > self.partials.numel():
            self.partials = self.partials.new_empty(words)
        if counters > self.counters.numel():
            self.counters = self.counters.new_zeros(2 * counters)
        return self.partials, self.counters


@cache
def _workspace(device: torch.device, stream: int) -> _Workspace:
    return _Workspace(device)
