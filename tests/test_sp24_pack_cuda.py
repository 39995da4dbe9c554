"""sp24_repack in the emulator: every source and destination against plain torch, bit for bit, under every schedule."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from sparsekern import _ext, testing
from sparsekern._ext import FP8
from sparsekern.sp24 import Sp24, fragments, repack
from sparsekern.sp24.pack import _pack_device, pack, prune_mask, transposable_mask

pytestmark = pytest.mark.usefixtures("emulated")
WIDE, NARROW = (torch.bfloat16, torch.float16), (torch.int8, FP8)
ALL = (*WIDE, *NARROW)
SHAPES = ((1, 8), (1, 4), (3, 1), (65, 12), (64, 64), (70, 136), (130, 97), (16, 250))


def raw(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def random(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    rng = testing.generator(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (n, k), generator=rng).to(torch.int8)
    return torch.randn(n, k, generator=rng).to(dtype)


def places(metadata: Tensor, k: int) -> Tensor:
    """bool [N, K]: what is stored, from the nibbles one by one."""
    keep = torch.zeros(metadata.shape[0], 8 * metadata.shape[1], dtype=torch.bool)
    for i in range(metadata.shape[1]):
        for g, nibble in enumerate((metadata[:, i] & 15, metadata[:, i] >> 4)):
            first, second = (nibble & 3).long(), (nibble >> 2).long()
            assert bool((first < second).all())
            keep.scatter_(1, 8 * i + 4 * g + torch.stack((first, second), 1), True)
    return keep[:, :k]


def dense_of(w: Tensor, keep: Tensor) -> Tensor:
    """w where kept, 0.0 elsewhere."""
    out = torch.zeros_like(raw(w)).view(*w.shape, w.itemsize)
    out[keep] = raw(w).view(*w.shape, w.itemsize)[keep]
    return out.flatten(1).view(w.dtype)


def check_layout(made: repack.Packed, w: Tensor, keep: Tensor) -> None:
    """The stored places hold all that is kept, each with its bits; fragments agree with the permutation in torch."""
    (n, k), stored = w.shape, places(made.metadata, w.shape[1])
    assert bool((stored | ~keep).all())
    layout = Sp24(values=made.values, metadata=made.metadata, shape=(n, k))
    ours = layout.with_values(made.values.view(torch.int16 if w.itemsize == 2 else torch.int8)).unpack()
    bits = w.view(torch.int16 if w.itemsize == 2 else torch.int8)
    assert torch.equal(ours[keep], bits[keep])
    if made.fragments is not None:
        assert torch.equal(made.fragments, fragments.pack(layout))


def check_host(made: repack.Packed | Sp24, w: Tensor, prune: bool = False) -> None:
    """The host packer makes the same, bit for bit; from a copy on the CPU, else a card would answer for itself."""
    host = pack(w.cpu(), prune=prune)
    assert torch.equal(made.metadata.cpu(), host.metadata)
    assert torch.equal(raw(made.values.cpu()), raw(host.values))


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_top2(dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        w = random(n, k, dtype)
        made = repack.pack(w, "top2", fragments=True)
        check_layout(made, w, prune_mask(w.float()) & (w.float() != 0))
        if dtype in _ext.DTYPES:
            check_host(made, w, prune=True)


def test_top2_of_special_values() -> None:
    """Ties keep the lower index, NaN is largest, -0.0 is nothing: every group of seven kinds, as on the host."""
    for dtype in WIDE:
        kinds = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("nan")], dtype=dtype)
        groups = torch.tensor(list(product(range(7), repeat=4)))
        w = kinds[groups].reshape(-1, 28 * 7)
        check_host(repack.pack(w, "top2"), w, prune=True)
    # A NaN with another payload is no larger than the others.
    bits = torch.tensor([[0x7F81, 0x7FFF, 0x7FC0, 0x7F80] * 2], dtype=torch.int32).to(torch.int16)
    w = bits.view(torch.bfloat16)
    assert torch.equal(repack.pack(w, "top2").metadata, torch.tensor([[0x44]], dtype=torch.uint8))


def test_all_magnitudes_of_int8_and_fp8() -> None:
    for dtype in NARROW:
        one = torch.arange(256, dtype=torch.uint8)
        w = torch.stack((one, one.roll(1), one.roll(77), one.roll(130)), 1).view(dtype).reshape(16, 64)
        wide = w.float()
        if dtype == FP8:
            wide = torch.where(wide.isnan(), 1e9, wide)
        made = repack.pack(w, "top2", fragments=True)
        check_layout(made, w, prune_mask(wide) & (wide != 0))
        if dtype == torch.int8:
            check_host(made, w, prune=True)


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_strict(dtype: torch.dtype) -> None:
    """The six patterns and the degenerate groups; the first group with three nonzeros is told."""
    keeps = [sum(1 << i for i in c) for size in (0, 1, 2) for c in combinations(range(4), size)]
    bits = torch.tensor([[b >> i & 1 for i in range(4)] for b in keeps], dtype=torch.bool)
    keep = bits[torch.randint(0, len(keeps), (67, 35), generator=testing.generator(3))].flatten(1)
    w = random(67, 140, dtype, seed=4)
    w = torch.where(w.float() == 0, 1.0, w.float()).to(dtype)
    w = dense_of(w, keep)
    first = repack.no_crowd(w)
    made = repack.pack(w, "strict", fragments=True, first=first)
    assert first.tolist() == [-1, -1]
    check_layout(made, w, keep)
    host = pack(w.cpu() if dtype != FP8 else w.cpu().to(torch.float16))
    assert torch.equal(made.metadata.cpu(), host.metadata)
    for row, group in ((66, 34), (40, 3), (2, 30)):  # each earlier than the one before
        w[row, 4 * group : 4 * group + 3] = torch.ones(3).to(dtype)
        first = repack.no_crowd(w)
        repack.pack(w, "strict", first=first)
        assert int(first[0]) == row * 36 + group


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_from_a_mask(dtype: torch.dtype) -> None:
    """Zeros that the mask keeps are stored, nonzeros that it removes are not."""
    for n, k in SHAPES:
        w = random(n, k, dtype)
        w[:, ::3] = torch.zeros_like(w[:, ::3])
        keep = prune_mask(torch.randn(n, k, generator=testing.generator(5)))
        for mask in (keep, keep.t().contiguous().t()):
            first = repack.no_crowd(w)
            made = repack.pack(w, mask, fragments=True, first=first)
            assert int(first[0]) == -1
            check_layout(made, w, keep)
            layout = Sp24(values=made.values, metadata=made.metadata, shape=(n, k))
            assert torch.equal(raw(repack.unpack(layout)), raw(dense_of(w, keep)))
    crowded = torch.ones(3, 16, dtype=torch.bool)
    crowded[0] = False
    first = repack.no_crowd(w)
    repack.pack(random(3, 16, dtype), crowded, first=first)
    assert int(first[0]) == 4


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_roads_there_and_back(dtype: torch.dtype) -> None:
    """canonical -> fragments -> canonical and dense, against the permutations in torch."""
    for n, k in SHAPES:
        w = random(n, k, dtype, seed=6)
        made = repack.pack(w, "top2")
        layout = Sp24(values=made.values, metadata=made.metadata, shape=(n, k))
        order = repack.to_fragments(layout)
        assert torch.equal(order, fragments.pack(layout))
        values, metadata = repack.from_fragments(order, (n, k), dtype)
        assert torch.equal(raw(values), raw(made.values))
        assert torch.equal(metadata, made.metadata)
        dense = dense_of(w, places(made.metadata, k))
        assert torch.equal(raw(repack.unpack(layout)), raw(dense))
        assert torch.equal(raw(repack.unpack_fragments(order, (n, k), dtype)), raw(dense))
        out = torch.full_like(order, 0xA5)
        assert repack.to_fragments(layout, out) is out
        assert torch.equal(out, order)


def test_nothing_is_written_elsewhere() -> None:
    """Outputs between guard bands, sources with gaps after their rows, nothing aligned to more than an element."""
    for dtype, (n, k) in product((torch.bfloat16, torch.int8), ((65, 64), (3, 132), (66, 67))):
        w = testing.guarded(random(n, k, dtype, seed=7), gap=3).tensor
        expected = repack.pack(w.contiguous(), "top2")
        with testing.poisoned():
            made = repack.pack(w, "top2")
            layout = Sp24(values=made.values, metadata=made.metadata, shape=(n, k))
            dense = repack.unpack(layout)
        assert torch.equal(raw(made.values), raw(expected.values))
        assert torch.equal(made.metadata, expected.metadata)
        assert torch.equal(raw(dense), raw(dense_of(w.contiguous(), places(made.metadata, k))))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_sample(dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        layout = pack(random(n, k, dtype, seed=8), prune=True)
        dense = random(n, k + 3, dtype, seed=9)[:, :k]
        out = torch.full_like(layout.values, float("nan"))
        repack.sample(layout.metadata, dense, out)
        assert torch.equal(out, layout.sample(dense))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_transposable(dtype: torch.dtype) -> None:
    """The mask that plain torch finds, and W and W^T both packed by it."""
    for n, k in ((4, 8), (64, 64), (65, 68), (72, 132), (6, 10)):
        w = random(n, k, dtype, seed=10)
        keep = transposable_mask(w.cpu()).to(w.device)
        made = repack.pack(w, "transposable", fragments=True, transposed=True)
        check_layout(made, w, keep & (w != 0))
        assert torch.equal(places(made.metadata, k), keep)
        assert made.fragments_t is not None
        assert torch.equal(made.fragments_t.cpu(), fragments.pack(pack(dense_of(w, keep).t().cpu())))
        layout = Sp24(values=made.values, metadata=made.metadata, shape=(n, k))
        first = repack.no_crowd(w)
        assert torch.equal(repack.transpose(layout, first=first), made.fragments_t)
        assert first.tolist() == [-1, -1]


def test_transposable_of_special_values() -> None:
    """Ties, zeros, infinities and NaN: the same pattern as plain torch finds."""
    for dtype in WIDE:
        kinds = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("nan"), 3e38], dtype=dtype)
        w = kinds[torch.randint(0, 8, (64, 128), generator=testing.generator(11))]
        found = places(repack.pack(w, "transposable").metadata, 128)
        assert torch.equal(found.cpu(), transposable_mask(w.cpu()))


def test_transposing_what_is_not_transposable() -> None:
    """The first group of W^T with more than two nonzeros is told."""
    w = torch.zeros(72, 64, dtype=torch.bfloat16)
    w[64:68, 40] = 1
    w[8:11, 50] = 1
    first = repack.no_crowd(w)
    repack.transpose(pack(w), first=first)
    assert first.tolist() == [-1, 40 * 18 + 16]


def test_the_mask_is_best_of_all_patterns() -> None:
    """transposable_mask against all 90 patterns, one by one."""
    pairs = [torch.tensor([i in c for i in range(4)]) for c in combinations(range(4), 2)]
    tiles = torch.stack([torch.stack(rows) for rows in product(pairs, repeat=4)])
    tiles = tiles[(tiles.sum(1) == 2).all(1)]
    assert len(tiles) == 90
    w = torch.randint(-40, 41, (64, 64), generator=testing.generator(12)).float()
    mask = transposable_mask(w)
    split = lambda m: m.reshape(16, 4, 16, 4).transpose(1, 2).reshape(256, 4, 4)  # noqa: E731
    kept, size = split(mask), split(w.abs())
    assert bool((kept.sum(1) == 2).all() and (kept.sum(2) == 2).all())
    best = torch.einsum("tij,pij->tp", size, tiles.float()).amax(1)
    assert torch.equal((size * kept).sum((1, 2)), best)


def test_what_is_refused() -> None:
    w = random(8, 16, torch.int8)
    with pytest.raises(RuntimeError, match="no such source"):
        repack.pack(w, "transposable")
    with pytest.raises(RuntimeError, match="transposed destination"):
        repack.pack(w.to(torch.bfloat16), "top2", transposed=True)
    assert "not torch.float32" in str(repack.why_not(w.float()))


@pytest.mark.parametrize("prune", [False, True])
def test_the_packer_of_a_gpu_is_the_one_of_the_host(prune: bool) -> None:
    """Same layout, and the same message where a weight is not 2:4."""
    w = random(9, 22, torch.float16)
    good = w if prune else w.where(prune_mask(w), 0)
    check_host(_pack_device(good, prune, None), good, prune)
    if not prune:
        with pytest.raises(ValueError, match="row 0, group 0") as device:
            _pack_device(w, False, None)
        with pytest.raises(ValueError, match="row 0, group 0") as host:
            pack(w.cpu())
        assert str(device.value) == str(host.value)
