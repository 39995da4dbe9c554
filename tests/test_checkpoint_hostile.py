"""Hostile files: a ValueError that names the place, or weights that pass check(); never a crash."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import as_24, as_bitmask, sparse_model
from test_patterns import pruned_24
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import checkpoint
from sparsekern.checkpoint import native
from sparsekern.patterns import as_matrix
from sparsekern.tensor import SparseTensor
from sparsekern.testing import random_weight


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    checkpoint.save(sparse_model(), folder / "ours.safetensors")
    w = random_weight("sp24", 6, 20)
    save_file({**as_24("a.", w), **as_bitmask("b.", w)}, folder / "theirs.safetensors")
    torch.save({"a": sk.to_csr(w), "b": torch.randn(3, 4)}, folder / "torch.pt")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def survives(path: Path) -> bool:
    """Reads a broken file: a ValueError, or weights that all pass check(). Returns whether it was read."""
    try:
        read = checkpoint.load(path)
        dense = read.dense_state_dict()
    except ValueError:
        return False
    for name, t in read.items():
        if isinstance(t, SparseTensor):
            t.check()
        assert tuple(dense[name].shape) == read.weights[name].shape
    return True


@pytest.mark.parametrize("name", ["ours.safetensors", "theirs.safetensors", "torch.pt"])
@given(data=st.data())
def test_flipped_bits(valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    broken = bytearray(valid[name])
    header = 8 + int.from_bytes(broken[:8], "little") if name.endswith("safetensors") else len(broken)
    for _ in range(data.draw(st.integers(1, 4))):
        anywhere = data.draw(st.booleans())
        at = data.draw(st.integers(0, (len(broken) if anywhere else header) - 1))
        broken[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    path.write_bytes(broken)
    survives(path)


@pytest.mark.parametrize("name", ["ours.safetensors", "theirs.safetensors", "torch.pt"])
@given(share=st.floats(0, 1))
def test_truncated(valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, share: float) -> None:
    whole = valid[name]
    path = tmp_path_factory.getbasetemp() / f"truncated-{name}"
    path.write_bytes(whole[: min(int(share * len(whole)), len(whole) - 1)])
    assert not survives(path)


def rewritten(path: Path, **changes: Any) -> None:
    """A file of one csr weight "w" (3 x 8, K order k) with its record or its tensors changed."""
    w = torch.zeros(3, 8)
    w[0, 1], w[2, 7], w[2, 3] = 1.0, 2.0, 3.0
    weight = checkpoint.Weight("w", sk.to_csr(w), "", (3, 8))
    tensors, record = native.encode(weight)
    entry = record.as_json()
    for key, value in changes.items():
        if key in entry:
            entry[key] = value
        elif value is None:
            del tensors[f"w.{key}"]
        elif isinstance(value, Tensor):
            tensors[f"w.{key}"] = value
    text = json.dumps({"version": changes.get("version", 1), "weights": {"w": entry}})
    save_file(tensors, path, {native.HEADER: changes.get("text", text)})


INT32 = torch.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"col": torch.tensor([1, 3, 8], dtype=INT32)},
            r"weight 'w': csr .* col\[2\] \(in row 2\) is 8, must be in",
        ),
        ({"col": torch.tensor([1, -3, 7], dtype=INT32)}, r"col\[1\] \(in row 2\) is -3"),
        ({"col": torch.tensor([1, 3, 7])}, "col must be int32, got int64"),
        ({"crow": torch.tensor([0, 2, 1, 3], dtype=INT32)}, "crow decreases at row 1: 2 then 1"),
        ({"crow": torch.tensor([0, 1, 3], dtype=INT32)}, r"crow must have shape \(4,\), got \(3,\)"),
        ({"crow": None}, "weight 'w': tensor 'w.crow' is missing"),
        ({"values": torch.tensor([1.0, 2.0])}, r"col must have shape \(2,\), got \(3,\)"),
        ({"values": torch.ones(3, dtype=torch.int64)}, "values are int64, but the header says float32"),
        ({"dims": [3, 9]}, r"dims \(3, 9\) do not fit shape \(3, 8\)"),
        ({"dims": [3, 8, 1]}, r"dims \(3, 8, 1\) are too many for format csr"),
        ({"dims": [3]}, r"dims \(3,\) do not fit"),
        ({"format": "bsr"}, r"dims \(3, 8\) are too few for format bsr"),
        ({"format": "bsr", "dims": [3, 8, 0, 0]}, "block must be two positive integers"),
        ({"format": "zip"}, "format must be one of sp24, bsr, csr, bitmap, got 'zip'"),
        ({"format": "sp24"}, "weight 'w': tensor 'w.metadata' is missing"),
        ({"shape": [3, -8]}, "shape must be a list of integers from 0"),
        ({"shape": [3, True]}, "shape must be a list of integers"),
        ({"shape": [2**40, 8]}, "shape must be a list of integers"),
        ({"shape": [24]}, "do not go together"),
        ({"order": "rsc"}, "do not go together"),
        ({"order": 3}, "order must be text"),
        ({"dtype": "int8"}, "values are float32, but the header says int8"),
        ({"prefix": "v."}, "tensor 'v.values' is missing"),
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"text": "{"}, "is not JSON"),
        ({"text": "[" * 100000}, "is not JSON"),
        ({"text": "[]"}, "has no version"),
        ({"text": '{"version": 1, "weights": {"w": 3}}'}, "its entry is 3"),
        ({"text": '{"version": 1, "weights": {}, "aliases": {"a": "b"}}'}, "ties 'a' to 'b'"),
    ],
)
def test_a_broken_file_names_the_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.safetensors"
    rewritten(path)
    assert checkpoint.load(path)["w"].format == "csr"
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bitmask": torch.full((6, 3), 255, dtype=torch.uint8)}, "row 0 has a bit set beyond column 19"),
        ({"bitmask": torch.zeros(6, 3, dtype=torch.uint8)}, "bitmask keeps 0 weights, but compressed has 60"),
        ({"bitmask": torch.zeros(6, 2, dtype=torch.uint8)}, r"bitmask must be uint8 \[6, 3\]"),
        ({"shape": torch.tensor([6, 20, 1])}, "shape must be one or two integers"),
        ({"shape": torch.tensor([6, -20])}, "shape must be from 0"),
        ({"shape": torch.tensor([2**31 - 1, 2**31 - 1])}, "bitmask must be uint8"),
        ({"row_offsets": torch.arange(6)}, "row_offsets of row 1 is 1, but the bitmask says 10"),
        ({"row_offsets": torch.zeros(2)}, "row_offsets must be 6 integers"),
    ],
)
def test_broken_bitmasks(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    tensors = as_24("fc.", random_weight("sp24", 6, 20)) | {f"fc.{k}": v for k, v in changes.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"weight 'fc.weight' .*{message}"):
        checkpoint.load(tmp_path / "m.safetensors")


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/sparsekern-was-here"),))


def test_no_file_runs_code(tmp_path: Path) -> None:
    for name, payload in (("a.pt", {"w": _Evil()}), ("b.pt", nn.Linear(2, 2))):
        torch.save(payload, tmp_path / name)
        with pytest.raises(ValueError, match=r"pickled Python objects.*save model.state_dict\(\)"):
            checkpoint.load(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"c\.pt"):
        checkpoint.load(tmp_path / "c.pt")
    assert not Path("/tmp/sparsekern-was-here").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "not a readable safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a readable safetensors file"),
        ("a.pt", b"", "not a readable torch file"),
        ("a.pt", b"PK\x03\x04 nonsense", "not a readable torch file"),
        ("a.txt", b"hello", "not a checkpoint that can be read"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / name)


def test_what_is_no_checkpoint_either(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="a directory with neither"):
        checkpoint.load(tmp_path)
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds a list, expected a state_dict"):
        checkpoint.load(tmp_path / "a.pt")
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no tensors found; its keys are 'epoch'"):
        checkpoint.load(tmp_path / "a.pt")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "../x.safetensors"}, "no plain file name"),
        ({"a": "/etc/passwd"}, "no plain file name"),
        ({"a": 3}, "no plain file name"),
        ([], "not a readable index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    save_file({"b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"says that 'a' is in x\.safetensors, but it is not"):
        checkpoint.load(tmp_path)


def test_a_claim_that_no_memory_holds(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rewritten(path, shape=[3, 2**31 - 1], dims=[3, 2**31 - 1])
    read = checkpoint.load(path)  # three nonzeros in very long rows: legal
    read.weights["w"] = checkpoint.Weight("w", read["w"], "", (2**31 - 1, 2**31 - 1))
    with pytest.raises(ValueError, match="more than this machine's memory"):
        read.dense_state_dict()


def test_the_order_flag_agrees_with_the_header(tmp_path: Path) -> None:
    w = pruned_24((8, 8, 3, 3), "rsc")
    packed = sk.to_sparse_semi_structured(as_matrix(w, "rsc").contiguous())
    tensors, record = native.encode(checkpoint.Weight("c.weight", packed, "", (8, 8, 3, 3), "rsc"))
    tensors["c.order_rsc"] = torch.tensor(False)
    save_file(tensors, tmp_path / "m.safetensors", {native.HEADER: native.header({"c.weight": record}, {})})
    with pytest.raises(ValueError, match="order_rsc contradicts the header's order 'rsc'"):
        checkpoint.load(tmp_path / "m.safetensors")
