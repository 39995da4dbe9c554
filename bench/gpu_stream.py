"""CSR and bitmap on a GPU: formats whose price is the weight's bytes, against cuBLAS and cuSPARSE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern import bitmap as bits_of
from sparsekern import csr as rows_of
from sparsekern.conv import Geometry, rows_cuda
from sparsekern.nn import SparseConv2d

from . import gpu_data
from .cases import Bar, Case, Variants, _gate
from .gpu_data import copied, copies_of, first_of, normal

FEW = (14336, 4096)  # rows and columns of a weight for few tokens, and for many
MANY, MANY_TOKENS = 4096, (64, 512)
IMAGES, CHANNELS, IMAGE_SHAPES = 32, 256, ((28, False), (14, False), (28, True))  # side, whether channels_last


def bitmap() -> Iterator[Case]:
    n, k = FEW
    for density, bar in ((0.5, 1.5), (0.3, 2.2)):
        for m in (1, 16):

            def make(m: int = m, density: float = density) -> dict[str, Any]:
                dense, x = gpu_data.weight(n, k, torch.bfloat16, density), normal(m, k, dtype=torch.bfloat16)
                packed = bits_of.pack(dense)
                count = copies_of(packed.nbytes)
                packs, weights = [copied(packed) for _ in range(count)], [dense.clone() for _ in range(count)]
                return {
                    "sparsekern": [lambda w=w: sk.linear(x, w, backend="cuda") for w in packs],
                    "dense": [lambda w=w: F.linear(x, w) for w in weights],
                }

            params = {"shape": f"{n}x{k}", "M": m, "sparsity": round(1 - density, 2), "dtype": "bfloat16"}
            yield Case("gpu_bitmap", params, (Bar("dense", bar),), make, gate=first_of(_gate(1e-2)))


def csr() -> Iterator[Case]:
    n = k = MANY
    for dtype in (torch.float32, torch.float16):
        for density in (0.1, 0.05, 0.01):
            for m in MANY_TOKENS:

                def make(m: int = m, density: float = density, dtype: torch.dtype = dtype) -> dict[str, Any]:
                    dense, x = gpu_data.weight(n, k, dtype, density), normal(m, k, dtype=dtype)
                    own, theirs, columns = sk.to_csr(dense), dense.to_sparse_csr(), x.t().contiguous()
                    return {
                        "sparsekern": lambda: sk.linear(x, own, backend="cuda"),
                        "cuSPARSE": lambda: (theirs @ columns).t(),
                        "dense": lambda: F.linear(x, dense),
                    }

                params = {"shape": f"{n}x{k}", "M": m, "sparsity": round(1 - density, 2), "dtype": str(dtype)[6:]}
                yield Case("gpu_csr", params, (Bar("cuSPARSE", 2.0),), make, gate=first_of(_gate(1e-2)))


def csr_decode() -> Iterator[Case]:
    """Few tokens below the densities of `bitmap`: bytes only. Bars are 0.6 of what the bytes allow."""
    n, k = FEW
    for density in (0.2, 0.1, 0.05):
        for m in (1, 4):

            def make(m: int = m, density: float = density) -> dict[str, Any]:
                dense, x = gpu_data.weight(n, k, torch.bfloat16, density), normal(m, k, dtype=torch.bfloat16)
                count = copies_of(int(n * k * 3 * density))
                rows, bits, own = rows_of.pack(dense), bits_of.pack(dense), dense.to_sparse_csr()
                packed, maps = [copied(rows) for _ in range(count)], [copied(bits) for _ in range(count)]
                theirs, weights = [own.clone() for _ in range(count)], [dense.clone() for _ in range(count)]
                columns = x.t().contiguous()
                return {
                    "sparsekern": [lambda w=w: sk.linear(x, w, backend="cuda") for w in packed],
                    "sparsekern bitmap": [lambda w=w: sk.linear(x, w, backend="cuda") for w in maps],
                    "cuSPARSE": [lambda w=w: (w @ columns).t() for w in theirs],
                    "dense": [lambda w=w: F.linear(x, w) for w in weights],
                }

            bars = (Bar("dense", round(0.6 * 2 / (3 * density), 2)), Bar("cuSPARSE", 2.0)) if m == 1 else ()
            params = {"shape": f"{n}x{k}", "M": m, "sparsity": round(1 - density, 2), "dtype": "bfloat16"}
            yield Case("gpu_csr_decode", params, bars, make, gate=first_of(_gate(1e-2)))


def csr_conv() -> Iterator[Case]:
    """3x3, a batch of 32, against cuDNN: what a user gets, and the direct kernel by itself.

    float32 with and without TF32: `sparsekern` may be the direct kernel or the dense road (conv/rows_cuda.py).
    """
    kinds = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True))
    for side, last in IMAGE_SHAPES:
        for dtype, tf32 in kinds:
            for sparsity in (0.8, 0.9, 0.95):

                def make(
                    side: int = side,
                    last: bool = last,
                    dtype: torch.dtype = dtype,
                    tf32: bool = tf32,
                    sparsity: float = sparsity,
                ) -> Variants:
                    c, on = CHANNELS, {"dtype": dtype, "device": gpu_data.DEVICE}
                    dense = torch.nn.Conv2d(c, c, 3, padding=1, bias=False, **on)
                    dense.weight.data.copy_(gpu_data.weight(c, 9 * c, dtype, 1 - sparsity).view(c, c, 3, 3))
                    order = torch.channels_last if last else torch.contiguous_format
                    dense = dense.to(memory_format=order).requires_grad_(False)
                    sparse = SparseConv2d.from_dense(dense, format="csr").requires_grad_(False)
                    sparse.backend = "cuda"
                    x = normal(IMAGES, c, side, side, dtype=dtype).to(memory_format=order)

                    def direct() -> Tensor:
                        geometry = cast(Geometry, sparse.geometry)
                        return rows_cuda.conv2d(sparse.packed, x, None, geometry, "none", direct=True)

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
                    "convolution": f"3x3, {CHANNELS}→{CHANNELS}", "side": side, "batch": IMAGES, "sparsity": sparsity,
                    "dtype": str(dtype)[6:] + (" (TF32)" if tf32 and dtype == torch.float32 else ""),
                    "images": "channels_last" if last else "contiguous",
                }  # fmt: skip
                bars = (Bar("dense", 0.9 if tf32 else round(0.2 / (1 - sparsity), 2)),)
                yield Case("gpu_csr_conv", params, bars, make, gate=_gate(1e-2))
