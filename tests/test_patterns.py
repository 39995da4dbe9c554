"""The pattern finder against the definition, spelt out in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsekern as sk
from sparsekern.patterns import analyse, as_matrix, as_weight, nonzero_mask, order_names, suggest
from sparsekern.sp24.pack import prune_mask
from sparsekern.testing import random_weight


def pruned_24(shape: tuple[int, ...], order: str, seed: int = 0) -> Tensor:
    """A weight that is 2:4 in one K order, exactly two kept in each group."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    matrix = as_matrix(w, order)
    kept = torch.where(prune_mask(matrix), matrix, torch.zeros(()))
    return as_weight(kept, shape, order).contiguous()


shapes = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(0, 70)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4)),
)


@given(shapes, st.sampled_from([0.05, 0.4, 0.6, 1.0]), st.integers(0, 9))
def test_analysis_is_the_definition(shape: tuple[int, ...], density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)
    found = analyse(w, blocks=(4, 16))
    assert found.nonzeros == int((w != 0).sum())
    assert [o.name for o in found.orders] == list(order_names(w.dim()))
    for order in found.orders:
        matrix = as_matrix(w, order.name)
        assert torch.equal(as_weight(matrix, w.shape, order.name), w)
        n, k = order.shape
        assert (n, k) == tuple(matrix.shape)
        bad = [
            (row, group)
            for row in range(n)
            for group in range(-(-k // 4))
            if int((matrix[row, 4 * group : 4 * group + 4] != 0).sum()) > 2
        ]
        assert order.violations == len(bad)
        assert order.is_24 is (not bad)
        if bad:
            assert order.first is not None
            assert (order.first.row, order.first.group) == bad[0]
            row, group = bad[0]
            assert order.first.values == tuple(matrix[row, 4 * group : 4 * group + 4].tolist())
        for size, share in order.blocks.items():
            grid = [
                bool((matrix[i : i + size, j : j + size] != 0).any())
                for i in range(0, n, size)
                for j in range(0, k, size)
            ]
            assert share == pytest.approx(sum(grid) / len(grid) if grid else 0.0)


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
@pytest.mark.parametrize("shape", [(48, 64), (33, 70), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_packed_weight(format: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = random_weight(format, *shape, dtype=dtype, density=0.4, block=16)
    pack = {
        "sp24": sk.to_sparse_semi_structured,
        "csr": sk.to_csr,
        "bitmap": sk.to_bitmap,
        "bsr": lambda w: sk.to_block_sparse(w, 16),
    }[format]
    assert analyse(w).nbytes(format, 16) == pack(w).nbytes


def test_zeros_of_every_kind() -> None:
    w = torch.tensor([[0.0, -0.0, 1.0, float("nan")], [0.0, 0.0, 0.0, float("inf")]])
    found = analyse(w)
    assert (found.nonzeros, found.negative_zeros, found.nonfinite, found.empty_rows) == (3, 1, 2, 0)
    assert found.order("k").is_24
    fp8 = torch.tensor([[0.0, -0.0, 1.0, -2.0]]).to(torch.float8_e4m3fn)
    assert nonzero_mask(fp8).tolist() == [[False, False, True, True]]
    assert analyse(fp8).negative_zeros == 1
    assert analyse(torch.tensor([[0, 3, 0, -1]], dtype=torch.int8)).nonzeros == 2


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (pruned_24((32, 64), "k"), ("sp24", "k")),
        (pruned_24((32, 16, 3, 3), "rsc"), ("sp24", "rsc")),
        (pruned_24((32, 16, 3, 3), "crs"), ("sp24", "crs")),
        (pruned_24((32, 64), "n"), ("bitmap", "k")),
        (random_weight("bsr", 128, 128, density=0.3, block=32), ("bsr", "k")),
        (random_weight("csr", 64, 64, density=0.1), ("csr", "k")),
        (random_weight("csr", 64, 64, density=0.5), ("bitmap", "k")),
        (torch.randn(32, 64), (None, "k")),
        (torch.zeros(32, 64), (None, "k")),
        (torch.zeros(0, 64), (None, "k")),
        (torch.randn(64, 2), (None, "k")),  # 2:4 by its size alone
        (pruned_24((32, 64), "k").to(torch.float8_e4m3fn), (None, "k")),
    ],
)
def test_what_suits(weight: Tensor, expected: tuple[str | None, str]) -> None:
    wish = suggest(analyse(weight))
    assert (wish.format, wish.order) == expected
    assert wish.reason


def test_block_size_is_the_largest_that_wastes_little() -> None:
    w = random_weight("bsr", 256, 256, density=0.2, block=32)
    assert suggest(analyse(w)).block == 32
    w = random_weight("bsr", 256, 256, density=0.2, block=64)
    assert suggest(analyse(w)).block == 64


def test_refusals_say_what_came() -> None:
    with pytest.raises(ValueError, match="1-D"):
        analyse(torch.zeros(3))
    with pytest.raises(ValueError, match="complex64"):
        analyse(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"must be k or n for a 2-D weight, got 'rsc'"):
        as_matrix(torch.zeros(3, 3), "rsc")
    with pytest.raises(ValueError, match="multiple of the one before"):
        analyse(torch.zeros(9, 9), blocks=(4, 6))
    with pytest.raises(ValueError, match="block must be one of 16, 32, 64, got 5"):
        analyse(torch.zeros(9, 9)).nbytes("bsr", 5)
