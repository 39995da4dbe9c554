"""torch.set_default_device says where a user's new tensors go, not where a call on existing ones keeps its own.

The default here is "meta", which has no memory: whatever the package makes without saying where fails or computes
nothing. On CPU tensors that stands for a default of "cuda", whose addresses no CPU kernel may see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import QUANTISED, Case, param
from conftest import BACKENDS, ON_CARD, SCHEDULES, Backend, host_isas, running_on_device
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import testing
from sparsekern.conv import weight_of
from sparsekern.functional import conv2d
from sparsekern.nn import DynamicSparseLinear, SparseConv2d, SparseLinear
from sparsekern.sp24.dynamic import MASKS
from sparsekern.testing import assert_close, random_dense, reference_mm, reference_mm_t, reference_sddmm

CASES = (Case("sp24"), Case("bsr", (16, 16)), Case("csr"), Case("bitmap"))
CPU = [backend for backend in BACKENDS if backend.device == "cpu" and backend.isa in (None, *host_isas()[-1:])]


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=CPU, ids=str)
def chosen(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param.name == "cuda":
        with running_on_device(request.getfixturevalue("device_module"), SCHEDULES[-1]):
            yield request.param
    else:
        yield request.param


@param(CASES)
@param((torch.float32, torch.float16), "dtype")
def test_products(chosen: Backend, case: Case, dtype: torch.dtype) -> None:
    """Few tokens and many, so that every plan is made; several calls, so that copies in another order are."""
    dense = case.dense(70, 144, dtype)
    for m in (1, 70):
        x, dy = random_dense(m, 144, dtype=dtype, seed=1), random_dense(m, 70, dtype=dtype, seed=2)
        with elsewhere():
            layout = case.pack(dense)
            layout.check()
            back = layout.unpack()
            runs = {op: chosen.runs(op, layout, t) for op, t in (("mm", x), ("mm_t", dy), ("sddmm", x))}
            results = []
            for _ in range(3):
                y = chosen.mm(layout, x, None, "gelu") if runs["mm"] else None
                dx = chosen.mm_t(layout, dy) if runs["mm_t"] else None
                dw = chosen.sddmm(layout, dy, x) if runs["sddmm"] else None
                results = [y, dx, dw]
        y, dx, dw = results
        assert torch.equal(back, dense)
        if y is not None:
            assert_close(y, reference_mm(dense, x, None, "gelu"), dtype)
        if dx is not None:
            assert_close(dx, reference_mm_t(dense, dy), dtype)
        if dw is not None:
            assert_close(dw, layout.sample(reference_sddmm(dy, x)), dtype)


@param([case for case in QUANTISED if case.block in ((1, 1), (16, 16))])
def test_quantised(case: Case) -> None:
    dense, scale, x = case.dense(33, 64, torch.int8), testing.random_scale(33), random_dense(5, 64, seed=1)
    with elsewhere():
        y = sk.linear(x, case.pack(dense, scale))
    assert_close(y, reference_mm(dense.double() * scale.double()[:, None], x), torch.float32)


@param(CASES)
def test_modules_train(case: Case) -> None:
    """from_dense, forward, backward, an optimizer's step, forward again, to_dense."""
    dense = nn.Linear(48, 32)
    dense.weight.data.copy_(case.dense(32, 48))
    x = random_dense(9, 48, seed=1)
    with elsewhere():
        sparse = SparseLinear.from_dense(dense, format=case.format, block_size=16)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            y = sparse(given)
            y.square().sum().backward()
            optimizer.step()
        after, weight = sparse(x), sparse.packed.to_dense()
    assert_close(after.detach(), reference_mm(weight.detach(), x, sparse.bias.detach()), torch.float32)
    assert given.grad is not None
    assert given.grad.device.type == "cpu"


@pytest.mark.skipif(ON_CARD, reason="there tests/test_sp24_grad_cuda.py keeps its tensors on the card")
@pytest.mark.parametrize("backend", ["cuda", None])
@pytest.mark.parametrize("mask", MASKS)
def test_dynamic_training(device_module: Any, mask: str, backend: str | None) -> None:
    dtype = torch.float16 if backend else torch.float32
    layer, x = DynamicSparseLinear(64, 72, dtype=dtype, mask=mask, decay=0.1), random_dense(5, 64, dtype=dtype, seed=1)
    layer.backend = backend
    with running_on_device(device_module, SCHEDULES[-1]), elsewhere():
        y = layer(x)
        y.sum().backward()
        kept = layer.packed().unpack()
    assert_close(y.detach(), reference_mm(kept, x, layer.bias.detach()), dtype)
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


@param(CASES)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(case: Case, last: bool, stride: int) -> None:
    order = "rsc" if case.format in ("sp24", "bsr") else "crs"
    matrix = case.dense(32, 9 * 16)
    dense = nn.Conv2d(16, 32, 3, stride, padding=1)
    dense.weight.data.copy_(weight_of(matrix, (3, 3), order))
    x = random_dense(2, 16, 7, 9, seed=1)
    x = x.to(memory_format=torch.channels_last) if last else x
    want = dense.double()(x.double())
    dense.float()
    with elsewhere():
        sparse = SparseConv2d.from_dense(dense, format=case.format, order=order, block_size=16)
        for _ in range(2):
            given = x.clone().requires_grad_()
            y = sparse(given)
            y.sum().backward()
    assert_close(y.detach(), want.detach(), torch.float32)
    assert given.grad is not None
    assert sparse.values.grad is not None


@pytest.mark.skipif(ON_CARD, reason="there tests/test_conv_*_cuda.py keep their tensors on the card")
def test_convolutions_on_a_gpu(device_module: Any) -> None:
    """The emulated kernels of rows, and those of 2:4."""
    for case, dtype in ((Case("csr"), torch.float32), (Case("bitmap"), torch.float16), (Case("sp24"), torch.float16)):
        matrix, x = case.dense(32, 9 * 16, dtype, 0.2), random_dense(1, 16, 6, 7, dtype=dtype, seed=1)
        order = "rsc" if case.format == "sp24" else "crs"
        want = nn.functional.conv2d(x.double(), weight_of(matrix, (3, 3), order).double(), padding=1)
        with running_on_device(device_module, SCHEDULES[-1]), elsewhere():
            y = conv2d(x, case.pack(matrix), kernel_size=3, padding=1, order=order, backend="cuda")
        assert_close(y, want, dtype)


PRUNED: dict[str, Callable[[nn.Module], Any]] = {
    "magnitude": lambda model: sk.prune.magnitude_(model, "2:4"),
    "convert": lambda model: sk.convert_(model, format="csr", policy="always", progress=False),
}


@pytest.mark.parametrize("how", PRUNED)
def test_models(how: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), random_dense(3, 32, seed=1)
    with elsewhere():
        PRUNED[how](model)
        y: Tensor = model(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, model(x))
