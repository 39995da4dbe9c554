"""Every sp24 kernel once, on small shapes: what compute-sanitizer runs (scripts/gpu)."""

from __future__ import annotations

import torch

import sparsekern as sk
from sparsekern._ext import CUDA_DTYPES
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


if __name__ == "__main__":
    main()
