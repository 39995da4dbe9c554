"""Quantisation of kept weights, distillation, and pipelines of them in any order."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_prune_score import Conv1D, rand
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import prune
from sparsekern.prune import NM, Block, Distillation, Pipeline, Unstructured, quantised
from sparsekern.prune.distil import feature_loss, logits_loss
from sparsekern.prune.quantise import RowQuantiser, quantised_type
from sparsekern.sp24.pack import pack


def inputs(width: int = 16, count: int = 4, size: int = 64) -> list[Tensor]:
    mix = rand(width, width, seed=9)
    return [rand(size, width, seed=i) @ mix for i in range(count)]


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


# Quantisation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rows_are_rounded_to_the_nearest_value_there_is(dtype: str) -> None:
    w = rand(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    w[2] = 0
    q = quantised(w, dtype)
    kind = quantised_type(dtype)
    assert q.values.dtype == kind
    every = torch.arange(-127, 128).to(torch.int8) if dtype == "int8" else torch.arange(256).to(torch.uint8).view(kind)
    levels = every.float()
    levels = levels[torch.isfinite(levels)]
    for row in range(6):
        grid = levels * q.scale[row]
        nearest = (w[row][:, None] - grid).abs().amin(1)
        torch.testing.assert_close((w[row] - q.dequantised()[row]).abs(), nearest, rtol=1e-3, atol=1e-9)
    assert bool((q.dequantised()[2] == 0).all())
    assert float(q.values.float().abs().max()) == (127 if dtype == "int8" else 448)
    assert torch.equal(quantised(-w, dtype).dequantised(), -q.dequantised())  # symmetric


def test_fp8_keeps_small_weights_that_int8_loses() -> None:
    w = torch.tensor([[1.0, 1e-3]])
    assert float(quantised(w, "int8").dequantised()[0, 1]) == 0
    assert float(quantised(w, "fp8").dequantised()[0, 1]) == pytest.approx(1e-3, rel=0.07)
    with pytest.raises(ValueError, match="int8, fp8"):
        quantised(w, torch.float16)
    with pytest.raises(ValueError, match="matrix"):
        quantised(rand(2, 3, 4))


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_pruned_and_quantised_layer_runs_from_its_integers(dtype: str) -> None:
    layer, x = nn.Linear(32, 24), rand(5, 32)
    prune.magnitude_(layer)
    zeros = layer.weight == 0
    result = prune.quantise_(layer, dtype)[""]
    assert torch.equal(layer.weight == 0, zeros)
    assert result.sparsity == 0.5
    assert 0 < result.error < (1e-4 if dtype == "int8" else 2e-3)
    q = prune.stored(layer, result.scale, dtype)
    torch.testing.assert_close(q.dequantised(), layer.weight.detach(), rtol=1e-6, atol=1e-8)
    if dtype == "int8":
        packed = pack(q.values, scale=q.scale)  # 2:4, and int8: the format's own check would refuse it else
        assert packed.check().dtype == torch.int8
        got = sk.linear(x, sk.SparseTensor(packed), layer.bias)
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-5)


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest() -> None:
    """On few levels (the rows have outliers), with what was pruned still pruned."""
    dense = nn.Linear(16, 12, bias=False)
    with torch.no_grad():
        dense.weight[:, 0] *= 60  # the scale is that of an outlier: the others have a handful of levels
    prune.magnitude_(dense, "row", 0.25, keep_mask=False)
    x = rand(256, 5) @ rand(5, 16, seed=1) + 0.05 * rand(256, 16, seed=2)
    data = x.split(64)
    nearest, paid = copy.deepcopy(dense), copy.deepcopy(dense)
    prune.quantise_(nearest)
    result = prune.quantise_(paid, method="gptq", data=data, damp=0.001, progress=False)
    with torch.no_grad():
        whole = dense(x).square().sum()
        lost = [float((m(x) - dense(x)).square().sum() / whole) for m in (nearest, paid)]
    assert lost[1] < 0.7 * lost[0]
    assert result[""].error == pytest.approx(lost[1], rel=1e-2)
    assert torch.equal(paid.weight == 0, (paid.weight == 0) | (dense.weight == 0))
    assert prune.mask_of(paid) is None  # it only rounded
    q = prune.stored(paid, result[""].scale)
    torch.testing.assert_close(q.dequantised(), paid.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_joint_pruning_and_rounding(dtype: str) -> None:
    dense, data = network(), inputs()
    joint = copy.deepcopy(dense)
    result = prune.sparsegpt_(joint, data, NM(), quantise=dtype, progress=False)
    for name, found in result.items():
        layer: Any = joint.get_submodule(name)
        q = prune.stored(layer, found.scale, dtype)
        torch.testing.assert_close(q.dequantised(), layer.weight.detach(), rtol=1e-5, atol=1e-6)
        assert found.sparsity == 0.5


def test_quantise_conv_and_conv1d_by_output_channel() -> None:
    conv, conv1d = nn.Conv2d(4, 6, 3), Conv1D(6, 8)
    for module, n in ((conv, 6), (conv1d, 6)):
        result = prune.quantise_(module)[""]
        assert result.scale.shape == (n,)
    largest = conv1d.weight.detach().abs().amax(0)  # of each output
    torch.testing.assert_close(largest / 127, prune.quantise_(conv1d)[""].scale)


def test_quantise_refuses() -> None:
    with pytest.raises(ValueError, match="needs data="):
        prune.quantise_(network(), method="gptq")
    with pytest.raises(ValueError, match="'absmax' or 'gptq'"):
        prune.quantise_(network(), method="other")
    with pytest.raises(ValueError, match="quantise to"):
        RowQuantiser(torch.int32)


# Distillation ------------------------------------------------------------------------------------------


def test_the_logits_loss_is_kl_times_t_squared() -> None:
    s, t = rand(3, 5, 7), rand(3, 5, 7, seed=1)
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    want = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(logits_loss(s, t, 3.0), want)
    assert float(logits_loss(t, t)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="differ"):
        logits_loss(s, t[:1])
    with pytest.raises(ValueError, match="temperature"):
        logits_loss(s, t, 0)


def test_the_gradient_tends_to_the_difference_of_logits() -> None:
    """For a large T, T^2 KL -> mean of the centred squared differences / (2 classes): Hinton et al., section 2.1."""
    s, t = rand(4, 6).requires_grad_(), rand(4, 6, seed=1)
    (g,) = torch.autograd.grad(logits_loss(s, t, 1e3), [s])
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    torch.testing.assert_close(g, centred.detach() / (6 * 4), rtol=2e-2, atol=1e-3)


def test_distillation_in_an_own_training_loop() -> None:
    teacher, data = network(), inputs()
    student = copy.deepcopy(teacher)
    prune.magnitude_(student, "unstructured", 0.5)
    zeros = student[2].weight == 0
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    before = [p.clone() for p in teacher.parameters()]
    values = []
    with Distillation(teacher, student, features=["1", "3"], temperature=1.0) as distil:
        for _ in range(40):
            for x in data:
                value = distil(student(x), x)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                values.append(float(value.detach()))
    assert sum(values[-4:]) < 0.5 * sum(values[:4])
    assert torch.equal(student[2].weight == 0, zeros)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(m._forward_hooks for model in (teacher, student) for m in model.modules())


def test_distillation_is_the_sum_of_its_parts() -> None:
    teacher, student, x = network(), network(), inputs()[0]
    prune.magnitude_(student)
    with Distillation(teacher, student, features={"1": "1"}, feature_weight=0.5, logits=2.0) as distil:
        got = distil(student(x), x)
        with pytest.raises(ValueError, match="did not run"):
            distil(torch.zeros(64, 8), x)
    features = [m[1](m[0](x)) for m in (student, teacher)]
    want = 2 * logits_loss(student(x), teacher(x)) + 0.5 * feature_loss(*features)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(feature_loss(2 * features[1], features[1]), torch.ones(()))
    where = torch.arange(64) < 3
    with Distillation(teacher, student) as distil:
        torch.testing.assert_close(distil(student(x), x, where), logits_loss(student(x)[:3], teacher(x)[:3]))


def test_outputs_that_hold_more_than_logits() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.net, self.kind = network(), kind

        def forward(self, x: Tensor) -> Any:
            y = self.net(x)
            return {"object": Answer(y), "tuple": (y, None)}[self.kind]

    x = inputs()[0]
    for kind in ("object", "tuple"):
        model = Wrapped(kind)
        with Distillation(model, copy.deepcopy(model), feature_weight=0) as distil:
            assert float(distil(distil.student(x), x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_distil_brings_a_pruned_model_back(dtype: str | None) -> None:
    teacher, data = network(), inputs()
    student = copy.deepcopy(teacher)
    prune.magnitude_(student, Block(4), 0.5)
    seen: list[int] = []
    losses = prune.distil_(
        student,
        teacher,
        iter(data),
        steps=80,
        rate=1e-2,
        quantise=dtype,
        after_step=lambda step, loss: seen.append(step),
        progress=False,
    )
    assert seen == list(range(80))
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert bool((student[2].weight[~prune.mask_of(student[2]).mask] == 0).all())
    with torch.no_grad():
        left = sum(float(logits_loss(student(x), teacher(x))) for x in data)
    assert left < 1.5 * sum(losses[-4:])  # rounding at the end loses nothing that training did not see
    if dtype is not None:
        weight = student[2].weight.detach()
        assert torch.equal(quantised(weight).dequantised(), quantised(quantised(weight).dequantised()).dequantised())
        steps = weight / quantised(weight).scale[:, None]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_distil_takes_an_own_loss_and_an_own_optimizer() -> None:
    teacher, data = network(), [(x, torch.arange(64) % 8) for x in inputs()]
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    forward = {"forward": lambda model, batch: model(batch[0])}
    losses = prune.distil_(
        student,
        teacher,
        data,
        steps=1,
        optimizer=optimizer,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        progress=False,
        **forward,
    )
    assert losses[0] == pytest.approx(float(F.cross_entropy(teacher(data[0][0]), data[0][1])), rel=1e-5)
    with pytest.raises(ValueError, match="no batch"):
        prune.distil_(student, teacher, [], steps=1, progress=False)


# Pipelines ---------------------------------------------------------------------------------------------


def stages(teacher: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    return {
        "prune": lambda model: prune.magnitude_(model, Unstructured(), 0.6),
        "distil": lambda model: prune.distil_(
            model, teacher, data, steps=40, rate=5e-3, quantise="int8", progress=False
        ),
        "quantise": lambda model: prune.quantise_(model, "int8"),
    }


@pytest.mark.parametrize(
    "order",
    [("prune", "distil", "quantise"), ("quantise", "prune", "distil"), ("prune", "quantise", "distil")],
    ids="-".join,
)
def test_a_pipeline_in_any_order_ends_pruned_and_on_the_grid(order: tuple[str, ...], tmp_path: Path) -> None:
    teacher, data = network(), inputs()
    model = copy.deepcopy(teacher)
    known = stages(teacher, data)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"distance": sum(float(logits_loss(model(x), teacher(x))) for x in data)}

    rows: list[str] = []
    report = Pipeline(*((name, known[name]) for name in order), evaluate=evaluate).run(
        model, show=lambda row: rows.append(row.stage)
    )
    assert rows == ["start", *order]
    by_name = {s.stage: s for s in report.stages}
    assert by_name["start"].metrics["distance"] == pytest.approx(0, abs=1e-6)
    assert by_name["start"].sparsity == 0
    last = report.stages[-1]
    assert last.sparsity == pytest.approx(0.6, abs=0.01)
    assert last.levels <= 255
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert last.nonzeros == sum(int((w != 0).sum()) for w in weights)
    assert by_name["distil"].metrics["distance"] < 0.6 * max(s.metrics["distance"] for s in report.stages)
    report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert [row["stage"] for row in read] == rows
    assert read[-1]["metrics"] == last.metrics
    assert "distance" in str(report)


def test_levels_tell_when_a_stage_leaves_the_grid() -> None:
    teacher, data = network(width=512), inputs(width=512)
    learn = {"distil": lambda m: prune.distil_(m, teacher, data, steps=2, rate=1e-3, progress=False)}
    model = copy.deepcopy(teacher)
    prune.magnitude_(model, "unstructured", 0.1)
    report = Pipeline(("quantise", lambda m: prune.quantise_(m)), *learn.items()).run(model)
    start, rounded, trained = (s.levels for s in report.stages)
    assert start > 300
    assert rounded <= 255 < trained


def test_a_pipeline_refuses_what_is_no_stage() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Pipeline()
    with pytest.raises(ValueError, match="pair"):
        Pipeline(("prune", None))  # type: ignore[arg-type]
