"""2:4 on a GPU, against cuBLASLt and cuSPARSELt (its default algorithm and the one that its own search finds).

Of ours every legal choice of kernel is timed beside the heuristic's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern import _ext
from sparsekern.conv import sp24_cuda as convolution
from sparsekern.conv import weight_of
from sparsekern.nn import SparseConv2d
from sparsekern.sp24 import config, fragments
from sparsekern.sp24 import cuda as sp24_cuda
from sparsekern.testing import random_weight

from .cases import Bar, Case, _gate

FP8 = torch.float8_e4m3fn
LAYERS = [(4096, 4096), (8192, 8192), (27648, 5120), (5120, 13824), (14336, 4096)]
Call = Callable[[], Tensor]


def copies_of(weight_bytes: int) -> int:
    """Copies of a weight that together exceed three second-level caches."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(48, -(-3 * cache // max(1, weight_bytes))))


def tokens(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).cuda()


def sp24(group: str, m: int, n: int, k: int, bars: dict[str, float]) -> Case:
    """bf16: ours, dense, cuSPARSELt."""

    def make() -> dict[str, Any]:
        copies = copies_of(n * k * 9 // 8)
        dense = random_weight("sp24", n, k, dtype=torch.float32, density=0.5, seed=0).cuda().bfloat16()
        x = tokens(m, k).bfloat16()
        packed = [sk.to_sparse_semi_structured(dense).packed for _ in range(copies)]
        weights = [dense.clone() for _ in range(copies)]
        variants: dict[str, Any] = ours(packed, x)
        variants["dense"] = [lambda w=w: F.linear(x, w) for w in weights]
        return variants | cusparselt(weights, x)

    params = {"shape": f"{n}x{k}", "M": m, "dtype": "bfloat16"}
    return Case(group, params, tuple(Bar(*bar) for bar in bars.items()), make, gate=first_of(_gate(1e-2)))


def first_of(gate: Callable[[Any], None]) -> Callable[[dict[str, Any]], None]:
    """The gate on the first copy's calls; of a peer that cannot run the case, it is not asked."""

    def check(variants: dict[str, Any]) -> None:
        able = {}
        for name, calls in variants.items():
            call = calls[0] if isinstance(calls, list) else calls
            try:
                call()
                able[name] = call
            except Exception:
                if name == "sparsekern":
                    raise
        gate(able)

    return check


def ours(packed: list[Any], x: Tensor, **options: Any) -> dict[str, list[Call]]:
    """The heuristic's call, and every legal choice by its kernel's name."""
    layout, m = packed[0], x.shape[0]
    n, k = layout.shape
    table = sp24_cuda.kernels(_ext.CUDA_DTYPES[layout.values.dtype])
    card = {"capability": _ext.capability(x.device), "processors": _ext.multiprocessors(x.device), "aligned": True}
    card["fp8"] = layout.values.dtype == FP8
    card["fast_accum"] = options.get("use_fast_accum", False)
    found = config.candidates(table, m, n, -(-k // fragments.block_k(layout.values.dtype)), **card)

    def calls(how: config.Choice | None) -> list[Call]:
        return [lambda p=p: sp24_cuda.mm(p, x, None, "none", how=how, **options) for p in packed]

    runs = {"sparsekern": calls(None)}
    for choice in found[:10]:
        runs[name_of(choice, table)] = calls(choice)
    return runs


def name_of(how: config.Choice, table: Sequence[config.Kernel]) -> str:
    kernel = table[how.kernel]
    name = f"sparsekern {how.kernel} {kernel.family} {kernel.rows}x{kernel.tokens} cluster {kernel.cluster}"
    return f"{name}, {how.workers} workers, {how.streamed} of {how.tiles} streamed"


def cusparselt(weights: list[Tensor], x: Tensor) -> dict[str, Any]:
    m = x.shape[0]
    try:
        blobs = [torch._cslt_compress(w) for w in weights]
        given = F.pad(x, (0, 0, 0, -m % 16)).t()
        searched = torch._cslt_sparse_mm_search(blobs[0], given)
    except Exception as reason:
        message = f"{type(reason).__name__}: {reason}"

        def fails() -> Tensor:
            raise RuntimeError(message)

        return {"cuSPARSELt": fails}

    def calls(**more: Any) -> list[Call]:
        return [lambda b=b: torch._cslt_sparse_mm(b, given, transpose_result=True, **more)[:m] for b in blobs]

    return {"cuSPARSELt": calls(), "cuSPARSELt searched": calls(alg_id=searched)}


def prefill() -> Iterator[Case]:
    """Many tokens: bound by the tensor cores."""
    for n, k in LAYERS:
        for m in (2048, 8192 if n == 8192 else 4096):
            yield sp24("gpu_prefill", m, n, k, {"dense": 1.7, "cuSPARSELt searched": 1.1})


def middle() -> Iterator[Case]:
    for n, k in ((4096, 4096), (5120, 5120), (14336, 4096)):
        for m in (256, 512, 1024):
            yield sp24("gpu_middle", m, n, k, {"dense": 1.3 if m == 512 and n >= 5120 else 1.0})


def decode() -> Iterator[Case]:
    """Few tokens: bound by the weight's bytes, 9/16 of dense."""
    for n, k in ((4096, 4096), (8192, 8192), (14336, 4096), (27648, 5120)):
        for m in (1, 4, 16, 64):
            yield sp24("gpu_decode", m, n, k, {"dense": 1.6} if m <= 16 else {})


def prefill_fp8() -> Iterator[Case]:
    """e4m3 with a scale for every row and token, against torch's scaled product, both with either accumulation."""
    for (n, k), fast in itertools.product(LAYERS, (False, True)):

        def make(n: int = n, k: int = k, fast: bool = fast) -> dict[str, Any]:
            copies = copies_of(n * k * 5 // 8)
            dense, x = random_weight("sp24", n, k, dtype=torch.float32, density=0.5, seed=0).cuda(), tokens(4096, k)
            w_scale, x_scale = dense.abs().amax(1) / 448, x.abs().amax(1) / 448
            w8, x8 = (dense / w_scale[:, None]).to(FP8), (x / x_scale[:, None]).to(FP8)
            own = sk.to_sparse_semi_structured(w8.float()).packed
            parts = {"metadata": own.metadata, "shape": own.shape, "scale": w_scale}
            packed = [type(own)(values=own.values.to(FP8).clone(), **parts) for _ in range(copies)]
            variants: dict[str, Any] = ours(packed, x8, x_scale=x_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
            scales = {"scale_a": x_scale[:, None], "scale_b": w_scale[None], "out_dtype": torch.bfloat16}
            variants["dense"] = [
                lambda w=w: torch._scaled_mm(x8, w.t(), **scales, use_fast_accum=fast)
                for w in (w8.clone() for _ in packed)
            ]
            return variants

        params = {"shape": f"{n}x{k}", "M": 4096, "dtype": "float8_e4m3fn", "use_fast_accum": fast}
        yield Case("gpu_fp8", params, (Bar("dense", 1.7),), make, gate=first_of(_gate(2e-2)))


def conv() -> Iterator[Case]:
    """3x3, a batch of 32, channels_last, against cuDNN; the bar is for 256 channels."""
    for channels, side in ((256, 28), (256, 14), (128, 28), (512, 14), (512, 7)):

        def make(channels: int = channels, side: int = side) -> dict[str, Any]:
            dense = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=torch.bfloat16, device="cuda")
            matrix = random_weight("sp24", channels, 9 * channels, dtype=torch.float32, density=0.5, seed=0)
            dense.weight.data.copy_(weight_of(matrix, (3, 3), "rsc"))
            dense = dense.to(memory_format=torch.channels_last).requires_grad_(False)
            sparse = SparseConv2d.from_dense(dense, format="sp24", order="rsc").requires_grad_(False)
            x = torch.randn(32, channels, side, side, generator=torch.Generator().manual_seed(1))
            x = x.cuda().bfloat16().to(memory_format=torch.channels_last)
            variants: dict[str, Any] = {"sparsekern": lambda: sparse(x)}
            table, layout = sp24_cuda.kernels(_ext.CUDA_DTYPES[x.dtype]), cast(Any, sparse.packed)
            card = {"capability": _ext.capability(x.device), "processors": _ext.multiprocessors(x.device)}
            shape = (32 * side * side, channels, 9 * channels // fragments.block_k(x.dtype))
            for how in config.candidates(table, *shape, **card, aligned=True, images=True)[:10]:
                variants[name_of(how, table)] = lambda how=how: convolution.conv2d(
                    layout, x, None, cast(Any, sparse.geometry), "none", how
                )
            return variants | {"dense": lambda: dense(x)}

        params = {"convolution": f"3x3, {channels}→{channels}", "side": side, "batch": 32, "dtype": "bfloat16"}
        bars = (Bar("dense", 1.3),) if channels == 256 else ()
        yield Case("gpu_sp24_conv", params, bars, make, gate=_gate(1e-2))


def ceilings() -> Iterator[Case]:
    """What the card gives: a copy of 128 MiB, and dense products."""

    def copy() -> dict[str, Any]:
        given, to = (torch.randn(64 << 20, device="cuda").bfloat16() for _ in range(2))
        return {"sparsekern": lambda: to.copy_(given)}

    yield Case("gpu_ceilings", {"what": "copy of 128 MiB (256 MiB moved)"}, (), copy)

    def product() -> dict[str, Any]:
        a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
        return {"sparsekern": lambda: a @ b}

    yield Case("gpu_ceilings", {"what": "dense bf16 8192^3"}, (), product)
