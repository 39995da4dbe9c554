"""Each thing that torch's own sparse CPU tensors cannot do in a linear layer, done here.

The rows are those of a table measured on torch 2.13 (CSR and BSR tensors on CPU): half precision and autocast,
gradients, optimizer steps, deepcopy, compile, batches, ragged blocks, conversion and saving.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cases import FLOATS, FOUR, QUANTISED, Case, param
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import testing
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.testing import assert_close, random_dense, reference_mm

N, K = 20, 30


def as_parameter(case: Case, dense: Tensor, bias: Tensor) -> nn.Module:
    """nn.Linear whose weight is a SparseTensor: the way of torch's own semi-structured tensors."""
    linear = nn.Linear(dense.shape[1], dense.shape[0], dtype=dense.dtype)
    linear.weight = nn.Parameter(sk.SparseTensor(case.pack(dense)))
    linear.bias = nn.Parameter(bias.clone())
    return linear


def as_module(case: Case, dense: Tensor, bias: Tensor) -> nn.Module:
    return SparseLinear.from_packed(case.pack(dense), bias.clone())


BOTH = pytest.mark.parametrize("make", [as_parameter, as_module], ids=["nn.Linear", "SparseLinear"])


def made(make, case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    dense, bias = case.dense(N, K, dtype), random_dense(N, dtype=dtype, seed=3)
    return make(case, dense, bias), dense, bias


def weight_of(module: nn.Module) -> Tensor:
    """The dense weight now."""
    return (module.weight if isinstance(module, nn.Linear) else module.packed).to_dense().detach()


def weight_gradient(module: nn.Module) -> Tensor:
    """The gradient, unpacked: it must be as sparse as the weight is."""
    if isinstance(module, nn.Linear):
        assert isinstance(module.weight.grad, sk.SparseTensor)
        return module.weight.grad.packed.unpack()
    assert module.values.grad.shape == module.values.shape
    return module.packed.with_values(module.values.grad).unpack()


@BOTH
@param(FOUR)
@param((*FLOATS, torch.float64), "dtype")
def test_linear_of_every_type_and_batching(make, case: Case, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    module, dense, bias = made(make, case, dtype)
    for lead in ((), (4,), (2, 3), (2, 1, 3), (0,)):
        x = random_dense(*lead, K, dtype=dtype, seed=1)
        assert_close(module(x), reference_mm(dense, x, bias), dtype)


@param(QUANTISED)
def test_int8(case: Case) -> None:
    dense, scale = case.dense(N, K, torch.int8), testing.random_scale(N)
    module = SparseLinear.from_packed(case.pack(dense, scale), torch.zeros(N))
    wide = dense.double() * scale.double()[:, None]
    for dtype in (torch.int8, *FLOATS):
        x = random_dense(3, K, dtype=dtype, seed=1)
        assert_close(module(x), reference_mm(wide, x), torch.float32 if dtype == torch.int8 else dtype)
    assert not module.values.requires_grad
    assert module.bfloat16().scale.dtype == torch.float32, "casting a model is about values, not about scales"


@BOTH
@param(FOUR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make, case: Case, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    module, dense, bias = made(make, case)
    x = random_dense(5, K, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = module(x)
    assert y.dtype == dtype
    right = reference_mm(dense.to(dtype), x.detach().to(dtype), bias.to(dtype))
    assert_close(y, right, dtype)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert weight_gradient(module).dtype == torch.float32, "master weights keep their type"


@BOTH
@param(FOUR)
def test_backward(make, case: Case) -> None:  # type: ignore[no-untyped-def]
    """Gradients of input, weight (sparse) and bias."""
    module, dense, bias = made(make, case)
    x = random_dense(7, K, seed=1).requires_grad_()
    dy = random_dense(7, N, seed=2)
    module(x).backward(dy)
    w, x64, b = (t.detach().double().requires_grad_() for t in (dense, x, bias))
    (x64 @ w.t() + b).backward(dy.double())
    stored = case.topology(dense)
    gradient = weight_gradient(module)
    assert_close(x.grad, x64.grad, torch.float32)
    assert_close(gradient[stored], w.grad[stored], torch.float32)
    assert_close(module.bias.grad, b.grad, torch.float32)


@BOTH
@param(FOUR)
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
    ],
    ids=["SGD", "SGD-nesterov", "AdamW", "AdamW-foreach", "Adam-amsgrad", "RMSprop", "Adagrad"],
)
def test_optimizer_steps(make, case: Case, optimizer) -> None:  # type: ignore[no-untyped-def]
    """Three steps equal those of a dense layer whose gradient is masked; what was pruned stays pruned."""
    module, dense, bias = made(make, case)
    twin = nn.Linear(K, N)
    twin.weight, twin.bias = nn.Parameter(dense.clone()), nn.Parameter(bias.clone())
    stored = (
        module.packed.with_values(torch.ones_like(module.packed.values)) if isinstance(module, SparseLinear) else None
    )
    layout = module.weight.packed if stored is None else module.packed
    mask = layout.with_values(torch.ones_like(layout.values.detach())).unpack() != 0
    twin.weight.register_hook(lambda grad: grad * mask)
    ours, theirs = optimizer(module.parameters()), optimizer(twin.parameters())
    for step in range(3):
        x, dy = random_dense(6, K, seed=step), random_dense(6, N, seed=step + 9)
        for model, opt in ((module, ours), (twin, theirs)):
            opt.zero_grad(set_to_none=step != 1)
            model(x).backward(dy)
            opt.step()
    torch.testing.assert_close(weight_of(module), twin.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias, twin.bias, rtol=1e-4, atol=1e-5)
    assert not weight_of(module)[~mask].any()
    copy.deepcopy(ours.state_dict())


@BOTH
@param(FOUR)
def test_gradient_clipping(make, case: Case) -> None:  # type: ignore[no-untyped-def]
    module, _, _ = made(make, case)
    module(random_dense(6, K)).sum().backward()
    norm = (weight_gradient(module).square().sum() + module.bias.grad.square().sum()).sqrt()
    assert nn.utils.clip_grad_norm_(module.parameters(), 0.5).item() == pytest.approx(norm.item(), rel=1e-5)
    after = (weight_gradient(module).square().sum() + module.bias.grad.square().sum()).sqrt()
    assert after.item() == pytest.approx(0.5, rel=1e-4)


@BOTH
@param(FOUR)
def test_deepcopy(make, case: Case) -> None:  # type: ignore[no-untyped-def]
    module, dense, _ = made(make, case)
    twin = copy.deepcopy(module)
    x = random_dense(4, K)
    assert torch.equal(twin(x), module(x))
    twin(x).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert torch.equal(weight_of(module), dense), "the copy shares nothing"
    assert not torch.equal(weight_of(twin), dense)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in module.named_parameters()]


@BOTH
@param(FOUR)
def test_save_and_load(make, case: Case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """torch.save of a state dict and back with weights_only=True."""
    module, dense, bias = made(make, case)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    other = make(case, dense * 0 if isinstance(module, SparseLinear) else dense * 2, bias * 0)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    other.load_state_dict(state)
    x = random_dense(4, K)
    assert torch.equal(other(x), module(x))
    assert other.bias.requires_grad


@param(FOUR)
def test_safetensors(case: Case, tmp_path: Path) -> None:
    module, dense, bias = made(as_module, case)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    other = as_module(case, dense * 0, bias * 0)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = random_dense(4, K)
    assert torch.equal(other(x), module(x))


@BOTH
@param(FOUR)
def test_compile_fullgraph(make, case: Case) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    module, dense, bias = made(make, case)
    x = random_dense(4, K, seed=1).requires_grad_()
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert_close(y, reference_mm(dense, x.detach(), bias), torch.float32)
    y.sum().backward()
    eager = x.grad.clone()
    x.grad = None
    module.zero_grad()
    module(x).sum().backward()
    assert_close(eager, x.grad.double(), torch.float32)


@BOTH
@param(FOUR)
def test_casts(make, case: Case) -> None:  # type: ignore[no-untyped-def]
    module, dense, bias = made(make, case)
    for dtype in (torch.bfloat16, torch.float64):
        cast = copy.deepcopy(module).to(dtype)
        x = random_dense(4, K, dtype=dtype)
        assert_close(cast(x), reference_mm(dense.to(dtype), x, bias.to(dtype)), dtype)


def test_sampled_product_in_halves() -> None:
    """torch.sparse.sampled_addmm has no bfloat16 on CPU; the gradient of a bfloat16 weight is one."""
    for case in FOUR:
        for dtype in (torch.bfloat16, torch.float16):
            dense = case.dense(N, K, dtype)
            leaf = sk.SparseTensor(case.pack(dense), requires_grad=True)
            x, dy = random_dense(9, K, dtype=dtype, seed=1), random_dense(9, N, dtype=dtype, seed=2)
            sk.linear(x, leaf).backward(dy)
            stored = case.topology(dense)
            right = testing.reference_sddmm(dy, x)
            assert_close(leaf.grad.packed.unpack()[stored], right[stored], dtype)


def test_blocks_that_do_not_divide() -> None:
    dense = testing.random_weight("bsr", 17, 35, block=(8, 16))
    with pytest.raises(RuntimeError):
        dense.to_sparse_bsr((8, 16))
    w = sk.to_block_sparse(dense, (8, 16))
    assert torch.equal(w.to_dense(), dense)
    x = random_dense(5, 35)
    assert_close(sk.linear(x, w), reference_mm(dense, x), torch.float32)


def test_bsr_to_csr() -> None:
    dense = testing.random_weight("bsr", 16, 32, block=(4, 4))
    blocked = dense.to_sparse_bsr((4, 4))
    assert torch.equal(sk.to_csr(blocked).to_dense(), dense)
    assert torch.equal(sk.to_csr(sk.to_block_sparse(blocked, 4)).to_dense(), dense)


def test_semi_structured_on_cpu() -> None:
    """torch.sparse.to_sparse_semi_structured needs a GPU; here it runs, and in float32, too."""
    for dtype in FLOATS:
        dense = testing.random_weight("sp24", 64, 128, dtype)
        linear = nn.Linear(128, 64, bias=False, dtype=dtype)
        linear.weight = nn.Parameter(sk.to_sparse_semi_structured(dense))
        x = random_dense(5, 128, dtype=dtype)
        assert_close(linear(x), reference_mm(dense, x), dtype)


@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_conv2d(format: str) -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1)
    weight = testing.random_weight("sp24", 12, 72, density=0.5)
    conv.weight = nn.Parameter(weight.view(12, 8, 3, 3))
    sparse = SparseConv2d.from_dense(conv, format=format, **({"block_size": 4} if format == "bsr" else {}))
    x = random_dense(2, 8, 9, 7)
    right = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert_close(sparse(x), right, torch.float32)


@param(FOUR)
def test_matrix_products_with_batches(case: Case) -> None:
    """sparse @ 3-D dense, dense @ sparse, mm, addmm: torch raises on most of these."""
    dense = case.dense(N, K)
    w = sk.SparseTensor(case.pack(dense))
    x = random_dense(2, K, 5, seed=1)
    assert_close(w @ x, dense.double() @ x.double(), torch.float32)
    assert_close(x.transpose(1, 2) @ w.t(), x.double().transpose(1, 2) @ dense.double().t(), torch.float32)
    assert_close(torch.mm(w, x[0]), dense.double() @ x[0].double(), torch.float32)
    assert_close(w @ x[0, :, 0], dense.double() @ x[0, :, 0].double(), torch.float32)
    c = random_dense(N, 5, seed=2)
    right = 0.5 * c.double() + 2 * (dense.double() @ x[0].double())
    assert_close(torch.addmm(c, w, x[0], beta=0.5, alpha=2), right, torch.float32)
