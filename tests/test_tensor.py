"""SparseTensor as a tensor: its properties, views, casts, copies, arithmetic, and the plans kept beside its storage."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from cases import FOUR, Case, param
from torch import nn

import sparsekern as sk
from sparsekern import testing
from sparsekern._plan import plan
from sparsekern.testing import assert_close, random_dense


@param(FOUR)
def test_properties(case: Case) -> None:
    dense = case.dense(12, 24, torch.bfloat16)
    packed = case.pack(dense)
    w = sk.SparseTensor(packed)
    assert (w.format, w.shape, w.dtype, w.device.type) == (case.format, (12, 24), torch.bfloat16, "cpu")
    assert w.packed is packed
    assert w.check() is w
    assert w.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())
    assert w.density == (0.5 if case.format == "sp24" else packed.values.numel() / dense.numel())
    assert w.dim() == 2
    assert w.size(0) == 12
    assert w.numel() == 288
    assert not w.requires_grad
    assert torch.equal(w.to_dense(), dense)
    assert w.to_dense(torch.float64).dtype == torch.float64
    for part in (case.format, "(12, 24)", "bfloat16", "density", "nbytes"):
        assert part in repr(w)
    assert "requires_grad" in repr(nn.Parameter(w))
    with pytest.raises(TypeError, match="wraps a layout"):
        sk.SparseTensor(dense)  # type: ignore[arg-type]


@param(FOUR)
def test_transposed_is_a_view(case: Case) -> None:
    dense = case.dense(12, 24)
    w = sk.SparseTensor(case.pack(dense))
    for t in (w.t(), w.T, torch.t(w)):
        assert t.shape == (24, 12)
        assert t.transposed
        assert t.packed.values is w.packed.values
        assert torch.equal(t.to_dense(), dense.t())
        assert torch.equal(t.t().to_dense(), dense)
        assert "transposed" in repr(t)


@param(FOUR)
def test_casts_and_copies(case: Case) -> None:
    dense = case.dense(12, 24)
    w = sk.SparseTensor(case.pack(dense))
    for dtype, cast in (
        (torch.float64, w.double()), (torch.bfloat16, w.bfloat16()), (torch.float16, w.to(torch.float16)),
    ):  # fmt: skip
        assert isinstance(cast, sk.SparseTensor)
        assert cast.dtype == cast.packed.dtype == dtype
        assert torch.equal(cast.to_dense(), dense.to(dtype))
    for same in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.detach().clone()):
        assert same.format == case.format
        same.packed.values.zero_()
        assert torch.equal(w.to_dense(), dense), "a copy shares nothing"
    assert w.detach().packed.values.data_ptr() == w.packed.values.data_ptr()
    for other in (w.t().double(), copy.deepcopy(w.t()), pickle.loads(pickle.dumps(w.t()))):
        assert other.transposed
        assert torch.equal(other.to_dense().float(), dense.t())
    parameter = copy.deepcopy(nn.Parameter(w))
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad


def test_int8_is_not_cast() -> None:
    w = sk.SparseTensor(Case("sp24").pack(Case("sp24").dense(8, 16, torch.int8), testing.random_scale(8)))
    with pytest.raises(ValueError, match="quantise instead"):
        w.to(torch.float32)
    with pytest.raises(NotImplementedError, match="int8 weights have no arithmetic"):
        w * 2
    assert w.to_dense().dtype == torch.float32


@param(FOUR)
def test_save_whole(case: Case, tmp_path: Path) -> None:
    w = sk.SparseTensor(case.pack(case.dense(12, 24)))
    torch.save({"w": w, "p": nn.Parameter(w)}, tmp_path / "w.pt")
    back = torch.load(tmp_path / "w.pt", weights_only=True)
    for name in ("w", "p"):
        assert back[name].format == case.format
        assert torch.equal(back[name].to_dense(), w.to_dense())
    assert back["p"].requires_grad


@param(FOUR)
def test_arithmetic_on_stored_values(case: Case) -> None:
    """What optimizers need; zeros stay zeros, the topology stays the same."""
    dense = case.dense(12, 24)
    w = sk.SparseTensor(case.pack(dense))
    for out, right in (
        (w * 2, dense * 2), (w / 4, dense / 4), (w + w, 2 * dense), (w - w, 0 * dense), (-w, -dense),
        (w.abs(), dense.abs()), (w.square(), dense**2), (w * w, dense**2), (torch.zeros_like(w), 0 * dense),
        (torch.lerp(w, w * 3, 0.5), 2 * dense), (torch.sign(w), dense.sign()), (torch.maximum(w, -w), dense.abs()),
    ):  # fmt: skip
        assert isinstance(out, sk.SparseTensor)
        torch.testing.assert_close(out.to_dense(), right)
    assert w.norm().item() == pytest.approx(dense.norm().item())
    assert torch.linalg.vector_norm(w, float("inf")).item() == dense.abs().max().item()
    changed = w.clone()
    assert changed.mul_(3) is changed
    torch.testing.assert_close(changed.to_dense(), 3 * dense)
    other = sk.SparseTensor(case.pack(case.dense(12, 24, seed=1, density=0.3)))
    if not torch.equal(other.packed.index[-1], w.packed.index[-1]):
        with pytest.raises(NotImplementedError, match="differ in topology"):
            w + other
    with pytest.raises(NotImplementedError, match="differ in topology"):
        w + sk.SparseTensor(case.pack(case.dense(24, 12))).t()
    with pytest.raises(NotImplementedError, match="do not mix"):
        w * dense
    for unsupported in (
        torch.exp,
        torch.cumsum,
        torch.linalg.inv,
        lambda t: t[0],
        lambda t: t.sum(0),
        lambda t: t.view(-1),
    ):
        with pytest.raises((NotImplementedError, TypeError)):
            unsupported(w)
    with pytest.raises(NotImplementedError, match=f"format {case.format}; use .to_dense"):
        torch.exp(w)


@param(FOUR)
def test_dense_results_stay_dense(case: Case) -> None:
    """torch functions that take a SparseTensor beside dense tensors must not wrap the dense results."""
    w = sk.SparseTensor(case.pack(case.dense(12, 24)), requires_grad=True)
    x = random_dense(3, 24).requires_grad_()
    dw, dx = torch.autograd.grad(sk.linear(x, w).sum(), (w, x))
    assert type(dx) is torch.Tensor
    assert isinstance(dw, sk.SparseTensor)
    assert type(torch.linalg.vector_norm(w.detach())) is torch.Tensor
    assert type(nn.functional.linear(x, w)) is torch.Tensor


@param(FOUR)
def test_as_a_parameter(case: Case) -> None:
    linear = nn.Linear(24, 12)
    dense = case.dense(12, 24)
    linear.weight = nn.Parameter(sk.SparseTensor(case.pack(dense)))
    assert isinstance(linear.weight, nn.Parameter)
    assert dict(linear.named_parameters())["weight"].format == case.format
    x = random_dense(5, 24)
    assert_close(linear(x), testing.reference_mm(dense, x, linear.bias.detach()), torch.float32)
    linear.requires_grad_(False)
    assert not linear.weight.requires_grad
    assert linear.double().weight.dtype == torch.float64
    linear.zero_grad()


# Plans ---------------------------------------------------------------------------------------------------------


def test_plan_follows_the_version() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    t = torch.zeros(8)
    assert [plan(t, "a", make), plan(t, "a", make), plan(t, "b", make), plan(t, "a", make)] == [0, 0, 1, 0]
    t.add_(1)
    assert plan(t, "a", make) == 2, "changed in place: made again"
    assert plan(t.view(2, 4), "a", make) == 3, "another shape is another plan"
    assert plan(t[4:], "a", make) == 4
    assert plan(t[:4], "a", make) == 5, "another place in the same storage is another plan"
    assert plan(nn.Parameter(t), "a", make) in (2, 6), "the same memory under another name"
    with torch.no_grad():
        t.mul_(2)
    assert plan(t, "a", make) == max(made)
    with torch.inference_mode():
        frozen = torch.zeros(3)
        assert plan(frozen, "a", make) == plan(frozen, "a", make)


def test_plan_dies_with_its_tensor() -> None:
    t = torch.zeros(8)
    derived = weakref.ref(plan(t, "a", lambda: torch.ones(3)))
    gc.collect()
    assert derived() is plan(t, "a", lambda: None)
    assert "_sparsekern_plans" not in copy.deepcopy(t).untyped_storage().__dict__, "a copy makes its own"
    del t
    gc.collect()
    assert derived() is None
