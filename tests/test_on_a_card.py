"""On a GPU only: warm calls neither wait for it nor make indices, and captured graphs go on with new inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sparsekern import dispatch
from sparsekern._library import MM, MM_T, SDDMM
from sparsekern.bsr import update_topology
from sparsekern.conv import Geometry, library
from sparsekern.layout import Layout
from sparsekern.testing import generator, pack, random_dense, random_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF = torch.bfloat16
M, N, SIDE = 32, 128, 8
CONV = Geometry(3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(format: str, op: str) -> tuple[Layout, Callable[[Tensor], Tensor], Tensor]:
    """A weight, a call of its product and what it is called with."""
    conv = op.startswith("conv")
    k = N * CONV.taps if conv else N
    layout = pack(format, random_weight(format, N, k, HALF, 0.4, 64), 64).to(device="cuda")
    name = "triton" if format == "bsr" else "cuda"
    x = random_dense(*((2, N, SIDE, SIDE) if conv else (M, N)), dtype=HALF, seed=1).cuda()
    other = random_dense(*x.shape, dtype=HALF, seed=2).cuda()
    if conv:
        x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
        reason = library.why_not(name, op, layout, x, CONV)
        calls: dict[str, Callable[[Tensor], Tensor]] = {
            "conv2d": lambda t: library.conv2d(layout, t, None, CONV, "relu", name, True),
            "conv2d_input": lambda t: library.conv2d_input(layout, t, CONV, SIDE, SIDE, name, True),
            "conv2d_weight": lambda t: library.conv2d_weight(layout, t, other, CONV, name, True),
        }
    else:
        reason = dispatch.why_not(name, op, layout, x)
        calls = {
            "mm": lambda t: MM[format](*layout.parts, t, None, "relu", name),
            "mm_t": lambda t: MM_T[format](*layout.parts, t, name),
            "sddmm": lambda t: SDDMM[format](*layout.parts, t, other, name),
        }
    if reason is not None:
        pytest.skip(reason)
    return layout, calls[op], x


OPS = ("mm", "mm_t", "sddmm", "conv2d", "conv2d_input", "conv2d_weight")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("format", ["sp24", "bsr", "csr", "bitmap"])
def test_no_waiting_and_graphs(format: str, op: str) -> None:
    """A warm call does not wait; a captured one gives the same bits as an eager one, on inputs that came later."""
    _, call, x = made(format, op)
    call(x)
    with no_waiting():
        call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    for seed in (3, 4):
        x.copy_(random_dense(*x.shape, dtype=HALF, seed=seed))
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, call(x))


@pytest.mark.parametrize("op", OPS)
def test_new_topology_without_waiting(op: str) -> None:
    """update_topology does not wait for the GPU, and a graph that was captured before goes on with the new topology."""
    layout, call, x = made("bsr", op)
    (nb, kb), nnzb = layout.grid, layout.values.shape[0]
    masks = torch.zeros(2, nb * kb, dtype=torch.bool)
    for turn, mask in enumerate(masks):
        mask[torch.randperm(nb * kb, generator=generator(turn))[:nnzb]] = True
    first, second = masks.view(2, nb, kb).cuda()
    call(x)
    update_topology(layout, first)
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    with no_waiting():
        update_topology(layout, second)
    layout.values.copy_(random_dense(*layout.values.shape, dtype=HALF, seed=5))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, call(x))
