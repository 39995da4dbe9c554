"""The `backend` fixture: a numerics test runs on the oracle, on every instruction set of the host kernels, and on
the Triton kernels in Triton's interpreter (on a machine with a GPU test_bsr_triton.py runs them there instead).

A backend that gives a reason why it cannot run a case must raise it when it is asked for by name; such
refusals are counted and listed at the end of the run, so that nothing is skipped in silence.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator.build import build as build_emulator
from emulator.build import build_probes
from hypothesis import HealthCheck, settings
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton and the kernels are imported, which is later

from sparsekern import _ext, dispatch
from sparsekern._library import MM, MM_T, SDDMM
from sparsekern.layout import Layout
from sparsekern.testing import host_isa

settings.register_profile(
    "sparsekern",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("sparsekern")

REFUSALS: Counter[str] = Counter()


def host_isas() -> list[str]:
    """The instruction sets that were built and that this processor has; none without the compiled module."""
    if _ext.why_not_host() is not None:
        return []
    module = _ext.host()
    return [name for name in module.built_isas() if name in module.supported_isas()]


@dataclass(frozen=True)
class Backend:
    """One way to compute: the oracle, the host kernels at one instruction set, Triton. Goes through torch.ops."""

    name: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}[{self.isa}]"

    def runs(self, op: str, layout: Layout, x: Tensor) -> bool:
        """Whether it can run this case; where not, proves that it refuses with its reason, and notes it."""
        reason = dispatch.why_not(self.name, op, layout, x)
        if reason is None:
            return True
        with pytest.raises(NotImplementedError) as caught:
            self._call(op, layout, x)
        assert reason in str(caught.value)
        assert f"{layout.format}_{op}" in str(caught.value)
        REFUSALS[f"{self.name} {layout.format}_{op}: {reason}"] += 1
        return False

    def _call(self, op: str, layout: Layout, x: Tensor) -> Tensor:
        n, k = layout.shape
        if op == "mm":
            return self.mm(layout, x)
        if op == "mm_t":
            return self.mm_t(layout, x.new_zeros(x.shape[0], n))
        return self.sddmm(layout, x.new_zeros(x.shape[0], n), x.new_zeros(x.shape[0], k))

    def mm(self, layout: Layout, x: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
        return MM[layout.format](*layout.parts, x, bias, activation, self.name)

    def mm_t(self, layout: Layout, dy: Tensor) -> Tensor:
        return MM_T[layout.format](*layout.parts, dy, self.name)

    def sddmm(self, layout: Layout, dy: Tensor, x: Tensor) -> Tensor:
        return SDDMM[layout.format](*layout.parts, dy, x, self.name)


BACKENDS = [
    Backend("ref"),
    *(Backend("host", isa) for isa in host_isas()),
    *([Backend("triton")] if _ext.why_not_triton(torch.device("cpu")) is None else []),
]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with host_isa(request.param.isa):
        yield request.param


@pytest.fixture(params=[b for b in BACKENDS if b.name == "host"], ids=str)
def host_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The host kernels only, at each instruction set."""
    with host_isa(request.param.isa):
        yield request.param


# On a machine with a GPU the kernels run there; elsewhere in the emulator, under each of its schedules.
SCHEDULES = ["hardware"] if torch.cuda.is_available() else ["ascending", "descending", "random 1", "random 2"]


@pytest.fixture(scope="session")
def device_module() -> Any:
    """The GPU kernels and the probes of single instructions: the emulator, built when its sources have changed."""
    if SCHEDULES != ["hardware"]:
        return build_emulator()
    parts = {**vars(build_probes()), **vars(_ext.cuda())}
    return SimpleNamespace(**parts, set_schedule=lambda order, seed: None)


@contextmanager
def running_on_device(module: Any, schedule: str) -> Iterator[Any]:
    """The `cuda` backend: tensors on the GPU, or on the CPU and its kernels emulated under this schedule."""
    order, _, seed = schedule.partition(" ")
    if order == "hardware":
        torch.set_default_device("cuda")
    else:
        module.set_schedule(order, int(seed or 0))
        _ext.emulate(module)
    try:
        yield module
        if order == "hardware":
            torch.cuda.synchronize()
    finally:
        torch.set_default_device(None)
        _ext.emulate(None)


@pytest.fixture(params=SCHEDULES)
def emulated(device_module: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The `cuda` backend under every schedule."""
    with running_on_device(device_module, request.param) as module:
        yield module


@pytest.fixture
def emulated_once(device_module: Any) -> Iterator[Any]:
    """The `cuda` backend under one random schedule, where what is tested has nothing to do with the order."""
    with running_on_device(device_module, SCHEDULES[-1]) as module:
        yield module


@pytest.fixture
def fp8_sums(device_module: Any) -> Iterator[None]:
    """The emulator's tensor cores keep 14 bits of fp8 sums (csrc/device/twin.h), as the hardware does."""
    if SCHEDULES != ["hardware"]:
        device_module.set_fp8_sum_bits(14)
    yield
    if SCHEDULES != ["hardware"]:
        device_module.set_fp8_sum_bits(0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """One thread unless a test asks for more: on a busy machine spinning threads cost more than they win."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter is slow: of the tests with the fixture it runs those marked `interpreted`, no others."""

    def too_slow(item: pytest.Item) -> bool:
        given = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        return isinstance(given, Backend) and given.name == "triton" and item.get_closest_marker("interpreted") is None

    slow = [item for item in items if too_slow(item)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not too_slow(item)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several test processes hands its refusals to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["refusals"] = dict(REFUSALS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    REFUSALS.update(getattr(node, "workeroutput", {}).get("refusals", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REFUSALS:
        terminalreporter.section("cases that a backend refused, with its reason")
        for line, count in sorted(REFUSALS.items()):
            terminalreporter.line(f"{count:5d} x {line}")
