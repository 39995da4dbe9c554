"""Solvers: what each one promises about the error of a layer's output, on real inputs."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_prune_score import Conv1D, rand
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.patterns import analyse
from sparsekern.prune import NM, Block, Call, Unstructured
from sparsekern.prune.quantise import RowQuantiser
from sparsekern.prune.solve import inverse_factor, output_error, relative_output_error, sparsegpt
from sparsekern.prune.solve_exact import obs, refit
from sparsekern.prune.solve_regional import reconstruct_, reconstruct_block_, regional_gradients

N, K, T = 12, 32, 400


def correlated(k: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [T, K] whose features depend on each other, and their Hessian."""
    x = rand(T, k, seed=seed) @ (rand(k, k, seed=seed + 1) / k**0.5 + torch.eye(k))
    return x, 2 / T * x.double().t() @ x.double()


def kept_best(w: Tensor, pattern: Any, sparsity: float | None) -> Tensor:
    return pattern.mask(w.abs(), sparsity)


PATTERNS = [
    (NM(), None),
    (NM(4, 8), None),
    (NM(axis=0), None),
    (Unstructured(), 0.5),
    (Unstructured("row"), 0.7),
    (Block((4, 8)), 0.5),
]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=repr)
def test_the_errors_are_ordered(pattern: Any, sparsity: float | None) -> None:
    """optimum of its mask <= SparseGPT < its mask without the update, and < magnitude."""
    w, x = rand(N, K, seed=5), rand(T, K // 2) @ rand(K // 2, K, seed=1) + 0.5 * rand(T, K, seed=2)
    h = 2 / T * x.double().t() @ x.double()
    found = sparsegpt(w, h, pattern, sparsity, damp=0.001, block=16)
    assert bool((found.weight[~found.mask] == 0).all())
    assert int(found.mask.sum()) == int(kept_best(w, pattern, sparsity).sum())
    best = refit(w, h, found.mask)
    masked = relative_output_error(w * found.mask, w, h)
    magnitude = relative_output_error(w * kept_best(w, pattern, sparsity), w, h)
    assert best.error <= found.error * (1 + 1e-6)
    assert found.error < 0.9 * masked
    assert found.error < magnitude
    assert found.error == pytest.approx(relative_output_error(found.weight, w, h), rel=1e-3)


def test_the_error_is_that_of_the_output() -> None:
    w, (x, h) = rand(N, K), correlated()
    other = w * NM().mask(w.abs())
    assert output_error(other - w, h) == pytest.approx(float(2 * (x @ (other - w).t()).square().sum() / T), rel=1e-4)


def test_sparsegpt_keeps_its_pattern_and_equals_magnitude_without_correlation() -> None:
    w = rand(N, 40)
    found = sparsegpt(w, torch.eye(40), NM(), damp=0.0)
    assert torch.equal(found.mask, NM().mask(w.abs()))
    torch.testing.assert_close(found.weight, w * found.mask)  # nothing to make up with
    _, h = correlated(40)
    assert analyse(sparsegpt(w, h, NM()).weight).sp24_orders[0] == "k"
    blocks = sparsegpt(w, h, Block(8), 0.5).mask
    assert bool((blocks[:8].unflatten(1, (5, 8)).any(-1) == blocks[:8].unflatten(1, (5, 8)).all(-1)).all())


@pytest.mark.parametrize("block", [1, 7, 16, 64])
def test_lazy_updates_change_nothing(block: int) -> None:
    """With the mask given, blocks only order the same arithmetic."""
    w, (_, h) = rand(N, K).double(), correlated()
    mask = NM().mask(w.abs())
    found = sparsegpt(w, h.double(), None, mask=mask, block=block)
    torch.testing.assert_close(found.weight, sparsegpt(w, h.double(), None, mask=mask, block=K).weight)


def test_sparsegpt_is_the_sequence_of_exact_updates() -> None:
    """Column by column: removing w_j moves the columns to the right to their optimum with all before frozen."""
    w, (_, h) = rand(3, 8).double(), correlated(8)
    h = h.double()
    mask = NM().mask(w.abs())
    want = w.clone()
    for j in range(8):
        gone = ~mask[:, j]
        rest = slice(j + 1, 8)
        change = torch.zeros_like(want)
        change[gone, j] = -want[gone, j]
        if j < 7:  # least squares over the columns to the right
            change[:, rest] = torch.linalg.solve(h[rest, rest], -(change[:, j : j + 1] * h[j, rest]).t()).t()
        want = want + change
    found = sparsegpt(w, h, None, mask=mask, damp=0.0)
    torch.testing.assert_close(found.weight, want, rtol=1e-8, atol=1e-10)


def test_dampening_and_singular_hessians() -> None:
    x = rand(4, K)  # fewer tokens than inputs
    h = x.t() @ x
    w = rand(N, K)
    with pytest.warns(UserWarning, match="singular"):
        upper, used = inverse_factor(h, 0.0)
    assert used > 0
    assert bool(torch.isfinite(upper).all())
    assert sparsegpt(w, h, NM(), damp=0.2).damp == 0.2
    much = sparsegpt(w, h, None, mask=NM().mask(w.abs()), damp=1e6)
    torch.testing.assert_close(much.weight, w * much.mask, rtol=1e-3, atol=1e-3)  # no trust in H: no update
    with pytest.raises(ValueError, match="damp"):
        sparsegpt(w, h, NM(), damp=-1)
    with pytest.raises(ValueError, match="positive definite"), pytest.warns(UserWarning, match="singular"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.1)


def test_dead_inputs_cost_nothing() -> None:
    x, _ = correlated()
    x[:, 3] = 0
    found = sparsegpt(rand(N, K), 2 / T * x.t() @ x, Unstructured(), 0.5)
    assert bool((found.weight[:, 3] == 0).all())


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
def test_sparsegpt_reaches_the_sparsity_exactly(sparsity: float) -> None:
    w, (_, h) = rand(N, 50), correlated(50)
    found = sparsegpt(w, h, Unstructured(), sparsity, block=16)
    assert int(found.mask.sum()) == round((1 - sparsity) * N * 50)
    if sparsity == 0:
        torch.testing.assert_close(found.weight, w)


# OBS ---------------------------------------------------------------------------------------------------


def test_refit_is_the_least_squares_optimum() -> None:
    w, (x, h) = rand(N, K).double(), correlated()
    x = x.double()
    mask = Unstructured().mask(w.abs(), 0.6)
    found = refit(w, h.double(), mask).weight
    for row in range(N):
        kept = mask[row]
        want = torch.linalg.lstsq(x[:, kept], x @ w[row]).solution
        torch.testing.assert_close(found[row, kept], want, rtol=1e-4, atol=1e-4)
        assert bool((found[row, ~kept] == 0).all())


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [(NM(), None), (NM(1, 4), None), (Unstructured("row"), 0.5), (Unstructured(), 0.5)],
    ids=repr,
)
def test_obs_ends_at_the_optimum_of_its_mask_and_beats_sparsegpt(pattern: Any, sparsity: float | None) -> None:
    w, (_, h) = rand(N, K, seed=3).double(), correlated()
    h = h.double()
    found = obs(w, h, pattern, sparsity, damp=0.0)
    share = pattern.sparsity if sparsity is None else sparsity
    assert int(found.mask.sum()) == round((1 - share) * N * K)
    assert torch.equal(found.weight != 0, found.mask)
    torch.testing.assert_close(found.weight, refit(w, h, found.mask).weight, rtol=1e-6, atol=1e-9)
    assert found.error < sparsegpt(w, h, pattern, sparsity, damp=0.0).error
    if pattern == NM():
        assert analyse(found.weight).sp24_orders[0] == "k"


def test_obs_removes_first_what_costs_least() -> None:
    """One weight of a row: the choice is the best of all, and its cost w_q^2 / (2 [H^-1]_qq) is the true one."""
    w, (_, h) = rand(1, 6).double(), correlated(6)
    h = h.double()
    found = obs(w, h, Unstructured("row"), 1 / 6, damp=0.0)
    costs = []
    for q in range(6):
        mask = torch.ones(1, 6, dtype=torch.bool)
        mask[0, q] = False
        costs.append(output_error(refit(w, h, mask).weight - w, h) / 2)
    q = int(torch.tensor(costs).argmin())
    assert not bool(found.mask[0, q])
    formula = w[0].square() / (2 * torch.linalg.inv(h).diagonal())
    torch.testing.assert_close(formula, torch.tensor(costs, dtype=torch.float64))


def test_obs_is_near_the_best_of_all_masks() -> None:
    w, (_, h) = rand(1, 8).double(), correlated(8)
    h = h.double()
    best = min(
        refit(w, h, torch.zeros(1, 8, dtype=torch.bool).index_fill(1, torch.tensor(kept), True)).error
        for kept in itertools.combinations(range(8), 4)
    )
    found = obs(w, h, Unstructured("row"), 0.5, damp=0.0).error
    assert best <= found * (1 + 1e-9)
    assert found < 2 * best


def test_obs_refuses_what_it_is_not_for() -> None:
    w, h = rand(4, 8), torch.eye(8)
    for pattern, message in ((Block(4), "single weights"), (Unstructured("global"), "layer by layer")):
        with pytest.raises(ValueError, match=message):
            obs(w, h, pattern, 0.5)
    with pytest.raises(ValueError, match="small layers"):
        obs(w, h, NM(), max_columns=4)
    with pytest.raises(ValueError, match="layer by layer"):
        sparsegpt(w, h, Unstructured("global"), 0.5)
    with pytest.raises(ValueError, match="not both"):
        sparsegpt(w, h, NM(), mask=w > 0)
    with pytest.raises(ValueError, match="needs a Hessian"):
        sparsegpt(w, torch.eye(9), NM())


# Over a model ------------------------------------------------------------------------------------------


class Block_(nn.Module):
    """A residual block whose layers read the same tensor twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.out(self.a(x).relu() * self.b(x).sigmoid())


def deep(width: int = 16, count: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(Block_(width) for _ in range(count)))


def batches(width: int = 16, count: int = 4) -> list[Tensor]:
    mix = rand(width, width, seed=9)
    return [rand(32, width, seed=i) @ mix for i in range(count)]


def distance(model: nn.Module, dense: nn.Module, data: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().sum()) for x in data)


@torch.no_grad()
def output_norm(conv: nn.Conv2d, x: Tensor) -> float:
    """||W x||^2, the bias left out."""
    return float((conv(x) - conv.bias[:, None, None]).square().sum())  # type: ignore[index]


@pytest.mark.parametrize("hessians", ["dense", "sequential"])
def test_sparsegpt_of_a_model_beats_its_own_mask_and_magnitude(hessians: str) -> None:
    dense, data = deep(), batches()
    model, magnitude = copy.deepcopy(dense), copy.deepcopy(dense)
    result = prune.sparsegpt_(model, iter(data), hessians=hessians, damp=0.01, progress=False)
    prune.magnitude_(magnitude)
    masked = copy.deepcopy(dense)
    for name, module in model.named_modules():
        mask = prune.mask_of(module)
        if mask is not None:
            assert analyse(module.weight).sp24_orders[0] == "k"
            prune.set_mask(masked.get_submodule(name), mask.mask)
    own = distance(model, dense, data)
    assert own < distance(masked, dense, data)
    assert own < distance(magnitude, dense, data)
    assert list(result) == [f"{i}.{part}" for i in range(3) for part in ("a", "b", "out")]
    assert all(r.method == "sparsegpt" and r.sparsity == 0.5 and 0 < r.error < 0.5 for r in result.values())


def test_sequential_hessians_are_those_of_the_pruned_model() -> None:
    """The last layer sees what the pruned layers before it give: its solution is that of those inputs."""
    dense, data = deep(count=2), batches()
    model = copy.deepcopy(dense)
    prune.sparsegpt_(model, data, hessians="sequential", damp=0.01, progress=False)
    seen: list[Tensor] = []
    handle = model[1].out.register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    for x in data:
        model(x)
    handle.remove()
    x = torch.cat(seen)
    want = sparsegpt(dense[1].out.weight, 2 / len(x) * x.t() @ x, NM(), damp=0.01)
    torch.testing.assert_close(model[1].out.weight, want.weight, rtol=1e-3, atol=1e-5)
    plain = copy.deepcopy(dense)
    prune.sparsegpt_(plain, data, damp=0.01, progress=False)
    assert not torch.allclose(plain[1].out.weight, want.weight, rtol=1e-2, atol=1e-3)


def test_dense_hessians_do_not_depend_on_the_memory_that_they_may_use() -> None:
    one, many = deep(), deep()
    prune.sparsegpt_(one, batches(), progress=False)
    prune.sparsegpt_(many, iter(batches()), memory=1, progress=False)  # a pass a layer, all from the dense model
    for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["crs", "rsc"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_in_both_orders(order: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2, groups=groups)
    smooth = nn.functional.avg_pool2d(rand(6, 8, 20, 20), 3, 1)
    dense, magnitude = copy.deepcopy(conv), copy.deepcopy(conv)
    result = prune.sparsegpt_(conv, smooth.split(2), NM(order=order), damp=0.01, progress=False)
    prune.magnitude_(magnitude, NM(order=order))
    assert analyse(conv.weight).sp24_orders == (order,)
    lost, whole = distance(conv, dense, [smooth]), output_norm(dense, smooth)
    assert lost < distance(magnitude, dense, [smooth])
    assert result[""].error == pytest.approx(lost / whole, rel=1e-3)


def test_conv1d_is_solved_as_the_linear_transposed() -> None:
    torch.manual_seed(0)
    conv1d, linear = Conv1D(8, 16), nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.t())
    for module in (conv1d, linear):
        prune.sparsegpt_(module, batches(), progress=False)
    torch.testing.assert_close(conv1d.weight.t(), linear.weight)
    assert analyse(conv1d.weight).sp24_orders == ("n",)


def test_above_the_limit_it_is_wanda_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    dense, data = copy.deepcopy(model), batches()
    with pytest.warns(UserWarning, match="pruned by Wanda: 16 inputs > max_columns = 8"):
        result = prune.sparsegpt_(model, data, "row", 0.5, max_columns=8, progress=False)
    assert (result["0"].method, result["1"].method) == ("wanda", "sparsegpt")
    scores = prune.scores(dense, "wanda", data=data, progress=False)["0"]
    mask = Unstructured("row").mask(scores, 0.5)
    assert torch.equal(prune.mask_of(model[0]).mask, mask)
    assert torch.equal(model[0].weight, dense[0].weight * mask)
    norms = torch.cat(data).square().sum(0)
    lost = ((dense[0].weight * ~mask).square() * norms).sum() / (dense[0].weight.square() * norms).sum()
    assert result["0"].error == pytest.approx(float(lost.detach()), rel=1e-4)


def test_pruning_further_keeps_what_was_gone() -> None:
    model = deep()
    prune.magnitude_(model, "unstructured", 0.3)
    gone = {n: m.weight == 0 for n, m in model.named_modules() if prune.mask_of(m) is not None}
    prune.sparsegpt_(model, batches(), Unstructured(), 0.6, progress=False)
    for name, before in gone.items():
        weight = model.get_submodule(name).weight
        assert bool((weight[before] == 0).all())
        assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.01)


def test_sparsities_and_masks_by_layer() -> None:
    model, data = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)), batches()
    result = prune.sparsegpt_(model, data, "unstructured", {"0": 0.25, "2": 0.75}, keep_mask=False, progress=False)
    assert (result["0"].sparsity, result["2"].sparsity) == (0.25, 0.75)
    assert prune.mask_of(model[0]) is None
    with pytest.raises(ValueError, match="no entry for 2"):
        prune.sparsegpt_(model, data, "unstructured", {"0": 0.25}, progress=False)
    dense = copy.deepcopy(model)
    masks = {"0": Block(4).mask(model[0].weight.detach().abs(), 0.5)}
    only = {"filter_fn": lambda m, n: n == "0"}
    prune.sparsegpt_(model, data, masks=masks, damp=0.001, progress=False, **only)
    exact = copy.deepcopy(dense)
    found = prune.refit_(exact, data, masks, damp=0.0, progress=False)
    assert list(found) == ["0"]
    assert torch.equal(prune.mask_of(model[0]).mask, masks["0"])
    first = [m[0] for m in (exact, model, dense)]
    assert distance(first[0], first[2], data) <= distance(first[1], first[2], data) * 1.001
    with pytest.raises(ValueError, match="none for 2"):
        prune.sparsegpt_(dense, data, masks=masks, progress=False)


def test_obs_of_a_model() -> None:
    dense, data = deep(8, 1), batches(8)
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    exact = prune.obs_(model, data, progress=False)
    approximate = prune.sparsegpt_(other, data, damp=0.01, progress=False)
    assert all(exact[n].error < approximate[n].error for n in exact)


def test_what_no_data_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(16, 8), "idle": nn.Linear(8, 8)})
    for hessians in ("dense", "sequential"):
        with pytest.raises(ValueError, match="no data reaches idle"):
            prune.sparsegpt_(model, batches(), hessians=hessians, forward=lambda m, x: m["used"](x), progress=False)
    with pytest.raises(ValueError, match="hessians must be"):
        prune.sparsegpt_(model, batches(), hessians="none")


# Block by block ----------------------------------------------------------------------------------------


def test_blocks_from_a_loader_one_at_a_time() -> None:
    """Never more than one block alive; each gets what the pruned ones before it give."""
    dense, data = deep(count=4), batches()
    alive: list[weakref.ref[nn.Module]] = []
    saved: dict[int, dict[str, Tensor]] = {}

    def loader(i: int) -> Any:
        def load() -> nn.Module:
            assert all(ref() is None for ref in alive)
            block = copy.deepcopy(dense[i])
            alive.append(weakref.ref(block))
            return block

        return load

    def work(block: nn.Module, calls: Sequence[Call]) -> Any:
        return prune.sparsegpt_(block, calls, damp=0.01, keep_mask=False, progress=False)

    calls = [Call((x,), {"scale": 0.5}) for x in data]
    results = prune.by_blocks(
        (loader(i) for i in range(4)), calls, work, done=lambda i, b: saved.update({i: b.state_dict()}), progress=False
    )
    assert len(results) == len(saved) == 4
    whole = copy.deepcopy(dense)
    current = list(data)
    for i in range(4):  # the same by hand
        prune.sparsegpt_(
            whole[i], [Call((x,), {"scale": 0.5}) for x in current], damp=0.01, keep_mask=False, progress=False
        )
        with torch.no_grad():
            current = [whole[i](x, scale=0.5) for x in current]
        for key, value in saved[i].items():
            torch.testing.assert_close(value, whole[i].state_dict()[key])


def test_inputs_of_the_first_block_are_recorded() -> None:
    model = nn.Sequential(nn.Linear(16, 16), *deep())
    data = batches()
    calls = prune.calls_of(model, model[1], data, progress=False)
    for call, x in zip(calls, data, strict=True):
        torch.testing.assert_close(call.args[0], model[0](x).detach())
    with pytest.raises(ValueError, match="does not reach"):
        prune.calls_of(model, nn.Linear(2, 2), data, progress=False)
    with pytest.raises(ValueError, match="first positional"):
        prune.by_blocks([model[1]], [Call(kwargs={"x": data[0]})], lambda b, c: None, progress=False)


def test_regional_gradients_are_root_mean_squares_over_samples() -> None:
    block, calls = Block_(16), [Call((x[:3],)) for x in batches()]
    found = regional_gradients(block, calls)
    squares = []
    for call in calls:
        for row in call.args[0]:
            (g,) = torch.autograd.grad(block(row[None]).norm(), [block.a.weight])
            squares.append(g.square())
    torch.testing.assert_close(found["a"], torch.stack(squares).mean(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_reconstruction_repairs_the_block() -> None:
    """The steps lower the block's error; without them it is a better Wanda at most."""
    block, calls = deep(count=1)[0], [Call((x,)) for x in batches(count=8)]
    errors = {}
    for rounds in (0, 5):
        twin = copy.deepcopy(block)
        result = reconstruct_block_(twin, calls, rounds=rounds, rate=1e-3, keep_mask=False)
        errors[rounds] = result["a"].error
        lost = distance(twin, block, [c.args[0] for c in calls])
        whole = sum(float(block(c.args[0]).square().sum()) for c in calls)
        assert errors[rounds] == pytest.approx(lost / whole, rel=1e-3)
        assert all(analyse(m.weight).sp24_orders[0] == "k" for m in twin.modules() if isinstance(m, nn.Linear))
    assert errors[5] < 0.9 * errors[0]


def test_reconstruction_of_a_model_in_order() -> None:
    dense, data = deep(count=2), batches()
    model, wanda = copy.deepcopy(dense), copy.deepcopy(dense)
    results = reconstruct_(model, list(model), data, rate=1e-3, progress=False)
    for name, score in prune.scores(wanda, "wanda", data=data, progress=False).items():
        prune.set_mask(wanda.get_submodule(name), NM().mask(score))
    assert [set(r) for r in results] == [{"a", "b", "out"}] * 2
    assert distance(model, dense, data) < distance(wanda, dense, data)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_quantised_sweep_stays_on_the_grid() -> None:
    w, (_, h) = rand(N, K), correlated()
    quantiser = RowQuantiser(torch.int8)
    joint = sparsegpt(w, h, NM(), damp=0.01, quantiser=quantiser)
    assert joint.scale is not None
    steps = joint.weight / joint.scale[:, None]
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert float(steps.abs().max()) <= 127
    assert bool((joint.weight[~joint.mask] == 0).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert joint.error < 1.1 * sparsegpt(w, h, NM(), damp=0.01).error
