"""Checkpoints: round trips, the forms of others, hostile files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from test_patterns import pruned_24
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparsekern as sk
from sparsekern import checkpoint
from sparsekern.checkpoint import compressed_tensors
from sparsekern.nn import SparseConv2d, SparseLinear, dense_state_dict
from sparsekern.sp24.pack import prune_mask
from sparsekern.tensor import SparseTensor
from sparsekern.testing import random_scale, random_weight

FORMATS = ("sp24", "bsr", "csr", "bitmap")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_linear(format: str, n: int = 24, k: int = 40, dtype: torch.dtype = torch.float32) -> SparseLinear:
    dense = nn.Linear(k, n).to(dtype)
    dense.weight.data.copy_(random_weight(format, n, k, dtype=dtype, block=8, density=0.4, seed=len(format)))
    return SparseLinear.from_dense(dense, format=format, block_size=8)


def sparse_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Every format, a convolution in each K order, a norm, a dense layer."""
    convs = []
    for order in ("crs", "rsc"):
        conv = nn.Conv2d(8, 8, 3).to(dtype)
        conv.weight.data.copy_(pruned_24((8, 8, 3, 3), order).to(dtype))
        convs.append(SparseConv2d.from_dense(conv, format="sp24", order=order))
    linears = [sparse_linear(format, 40, 40, dtype) for format in FORMATS]
    return nn.Sequential(*convs, *linears, nn.LayerNorm(40).to(dtype), nn.Linear(40, 3).to(dtype))


def dense_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    linears = [nn.Linear(40, 40) for _ in FORMATS]
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), *linears, nn.LayerNorm(40), nn.Linear(40, 3))
    return model.to(dtype)


def assert_same_dense(a: nn.Module, b: nn.Module) -> None:
    one, two = dense_state_dict(a), dense_state_dict(b)
    names = {name for name in one if "order_rsc" not in name}
    assert names == {name for name in two if "order_rsc" not in name}
    for name in names:
        assert torch.equal(one[name], two[name]), name
        assert one[name].dtype == two[name].dtype


# Our own form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_read_with_no_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = sparse_model(dtype)
    checkpoint.save(model, tmp_path / "m.safetensors", {"note": "mine"})
    read = checkpoint.load(tmp_path / "m.safetensors")
    expected = {k: v for k, v in dense_state_dict(model).items() if "order_rsc" not in k}
    assert set(read) == set(expected)
    assert [read[f"{i}.weight"].format for i in range(6)] == ["sp24", "sp24", *FORMATS]
    assert read.weights["1.weight"].order == "rsc"
    assert read.weights["1.weight"].shape == (8, 8, 3, 3)
    for name, dense in read.dense_state_dict().items():
        assert torch.equal(dense, expected[name]), name
        assert dense.dtype == expected[name].dtype
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["note"] == "mine"


@pytest.mark.parametrize("make", [dense_model, sparse_model])
def test_a_file_fills_a_model_dense_or_sparse(tmp_path: Path, make: Any) -> None:
    model = sparse_model()
    checkpoint.save(model, tmp_path / "m.safetensors")
    filled = make()
    for p in filled.parameters():
        p.data.zero_()
    assert checkpoint.load(tmp_path / "m.safetensors", filled) is filled
    assert_same_dense(model, filled)
    assert [type(m) for m in filled] == [type(m) for m in model]
    assert [m.format for m in filled[:6]] == ["sp24", "sp24", *FORMATS]
    x, y = torch.randn(2, 8, 9, 9), torch.randn(5, 40)
    assert torch.equal(filled[:2](x), model[:2](x))
    assert torch.equal(filled[2:](y), model[2:](y))


def test_the_file_is_the_state_dict_of_the_converted_model(tmp_path: Path) -> None:
    model, other = sparse_model(), sparse_model()
    checkpoint.save(model, tmp_path / "m.safetensors")
    for p in other.parameters():
        p.data.zero_()
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert_same_dense(model, other)


def test_a_filled_model_keeps_what_it_was(tmp_path: Path) -> None:
    checkpoint.save(sparse_model(), tmp_path / "m.safetensors")
    model = dense_model().eval()
    model[3].weight.requires_grad_(False)
    bias = model[2].bias
    model.to(torch.bfloat16)
    checkpoint.load(tmp_path / "m.safetensors", model)
    assert not model.training
    assert not any(m.training for m in model.modules())
    assert model[2].values.dtype == torch.bfloat16  # a model's type wins, as in load_state_dict
    assert model[2].bias is bias
    assert not model[3].values.requires_grad
    assert model[2].values.requires_grad


def test_a_sparse_weight_fills_a_module_of_another_format_and_an_embedding(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, fc: nn.Module) -> None:
            super().__init__()
            self.fc, self.table = fc, nn.Embedding(24, 40)

    source = sparse_linear("csr")
    state = {"fc.weight": source.weight, "fc.bias": source.bias, "table.weight": source.weight}
    checkpoint.save(state, tmp_path / "m.safetensors")
    model = checkpoint.load(tmp_path / "m.safetensors", Model(sparse_linear("bitmap")))
    assert model.fc.format == "bitmap"
    assert torch.equal(model.fc.dense_weight(), source.dense_weight())
    assert type(model.table) is nn.Embedding
    assert torch.equal(model.table.weight, source.dense_weight())
    before = {k: v.clone() for k, v in Model(sparse_linear("sp24")).state_dict().items()}
    refusing = Model(sparse_linear("sp24"))
    refusing.load_state_dict(before)
    with pytest.raises(ValueError, match=r"'fc.weight' does not fit the model's sp24 module: .* not 2:4: row"):
        checkpoint.load(tmp_path / "m.safetensors", refusing)
    for name, t in refusing.state_dict().items():
        assert torch.equal(t, before[name]), name  # nothing was half done


def test_tensors_as_weights_transposed_and_tied(tmp_path: Path) -> None:
    w = sk.to_csr(random_weight("csr", 12, 20))
    shared = torch.randn(4, 3)
    state = {"a": w, "b": w.t(), "again": w, "x": shared, "y": shared, "view": shared.t()[1:]}
    checkpoint.save(state, tmp_path / "m.safetensors")
    read = checkpoint.load(tmp_path / "m.safetensors")
    assert torch.equal(read["a"].to_dense(), w.to_dense())
    assert read.weights["b"].order == "n"
    assert torch.equal(read["b"].to_dense(), w.to_dense().t())
    assert torch.equal(read.weights["b"].dense(), w.to_dense().t())
    assert read["again"] is read["a"]
    assert read["y"] is read["x"]
    assert torch.equal(read["view"], shared.t()[1:])
    names = set(load_file(tmp_path / "m.safetensors"))
    assert "y" not in names
    assert not any(name.startswith("again") for name in names)


def test_a_shared_module_is_stored_and_replaced_once(tmp_path: Path) -> None:
    layer = sparse_linear("bitmap", 40, 40)
    checkpoint.save(nn.Sequential(layer, nn.ReLU(), layer), tmp_path / "m.safetensors")
    assert set(load_file(tmp_path / "m.safetensors")) == {"0.values", "0.bits", "0.offsets", "0.bias"}
    dense = nn.Linear(40, 40)
    model = checkpoint.load(tmp_path / "m.safetensors", nn.Sequential(dense, nn.ReLU(), dense))
    assert model[0] is model[2]
    assert torch.equal(model[0].dense_weight(), layer.dense_weight())


def test_int8_weights(tmp_path: Path) -> None:
    w, scale = random_weight("sp24", 8, 24, dtype=torch.int8), random_scale(8)
    packed = sk.sp24.pack(w, scale=scale)
    checkpoint.save({"fc.weight": SparseTensor(packed)}, tmp_path / "m.safetensors")
    read = checkpoint.load(tmp_path / "m.safetensors")
    assert read["fc.weight"].dtype == torch.int8
    assert torch.equal(read["fc.weight"].to_dense(), w.float() * scale[:, None])
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(24, 8, bias=False))
    checkpoint.load(tmp_path / "m.safetensors", model)
    assert model.fc.values.dtype == torch.int8
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x), x @ (w.float() * scale[:, None]).t())


def test_a_meta_model_takes_the_file(tmp_path: Path) -> None:
    source = sparse_model()
    checkpoint.save(source, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = dense_model()
    checkpoint.load(tmp_path / "m.safetensors", model)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert_same_dense(source, model)


def test_shards(tmp_path: Path) -> None:
    model = sparse_model()
    writer = checkpoint.Writer(tmp_path / "out", shard_bytes=6000)
    for weight in checkpoint.Checkpoint({w.name: w for w in _weights(model, tmp_path)}).weights.values():
        writer.add(weight)
    files = writer.close()
    assert len(files) > 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in files)
    filled = checkpoint.load(tmp_path / "out", dense_model())
    assert_same_dense(model, filled)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    assert_same_dense(model, checkpoint.load(tmp_path / "out", dense_model()))


def _weights(model: nn.Module, path: Path) -> list[checkpoint.Weight]:
    checkpoint.save(model, path / "whole.safetensors")
    return list(checkpoint.read_weights(path / "whole.safetensors"))


def test_what_is_missing_or_too_much(tmp_path: Path) -> None:
    checkpoint.save(nn.Sequential(sparse_linear("csr")), tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match=r"missing \['1.weight', '1.bias'\]"):
        checkpoint.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 1)))
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 1))
    assert isinstance(checkpoint.load(tmp_path / "m.safetensors", model, strict=False)[0], SparseLinear)
    with pytest.raises(RuntimeError, match="unexpected"):
        checkpoint.load(tmp_path / "m.safetensors", nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(40, 25))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(24, 40\) in the file, \(25, 40\) in the model"):
        checkpoint.load(tmp_path / "m.safetensors", model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="'n' is a int"):
        checkpoint.save({"n": 3}, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_broken_state_dict_changes_nothing(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(40, 40), sparse_linear("csr"))
    state = source.state_dict()
    for key, broken, message in (
        ("1.col", state["1.col"] + 40, r"1: csr layout of shape \(24, 40\): col\[0\]"),
        ("1.values", state["1.values"][1:], "1: csr layout"),
        ("1.bias", torch.zeros(3), r"'1.bias' has shape \(3,\) in the file, \(24,\) in the model"),
        ("0.bias", torch.zeros(3), r"'0.bias' has shape \(3,\) in the file, \(40,\) in the model"),
    ):
        torch.save(state | {key: broken}, tmp_path / "m.pt")
        model = nn.Sequential(nn.Linear(40, 40), sparse_linear("csr"))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / "m.pt", model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# What needs nothing of ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_plain_state_dicts(tmp_path: Path, form: str) -> None:
    model, other = sparse_model(), sparse_model()
    for p in other.parameters():
        p.data.zero_()
    if form == "torch":
        torch.save(model.state_dict(), tmp_path / "m.pt")
        other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    else:
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert_same_dense(model, other)
    for p in other.parameters():
        p.data.zero_()
    checkpoint.load(tmp_path / ("m.pt" if form == "torch" else "m.safetensors"), other)
    assert_same_dense(model, other)


def test_a_sparse_tensor_in_a_torch_file(tmp_path: Path) -> None:
    w = sk.to_sparse_semi_structured(random_weight("sp24", 16, 32))
    torch.save({"fc.weight": w, "fc.bias": torch.zeros(16)}, tmp_path / "m.pt")
    read = checkpoint.load(tmp_path / "m.pt")
    assert read["fc.weight"].format == "sp24"
    assert torch.equal(read["fc.weight"].to_dense(), w.to_dense())


# The forms of others ----------------------------------------------------------------------------------------


def bitmask(mask: Tensor) -> Tensor:
    """As compressed-tensors packs it: numpy, little order, per row."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def as_24(prefix: str, w: Tensor) -> dict[str, Tensor]:
    mask = prune_mask(w.float())
    return {
        f"{prefix}compressed": w[mask].reshape(w.shape[0], -1),
        f"{prefix}bitmask": bitmask(mask),
        f"{prefix}shape": torch.tensor(w.shape).reshape(-1, 1),
    }


def as_bitmask(prefix: str, w: Tensor) -> dict[str, Tensor]:
    mask = w != 0
    counts = mask.sum(-1)
    return {
        f"{prefix}compressed": w[mask],
        f"{prefix}bitmask": bitmask(mask),
        f"{prefix}shape": torch.tensor(w.shape),
        f"{prefix}row_offsets": torch.cumsum(counts, 0) - counts,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", ["fc.", "fc.weight."])
@pytest.mark.parametrize("k", [32, 20, 4])
def test_sparse_24_bitmask_is_read(tmp_path: Path, dtype: torch.dtype, spelling: str, k: int) -> None:
    w = random_weight("sp24", 12, k, dtype=dtype)  # two nonzeros in every group: only one way to store it
    save_file({**as_24(spelling, w), "fc.bias": torch.ones(12)}, tmp_path / "m.safetensors")
    packed = checkpoint.load(tmp_path / "m.safetensors")["fc.weight"].packed
    assert torch.equal(packed.metadata, sk.to_sparse_semi_structured(w).packed.metadata)
    w = random_weight("sp24", 12, k, dtype=dtype, density=0.4)
    save_file({**as_24(spelling, w), "fc.bias": torch.ones(12)}, tmp_path / "m.safetensors")
    read = checkpoint.load(tmp_path / "m.safetensors")
    assert set(read) == {"fc.weight", "fc.bias"}
    assert read["fc.weight"].format == "sp24"
    assert torch.equal(read["fc.weight"].to_dense(), w)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(k, 12).to(dtype))
    checkpoint.load(tmp_path / "m.safetensors", model)
    assert model.fc.format == "sp24"


@pytest.mark.parametrize("spelling", ["fc.", "fc.weight."])
@pytest.mark.parametrize("shape", [(12, 32), (7, 13), (9,)])
def test_sparse_bitmask_is_read(tmp_path: Path, spelling: str, shape: tuple[int, ...]) -> None:
    w = random_weight("csr", *((1, *shape)[-2:])).reshape(shape)
    save_file(as_bitmask(spelling, w), tmp_path / "m.safetensors")
    read = checkpoint.load(tmp_path / "m.safetensors")
    assert read["fc.weight"].to_dense().shape == shape
    assert torch.equal(read["fc.weight"].to_dense(), w)
    assert isinstance(read["fc.weight"], SparseTensor) == (len(shape) == 2)


def test_quantised_bitmasks(tmp_path: Path) -> None:
    w8, scale = random_weight("sp24", 8, 24, dtype=torch.int8), random_scale(8)
    fp8 = random_weight("sp24", 8, 24).to(torch.float8_e4m3fn)
    mask = prune_mask(fp8.float())
    packed8 = {
        "b.compressed": fp8.view(torch.uint8)[mask].reshape(8, 12).view(torch.float8_e4m3fn),
        "b.bitmask": bitmask(mask),
        "b.shape": torch.tensor([[8], [24]]),
        "b.weight_scale": torch.tensor([0.5]),
    }
    save_file({**as_24("a.", w8), "a.weight_scale": scale[:, None], **packed8}, tmp_path / "m.safetensors")
    read = checkpoint.load(tmp_path / "m.safetensors")
    assert set(read) == {"a.weight", "b.weight", "b.weight_scale"}
    assert torch.equal(read["a.weight"].to_dense(), w8.float() * scale[:, None])
    assert read["b.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(read["b.weight"].float(), fp8.float())


@pytest.mark.parametrize("format", [compressed_tensors.SP24, compressed_tensors.BITMASK])
@pytest.mark.parametrize("k", [32, 20])
def test_compressed_tensors_are_written_as_numpy_packs_them(tmp_path: Path, format: str, k: int) -> None:
    w = random_weight("sp24", 12, k, dtype=torch.bfloat16)
    weight = checkpoint.Weight("fc.weight", sk.to_sparse_semi_structured(w), "", (12, k))
    writer = checkpoint.Writer(tmp_path / "m.safetensors", "compressed-tensors", compressed_format=format)
    writer.add(weight)
    writer.close()
    written = load_file(tmp_path / "m.safetensors")
    expected = as_24("fc.", w) if format == compressed_tensors.SP24 else as_bitmask("fc.", w)
    assert set(written) == set(expected)
    for name, t in expected.items():
        assert torch.equal(written[name], t), name
        assert written[name].dtype == t.dtype
        assert written[name].shape == t.shape


class _Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: Tensor) -> Tensor:
        return w * self.mask


def test_masks_of_others(tmp_path: Path) -> None:
    w = torch.randn(8, 16)
    mask = prune_mask(w)
    pruned = torch.where(mask, w, torch.zeros(()))
    linear = nn.Linear(16, 8)
    linear.weight.data.copy_(w)
    prune.custom_from_mask(linear, "weight", mask)
    masked = nn.Linear(16, 8)
    masked.weight.data.copy_(w)
    parametrize.register_parametrization(masked, "weight", _Mask(mask))
    state = {f"a.{k}": v for k, v in linear.state_dict().items()}
    state |= {f"b.{k}": v for k, v in masked.state_dict().items()}
    state |= {"c.weight": pruned, "c.__weight_mma_mask": mask, "c.__weight_mma_pruned_p": torch.zeros(8, 8)}
    state |= {"d.weight": w, "d._weight_mask": mask, "e.weight_packed": torch.zeros(1), "e.scale_packed": w}
    state |= {"e.meta": torch.zeros(1, dtype=torch.int16), "loose_mask": mask}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "m.pt")
    read = {weight.name: weight for weight in checkpoint.read_weights(tmp_path / "m.pt")}
    assert set(read) == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "c.weight",
        "d.weight",
        "e.weight",
        "loose_mask",
    }
    assert list(read)[-3:] == ["d.weight", "e.weight", "loose_mask"]  # in the file's order
    sources = {"a": "torch.nn.utils.prune", "b": "torch.ao.pruning", "c": "apex ASP", "d": "ModelOpt"}
    for name, source in sources.items():
        weight = read[f"{name}.weight"]
        assert weight.source == source
        assert torch.equal(weight.dense(), pruned), name
    assert read["e.weight"].tensor is None
    with pytest.raises(ValueError, match=r"'e.weight' \(compressed-tensors marlin-24\): a GPU's register order"):
        checkpoint.load(tmp_path / "m.pt")


def test_a_state_dict_says_what_it_cannot(tmp_path: Path) -> None:
    torch.save({f"{f}.{k}": v for f in FORMATS for k, v in sparse_linear(f).state_dict().items()}, tmp_path / "m.pt")
    read = {weight.name: weight for weight in checkpoint.read_weights(tmp_path / "m.pt")}
    for format in ("sp24", "bitmap"):
        assert torch.equal(read[f"{format}.weight"].dense(), sparse_linear(format).dense_weight())
    for format in ("csr", "bsr"):
        assert "checkpoint.save" in (read[f"{format}.weight"].problem or "")
