"""sp24 in the orders of torch.sparse (CUTLASS sm_80) and cuSPARSELt, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsekern import testing
from sparsekern.sp24 import interchange, pack
from sparsekern.sp24.pack import prune_mask

TYPES = (torch.bfloat16, torch.float16, torch.int8)
SHAPES = ((32, 128), (64, 64), (96, 192), (128, 256))
types = pytest.mark.parametrize("dtype", TYPES, ids=str)


def two_of_four(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Exactly two nonzeros in every group, all six pairs."""
    rng = testing.generator(1)
    w = torch.randint(1, 100, (n, k), generator=rng) * (1 - 2 * torch.randint(0, 2, (n, k), generator=rng))
    return w.where(prune_mask(torch.rand(n, k, generator=rng)), 0).to(dtype)


@types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_has_the_same_words(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = two_of_four(*shape, dtype)
    layout = pack(w, scale=testing.random_scale(shape[0]) if dtype == torch.int8 else None)
    values, e = interchange.to_cutlass(layout)
    theirs, their_e = sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(values, theirs)
    assert e.dtype == their_e.dtype
    assert torch.equal(e, their_e)
    back = interchange.from_cutlass(theirs, their_e, layout.scale)
    assert torch.equal(back.metadata, layout.metadata)
    assert torch.equal(back.values, layout.values)


@types
def test_degenerate_groups_come_back(dtype: torch.dtype) -> None:
    """Groups with fewer nonzeros have words of their own in torch; the dense weight is the same, either way round."""
    n, k = 64, 128
    w = two_of_four(n, k, dtype)
    w = w.where(torch.rand(n, k, generator=testing.generator(2)) < 0.5, torch.zeros((), dtype=dtype))
    scale = testing.random_scale(n) if dtype == torch.int8 else None
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*interchange.to_cutlass(pack(w, scale=scale))), w)
    theirs = sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(interchange.from_cutlass(*theirs, scale).unpack(), w)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_cusparselt(dtype: torch.dtype) -> None:
    """Words of E found again in tiles of 128 x 64, block by block; and the way back."""
    n, k = 256, 192
    layout = pack(two_of_four(n, k, dtype))
    blob = interchange.to_cusparselt_sm80(layout)
    assert blob.numel() * 16 == n * k * 9
    assert torch.equal(blob[: n * k // 2].reshape(n, k // 2), layout.values)
    blocks = blob[n * k // 2 :].view(torch.int16).reshape(-1, 64)
    e = interchange.to_cutlass(layout)[1].reshape(k // 32, n // 32, 64)
    for row in range(n // 32):
        for column in range(k // 32):
            tile = column // 2 * (n // 128) + row // 4
            assert torch.equal(blocks[tile * 8 + column % 2 * 4 + row % 4], e[column, row])
    back = interchange.from_cusparselt_sm80(blob, (n, k))
    assert torch.equal(back.metadata, layout.metadata)
    assert torch.equal(back.values, layout.values)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        interchange.to_cutlass(pack(two_of_four(16, 64, torch.bfloat16)))
    with pytest.raises(ValueError, match=r"not torch.float32"):
        interchange.to_cutlass(pack(two_of_four(32, 64, torch.float32)))
    with pytest.raises(ValueError, match="multiples of 128"):
        interchange.to_cusparselt_sm80(pack(two_of_four(32, 64, torch.bfloat16)))
    values, e = interchange.to_cutlass(pack(two_of_four(32, 64, torch.bfloat16)))
    with pytest.raises(ValueError, match="E must be"):
        interchange.from_cutlass(values, e[:16])
    e[3, 1] = 0
    with pytest.raises(ValueError, match="no legal 2:4 nibble"):
        interchange.from_cutlass(values, e)
    with pytest.raises(ValueError, match="elements"):
        interchange.from_cusparselt_sm80(torch.zeros(10, dtype=torch.float16), (128, 64))
