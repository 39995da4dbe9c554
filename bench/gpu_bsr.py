"""Block-sparse on a GPU, against cuBLAS, torch's own kernel and cuDNN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from functools import partial

import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern import _ext
from sparsekern._library import MM, MM_T, SDDMM
from sparsekern.bsr import Bsr
from sparsekern.bsr import triton as launcher
from sparsekern.bsr.config import candidates
from sparsekern.conv import weight_of
from sparsekern.nn import SparseConv2d

from . import gpu_data
from .cases import Bar, Case, Variants, _gate
from .gpu_data import first_of, normal

DTYPE = torch.bfloat16
MANY = ((4096, 4096), (14336, 4096))
MANY_TOKENS = (2048, 8192)
BLOCKS = (128, 64)
FEW = (28672, 8192)
SQUARE = 4096
GATE = first_of(_gate(1e-2))
IMAGES, CHANNELS, SIDES = 32, 256, (28, 14)


def linear(n: int, k: int, m: int, block: int, sparsity: float) -> Variants:
    """Ours, cuBLAS, and torch's own block-sparse kernel."""
    weight, x = gpu_data.weight(n, k, DTYPE, 1 - sparsity, block), normal(m, k, dtype=DTYPE)
    w, own = sk.to_block_sparse(weight, block), weight.to_sparse_bsr((block, block))
    return {
        "sparsekern": lambda: sk.linear(x, w, backend="triton"),
        "dense": lambda: F.linear(x, weight),
        "torch BSR": lambda: F.linear(x, own),
    }


def mm() -> Iterator[Case]:
    """Many tokens: 0.85 (blocks of 128) and 0.6 (64) of cuBLAS for each multiplication that is left."""
    for n, k in MANY:
        for block, share in zip(BLOCKS, (0.85, 0.6), strict=True):
            for sparsity in (0.5, 0.75, 0.9):
                for m in MANY_TOKENS:
                    size = (n, k, m, block, sparsity)
                    bars = (Bar("dense", round(share / (1 - sparsity), 2)), Bar("torch BSR", 1.2))
                    params = {"shape": f"{n}x{k}", "block": block, "M": m, "sparsity": sparsity, "dtype": "bfloat16"}
                    yield Case("gpu_bsr_mm", params, bars, lambda size=size: linear(*size), gate=GATE)


def configurations() -> Iterator[Case]:
    """Every configuration that the rule may take, for the shapes above: what the rule is to be fitted to."""
    for n, k in MANY:
        for block in BLOCKS:

            def make(n: int = n, k: int = k, block: int = block) -> Variants:
                m = MANY_TOKENS[0]
                weight, x = gpu_data.weight(n, k, DTYPE, 0.25, block), normal(m, k, dtype=DTYPE)
                layout = sk.to_block_sparse(weight, block).packed
                card = (_ext.capability(x.device), _ext.multiprocessors(x.device))
                found = candidates("mm", m, n, k, layout.block, DTYPE, 0.25, *card)
                runs: Variants = {
                    "sparsekern " + " ".join(str(int(v)) for v in astuple(how)): partial(
                        launcher.mm, layout, x, None, "none", how=how
                    )
                    for how in found
                }
                return (
                    {"sparsekern": lambda: launcher.mm(layout, x, None, "none")}
                    | runs
                    | {"dense": lambda: F.linear(x, weight)}
                )

            params = {"shape": f"{n}x{k}", "block": block, "M": MANY_TOKENS[0], "sparsity": 0.75, "dtype": "bfloat16"}
            yield Case("gpu_bsr_configurations", params, (), make, gate=GATE)


def decode() -> Iterator[Case]:
    """Few tokens, a weight larger than the second-level cache: bytes only."""
    n, k = FEW
    for m in (1, 4, 16):
        size = (n, k, m, BLOCKS[1], 0.9)
        params = {"shape": f"{n}x{k}", "block": BLOCKS[1], "M": m, "sparsity": 0.9, "dtype": "bfloat16"}
        yield Case("gpu_bsr_decode", params, (Bar("dense", 5.0),), lambda size=size: linear(*size), gate=GATE)


def training() -> Iterator[Case]:
    """The three products of a step: Y, dX, and dW, which is sparse here and dense there."""
    for block in BLOCKS:
        layouts: list[Bsr] = []

        def make(block: int = block, layouts: list[Bsr] = layouts) -> Variants:
            n = k = m = SQUARE
            weight, x, dy = gpu_data.weight(n, k, DTYPE, 0.25, block), normal(m, k, dtype=DTYPE), normal(m, n, seed=2)
            dy = dy.to(DTYPE)
            w = sk.to_block_sparse(weight, block).packed
            layouts[:] = [w]
            return {
                "sparsekern": lambda: (
                    MM["bsr"](*w.parts, x, None, "none", "triton"),
                    MM_T["bsr"](*w.parts, dy, "triton"),
                    SDDMM["bsr"](*w.parts, dy, x, "triton"),
                ),
                "dense": lambda: (F.linear(x, weight), dy @ weight, dy.t() @ x),
            }

        def gate(variants: Variants, layouts: list[Bsr] = layouts) -> None:
            ours, dense = variants["sparsekern"](), variants["dense"]()
            right = (*dense[:2], layouts[0].sample(dense[2]))
            for name, mine, theirs in zip(("Y", "dX", "dW"), ours, right, strict=True):
                _gate(1e-2)({name: lambda t=mine: t, "dense": lambda t=theirs: t})

        params = {"shape": f"{SQUARE}x{SQUARE}", "block": block, "M": SQUARE, "sparsity": 0.75, "dtype": "bfloat16"}
        bars = (Bar("dense", round(0.7 / 0.25, 2)),) if block == BLOCKS[0] else ()
        yield Case("gpu_bsr_training", params, bars, make, gate=gate)


def conv() -> Iterator[Case]:
    """3x3, a batch of 32, channels_last, against cuDNN."""
    for side in SIDES:
        for block in reversed(BLOCKS):

            def make(side: int = side, block: int = block) -> Variants:
                c = CHANNELS
                dense = torch.nn.Conv2d(c, c, 3, padding=1, bias=False, dtype=DTYPE, device=gpu_data.DEVICE)
                dense.weight.data.copy_(weight_of(gpu_data.weight(c, 9 * c, DTYPE, 0.25, block), (3, 3), "rsc"))
                dense = dense.to(memory_format=torch.channels_last).requires_grad_(False)
                sparse = SparseConv2d.from_dense(dense, format="bsr", block_size=block, order="rsc")
                sparse.backend = "triton"
                sparse.requires_grad_(False)
                x = normal(IMAGES, c, side, side, dtype=DTYPE).to(memory_format=torch.channels_last)
                return {"sparsekern": lambda: sparse(x), "dense": lambda: dense(x)}

            params = {"convolution": f"3x3, {CHANNELS}→{CHANNELS}", "side": side, "batch": IMAGES, "block": block,
                      "sparsity": 0.75}  # fmt: skip
            yield Case("gpu_bsr_conv", params, (Bar("dense", 2.0),), make, gate=_gate(1e-2))
