"""sparsekern prune, through its main()."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsekern import prune
from sparsekern.cli import main
from sparsekern.patterns import analyse

MODELS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

def loss(model, batch):
    return model(batch).square().mean()

nothing = dict
"""


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    assert main(["prune", *(str(arg) for arg in args)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, models to import and data of every kind, in the current directory."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "enc.q.weight": torch.randn(64, 128, generator=generator),
        "enc.q.bias": torch.ones(64),
        "enc.q.inner.weight": torch.randn(16, 16, generator=generator) * 0.01,
        "conv.weight": torch.randn(8, 16, 3, 3, generator=generator),
        "embed.weight": torch.randn(100, 64, generator=generator),
        "steps": torch.tensor(3),
    }
    save_file(state, tmp_path / "m.safetensors", {"author": "me"})
    torch.save(state, tmp_path / "m.pt")
    (tmp_path / "cli_models.py").write_text(MODELS)
    x = torch.randn(80, 32, generator=generator) * torch.linspace(0.1, 3, 32)
    torch.save(x, tmp_path / "x.pt")
    numpy.save(tmp_path / "x.npy", x.numpy())
    save_file({"input": x}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_to_24(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "m.safetensors", "p.safetensors", "--json", "--report", "r.json"))
    assert json.loads((folder / "r.json").read_text()) == report
    before, after = load_file(folder / "m.safetensors"), load_file(folder / "p.safetensors")
    assert set(after) == set(before)
    for name in ("enc.q.bias", "embed.weight", "steps"):
        assert torch.equal(after[name], before[name])
    assert "k" in analyse(after["enc.q.weight"]).sp24_orders
    assert "rsc" in analyse(after["conv.weight"]).sp24_orders
    on = prune.NM().mask(before["enc.q.weight"].abs())
    assert torch.equal(after["enc.q.weight"], before["enc.q.weight"] * on)
    assert report["removed"] == {"enc.q": 0.5, "enc.q.inner": 0.5, "conv": 0.5}
    rows = {row["layer"]: row for row in report["layers"]}
    assert rows["enc.q"]["suits"] == "sp24"
    assert rows["enc.q"]["stored_bytes"] == 64 * 128 * 2 + 64 * 16
    assert rows["embed"]["sparsity"] == 0
    assert report["after"]["nonzeros"] < report["before"]["nonzeros"]


def test_a_global_threshold_and_a_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "m.pt", "p.pt", "--pattern", "global", "--sparsity", "0.5", "--min-keep", "0.1")
    assert "suits" in text
    after = torch.load(folder / "p.pt", weights_only=True)
    small = after["enc.q.inner.weight"]
    assert int(small.count_nonzero()) == 26  # a tenth of 256, although all of it is small
    (folder / "plan.json").write_text('{"conv": 0.75}')
    run(capsys, "m.pt", "p.pt", "--pattern", "unstructured", "--plan", "plan.json", "--force")
    after = torch.load(folder / "p.pt", weights_only=True)
    assert int(after["conv.weight"].count_nonzero()) == 8 * 16 * 9 // 4
    assert after["enc.q.weight"].count_nonzero() == 64 * 128
    run(capsys, "m.pt", "p.pt", "--keep", 1, "--group", 4, "--include", "embed", "--force")
    after = torch.load(folder / "p.pt", weights_only=True)
    assert (after["embed.weight"].reshape(100, 16, 4) != 0).sum(2).unique().tolist() == [1]


@pytest.mark.parametrize("data", ["x.pt", "x.npy", "x.safetensors"])
def test_a_model_by_wanda(folder: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    report = json.loads(
        run(capsys, "cli_models:small", "p.safetensors", "--criterion", "wanda", "--data", data, "--json")
    )
    x = torch.load(folder / "x.pt", weights_only=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    prune.prune_(model, "2:4", None, "wanda", data=[x], keep_mask=False)
    after = load_file(folder / "p.safetensors")
    assert torch.equal(after["0.weight"], model[0].weight)
    assert report["before"]["multiply_adds"] == 32 * (32 * 64 + 64 * 8)


def test_other_ways_to_prune_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pruned(*options: object) -> dict[str, Tensor]:
        run(capsys, "cli_models:small", "p.safetensors", "--data", "x.pt", "--force", *options)
        return load_file(folder / "p.safetensors")

    updated = pruned("--criterion", "sparsegpt")
    kept = updated["0.weight"] != 0
    torch.manual_seed(0)
    dense = nn.Linear(32, 64).weight.detach()
    assert analyse(updated["0.weight"]).sp24_orders
    assert not torch.equal(updated["0.weight"][kept], dense[kept])  # the survivors were updated
    assert pruned("--criterion", "snip", "--loss", "cli_models:loss", "--pattern", "global", "--sparsity", 0.75)
    smaller = pruned("--pattern", "channels", "--sparsity", 0.5)
    assert smaller["0.weight"].shape == (32, 32)
    assert smaller["2.weight"].shape == (8, 32)
    save_file(smaller, folder / "w.safetensors")


def test_weights_and_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {k: v + 1 for k, v in nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).state_dict().items()}
    save_file(state, folder / "w.safetensors")
    options = ("--weights", "w.safetensors", "--data", "x.pt", "--time", "--pattern", "unstructured", "--sparsity", 0.9)
    report: dict[str, Any] = json.loads(run(capsys, "cli_models:small", "p.pt", *options, "--json"))
    assert report["speed"]["dense"]["ms"] > 0
    assert report["speed"]["theoretical_speedup"] == pytest.approx(10, rel=0.02)
    after = torch.load(folder / "p.pt", weights_only=True)
    on = after["0.weight"] != 0
    assert torch.equal(after["0.weight"][on], state["0.weight"][on])
    assert "x in theory" in run(capsys, "cli_models:small", "p.pt", *options, "--force")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("missing.pt p.pt", "there is no such file"),
        ("m.pt m.safetensors", "exists already"),
        ("m.pt nowhere/p.pt", "there is no directory"),
        ("m.pt p.pt --criterion wanda", "no model to run"),
        ("m.pt p.pt --pattern channels --sparsity 0.5", "followed through a model"),
        ("m.pt p.pt --pattern 1:4", "pattern must be one of"),
        ("m.pt p.pt --keep 1", "belong together"),
        ("m.pt p.pt --pattern unstructured", "needs a sparsity"),
        ("m.pt p.pt --min-keep 0.1", "--min-keep is for"),
        ("m.pt p.pt --include (", "regular expression"),
        ("cli_models:small p.pt --criterion wanda", "needs --data"),
        ("cli_models:small p.pt --criterion sparsegpt", "needs --data"),
        ("cli_models:small p.pt --criterion snip --data x.pt", "needs --loss"),
        ("cli_models:small p.pt --time", "--time needs --data"),
        ("cli_models:absent p.pt", "has no absent"),
        ("cli_models:nothing p.pt", "must return an nn.Module"),
        ("no_such_module:x p.pt", "No module named"),
        ("cli_models:small p.pt --data m.pt --batch 0", "--batch"),
    ],
)
def test_wrong_calls(folder: Path, capsys: pytest.CaptureFixture[str], args: str, said: str) -> None:
    assert said in run(capsys, *args.split(), code=2)
