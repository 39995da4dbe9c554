"""Gradients of x, values and bias: gradcheck in float64 through the oracle, float64 autograd for the host."""

from __future__ import annotations

import pytest
import torch
from cases import ALL, FLOATS, FOUR, Case, param
from conftest import Backend
from torch import Tensor

import sparsekern as sk
from sparsekern.functional import linear_layout
from sparsekern.ref import ACTIVATIONS
from sparsekern.testing import assert_close, random_dense, reference_mm, reference_mm_t

NINE = (*FOUR, Case("bsr", (3, 5)))


@param(NINE)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradcheck_linear(case: Case, activation: str) -> None:
    packed = case.pack(case.dense(9, 14, torch.float64))
    values = packed.values.clone().requires_grad_()
    x = random_dense(2, 3, 14, dtype=torch.float64, seed=1).requires_grad_()
    bias = random_dense(9, dtype=torch.float64, seed=2).requires_grad_()

    def call(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return linear_layout(packed.with_values(values), x, bias, activation, "ref")

    assert torch.autograd.gradcheck(call, (values, x, bias))
    assert torch.autograd.gradcheck(lambda v, x: call(v, x, bias.detach()), (values, x))


@param(NINE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["x @ w", "w @ x"])
def test_gradcheck_matmul(case: Case, transposed: bool, side: str) -> None:
    """Both orientations from both sides; the gradient of the weight arrives at the SparseTensor itself."""
    n, k = (9, 15) if case.block == (3, 5) else (8, 16)  # no padding: gradcheck disturbs every stored value
    packed = case.pack(case.dense(n, k, torch.float64))
    width = k if transposed == (side == "x @ w") else n
    shape = (4, width) if side == "x @ w" else (width, 4)
    x = random_dense(*shape, dtype=torch.float64, seed=1).requires_grad_()

    def call(values: Tensor, x: Tensor) -> Tensor:
        leaf = sk.SparseTensor(packed.with_values(values.detach()), requires_grad=True)
        w = leaf.t() if transposed else leaf
        out = sk.matmul(x, w) if side == "x @ w" else sk.matmul(w, x)
        return Through.apply(values, out, leaf, x)

    values = packed.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (values, x))


class Through(torch.autograd.Function):
    """Hands a leaf SparseTensor's gradient on to the plain tensor of its values, so that gradcheck sees it."""

    @staticmethod
    def forward(ctx, values, out, leaf, x):  # type: ignore[no-untyped-def]
        ctx.out, ctx.leaf, ctx.x = out, leaf, x
        return out.detach().clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        leaf_grad, _ = torch.autograd.grad(ctx.out, (ctx.leaf, ctx.x), grad, retain_graph=True)
        assert isinstance(leaf_grad, sk.SparseTensor)
        assert leaf_grad.transposed == ctx.leaf.transposed
        return leaf_grad.packed.values, grad, None, None


@param(FOUR)
def test_gradcheck_to_dense(case: Case) -> None:
    packed = case.pack(case.dense(5, 9, torch.float64))
    weight = random_dense(5, 9, dtype=torch.float64, seed=4)
    for transposed in (False, True):
        leaf = sk.SparseTensor(packed, requires_grad=True)
        w = leaf.t() if transposed else leaf
        (w.to_dense() * (weight.t() if transposed else weight)).sum().backward()
        assert torch.equal(leaf.grad.packed.values, packed.sample(weight))


def dense_gradients(
    dense: Tensor, x: Tensor, bias: Tensor | None, activation: str, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dW, dX, dbias) of act(x W^T + bias) in float64 by torch's own autograd."""
    wide = [t.detach().double().requires_grad_() for t in (dense, x)]
    offset = None if bias is None else bias.detach().double().requires_grad_()
    reference_mm(wide[0], wide[1], offset, activation).backward(dy.double())
    return wide[0].grad, wide[1].grad, None if offset is None else offset.grad  # type: ignore[return-value]


@param((*ALL,))
@param(FLOATS, "dtype")
@pytest.mark.interpreted
def test_linear_gradients(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Every product of a training step, at token counts on both sides of the kernels' switches."""
    n, k = 39, 54
    dense = case.dense(n, k, dtype)
    packed = case.pack(dense)
    mask = packed.with_values(torch.ones_like(packed.values)).unpack() != 0
    for m in (1, 7, 65):
        x = random_dense(m, k, dtype=dtype, seed=1)
        dy = random_dense(m, n, dtype=dtype, seed=2)
        bias = random_dense(n, dtype=dtype, seed=3)
        if not all(backend.runs(op, packed, t) for op, t in (("mm", x), ("mm_t", dy), ("sddmm", x))):
            return
        leaf = sk.SparseTensor(packed, requires_grad=True)
        x.requires_grad_()
        bias.requires_grad_()
        y = sk.linear(x, leaf, bias, backend=backend.name)
        assert_close(y, reference_mm(dense, x.detach(), bias.detach()), dtype)
        y.backward(dy)
        dw, dx, db = dense_gradients(dense, x, bias, "none", dy)
        assert isinstance(leaf.grad, sk.SparseTensor)
        assert_close(leaf.grad.packed.unpack(), torch.where(mask, dw, 0.0), dtype)
        assert_close(x.grad, dx, dtype)
        assert_close(bias.grad, db, dtype)


@param(FOUR)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_through_activations(backend: Backend, case: Case, activation: str) -> None:
    """float32 against float64: a kernel's fused activation must not stand in the way of autograd."""
    dense = case.dense(20, 30)
    packed = case.pack(dense)
    x = random_dense(6, 30, seed=1)
    if not all(backend.runs(op, packed, t) for op, t in (("mm", x), ("mm_t", x[:, :20]), ("sddmm", x))):
        return
    bias, dy = random_dense(20, seed=2).requires_grad_(), random_dense(6, 20, seed=3)
    leaf = sk.SparseTensor(packed, requires_grad=True)
    x.requires_grad_()
    sk.linear(x, leaf, bias, activation, backend=backend.name).backward(dy)
    dw, dx, db = dense_gradients(dense, x, bias, activation, dy)
    stored = packed.with_values(torch.ones_like(packed.values)).unpack() != 0
    assert_close(leaf.grad.packed.unpack(), torch.where(stored, dw, 0.0), torch.float32, tol=1e-5)
    assert_close(x.grad, dx, torch.float32, tol=1e-5)
    assert_close(bias.grad, db, torch.float32, tol=1e-5)


FINISHES = (
    lambda y: y.sum(),
    lambda y: (y.t().contiguous() ** 2).sum(),
    lambda y: y[:, ::2].sum(),
    lambda y: y[0].sum(),
    lambda y: y.mean(0, keepdim=True).expand(5, -1).sum(),
)


@param(FOUR)
def test_strange_upstream_gradients(backend: Backend, case: Case) -> None:
    """Expanded (stride 0), transposed and zero-token gradients, as sum(), t() and empty batches make them."""
    dense = case.dense(12, 20)
    packed = case.pack(dense)
    x = random_dense(5, 20, seed=1)
    if not all(backend.runs(op, packed, t) for op, t in (("mm", x), ("mm_t", x[:, :12]), ("sddmm", x))):
        return
    for finish in FINISHES:
        leaf = sk.SparseTensor(packed, requires_grad=True)
        ours = x.clone().requires_grad_()
        finish(sk.linear(ours, leaf, backend=backend.name)).backward()
        w64, x64 = dense.double().requires_grad_(), x.double().requires_grad_()
        finish(x64 @ w64.t()).backward()
        stored = packed.with_values(torch.ones_like(packed.values)).unpack() != 0
        assert_close(ours.grad, x64.grad, torch.float32)
        assert_close(leaf.grad.packed.unpack(), torch.where(stored, w64.grad, 0.0), torch.float32)
    leaf = sk.SparseTensor(packed, requires_grad=True)
    empty = torch.zeros(0, 20, requires_grad=True)
    sk.linear(empty, leaf, backend=backend.name).sum().backward()
    assert empty.grad.shape == (0, 20)
    assert not leaf.grad.packed.values.any()


@param(FOUR)
def test_only_what_is_asked_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights cost no sampled product, frozen inputs no transposed one."""
    from sparsekern import _library

    called: list[str] = []
    for name in ("mm_t", "sddmm"):
        product = getattr(_library, name)
        monkeypatch.setattr(_library, name, lambda *a, _f=product, _name=name: called.append(_name) or _f(*a))
    packed, x = case.pack(case.dense(8, 16)), random_dense(3, 16)
    for weight_grad, x_grad, expected in (
        (True, False, ["sddmm"]),
        (False, True, ["mm_t"]),
        (True, True, ["sddmm", "mm_t"]),
    ):
        called.clear()
        w = sk.SparseTensor(packed, requires_grad=weight_grad)
        sk.linear(x.clone().requires_grad_(x_grad), w).sum().backward()
        assert called == expected
    with torch.no_grad():
        assert sk.linear(x.clone().requires_grad_(), sk.SparseTensor(packed, requires_grad=True)).grad_fn is None


@param(FOUR)
def test_second_derivative_says_so(case: Case) -> None:
    leaf = sk.SparseTensor(case.pack(case.dense(8, 16)), requires_grad=True)
    x = random_dense(3, 16).requires_grad_()
    (dx,) = torch.autograd.grad((sk.linear(x, leaf) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@param(FOUR)
def test_gradients_accumulate(case: Case) -> None:
    """Two uses in one graph and two backward passes add up, as for a dense parameter."""
    packed, x = case.pack(case.dense(8, 16)), random_dense(3, 16)
    leaf = sk.SparseTensor(packed, requires_grad=True)
    (sk.linear(x, leaf) + sk.linear(2 * x, leaf)).sum().backward()
    once = leaf.grad.packed.values.clone()
    sk.linear(x, leaf).sum().backward()
    single = sk.SparseTensor(packed, requires_grad=True)
    sk.linear(x, single).sum().backward()
    step = single.grad.packed.values
    torch.testing.assert_close(once, 3 * step)
    torch.testing.assert_close(leaf.grad.packed.values, 4 * step)


@param(FOUR)
def test_int8_weights_give_x_its_gradient(backend: Backend, case: Case) -> None:
    if case.format not in ("sp24", "bsr"):
        return
    from sparsekern.testing import random_scale

    dense, scale = case.dense(12, 20, torch.int8), random_scale(12)
    packed = case.pack(dense, scale)
    x = random_dense(5, 20, seed=1)
    dy = random_dense(5, 12, seed=2)
    if not (backend.runs("mm", packed, x) and backend.runs("mm_t", packed, dy)):
        return
    x.requires_grad_()
    sk.linear(x, packed, backend=backend.name).backward(dy)
    assert_close(x.grad, reference_mm_t(dense.double() * scale.double()[:, None], dy), torch.float32)
