"""What is measured on a GPU, and how: python -m bench.run --device cuda. Cases and bars as in cases.py.

Every variant is captured in a CUDA graph, so that Python's share is not measured, and replayed in turns with the
others, the second-level cache written over before each. Results are compared before any time is taken. A variant that
is a list of calls, one for each copy of a weight, is captured whole: so the launch of the graph does not count, and
copies that together exceed the cache are always read from device memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern._library import MM, MM_T, SDDMM
from sparsekern.bsr import Bsr
from sparsekern.conv import weight_of
from sparsekern.nn import SparseConv2d
from sparsekern.testing import Timing, random_weight, timing

from .cases import Bar, Case, Variants, _gate

DEVICE = "cuda"
DTYPE = torch.bfloat16


def run(case: Case, repeats: int) -> dict[str, Any]:
    """One row. A variant that fails its gate, or at all, is named with its reason; the others are timed.

    Beside "sparsekern", which is what a user gets, "sparsekern ..." are other ways of ours to do the same: `best` names
    the fastest of all of them, `ratio` and the bars are those of "sparsekern".
    """
    row: dict[str, Any] = {"group": case.group, "params": case.params, "threads": case.threads, "note": case.note}
    variants = case.make()
    if case.gate is not None:
        try:
            case.gate(variants)
        except AssertionError as reason:
            return row | {"error": str(reason)}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    failed: dict[str, str] = {}
    for name, variant in variants.items():
        calls = variant if isinstance(variant, list) else [variant]
        try:
            graphs[name] = _captured(calls), len(calls)
        except Exception as reason:  # it may be a peer that cannot run this at all
            failed[name] = f"{type(reason).__name__}: {reason}"[:300]
            torch.cuda.synchronize()
    if failed:
        row["failed"] = failed
    if "sparsekern" not in graphs:
        return row | {"error": failed["sparsekern"]}
    timings = measure(graphs, repeats)
    row["ms"] = {
        name: {"median": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}
        for name, t in timings.items()
    }
    ours, median = timings["sparsekern"].median, {name: t.median for name, t in timings.items()}
    row["best"] = min((name for name in median if name.startswith("sparsekern")), key=median.__getitem__)
    row["ratio"] = {name: t / ours for name, t in median.items() if not name.startswith("sparsekern")}
    row["bars"] = [
        {"baseline": bar.baseline, "bar": bar.ratio, "ratio": row["ratio"][bar.baseline],
         "met": row["ratio"][bar.baseline] >= bar.ratio}
        for bar in case.bars if bar.baseline in row["ratio"]
    ]  # fmt: skip
    return row


def measure(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int) -> dict[str, Timing]:
    """Seconds a call on the device: graphs of so many calls in random order, between events, with cold caches."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    order, rng = list(graphs), random.Random(0)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in order}
    for turn in range(-3, repeats):
        rng.shuffle(order)
        for name in order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            graphs[name][0].replay()
            end.record()
            if turn >= 0:
                events[name].append((begin, end))
        torch.cuda.synchronize()
    return {
        name: timing([b.elapsed_time(e) * 1e-3 / graphs[name][1] for b, e in pairs]) for name, pairs in events.items()
    }


def _captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph


def _weight(n: int, k: int, block: int, sparsity: float) -> Tensor:
    return random_weight("bsr", n, k, torch.float32, 1 - sparsity, block).to(DEVICE, DTYPE)


def _tokens(m: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def _linear(n: int, k: int, m: int, block: int, sparsity: float) -> Variants:
    """Ours, cuBLAS, and torch's own block-sparse kernel."""
    weight, x = _weight(n, k, block, sparsity), _tokens(m, k)
    w, own = sk.to_block_sparse(weight, block), weight.to_sparse_bsr((block, block))
    return {
        "sparsekern": lambda: sk.linear(x, w, backend="triton"),
        "dense": lambda: F.linear(x, weight),
        "torch BSR": lambda: F.linear(x, own),
    }


def bsr_mm() -> Iterator[Case]:
    """Many tokens: 0.85 (blocks of 128) and 0.6 (64) of cuBLAS for each multiplication that is left."""
    for n, k in ((4096, 4096), (14336, 4096)):
        for block, share in ((128, 0.85), (64, 0.6)):
            for m in (2048, 8192):
                for sparsity in (0.5, 0.75, 0.9):
                    size = (n, k, m, block, sparsity)
                    bars = (Bar("dense", round(share / (1 - sparsity), 2)), Bar("torch BSR", 1.2))
                    params = {"shape": f"{n}x{k}", "block": block, "M": m, "sparsity": sparsity, "dtype": "bfloat16"}
                    yield Case("gpu_bsr_mm", params, bars, lambda size=size: _linear(*size), gate=_gate(1e-2))


def bsr_decode() -> Iterator[Case]:
    """Few tokens, a weight larger than the second-level cache: bytes only."""
    for m in (1, 4, 16):
        size = (28672, 8192, m, 64, 0.9)
        params = {"shape": "28672x8192", "block": 64, "M": m, "sparsity": 0.9, "dtype": "bfloat16"}
        yield Case("gpu_bsr_decode", params, (Bar("dense", 5.0),), lambda size=size: _linear(*size), gate=_gate(1e-2))


def bsr_training() -> Iterator[Case]:
    """The three products of a step: Y, dX, and dW, which is sparse here and dense there."""
    for block in (128, 64):
        layouts: list[Bsr] = []

        def make(block: int = block, layouts: list[Bsr] = layouts) -> Variants:
            n = k = m = 4096
            weight, x, dy = _weight(n, k, block, 0.75), _tokens(m, k), _tokens(m, n, 2)
            w = sk.to_block_sparse(weight, block).packed
            layouts[:] = [w]
            return {
                "sparsekern": lambda: (
                    MM["bsr"](*w.parts, x, None, "none", "triton"),
                    MM_T["bsr"](*w.parts, dy, "triton"),
                    SDDMM["bsr"](*w.parts, dy, x, "triton"),
                ),
                "dense": lambda: (F.linear(x, weight), dy @ weight, dy.t() @ x),
            }

        def gate(variants: Variants, layouts: list[Bsr] = layouts) -> None:
            ours, dense = variants["sparsekern"](), variants["dense"]()
            right = (*dense[:2], layouts[0].sample(dense[2]))
            for name, mine, theirs in zip(("Y", "dX", "dW"), ours, right, strict=True):
                _gate(1e-2)({name: lambda t=mine: t, "dense": lambda t=theirs: t})

        params = {"shape": "4096x4096", "block": block, "M": 4096, "sparsity": 0.75, "dtype": "bfloat16"}
        bars = (Bar("dense", round(0.7 / 0.25, 2)),) if block == 128 else ()
        yield Case("gpu_bsr_training", params, bars, make, gate=gate)


def bsr_conv() -> Iterator[Case]:
    """3x3, 256 to 256 channels, a batch of 32, channels_last, against cuDNN."""
    for side in (28, 14):
        for block in (64, 128):

            def make(side: int = side, block: int = block) -> Variants:
                dense = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, dtype=DTYPE, device=DEVICE)
                matrix = _weight(256, 9 * 256, block, 0.75)
                dense.weight.data.copy_(weight_of(matrix, (3, 3), "rsc"))
                dense = dense.to(memory_format=torch.channels_last).requires_grad_(False)
                sparse = SparseConv2d.from_dense(dense, format="bsr", block_size=block, order="rsc")
                sparse.requires_grad_(False)
                x = torch.randn(32, 256, side, side, generator=torch.Generator().manual_seed(1))
                x = x.to(DEVICE, DTYPE).to(memory_format=torch.channels_last)
                return {"sparsekern": lambda: sparse(x), "dense": lambda: dense(x)}

            params = {"convolution": "3x3, 256→256", "side": side, "batch": 32, "block": block, "sparsity": 0.75}
            yield Case("gpu_bsr_conv", params, (Bar("dense", 2.0),), make, gate=_gate(1e-2))


def groups() -> dict[str, Callable[[], Iterator[Case]]]:
    """All of them, in the order of what users gain."""
    from . import gpu_sp24, gpu_stream  # they use this module's words

    return {
        "gpu_ceilings": gpu_sp24.ceilings,
        "gpu_prefill": gpu_sp24.prefill,
        "gpu_decode": gpu_sp24.decode,
        "gpu_bsr_mm": bsr_mm,
        "gpu_bsr_decode": bsr_decode,
        "gpu_middle": gpu_sp24.middle,
        "gpu_fp8": gpu_sp24.prefill_fp8,
        "gpu_bitmap": gpu_stream.bitmap,
        "gpu_csr": gpu_stream.csr,
        "gpu_csr_decode": gpu_stream.csr_decode,
        "gpu_sp24_conv": gpu_sp24.conv,
        "gpu_bsr_conv": bsr_conv,
        "gpu_csr_conv": gpu_stream.csr_conv,
        "gpu_bsr_training": bsr_training,
    }


GROUPS = groups()
