"""Pruning: scores, patterns, masks that last through fine-tuning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sparsekern as sk
from sparsekern import prune
from sparsekern.patterns import analyse
from sparsekern.prune import NM, Block, Unstructured, score


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, float("inf")])
def test_scores_of_weights_and_blocks(p: float) -> None:
    w = rand(10, 14)
    scores = score.magnitude(w, p)
    assert torch.allclose(scores, w.abs() if p in (1.0, float("inf")) else w.abs() ** p)
    got = score.blocks(scores, (4, 8), p)
    assert got.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            tile = w[4 * i : 4 * i + 4, 8 * j : 8 * j + 8].abs()
            want = tile.max() if p == float("inf") else (tile**p).sum()
            assert torch.allclose(got[i, j], want)


def test_scores_refuse_what_has_no_order() -> None:
    with pytest.raises(ValueError, match="p must be positive"):
        score.magnitude(rand(2, 2), 0)
    with pytest.raises(ValueError, match="NaN"):
        score.magnitude(torch.tensor([[1.0, float("nan")]]))
    assert score.magnitude(torch.ones(2, 2, dtype=torch.float16), 2).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 21),
    keep=st.integers(0, 4),
    group=st.integers(4, 5),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_nm_keeps_the_best_of_every_group(n: int, k: int, keep: int, group: int, axis: int, seed: int) -> None:
    s = score.magnitude(rand(n, k, seed=seed))
    mask = NM(keep, group, axis=axis).mask(s)
    rows, kept = (s, mask) if axis == 1 else (s.t(), mask.t())
    for row, chosen in zip(rows, kept, strict=True):
        for part, on in zip(row.split(group), chosen.split(group), strict=True):
            assert int(on.sum()) == min(keep, len(part))
            if on.any() and (~on).any():
                assert part[on].min() >= part[~on].max()


def test_24_equals_the_packer_s_choice() -> None:
    w = rand(64, 72)
    assert torch.equal(NM().mask(score.magnitude(w)), sk.to_sparse_semi_structured(w, prune=True).to_dense() != 0)


@pytest.mark.parametrize("order", ["crs", "rsc"])
def test_conv_orders(order: str) -> None:
    conv = nn.Conv2d(12, 8, 3)
    prune.magnitude_(conv, NM(order=order))
    assert analyse(conv.weight).sp24_orders == (order,)
    blocks = nn.Conv2d(16, 16, 3)
    prune.magnitude_(blocks, Block((8, 16), order), 0.5)
    shares = {o.name: o.blocks[8] for o in analyse(blocks.weight, (8,)).orders}
    other = "rsc" if order == "crs" else "crs"
    assert shares[order] == pytest.approx(0.5, abs=0.06)
    assert shares[other] > 0.8


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_unstructured_reaches_the_sparsity_exactly(sparsity: float) -> None:
    w = rand(30, 41)
    for rule in (Unstructured(), Unstructured(per="row")):
        mask = rule.mask(score.magnitude(w), sparsity)
        groups = [(w, mask)] if rule.per == "layer" else list(zip(w, mask, strict=True))
        for values, kept in groups:
            assert int(kept.sum()) == round((1 - sparsity) * kept.numel())
            if kept.any() and (~kept).any():
                assert values[kept].abs().min() >= values[~kept].abs().max()


def test_ties_still_give_the_exact_count() -> None:
    assert int(Unstructured().mask(torch.ones(8, 8), 0.75).sum()) == 16


def test_global_scope_is_one_threshold_with_a_floor() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(100)
    got = prune.magnitude_(copy.deepcopy(model), "global", 0.5)
    assert got["0"] < 0.05
    assert got["1"] > 0.95
    assert sum(got.values()) / 2 == pytest.approx(0.5, abs=0.01)
    floor = prune.magnitude_(model, Unstructured(per="global", min_keep=0.25), 0.5)
    assert floor["1"] == pytest.approx(0.75, abs=0.01)


def test_block_mask_removes_the_weakest_blocks() -> None:
    w = torch.ones(8, 12)
    w[:4, :4] = 0.1
    w[4:, 8:] = 0.2
    mask = Block(4).mask(score.magnitude(w), 1 / 3)
    assert not mask[:4, :4].any()
    assert not mask[4:, 8:].any()
    assert mask.sum() == 64
    ragged = Block((4, 8)).mask(score.magnitude(rand(6, 9)), 0.5)
    assert ragged.shape == (6, 9)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NM(keep=5, group=4), "keep <= group"),
        (lambda: NM(axis=2), "axis"),
        (lambda: NM(order="src"), "order"),
        (lambda: Block(0), "positive"),
        (lambda: Unstructured(per="model"), "per must be"),
        (lambda: Unstructured(min_keep=2.0), "share"),
        (lambda: prune.magnitude_(nn.Linear(4, 4), "1:4"), "NM"),
        (lambda: prune.magnitude_(nn.Linear(4, 4), "unstructured"), "needs a sparsity"),
        (lambda: prune.magnitude_(nn.Linear(4, 4), "block", 1.5), "in \\[0, 1\\]"),
        (lambda: prune.magnitude_(nn.Linear(4, 4), "2:4", 0.75), "has sparsity 0.5"),
    ],
)
def test_bad_settings(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_mask_lasts_through_fine_tuning(make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"momentum": 0.9, "weight_decay": 0.1} if make is torch.optim.SGD else {"weight_decay": 0.1}
    optimizer = make(model.parameters(), lr=0.05, **options)
    loss_of = lambda: nn.functional.mse_loss(model(rand(64, 16, seed=1)), rand(64, 8, seed=2))  # noqa: E731
    loss_of().backward()
    optimizer.step()  # momentum that pulls at every weight
    parameters = [id(p) for p in model.parameters()]
    prune.magnitude_(model, "2:4")
    kept = [model[i].weight.detach() != 0 for i in (0, 2)]
    before = loss_of().item()
    optimizer = make(model.parameters(), lr=0.05, **options)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    assert loss_of().item() < before
    prune.finalize_(model)
    assert [id(p) for p in model.parameters()] == parameters
    for i, mask in zip((0, 2), kept, strict=True):
        assert type(model[i]) is nn.Linear
        assert isinstance(model[i].weight, nn.Parameter)
        assert torch.equal((model[i].weight != 0) | ~mask, torch.ones_like(mask))
        assert not (model[i].weight[~mask]).any()
        assert not torch.signbit(model[i].weight[~mask]).any()


def test_removed_weights_get_no_gradient() -> None:
    linear = nn.Linear(8, 4)
    prune.magnitude_(linear, "2:4")
    linear(rand(3, 8)).sum().backward()
    grad = linear.parametrizations.weight.original.grad
    mask = prune.mask_of(linear).mask
    assert not grad[~mask].any()
    assert grad[mask].any()


def test_pruning_again_goes_further_and_keeps_what_is_gone() -> None:
    linear = nn.Linear(32, 32)
    prune.magnitude_(linear, "unstructured", 0.5)
    first = prune.mask_of(linear).mask.clone()
    prune.magnitude_(linear, "unstructured", 0.8)
    second = prune.mask_of(linear).mask
    assert not (second & ~first).any()
    assert int(second.sum()) == round(0.2 * 1024)
    assert len(linear.parametrizations.weight) == 1


def test_masks_are_saved_and_copied() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    prune.magnitude_(model, "2:4")
    twin = copy.deepcopy(model)
    other = nn.Sequential(nn.Linear(8, 8))
    prune.magnitude_(other, "2:4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(prune.finalize_(twin)[0].weight, model[0].weight)  # and the original still has its mask
    assert prune.mask_of(model[0]) is not None
    assert type(twin[0]) is nn.Linear


def test_keep_mask_false_leaves_plain_zeros() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3))
    weight = model[0].weight
    prune.magnitude_(model, "2:4", keep_mask=False)
    assert model[0].weight is weight
    assert not parametrize.is_parametrized(model[0])
    assert (weight == 0).float().mean() == 0.5


def test_filter_tied_and_shared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.again = self.c
            self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8)
            self.head.weight = self.embed.weight

    model = Model()
    with pytest.warns(UserWarning, match=r"head is not pruned.*tied to a Embedding"):
        got = prune.magnitude_(model, "2:4")
    assert set(got) == {"a", "c"}
    assert torch.equal(model.a.weight, model.b.weight)
    assert model.a.weight.count_nonzero() == 32
    assert model.embed.weight.count_nonzero() == 64
    prune.finalize_(model)
    assert model.a.weight is model.b.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(prune.magnitude_(model, "2:4", filter_fn=lambda m, name: name == "c")) == {"c"}


def test_what_cannot_be_pruned_is_named() -> None:
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.warns(UserWarning, match="0 is not pruned: .*parametrization of another kind"):
        assert prune.magnitude_(normed) == {}
    hooked = nn.Sequential(nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(hooked[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="no parameter of its own"):
        assert prune.magnitude_(hooked) == {}
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.warns(UserWarning, match="lazy"):
        assert prune.magnitude_(lazy) == {}


def test_attention_s_projection_runs_masked() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    prune.magnitude_(attention, "2:4")
    x = rand(2, 5, 16)
    out, _ = attention(x, x, x)
    prune.finalize_(attention)
    assert torch.equal(attention(x, x, x)[0], out)


def test_set_mask_checks_its_shape() -> None:
    with pytest.raises(ValueError, match="the mask has shape"):
        prune.set_mask(nn.Linear(4, 4), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        prune.Mask(torch.ones(2, 2))
