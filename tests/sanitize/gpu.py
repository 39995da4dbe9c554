"""Every CUDA C++ kernel once, on small shapes: what compute-sanitizer runs (scripts/gpu).

Usage: gpu.py [PART ...], of PARTS; without one, all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from sparsekern import bitmap, csr, sp24
from sparsekern._ext import CUDA_DTYPES
from sparsekern.bitmap import cuda as bitmap_cuda
from sparsekern.conv import Geometry, rows_cuda, weight_of
from sparsekern.conv import sp24_cuda as convolution
from sparsekern.csr import cuda as csr_cuda
from sparsekern.sp24 import config, cuda
from sparsekern.testing import random_dense, random_weight

Formats = tuple[ModuleType, ...]


def main() -> None:
    torch.set_default_device("cuda")
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
    torch.cuda.synchronize()


def report(what: str, y: Tensor, want: Tensor, most: float) -> None:
    error = float((y.float() - want.float()).norm() / want.float().norm())
    print(what, f"error {error:.1e}")
    assert error < most


def multiply(step: int = 1) -> None:
    """Every kernel of sp24 for two types, or every step-th."""
    for dtype in (torch.bfloat16, torch.int8):
        dense = random_dense(330, 4 * 128 // dtype.itemsize)
        packed = sp24.pack((dense * 30).round().to(dtype), prune=True)
        found = [
            pair for pair in enumerate(cuda.kernels(CUDA_DTYPES[dtype])) if pair[1].family in config.FAMILIES["mm"]
        ]
        for number, kernel in found[::step]:
            m = min(40, kernel.tokens) if kernel.family == "decode" else 140
            x = (random_dense(m, packed.shape[1]) * 30).round().to(dtype)
            tiles = -(-330 // kernel.rows) * -(-m // kernel.tokens)
            streamed = tiles if kernel.family == "decode" else 1
            how = config.Choice(number, 3, streamed, tiles, 0.0)
            y = cuda.mm(packed, x, None, "gelu", out_dtype=torch.float32, how=how)
            want = functional.gelu(x.float() @ packed.unpack().float().t())
            report(f"{number} {kernel.family} {kernel.rows} {kernel.tokens} {dtype}", y, want, 1e-4)


def convolve() -> None:
    """The kernels that take images, and pieces of every size."""
    g = Geometry(3, 3, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1)
    for channels, numbers in ((64, range(8)), (12, (6,)), (10, (7,))):
        packed = sp24.pack(random_dense(130, 9 * channels).half(), prune=True)
        x = random_dense(3, channels, 9, 7).half()
        want = functional.conv2d(x.float(), weight_of(packed.unpack(), (3, 3), "rsc").float(), stride=(1, 2), padding=1)
        for number in numbers:
            kernel = cuda.kernels(CUDA_DTYPES[torch.float16])[number]
            tiles = -(-130 // kernel.rows) * -(-108 // kernel.tokens)
            y = convolution.conv2d(packed, x, None, g, "none", config.Choice(number, 2, 1, tiles, 0.0))
            report(f"{number} {kernel.family} {channels} channels", y, want, 1e-3)


def rows(
    n: int = 330, k: int = 520, tokens: tuple[int, ...] = (1, 3, 12, 40, 130), formats: Formats = (csr, bitmap)
) -> None:
    """The three products of csr, and of bitmap those that differ: few tokens, and the weight written out."""
    for dtype in (torch.float32, torch.float16):
        dense = random_weight("csr", n, k, dtype, 0.15)
        for m in tokens:
            x, dy = random_dense(m, k, dtype=dtype, seed=m), random_dense(m, n, dtype=dtype, seed=m + 1)
            for format in formats:
                layout, module = format.pack(dense), csr_cuda if format is csr else bitmap_cuda
                name = f"{layout.format} {dtype} M={m}"
                y = module.mm(layout, x, None, "relu")
                want = functional.relu(x.float() @ dense.float().t())
                report(f"{name} mm", y, want, 1e-3)
                if format is bitmap:  # the kernels of every card, too
                    with mock.patch.object(bitmap_cuda, "_orders", return_value=("sm80",)):
                        report(f"{name} mm sm80", module.mm(layout, x, None, "relu"), want, 1e-3)
                report(f"{name} mm_t", module.mm_t(layout, dy), dy.float() @ dense.float(), 1e-3)
                want = layout.sample(dy.float().t() @ x.float())
                report(f"{name} sddmm", module.sddmm(layout, dy, x), want, 1e-3)


def planes() -> None:
    """The direct convolution of csr, whatever would be faster, in both memory orders."""
    g = Geometry(3, 3, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1)
    for dtype in (torch.float32, torch.float16):
        dense = random_weight("csr", 40, 9 * 20, dtype, 0.2)
        layout, image = csr.pack(dense), weight_of(dense, (3, 3), "rsc").float()
        for order in (torch.contiguous_format, torch.channels_last):
            x = random_dense(3, 20, 9, 7, dtype=dtype).to(memory_format=order)
            want = functional.conv2d(x.float(), image, stride=(1, 2), padding=1)
            dy = random_dense(*want.shape, dtype=dtype, seed=2).to(memory_format=order)
            back = torch.nn.grad.conv2d_input(x.shape, image, dy.float(), stride=(1, 2), padding=1)
            with mock.patch.object(rows_cuda, "worth_it", return_value=True):
                report(f"csr conv2d {dtype} {order}", rows_cuda.conv2d(layout, x, None, g, "none"), want, 1e-3)
                report(f"csr conv2d_input {dtype} {order}", rows_cuda.conv2d_input(layout, dy, g, 9, 7), back, 1e-3)


def gradients(step: int = 1) -> None:
    """The gradients of sp24 on Hopper: every kernel, or every step-th, tiles ragged and cut between workers."""
    n, k, m = 200, 300, 150
    packed = sp24.pack(random_dense(n, k).to(torch.bfloat16), prune=True)
    dense, dtype = packed.unpack(), CUDA_DTYPES[torch.bfloat16]
    dy, x = (random_dense(m, size, seed=size).to(torch.bfloat16) for size in (n, k))
    found = [pair for pair in enumerate(cuda.kernels(dtype)) if pair[1].family not in config.FAMILIES["mm"]]
    for number, kernel in found[::step]:
        if kernel.family == "mm_t_sm90":
            rows, columns, call = k, m, lambda: cuda.mm_t(packed, dy)
            want = dy.float() @ dense.float()
        else:
            rows, columns, call = n, k, lambda: cuda.sddmm(packed, dy, x)
            want = packed.sample(dy.float().t() @ x.float())
        tiles = -(-rows // kernel.rows) * -(-columns // kernel.tokens)
        how = config.Choice(number, 2, tiles, tiles, 0.0)
        with mock.patch.multiple(cuda, _gradient=lambda *_, how=how: how, transposable=lambda _: False):
            report(f"{number} {kernel.family} {kernel.rows} {kernel.tokens}", call(), want, 1e-2)


PARTS: dict[str, Callable[[], None]] = {
    "multiply": multiply,
    "gradients": gradients,
    "convolve": convolve,
    "csr": partial(rows, formats=(csr,)),
    "bitmap": partial(rows, formats=(bitmap,)),
    "planes": planes,
}


if __name__ == "__main__":
    main()
