"""The two roads of a call: straight to the kernel where nothing watches, through a torch op where something does.

Both must compute the same; whatever traces, records, transforms or replaces must meet the op, as if there were no
other road; and what a module computes must follow every change of its parts, because nothing of a call is kept.
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FOUR, Case, param
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from sparsekern import _ext, _library
from sparsekern.conv import library as convolution
from sparsekern.nn import SparseConv2d, SparseLinear
from sparsekern.nn.base import SparseModule
from sparsekern.testing import host_isa, random_dense

N, K = 12, 16


class Ops(list):
    """The names of the ops that were called, in order."""


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Ops:
    called = Ops()
    tables = (_library.MM, _library.MM_T, _library.SDDMM)
    for table in (*tables, convolution.CONV2D, convolution.CONV2D_INPUT, convolution.CONV2D_WEIGHT):
        for format, op in table.items():

            def call(*args: Any, op: Any = op) -> Any:
                called.append(op._schema.name.removeprefix("sparsekern::"))
                return op(*args)

            monkeypatch.setitem(table, format, call)
    return called


def linear(case: Case) -> tuple[SparseModule, Tensor]:
    module = SparseLinear.from_packed(case.pack(case.dense(N, K)), random_dense(N, seed=1), "relu")
    return module, random_dense(3, K, seed=2)


def conv(case: Case) -> tuple[SparseModule, Tensor]:
    dense = nn.Conv2d(4, N, 2)
    dense.weight = nn.Parameter(case.dense(N, K).view(N, 4, 2, 2))
    module = SparseConv2d.from_dense(dense, format=case.format, block_size=case.block, order="crs")
    module.activation = "relu"
    return module, random_dense(2, 4, 5, 6, seed=2)


BOTH = pytest.mark.parametrize("make", [linear, conv], ids=["linear", "conv"])


def op_of(module: SparseModule) -> str:
    return f"{module.format}_{'mm' if isinstance(module, SparseLinear) else 'conv2d'}"


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


# Both roads agree ---------------------------------------------------------------------------------------------


@BOTH
@param(FOUR)
def test_plain_calls_go_straight_and_compute_the_same(make: Any, case: Case, ops: Ops) -> None:
    module, x = make(case)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            straight = module(x)
            assert ops == []
            with Recorder():
                watched = module(x)
            assert torch.equal(straight, watched)
            assert straight.requires_grad == watched.requires_grad == (context is torch.enable_grad)
            assert straight.is_inference() == watched.is_inference()
            assert op_of(module) in ops
            ops.clear()
    with torch.inference_mode():
        frozen = x.clone()
    with torch.no_grad():
        assert torch.equal(module(frozen), module(x))
        assert torch.equal(module(nn.Parameter(x)), module(x))
    assert ops == []


@BOTH
@param(FOUR)
def test_gradients_go_straight_and_are_the_same(make: Any, case: Case, ops: Ops) -> None:
    module, x = make(case)
    x.requires_grad_()
    leaves = (x, *module.parameters())
    straight = torch.autograd.grad(module(x).square().sum(), leaves)
    assert ops == []
    with Recorder():
        watched = torch.autograd.grad(module(x).square().sum(), leaves)
    assert len(ops) == 3, "the product and the two of its gradient"
    assert all(map(torch.equal, straight, watched))
    ops.clear()
    y = module(x).square().sum()
    with Recorder() as recorder:  # only the backward pass is watched
        assert all(map(torch.equal, torch.autograd.grad(y, leaves), straight))
    assert sum("sparsekern" in name for name in recorder.seen) == 2


@param(FOUR)
def test_functions_go_straight(case: Case, ops: Ops) -> None:
    w = sk.SparseTensor(case.pack(case.dense(N, K)))
    x, y = random_dense(2, 3, K, seed=1), random_dense(2, 3, N, seed=2)
    calls: list[Callable[[], Tensor]] = [
        lambda: sk.linear(x, w, None, "gelu"),
        lambda: sk.linear(x[0, 0], w),
        lambda: sk.matmul(y, w),
        lambda: w @ x.transpose(1, 2),
        lambda: nn.functional.linear(x, w),
    ]
    straight = [call() for call in calls]
    assert ops == []
    with Recorder():
        watched = [call() for call in calls]
    assert len(ops) == len(calls)
    assert all(map(torch.equal, straight, watched))


# Whatever watches sees the op ---------------------------------------------------------------------------------


def profiled(module: nn.Module, x: Tensor) -> Tensor:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = module(x)
    assert f"sparsekern::{op_of(module)}" in {event.key for event in profile.key_averages()}  # type: ignore[arg-type]
    return y


def traced(module: nn.Module, x: Tensor) -> Tensor:
    graph = torch.jit.trace(module, (torch.zeros_like(x),), check_trace=False)
    return graph(x)  # a road around the op would have frozen the result for zeros


def fx(module: nn.Module, x: Tensor) -> Tensor:
    graph = make_fx(module)(torch.zeros_like(x))
    assert any(f"sparsekern.{op_of(module)}" in str(node.target) for node in graph.graph.nodes)  # type: ignore[arg-type]
    return graph(x)


def functionalized(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functionalize(module)(x)


def under(context: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        with context():
            return module(x)

    return run


def exporting(module: nn.Module, x: Tensor) -> Tensor:
    program = torch.export.export(module, (torch.zeros_like(x),), strict=False)
    return program.module()(x)


def lazily(t: Tensor) -> Tensor:
    """Reads as t, but its memory holds -t."""
    lazy = torch.complex(t, -t).conj().imag
    assert lazy.is_neg()
    return lazy


def replaced(name: str, by: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A call with one parameter replaced by by(parameter)."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        kept = getattr(module, name)
        setattr(module, name, nn.Parameter(by(kept), requires_grad=False))
        y = module(x).as_subclass(Tensor)
        setattr(module, name, kept)
        return y

    return run


class Labelled(Tensor):
    """A subclass with nothing of its own."""


def subclassed(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x.as_subclass(Labelled))
    assert type(y) is Labelled
    return y.as_subclass(Tensor)


WATCHERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "dispatch mode": under(Recorder),
    "function mode": under(Passing),
    "default device": under(lambda: torch.device("cpu")),
    "profiler": profiled,
    "legacy profiler": under(torch.autograd.profiler.profile),
    "python dispatcher": under(enable_python_dispatcher),
    "jit.trace": traced,
    "make_fx": fx,
    "functionalize": functionalized,
    "export": exporting,
    "lazily negated x": lambda module, x: module(lazily(x)),
    "lazily negated weight": replaced("values", lazily),
    "lazily negated bias": replaced("bias", lazily),
    "x of a subclass": subclassed,
    "weight of a subclass": replaced("values", lambda t: t.detach().as_subclass(Labelled)),
    "bias of a subclass": replaced("bias", lambda t: t.detach().as_subclass(Labelled)),
}


@BOTH
@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_what_watches_sees_the_op(make: Any, watcher: str, ops: Ops) -> None:
    for case in FOUR:
        module, x = make(case)
        module.requires_grad_(False)
        ops.clear()
        out = WATCHERS[watcher](module, x)
        assert op_of(module) in ops
        assert torch.equal(out, module(x))


@BOTH
def test_lazy_zeros(make: Any, ops: Ops) -> None:
    """A tensor of zeros without memory: the dispatcher must fill it first."""
    module, x = make(Case("csr"))
    with torch.no_grad():
        assert torch.equal(module(torch._efficientzerotensor(x.shape)), module(torch.zeros_like(x)))
    assert ops == [op_of(module)]


@BOTH
def test_autocast(make: Any, ops: Ops) -> None:
    module, x = make(Case("csr"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert ops == [op_of(module)]


@BOTH
def test_fake_tensors(make: Any, ops: Ops) -> None:
    """Fake under the mode, fake outside of it, and a module whose parts only are fake."""
    module, x = make(Case("sp24"))
    module.requires_grad_(False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(x)
    with mode:
        assert isinstance(module(fake), FakeTensor)
    assert isinstance(module(fake), FakeTensor)
    parts = {name: mode.from_tensor(t) for name, t in module.state_dict().items()}
    y = torch.func.functional_call(module, parts, (x,))
    assert isinstance(y, FakeTensor)
    assert y.shape == module(x).shape
    assert ops == [op_of(module)] * 3


@BOTH
def test_functorch(make: Any, ops: Ops) -> None:
    """Transforms meet the op, which has no batching rule, or the Function around it; neither may be passed by."""
    module, x = make(Case("csr"))
    batch = torch.stack([x, x + 1])
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda t: module(t).sum())(x)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vjp(module, x)
    module.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(module)(batch)
    assert ops == [op_of(module)]


@BOTH
def test_a_thread_that_is_not_watched(make: Any, ops: Ops) -> None:
    """Modes belong to a thread: another one still goes straight, and computes the same."""
    from concurrent.futures import ThreadPoolExecutor

    module, x = make(Case("csr"))
    module.requires_grad_(False)
    with ThreadPoolExecutor(1) as pool, Recorder():
        other = pool.submit(module, x).result()
        assert ops == []
        assert torch.equal(other, module(x))
    assert ops == [op_of(module)]


def test_without_torch_s_internals() -> None:
    """Where a torch names its internals otherwise, every call goes through its op."""
    code = """
import torch
del torch._C._dispatch_keys
import sparsekern as sk
from sparsekern import _library
linear = torch.nn.Linear(32, 16)
module = sk.SparseLinear.from_dense(linear, format="csr")
x = torch.randn(5, 32)
assert not _library.unwatched(module.values, x)
torch.testing.assert_close(module(x), linear(x))
module(x).sum().backward()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr


# Nothing of a call is kept ------------------------------------------------------------------------------------


@BOTH
@param(FOUR)
def test_a_module_follows_its_parts(make: Any, case: Case) -> None:
    """Replaced, moved, loaded, changed in place or past the version counter: the next call sees it."""
    module, x = make(case)

    def right() -> Tensor:
        """What plain torch makes of the parts as they are now."""
        if isinstance(module, SparseLinear):
            return sk.linear(x.to(module.values.dtype), module.packed, module.bias, "relu", backend="ref")
        assert isinstance(module, SparseConv2d)
        dense = module.to_dense()
        return nn.functional.conv2d(x.to(dense.weight.dtype), dense.weight, dense.bias).relu()

    def check(tolerance: float = 1e-5) -> None:
        torch.testing.assert_close(module(x.to(module.values.dtype)), right(), rtol=tolerance, atol=tolerance)

    other, _ = make(case)
    other.values.data.mul_(3)
    with torch.no_grad():
        for _ in range(3):
            check()
        module.values = nn.Parameter(module.values * 2)
        check()
        module.values.mul_(0.5)
        check()
        module.values.data.add_(module.values.data)
        check()
        module.values.data = module.values.data.clone() * 0.25
        check()
        module.bias = nn.Parameter(-module.bias)
        check()
        module.load_state_dict(other.state_dict())
        check()
        dense = (case.dense(N, K, seed=5) * 2).view(*other.dense_shape)
        module.load_state_dict({"weight": dense, "bias": module.bias.clone()})
        torch.testing.assert_close(module.dense_weight(), dense)
        check()
        module.to(torch.bfloat16)
        check(3e-2)
        module.to(torch.float64)
        check()
        module.float()
        check()
        twin = copy.deepcopy(module)
        twin.values.zero_()
        check()
        doubled = torch.func.functional_call(module, {"values": module.values * 2, "bias": module.bias * 2}, (x,))
        torch.testing.assert_close(doubled, module(x) * 2)
        check()


@BOTH
@param(FOUR)
def test_a_change_of_instruction_set_is_followed(make: Any, case: Case) -> None:
    module, x = make(case)
    host = _ext.host()
    best = host.active_isa()
    with torch.no_grad():
        before = module(x)
        with host_isa("portable"):
            assert host.active_isa() == "portable"
            torch.testing.assert_close(module(x), before)
        assert host.active_isa() == best
        assert torch.equal(module(x), before)
        module.backend = "ref"
        torch.testing.assert_close(module(x), before)
        module.backend = "cuda"
        with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run"):
            module(x)


@BOTH
def test_nothing_holds_a_weight_that_is_gone(make: Any) -> None:
    """Whoever moves weights in and out of memory must find the memory free after a call."""
    import weakref

    module, x = make(Case("sp24"))
    with torch.no_grad():
        module(x)
        old = weakref.ref(module.values)
        module.values = nn.Parameter(module.values.clone())
    assert old() is None


def test_environment_is_followed() -> None:
    """SPARSEKERN_ISA and the straight road in one fresh process."""
    code = """
import torch, sparsekern as sk
from sparsekern import _ext
linear = torch.nn.Linear(32, 16)
module = sk.SparseLinear.from_dense(linear, format="bitmap")
x = torch.randn(3, 32)
with torch.no_grad():
    torch.testing.assert_close(module(x), linear(x))
assert _ext.host().active_isa() == "portable"
"""
    env = {**os.environ, "SPARSEKERN_ISA": "portable"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr


@param(FOUR)
def test_ops_launch_on_the_card_of_the_weight(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every op, whichever GPU is current; the straight road is for the current one alone."""
    entered = []
    monkeypatch.setattr(_library, "on_card", lambda t: entered.append(t.data_ptr()) or contextlib.nullcontext())
    layout, x = case.pack(case.dense(N, K)), random_dense(5, K)
    _library.MM[layout.format](*layout.parts, x, None, "none", None)
    assert entered == [layout.values.data_ptr()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@param(FOUR)
def test_a_card_that_is_not_current(case: Case) -> None:
    dense, x = case.dense(64, 64), random_dense(5, 64)
    with torch.cuda.device(0):
        w = sk.SparseTensor(case.pack(dense).to(device="cuda:1"))
        y = sk.linear(x.to("cuda:1"), w)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), x @ dense.t(), rtol=1e-2, atol=1e-2)
