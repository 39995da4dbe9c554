"""Every sp24 kernel once, on small shapes: what compute-sanitizer runs (scripts/gpu)."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern._ext import CUDA_DTYPES
from sparsekern.conv import Geometry, weight_of
from sparsekern.conv import sp24_cuda as convolution
from sparsekern.sp24 import config, cuda
from sparsekern.testing import random_dense


def main() -> None:
    torch.set_default_device("cuda")
    for dtype in (torch.bfloat16, torch.int8):
        dense = random_dense(330, 4 * 128 // dtype.itemsize)
        packed = sk.to_sparse_semi_structured((dense * 30).round().to(dtype), prune=True).packed
        for number, kernel in enumerate(cuda.kernels(CUDA_DTYPES[dtype])):
            m = min(40, kernel.tokens) if kernel.family == "decode" else 140
            x = (random_dense(m, packed.shape[1]) * 30).round().to(dtype)
            tiles = -(-330 // kernel.rows) * -(-m // kernel.tokens)
            streamed = tiles if kernel.family == "decode" else 1
            how = config.Choice(number, 3, streamed, tiles, 0.0)
            y = cuda.mm(packed, x, None, "gelu", out_dtype=torch.float32, how=how)
            want = torch.nn.functional.gelu(x.float() @ packed.unpack().float().t())
            error = float((y - want).norm() / want.norm())
            print(number, kernel.family, kernel.rows, kernel.tokens, dtype, f"error {error:.1e}")
            assert error < 1e-4
    convolve()


def convolve() -> None:
    """The kernels that take images, and pieces of every size."""
    g = Geometry(3, 3, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1)
    for channels, numbers in ((64, range(8)), (12, (6,)), (10, (7,))):
        packed = sk.to_sparse_semi_structured(random_dense(130, 9 * channels).half(), prune=True).packed
        x = random_dense(3, channels, 9, 7).half()
        want = torch.nn.functional.conv2d(
            x.float(), weight_of(packed.unpack(), (3, 3), "rsc").float(), stride=(1, 2), padding=1
        )
        for number in numbers:
            kernel = cuda.kernels(CUDA_DTYPES[torch.float16])[number]
            tiles = -(-130 // kernel.rows) * -(-108 // kernel.tokens)
            y = convolution.conv2d(packed, x, None, g, "none", config.Choice(number, 2, 1, tiles, 0.0))
            error = float((y - want).norm() / want.norm())
            print(number, kernel.family, channels, f"channels, error {error:.1e}")
            assert error < 1e-3


if __name__ == "__main__":
    main()
