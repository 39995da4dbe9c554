"""CUDA graphs: what a captured call leaves behind for others, and what its replays see."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import _plan, _workspace
from sparsekern._plan import keep, overwrite, plan
from sparsekern.sp24 import cuda, pack
from sparsekern.testing import random_dense

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """Capturing as torch sees it, without a card: what was captured is done by `replay`, and nothing before."""

    def __init__(self) -> None:
        self.capturing, self.work = False, list[Callable[[], None]]()

    def do(self, work: Callable[[], None]) -> None:
        self.work.append(work) if self.capturing else work()

    def __enter__(self) -> Graph:
        self.capturing, self.work = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.capturing = False

    def replay(self) -> None:
        for work in self.work:
            work()


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    made = Graph()
    for module in (_plan, _workspace, cuda):
        monkeypatch.setattr(module, "capturing", lambda _: made.capturing)
    return made


class Doubled:
    """A weight, and a plan that is twice its contents; `result` is what a kernel would make of the plan."""

    def __init__(self, graph: Graph, grad: bool, live: bool = True, renews: bool = True) -> None:
        self.graph, self.live = graph, live
        self.weight = torch.ones(3, requires_grad=grad)
        self.again = self._again if renews else None
        self.made = 0

    def _make(self) -> Tensor:
        self.made += 1
        new = torch.full((3,), torch.nan)
        self._again(new)
        return new

    def _again(self, old: Tensor) -> None:
        self.graph.do(lambda: overwrite(old, 2 * self.weight.detach()))

    def plan(self) -> Tensor:
        return plan(self.weight, "doubled", self._make, self.again, live=self.live)

    def call(self) -> Tensor:
        """A call's result, which is there at once, or after a replay."""
        result, of = torch.full((3,), torch.nan), self.plan()
        self.graph.do(lambda: overwrite(result, of))
        return result

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("renews", [False, True])
def test_replays_and_calls_see_every_change(graph: Graph, warm: bool, renews: bool) -> None:
    """A weight that is trained, outside and inside of the graph; calls before, between and after replays."""
    of = Doubled(graph, grad=True, renews=renews)
    if warm:
        assert of.call().tolist() == [2, 2, 2]
    with graph:
        captured = of.call()
    assert of.call().tolist() == [2, 2, 2], "what was captured was not done: a call makes its own"
    graph.replay()
    assert captured.tolist() == [2, 2, 2]
    of.set(5)  # a step outside of the graph
    graph.replay()
    assert captured.tolist() == [10, 10, 10]
    assert of.call().tolist() == [10, 10, 10]
    of.weight.untyped_storage().copy_(torch.full((3,), 7.0).untyped_storage())  # and one inside: no version tells
    assert of.call().tolist() == [14, 14, 14]
    assert of.call().tolist() == [14, 14, 14]
    graph.replay()
    assert captured.tolist() == [14, 14, 14]


def test_a_weight_that_changed_without_a_gradient(graph: Graph) -> None:
    """A moving average, say: it has changed after its plan was made, so replays look again."""
    of = Doubled(graph, grad=False)
    of.call()
    of.set(3)
    assert of.call().tolist() == [6, 6, 6]
    with graph:
        captured = of.call()
    of.set(4)
    graph.replay()
    assert captured.tolist() == [8, 8, 8]


def test_a_constant_weight_is_not_repacked(graph: Graph) -> None:
    of = Doubled(graph, grad=False)
    kept = of.plan()
    with graph:
        captured = of.call()
    assert len(graph.work) == 1, "the call itself"
    graph.replay()
    assert captured.tolist() == [2, 2, 2]
    assert of.plan() is kept
    assert of.made == 1


def test_a_first_call_in_a_graph_leaves_no_memory_behind(graph: Graph) -> None:
    of = Doubled(graph, grad=False)
    with graph:
        first, second = of.plan(), of.plan()
    assert of.made == 2
    kept = of.plan()
    assert all(kept is not other for other in (first, second))
    assert kept.tolist() == [2, 2, 2], "before any replay"
    assert of.plan() is kept
    assert of.made == 3, "a constant weight's version is still believed"


def test_a_graph_for_inference_that_repacks_is_told_of(graph: Graph) -> None:
    of = Doubled(graph, grad=True)
    of.call()
    with graph, torch.inference_mode(), pytest.warns(UserWarning, match=r"call requires_grad_\(False\)"):
        of.plan()
    constant = Doubled(graph, grad=False)
    constant.call()
    with graph, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        constant.plan()


@pytest.mark.parametrize("renews", [False, True])
def test_what_follows_from_a_topology(graph: Graph, renews: bool) -> None:
    """Read as it is where it is up to date, whatever happened before; else made in the graph and made again outside."""
    of = Doubled(graph, grad=False, live=False, renews=renews)
    of.call()
    of.set(2)
    of.call()
    made = of.made
    with graph:
        of.call()
    assert (of.made, len(graph.work)) == (made, 1)
    of.set(3)
    with graph:
        captured = of.call()
    assert len(graph.work) == 2
    assert of.call().tolist() == [6, 6, 6], "not done by the capture, so done here"
    graph.replay()
    assert captured.tolist() == [6, 6, 6]


def test_a_plan_made_with_its_tensor(graph: Graph) -> None:
    """In a graph too it is known afterwards: both are the graph's memory."""
    weight = torch.ones(3)
    with graph:
        keep(weight, "with it", made := torch.zeros(3))
        assert plan(weight, "with it", mock.Mock(side_effect=AssertionError), live=True) is made


def test_nobody_is_asked_on_a_cpu() -> None:
    """Of tensors elsewhere than on a GPU CUDA hears nothing."""
    of = Doubled(Graph(), grad=True)
    with mock.patch("torch.cuda.is_current_stream_capturing", side_effect=AssertionError("asked")):
        assert of.call().tolist() == [2, 2, 2]
        of.set(2)
        assert of.call().tolist() == [4, 4, 4]


def test_kept_tensors_are_overwritten_in_every_mode() -> None:
    """The dense twin of a layer that runs dense above some size, first used under inference_mode."""
    layer = sk.SparseLinear.from_dense(nn.Linear(64, 32), format="sp24", prune=True).requires_grad_(False)
    layer.dense_above = 1
    x = random_dense(4, 64)
    with torch.inference_mode():
        before = layer(x)
    layer.values.mul_(2)
    after = layer(x)
    assert torch.allclose(after - layer.bias, 2 * (before - layer.bias), atol=1e-5)


def test_workspaces(graph: Graph) -> None:
    """Calls outside of graphs share a set on a stream; one that is captured has its own, of zeros that are there."""
    x = torch.zeros(1)
    _workspace._reserve.cache_clear()
    _workspace._workspace.cache_clear()
    with graph:
        assert _workspace.workspace(x, 1, 3, stream=1)[1].tolist() == [0] * 3  # no call outside of graphs so far
    mine = _workspace.workspace(x, 100, 10, stream=1)
    assert [a.data_ptr() for a in _workspace.workspace(x, 50, 5, stream=1)] == [t.data_ptr() for t in mine]
    assert _workspace.workspace(x, 50, 5, stream=2)[1].data_ptr() != mine[1].data_ptr()
    with graph, mock.patch.object(torch, "zeros", side_effect=AssertionError("a node of the graph")):
        sets = [_workspace.workspace(x, 200, 10, stream=1) for _ in range(2)]
    assert len({t.data_ptr() for pair in (*sets, mine) for t in pair}) == 6
    assert all(not counters.any() and counters.dtype == torch.int32 for _, counters in sets)
    assert all(words.numel() == 200 and words.dtype == torch.float32 for words, _ in sets)
    after = _workspace.workspace(x, 100, 10, stream=1)
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in mine], "a capture leaves the shared set alone"
    grown = _workspace.workspace(x, 1000, 10000, stream=1)
    assert grown[0].numel() >= 1000
    assert grown[1].numel() >= 10000
    assert not grown[1].any()


def test_the_reserve_of_zeros(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """What captured calls have taken stays theirs; calls outside of graphs fill it up, and a graph helps itself."""
    monkeypatch.setattr(_workspace._Reserve, "SIZE", 16)
    _workspace._reserve.cache_clear()
    _workspace._workspace.cache_clear()
    x, seen = torch.zeros(1), []
    for _ in range(5):
        _workspace.workspace(x, 1, 1, stream=1)
        with graph:
            seen += [_workspace.workspace(x, 1, 6, stream=1)[1] for _ in range(4)]
    places = [t.data_ptr() + 4 * i for t in seen for i in range(6)]
    assert len(set(places)) == len(places)
    assert not any(t.any() for t in seen)
    _workspace._reserve.cache_clear()
    _workspace._workspace.cache_clear()


def test_whether_a_mask_is_transposable_is_not_asked_in_a_graph(graph: Graph) -> None:
    """It would wait for the GPU. The answer that stands in for it is not remembered."""
    layout = pack(random_dense(8, 8).to(torch.bfloat16), prune=True)
    with graph, mock.patch.object(cuda.repack, "transpose", side_effect=AssertionError("asked")):
        assert not cuda.transposable(layout)
    with mock.patch.object(cuda.repack, "transpose"):
        assert cuda.transposable(layout)


def _graphed(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run()
    return captured, out


@pytest.fixture
def layer() -> sk.SparseLinear:
    dense = nn.Linear(256, 192, device="cuda", dtype=torch.bfloat16)
    return sk.SparseLinear.from_dense(dense, format="sp24", prune=True)


@on_a_card
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("m", [4, 300])
def test_a_captured_forward_sees_the_weight(layer: sk.SparseLinear, m: int, warm: bool) -> None:
    """With a step outside of the graph between two replays, and calls outside of it."""
    x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
    layer.backend = "cuda"
    with torch.no_grad():
        if warm:
            layer(x)
        torch.cuda.synchronize()
        captured, out = _graphed(lambda: layer(x))
        want = layer(x)
        captured.replay()
        assert torch.equal(out, want)
        layer.values.mul_(-3)
        captured.replay()
        changed = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
        sk.testing.assert_close(out, changed, torch.bfloat16)
        assert torch.equal(out, layer(x))


@on_a_card
def test_a_captured_training_step(layer: sk.SparseLinear) -> None:
    """Forward, backward and step in one graph: as many eager steps from the same beginning give the same weight."""
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    layer.backend = "cuda"
    twin = sk.SparseLinear.from_packed(layer.packed.map(lambda t: t.detach().clone()), layer.bias.detach().clone())
    twin.backend = "cuda"

    def step(module: sk.SparseLinear, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = module(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    mine, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (layer, twin))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, mine)
    torch.cuda.current_stream().wait_stream(side)
    captured, _ = _graphed(lambda: step(layer, mine))
    for _ in range(5):
        captured.replay()
    for _ in range(8):
        step(twin, other)
    sk.testing.assert_close(layer.values, twin.values.detach(), torch.bfloat16)
    with torch.no_grad():
        sk.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.dense_weight(), layer.bias))


@on_a_card
def test_graphs_of_one_stream_do_not_share_sums(layer: sk.SparseLinear) -> None:
    """Two graphs, captured one after the other and replayed beside each other on two streams."""
    layer.requires_grad_(False)
    layer.backend = "cuda"
    xs = [torch.randn(4, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    want = [layer(x) for x in xs]
    graphs = [_graphed(lambda x=x: layer(x)) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(200):
        for (captured, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                captured.replay()
    torch.cuda.synchronize()
    for (_, out), y in zip(graphs, want, strict=True):
        assert torch.equal(out, y)
