"""What follows bias and activation: scales of tokens, residuals, other output types; on every backend and format."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import FOUR, HALVES, QUANTISED, Case, param
from conftest import Backend, Fp8Bounds
from torch import Tensor

import sparsekern as sk
from sparsekern import dispatch, formats, testing
from sparsekern._ending import Ending
from sparsekern._ext import FP8
from sparsekern._library import MM
from sparsekern.layout import Layout
from sparsekern.ref import ACTIVATIONS
from sparsekern.sp24 import vendor
from sparsekern.testing import TOLERANCE, assert_close, poisoned, random_dense

N, K = 35, 52
SCALED, PLUS, WIDE = (True, False, None), (False, True, None), (False, False, torch.float32)
WAYS = (SCALED, PLUS, WIDE, (True, True, torch.float32), (True, True, torch.bfloat16), (False, True, torch.float16))


def reference(
    dense: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
    residual: Tensor | None,
    beta: float = 1.0,
) -> Tensor:
    y = x.double() @ dense.double().t()
    y = y if x_scale is None else y * x_scale.double()[:, None]
    y = ACTIVATIONS[activation](y if bias is None else y + bias.double())
    return y if residual is None else y + beta * residual.double()


def quantised(case: Case, dtype: torch.dtype) -> Layout:
    q = sk.prune.quantised(case.dense(N, K), dtype)
    return testing.pack(case.format, q.values, case.block, q.scale)


def tokens(m: int, dtype: torch.dtype) -> Tensor:
    x = random_dense(m, K, seed=m)
    return (x * 20).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


@param((*FOUR, Case("bsr", (16, 16))))
@param((torch.float32, *HALVES), "dtype")
@pytest.mark.interpreted
def test_words(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Each word alone and together; sums are never rounded to 16 bits on the way to a wider result."""
    dense = case.dense(N, K, dtype)
    layout, bias = case.pack(dense), random_dense(N, seed=3)
    for m in (1, 9, 40) if backend.name != "triton" else (9,):
        x, x_scale = tokens(m, dtype), random_dense(m, seed=4).abs()
        if not backend.runs("mm", layout, x):
            return
        for scaled, plus, out in WAYS:
            residual = random_dense(m, N, dtype=out or dtype, seed=5) if plus else None
            scale = x_scale if scaled else None
            with poisoned():
                y = MM[case.format](*layout.parts, x, bias, "silu", backend.name, scale, residual, out, True)
            assert y.dtype == (out or dtype)
            # A residual alone is added to what was rounded to 16 bits already.
            assert_close(y, reference(dense, x, bias, "silu", scale, residual), tol=2 * TOLERANCE[y.dtype])


@param(QUANTISED)
@param((torch.int8, FP8), "dtype")
@pytest.mark.interpreted
def test_quantised(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Weights with a scale per row, activations with one per token: what torch._scaled_mm does."""
    layout = quantised(case, dtype)
    for m in (1, 33):
        x, x_scale = tokens(m, dtype), random_dense(m, seed=4).abs()
        if not backend.runs("mm", layout, x):
            return
        for scaled, plus, out in WAYS:
            residual = random_dense(m, N, dtype=out or torch.float32, seed=5) if plus else None
            scale = x_scale if scaled else None
            y = MM[case.format](*layout.parts, x, None, "gelu", backend.name, scale, residual, out, False)
            assert y.dtype == (out or torch.float32)
            tensor_cores = dtype == FP8 and backend.device == "cuda"  # they keep 14 bits of the sums
            tol = max(2 * TOLERANCE[y.dtype], 2e-3 if tensor_cores else 0)  # rounded before the residual, and after
            assert_close(y, reference(layout.to_dense(), x, None, "gelu", scale, residual), tol=tol)


@param((*FOUR, Case("bsr", (16, 16))))
@param((torch.float32, torch.bfloat16), "dtype")
@pytest.mark.interpreted
def test_a_residual_and_its_factor(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    dense = case.dense(N, K, dtype)
    layout, x = case.pack(dense), tokens(9, dtype)
    if not backend.runs("mm", layout, x):
        return
    for beta, x_scale, out in (
        (0.5, None, None),
        (-2.0, random_dense(9, seed=4).abs(), torch.float32),
        (0.0, None, None),
    ):
        residual = random_dense(9, N, dtype=out or dtype, seed=5)
        y = MM[case.format](*layout.parts, x, None, "relu", backend.name, x_scale, residual, out, False, beta)
        want = reference(dense, x, None, "relu", x_scale, residual, beta)
        assert_close(y, want, tol=2 * TOLERANCE[y.dtype])


def test_a_factor_and_gradients() -> None:
    """The public call, with gradients and without: the same numbers, and beta in the residual's gradient."""
    layout = Case("csr").pack(Case("csr").dense(N, K))
    x, residual = random_dense(4, K), random_dense(4, N, seed=5).requires_grad_()
    y = sk.linear(x, layout, residual=residual, beta=-1.5)
    assert_close(y, reference(layout.to_dense(), x, None, "none", None, residual, -1.5), torch.float32)
    y.sum().backward()
    assert torch.equal(residual.grad, torch.full_like(residual, -1.5))
    with torch.no_grad():
        assert_close(sk.linear(x, layout, residual=residual, beta=-1.5), y, torch.float32)
    with pytest.raises(ValueError, match="there is none; got beta=2"):
        sk.linear(x, layout, beta=2.0)


@pytest.mark.parametrize("dtype", [torch.int8, FP8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["sp24", "csr", "bitmap"])
def test_one_kernel_on_a_gpu(
    emulated_once: ModuleType,
    fp8_bounds: Fp8Bounds,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    dtype: torch.dtype,
) -> None:
    """CUDA kernels do it all at once, from the public call; one op, and nothing of torch's after it.

    So do Triton's (test_bsr_triton.py).
    """
    case, module = Case(format), formats.backend_module(format, "cuda")
    if (dtype.itemsize == 1 and format != "sp24") or (dtype == torch.float32 and format != "csr"):
        pytest.skip("a format without this type")
    layout = quantised(case, dtype) if dtype.itemsize == 1 else case.pack(case.dense(N, K, dtype))
    calls = []
    real = module.mm
    monkeypatch.setattr(module, "mm", lambda *given, **more: calls.append(more) or real(*given, **more))
    for (scaled, plus, out), m in itertools.product(WAYS, (3, 12)):
        x, x_scale = tokens(m, dtype), random_dense(m, seed=4).abs()
        natural = torch.float32 if dtype.itemsize == 1 else dtype
        residual = random_dense(m, N, dtype=out or natural, seed=5) if plus else None
        scale = x_scale if scaled else None
        words: dict[str, Any] = {"x_scale": scale, "residual": residual, "out_dtype": out}
        y = sk.linear(x, layout, None, "relu", "cuda", **words)
        tol = max(2 * TOLERANCE[y.dtype], fp8_bounds.promoted if dtype == FP8 else 0)
        assert_close(y, reference(layout.to_dense(), x, None, "relu", scale, residual), tol=tol)
        assert set(calls.pop()) == {name for name, word in words.items() if word is not None}
    y = sk.linear(x, layout, None, "relu", "cuda", residual=residual, beta=0.5, out_dtype=out)
    assert_close(y, reference(layout.to_dense(), x, None, "relu", None, residual, 0.5), tol=2 * TOLERANCE[y.dtype])
    assert set(calls.pop()) == {"residual", "beta", "out_dtype"}


def test_shapes_of_scales_and_residuals() -> None:
    layout = quantised(Case("sp24"), torch.int8)
    x = tokens(6, torch.int8).view(2, 3, K)
    scale, residual = random_dense(2, 3, seed=1).abs(), random_dense(2, 3, N, seed=2)
    want = sk.linear(x, layout, x_scale=scale, residual=residual)
    assert want.shape == (2, 3, N)
    assert torch.equal(sk.linear(x, layout, x_scale=scale[..., None], residual=residual), want)
    one = sk.linear(x, layout, x_scale=torch.tensor(0.5))
    assert torch.equal(one, sk.linear(x, layout, x_scale=torch.full((2, 3), 0.5)))
    assert torch.equal(one, sk.linear(x, layout, x_scale=torch.tensor([0.5])))
    assert torch.equal(sk.linear(x[0, 0], layout, x_scale=scale[0, 0], residual=residual[0, 0]), want[0, 0])
    assert sk.linear(x[:0], layout, x_scale=scale[:0], out_dtype=torch.bfloat16).shape == (0, 3, N)
    strided = torch.stack((residual, residual), -1)[..., 0]
    assert torch.equal(sk.linear(x, layout, x_scale=scale, residual=strided), want)


def test_what_is_refused() -> None:
    layout = Case("csr").pack(Case("csr").dense(N, K))
    x = random_dense(4, K)
    for words, message in (
        ({"x_scale": torch.ones(3)}, r"one scale for each token, shape \(4,\)"),
        ({"x_scale": torch.ones(4, dtype=torch.float16)}, "x_scale must be float32"),
        ({"residual": torch.ones(4, N - 1)}, r"result's shape \(4, 35\), got \(4, 34\)"),
        ({"residual": torch.ones(4, N, dtype=torch.bfloat16)}, r"pass out_dtype=torch.bfloat16"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32, bfloat16 or float16"),
        ({"out_dtype": torch.float64}, "out_dtype must be float32, bfloat16 or float16"),
        ({"x_scale": torch.ones(4, device="meta")}, "x_scale is on meta, x on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            sk.linear(x, layout, **words)
    assert "no x_scale and no residual" in str(
        dispatch._ending.why_not(vendor, Ending(torch.ones(4), torch.ones(4, N), None, True))
    )
    assert dispatch._ending.why_not(vendor, Ending(use_fast_accum=True)) is None


@param(FOUR)
def test_gradients(case: Case) -> None:
    """Of x, values, bias, x_scale and residual, against differences."""
    layout = case.pack(case.dense(6, 8, torch.float64))
    names = ("values", "x", "bias", "residual")
    given = (layout.values, *(random_dense(*s, dtype=torch.float64, seed=7) for s in ((3, 8), (6,), (3, 6))))
    leaves = [t.clone().requires_grad_() for t in given]
    scale = torch.tensor([0.5, 2.0, -1.5])  # powers and halves: float32 that differences in float64 do not change

    def call(values: Tensor, x: Tensor, bias: Tensor, residual: Tensor, scale: Tensor | None = scale) -> Tensor:
        return sk.linear(x, layout.with_values(values), bias, "silu", x_scale=scale, residual=residual)

    assert torch.autograd.gradcheck(call, leaves), names
    assert torch.autograd.gradcheck(lambda *some: call(*some, scale=None), leaves)
    scale.requires_grad_()
    (got,) = torch.autograd.grad(call(*leaves).sum(), scale)
    wide = scale.detach().double().requires_grad_()
    values, x, bias, residual = (leaf.detach() for leaf in leaves)
    dense = layout.with_values(values).unpack()
    y = torch.nn.functional.silu((x @ dense.t()) * wide[:, None] + bias) + residual
    torch.testing.assert_close(got.double(), torch.autograd.grad(y.sum(), wide)[0], rtol=1e-5, atol=1e-5)


@param(FOUR)
def test_gradients_of_other_types(case: Case) -> None:
    """bfloat16 in, float32 out: gradients have their tensors' types and are as good as bfloat16 allows."""
    dense = case.dense(N, K, torch.bfloat16)
    layout = case.pack(dense)
    x = tokens(9, torch.bfloat16).requires_grad_()
    values, residual = layout.values.clone().requires_grad_(), random_dense(9, N).requires_grad_()
    y = sk.linear(x, layout.with_values(values), residual=residual, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    dx, dvalues, dresidual = torch.autograd.grad(y.square().sum(), (x, values, residual))
    assert (dx.dtype, dvalues.dtype, dresidual.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    dy = 2 * (x.detach().double() @ dense.double().t() + residual.detach().double())
    assert_close(dx, dy @ dense.double(), tol=2 * TOLERANCE[torch.bfloat16])
    assert_close(dresidual, dy, torch.float32)


def test_gradients_beside_quantised_tensors() -> None:
    """Bias, scales and residuals of a quantised product have gradients; int8 and float8 have none, and say so."""
    layout, x = quantised(Case("sp24"), torch.int8), tokens(5, torch.int8)
    leaves = [random_dense(*shape, seed=i).requires_grad_() for i, shape in enumerate(((N,), (5,), (5, N)))]
    bias, x_scale, residual = leaves
    y = sk.linear(x, layout, bias, "silu", x_scale=x_scale, residual=residual)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    z = torch.nn.functional.silu((x.float() @ layout.to_dense().t()) * x_scale[:, None] + bias) + residual
    for got, want in zip(grads, torch.autograd.grad(z.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    fp8 = quantised(Case("sp24"), FP8)
    with pytest.raises(NotImplementedError, match=r"x of torch.float8_e4m3fn have no gradient: train in a float"):
        sk.linear(tokens(5, FP8).requires_grad_(), fp8)
    with pytest.raises(NotImplementedError, match=r"the weight's values of torch.float8_e4m3fn have no gradient"):
        sk.linear(tokens(5, torch.float32), fp8.with_values(fp8.values.detach().requires_grad_()))
    given = tokens(5, torch.float32).requires_grad_()  # but float activations of such a weight have one
    (dx,) = torch.autograd.grad(sk.linear(given, fp8).sum(), given)
    assert_close(dx, fp8.to_dense().sum(0).expand(5, K).double(), torch.float32)
    module = sk.SparseLinear.from_packed(fp8, bias.detach())
    assert not module.values.requires_grad
    assert module(given).requires_grad


def test_autocast_spares_quantised_activations() -> None:
    layout, x = quantised(Case("sp24"), FP8), tokens(5, FP8)
    want = sk.linear(x, layout, x_scale=torch.ones(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sk.linear(x, layout, x_scale=torch.ones(5)), want)
        half = sk.linear(random_dense(5, K), layout, residual=torch.zeros(5, N), out_dtype=torch.float32)
    assert half.dtype == torch.float32


@param(FOUR)
def test_opcheck(case: Case) -> None:
    layout = case.pack(case.dense(N, K, torch.bfloat16))
    values, index, scale, dims = layout.parts
    weight = (values, list(index), scale, list(dims))
    x, bias = tokens(5, torch.bfloat16), random_dense(N)
    words = (random_dense(5).abs(), random_dense(5, N), torch.float32, True)
    torch.library.opcheck(MM[case.format], (*weight, x, bias, "gelu", None, *words))
    torch.library.opcheck(MM[case.format], (*weight, x, None, "none", "ref", None, random_dense(5, N).bfloat16()))


def test_opcheck_quantised() -> None:
    for dtype in (torch.int8, FP8):
        layout = quantised(Case("sp24"), dtype)
        values, index, scale, dims = layout.parts
        given = (values, list(index), scale, list(dims), tokens(5, dtype), None, "relu", None)
        # The other utilities compare arguments, which torch cannot do with float8.
        utils = ("test_autograd_registration", "test_faketensor") if dtype == FP8 else "ALL"
        given = (*given, random_dense(5).abs(), None, torch.bfloat16)
        torch.library.opcheck(MM["sp24"], given, test_utils=utils)


@param(FOUR)
def test_compile(case: Case) -> None:
    """Whole graphs, forward and backward; the fake's type is the real one's."""
    torch._dynamo.reset()
    layout = case.pack(case.dense(N, K, torch.bfloat16))
    x, residual = tokens(7, torch.bfloat16), random_dense(7, N)

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return sk.linear(x, layout, None, "silu", residual=residual, out_dtype=torch.float32)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual), call(x, residual))
    x.requires_grad_()
    (got,) = torch.autograd.grad(compiled(x, residual).sum(), x)
    assert torch.equal(got, torch.autograd.grad(call(x, residual).sum(), x)[0])
