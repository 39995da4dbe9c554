"""Schedules: each does at its steps what its paper says, and resumes bit for bit."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern import prune
from sparsekern.prune import (
    SET,
    Block,
    Gradual,
    Ice,
    Iterative,
    LearnableMask,
    LotteryTicket,
    OneShot,
    RigL,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: int, begin: int = 0, each: Any = None) -> None:
    for t in range(begin, begin + steps):
        optimizer.zero_grad()
        F.mse_loss(model(rand(16, 12, seed=t)), rand(16, 8, seed=1000 + t)).backward()
        optimizer.step()
        schedule.step()
        if each is not None:
            each(t + 1)


def kept(model: nn.Module) -> int:
    return sum(int(m.sum()) for m in prune.masks_of(model).values())


TOTAL = 12 * 24 + 24 * 8
MAKERS: dict[str, Callable[..., Any]] = {
    "one-shot": lambda m, o: OneShot(m, o, "2:4", at=4),
    "iterative": lambda m, o: Iterative(m, o, "unstructured", 0.8, rounds=3, every=4),
    "gradual": lambda m, o: Gradual(m, o, "global", 0.9, begin=2, end=12, every=2),
    "ticket": lambda m, o: LotteryTicket(m, o, "unstructured", 0.8, rounds=3, every=5, rewind=2),
    "rigl": lambda m, o: RigL(m, o, "unstructured", 0.7, every=3, until=16, alpha=0.5),
    "rigl blocks": lambda m, o: RigL(m, o, Block(4), 0.5, every=3, until=16, alpha=0.5),
    "set": lambda m, o: SET(m, o, "unstructured", 0.7, every=3, until=16),
    "learned": lambda m, o: LearnableMask(m, o, "2:4", until=11, score_lr=0.3),
    "ice": lambda m, o: Ice(
        m, o, "unstructured", 0.8, rounds=4, every=4, evaluate=_quality, freeze=0.5, skip_below=0.05
    ),
    "channels": lambda m, o: Iterative(m, o, "channels", 0.5, rounds=2, every=5, sample=rand(4, 12)),
}


@torch.no_grad()
def _quality(model: nn.Module) -> float:
    training = model.training
    out = -float(F.mse_loss(model.eval()(rand(32, 12, seed=7)), rand(32, 8, seed=8)))
    model.train(training)
    return out


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("cut", [3, 9, 13])
def test_interrupted_and_resumed_is_uninterrupted(name: str, cut: int) -> None:
    steps = 18
    whole = network()
    optimizer = sgd(whole)
    train(whole, optimizer, MAKERS[name](whole, optimizer), steps)

    model = network()
    optimizer = sgd(model)
    schedule = MAKERS[name](model, optimizer)
    train(model, optimizer, schedule, cut)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    model = network(seed=5)
    optimizer = sgd(model)
    schedule = MAKERS[name](model, optimizer)
    schedule.load_state_dict(state["schedule"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, schedule, steps - cut, begin=cut)
    expected = whole.state_dict()
    got = model.state_dict()
    assert list(got) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("name", MAKERS)
def test_momentum_and_decay_never_refill(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    schedule = MAKERS[name](model, optimizer)

    def check(t: int) -> None:
        for module in (model[0], model[3]):
            mask = prune.mask_of(module)
            model.eval()
            assert mask is None or not module.weight[~mask.mask].any()
            model.train()

    train(model, optimizer, schedule, 20, each=check)
    prune.finalize_(model)
    assert type(model[0].weight) is nn.Parameter
    assert schedule.count == 20


def test_one_shot_at_its_step() -> None:
    model = network()
    optimizer = sgd(model)
    schedule = OneShot(model, optimizer, "unstructured", 0.5, at=3)
    seen: list[int] = []
    train(model, optimizer, schedule, 5, each=lambda t: seen.append(kept(model)))
    assert seen == [TOTAL, TOTAL, TOTAL // 2, TOTAL // 2, TOTAL // 2]
    assert kept(OneShot(network(), None, "unstructured", 0.5).model) == TOTAL // 2


@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_iterative_shares(spacing: str) -> None:
    model = network()
    optimizer = sgd(model)
    schedule = Iterative(model, optimizer, "global", 0.875, rounds=3, every=4, begin=2, spacing=spacing)
    seen: dict[int, float] = {}
    train(model, optimizer, schedule, 14, each=lambda t: seen.__setitem__(t, schedule.sparsity))
    want = {"geometric": [0.5, 0.75, 0.875], "linear": [0.875 / 3, 1.75 / 3, 0.875]}[spacing]
    assert seen[1] == 0
    for t, share in zip((2, 6, 10), want, strict=True):
        assert seen[t] == seen[t + 3] == pytest.approx(share, abs=1 / TOTAL)
    assert schedule.finished
    assert not Iterative(network(), None, "global", 0.5, rounds=1, every=1).finished


def test_the_cubic() -> None:
    """Zhu & Gupta (1): s_t = s_f + (s_i - s_f)(1 - (t - t0) / (n dt))^3."""
    model = network()
    optimizer = sgd(model)
    schedule = Gradual(model, optimizer, "global", 0.9, begin=4, end=24, every=5, initial=0.1)
    seen: dict[int, float] = {}
    train(model, optimizer, schedule, 26, each=lambda t: seen.__setitem__(t, schedule.sparsity))
    for t, want in {4: 0.1, 9: 0.5625, 14: 0.8, 19: 0.8875, 24: 0.9}.items():
        assert schedule.share(t) == pytest.approx(want)
        assert seen[t] == pytest.approx(want, abs=1 / TOTAL)
    assert seen[3] == 0
    assert seen[8] == seen[4]
    assert seen[26] == seen[24]
    by_layer = Gradual(network(), None, "unstructured", {"0": 0.8}, end=10, every=5)
    assert by_layer.share(5) == {"0": pytest.approx(0.7)}
    assert set(by_layer.layers()) == {"0"}


@pytest.mark.parametrize("rewind", [0, 3])
def test_survivors_are_set_back_bit_for_bit(rewind: int) -> None:
    model = network()
    optimizer = sgd(model)
    rates = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    schedule = LotteryTicket(model, optimizer, "unstructured", 0.75, rounds=2, every=6, rewind=rewind, scheduler=rates)
    snaps: dict[int, dict[str, Tensor]] = {0: copy.deepcopy(model.state_dict())}
    states: dict[int, Any] = {0: copy.deepcopy(optimizer.state_dict())}
    shares: dict[int, float] = {}
    second = 12 - rewind
    for t in range(1, second + 7 - rewind):
        assert not schedule.finished
        optimizer.zero_grad()
        F.mse_loss(model(rand(16, 12, seed=t)), rand(16, 8, seed=1000 + t)).backward()
        optimizer.step()
        rates.step()
        assert schedule.step() == (t in (6, second))
        snaps[t], states[t] = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        shares[t] = schedule.sparsity
    assert schedule.finished
    for at in (6, second):
        for key, tensor in snaps[rewind].items():
            if not key.endswith("mask"):
                assert torch.equal(snaps[at][key], tensor), (at, key)
        assert states[at]["param_groups"] == states[rewind]["param_groups"]
        for i, entry in states[rewind]["state"].items():
            assert torch.equal(states[at]["state"][i]["momentum_buffer"], entry["momentum_buffer"])
    assert [shares[t] for t in (5, 6, second - 1, second)] == pytest.approx([0, 0.5, 0.5, 0.75])


def test_the_ticket_keeps_what_training_made_large() -> None:
    model = network()
    optimizer = sgd(model)
    schedule = LotteryTicket(model, optimizer, "unstructured", 0.5, rounds=1, every=5)
    train(model, optimizer, schedule, 4)
    twin, trained = copy.deepcopy((model, optimizer))
    idle = OneShot(twin, trained, "unstructured", 0.5, at=99)
    train(twin, trained, idle, 1, begin=4)
    train(model, optimizer, schedule, 1, begin=4)
    for i in (0, 3):
        size, on = twin[i].weight.detach().abs(), prune.mask_of(model[i]).mask  # type: ignore[union-attr]
        assert size[on].min() >= size[~on].max()


def test_reinitialise_keeps_masks_and_changes_weights() -> None:
    model = network()
    prune.prune_(model, "unstructured", 0.5)
    before, masks = model[0].weight.detach().clone(), prune.masks_of(model)
    prune.reinitialise_(model, seed=1)
    assert all(torch.equal(m, masks[n]) for n, m in prune.masks_of(model).items())
    on = masks["0.weight"]
    assert not model[0].weight[~on].any()
    assert (model[0].weight[on] != before[on]).all()
    again = prune.reinitialise_(copy.deepcopy(model), seed=1)
    assert torch.equal(again[0].weight, model[0].weight)


def test_rigl_moves_the_weakest_to_the_largest_gradients() -> None:
    model = network()
    optimizer = sgd(model)
    schedule = RigL(model, optimizer, "unstructured", 0.75, every=4, until=40, alpha=0.5)
    train(model, optimizer, schedule, 3)
    old = {i: prune.mask_of(model[i]).mask.clone() for i in (0, 3)}  # type: ignore[union-attr]
    assert sum(int(m.sum()) for m in old.values()) == TOTAL // 4
    # Step 4 by hand, with gradients of plain dense weights that have the same zeros.
    dense = network()
    state = copy.deepcopy(model.state_dict())
    plain = {k.replace("parametrizations.", "").replace(".original", ""): v for k, v in state.items()}
    dense.load_state_dict({k: v for k, v in plain.items() if not k.endswith("mask")})
    with torch.no_grad():
        for i in (0, 3):
            dense[i].weight.mul_(old[i])
    F.mse_loss(dense.train()(rand(16, 12, seed=3)), rand(16, 8, seed=1003)).backward()
    optimizer.zero_grad()
    F.mse_loss(model(rand(16, 12, seed=3)), rand(16, 8, seed=1003)).backward()
    optimizer.step()
    weights = {i: model[i].weight.detach().clone() for i in (0, 3)}
    assert schedule.step()
    for i in (0, 3):
        new, was = prune.mask_of(model[i]).mask, old[i]  # type: ignore[union-attr]
        count = int(0.25 * (1 + math.cos(math.pi * 4 / 40)) * int(was.sum()))
        assert int(new.sum()) == int(was.sum())
        size = weights[i].abs().masked_fill(~was, math.inf)
        dropped = torch.zeros_like(was).flatten()
        dropped[size.flatten().topk(count, largest=False).indices] = True
        dropped = dropped.reshape(was.shape)
        grad = dense[i].weight.grad.abs().masked_fill(was & ~dropped, -1)
        grown = torch.zeros_like(was).flatten()
        grown[grad.flatten().topk(count).indices] = True
        assert torch.equal(new, (was & ~dropped) | grown.reshape(was.shape))
        fresh = new & ~was
        assert fresh.any()
        assert not model[i].weight[fresh].any()
        parameter = model[i].parametrizations.weight.original
        assert not optimizer.state[parameter]["momentum_buffer"][fresh].any()
        assert torch.equal(model[i].weight[new & was], weights[i][new & was])


@pytest.mark.parametrize("make", [MAKERS["rigl"], MAKERS["rigl blocks"], MAKERS["set"]])
def test_the_number_of_weights_never_changes(make: Callable[..., Any]) -> None:
    model = network()
    optimizer = sgd(model)
    schedule = make(model, optimizer)
    counts = {n: int(m.sum()) for n, m in prune.masks_of(model).items()}
    history = []

    def each(t: int) -> None:
        assert {n: int(m.sum()) for n, m in prune.masks_of(model).items()} == counts
        history.append(prune.masks_of(model)["0.weight"])

    train(model, optimizer, schedule, 20, each=each)
    changed = [t + 2 for t in range(19) if not torch.equal(history[t], history[t + 1])]
    assert set(changed) <= {3, 6, 9, 12, 15}  # a fraction of few may be none
    assert changed[:2] == [3, 6]
    assert schedule.finished


def test_rigl_blocks_stay_blocks_and_fractions_fall() -> None:
    model = network()
    schedule = MAKERS["rigl blocks"](model, sgd(model))
    train(model, schedule.optimizer, schedule, 7)
    for i in (0, 3):
        tiles = prune.mask_of(model[i]).mask.float().unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3))  # type: ignore[union-attr]
        assert set(tiles.flatten().tolist()) == {0, 16}
    assert [schedule.fraction(t) for t in (0, 8, 16)] == pytest.approx([0.5, 0.25, 0])
    steady = SET(network(), None, "unstructured", 0.5, every=2, until=9, alpha=0.2)
    assert [steady.fraction(t) for t in (0, 8, 9)] == [0.2, 0.2, 0]


def test_rigl_begins_with_the_masks_that_are_there_and_says_what_is_missing() -> None:
    model = network()
    prune.prune_(model, "unstructured", 0.6)
    before = prune.masks_of(model)
    schedule = RigL(model, None, "unstructured", 0.9, every=2, until=8)
    assert all(torch.equal(m, before[n]) for n, m in prune.masks_of(model).items())
    schedule.step()
    with pytest.raises(RuntimeError, match="no gradient in the step before an update"):
        schedule.step()
    with pytest.raises(ValueError, match="prune-and-grow moves weights"):
        RigL(network(), None, "2:4", every=2, until=8)
    with pytest.raises(ValueError, match="needs a sparsity"):
        RigL(network(), None, "unstructured", every=2, until=8)


def test_erdos_renyi_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Linear(64, 10))
    shares = prune.erk(model, 0.8)
    sizes = {"0": 8 * 3 * 9, "1": 64 * 8 * 9, "2": 640}
    assert sum(shares[n] * sizes[n] for n in sizes) == pytest.approx(0.8 * sum(sizes.values()))
    raw = {"0": (8 + 3 + 3 + 3) / sizes["0"], "1": (64 + 8 + 6) / sizes["1"], "2": 74 / 640}
    free = [n for n in raw if shares[n] > 0]
    ratios = {round((1 - shares[n]) / raw[n], 6) for n in free}
    assert len(ratios) == 1
    assert all(next(iter(ratios)) * raw[n] >= 1 for n in raw if n not in free)


def test_learned_masks_find_the_weights_that_matter() -> None:
    """Only four inputs carry the target; the scores of the others fall although their weights begin larger."""
    torch.manual_seed(0)
    teacher = rand(8, 4, seed=2)
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    with torch.no_grad():
        model[0].weight[:, :4] = 0.1 * teacher
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    schedule = LearnableMask(model, optimizer, "row", 0.75, until=300, score_lr=0.2)
    start = prune.mask_of(model[0]).mask.clone()  # type: ignore[union-attr]
    for t in range(300):
        x = rand(64, 16, seed=t)
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :4] @ teacher.t()).backward()
        optimizer.step()
        schedule.step()
    mask = prune.mask_of(model[0])
    assert type(mask) is prune.Mask
    assert mask.mask[:, :4].float().mean() > 0.75
    assert start[:, :4].float().mean() < 0.3
    assert (mask.mask.sum(1) == 4).all()


def test_a_learned_mask_s_gradients() -> None:
    linear = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    LearnableMask(linear, optimizer, "2:4", until=5)
    x = rand(3, 8)
    linear(x).square().sum().backward()
    mask = prune.mask_of(linear)
    original = linear.parametrizations.weight.original
    dense = (original.detach() * mask.mask).requires_grad_()  # type: ignore[union-attr]
    (x @ dense.t()).square().sum().backward()
    assert torch.allclose(mask.scores.grad, dense.grad * original.detach())  # type: ignore[union-attr]
    assert torch.allclose(original.grad, dense.grad * mask.mask)  # type: ignore[union-attr]
    assert len(optimizer.param_groups) == 2
    frozen = nn.Linear(8, 4)
    LearnableMask(frozen, torch.optim.SGD(frozen.parameters(), lr=0.1), "2:4", until=5, train_weights=False)
    assert not frozen.parametrizations.weight.original.requires_grad
    with pytest.raises(ValueError, match="needs the optimizer"):
        LearnableMask(nn.Linear(8, 4), None, "2:4", until=5)
    with pytest.raises(ValueError, match="inside each layer"):
        LearnableMask(nn.Linear(8, 4), optimizer, "global", 0.5, until=5)


@pytest.mark.parametrize("pattern", ["2:4", "transposable"])
def test_sr_ste_gradient(pattern: str) -> None:
    """dL/dw = g + decay (1 - m) w, g that of the masked weight."""
    linear = nn.Linear(8, 8, bias=False)
    assert prune.sr_ste_(linear, pattern, decay=0.1) == [""]
    x = rand(5, 8)
    linear(x).square().sum().backward()
    original, mask = linear.parametrizations.weight.original, prune.mask_of(linear).mask  # type: ignore[union-attr]
    dense = (original.detach() * mask).requires_grad_()
    (x @ dense.t()).square().sum().backward()
    assert torch.allclose(original.grad, dense.grad + 0.1 * original.detach() * ~mask)
    assert torch.equal(mask, prune.pattern_of(pattern).mask(original.detach().abs()))


def test_sr_ste_masks_follow_the_weights_and_freeze() -> None:
    model = network()
    prune.sr_ste_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    idle = OneShot(model, optimizer, "2:4", at=99)
    before = prune.masks_of(model)
    train(model, optimizer, idle, 10)
    assert any(not torch.equal(m, before[n]) for n, m in prune.masks_of(model).items())
    assert prune.mask_of(model[0]).flips >= 0  # type: ignore[union-attr]
    model.eval()
    expected = model(rand(3, 12))
    prune.freeze_masks_(model)
    assert type(prune.mask_of(model[0])) is prune.Mask
    assert torch.equal(model(rand(3, 12)), expected)
    assert torch.equal(prune.finalize_(model)(rand(3, 12)), expected)


def test_ice_skips_training_where_nothing_was_lost() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)  # removing any of it changes nothing
    optimizer = sgd(model)
    asked: list[float] = []

    def evaluate(m: nn.Module) -> float:
        asked.append(1 - schedule_sparsity(m))
        return asked[-1]

    schedule = Ice(
        model, optimizer, "unstructured", 0.8, rounds=4, every=3, spacing="linear", evaluate=evaluate,
        skip_below=0.5, freeze=0.5,
    )  # fmt: skip
    # 1 -> 0.8 and 0.6 lose less than 0.5; 0.4 does not.
    assert schedule.skipped == [1, 2]
    assert schedule.round == 3
    assert len(schedule.frozen) == 1
    frozen = model[int(schedule.frozen[0])]
    weights = frozen.weight.detach().clone()
    train(model, optimizer, schedule, 2)
    assert torch.equal(frozen.weight, weights)
    train(model, optimizer, schedule, 1, begin=2)
    assert schedule.round == 4
    train(model, optimizer, schedule, 3, begin=3)
    assert schedule.finished
    assert schedule.sparsity == pytest.approx(0.8, abs=0.01)


def schedule_sparsity(model: nn.Module) -> float:
    masks = prune.masks_of(model)
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def test_regularisers() -> None:
    model = network()
    weights = [model[0].weight, model[3].weight]
    assert prune.l1(model, 0.5).item() == pytest.approx(0.5 * sum(float(w.detach().abs().sum()) for w in weights))
    assert prune.bn_l1(model, 2.0).item() == pytest.approx(2 * 24)
    blocks = prune.group_lasso(model, Block((4, 2)), 1.0)
    want = 0.0
    for w in weights:
        tiles = w.detach().unfold(0, 4, 4).unfold(1, 2, 2)
        want += math.sqrt(8) * float(tiles.square().sum((2, 3)).sqrt().sum())
    assert blocks.item() == pytest.approx(want, rel=1e-5)
    rows = prune.group_lasso(model, "channels", 1.0)
    assert rows.item() == pytest.approx(
        sum(math.sqrt(w.shape[1]) * float(w.detach().norm(dim=1).sum()) for w in weights), rel=1e-5
    )
    with torch.no_grad():
        model[0].weight.zero_()
    prune.group_lasso(model).backward()
    assert torch.isfinite(model[0].weight.grad).all()
    with pytest.raises(ValueError, match="no groups of its own"):
        prune.group_lasso(model, "2:4")


def test_group_lasso_makes_whole_blocks_small() -> None:
    def spread(penalty: Any) -> float:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        data = [(rand(64, 12, seed=s), rand(64, 8, seed=50 + s)) for s in range(4)]
        prune.fit(
            model, data, lambda m, b: F.mse_loss(m(b[0]), b[1]), optimizer, steps=150, penalty=penalty, progress=False
        )
        tiles = model[0].weight.detach().unfold(0, 4, 4).unfold(1, 4, 4).square().sum((2, 3)).sqrt().flatten()
        return float((tiles < 0.1 * tiles.max()).float().mean())

    assert spread(lambda m: prune.group_lasso(m, Block(4), 0.02)) > spread(None)


def test_fit_runs_until_the_schedule_is_finished() -> None:
    model = network()
    optimizer = sgd(model)
    schedule = Iterative(model, optimizer, "2:4", rounds=1, every=7)
    data = [(rand(16, 12, seed=s), rand(16, 8, seed=9)) for s in range(3)]
    loss = lambda m, b: F.mse_loss(m(b[0]), b[1])  # noqa: E731
    losses = prune.fit(model, data, loss, optimizer, schedule, progress=False)
    assert len(losses) == schedule.count == 7
    assert losses[-1] < losses[0]
    assert len(prune.fit(model, data, loss, optimizer, steps=4, progress=False)) == 4
    with pytest.raises(ValueError, match="needs steps="):
        prune.fit(model, data, loss, optimizer)
    with pytest.raises(ValueError, match="no batch"):
        prune.fit(model, iter([]), loss, optimizer, steps=2, progress=False)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: Iterative(m, rounds=0, every=1), "at least 1"),
        (lambda m: Iterative(m, None, "global", 0.5, rounds=1, every=1, spacing="cubic"), "spacing"),
        (lambda m: Gradual(m, None, "global", 0.5, begin=5, end=5, every=1), "begin < end"),
        (lambda m: LotteryTicket(m, None, "global", 0.5, rounds=1, every=3, rewind=3), "rewind"),
        (lambda m: RigL(m, None, "row", 0.5, every=4, until=2), "until"),
        (lambda m: SET(m, None, "global", 0.5, every=1, until=2), "prune-and-grow"),
        (lambda m: Ice(m, None, "row", 0.5, rounds=1, every=1, evaluate=len, freeze=1.0), "freeze"),
        (lambda m: prune.sr_ste_(m, "global", 0.5), "inside each layer"),
        (lambda m: prune.erk(m, 2.0), "in \\[0, 1\\]"),
    ],
)
def test_settings_that_cannot_be(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(network())
