"""What is measured on a GPU, and how: python -m bench.run --device cuda. Cases and bars as in cases.py.

Every variant is captured in a CUDA graph, so that Python's share is not measured, and replayed in turns with the
others, the second-level cache written over before each. Results are compared before any time is taken. A variant that
is a list of calls, one for each copy of a weight, is captured whole: so the launch of the graph does not count, and
copies that together exceed the cache are always read from device memory.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsekern.testing import Timing, timing

from . import gpu_bsr, gpu_calls, gpu_data, gpu_sp24, gpu_stream
from .cases import Case

Graph = tuple[Any, int]  # a captured torch.cuda.CUDAGraph (or Eager), and how many calls it holds


def run(case: Case, repeats: int) -> dict[str, Any]:
    """One row. A case that cannot be run has an "error" instead of times; so has one that fails its gate."""
    row: dict[str, Any] = {"group": case.group, "params": case.params, "threads": case.threads, "note": case.note}
    try:
        return row | (launches(case, repeats) if "launch" in case.tags else products(case, repeats))
    except Exception as reason:  # the cases after it may well run
        return row | {"error": _words(reason)}
    finally:
        gc.collect()
        if not broken():
            torch.cuda.empty_cache()


def broken() -> bool:
    """Whether a kernel's fault has ended this process's use of the GPU."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def products(case: Case, repeats: int) -> dict[str, Any]:
    """Times on the device. A peer that fails is named with its reason; the others are timed, and those that cannot be
    captured one call after the other ("uncaptured", with the reason).

    Beside "sparsekern", which is what a user gets, "sparsekern ..." are other ways of ours to do the same: `best` names
    the fastest of all of them, `ratio` and the bars are those of "sparsekern".
    """
    variants = case.make()
    if case.gate is not None:
        case.gate(variants)
    graphs: dict[str, Graph] = {}
    failed: dict[str, str] = {}
    uncaptured: dict[str, str] = {}
    for name, variant in variants.items():
        calls = variant if isinstance(variant, list) else [variant]
        try:
            graphs[name] = captured(calls), len(calls)
        except Exception as reason:  # it may be a peer that cannot run this at all, or not in a graph
            failed[name] = _words(reason)
            if not name.startswith("sparsekern") and runs(calls):
                graphs[name], uncaptured[name] = (Eager(calls), len(calls)), failed.pop(name)
    row: dict[str, Any] = {key: found for key, found in (("failed", failed), ("uncaptured", uncaptured)) if found}
    if "sparsekern" not in graphs:
        return row | {"error": failed["sparsekern"]}
    timings = measure(graphs, repeats)
    median = {name: t.median for name, t in timings.items()}
    row["best"] = min((name for name in median if name.startswith("sparsekern")), key=median.__getitem__)
    return row | _results(case, timings)


class Eager:
    """Stands for the graph of calls that cannot be captured. The cache is written over while they are launched."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()


def runs(calls: list[Callable[[], Any]]) -> bool:
    """Whether the calls work outside of a graph."""
    try:
        torch.cuda.synchronize()
        Eager(calls).replay()
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def launches(case: Case, repeats: int) -> dict[str, Any]:
    """Times on the host: what a warm call takes there until its work is launched, the device idle or not."""
    variants, count = case.make(), 100
    if case.gate is not None:
        case.gate(variants)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-3, max(repeats, 10)):
        for name, call in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(count):  # fewer than the device's queue holds
                call()
            spent = time.perf_counter_ns() - start
            if turn >= 0:
                times[name].append(spent * 1e-9 / count)
    torch.cuda.synchronize()
    return _results(case, {name: timing(spent) for name, spent in times.items()})


def _results(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    ours = timings["sparsekern"].median
    ratio = {name: t.median / ours for name, t in timings.items() if not name.startswith("sparsekern")}
    against = ratio | {f"{us:g} µs": us * 1e-6 / ours for us in case.microseconds}
    bars = [(bar.baseline, bar.ratio) for bar in case.bars] + [(f"{us:g} µs", 1.0) for us in case.microseconds]
    return {
        "ms": {
            name: {"median": t.median * 1e3, "p20": t.p20 * 1e3, "p80": t.p80 * 1e3, "n": t.n}
            for name, t in timings.items()
        },
        "ratio": ratio,
        "bars": [
            {"baseline": name, "bar": bar, "ratio": against[name], "met": against[name] >= bar}
            for name, bar in bars if name in against
        ],
    }  # fmt: skip


def _words(reason: Exception) -> str:
    return str(reason)[:1000] if isinstance(reason, AssertionError) else f"{type(reason).__name__}: {reason}"[:300]


def measure(graphs: dict[str, Graph], repeats: int) -> dict[str, Timing]:
    """Seconds a call on the device: graphs of so many calls in random order, between events, with cold caches."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device=gpu_data.DEVICE)
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


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
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


# In the order of what users gain.
GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "gpu_ceilings": gpu_sp24.ceilings,
    "gpu_prefill": gpu_sp24.prefill,
    "gpu_decode": gpu_sp24.decode,
    "gpu_bsr_mm": gpu_bsr.mm,
    "gpu_bsr_decode": gpu_bsr.decode,
    "gpu_middle": gpu_sp24.middle,
    "gpu_fp8": gpu_sp24.prefill_fp8,
    "gpu_types": gpu_sp24.types,
    "gpu_bitmap": gpu_stream.bitmap,
    "gpu_csr": gpu_stream.csr,
    "gpu_csr_decode": gpu_stream.csr_decode,
    "gpu_launch": gpu_calls.launch,
    "gpu_pack": gpu_calls.pack,
    "gpu_sp24_conv": gpu_sp24.conv,
    "gpu_bsr_conv": gpu_bsr.conv,
    "gpu_csr_conv": gpu_stream.csr_conv,
    "gpu_sp24_gradients": gpu_sp24.gradients,
    "gpu_bsr_training": gpu_bsr.training,
    "gpu_rates": gpu_sp24.rates,
    "gpu_bsr_configurations": gpu_bsr.configurations,
}
