"""What runs on an NVIDIA GPU, against dense and the peers: python -m bench.gpu [GROUP ...] --out FILE [--seconds N].

Every variant is checked before it is timed. A timed sample is a CUDA graph of several calls over rotating copies of the
weight, together larger than three second-level caches, so each call finds its weight in device memory; variants take
turns, and a row holds each one's median and spread in microseconds a call. Random normal data. Of sp24 every legal
choice of kernel is timed ("searched") beside the heuristic's; cuSPARSELt likewise, default and searched. A variant that
fails is a row with its error, and stops nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern import _ext
from sparsekern.sp24 import config, fragments
from sparsekern.sp24 import cuda as sp24_cuda
from sparsekern.testing import random_weight

from . import report

Run = Callable[[int], Tensor]  # takes the number of the copy
FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    """One shape. `make` gives the variants, ours first; `bytes` are those that a call must move at least."""

    group: str
    params: dict[str, Any]
    make: Callable[[int], dict[str, Run]]
    weight_bytes: int
    flops: float
    bars: dict[str, float] = field(default_factory=dict)
    tolerance: float = 2e-2


def copies_for(weight_bytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-3 * cache // max(1, weight_bytes))))


def graph_of(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    """All copies' calls, captured after a warm-up on the same side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(copies):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(copies):
            run(i)
    return graph


def timed(graphs: dict[str, torch.cuda.CUDAGraph], copies: int, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds a call: graphs in turn, each sample between two events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, samples.values())) < 5:
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples[name].append(start.elapsed_time(stop) * 1e3 / copies)
    return {
        name: {
            "median": statistics.median(s),
            "p20": sorted(s)[len(s) // 5],
            "p80": sorted(s)[-1 - len(s) // 5],
            "n": len(s),
        }
        for name, s in samples.items()
    }


def measure(case: Case, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"group": case.group, "params": case.params, "errors": {}}
    copies = copies_for(case.weight_bytes)
    variants = case.make(copies)
    want = variants.pop("reference")(0).float()
    graphs = {}
    for name, run in list(variants.items()):
        try:
            got = run(0).float()
            error = float((got - want).norm() / want.norm())
            row["errors"][name] = error
            if not error < case.tolerance:
                raise AssertionError(f"relative error {error:.2e}, allowed {case.tolerance}")
            graphs[name] = graph_of(run, copies)
        except Exception as reason:  # a row says what failed; the others go on
            row.setdefault("failed", {})[name] = f"{type(reason).__name__}: {reason}"[:400]
            torch.cuda.synchronize()
    if not graphs:
        return row
    row["us"] = timed(graphs, copies, seconds)
    median = {name: t["median"] for name, t in row["us"].items()}
    ours = [name for name in median if name.startswith("sparsekern")]
    if ours:
        best = min(ours, key=lambda name: median[name])
        row["best"] = best
        row["ratio"] = {name: t / median[best] for name, t in median.items() if not name.startswith("sparsekern")}
        row["tflops"] = case.flops / median[best] / 1e6
        row["gbytes"] = case.weight_bytes / median[best] / 1e3
        row["bars"] = {
            name: {"bar": bar, "ratio": row["ratio"][name], "met": row["ratio"][name] >= bar}
            for name, bar in case.bars.items()
            if name in row["ratio"]
        }
    return row


# sp24 -------------------------------------------------------------------------------------------------------------


def sp24_case(group: str, m: int, n: int, k: int, dtype: torch.dtype, bars: dict[str, float]) -> Case:
    def make(copies: int) -> dict[str, Run]:
        dense = random_weight("sp24", n, k, dtype=torch.float32, density=0.5, seed=0).cuda()
        x = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        if dtype == FP8:
            return _fp8_variants(dense, x, copies)
        dense, x = dense.to(dtype), x.to(dtype)
        packed = [sk.to_sparse_semi_structured(dense).packed for _ in range(copies)]
        weights = [dense.clone() for _ in range(copies)]
        variants: dict[str, Run] = {"reference": lambda i: F.linear(x.float(), dense.float())}
        variants |= _choices(packed, x, {})
        variants["dense"] = lambda i: F.linear(x, weights[i])
        variants |= _cusparselt(weights, x, m)
        return variants

    stored = n * k * dtype.itemsize * 9 // 16 if dtype.itemsize == 2 else n * k * 10 // 16
    shown = {"M": m, "shape": f"{n}x{k}", "dtype": str(dtype).removeprefix("torch.")}
    tolerance = 2e-2 if dtype.itemsize == 2 else 6e-2
    return Case(group, shown, make, stored, 2.0 * m * n * k, bars, tolerance)


def _choices(packed: list[Any], x: Tensor, options: dict[str, Any]) -> dict[str, Run]:
    """The heuristic's call, and every legal choice by its kernel's name."""
    layout = packed[0]
    (n, k), m = layout.shape, x.shape[0]
    kind = _ext.CUDA_DTYPES[layout.values.dtype]
    table = sp24_cuda.kernels(kind)
    found = config.candidates(
        table,
        m,
        n,
        -(-k // fragments.block_k(layout.values.dtype)),
        capability=_ext.capability(x.device),
        processors=_ext.multiprocessors(x.device),
        aligned=True,
    )
    runs: dict[str, Run] = {"sparsekern": lambda i: sp24_cuda.mm(packed[i], x, None, "none", **options)}
    for choice in found[:10]:
        kernel = table[choice.kernel]
        name = f"sparsekern {choice.kernel}:{kernel.family}-{kernel.rows}x{kernel.tokens}c{kernel.cluster}"
        name += f"-w{choice.workers}-s{choice.streamed}"
        runs[name] = lambda i, choice=choice: sp24_cuda.mm(packed[i], x, None, "none", how=choice, **options)
    return runs


def _cusparselt(weights: list[Tensor], x: Tensor, m: int) -> dict[str, Run]:
    """cuSPARSELt through torch: its default algorithm, and the one that its own search finds."""
    try:
        blobs = [torch._cslt_compress(w) for w in weights]
        padded = F.pad(x, (0, 0, 0, -m % 16)).t()
        searched = torch._cslt_sparse_mm_search(blobs[0], padded)
    except Exception as reason:
        message = f"{type(reason).__name__}: {reason}"

        def fails(i: int) -> Tensor:
            raise RuntimeError(message)

        return {"cusparselt": fails}

    def run(i: int, **more: Any) -> Tensor:
        return torch._cslt_sparse_mm(blobs[i], padded, transpose_result=True, **more)[:m]

    return {"cusparselt": lambda i: run(i), "cusparselt searched": lambda i: run(i, alg_id=searched)}


def _fp8_variants(dense: Tensor, x: Tensor, copies: int) -> dict[str, Run]:
    """e4m3 with a scale for every row and token, against torch's scaled product."""
    w_scale, x_scale = dense.abs().amax(1) / 448, x.abs().amax(1) / 448
    w8, x8 = (dense / w_scale[:, None]).to(FP8), (x / x_scale[:, None]).to(FP8)
    canonical = sk.to_sparse_semi_structured(w8.float()).packed
    packed = []
    for _ in range(copies):
        values = canonical.values.to(FP8).clone()
        packed.append(type(canonical)(values=values, metadata=canonical.metadata, shape=canonical.shape, scale=w_scale))
    weights = [w8.clone() for _ in range(copies)]
    variants: dict[str, Run] = {
        "reference": lambda i: F.linear(x8.float() * x_scale[:, None], w8.float() * w_scale[:, None])
    }
    variants |= _choices(packed, x8, {"x_scale": x_scale, "out": torch.bfloat16})

    def scaled(i: int) -> Tensor:
        return torch._scaled_mm(
            x8, weights[i].t(), scale_a=x_scale[:, None], scale_b=w_scale[None], out_dtype=torch.bfloat16
        )

    variants["dense"] = scaled
    return variants


LAYERS = [(4096, 4096), (8192, 8192), (27648, 5120), (5120, 13824), (14336, 4096)]


def prefill() -> Iterator[Case]:
    bars = {"dense": 1.7, "cusparselt searched": 1.1}
    for n, k in LAYERS:
        for m in (2048, max(4096, n if n == k else 0)):
            yield sp24_case("prefill", m, n, k, torch.bfloat16, bars)


def prefill_fp8() -> Iterator[Case]:
    for n, k in LAYERS:
        yield sp24_case("prefill_fp8", 4096, n, k, FP8, {"dense": 1.7})


def middle() -> Iterator[Case]:
    for n, k in ((4096, 4096), (5120, 5120), (14336, 4096)):
        for m in (256, 512, 1024):
            bar = 1.3 if m == 512 and n >= 5120 else 1.0
            yield sp24_case("middle", m, n, k, torch.bfloat16, {"dense": bar})


def decode() -> Iterator[Case]:
    for n, k in ((4096, 4096), (8192, 8192), (14336, 4096), (27648, 5120)):
        for m in (1, 4, 16, 64):
            yield sp24_case("decode", m, n, k, torch.bfloat16, {"dense": 1.6} if m <= 16 else {})


# The other formats --------------------------------------------------------------------------------------------------


def format_case(
    group: str,
    format: str,
    m: int,
    n: int,
    k: int,
    density: float,
    dtype: torch.dtype,
    bars: dict[str, float],
    **how: Any,
) -> Case:
    def make(copies: int) -> dict[str, Run]:
        dense = random_weight(format, n, k, dtype=dtype, density=density, seed=0, **how).cuda()
        x = torch.randn(m, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)
        pack = {"bsr": lambda w: sk.to_block_sparse(w, how.get("block", 64)), "csr": sk.to_csr, "bitmap": sk.to_bitmap}
        packed = [pack[format](dense) for _ in range(copies)]
        weights = [dense.clone() for _ in range(copies)]
        variants: dict[str, Run] = {
            "reference": lambda i: F.linear(x.float(), dense.float()),
            "sparsekern": lambda i: sk.linear(x, packed[i]),
            "dense": lambda i: F.linear(x, weights[i]),
        }
        if format == "bsr":
            theirs = [dense.to_sparse_bsr(how["block"]) for _ in range(copies)]
            variants["torch bsr"] = lambda i: F.linear(x, theirs[i])
        if format == "csr" and dtype == torch.float32:
            csr = [dense.to_sparse_csr() for _ in range(copies)]
            variants["cusparse"] = lambda i: (csr[i] @ x.t()).t()
        return variants

    stored = int(n * k * density * dtype.itemsize) + (n * k // 8 if format == "bitmap" else 0)
    shown = {"M": m, "shape": f"{n}x{k}", "dtype": str(dtype).removeprefix("torch."), "sparsity": round(1 - density, 4)}
    shown |= {key: str(value) for key, value in how.items()}
    return Case(group, shown, make, stored, 2.0 * m * n * k, bars)


def bsr() -> Iterator[Case]:
    for n, k in ((4096, 4096), (14336, 4096)):
        for block, share in ((128, 0.85), (64, 0.6)):
            for density in (0.5, 0.25, 0.1):
                bars = {"dense": share / density, "torch bsr": 1.2}
                yield format_case("bsr", "bsr", 2048, n, k, density, torch.bfloat16, bars, block=(block, block))
    for m in (1, 16):
        yield format_case("bsr", "bsr", m, 14336, 4096, 0.1, torch.bfloat16, {"dense": 5.0}, block=(64, 64))


def bitmap() -> Iterator[Case]:
    for m in (1, 16):
        for density, bar in ((0.5, 1.5), (0.3, 2.2)):
            yield format_case("bitmap", "bitmap", m, 14336, 4096, density, torch.bfloat16, {"dense": bar})


def csr() -> Iterator[Case]:
    for m in (64, 512):
        for density in (0.1, 0.05, 0.01):
            yield format_case("csr", "csr", m, 4096, 4096, density, torch.float32, {"cusparse": 2.0})


def ceilings() -> Iterator[Case]:
    """What the card gives: a copy, and a dense product."""

    def copy(copies: int) -> dict[str, Run]:
        given = [torch.randn(64 << 20, device="cuda").to(torch.bfloat16) for _ in range(copies)]
        to = torch.empty_like(given[0])
        return {"reference": lambda i: given[0], "copy": lambda i: to.copy_(given[i])}

    yield Case("ceilings", {"what": "copy of 128 MiB"}, copy, 256 << 20, 0)

    def product(copies: int) -> dict[str, Run]:
        a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
        return {"reference": lambda i: a @ b, "dense": lambda i: a @ b}

    yield Case("ceilings", {"what": "8192^3 bf16"}, product, 128 << 20, 2.0 * 8192**3)


GROUPS = {
    f.__name__: f for f in (ceilings, prefill, decode, middle, prefill_fp8, bsr, bitmap, csr)
}  # in the order of what users gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every case")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: torch sees no CUDA device")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    about = report.machine() | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in args.groups or GROUPS:
        for case in GROUPS[name]():
            began = time.perf_counter()
            try:
                row = measure(case, args.seconds)
            except Exception as reason:  # the next case may run
                row = {
                    "group": case.group,
                    "params": case.params,
                    "failed": {"case": f"{type(reason).__name__}: {reason}"[:400]},
                }
            rows.append(row)
            args.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
            print(line(row), f"({time.perf_counter() - began:.1f} s)", flush=True)
            torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    text = f"{row['group']} {' '.join(map(str, row['params'].values()))}: "
    if "us" in row:
        ours = row.get("best", next(iter(row["us"])))
        text += f"{row['us'][ours]['median']:.1f} us ({ours})"
        if "ratio" in row:
            text += f" {row['tflops']:.0f} TFLOP/s {row['gbytes']:.0f} GB/s; "
            text += ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratio"].items())
    for name, reason in row.get("failed", {}).items():
        text += f" [{name} failed: {reason[:120]}]"
    return text


if __name__ == "__main__":
    main()
