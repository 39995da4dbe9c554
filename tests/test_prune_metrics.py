"""What is counted is counted right; curves have controls; a sensitivity gives a plan that prune_ takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_prune_structure import rand
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.patterns import analyse
from sparsekern.prune import Channels


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.mark.parametrize("masked", [True, False])
def test_counts(masked: bool) -> None:
    model, x = Small(), rand(5, 3, 8, 8)
    with torch.no_grad():
        model.norm.bias.uniform_(0.5, 1)
    prune.prune_(model, "unstructured", {"conv": 0.5, "head": 0.75}, keep_mask=masked)
    size = prune.size_of(model, x)
    conv, head = 8 * 27, 1280
    assert size.parameters == conv + 8 + 16 + head + 10
    assert size.nonzeros == conv // 2 + 8 + 16 + head // 4 + 10
    assert size.multiply_adds == 5 * (16 * conv + head)  # 4 x 4 outputs: the stride counts, not the padding
    assert size.effective_multiply_adds == 5 * (16 * conv // 2 + head // 4)
    assert size.compression == pytest.approx(size.parameters / size.nonzeros)
    assert size.theoretical_speedup == pytest.approx((16 * conv + head) / (16 * conv // 2 + head // 4))
    buffers = 8 * 4 * 2 + 8  # running mean and variance, the number of batches
    assert size.dense_bytes == 4 * size.parameters + buffers
    weight = model.head.weight.detach()
    saved = min(weight.numel() * 4, analyse(weight).nbytes("bitmap"))
    conv_bytes = min(conv * 4, analyse(model.conv.weight.detach()).nbytes("bitmap"))
    assert size.stored_bytes == size.dense_bytes - 4 * (head + conv) + saved + conv_bytes
    assert model.training


def test_tied_weights_and_24_are_counted_once_and_with_metadata() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    prune.prune_(model, "2:4", keep_mask=False)
    size = prune.size_of(model)
    assert (size.parameters, size.nonzeros) == (4096, 2048)
    assert size.stored_bytes == 4096 * 2 + 4096 // 8  # half the values, a nibble a group
    assert size.theoretical_speedup is None
    half = prune.size_of(model.to(torch.bfloat16))
    assert half.dense_bytes == 8192
    assert half.stored_bytes == 4096 + 512


def test_speed_is_measured_after_a_check() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16))
    pruned = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16))
    pruned.load_state_dict(dense.state_dict())
    prune.prune_(pruned, "unstructured", 0.9)
    speed = prune.speed_of(pruned, dense, rand(8, 256), seconds=0.1, convert={"policy": "always"})
    assert speed.layers_converted == 2
    assert speed.theoretical == pytest.approx(10, rel=0.01)
    assert speed.speedup == speed.dense.median / speed.converted.median
    assert speed.gap == pytest.approx(speed.theoretical / speed.speedup)
    assert prune.mask_of(pruned[0]) is not None  # a copy was converted
    assert json.loads(json.dumps(speed.to_dict()))["converted"]["ms"] > 0


def teacher_task() -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose first two inputs and hidden units carry everything."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight[:, 2:] *= 0.01
        model[2].weight[:, 8:] *= 0.01
        x = rand(400, 16)
        model[2].bias -= model(x).mean(0)  # so that every class has its share
    return model, x, model(x).argmax(1).detach()


def test_a_curve_has_controls_and_recovers(tmp_path: Path) -> None:
    model, x, y = teacher_task()
    seen: list[int] = []

    def evaluate(m: nn.Module) -> float:
        return float((m(x).argmax(1) == y).float().mean())

    def recover(m: nn.Module) -> None:
        seen.append(sum(int(mask.sum()) for mask in prune.masks_of(m).values()))
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        prune.fit(
            m, [(x, y)], lambda n, b: nn.functional.cross_entropy(n(b[0]), b[1]), optimizer, steps=30, progress=False
        )

    found = prune.curve(
        model, evaluate, "unstructured", (0.5, 0.8), ("wanda",), data=[x], recover=recover, sample=x[:4],
        seconds=0.05, progress=False,
    )  # fmt: skip
    by = {(r.method, round(r.sparsity, 1)): r for r in found.results}
    assert set(by) == {(m, s) for m in ("random", "magnitude", "wanda") for s in (0.5, 0.8)}
    assert seen == [320, 128] * 3
    assert all(r.accuracy_dense == 1 for r in found.results)
    assert by["magnitude", 0.8].accuracy_pruned > by["random", 0.8].accuracy_pruned + 0.1
    assert all(r.accuracy == r.accuracy_recovered for r in found.results)
    assert by["random", 0.8].accuracy > by["random", 0.8].accuracy_pruned
    assert model[0].weight.count_nonzero() == 512
    text = str(found)
    assert "wanda" in text
    assert "gap" in text
    record = json.loads(found.to_json(tmp_path / "curve.json"))
    assert len(record["results"]) == 6
    assert record["results"][0]["size"]["theoretical_speedup"] == pytest.approx(2, rel=0.01)
    assert found.plot(tmp_path / "curve.png").stat().st_size > 5000


def test_a_curve_of_channels_is_of_smaller_models() -> None:
    model, x, y = teacher_task()
    evaluate = lambda m: float((m(x).argmax(1) == y).float().mean())  # noqa: E731
    found = prune.curve(
        model, evaluate, Channels(over="group"), (0.5,), controls=("magnitude",), sample=x, timed=False, progress=False
    )
    (result,) = found.results
    assert result.size.parameters == 16 * 16 + 16 + 4 * 16 + 4
    assert result.sparsity == pytest.approx(0.5)
    assert result.speed is None
    assert result.accuracy_pruned > 0.9


def test_sensitivity_and_its_plan(tmp_path: Path) -> None:
    model, x, y = teacher_task()
    evaluate = lambda m: float((m(x).argmax(1) == y).float().mean())  # noqa: E731
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = prune.sensitivity(model, evaluate, "unstructured", (0.5, 0.8, 0.95), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found.baseline == 1
    assert found.sizes == {"0": 512, "2": 128}
    # By hand: one layer alone.
    twin, _, _ = teacher_task()
    prune.prune_(twin, "unstructured", {"0": 0.8})
    assert found.accuracy["0"][0.8] == evaluate(twin)
    tight = found.plan(drop=0.05)
    for name, share in tight.items():
        points = found.accuracy[name]
        assert all(1 - a <= 0.05 for s, a in points.items() if s <= share)
        later = [s for s in points if s > share]
        assert not later or 1 - points[min(later)] > 0.05
    plan = found.plan(sparsity=0.7)
    assert sum(plan[n] * found.sizes[n] for n in plan) / 640 >= 0.7
    smaller = max(found.plan(drop=d)["0"] for d in (0.0,))
    assert plan["0"] >= smaller
    prune.prune_(model, "unstructured", plan)
    assert model[0].weight.count_nonzero() == round((1 - plan["0"]) * 512)
    with pytest.raises(ValueError, match="do not reach"):
        found.plan(sparsity=0.99)
    with pytest.raises(ValueError, match="one of them"):
        found.plan()
    assert found.plot(tmp_path / "s.png").stat().st_size > 5000
    assert json.loads(found.to_json(tmp_path / "s.json"))["layers"]["0"][0]["sparsity"] == 0.5


def test_sensitivity_of_channels_goes_by_group() -> None:
    model, x, y = teacher_task()
    evaluate = lambda m: float((m(x).argmax(1) == y).float().mean())  # noqa: E731
    found = prune.sensitivity(model, evaluate, Channels(), (0.5,), sample=x, progress=False)
    assert set(found.accuracy) == {"0"}
    plan = found.plan(drop=1.0)
    assert prune.prune_(model, Channels(), plan, sample=x) == {"0": 0.5}
