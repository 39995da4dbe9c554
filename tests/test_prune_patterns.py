"""Patterns and scopes of prune_: what each one promises, against brute force where that can be had."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import prune
from sparsekern.patterns import analyse
from sparsekern.prune import NM, Block, Transposable, Unstructured, Vector, pattern_of


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_tile() -> list[Tensor]:
    """By brute force over all 65,536 subsets of a 4 x 4 tile."""
    found = []
    for bits in itertools.combinations(range(16), 8):
        tile = torch.zeros(16, dtype=torch.bool)
        tile[list(bits)] = True
        square = tile.reshape(4, 4)
        if (square.sum(0) == 2).all() and (square.sum(1) == 2).all():
            found.append(square)
    return found


TILES = every_tile()


def test_there_are_90_transposable_tiles() -> None:
    assert len(TILES) == 90
    ours = {tuple(t.tolist()) for t in prune.pattern.tiles_24()}
    assert ours == {tuple(t.flatten().tolist()) for t in TILES}


@settings(max_examples=25)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 999))
def test_transposable_is_the_best_tile(rows: int, columns: int, seed: int) -> None:
    scores = rand(4 * rows, 4 * columns, seed=seed).abs()
    mask = Transposable().mask(scores)
    for i in range(rows):
        for j in range(columns):
            part = (slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
            assert (mask[part].sum(0) == 2).all()
            assert (mask[part].sum(1) == 2).all()
            got = float(scores[part][mask[part]].sum())
            assert got == pytest.approx(max(float(scores[part][t].sum()) for t in TILES), rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (3, 3), (1, 8), (5, 4)])
def test_transposable_with_ragged_edges_is_24_both_ways(shape: tuple[int, int]) -> None:
    mask = Transposable().mask(rand(*shape).abs())
    found = analyse(mask.float())
    assert found.sp24_orders == ("k", "n")
    assert mask.any()


def test_transposable_runs_sparse_in_both_directions() -> None:
    linear = nn.Linear(32, 16)
    prune.prune_(linear, "transposable", keep_mask=False)
    for w in (linear.weight.detach(), linear.weight.detach().t().contiguous()):
        packed = sk.to_sparse_semi_structured(w)
        assert torch.equal(packed.to_dense(), w)


def test_names_of_patterns() -> None:
    assert pattern_of("4:8") == NM(4, 8)
    assert pattern_of("block:16x32") == Block((16, 32))
    assert pattern_of("block:8") == Block((8, 8))
    assert pattern_of("vector:4") == Vector(length=4)
    for bad in ("1:4", "0:0", "block:", "vector", "blocks"):
        with pytest.raises(ValueError, match="pattern must be one of"):
            pattern_of(bad)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_named_axes(axis: str) -> None:
    s = rand(8, 12).abs()
    assert torch.equal(NM(axis=axis).mask(s), NM(axis={"in": 1, "out": 0}[axis]).mask(s))
    along = Vector(length=4, axis=axis).mask(s, 0.5)
    tiles = along.reshape(8, 3, 4) if axis == "in" else along.t().reshape(12, 2, 4)
    assert (tiles.all(2) | ~tiles.any(2)).all()
    assert int(tiles.all(2).sum()) == 12
    whole = Vector(length=None, axis=axis).mask(s, 0.5)
    lines = whole if axis == "in" else whole.t()
    assert (lines.all(1) | ~lines.any(1)).all()
    sums = s.sum(1) if axis == "in" else s.sum(0)
    assert sums[lines.all(1)].min() >= sums[~lines.all(1)].max()


def test_a_mask_remembers_its_pattern() -> None:
    conv = nn.Conv2d(8, 8, 3)
    prune.prune_(conv, NM(order="rsc"))
    mask = prune.mask_of(conv)
    assert mask is not None
    assert mask.pattern == NM(order="rsc")
    assert "order='rsc'" in repr(mask)


def test_global_blocks_compare_means() -> None:
    small, large = torch.full((4, 4), 2.0), torch.full((8, 9), 1.0)
    large[:, 8:] = 3.0  # an edge of 8 x 1: the largest mean, a small sum
    kept = Block(4, per="global").masks([small, large], 0.5)
    assert kept[0].all()
    assert kept[1][:, 8:].all()
    assert not kept[1][:, :8].all()
    total = sum(k.numel() for k in kept)
    assert abs(sum(int(k.sum()) for k in kept) / total - 0.5) < 16 / total


@pytest.mark.parametrize("min_keep", [3, 0.25])
def test_minimum_kept_per_layer(min_keep: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    rule = Unstructured(per="global", min_keep=min_keep)
    prune.prune_(model, rule, 0.75)
    least = 3 if min_keep == 3 else 16
    kept = model[0].weight.detach().count_nonzero()
    assert kept == least
    assert model[1].weight.count_nonzero() == max(least, round(0.25 * 128) - least)
    biggest = Block(4, per="global", min_keep=1).masks([rand(8, 8).abs() * 1e-6, rand(8, 8).abs()], 0.75)
    assert int(biggest[0].sum()) == 16


def test_row_scope_of_blocks() -> None:
    mask = Block((2, 4), per="row").mask(rand(8, 16).abs(), 0.5)
    assert (mask.reshape(4, 2, 16).any(1).sum(1) == 8).all()


def test_sparsity_by_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    got = prune.prune_(model, "unstructured", {"0": 0.5, "2": 0.75})
    assert got == {"0": 0.5, "2": 0.75}
    assert model[1].weight.count_nonzero() == 64
    assert prune.mask_of(model[1]) is None
    with pytest.raises(ValueError, match="no layer that can be pruned is called 7"):
        prune.prune_(model, "unstructured", {"7": 0.5})
    with pytest.raises(ValueError, match="one sparsity for all layers"):
        prune.prune_(model, "global", {"0": 0.5, "2": 0.75})


@pytest.mark.parametrize("pattern", ["unstructured", "row", "global", "block:2", "vector:2"])
def test_what_is_gone_stays_gone_whatever_the_criterion_says(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    prune.prune_(model, pattern, 0.5, "random", seed=1)
    first = prune.masks_of(model)
    prune.prune_(model, pattern, 0.75, "random", seed=2)
    for name, mask in prune.masks_of(model).items():
        assert not (mask & ~first[name]).any()
    kept = sum(int(m.sum()) for m in prune.masks_of(model).values())
    assert kept == 0.25 * (16 * 8 + 64)


def test_24_on_top_of_an_unstructured_mask() -> None:
    linear = nn.Linear(32, 16)
    prune.prune_(linear, "unstructured", 0.6)
    before = prune.mask_of(linear).mask.clone()  # type: ignore[union-attr]
    prune.prune_(linear, "2:4")
    mask = prune.mask_of(linear).mask  # type: ignore[union-attr]
    assert not (mask & ~before).any()
    groups, had = mask.reshape(16, 8, 4).sum(2), before.reshape(16, 8, 4).sum(2)
    assert torch.equal(groups, had.clamp_max(2))


def test_criteria_of_every_kind() -> None:
    model, data = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), [rand(32, 16)]
    prune.prune_(model, "row", 0.5, "wanda", data=data, progress=False)
    norms = data[0].square().sum(0).sqrt()
    score = model[0].parametrizations.weight.original.detach().abs() * norms
    kept = prune.mask_of(model[0]).mask  # type: ignore[union-attr]
    for row, on in zip(score, kept, strict=True):
        assert row[on].min() >= row[~on].max()
    other = nn.Linear(4, 4)
    prune.prune_(other, "unstructured", 0.5, lambda module, name: -module.weight.detach().abs())
    assert other.weight[other.weight != 0].abs().max() <= other.parametrizations.weight.original.abs().median() + 1e-6
    given = {"": torch.eye(4)}
    prune.prune_(fresh := nn.Linear(4, 4), "unstructured", 0.75, given)
    assert torch.equal(prune.mask_of(fresh).mask, torch.eye(4).bool())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="one score per channel suits"):
        prune.prune_(nn.Linear(4, 4), "unstructured", 0.5, "fpgm")
    with pytest.raises(ValueError, match="has no scores for"):
        prune.prune_(nn.Sequential(nn.Linear(4, 4)), "unstructured", 0.5, {})


def test_lora_merge_is_masked_again() -> None:
    linear = nn.Linear(16, 16)
    prune.prune_(linear, "2:4")
    masks = prune.masks_of(linear)
    prune.finalize_(linear)
    update = rand(16, 2) @ rand(2, 16, seed=1)
    with torch.no_grad():
        linear.weight += update
    assert linear.weight.count_nonzero() == 256
    prune.apply_masks_(linear, masks, keep_mask=False)
    assert torch.equal(linear.weight != 0, masks["weight"])
    with pytest.raises(ValueError, match="no parameter 'other'"):
        prune.apply_masks_(linear, {"other": masks["weight"]})
    with pytest.raises(ValueError, match="shape"):
        prune.apply_masks_(linear, {"weight": masks["weight"][:2]}, keep_mask=False)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_without_a_mask_are_held(make) -> None:
    linear = nn.Linear(16, 16)
    options = {"momentum": 0.9, "weight_decay": 0.1} if make is torch.optim.SGD else {"weight_decay": 0.1}
    optimizer = make(linear.parameters(), lr=0.1, **options)

    def step() -> None:
        optimizer.zero_grad()
        linear(rand(8, 16)).square().sum().backward()
        optimizer.step()

    step()  # momentum everywhere
    prune.prune_(linear, "2:4", keep_mask=False)
    mask = linear.weight.detach() != 0
    handle = prune.hold_zeros_(optimizer, {linear.weight: mask})
    for _ in range(5):
        step()
        assert torch.equal(linear.weight != 0, mask)
    states = [t for t in optimizer.state[linear.weight].values() if isinstance(t, Tensor) and t.dim() == 2]
    assert states
    assert not any(t[~mask].any() for t in states)
    handle.remove()
    step()
    assert (linear.weight != 0).sum() > mask.sum()
