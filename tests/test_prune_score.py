"""Scores: every criterion against its definition, computed another way, on small real models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.prune import NM, Call, Unstructured, scores
from sparsekern.prune.calibrate import InputGram, InputNorm, followers, observe
from sparsekern.prune.score import CRITERIA, criterion, geometric_median


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Conv1D(nn.Module):
    """As in transformers: weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2, dilation=2, padding=(1, 2), padding_mode="circular"),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def images(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(rand(size, 3, 10, 10, seed=i), torch.arange(size) % 4) for i in range(count)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def is_conv(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d)


def first(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def test_wanda_by_hand() -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, -1.0, 1.0, 3.0], [0.0, 2.0, -5.0, 1.0]]))
    x = torch.tensor([[3.0, 8.0, 0.0, 1.0], [4.0, 6.0, 2.0, 0.0]])  # column norms 5, 10, 2, 1
    got = scores(layer, "wanda", data=[x[:1], x[1:]], progress=False)[""]
    assert torch.equal(got, torch.tensor([[20.0, 10.0, 2.0, 3.0], [0.0, 20.0, 10.0, 1.0]]))
    kept = NM().mask(got)
    assert torch.equal(kept, torch.tensor([[True, True, False, False], [False, True, True, False]]))
    # Magnitude chooses otherwise in row 0: 4 and 3.
    assert not torch.equal(kept, NM().mask(scores(layer)[""]))
    assert CRITERIA["wanda"].compare == "row"


def test_ria_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0], [4.0, 1.0]]))
    got = scores(layer, "ria", data=[torch.tensor([[4.0, 9.0]])], progress=False)[""]  # sqrt of norms: 2, 3
    want = torch.tensor([[(1 / 4 + 1 / 5) * 2, (3 / 4 + 3 / 4) * 3], [(4 / 5 + 4 / 5) * 2, (1 / 5 + 1 / 4) * 3]])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", ["crs", "rsc"])
@pytest.mark.parametrize("index", [0, 3])
def test_conv_input_statistics_are_those_of_the_matrix_product(order: str, index: int) -> None:
    """W applied to the rows is the convolution: stride, dilation, groups and circular padding included."""
    model = convolutional()
    conv: Any = model[index]
    x = rand(2, conv.in_channels, 10, 10)
    from sparsekern.prune.calibrate import input_rows
    from sparsekern.prune.layers import as_matrix

    rows = torch.cat(list(input_rows(conv, x, order)), 1)  # [G, T, K]
    matrix = as_matrix(conv, conv.weight.detach(), order).unflatten(0, (conv.groups, -1))
    y = (rows @ matrix.transpose(1, 2)).permute(1, 0, 2).flatten(1) + conv.bias
    want = conv(x).movedim(1, -1).reshape(-1, conv.out_channels)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    norm, gram = InputNorm(order), InputGram(order)
    observe(conv, [x[:1], x[1:]], {conv: norm}, progress=False)
    observe(conv, [x[:1], x[1:]], {conv: gram}, progress=False)
    torch.testing.assert_close(norm.norm, rows.norm(dim=1))
    torch.testing.assert_close(gram.hessian, 2 / rows.shape[1] * rows.transpose(1, 2) @ rows)


def test_conv1d_scores_are_the_linear_s_transposed() -> None:
    conv1d, linear = Conv1D(6, 8), nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.t())
        linear.bias.zero_()
    data = [rand(5, 8, seed=i) for i in range(3)]
    for name in ("wanda", "ria", "l1", "activation", "fpgm"):
        a, b = (scores(m, name, data=data, progress=False)[""] for m in (conv1d, linear))
        torch.testing.assert_close(a.t() if a.dim() == 2 else a, b)
    prune.magnitude_(conv1d)
    assert bool(((conv1d.weight.t().reshape(6, 2, 4) != 0).sum(-1) == 2).all())


def test_batches_of_every_kind_give_the_same_statistics() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(x * scale)

    model = Named()
    x = rand(5, 4)
    kinds = [x, (x,), [x], {"x": x}, Call((x,)), Call((x / 2,), {"scale": 2.0})]
    found = [scores(model, "wanda", data=iter([kind]), progress=False)["fc"] for kind in kinds]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    labelled = scores(model, "wanda", data=[(x, "label")], forward=first, progress=False)
    torch.testing.assert_close(labelled["fc"], found[0])


def test_statistics_stream_and_leave_the_model_alone() -> None:
    model = convolutional().train()
    model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = images(6, 2)
    many = scores(model, "wanda", data=data, forward=first, progress=False)
    one = scores(model, "wanda", data=[torch.cat([x for x, _ in data])], progress=False)
    for name in many:
        torch.testing.assert_close(many[name], one[name], rtol=1e-5, atol=1e-6)
    for name in ("taylor", "snip", "obd", "movement", "gradient"):
        options = {"per_sample": False} if name == "obd" else {}
        scores(model, name, data=data, loss=loss, progress=False, **options)
    assert model.training
    assert not model[3].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradient_taylor_and_snip_from_autograd() -> None:
    model, data = convolutional().eval(), images()
    names = ["0", "3", "8"]
    weights = [model.get_submodule(n).weight for n in names]
    mean = torch.autograd.grad(sum(loss(model, b) for b in data) / len(data), weights)
    gradient = scores(model, "gradient", data=data, loss=loss, progress=False)
    taylor = scores(model, "taylor", data=data, loss=loss, progress=False)
    for name, g, w in zip(names, mean, weights, strict=True):
        torch.testing.assert_close(gradient[name], g.abs(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(taylor[name], (g * w).abs().detach(), rtol=1e-4, atol=1e-7)
    one = torch.autograd.grad(loss(model, data[0]), weights)
    total = sum(float((g * w).detach().abs().sum()) for g, w in zip(one, weights, strict=True))
    snip = scores(model, "snip", data=data, loss=loss, progress=False)
    for name, g, w in zip(names, one, weights, strict=True):
        torch.testing.assert_close(snip[name], (g * w).abs().detach() / total, rtol=1e-4, atol=1e-8)
    assert sum(float(s.sum()) for s in snip.values()) == pytest.approx(1, abs=1e-5)


def test_taylor_is_the_slope_of_the_loss_as_a_weight_shrinks() -> None:
    model, data = nn.Linear(6, 3).double(), [(rand(64, 6).double(), torch.arange(64) % 3)]
    taylor = scores(model, "taylor", data=data, loss=loss, progress=False)[""]
    with torch.no_grad():
        base, share = loss(model, data[0]), 1e-5
        for i, j in ((0, 0), (1, 4), (2, 2)):
            kept = model.weight[i, j].clone()
            model.weight[i, j] *= 1 - share
            change = abs(float(loss(model, data[0]) - base)) / share
            model.weight[i, j] = kept
            assert change == pytest.approx(float(taylor[i, j]), rel=1e-3)


def test_fisher_is_the_mean_squared_gradient_of_single_samples() -> None:
    model, data = convolutional().eval(), images(2, 3)
    fc = model[8]
    squares = []
    for x, y in data:
        for i in range(len(y)):
            (g,) = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])), [fc.weight])
            squares.append(g.square())
    want = torch.stack(squares).mean(0) * fc.weight.detach().square() / 2
    got = scores(model, "obd", data=data, loss=loss, progress=False)["8"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)
    batchwise = scores(model, "obd", data=data, loss=loss, per_sample=False, progress=False)["8"]
    assert not torch.allclose(batchwise, want, rtol=1e-2, atol=0)


def test_hutchinson_equals_the_diagonal_of_the_exact_hessian() -> None:
    """A quadratic in the weights: row n of H is X^T X / T for the squared error; exact where H is diagonal."""
    model = nn.Linear(4, 2, bias=False).double()
    target = rand(8, 2, seed=1).double()

    def squared(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - target).square().sum() / (2 * len(x))

    orthogonal = torch.linalg.qr(rand(8, 4).double()).Q * torch.tensor([1.0, 2.0, 3.0, 4.0])
    half = model.weight.detach().square() / 2
    got = scores(model, "obd", data=[orthogonal], loss=squared, method="hutchinson", probes=1, progress=False)[""]
    torch.testing.assert_close(got.double(), half * orthogonal.square().sum(0) / 8, rtol=1e-5, atol=1e-7)

    x = rand(8, 4, seed=2).double()
    exact = torch.autograd.functional.hessian(lambda w: (x @ w.t() - target).square().sum() / 16, model.weight.detach())
    diagonal = torch.einsum("ijij->ij", exact)
    got = scores(model, "obd", data=[x], loss=squared, method="hutchinson", probes=4000, progress=False)[""]
    torch.testing.assert_close(got.double(), half * diagonal, rtol=0.1, atol=0)
    few = scores(model, "obd", data=[x], loss=squared, method="hutchinson", probes=1, progress=False)[""]
    assert not torch.allclose(few.double(), half * diagonal, rtol=1e-3, atol=0)  # an estimate, not the exact one


def test_movement_adds_up_over_steps_and_keeps_its_sign() -> None:
    model = nn.Linear(9, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(rand(8, 9, seed=i), torch.arange(8) % 4) for i in range(4)]
    want = torch.zeros_like(model.weight)
    twin = nn.Linear(9, 4, bias=False)
    twin.load_state_dict(model.state_dict())
    for batch in data:
        (g,) = torch.autograd.grad(loss(twin, batch), [twin.weight])
        with torch.no_grad():
            want -= twin.weight * g
            twin.weight -= 0.1 * g
    got = scores(model, "movement", data=data, loss=loss, optimizer=optimizer, progress=False)[""]
    torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.weight, twin.weight)
    assert bool((got < 0).any())
    assert bool((got > 0).any())
    # N:M over signed scores with a ragged group still keeps real entries.
    assert NM().mask(-torch.ones(2, 6)).sum(1).tolist() == [4, 4]


def test_movement_needs_gradients() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        prune.Movement(nn.Linear(2, 2)).step()


def test_activation_statistics_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    data = [torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[-5.0, 2.0]])]
    # Outputs (1, -2, 1), (3, 4, -7), (-5, 2, 3): after relu (1, 0, 1), (3, 4, 0), (0, 2, 3).
    mean = scores(model, "activation", data=iter(data), progress=False)["0"]
    torch.testing.assert_close(mean, torch.tensor([4 / 3, 6 / 3, 4 / 3]))
    apoz = scores(model, "apoz", data=iter(data), progress=False)["0"]
    torch.testing.assert_close(apoz, torch.tensor([2 / 3, 2 / 3, 2 / 3]))
    linear = scores(model, "activation", data=data, activation=nn.Identity(), progress=False)["0"]
    torch.testing.assert_close(linear, torch.tensor([9 / 3, 8 / 3, 11 / 3]))


def test_activations_are_seen_behind_the_norm() -> None:
    model = convolutional().eval()
    with torch.no_grad():
        model[1].bias[5] = -100.0  # this channel never gets through the relu
    found = scores(model, "apoz", data=images(), forward=first, filter_fn=is_conv, progress=False)
    assert float(found["0"][5]) == 0
    assert float(found["0"].max()) > 0.1


def test_hrank_is_the_mean_rank_of_the_maps() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.0, -1.0]).reshape(3, 1, 1, 1))
    low = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 6))  # rank one
    x = torch.stack([low, torch.eye(5)])[:, None]
    got = scores(model, "hrank", data=[x[:1], x[1:]], progress=False)["0"]
    assert got.tolist() == [(1 + 5) / 2, 0, 0]
    noise = rand(4, 1, 6, 6)
    want = torch.stack([torch.linalg.matrix_rank(noise[i, 0].relu()) for i in range(4)]).float().mean()
    assert float(scores(model, "hrank", data=[noise], progress=False)["0"][0]) == float(want)
    with pytest.raises(ValueError, match="only a Conv2d"):
        scores(nn.Linear(2, 2), "hrank", data=[rand(2, 2)])


def test_fpgm_finds_the_filter_that_the_others_replace() -> None:
    matrix = torch.tensor([[0.0, 0.0], [4.0, 0.0], [-4.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    got = geometric_median(matrix)
    assert int(got.argmin()) == 0  # the median itself, not the one of least norm among others
    assert float(got[0]) == 4 + 4 + 3 + 3
    assert float(got[1]) == pytest.approx(4 + 8 + 5 + 5)
    shifted = geometric_median(matrix + 100)  # distance knows no origin: magnitude does
    torch.testing.assert_close(shifted, got)


def test_bn_scale_is_the_norm_that_takes_the_output() -> None:
    model = convolutional()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(-4.0, 4))
    found = scores(model, "bn_scale", data=images(), forward=first, filter_fn=is_conv)
    assert torch.equal(found["0"], torch.arange(-4.0, 4).abs())
    assert torch.equal(found["3"], torch.ones(6))
    with pytest.raises(ValueError, match="no BatchNorm"):
        scores(model, "bn_scale", data=images(), forward=first)  # the last Linear has none


def test_followers_go_by_the_tensor_not_by_the_order_of_registration() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
            self.norm_b, self.norm_a = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm_b(self.b(x)) + self.norm_a(self.a(x))

    model = Crossed()
    found = followers(model, rand(5, 3), [model.a, model.b], (nn.BatchNorm1d,))
    assert found == {model.a: model.norm_a, model.b: model.norm_b}


def test_random_is_seeded_and_magnitude_sums_over_channels() -> None:
    model = convolutional()
    a, b, c = (scores(model, "random", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) and not torch.equal(a[n], c[n]) for n in a)
    l2 = scores(model, "l2", per="channel")
    torch.testing.assert_close(l2["0"], model[0].weight.detach().square().sum((1, 2, 3)))
    lp = scores(model, "magnitude", p=3.0, per="channel")
    torch.testing.assert_close(lp["8"], model[8].weight.detach().abs().pow(3).sum(1))
    most = scores(model, "magnitude", p=math.inf, per="channel")
    torch.testing.assert_close(most["3"], model[3].weight.detach().abs().amax((1, 2, 3)))
    assert scores(model, "fpgm", per="channel")["0"].shape == (8,)


def test_every_criterion_says_its_formula_and_its_source() -> None:
    data, model = images(), convolutional().eval()
    for name, entry in CRITERIA.items():
        assert len(entry.summary) > 10
        options: dict[str, Any] = {"filter_fn": is_conv} if name in ("hrank", "bn_scale") else {}
        found = scores(model, name, data=data, loss=loss, forward=first, progress=False, **options)
        for layer, score in found.items():
            weight = model.get_submodule(layer).weight
            assert score.shape == (weight.shape if entry.gives == "weight" else weight.shape[:1])
            assert not score.requires_grad
        if entry.needs_data:
            with pytest.raises(ValueError, match=r"needs (data|loss)="):
                scores(model, name, loss=loss, **options)
        if entry.needs_loss:
            with pytest.raises(ValueError, match="needs loss="):
                scores(model, name, data=data)


def test_own_criteria_by_function_and_by_name() -> None:
    model = convolutional()
    found = scores(model, lambda module, name: -module.weight.abs())
    assert torch.equal(found["8"], -model[8].weight.detach().abs())
    with pytest.raises(ValueError, match="scores of shape"):
        scores(model, lambda module, name: torch.ones(3, 3, 3))
    with pytest.raises(ValueError, match="NaN"):
        scores(model, lambda module, name: module.weight * math.nan)
    with pytest.raises(ValueError, match="criterion must be one of"):
        scores(model, "wandax")

    @criterion("test only")
    def _constant(request: Any) -> dict[str, Tensor]:
        return {name: torch.ones_like(module.weight) for name, module in request.layers}

    try:
        assert bool((scores(model, "test only")["0"] == 1).all())
    finally:
        del CRITERIA["test only"]


def test_unreached_and_empty_data_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    feed = {"forward": lambda m, x: m["used"](x)}
    with pytest.raises(ValueError, match="no token reaches idle"):
        scores(model, "wanda", data=[rand(3, 2)], **feed)
    with pytest.raises(ValueError, match="does not depend on idle"):
        scores(model, "taylor", data=[rand(3, 2)], loss=lambda m, x: m["used"](x).sum())
    with pytest.raises(ValueError, match="no batch"):
        scores(nn.Linear(2, 2), "wanda", data=[])


def test_a_shared_weight_is_watched_at_both_layers() -> None:
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    b.weight = a.weight
    x = rand(4, 3)
    found = scores(nn.Sequential(a, b), "wanda", data=[x], progress=False)
    assert list(found) == ["0"]
    both = torch.cat([x, a(x).detach()]).norm(dim=0)
    torch.testing.assert_close(found["0"], a.weight.detach().abs() * both)


def test_scores_of_a_masked_layer_are_those_of_what_is_left() -> None:
    layer = nn.Linear(8, 4)
    prune.magnitude_(layer)
    gone = layer.weight == 0
    for name in ("l1", "wanda", "taylor", "gradient"):
        found = scores(layer, name, data=[rand(5, 8)], loss=lambda m, x: m(x).square().sum(), progress=False)[""]
        assert bool((found[gone] == 0).all())
    further = Unstructured().mask(found, 0.75)
    assert bool((further <= ~gone).all())
