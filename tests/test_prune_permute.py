"""Channel permutation: outputs stay, what N:M keeps never falls, and the search finds what there is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune_structure import CASES, rand, settled
from torch import nn

import sparsekern as sk
from sparsekern import prune
from sparsekern.patterns import analyse
from sparsekern.prune import NM, permute


@settings(max_examples=30)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 26),
    rule=st.sampled_from([NM(), NM(1, 4), NM(1, 2), NM(2, 5)]),
    seed=st.integers(0, 999),
)
def test_an_order_is_a_permutation_and_never_keeps_less(n: int, k: int, rule: NM, seed: int) -> None:
    scores = rand(n, k, seed=seed).abs()
    order = permute.search(scores, rule)
    assert torch.equal(order.sort().values, torch.arange(k))
    assert permute.kept(scores[:, order], rule) >= permute.kept(scores, rule) * (1 - 1e-7)
    assert permute.kept(scores, rule) == pytest.approx(float(scores[rule.mask(scores)].sum()), rel=1e-5)


def test_eight_columns_are_dealt_the_best_way() -> None:
    """Two stripes meet once: the greedy search is exhaustive there."""
    for seed in range(5):
        scores = rand(6, 8, seed=seed).abs()
        best = max(
            permute.kept(scores[:, [*first, *(c for c in range(8) if c not in first)]])
            for first in itertools.combinations(range(8), 4)
        )
        assert permute.kept(scores[:, permute.search(scores)]) == pytest.approx(best)


def test_a_hidden_order_is_found_again() -> None:
    """Columns come in pairs of large and small: some order keeps all the large ones."""
    large = torch.zeros(32, 32, dtype=torch.bool)
    large[:, ::2] = True
    scores = torch.where(large, 1.0, 0.01) * (1 + 0.1 * rand(32, 32).abs())
    mixed = scores[:, [*range(0, 32, 2), *range(1, 32, 2)]]
    assert permute.kept(mixed) < 0.7 * permute.kept(scores)
    assert permute.kept(mixed[:, permute.search(mixed)]) == pytest.approx(permute.kept(scores))


def test_no_pair_of_stripes_can_be_improved_afterwards() -> None:
    scores = rand(24, 24).abs()
    mixed = scores[:, permute.search(scores)]
    for i, j in itertools.combinations(range(6), 2):
        part = torch.cat((mixed[:, 4 * i : 4 * i + 4], mixed[:, 4 * j : 4 * j + 4]), 1)
        assert permute.kept(part[:, permute.search(part)]) <= permute.kept(part) * (1 + 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_it_did(name: str) -> None:
    make, x = CASES[name]
    model = settled(make(), x)
    before = model(x).detach()
    layers = dict(model.named_modules())
    scores = {n: prune.score.magnitude(m.weight) for n, m in layers.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
    done = prune.permute_(model, x)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert done
    assert all(0 < p.efficacy <= 1 and p.after > p.before for p in done)
    folded = {layer for p in done if p.how == "folded" for layer in p.layers}
    # gated: its channels come in pairs, or pass a grouped convolution: none can be folded
    expected = {"resnet": "blocks.0.conv2", "bert": "layers.0.down.dense", "mixer": "down", "gated": None}[name]
    assert expected in folded if expected else not folded
    for p in done:
        now = model.get_submodule(p.layers[0])
        assert isinstance(now, permute.Permuted) == (p.how == "indexed")
    was = sum(float(s[NM(order="rsc").mask(s) if s.dim() > 2 else NM().mask(s)].sum()) for s in scores.values())
    pruned = prune.prune_(model, NM(order="rsc"), keep_mask=False)
    kept = 0.0
    for n in pruned:
        kept += float(model.get_submodule(n).weight.detach().abs().sum())
    assert kept > was


def test_shared_channels_get_one_order() -> None:
    """A residual: every layer that reads the sum is permuted alike, and every one that makes it."""
    model, x = settled(*[CASES["resnet"][0]()], CASES["resnet"][1]), CASES["resnet"][1]
    done = {p.producers: p for p in prune.permute_(model, x, index=False)}
    shared = done["blocks.1.conv2", "blocks.1.short", "blocks.2.conv2"]
    assert set(shared.layers) == {"blocks.2.conv1", "head"}
    assert all(p.how == "folded" for p in done.values())


def test_an_index_is_saved_and_its_layer_converted() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = rand(4, 64)
    before = model(x).detach()
    done = prune.permute_(model)  # no sample: nothing can be folded
    assert [p.how for p in done] == ["indexed", "indexed"]
    assert torch.allclose(model(x), before, atol=1e-6)
    prune.prune_(model, "2:4", keep_mask=False)
    pruned = model(x).detach()
    report = sk.convert_(model, "sp24", policy="always", progress=False)
    assert [row.layer for row in report.converted] == ["0.layer", "2.layer"]
    assert torch.allclose(model(x), pruned, atol=1e-5)
    assert torch.equal(model.state_dict()["0.order"], done[0].order)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def test_convolutions_are_permuted_along_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = rand(1, 3, 9, 9)
    before = model(x).detach()
    (done,) = prune.permute_(model, x, index=False)
    assert (done.layers, done.producers) == (("3",), ("0",))
    assert torch.allclose(model(x), before, atol=1e-5)
    prune.prune_(model[3], NM(order="rsc"))
    assert "rsc" in analyse(model[3].weight).sp24_orders
    assert model[3].weight.detach().abs().sum() == pytest.approx(done.after, rel=1e-5)


def test_wide_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        permute.search(rand(4, 32), NM(8, 16))
