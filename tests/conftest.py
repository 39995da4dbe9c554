"""The `backend` fixture: a numerics test runs on the oracle, on every instruction set of the host kernels, and on the
GPU's backends: where there is a GPU on CUDA tensors, elsewhere in the emulator and in Triton's interpreter.

A backend that gives a reason why it cannot run a case must raise it when it is asked for by name; such
refusals are counted and listed at the end of the run, so that nothing is skipped in silence.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

ON_CARD = torch.cuda.is_available()

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
    """One way to compute: a backend on a device, the host kernels at one instruction set. Goes through torch.ops."""

    name: str
    isa: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.name}{where}" if self.isa is None else f"{self.name}[{self.isa}]"

    @property
    def simulated(self) -> bool:
        """Whether a GPU's kernels run on the CPU, which is slow."""
        return self.device == "cpu" and self.name in ("cuda", "triton")

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
    *([] if ON_CARD else [Backend("cuda")]),
    *(Backend(name, device="cuda") for name in ("cuda", "triton", "vendor", "ref") if ON_CARD),
]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen = request.param
    on_gpu = chosen.name == "cuda" or chosen.device == "cuda"
    module = request.getfixturevalue("device_module") if chosen.name == "cuda" else None
    with host_isa(chosen.isa), running_on_device(module, SCHEDULES[-1]) if on_gpu else nullcontext():
        yield chosen


@pytest.fixture(params=[b for b in BACKENDS if b.name == "host"], ids=str)
def host_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The host kernels only, at each instruction set."""
    with host_isa(request.param.isa):
        yield request.param


# On a machine with a GPU the kernels run there; elsewhere in the emulator, under each of its schedules.
SCHEDULES = ["hardware"] if ON_CARD else ["ascending", "descending", "random 1"]
LAUNCHES = SCHEDULES * (4 if ON_CARD else 1)  # a card has no schedules to choose from: it is asked again


@pytest.fixture(scope="session")
def device_module() -> Any:
    """The GPU kernels: those of the card, or the emulator, built when its sources have changed."""
    if not ON_CARD:
        return build_emulator()
    reason = _ext.why_not_cuda()
    if reason is not None:
        pytest.fail(reason, pytrace=False)
    return SimpleNamespace(**vars(_ext.cuda()), set_schedule=lambda order, seed: None)


@pytest.fixture(scope="session")
def probes(request: pytest.FixtureRequest) -> Any:
    """Single instructions (tests/emulator/probes.cu), on a card in a module of their own."""
    return build_probes() if ON_CARD else request.getfixturevalue("device_module")


def runs_fp8_mma_sp() -> bool:
    """Whether mma.sp of e4m3 runs here: in the emulator, and on cards of 8.9 and 12.x.

    For others it is compiled to a trap (csrc/device/mma.h), which would take the CUDA context and all later tests
    of the process with it.
    """
    return not ON_CARD or _ext.capability(torch.device("cuda", 0)) in (89, 120, 121)


@contextmanager
def running_on_device(module: Any, schedule: str) -> Iterator[Any]:
    """The `cuda` backend: tensors on the GPU, or on the CPU and its kernels emulated under this schedule."""
    order, _, seed = schedule.partition(" ")
    reduced = torch.backends.cuda.matmul
    before = reduced.allow_fp16_reduced_precision_reduction, reduced.allow_bf16_reduced_precision_reduction
    if ON_CARD:
        torch.set_default_device("cuda")
        # Where a product is cuBLAS's: partial sums of 16 bits are not what is tested here.
        reduced.allow_fp16_reduced_precision_reduction = reduced.allow_bf16_reduced_precision_reduction = False
    else:
        module.set_schedule(order, int(seed or 0))
        _ext.emulate(module)
    try:
        yield module
        if ON_CARD:
            torch.cuda.synchronize()
    finally:
        torch.set_default_device(None)
        _ext.emulate(None)
        reduced.allow_fp16_reduced_precision_reduction, reduced.allow_bf16_reduced_precision_reduction = before


@pytest.fixture(params=SCHEDULES)
def emulated(device_module: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The `cuda` backend under every schedule."""
    with running_on_device(device_module, request.param) as module:
        yield module


@pytest.fixture
def probed(emulated: Any, probes: Any) -> Any:
    """The probes under every schedule."""
    return probes


@pytest.fixture
def emulated_once(device_module: Any) -> Iterator[Any]:
    """The `cuda` backend under one random schedule, where what is tested has nothing to do with the order."""
    with running_on_device(device_module, SCHEDULES[-1]) as module:
        yield module


@pytest.fixture
def fp8_sums(device_module: Any) -> Iterator[None]:
    """The emulator's tensor cores keep 14 bits of fp8 sums (csrc/device/twin.h), as the hardware does."""
    if not ON_CARD:
        device_module.set_fp8_sum_bits(14)
    yield
    if not ON_CARD:
        device_module.set_fp8_sum_bits(0)


@dataclass(frozen=True)
class Fp8Bounds:
    """||out - ref|| / ||ref|| of float32 results of e4m3 products: sums left in the tensor cores, or promoted."""

    fast: float
    promoted: float


@pytest.fixture(params=["14 bits"] if ON_CARD else ["float32 sums", "14 bits"])
def fp8_bounds(request: pytest.FixtureRequest) -> Fp8Bounds:
    """What e4m3 products must stay within: nearly exact in an emulator whose sums are floats; on a card, and in the
    emulator with sums like a card's (1.6e-4 fast and 5.6e-5 promoted there), what 14 bits allow."""
    if request.param == "float32 sums":
        return Fp8Bounds(2e-6, 2e-6)
    request.getfixturevalue("fp8_sums")
    return Fp8Bounds(1e-3, 2e-4)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """One thread unless a test asks for more: on a busy machine spinning threads cost more than they win."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Simulated GPUs are slow: of the tests with the fixture Triton's interpreter runs those marked `interpreted`, no
    others, and the emulator all but those marked `unemulated`.

    What runs on the CPU's backends is marked `on_cpu`, and what Triton must compile `on_triton`, for scripts/gpu.
    """

    def too_slow(item: pytest.Item) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        given = params.get("backend", params.get("host_backend"))
        if isinstance(given, Backend) and given.device == "cpu" and not given.simulated:
            item.add_marker(pytest.mark.on_cpu)
        if isinstance(given, Backend) and given.name == "triton":
            item.add_marker(pytest.mark.on_triton)
        if not isinstance(given, Backend) or not given.simulated:
            return False
        if given.name == "cuda":
            return item.get_closest_marker("unemulated") is not None
        return item.get_closest_marker("interpreted") is None

    slow = {id(item): item for item in items if too_slow(item)}
    if slow:
        config.hook.pytest_deselected(items=list(slow.values()))
        items[:] = [item for item in items if id(item) not in slow]


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
