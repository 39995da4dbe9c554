"""SparseLinear: habits of nn.Linear, dense checkpoints in and out, moves, casts, and bad arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import FLOATS, FOUR, QUANTISED, Case, param
from torch import nn

import sparsekern as sk
from sparsekern import testing
from sparsekern.nn import SparseLinear, dense_state_dict
from sparsekern.testing import assert_close, random_dense, reference_mm

OPTIONS = {"bsr": {"block_size": 4}}


def dense_linear(case: Case, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(30, 20, bias, dtype=dtype)
    linear.weight = nn.Parameter(case.dense(20, 30, dtype))
    return linear


def from_dense(case: Case, linear: nn.Linear) -> SparseLinear:
    return SparseLinear.from_dense(
        linear, format=case.format, **({"block_size": case.block} if case.format == "bsr" else {})
    )


@param(FOUR)
@pytest.mark.parametrize("bias", [True, False])
@param(FLOATS, "dtype")
def test_from_and_to_dense(case: Case, bias: bool, dtype: torch.dtype) -> None:
    linear = dense_linear(case, bias, dtype).eval()
    sparse = from_dense(case, linear)
    x = random_dense(2, 3, 30, dtype=dtype)
    offset = linear.bias.detach() if bias else None
    assert_close(sparse(x), reference_mm(linear.weight.detach(), x, offset), dtype)
    assert sparse.bias is linear.bias
    assert (sparse.in_features, sparse.out_features, sparse.training) == (30, 20, False)
    back = sparse.to_dense()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert not back.training
    linear.weight.requires_grad_(False)
    assert not from_dense(case, linear).values.requires_grad


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_constructor(format: str) -> None:
    """The arguments of nn.Linear, the initial scale of nn.Linear, and about the density asked for."""
    torch.manual_seed(0)
    module = SparseLinear(
        200, 100, True, None, torch.bfloat16, format=format, density=0.3, block_size=10, activation="relu"
    )
    assert module.values.dtype == module.bias.dtype == torch.bfloat16
    dense = module.dense_weight()
    assert dense.shape == (100, 200)
    assert (dense != 0).float().mean().item() == pytest.approx(0.5 if format == "sp24" else 0.3, abs=0.08)
    assert dense.abs().max() <= 1 / 200**0.5 * 1.01
    y = module(random_dense(4, 200, dtype=torch.bfloat16))
    assert y.shape == (4, 100)
    assert (y >= 0).all()
    assert SparseLinear(8, 4, False, format=format, block_size=2).bias is None
    for part in ("in_features=200", "out_features=100", f"format='{format}'", "activation='relu'", "bias=True"):
        assert part in repr(module)
    module.backend = "ref"
    assert "backend='ref'" in repr(module)


def test_bad_arguments() -> None:
    linear = nn.Linear(8, 8)
    for error, message, call in (
        (ValueError, "format must be one of sp24", lambda: SparseLinear(8, 8, format="coo")),
        (ValueError, r"density must be in \[0, 1\]", lambda: SparseLinear(8, 8, format="csr", density=1.5)),
        (ValueError, "not 2:4: row 0, group 0", lambda: SparseLinear.from_dense(linear)),
        (
            ValueError,
            "prune=True is for format 'sp24'",
            lambda: SparseLinear.from_dense(linear, format="csr", prune=True),
        ),
        (ValueError, r"K = 8", lambda: SparseLinear(8, 8)(torch.zeros(2, 9))),
        (TypeError, "spconv", lambda: SparseLinear(8, 8)([1.0])),
        (ValueError, "spconv", lambda: SparseLinear(8, 8)(torch.eye(8).to_sparse())),
    ):
        with pytest.raises(error, match=message):
            call()
    assert SparseLinear.from_dense(linear, prune=True).density == 0.5
    broken = SparseLinear(8, 8)
    broken.backend = "cuda"
    with pytest.raises(NotImplementedError, match="cannot run sp24_mm"):
        broken(torch.zeros(2, 8))


@param(FOUR)
def test_state_dict_habits(case: Case) -> None:
    """Own parts, dense checkpoints (packed on load), other types, parameters that keep their identity."""
    linear = dense_linear(case)
    sparse = from_dense(case, linear)
    names = set(sparse.state_dict())
    assert names == {"values", "bias", *sparse.packed.index_fields}
    other = SparseLinear(30, 20, format=case.format, block_size=case.block)
    values, bias = other.values, other.bias
    assert not (keys := other.load_state_dict(sparse.state_dict())).missing_keys
    assert not keys.unexpected_keys
    assert other.values is values, "an optimizer that holds the parameter keeps it"
    assert other.bias is bias
    assert torch.equal(other.dense_weight(), linear.weight)
    with torch.no_grad():
        other.values.mul_(2)
    assert torch.equal(sparse.dense_weight(), linear.weight), "loading copies"
    for state in (linear.state_dict(), {k: v.double() for k, v in linear.state_dict().items()}):
        fresh = SparseLinear(30, 20, format=case.format, block_size=case.block)
        fresh.load_state_dict(state)
        assert fresh.values.dtype == torch.float32
        assert torch.equal(fresh.dense_weight(), linear.weight)
    model = nn.Sequential(nn.ReLU(), sparse, nn.Sequential(from_dense(case, linear)))
    dense = nn.Sequential(nn.ReLU(), nn.Linear(30, 20), nn.Sequential(nn.Linear(30, 20)))
    dense.load_state_dict(dense_state_dict(model))
    assert torch.equal(dense[2][0].weight, linear.weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        sparse.load_state_dict({k: v for k, v in sparse.state_dict().items() if k != "bias"})
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict({"bias": sparse.bias.detach()})


def test_a_broken_layer_does_not_hide_another_ones_missing_keys() -> None:
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    state = {k: v for k, v in model.state_dict().items() if k.startswith("0.")}
    state["0.metadata"] = torch.zeros_like(state["0.metadata"])
    with pytest.raises(RuntimeError, match=r"1\.values") as caught:
        model.load_state_dict(state)
    assert "no legal 2:4 nibble" in str(caught.value)


@param(FOUR)
def test_moves_and_casts(case: Case) -> None:
    sparse = from_dense(case, dense_linear(case))
    for cast in (sparse.half(), sparse.to(torch.float64), sparse.bfloat16(), sparse.float()):
        assert cast.packed.check().dtype == cast.bias.dtype
        assert all(not t.is_floating_point() for t in cast.packed.index)
    assert sparse.share_memory() is sparse
    assert isinstance(sparse.weight, sk.SparseTensor)
    assert sparse.weight.packed.values.data_ptr() == sparse.values.data_ptr()


@param(QUANTISED[:3])
def test_int8(case: Case) -> None:
    scale = testing.random_scale(20)
    sparse = SparseLinear.from_packed(case.pack(case.dense(20, 30, torch.int8), scale), torch.zeros(20))
    assert set(sparse.state_dict()) == {"values", "bias", "scale", *sparse.packed.index_fields}
    half = copy.deepcopy(sparse).half()
    assert half.scale.dtype == torch.float32
    assert half.values.dtype == torch.int8
    other = SparseLinear.from_packed(case.pack(case.dense(20, 30, torch.int8, seed=5), scale * 2), torch.zeros(20))
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.dense_weight(), sparse.dense_weight())
    x = random_dense(3, 30)
    assert_close(sparse(x), reference_mm(sparse.dense_weight(), x), torch.float32)


@param(FOUR)
def test_functional_call_and_hooks(case: Case) -> None:
    """torch.func and forward hooks see an ordinary module."""
    sparse = from_dense(case, dense_linear(case))
    x = random_dense(3, 30)
    doubled = {name: 2 * p.detach() for name, p in sparse.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(sparse, doubled, (x,)), 2 * sparse(x))
    seen: list[torch.Size] = []
    sparse.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    sparse(x)
    assert seen == [(3, 20)]


@param(FOUR)
def test_inference_mode_then_training(case: Case) -> None:
    """A first call under inference_mode must not leave something behind that training trips over."""
    sparse = from_dense(case, dense_linear(case))
    x = random_dense(3, 30)
    with torch.inference_mode():
        first = sparse(x)
    y = sparse(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(first, y.detach())
    with torch.no_grad():
        sparse.values.mul_(2)
    sparse.zero_grad()
    sparse(x).sum().backward()
    assert_close(sparse(x), reference_mm(sparse.dense_weight(), x.detach(), sparse.bias.detach()), torch.float32)


# A layer that runs dense above a number of tokens -----------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[SparseLinear]:
    """The modules whose dense weight was made, in order."""
    seen: list[SparseLinear] = []
    real = SparseLinear.dense_weight

    def counted(self: SparseLinear) -> torch.Tensor:
        seen.append(self)
        return real(self)

    monkeypatch.setattr(SparseLinear, "dense_weight", counted)
    return seen


@param(FOUR)
@pytest.mark.parametrize("bias", [True, False])
@param(FLOATS, "dtype")
def test_dense_above(case: Case, bias: bool, dtype: torch.dtype, made: list[SparseLinear]) -> None:
    """Few tokens run sparse, many run dense, on a weight that is made once and never saved."""
    linear = dense_linear(case, bias, dtype)
    sparse, plain = from_dense(case, linear), from_dense(case, linear)
    sparse.dense_above = 6
    keys = list(sparse.state_dict())
    with torch.no_grad():
        assert torch.equal(sparse(random_dense(6, 30, dtype=dtype)), plain(random_dense(6, 30, dtype=dtype)))
        assert not made
        for shape in ((7, 30), (2, 4, 30)):
            x = random_dense(7 if len(shape) == 2 else 8, 30, dtype=dtype).reshape(shape)
            assert torch.equal(sparse(x), linear(x))
        assert made == [sparse]
        sparse.activation = "relu"
        assert torch.equal(sparse(x), linear(x).relu())
        assert made == [sparse]
    assert list(sparse.state_dict()) == keys == list(plain.state_dict())
    assert "dense_above=6" in repr(sparse)
    assert copy.deepcopy(sparse).dense_above == 6


def test_dense_above_follows_the_values(made: list[SparseLinear]) -> None:
    """After an optimizer's step, a load, or a cast the old dense weight is not used."""
    case = Case("csr")
    linear = dense_linear(case)
    sparse = from_dense(case, linear)
    sparse.dense_above = 0
    x = random_dense(5, 30)
    with torch.no_grad():
        sparse(x)
        sparse.values.mul_(2)
        assert_close(sparse(x), reference_mm(2 * linear.weight.detach(), x, linear.bias.detach()), torch.float32)
        other = dense_linear(Case("csr"))
        other.weight = nn.Parameter(case.dense(20, 30) * 3)
        sparse.load_state_dict(other.state_dict())
        assert_close(sparse(x), other(x), torch.float32)
        sparse.to(torch.bfloat16)
        assert sparse(x.bfloat16()).dtype == torch.bfloat16
    assert len(made) == 4


def test_dense_above_is_for_inference(made: list[SparseLinear]) -> None:
    """Training, autocast and compiled calls run sparse; gradients of x alone do not need to."""
    case = Case("csr")
    linear = dense_linear(case)
    sparse = from_dense(case, linear)
    sparse.dense_above = 0
    x = random_dense(5, 30)
    sparse(x).sum().backward()
    assert sparse.values.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert sparse(x).dtype == torch.bfloat16
        assert_close(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), linear(x), torch.float32)
    assert not made
    sparse.values.requires_grad_(False)
    x = x.requires_grad_()
    (ours,) = torch.autograd.grad(sparse(x).sum(), x)
    (theirs,) = torch.autograd.grad(linear(x).sum(), x)
    assert made == [sparse]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [random_dense(9, 31), random_dense(9, 30, dtype=torch.float64), torch.tensor(1.0)])
def test_dense_above_refuses_what_sparse_refuses(bad: torch.Tensor) -> None:
    sparse = from_dense(Case("csr"), dense_linear(Case("csr"))).requires_grad_(False)
    sparse.dense_above = 0
    with pytest.raises(ValueError, match=r"x (must have shape|is torch.float64)"):
        sparse(bad)
