"""What is not a product: packing on the card against copies, and what the host does for a warm call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekern import sp24
from sparsekern.nn import SparseLinear
from sparsekern.sp24 import fragments, repack
from sparsekern.sp24.pack import prune_mask, transposable_mask

from . import gpu_data
from .cases import Bar, Case, Variants, _gate
from .gpu_data import normal

PACKED = 8192  # rows and columns
SMALL = 128
FORMATS = ("sp24", "bsr", "csr", "bitmap")


def pack() -> Iterator[Case]:
    """2:4 by magnitude into canonical and fragment order; W and W^T by transposable patterns. Bars are copies of W."""
    for how, most in (("top2", 3.0), ("transposable", 2.0)):
        for dtype in (torch.bfloat16, torch.float16):

            def make(how: str = how, dtype: torch.dtype = dtype) -> Variants:
                w = normal(PACKED, PACKED, dtype=dtype, seed=0)
                out, both = torch.empty_like(w), how == "transposable"
                return {
                    "sparsekern": lambda: repack.pack(w, how, fragments=True, transposed=both),
                    "copy": lambda: out.copy_(w),
                }

            def gate(variants: dict[str, Any], how: str = how) -> None:
                check(variants["sparsekern"](), variants["copy"](), how)

            params = {"shape": f"{PACKED}x{PACKED}", "dtype": str(dtype)[6:], "how": how}
            yield Case("gpu_pack", params, (Bar("copy", round(1 / most, 3)),), make, gate=gate)


def check(made: repack.Packed, w: Tensor, how: str) -> None:
    """In the first rows, where plain torch on the CPU is quick: what is kept, and the fragments of it."""
    rows, k = min(128, w.shape[0]), w.shape[1]
    part = w[:rows].cpu()
    keep = prune_mask(part) if how == "top2" else transposable_mask(part)
    layout = sp24.Sp24(values=made.values[:rows].cpu(), metadata=made.metadata[:rows].cpu(), shape=(rows, k))
    assert torch.equal(layout.unpack(), part.where(keep, 0)), f"{how} keeps other weights than plain torch"
    for order, of in ((made.fragments, layout), (made.fragments_t, None)):
        if order is not None and of is not None:
            assert torch.equal(order[: rows // fragments.BLOCK_ROWS].cpu(), fragments.pack(of)), "fragments of W"
        elif order is not None:  # of W^T: the first rows of W are its first columns
            theirs = fragments.pack(sp24.pack(part.where(keep, 0).t()))
            columns = rows // fragments.block_k(w.dtype)
            assert torch.equal(order[:, :columns].cpu(), theirs[:, :columns]), "fragments of W^T"


def launch() -> Iterator[Case]:
    """Host time of a module's warm call, on a layer that keeps no device busy."""
    for format in FORMATS:
        for gradients in (False, True):

            def make(format: str = format, gradients: bool = gradients) -> Variants:
                options = {"dtype": torch.bfloat16, "device": gpu_data.DEVICE}
                dense = torch.nn.Linear(SMALL, SMALL, bias=False, **options)
                size = (SMALL, SMALL, torch.bfloat16)
                random = gpu_data.weight(*size, 0.5, 16 if format == "bsr" else 1)
                dense.weight.data.copy_(gpu_data.weight24(*size)[0] if format == "sp24" else random)
                sparse = SparseLinear.from_dense(dense, format=format, block_size=16)
                for module in (dense, sparse):
                    module.requires_grad_(gradients)
                x, weight = normal(1, SMALL, dtype=torch.bfloat16), dense.weight
                return {"sparsekern": lambda: sparse(x), "dense": lambda: F.linear(x, weight)}

            params = {"format": format, "shape": f"{SMALL}x{SMALL}", "M": 1, "gradients": gradients}
            bar = () if gradients else (10.0,)
            yield Case("gpu_launch", params, (), make, gate=_gate(1e-2), tags=frozenset({"launch"}), microseconds=bar)
