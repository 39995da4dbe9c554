"""sp24 in the orders of torch.sparse (CUTLASS sm_80) and cuSPARSELt, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsekern import testing
from sparsekern.sp24 import interchange, pack, vendor
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


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (64, 96), (192, 128)], ids=str)
def test_cusparselt_sm90(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Nibble by nibble where torchao's formulas have it; a bijection; and the way back."""
    (n, k), layout = shape, pack(two_of_four(*shape, dtype))
    blob = interchange.to_cusparselt_sm90(layout)
    assert torch.equal(blob[: n * k // 2].reshape(n, k // 2), layout.values)
    tail = blob[n * k // 2 :].view(torch.uint8).tolist()
    assert len(tail) == n * k // 8
    seen = set()
    for row in range(n):
        for group in range(k // 4):
            column, nibble = 4 * group, int(layout.metadata[row, group // 2]) >> 4 * (group % 2) & 15
            at = row // 64 * 8 * k + column // 32 * 256 + row % 64 // 16 * 64 + row % 8 * 8
            at += 2 * (group % 4) + group % 8 // 4
            assert tail[at] >> 4 * (row // 8 % 2) & 15 == nibble
            seen.add((at, row // 8 % 2))
    assert len(seen) == n * k // 4
    back = interchange.from_cusparselt_sm90(blob, shape)
    assert torch.equal(back.metadata, layout.metadata)
    assert torch.equal(back.values, layout.values)


def test_cusparselt_sm90_by_hand() -> None:
    """The first piece of a block: rows 0 and 8 of the first 32 columns, groups 0 4 1 5 2 6 3 7."""
    w = torch.zeros(64, 64, dtype=torch.float16)
    pairs = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 1), (1, 2))  # 4 8 9 C D E 4 9
    for group, (a, b) in enumerate(pairs):
        w[0, [4 * group + a, 4 * group + b]] = 1
        w[8, [4 * (7 - group) + a, 4 * (7 - group) + b]] = 1
    w[17, [32, 33]] = 1  # row 1 of the second 16, first group of the second block of columns
    tail = interchange.to_cusparselt_sm90(pack(w))[64 * 32 :].view(torch.uint8).tolist()
    assert tail[:8] == [0x94, 0xCD, 0x48, 0x9E, 0xE9, 0x84, 0xDC, 0x49]
    assert tail[256 + 64 + 8] == 0xE4
    assert set(tail) - set(tail[:8]) - {0xE4} == {0xEE}


def places(compress: Any, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Which group, row * K / 4 + column / 4, has each nibble behind the values that compress(w) writes; -1: none.

    Each group stores its first pair or its last, as one bit of its number says: so many matrices as it has bits.
    """
    number = torch.arange(n * k // 4).reshape(n, k // 4)
    found, known = torch.tensor(0), torch.tensor(True)
    for bit in range(int(number.max()).bit_length()):
        last = (number >> bit & 1).bool()[..., None]
        pairs = torch.where(last, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])).reshape(n, k)
        out = compress(pairs.to(dtype)).reshape(-1).view(torch.uint8).cpu()
        tail = out[n * k // 2 * dtype.itemsize :]
        nibbles = torch.stack((tail & 15, tail >> 4), -1).reshape(-1)
        known = known & ((nibbles == 0x4) | (nibbles == 0xE))
        found = found + ((nibbles == 0xE).long() << bit)
    return torch.where(known, found, -1)


def test_places() -> None:
    """Of orders that are known: what the card's test finds out there."""
    n, k = 128, 128
    found = places(lambda w: interchange.to_cusparselt_sm90(pack(w)), n, k, torch.float16)
    assert torch.equal(found.sort().values, torch.arange(n * k // 4))
    assert found[:4].tolist() == [0, 8 * k // 4, 4, 8 * k // 4 + 4]
    with_padding = places(
        lambda w: torch.cat((interchange.to_cusparselt_sm80(pack(w)), torch.zeros(9, dtype=w.dtype))),
        n,
        k,
        torch.float16,
    )
    assert (with_padding[n * k // 4 :] == -1).all()
    assert torch.equal(with_padding[: n * k // 4].sort().values, torch.arange(n * k // 4))


def cusparselt_here() -> str | None:
    return vendor.why_not_here(torch.device("cuda")) if torch.cuda.is_available() else "torch sees no CUDA device"


on_a_card = pytest.mark.skipif(cusparselt_here() is not None, reason=str(cusparselt_here()))


@on_a_card
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(128, 64), (256, 512)], ids=str)
def test_the_library_makes_the_same_blob(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    card = torch.cuda.get_device_capability()
    if card not in ((8, 0), (8, 6), (8, 9), (9, 0)):
        pytest.skip(f"cuSPARSELt's order on compute capability {card} is not known")
    w = two_of_four(*shape, dtype)
    ours = interchange.to_cusparselt_sm90(pack(w)) if card == (9, 0) else interchange.to_cusparselt_sm80(pack(w))
    theirs = torch._cslt_compress(w.cuda()).reshape(-1).cpu()
    assert torch.equal(theirs[: ours.numel()].view(torch.int16), ours.view(torch.int16))


@on_a_card
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_order_of_the_library(dtype: torch.dtype) -> None:
    """Prints (pytest -rP) where the library puts each power of two among the groups: enough to write its order down."""
    n, k = 128, 256
    found = places(lambda w: torch._cslt_compress(w.cuda()), n, k, dtype).tolist()
    at = {group: place for place, group in enumerate(found) if group >= 0}
    print(f"cuSPARSELt {torch.backends.cusparselt.version()}, {torch.cuda.get_device_name()}, {dtype}, W[{n}, {k}]:")
    print(f"{len(found)} nibbles follow the values, {len(at)} of them groups; nibble of group 0: {at.get(0)}")
    for bit in range(k.bit_length() - 3):
        print(f"  column {4 << bit:4}: nibble {at.get(1 << bit)}")
    for bit in range(n.bit_length() - 1):
        print(f"  row    {1 << bit:4}: nibble {at.get((1 << bit) * k // 4)}")
    assert len(at) == n * k // 4, "every group is written once"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="N in multiples of 64, K of 32"):
        interchange.to_cusparselt_sm90(pack(two_of_four(32, 64, torch.bfloat16)))
    with pytest.raises(ValueError, match="4608 elements, got 10"):
        interchange.from_cusparselt_sm90(torch.zeros(10, dtype=torch.float16), (128, 64))
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
