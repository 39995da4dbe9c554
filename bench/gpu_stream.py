"""CSR and bitmap on a GPU: formats whose price is the weight's bytes, against cuBLAS and cuSPARSE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern.conv import rows_cuda
from sparsekern.nn import SparseConv2d
from sparsekern.testing import random_weight

from .cases import Bar, Case, Variants, _gate
from .gpu_sp24 import copies_of, first_of, tokens


def bitmap() -> Iterator[Case]:
    n, k = 14336, 4096
    for m in (1, 16):
        for density, bar in ((0.5, 1.5), (0.3, 2.2)):

            def make(m: int = m, density: float = density) -> dict[str, Any]:
                copies = copies_of(int(n * k * 2 * density))
                dense = random_weight("bitmap", n, k, dtype=torch.bfloat16, density=density, seed=0).cuda()
                x = tokens(m, k).bfloat16()
                packed = [sk.to_bitmap(dense) for _ in range(copies)]
                weights = [dense.clone() for _ in range(copies)]
                return {
                    "sparsekern": [lambda w=w: sk.linear(x, w) for w in packed],
                    "dense": [lambda w=w: F.linear(x, w) for w in weights],
                }

            params = {"shape": f"{n}x{k}", "M": m, "sparsity": round(1 - density, 2), "dtype": "bfloat16"}
            yield Case("gpu_bitmap", params, (Bar("dense", bar),), make, gate=first_of(_gate(1e-2)))


def csr() -> Iterator[Case]:
    for dtype in (torch.float32, torch.float16):
        for m in (64, 512):
            for density in (0.1, 0.05, 0.01):

                def make(m: int = m, density: float = density, dtype: torch.dtype = dtype) -> dict[str, Any]:
                    dense = random_weight("csr", 4096, 4096, dtype=dtype, density=density, seed=0).cuda()
                    x = tokens(m, 4096).to(dtype)
                    own, theirs, columns = sk.to_csr(dense), dense.to_sparse_csr(), x.t().contiguous()
                    return {
                        "sparsekern": lambda: sk.linear(x, own),
                        "cuSPARSE": lambda: (theirs @ columns).t(),
                        "dense": lambda: F.linear(x, dense),
                    }

                params = {"shape": "4096x4096", "M": m, "sparsity": round(1 - density, 2), "dtype": str(dtype)[6:]}
                yield Case("gpu_csr", params, (Bar("cuSPARSE", 2.0),), make, gate=first_of(_gate(1e-2)))


def csr_decode() -> Iterator[Case]:
    """Few tokens below the densities of `bitmap`: bytes only. Bars are 0.6 of what the bytes allow."""
    n, k = 14336, 4096
    for m in (1, 4):
        for density in (0.2, 0.1, 0.05):

            def make(m: int = m, density: float = density) -> dict[str, Any]:
                copies = copies_of(int(n * k * 3 * density))
                dense = random_weight("csr", n, k, dtype=torch.bfloat16, density=density, seed=0).cuda()
                x = tokens(m, k).bfloat16()
                packed = [sk.to_csr(dense) for _ in range(copies)]
                bits = [sk.to_bitmap(dense) for _ in range(copies)]
                theirs, weights = [dense.to_sparse_csr() for _ in range(copies)], [dense.clone() for _ in range(copies)]
                columns = x.t().contiguous()
                return {
                    "sparsekern": [lambda w=w: sk.linear(x, w) for w in packed],
                    "sparsekern bitmap": [lambda w=w: sk.linear(x, w) for w in bits],
                    "cuSPARSE": [lambda w=w: (w @ columns).t() for w in theirs],
                    "dense": [lambda w=w: F.linear(x, w) for w in weights],
                }

            bars = (Bar("dense", round(0.6 * 2 / (3 * density), 2)), Bar("cuSPARSE", 2.0)) if m == 1 else ()
            params = {"shape": f"{n}x{k}", "M": m, "sparsity": round(1 - density, 2), "dtype": "bfloat16"}
            yield Case("gpu_csr_decode", params, bars, make, gate=first_of(_gate(1e-2)))


def csr_conv() -> Iterator[Case]:
    """3x3, 256 to 256 channels, a batch of 32, against cuDNN: what a user gets, and the direct kernel by itself.

    float32 with and without TF32: `sparsekern` may be the direct kernel or the dense road (conv/rows_cuda.py).
    """
    kinds = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True))
    for side, last in ((28, False), (14, False), (28, True)):
        for dtype, tf32 in kinds:
            for sparsity in (0.8, 0.9, 0.95):

                def make(
                    side: int = side,
                    last: bool = last,
                    dtype: torch.dtype = dtype,
                    tf32: bool = tf32,
                    sparsity: float = sparsity,
                ) -> Variants:
                    dense = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False, dtype=dtype, device="cuda")
                    weight = random_weight("csr", 256, 9 * 256, dtype=dtype, density=1 - sparsity, seed=0)
                    dense.weight.data.copy_(weight.view(256, 256, 3, 3))
                    order = torch.channels_last if last else torch.contiguous_format
                    dense = dense.to(memory_format=order).requires_grad_(False)
                    sparse = SparseConv2d.from_dense(dense, format="csr").requires_grad_(False)
                    x = torch.randn(32, 256, side, side, generator=torch.Generator().manual_seed(1))
                    x = x.to("cuda", dtype).to(memory_format=order)

                    def direct() -> Tensor:
                        with mock.patch.object(rows_cuda, "worth_it", return_value=True):
                            return sparse(x)

                    def under(call: Any) -> Any:
                        def run() -> Tensor:
                            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
                                return call()

                        return run

                    return {
                        "sparsekern": under(lambda: sparse(x)),
                        "sparsekern direct": under(direct),
                        "dense": under(lambda: dense(x)),
                    }

                params = {
                    "convolution": "3x3, 256→256", "side": side, "batch": 32, "sparsity": sparsity,
                    "dtype": str(dtype)[6:] + (" (TF32)" if tf32 and dtype == torch.float32 else ""),
                    "images": "channels_last" if last else "contiguous",
                }  # fmt: skip
                bars = (Bar("dense", 0.9 if tf32 else round(0.2 / (1 - sparsity), 2)),)
                yield Case("gpu_csr_conv", params, bars, make, gate=_gate(1e-2))
