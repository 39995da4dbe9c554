"""CSR and bitmap on a GPU: formats whose price is the weight's bytes, against cuBLAS and cuSPARSE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern.testing import random_weight

from .cases import Bar, Case, _gate
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
