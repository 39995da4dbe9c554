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
from sparsekern._ext import FP8
from sparsekern.sp24 import interchange, pack, vendor
from sparsekern.sp24.layout import Sp24
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


class Unknown:
    """A cuSPARSELt that puts the nibbles in an order of its own, as torch gives it away: values, then metadata."""

    def __init__(self, n: int, k: int) -> None:
        self.shape = (n, k)
        self.order = torch.randperm(n * k // 8, generator=testing.generator(5))
        self.products = 0

    def compress(self, dense: Tensor) -> Tensor:
        layout = pack(dense)
        tail = layout.metadata.reshape(-1)[self.order].view(dense.dtype)
        return torch.cat((layout.values.reshape(-1), tail)).reshape(dense.shape[0], -1)

    def mm(self, weight: Tensor, tokens: Tensor, out_dtype: Any, transpose_result: bool, alg_id: int) -> Tensor:
        assert weight.dtype == tokens.dtype
        assert transpose_result
        assert tokens.t().is_contiguous(), "8-bit types are multiplied in this order alone"
        self.products += 1
        (n, k), blob = self.shape, weight.reshape(-1)
        bytes_of = torch.empty(n * k // 8, dtype=torch.uint8)
        bytes_of[self.order] = blob[n * k // 2 :].view(torch.uint8)
        layout = Sp24(values=blob[: n * k // 2].reshape(n, -1), metadata=bytes_of.reshape(n, -1), shape=self.shape)
        return (tokens.t().double() @ layout.unpack().double().t()).to(out_dtype or tokens.dtype)


@pytest.fixture(params=[(8, 9), (9, 0)], ids=["sm_89", "sm_90"])
def unknown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Unknown:
    made = Unknown(64, 96)
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.mm)
    monkeypatch.setattr(vendor, "why_not_here", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    return made


def finite(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """2:4, with the largest and smallest values of the type, negative zeros and groups without any nonzero."""
    w = two_of_four(n, k, torch.float32)
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        small = info.smallest_normal if dtype == torch.bfloat16 else info.smallest_normal * info.eps
        special = torch.tensor([info.max, info.min, small, -small])
        w[3] = w[3].where(w[3] == 0, special[torch.arange(k) % 4])
    w[5] = 0
    w[6] = w[6].where(w[6] != 0, -0.0)
    return w.to(dtype)


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


BLOB_TYPES = (*TYPES, FP8)


@pytest.mark.parametrize("dtype", BLOB_TYPES, ids=str)
def test_an_order_that_nobody_knows(unknown: Unknown, dtype: torch.dtype) -> None:
    """The library's blob and back, bit for bit; float16 on Hopper, which it should not multiply, by our own order."""
    w = finite(*unknown.shape, dtype)
    scale = testing.random_scale(w.shape[0]) if dtype.itemsize == 1 else None
    layout = pack(w, scale=scale)
    blob = interchange.to_cusparselt(layout)
    assert blob.numel() * 16 == w.numel() * (10 if dtype.itemsize == 1 else 9)
    back = interchange.from_cusparselt(blob, unknown.shape, scale).check()
    assert torch.equal(back.metadata, layout.metadata)
    assert equal(back.values, layout.values)
    hopper = torch.cuda.get_device_capability(None) == (9, 0)
    assert unknown.products == (0 if hopper and dtype == torch.float16 else 1)


def test_blobs_that_are_refused(unknown: Unknown, monkeypatch: pytest.MonkeyPatch) -> None:
    w = finite(*unknown.shape, torch.bfloat16)
    for bad in (torch.nan, torch.inf):
        other = w.clone()
        other[7] = other[7].where(other[7] == 0, bad)
        with pytest.raises(ValueError, match="not finite"):
            interchange.from_cusparselt(unknown.compress(other), unknown.shape)
    with pytest.raises(ValueError, match=r"of shape \(64, 96\), 3456 elements; got 10"):
        interchange.from_cusparselt(torch.zeros(10, dtype=torch.bfloat16), unknown.shape)
    with pytest.raises(ValueError, match="multiples of 32"):
        interchange.from_cusparselt(torch.zeros(480, dtype=torch.int8), (16, 48))
    with pytest.raises(NotImplementedError, match=r"no torch.float32"):
        interchange.to_cusparselt(pack(two_of_four(32, 64, torch.float32)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(NotImplementedError, match=r"needs compute capability 9\.0"):
        interchange.to_cusparselt(pack(finite(64, 96, FP8), scale=torch.ones(64)))
    monkeypatch.setattr(vendor, "why_not_here", lambda device: "there is none")
    with pytest.raises(NotImplementedError, match="there is none"):
        interchange.from_cusparselt(unknown.compress(w), unknown.shape)


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
@pytest.mark.parametrize("dtype", BLOB_TYPES, ids=str)
def test_the_library_s_blob_and_back(dtype: torch.dtype) -> None:
    """On whatever card: what the library compressed it also writes out."""
    reason = vendor.why_not_type(dtype, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    w = finite(128, 256, dtype).cuda()
    scale = testing.random_scale(128).cuda() if dtype.itemsize == 1 else None
    layout = pack(w, scale=scale)
    back = interchange.from_cusparselt(interchange.to_cusparselt(layout), (128, 256), scale)
    assert torch.equal(back.metadata, layout.metadata)
    assert equal(back.values, layout.values)


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
