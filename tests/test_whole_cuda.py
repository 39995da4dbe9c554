"""What a user does on a GPU, from end to end: compile, capture, convert. Without a card on the CPU, where that goes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case, param
from conftest import ON_CARD
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import tune
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.testing import assert_close

DEVICE = "cuda" if ON_CARD else "cpu"
CASES = (Case("sp24"), Case("bsr", (16, 16)), Case("csr"), Case("bitmap"))
N, K, HALF = 96, 128, torch.bfloat16


def layer(case: Case, bias: bool = True) -> tuple[SparseLinear, nn.Linear]:
    """A sparse layer, and a dense one with the same weight."""
    dense = nn.Linear(K, N, bias=bias, dtype=HALF)
    dense.weight.data.copy_(case.dense(N, K, HALF))
    dense = dense.to(DEVICE)
    options = {"block_size": 16} if case.format == "bsr" else {}
    return SparseLinear.from_dense(dense, format=case.format, **options), dense


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, HALF)


@param(CASES)
def test_training_compiled(case: Case) -> None:
    """Forward and backward without a graph break: what eager code gives."""
    torch._dynamo.reset()
    sparse, _ = layer(case)
    results = []
    for model in (copy.deepcopy(sparse), copy.deepcopy(sparse)):
        call = (
            torch.compile(model, fullgraph=True, backend="inductor" if ON_CARD else "aot_eager") if results else model
        )
        x = tokens(2, 5, K).requires_grad_()
        y = call(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad for p in model.parameters())))
    assert len(results[0]) == 4
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want.double(), tol=1e-2)


@pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
@param(CASES)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_captured_call_reads_new_values(case: Case, m: int) -> None:
    """A CUDA graph of a warm call: the same numbers; after an optimizer's step and another input, those of the new
    ones, once the step has been followed by a call that renews what is derived from the values."""
    sparse, dense = layer(case)
    x = tokens(m, K)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                sparse(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sparse(x)
        for turn in range(3):
            y.fill_(float("nan"))
            graph.replay()
            want = x.double() @ dense.weight.double().t() + dense.bias.double()
            assert_close(y, want, HALF)
            x.copy_(tokens(m, K, seed=10 + turn))
            sparse.values.mul_(2), dense.weight.mul_(2)
            sparse(x)


@pytest.mark.skipif(not ON_CARD, reason="needs a GPU")
@param(CASES)
def test_a_warm_call_waits_for_nothing(case: Case) -> None:
    """No synchronisation in the forward, in the backward, and none when an optimizer has stepped the values."""
    sparse, _ = layer(case)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    x = tokens(70, K).requires_grad_()

    def step() -> None:
        sparse(x).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(), step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(), step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_convert(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A model is measured on the device where it is, with thresholds, and computes the same."""
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path))
    tune.forget()
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(DEVICE, HALF).eval()
    sk.prune.magnitude_(model, "2:4")
    sample = [tokens(m, 256) for m in (1, 64)]
    want = [model(x).detach().double() for x in sample]
    report = sk.convert_(model, sample=[(x,) for x in sample], thresholds=True, progress=False)
    assert all(call.dense_ms > 0 and call.sparse_ms > 0 for row in report.rows for call in row.calls)
    assert {row.calls[0].tokens for row in report.rows if row.calls} == {1}
    for x, right in zip(sample, want, strict=True):
        assert_close(model(x).detach(), right, tol=2e-2)


def test_convolutions() -> None:
    """Every format in one model, images in both orders of memory, forward and backward."""
    for case, order in (
        (Case("sp24"), "rsc"),
        (Case("bsr", (16, 16)), "rsc"),
        (Case("csr"), "crs"),
        (Case("bitmap"), "crs"),
    ):
        dense = nn.Conv2d(32, 48, 3, padding=1, dtype=HALF).to(DEVICE)
        matrix = case.dense(48, 9 * 32, HALF)
        dense.weight.data.copy_(sk.conv.weight_of(matrix, (3, 3), order))
        sparse = SparseConv2d.from_dense(dense, format=case.format, order=order, block_size=16)
        for memory in (torch.contiguous_format, torch.channels_last):
            x = tokens(2, 32, 7, 9).contiguous(memory_format=memory).requires_grad_()
            y = sparse(x)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                want = nn.functional.conv2d(x.double(), dense.weight.double(), dense.bias.double(), padding=1)
            assert_close(y.detach(), want.detach(), HALF)
            (got,) = torch.autograd.grad(y.float().sum(), x)
            (right,) = torch.autograd.grad(want.sum(), x)
            assert_close(got, right.double(), tol=2e-2)
