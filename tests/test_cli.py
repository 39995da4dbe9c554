"""The command line, through its main(); what only a process shows, through python -m sparsekern."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_patterns import pruned_24
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import _ext, checkpoint, dispatch
from sparsekern.cli import main
from sparsekern.commands import bench, info
from sparsekern.formats import FORMATS
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.patterns import analyse
from sparsekern.testing import Timing, random_weight


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    """stdout of a command that must end with this exit code."""
    assert main([str(arg) for arg in args]) == code
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    return json.loads(run(capsys, *args, "--json"))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A weight of every kind."""
    near = pruned_24((64, 128), "k")
    near[3, 4:7] = 1.0
    negative = pruned_24((64, 64), "k")
    negative[0][negative[0] == 0] = -0.0
    return {
        "enc.q.weight": pruned_24((64, 128), "k"),
        "enc.q.bias": torch.ones(64),
        "enc.near.weight": near,
        "enc.block.weight": random_weight("bsr", 128, 128, density=0.25, block=32),
        "enc.csr.weight": random_weight("csr", 128, 128, density=0.1),
        "enc.bitmap.weight": random_weight("csr", 128, 128, dtype=torch.bfloat16, density=0.5),
        "enc.dense[0].weight": random_weight("csr", 128, 128, density=1.0),
        "enc.conv1d.weight": pruned_24((64, 128), "n"),
        "conv_rsc.weight": pruned_24((32, 16, 3, 3), "rsc"),
        "conv_crs.weight": pruned_24((32, 16, 3, 3), "crs"),
        "depthwise.weight": torch.randn(32, 1, 3, 3, generator=torch.Generator().manual_seed(0)),
        "embed.weight": torch.randn(100, 64, generator=torch.Generator().manual_seed(0)),
        "negative.weight": negative,
        "steps": torch.tensor(3),
    }


@pytest.fixture(scope="module")
def files(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a safetensors file, a torch file, a training checkpoint and two shards."""
    folder = tmp_path_factory.mktemp("files")
    save_file(state, folder / "m.safetensors", {"format": "pt", "author": "me"})
    torch.save(state, folder / "m.pt")
    torch.save({"state_dict": state, "epoch": 3}, folder / "m.ckpt")
    shards = folder / "shards"
    shards.mkdir()
    names = list(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, shards / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (shards / "config.json").write_text('{"architectures": ["Mine"]}')
    return folder


# What no reader was ever written for.
MARLIN = {f"e.{name}": torch.zeros(1) for name in ("weight_packed", "scale_packed", "meta")}
EVERY_FILE = ("m.safetensors", "m.pt", "m.ckpt", "shards")


# info -------------------------------------------------------------------------------------------------------


def test_info_says_what_the_dispatcher_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = run_json(capsys, "info")
    assert said["machine"]["torch"] == torch.__version__
    assert said["machine"]["threads"] == torch.get_num_threads()
    if _ext.why_not_host() is None:
        assert said["machine"]["instruction_set"] == _ext.host().active_isa()
    rows = {(row["format"], row["backend"]): row for row in said["backends"] if row["device"] == "cpu"}
    assert {row["backend"] for row in said["backends"]} | set(said["absent"]) == set(dispatch.BACKENDS)
    assert set(rows) == {(f, b) for f in FORMATS for b in dispatch.backends(f, "cpu")}
    for format in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            layout = info._sample(format, dtype, "cpu")
            assert layout is not None
            x = torch.zeros(16, 64, dtype=dtype)
            for op in ("mm", "mm_t", "sddmm"):
                for backend, reason in dispatch.explain(op, layout, x).items():
                    if (format, backend) in rows:
                        runs = rows[format, backend]["runs"].get(op, [])
                        name = str(dtype).removeprefix("torch.")
                        assert (name in runs) == (reason is None), (format, backend, op)


def test_info_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "info")
    for word in (
        "processor",
        "threads",
        "last level cache",
        "host",
        "ref",
        "bitmap",
        "sddmm",
        torch.__version__,
    ):
        assert word in text


# inspect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_FILE)
def test_inspect_finds_every_pattern(capsys: pytest.CaptureFixture[str], files: Path, name: str) -> None:
    said = run_json(capsys, "inspect", files / name)
    found = {w["name"]: w for w in said["weights"]}
    assert said["other_tensors"] == 2
    exact = {n: [o for o, facts in w["orders"].items() if facts["is_24"]] for n, w in found.items()}
    assert {n: orders for n, orders in exact.items() if orders} == {
        "enc.q.weight": ["k"],
        "negative.weight": ["k"],
        "enc.conv1d.weight": ["n"],
        "conv_rsc.weight": ["rsc"],
        "conv_crs.weight": ["crs"],
    }
    suits = {n: (w["suggestion"]["format"], w["suggestion"]["order"]) for n, w in found.items()}
    assert suits == {
        "enc.q.weight": ("sp24", "k"),
        "enc.near.weight": ("bitmap", "k"),
        "enc.block.weight": ("bsr", "k"),
        "enc.csr.weight": ("csr", "k"),
        "enc.bitmap.weight": ("bitmap", "k"),
        "enc.dense[0].weight": (None, "k"),
        "enc.conv1d.weight": ("bitmap", "k"),
        "conv_rsc.weight": ("sp24", "rsc"),
        "conv_crs.weight": ("sp24", "crs"),
        "depthwise.weight": (None, "crs"),
        "embed.weight": (None, "k"),
        "negative.weight": ("sp24", "k"),
    }
    assert found["enc.block.weight"]["suggestion"]["block"] == 32
    blocks = found["enc.block.weight"]["orders"]["k"]["blocks"]
    assert blocks["16"] == blocks["32"] < blocks["64"]
    for n, w in found.items():
        assert (w["estimate"] is None) == (suits[n][0] is None)


def test_inspect_explains_near_misses(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    notes = {w["name"]: " ".join(w["notes"]) for w in run_json(capsys, "inspect", files / "m.pt")["weights"]}
    assert "nearly 2:4 along k: 1 of 2048 groups" in notes["enc.near.weight"]
    assert "row 3, group 1 (columns 4..7): [1, 1, 1, " in notes["enc.near.weight"]
    assert "along dim 0 only" in notes["enc.conv1d.weight"]
    assert "2:4 along rsc and not along crs" in notes["conv_rsc.weight"]
    assert "2:4 along crs and not along rsc" in notes["conv_crs.weight"]
    assert "32 weights are -0.0" in notes["negative.weight"]
    assert "of 128 output rows are zero" in notes["enc.block.weight"]
    assert notes["enc.dense[0].weight"] == notes["enc.csr.weight"] == ""


def test_inspect_as_a_table(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    text = run(capsys, "inspect", files / "m.safetensors", "--exclude", "conv|embed", "--device", "cpu-avx512")
    assert "enc.dense[0].weight" in text  # not taken for markup
    assert "yes (k)" in text
    assert "1 of 2048 groups (k)" in text
    assert "sp24, 53%" in text
    assert "estimate by a roofline for cpu-avx512" in text
    assert "conv_rsc" not in text


def test_inspect_reads_sparse_files_and_says_what_it_cannot(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path
) -> None:
    run(capsys, "convert", files / "m.pt", tmp_path / "s.safetensors")
    before = {w["name"]: w for w in run_json(capsys, "inspect", files / "m.pt")["weights"]}
    for w in run_json(capsys, "inspect", tmp_path / "s.safetensors")["weights"]:
        old = before[w["name"]]
        assert w["orders"] == old["orders"]
        assert w["density"] == old["density"]
        wish = old["suggestion"]["format"]
        assert w["stored_as"] == (wish or "dense")
        assert w["bytes"] <= old["bytes"]
    torch.save(MARLIN, tmp_path / "marlin.pt")
    assert "cannot be read: a GPU's register order" in run(capsys, "inspect", tmp_path / "marlin.pt")


# convert ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("back", ["dense.safetensors", "dense.pt", "dense"])
def test_there_and_back_is_exact(
    capsys: pytest.CaptureFixture[str],
    files: Path,
    state: dict[str, Tensor],
    tmp_path: Path,
    name: str,
    back: str,
) -> None:
    said = run_json(capsys, "convert", files / name, tmp_path / "sparse.safetensors")
    stored = {row["name"]: row["stored"] for row in said["weights"]}
    assert stored["enc.q.weight"] == stored["conv_rsc.weight"] == stored["negative.weight"] == "sp24"
    assert stored["enc.block.weight"] == "bsr 32x32"
    assert stored["enc.csr.weight"] == "csr"
    assert stored["enc.bitmap.weight"] == stored["enc.near.weight"] == "bitmap"
    assert stored["embed.weight"] == stored["depthwise.weight"] == "dense"
    size = (tmp_path / "sparse.safetensors").stat().st_size
    assert sum(row["after"] for row in said["weights"]) + said["other_bytes"] <= size
    assert size < 0.6 * sum(t.nbytes for t in state.values())
    run(capsys, "convert", tmp_path / "sparse.safetensors", tmp_path / back, "--to", "dense")
    restored = checkpoint.load(tmp_path / back)
    assert set(restored) == set(state)
    for key, t in state.items():
        assert torch.equal(restored[key], t), key
        assert restored[key].dtype == t.dtype


def test_a_converted_file_runs_in_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 16), nn.ReLU(), nn.Linear(16, 4))
    model[0].weight.data.copy_(pruned_24((8, 16, 3, 3), "rsc"))
    model[2].weight.data.copy_(random_weight("csr", 16, 72, density=0.1))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    x = torch.randn(2, 16, 5, 5)
    expected = model(x)
    run(capsys, "convert", tmp_path / "m.pt", tmp_path / "s.safetensors")
    filled = checkpoint.load(tmp_path / "s.safetensors", model)
    assert [type(m) for m in filled if not isinstance(m, (nn.Flatten, nn.ReLU))] == [
        SparseConv2d,
        SparseLinear,
        nn.Linear,
    ]
    assert filled[0].order == "rsc"
    torch.testing.assert_close(filled(x), expected)


def test_pruning_is_asked_for_and_reported(
    capsys: pytest.CaptureFixture[str], files: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    said = run_json(capsys, "convert", files / "m.pt", tmp_path / "p.safetensors", "--prune")
    rows = {row["name"]: row for row in said["weights"]}
    assert rows["enc.dense[0].weight"]["stored"] == "sp24"
    assert rows["enc.dense[0].weight"]["reason"] == "pruned to 2:4 by magnitude"
    assert "--include overrides" in rows["embed.weight"]["reason"]
    assert "K = 9 is too small" in rows["depthwise.weight"]["reason"]
    assert rows["enc.near.weight"]["stored"] == "bitmap"  # fits a format already: nothing is lost
    read = checkpoint.load(tmp_path / "p.safetensors")
    dense = state["enc.dense[0].weight"]
    kept = read["enc.dense[0].weight"].to_dense()
    assert torch.equal(kept, sk.to_sparse_semi_structured(dense, prune=True).to_dense())
    assert torch.equal(read["embed.weight"], state["embed.weight"])
    options = ("--prune", "--format", "sp24", "--include", "embed|near", "--order", "crs")
    said = run_json(capsys, "convert", files / "m.pt", tmp_path / "q.safetensors", *options)
    rows = {row["name"]: row for row in said["weights"]}
    assert rows["embed.weight"]["stored"] == rows["enc.near.weight"]["stored"] == "sp24"
    assert rows["enc.q.weight"]["stored"] == "dense"
    assert rows["enc.q.weight"]["reason"] == "left out by --include or --exclude"


@pytest.mark.parametrize("order", ["crs", "rsc"])
def test_convolutions_are_pruned_in_the_order_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, order: str
) -> None:
    torch.save({"c.weight": torch.randn(8, 8, 3, 3)}, tmp_path / "m.pt")
    run(capsys, "convert", tmp_path / "m.pt", tmp_path / "s.safetensors", "--prune", "--order", order)
    weight = checkpoint.load(tmp_path / "s.safetensors").weights["c.weight"]
    assert weight.order == order
    assert analyse(weight.dense()).sp24_orders == (order,)


@pytest.mark.parametrize(("format", "stored"), [("csr", "csr"), ("bitmap", "bitmap"), ("bsr", "bsr 16x16")])
def test_a_format_asked_for(
    capsys: pytest.CaptureFixture[str],
    files: Path,
    state: dict[str, Tensor],
    tmp_path: Path,
    format: str,
    stored: str,
) -> None:
    args = ("convert", files / "m.pt", tmp_path / "s.safetensors", "--format", format, "--block", 16)
    rows = {row["name"]: row for row in run_json(capsys, *args)["weights"]}
    assert {row["stored"] for row in rows.values()} == {stored, "dense"}
    assert rows["enc.q.weight"]["stored"] == stored
    assert rows["embed.weight"]["reason"] == "0.0% zeros, fewer than 40%"
    for name, t in checkpoint.load(tmp_path / "s.safetensors").dense_state_dict().items():
        assert torch.equal(t, state[name]), name
    again = ("convert", tmp_path / "s.safetensors", tmp_path / "t.safetensors", "--format", "csr")
    rows = {row["name"]: row for row in run_json(capsys, *again)["weights"]}
    assert rows["enc.q.weight"]["stored"] == "csr"


def test_sp24_asked_for_says_why_not(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    said = run_json(capsys, "convert", files / "m.pt", tmp_path / "s.safetensors", "--format", "sp24")
    rows = {row["name"]: row for row in said["weights"]}
    assert rows["enc.near.weight"]["stored"] == "dense"
    assert "not 2:4: 0.05% of the groups along k, first row 3, group 1" in rows["enc.near.weight"]["reason"]
    assert rows["enc.conv1d.weight"]["stored"] == "sp24"
    assert rows["enc.conv1d.weight"]["order"] == "n"


def test_compressed_tensors_there_and_back(
    capsys: pytest.CaptureFixture[str], files: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    for format, key in (("auto", "compressed"), ("bitmap", "row_offsets")):
        out = tmp_path / format
        run(capsys, "convert", files / "shards", out, "--to", "compressed-tensors", "--format", format)
        written = load_file(out / "model.safetensors")
        assert f"enc.q.{key}" in written
        assert "enc.q.weight" not in written
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["Mine"]
        sparsity = config["quantization_config"]["sparsity_config"]
        assert sparsity["format"] == ("sparse-24-bitmask" if format == "auto" else "sparse-bitmask")
        assert {"embed", "conv_rsc"} <= set(sparsity["ignore"])
        assert "enc.q" not in sparsity["ignore"]
        run(capsys, "convert", out, tmp_path / f"{format}.pt", "--to", "dense")
        restored = torch.load(tmp_path / f"{format}.pt", weights_only=True)
        assert set(restored) == set(state)
        for name, t in state.items():
            assert torch.equal(restored[name], t), name


def test_shards_metadata_and_ties_survive(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    said = run_json(capsys, "convert", files / "m.safetensors", tmp_path / "out", "--shard-size", 5e-5)
    assert len(said["files"]) > 3
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    w = sk.to_csr(random_weight("csr", 16, 16, density=0.2))
    checkpoint.save({"a.weight": w, "b.weight": w}, tmp_path / "tied.safetensors", {"author": "me"})
    run(capsys, "convert", tmp_path / "tied.safetensors", tmp_path / "again.safetensors", "--format", "bitmap")
    read = checkpoint.load(tmp_path / "again.safetensors")
    assert read["a.weight"] is read["b.weight"]
    assert checkpoint.open_tensors(tmp_path / "again.safetensors").metadata["author"] == "me"
    run(capsys, "convert", tmp_path / "again.safetensors", tmp_path / "dense.safetensors", "--to", "dense")
    dense = load_file(tmp_path / "dense.safetensors")
    assert torch.equal(dense["b.weight"], w.to_dense())


def test_tied_weights_of_a_torch_file_stay_tied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "out": nn.Linear(32, 64), "fc": nn.Linear(32, 32)})
    model["out"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "m.pt")
    said = run_json(capsys, "convert", tmp_path / "m.pt", tmp_path / "s.safetensors", "--prune")
    rows = {row["name"]: row for row in said["weights"]}
    assert set(rows) == {"embed.weight", "fc.weight"}
    assert rows["embed.weight"]["stored"] == "dense"  # one of its names is an embedding's
    assert rows["fc.weight"]["stored"] == "sp24"
    assert "out.weight" not in load_file(tmp_path / "s.safetensors")
    read = checkpoint.load(tmp_path / "s.safetensors")
    assert read["out.weight"] is read["embed.weight"]
    assert torch.equal(read["out.weight"], model["out"].weight)
    filled = checkpoint.load(tmp_path / "s.safetensors", model)
    assert filled["out"].weight is filled["embed"].weight
    assert isinstance(filled["fc"], SparseLinear)


def test_convert_as_a_table(capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path) -> None:
    text = run(capsys, "convert", files / "m.pt", tmp_path / "s.safetensors")
    assert "9 of 12 weights are sparse" in text
    assert "sp24 (rsc)" in text
    assert "32 weights were -0.0" in text
    assert str(tmp_path / "s.safetensors") in text.replace("\n", "")


# bench ------------------------------------------------------------------------------------------------------

QUICK = ("--shape", "64x96", "--repeats", "2", "--seconds", "0.1")


def test_bench_measures_every_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    text = run(capsys, "bench", *QUICK, "--tokens", "0,1,5", "--dtype", "float32,bfloat16", "--json", out)
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert len(rows) == 3 * 2 * len(FORMATS)
    assert {row["format"] for row in rows} == set(FORMATS)
    for row in rows:
        assert row["ms"]["sparsekern"]["median"] > 0
        assert row["ms"]["dense"]["p20"] <= row["ms"]["dense"]["median"] <= row["ms"]["dense"]["p80"]
        expected = row["ms"]["dense"]["median"] / row["ms"]["sparsekern"]["median"]
        assert row["ratio"]["dense"] == pytest.approx(expected)
    csr = [r for r in rows if r["format"] == "csr" and r["dtype"] == "float32" and r["tokens"]]
    assert all("torch csr" in r["ms"] for r in csr)
    assert "torch 2:4: RuntimeError" in text or torch.cuda.is_available()
    assert result["machine"]["threads"] == torch.get_num_threads()


def test_bench_says_when_the_machine_is_busy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for spread, said in ((1.9, False), (2.1, True)):
        time = Timing(2e-3, 1e-3, spread * 1e-3, 9)
        monkeypatch.setattr(bench, "measure", lambda variants, *_, t=time, **__: dict.fromkeys(variants, t))
        text = run(capsys, "bench", *QUICK, "--tokens", "1,2", "--format", "csr")
        assert ("2 of 2 rows spread by more than 2x" in text) is said


def test_bench_takes_its_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, before = tmp_path / "b.json", torch.get_num_threads()
    what = (
        "--format",
        "bsr,csr",
        "--sparsity",
        "0.5,0.9",
        "--block",
        "8,16",
        "--tokens",
        "2",
        "--shape",
        "32x32",
    )
    run(capsys, "bench", *QUICK, *what, "--backend", "ref", "--threads", "1", "--json", out)
    result = json.loads(out.read_text())
    cases = [(r["n"], r["format"], r["block"], r["sparsity"]) for r in result["rows"]]
    expected = [("bsr", b, s) for s in (0.5, 0.9) for b in (8, 16)] + [("csr", None, s) for s in (0.5, 0.9)]
    assert cases == [(n, *case) for n in (64, 32) for case in expected]
    assert {r["backend"] for r in result["rows"]} == {"ref"}
    assert result["machine"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_bench_times_nothing_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, right = tmp_path / "b.json", bench.functional.linear
    monkeypatch.setattr(bench.functional, "linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    text = run(capsys, "bench", *QUICK, "--tokens", "5", "--format", "csr", "--json", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert "ms" not in row
    assert row["failures"]["sparsekern"].startswith("wrong result: relative error 0.001")
    assert "sparsekern: wrong result" in text


# Wrong use --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["inspect"], "the following arguments are required: file"),
        (["inspect", "{tmp}/nothing.pt"], "nothing.pt: no such file or directory"),
        (["inspect", "{tmp}"], "a directory with neither"),
        (["inspect", "{files}/m.pt", "--include", "("], "'(' is not a regular expression"),
        (["inspect", "{files}/m.pt", "--device", "abacus"], "device must be"),
        (["convert", "{files}/m.pt", "{tmp}/none/x.safetensors"], "there is no directory"),
        (["convert", "{files}/m.pt", "{files}/m.safetensors"], "exists already; --force overwrites it"),
        (["convert", "{files}/m.pt", "{tmp}/x.pt"], "is written to .safetensors files and directories only"),
        (["convert", "{files}/m.pt", "{tmp}/x.safetensors", "--format", "zip"], "invalid choice: 'zip'"),
        (
            ["convert", "{files}/m.pt", "{tmp}/x.safetensors", "--to", "dense", "--prune"],
            "not with --to dense",
        ),
        (["convert", "{files}/m.pt", "{tmp}/x.safetensors", "--block", "0"], "--block must be at least 1"),
        (["convert", "{files}/m.pt", "{tmp}/x.safetensors", "--min-sparsity", "2"], "must be a share"),
        (
            ["convert", "{files}/m.pt", "{tmp}/x", "--to", "compressed-tensors", "--format", "csr"],
            "has no csr",
        ),
        (["convert", "{files}/shards", "{files}/shards", "--force"], "cannot be written over"),
        (["bench", "--shape", "12"], "expected NxK such as 4096x4096, got '12'"),
        (["bench", "--shape", "0x3"], "expected NxK"),
        (["bench", "--tokens", "1,two"], "expected numbers separated by commas"),
        (["bench", "--tokens", "-1"], "expected"),
        (["bench", "--dtype", "float3"], "expected names of float32, bfloat16, float16, got 'float3'"),
        (["bench", "--format", "sp25"], "expected names of sp24, bsr, csr, bitmap, got 'sp25'"),
        (["bench", "--sparsity", "1.5"], "expected numbers from 0 to 1"),
        (["bench", "--threads", "0"], "--threads must be at least 1"),
        (["bench", "--backend", "cuda", "--shape", "8x8"], "backend 'cuda' cannot run"),
        (["bench", "--json", "{tmp}/none/x.json"], "there is no such directory"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    given = [arg.format(tmp=tmp_path, files=files) for arg in args]
    try:
        code: Any = main(given)
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sparsekern")
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_leaves_nothing_behind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)} | MARLIN, tmp_path / "m.pt")
    for out in ("o.safetensors", "o"):
        args = ("convert", tmp_path / "m.pt", tmp_path / out, "--shard-size", 1e-5)
        assert main([str(arg) for arg in args]) == 2
        assert "marlin-24" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_without_safetensors(
    capsys: pytest.CaptureFixture[str], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["inspect", str(files / "m.safetensors")]) == 2
    assert "pip install 'sparsekern[checkpoint]'" in capsys.readouterr().err
    assert "12 weights" in run(capsys, "inspect", files / "m.pt")
    run(capsys, "convert", files / "m.pt", tmp_path / "d.pt", "--to", "dense")


@pytest.mark.parametrize("command", ["info", "inspect", "convert", "bench"])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m sparsekern {command}" in capsys.readouterr().out


def process(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    root = Path(sk.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-m", "sparsekern", *args], capture_output=True, text=True, env=env, **more)


def test_the_process(files: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes((files / "m.safetensors").read_bytes()[:1000])
    bad = process("inspect", str(tmp_path / "bad.safetensors"))
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert "bad.safetensors: not a readable safetensors file" in bad.stderr
    good = process("inspect", str(files / "m.safetensors"), "--json")
    assert good.returncode == 0
    assert len(json.loads(good.stdout)["weights"]) == 12


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparsekern {sk.__version__}\n"


def test_a_closed_pipe_is_no_error(files: Path) -> None:
    root = Path(sk.__file__).parent.parent
    inspect = shlex.join([sys.executable, "-m", "sparsekern", "inspect", str(files / "m.safetensors")])
    command = f"{inspect} | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == 0
