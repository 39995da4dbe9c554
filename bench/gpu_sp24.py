"""2:4 on a GPU, against cuBLASLt and cuSPARSELt (its default algorithm and the one that its own search finds).

Of ours every legal choice of kernel is timed beside the heuristic's.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekern import _ext, sp24
from sparsekern.conv import sp24_cuda as convolution
from sparsekern.conv import weight_of
from sparsekern.nn import SparseConv2d
from sparsekern.sp24 import config, dynamic, fragments, repack
from sparsekern.sp24 import cuda as sp24_cuda

from . import gpu_data
from .cases import Bar, Case, Variants, _gate
from .gpu_data import copied, copies, copies_of, first_of, normal, weight24

FP8 = torch.float8_e4m3fn
LAYERS = [(4096, 4096), (8192, 8192), (27648, 5120), (5120, 13824), (14336, 4096)]
MANY_TOKENS = (2048, 4096, 8192)  # the last for the second layer alone, instead of the one before
MIDDLE = [(4096, 4096), (5120, 5120), (14336, 4096)]
MIDDLE_TOKENS = (256, 512, 1024)
FEW = [(4096, 4096), (8192, 8192), (14336, 4096), (27648, 5120)]
IMAGES, IMAGE_SHAPES = 32, ((256, 28), (256, 14), (128, 28), (512, 14), (512, 7))
COPIED, MULTIPLIED = 64 << 20, 8192  # of the ceilings: elements, and rows and columns
Call = Callable[[], Tensor]


def linear(group: str, m: int, n: int, k: int, bars: dict[str, float], dtype: torch.dtype = torch.bfloat16) -> Case:
    """Ours, dense, cuSPARSELt; with a bar against "copy" also copies that move as many bytes as ours must."""

    def make() -> dict[str, Any]:
        dense, first = weight24(n, k, dtype)
        count = copies_of(first.nbytes)
        x = normal(m, k)
        x = (x * 25).round().clamp(-100, 100).to(dtype) if dtype == torch.int8 else x.to(dtype)
        packed, weights = [first, *(copied(first) for _ in range(count - 1))], [dense.clone() for _ in range(count)]
        exact = {"out_dtype": torch.int32} if dtype == torch.int8 else {}
        variants: dict[str, Any] = ours(packed, x, **exact)
        if dtype == torch.int8:
            variants["dense"] = [lambda w=w: torch._int_mm(x, w.t()) for w in weights]
        else:
            variants["dense"] = [lambda w=w: F.linear(x, w) for w in weights]
        if "copy" in bars:
            variants["copy"] = copies(first.nbytes + (n + k) * m * dtype.itemsize, count)
        return variants | cusparselt(weights, x, exact.get("out_dtype"))

    params = {"shape": f"{n}x{k}", "M": m, "dtype": str(dtype).removeprefix("torch.")}
    gate = first_of(_gate(1e-2 if dtype != torch.int8 else 1e-12))
    return Case(group, params, tuple(Bar(*bar) for bar in bars.items()), make, gate=gate)


def about(x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What `candidates` asks of the card that x lies on."""
    device = x.device
    return {
        "capability": _ext.capability(device),
        "processors": _ext.multiprocessors(device),
        "code": _ext.code_on(device),
        "resident": sp24_cuda._resident(_ext.CUDA_DTYPES[dtype], x.get_device()),
    }


def ours(packed: list[Any], x: Tensor, **options: Any) -> dict[str, list[Call]]:
    """The heuristic's call, and every legal choice by its kernel's name."""
    layout, m = packed[0], x.shape[0]
    n, k = layout.shape
    table = sp24_cuda.kernels(_ext.CUDA_DTYPES[layout.values.dtype])
    card = about(x, layout.values.dtype) | {"aligned": True}
    card["fp8"] = layout.values.dtype == FP8
    card["fast_accum"] = options.get("use_fast_accum", False)
    found = config.candidates(table, m, n, -(-k // fragments.block_k(layout.values.dtype)), **card)

    def calls(how: config.Choice | None) -> list[Call]:
        return [lambda p=p: sp24_cuda.mm(p, x, None, "none", how=how, **options) for p in packed]

    runs = {"sparsekern": calls(None)}
    for choice in found[:10]:
        runs[f"sparsekern {choice.described(table)}"] = calls(choice)
    return runs


def cusparselt(weights: list[Tensor], x: Tensor, out: torch.dtype | None = None) -> dict[str, Any]:
    """Its calls, with the algorithm (and the split of K) that its search finds for the very same call, and without."""
    m = x.shape[0]
    try:
        blobs = [torch._cslt_compress(w) for w in weights]
        given = F.pad(x.view(torch.int8) if x.dtype == FP8 else x, (0, 0, 0, -m % 16)).view(x.dtype).t()
        found = torch._C._cusparselt.mm_search(blobs[0], given, None, None, out, True)
        algorithm, split, mode = (int(number) for number in found[:3])
    except Exception as reason:
        message = f"{type(reason).__name__}: {reason}"

        def fails() -> Tensor:
            raise RuntimeError(message)

        return {"cuSPARSELt": fails}

    def calls(*how: int) -> list[Call]:
        return [lambda b=b: torch._cslt_sparse_mm(b, given, None, None, out, True, *how)[:m] for b in blobs]

    return {"cuSPARSELt": calls(), "cuSPARSELt searched": calls(algorithm, split, mode)}


def prefill() -> Iterator[Case]:
    """Many tokens: bound by the tensor cores."""
    for i, (n, k) in enumerate(LAYERS):
        for m in (MANY_TOKENS[0], MANY_TOKENS[2 if i == 1 else 1]):
            yield linear("gpu_prefill", m, n, k, {"dense": 1.7, "cuSPARSELt searched": 1.1})


def middle() -> Iterator[Case]:
    for n, k in MIDDLE:
        for m in MIDDLE_TOKENS:
            yield linear("gpu_middle", m, n, k, {"dense": 1.3 if m == 512 and n >= 5120 else 1.0})


def decode() -> Iterator[Case]:
    """Few tokens: bound by the weight's bytes, 9/16 of dense. From 85 % of a copy's bandwidth on the copy is slower."""
    for n, k in FEW:
        for m in (1, 4, 16, 64):
            yield linear("gpu_decode", m, n, k, {"dense": 1.6, "copy": 0.85} if m <= 16 else {})


def types() -> Iterator[Case]:
    """float16, and int8 (int32 sums, against torch._int_mm), beside the others' bfloat16: many tokens, and few."""
    for dtype, few in ((torch.float16, 16), (torch.int8, 32)):
        for n, k in LAYERS[:2]:
            yield linear("gpu_types", MANY_TOKENS[1], n, k, {}, dtype)
        yield linear("gpu_types", few, *FEW[1], {}, dtype)


def prefill_fp8() -> Iterator[Case]:
    """e4m3 with a scale for every row and token, against torch's scaled product, both with either accumulation.

    cuSPARSELt through torch has no scales of tokens: its bare product is timed, and scaled to be compared.
    """
    m = MANY_TOKENS[1]
    for (n, k), fast in itertools.product(LAYERS, (False, True)):
        scales: list[Tensor] = []

        def make(n: int = n, k: int = k, fast: bool = fast, scales: list[Tensor] = scales) -> dict[str, Any]:
            count, x = copies_of(n * k * 5 // 8), normal(m, k)
            dense, packed = weight24(n, k, torch.bfloat16)
            w_scale, x_scale = dense.float().abs().amax(1) / 448, x.abs().amax(1) / 448
            values = (packed.values.float() / w_scale[:, None]).to(FP8)
            own = sp24.Sp24(values=values, metadata=packed.metadata, shape=packed.shape, scale=w_scale)
            w8, x8 = (dense.float() / w_scale[:, None]).to(FP8), (x / x_scale[:, None]).to(FP8)
            scales[:] = [x_scale[:, None] * w_scale[None]]
            layouts, weights = [copied(own) for _ in range(count)], [w8.clone() for _ in range(count)]
            variants: dict[str, Any] = ours(layouts, x8, x_scale=x_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
            given = {"scale_a": x_scale[:, None], "scale_b": w_scale[None], "out_dtype": torch.bfloat16}
            variants["dense"] = [lambda w=w: torch._scaled_mm(x8, w.t(), **given, use_fast_accum=fast) for w in weights]
            return variants | cusparselt(weights, x8, torch.bfloat16)

        def gate(variants: dict[str, Any], scales: list[Tensor] = scales) -> None:
            def scaled(calls: Any) -> Call:
                call = calls[0] if isinstance(calls, list) else calls
                return lambda: call().float() * scales[0]

            first_of(_gate(2e-2))(
                {name: scaled(calls) if name.startswith("cuSP") else calls for name, calls in variants.items()}
            )

        params = {"shape": f"{n}x{k}", "M": m, "dtype": "float8_e4m3fn", "use_fast_accum": fast}
        yield Case("gpu_fp8", params, (Bar("dense", 1.7), Bar("cuSPARSELt searched", 1.1)), make, gate=gate)


def gradients() -> Iterator[Case]:
    """dX of a transposable mask, and dW at the stored places, against writing the weight, or dW, out for cuBLAS."""
    for n, k in LAYERS[:2]:
        m = MANY_TOKENS[1]

        def layout_of(n: int = n, k: int = k) -> sp24.Sp24:
            dense = normal(n, k, dtype=torch.bfloat16, seed=0)
            return dynamic.prune(dense, "transposable", "cuda")

        def dx(n: int = n, m: int = m, layout_of: Any = layout_of) -> Variants:
            layout, dy = layout_of(), normal(m, n, dtype=torch.bfloat16, seed=2)
            dense = layout.unpack()
            return {
                "sparsekern": lambda: sp24_cuda.mm_t(layout, dy),
                "unpack + cuBLAS": lambda: dy @ repack.unpack(layout),
                "dense": lambda: dy @ dense,
            }

        def dw(n: int = n, k: int = k, m: int = m, layout_of: Any = layout_of) -> Variants:
            layout, dy = layout_of(), normal(m, n, dtype=torch.bfloat16, seed=2)
            x, out = normal(m, k, dtype=torch.bfloat16), torch.empty_like(layout.values)
            return {
                "sparsekern": lambda: sp24_cuda.sddmm(layout, dy, x),
                "cuBLAS + gather": lambda: repack.sample(layout.metadata, dy.t() @ x, out),
                "dense": lambda: dy.t() @ x,  # of another shape: the gate passes it over
            }

        params = {"shape": f"{n}x{k}", "M": m, "dtype": "bfloat16"}
        for product, make, other in (("dX", dx, "unpack + cuBLAS"), ("dW", dw, "cuBLAS + gather")):
            bars = (Bar(other, 1.0),)
            yield Case("gpu_sp24_gradients", {"product": product, **params}, bars, make, gate=_gate(1e-2))


def conv() -> Iterator[Case]:
    """3x3, a batch of 32, channels_last, against cuDNN; the bar is for 256 channels."""
    for channels, side in IMAGE_SHAPES:

        def make(channels: int = channels, side: int = side) -> dict[str, Any]:
            on = {"dtype": torch.bfloat16, "device": gpu_data.DEVICE}
            dense = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, **on)
            dense.weight.data.copy_(weight_of(weight24(channels, 9 * channels, torch.bfloat16)[0], (3, 3), "rsc"))
            dense = dense.to(memory_format=torch.channels_last).requires_grad_(False)
            sparse = SparseConv2d.from_dense(dense, format="sp24", order="rsc").requires_grad_(False)
            sparse.backend = "cuda"
            x = normal(IMAGES, channels, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            variants: dict[str, Any] = {"sparsekern": lambda: sparse(x)}
            table, layout = sp24_cuda.kernels(_ext.CUDA_DTYPES[x.dtype]), cast(Any, sparse.packed)
            card = about(x, x.dtype)
            shape = (IMAGES * side * side, channels, -(-9 * channels // fragments.block_k(x.dtype)))
            for how in config.candidates(table, *shape, **card, aligned=True, images=True)[:10]:
                variants[f"sparsekern {how.described(table)}"] = lambda how=how: convolution.conv2d(
                    layout, x, None, cast(Any, sparse.geometry), "none", how
                )
            return variants | {"dense": lambda: dense(x)}

        params = {"convolution": f"3x3, {channels}→{channels}", "side": side, "batch": IMAGES, "dtype": "bfloat16"}
        bars = (Bar("dense", 1.3),) if channels == 256 else ()
        yield Case("gpu_sp24_conv", params, bars, make, gate=_gate(1e-2))


def ceilings() -> Iterator[Case]:
    """What the card gives: a copy, and a dense product."""

    def copy() -> dict[str, Any]:
        given, to = (normal(COPIED, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
        return {"sparsekern": lambda: to.copy_(given)}

    yield Case("gpu_ceilings", {"what": f"copy of {2 * COPIED >> 20} MiB ({4 * COPIED >> 20} MiB moved)"}, (), copy)

    def product() -> dict[str, Any]:
        a, b = (normal(MULTIPLIED, MULTIPLIED, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
        return {"sparsekern": lambda: a @ b}

    yield Case("gpu_ceilings", {"what": f"dense bf16 {MULTIPLIED}^3"}, (), product)


ROUNDS = 2000


def rates() -> Iterator[Case]:
    """Sparse wgmma alone, A from registers (as our kernels have it) and from shared memory; zeros, and no copies.

    ROUNDS times eight products of 64 x 256 x 64 bytes for each of two warpgroups on every multiprocessor.
    """
    for dtype in (torch.bfloat16, torch.int8, FP8):

        def make(dtype: torch.dtype = dtype) -> dict[str, Any]:
            kind, device = _ext.CUDA_DTYPES[dtype], torch.device(gpu_data.DEVICE)
            out = torch.empty(_ext.multiprocessors(device), 256, 128, dtype=torch.int32, device=device)
            run = probes().probe_rate

            def call(shared: bool) -> Tensor:
                run(kind, shared, len(out), ROUNDS, out.data_ptr(), _ext.stream_of(out))
                return out

            return {"sparsekern": lambda: call(False), "A in shared memory": lambda: call(True)}

        operations = 2 * ROUNDS * 8 * 2 * 64 * 256 * 64 // dtype.itemsize
        what = {"what": "wgmma.sp m64n256", "dtype": str(dtype).removeprefix("torch."), "operations per SM": operations}
        yield Case("gpu_rates", what, (), make)


def probes() -> Any:
    """Single instructions (tests/emulator/probes.cu), built by nvcc where they are not emulated."""
    if hasattr(_ext.cuda(), "probe_rate"):
        return _ext.cuda()
    place = Path(__file__).resolve().parent.parent / "tests" / "emulator" / "build.py"
    spec = importlib.util.spec_from_file_location("emulator_build", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_probes()
